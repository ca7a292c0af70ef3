"""Measure the time and memory that parts of the library take."""

import argparse
import contextlib
import importlib
import io
import itertools
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, default_collate
from tqdm.auto import tqdm
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from modeling_diffusionvmr import (
    DiffusionVMRConfig,
    DiffusionVMRDataCollator,
    DiffusionVMRForMomentRetrieval,
    DiffusionVMRProcessor,
    MomentRetrievalDataset,
    __version__,
    loss_diffusionvmr,
)
from modeling_diffusionvmr.base_backbone import Backbone, encode_video
from modeling_diffusionvmr.checks import check_positive
from modeling_diffusionvmr.cli.errors import run_safely
from modeling_diffusionvmr.cli.options import CommandParser, check_device
from modeling_diffusionvmr.cli.settings import SettingsParser
from modeling_diffusionvmr.data.annotations import SALIENCY_CLIP_SECONDS, load_annotations
from modeling_diffusionvmr.data.extraction import VIDEOS_AT_ONCE, Output, extract_videos
from modeling_diffusionvmr.data.files import load_jsonl, save_json
from modeling_diffusionvmr.dual_encoders import ClipBackbone
from modeling_diffusionvmr.slowfast import SlowFastBackbone, SlowFastConfig, SlowFastModel
from modeling_diffusionvmr.training.metrics import evaluate_predictions
from modeling_diffusionvmr.video import Video, open_video

# Simulated data has the size of QVHighlights
QUERIES, DURATION, MAX_WINDOWS, PROPOSALS = 1550, 150, 4, 10
BACKBONE_SIZES, TEXT_SIZE, NUM_TOKENS = {"slowfast": 2304, "clip": 512}, 512, 20
BATCH_SIZE = 32
WARM_UP_STEPS = 3


def peak_mib() -> float:
    """Return the peak memory of this process so far, without its children."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def resident_mib() -> float:
    """Return the memory that this process uses now."""
    return psutil.Process().memory_info().rss / 2**20


def alternate(jobs: dict[str, Callable], repeats: int) -> dict[str, tuple]:
    """
    Run each job `repeats` times. The jobs take turns, so that other load on the machine affects all of them alike.

    Returns:
        For each job its median seconds, the peak MiB of the process after its first run, and its result.
    """
    seconds, peaks, results = {name: [] for name in jobs}, {}, {}
    for _ in range(repeats):
        for name, job in jobs.items():
            started = time.perf_counter()
            results[name] = job()
            seconds[name].append(time.perf_counter() - started)
            peaks.setdefault(name, peak_mib())
    return {name: (statistics.median(seconds[name]), peaks[name], results[name]) for name in jobs}


def simulate_truth(seed: int, num_queries: int = QUERIES) -> list[dict]:
    """Draw rows like those of QVHighlights: up to four windows on a grid of clips, with three scores per clip."""
    rng, num_clips = np.random.default_rng(seed), DURATION // SALIENCY_CLIP_SECONDS
    rows = []
    for qid in range(num_queries):
        edges = np.sort(rng.choice(num_clips + 1, 2 * rng.integers(1, MAX_WINDOWS + 1), replace=False))
        windows = edges.reshape(-1, 2)
        clips = np.concatenate([np.arange(start, end) for start, end in windows])
        rows.append(
            {
                "qid": qid,
                "query": f"simulated query {qid}",
                "vid": f"simulated_{qid}",
                "duration": DURATION,
                "relevant_windows": (windows * SALIENCY_CLIP_SECONDS).tolist(),
                "relevant_clip_ids": clips.tolist(),
                "saliency_scores": rng.integers(0, 5, (len(clips), 3)).tolist(),
            }
        )
    return rows


def simulate_predictions(rows: list[dict], seed: int) -> list[dict]:
    """Draw ten windows per row, half of them near a true one, by descending score, and one saliency score per clip."""
    rng, predictions = np.random.default_rng([seed, 1]), []
    for row in rows:
        windows = rng.uniform(0, row["duration"], (PROPOSALS, 2))
        true = rng.choice(np.asarray(row["relevant_windows"], dtype=float), PROPOSALS // 2)
        windows[: len(true)] = true + rng.normal(scale=3.0, size=true.shape)
        windows = np.sort(windows.clip(0, row["duration"]), axis=1)
        scores = np.sort(rng.random(PROPOSALS))[::-1]
        predictions.append(
            {
                **{name: row[name] for name in ("qid", "query", "vid")},
                "pred_relevant_windows": np.column_stack([rng.permutation(windows), scores]).round(4).tolist(),
                "pred_saliency_scores": rng.normal(size=int(row["duration"] / SALIENCY_CLIP_SECONDS)).tolist(),
            }
        )
    return predictions


def official_evaluation(checkout: str) -> Callable:
    """Return `eval_submission` of a checkout of github.com/jayleicn/moment_detr, without its printed output."""
    if not (Path(checkout) / "standalone_eval" / "eval.py").is_file():
        raise ValueError(f"{checkout}: not a checkout of moment_detr (it has no standalone_eval/eval.py)")
    sys.path.insert(0, str(Path(checkout).resolve()))
    evaluate = importlib.import_module("standalone_eval.eval").eval_submission

    def silently(predictions, references) -> dict:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                return evaluate(predictions, references, verbose=False)
        except Exception as error:  # it does not check its input, so errors can be of any type
            raise ValueError(f"the official script fails on these files ({type(error).__name__}: {error})") from error

    return silently


def measure_metrics(arguments: argparse.Namespace) -> dict:
    """Measure `evaluate_predictions` and, with `--official`, the official script."""
    if arguments.predictions and not arguments.annotations:
        raise ValueError("--predictions also needs --annotations")
    rows = load_annotations(arguments.annotations) if arguments.annotations else simulate_truth(arguments.seed)
    without = [row["qid"] for row in rows if not row.get("relevant_windows")]
    if without:
        raise ValueError(f"{arguments.annotations}: qid {without[0]} has no true windows")
    if arguments.predictions:
        predictions = load_jsonl(arguments.predictions)
    else:
        predictions = simulate_predictions(rows, arguments.seed)
    jobs = {"evaluate_predictions": lambda: evaluate_predictions(predictions, rows)}
    if arguments.official:
        evaluate = official_evaluation(arguments.official)
        jobs["official script"] = lambda: evaluate(predictions, rows)
    measured = alternate(jobs, arguments.repeats)
    ours, _, numbers = measured["evaluate_predictions"]
    table = []
    for name, (seconds, peak, result) in measured.items():
        line = {"what": name, "seconds": round(seconds, 4), "times ours": round(seconds / ours, 2), "peak MiB": peak}
        if arguments.official:
            line["same numbers"] = all(numbers.get(key) == value for key, value in result.items())
        table.append(line)
    return {
        "queries": len(rows),
        "annotations": arguments.annotations or f"simulated (seed {arguments.seed})",
        "predictions": arguments.predictions or f"simulated (seed {arguments.seed})",
        "table": table,
    }


class RandomFeatures(Mapping):
    """Arrays cut from one block of random numbers: as large on disk as real features, and fast to make."""

    def __init__(self, identifiers: Sequence, length: int, size: int, seed: int):
        block_length = 4096
        self.block = np.random.default_rng(seed).normal(size=(block_length, size)).astype(np.float16)
        self.starts = {name: index * 37 % (block_length - length) for index, name in enumerate(identifiers)}
        self.length = length

    def __getitem__(self, identifier) -> np.ndarray:
        return self.block[self.starts[identifier] :][: self.length]

    def __iter__(self):
        return iter(self.starts)

    def __len__(self) -> int:
        return len(self.starts)


def make_folder(folder: Path, num_videos: int, seed: int) -> None:
    """Write a converted folder with one query per video and features of the sizes of QVHighlights."""
    from modeling_diffusionvmr.data.benchmarks import Benchmark
    from modeling_diffusionvmr.data.conversion import Source, convert

    rows = simulate_truth(seed, num_videos)
    videos, sentences = [row["vid"] for row in rows], [row["qid"] for row in rows]
    num_clips = int(DURATION / SALIENCY_CLIP_SECONDS)
    backbones = {name: RandomFeatures(videos, num_clips, size, seed) for name, size in BACKBONE_SIZES.items()}
    text = RandomFeatures(sentences, NUM_TOKENS, TEXT_SIZE, seed)
    simulated = Benchmark("Simulated", "Random numbers in the shape of QVHighlights.")
    convert(simulated, Source({"train": rows}, backbones, text, SALIENCY_CLIP_SECONDS), folder)


def open_folder(folder: Path, samples: int, repeats: int, seed: int) -> dict[str, float]:
    """Measure the seconds and MiB to open a converted folder, and the training samples per second read from it."""
    import datasets  # noqa: F401  imported first, so that the import is not measured
    import pyarrow.parquet  # noqa: F401

    from modeling_diffusionvmr.data.features import open_text_features, open_video_features

    torch.set_num_threads(1)  # as in a worker of a `DataLoader`
    before, started = resident_mib(), time.perf_counter()
    rows = load_annotations(folder, "train")
    video, text = open_video_features([folder]), open_text_features(folder, rows)
    seconds, memory = time.perf_counter() - started, resident_mib() - before
    dataset = MomentRetrievalDataset(rows, video, text, DiffusionVMRProcessor(), DiffusionVMRConfig())
    order = np.random.default_rng(seed).permutation(len(dataset))[:samples].tolist()
    rates = []
    for _ in range(repeats):
        started = time.perf_counter()
        for first in range(0, len(order), BATCH_SIZE):
            dataset.__getitems__(order[first : first + BATCH_SIZE])
        rates.append(len(order) / (time.perf_counter() - started))
    return {"seconds": seconds, "MiB": memory, "rate": statistics.median(rates)}


def measure_data(arguments: argparse.Namespace) -> dict:
    """Measure the first and the second opening of a converted folder, each in its own process."""
    if arguments.work_dir is not None and not Path(arguments.work_dir).is_dir():
        raise ValueError(f"--work_dir: {arguments.work_dir} is not a folder")
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as work:
        folder = Path(work) / "simulated"
        # With an empty cache, the first opening really is the first
        os.environ["HF_DATASETS_CACHE"] = f"{work}/cache"
        started = time.perf_counter()
        make_folder(folder, arguments.videos, arguments.seed)
        converted = time.perf_counter() - started
        size = sum(path.stat().st_size for path in folder.rglob("*.parquet"))
        table = []
        for name in ("first opening", "second opening"):
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                opened = process.submit(open_folder, folder, arguments.samples, arguments.repeats, arguments.seed)
                figures = opened.result()
            table.append(
                {
                    "what": name,
                    "seconds": round(figures["seconds"], 2),
                    "MiB beyond imports": round(figures["MiB"]),
                    "samples per second": round(figures["rate"]),
                }
            )
    return {
        "data": f"simulated (seed {arguments.seed})",
        "videos": arguments.videos,
        "MiB of Parquet": round(size / 2**20),
        "seconds to convert": round(converted, 1),
        "table": table,
    }


class Clock:
    """Measures seconds by name. Unlike training itself, it waits for the device before and after each measurement."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, name: str):
        self._wait()
        started = time.perf_counter()
        yield
        self._wait()
        self.seconds[name] += time.perf_counter() - started

    def _wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextlib.contextmanager
    def inside(self, module, function_name: str, name: str):
        """Measure every call of a module's function inside the block."""
        function = getattr(module, function_name)

        def measured(*args, **kwargs):
            with self(name):
                return function(*args, **kwargs)

        setattr(module, function_name, measured)
        try:
            yield
        finally:
            setattr(module, function_name, function)


def make_training(arguments: argparse.Namespace, settings: argparse.Namespace):
    """Return the model of a preset, and a dataset of simulated features of the sizes it needs."""
    config = DiffusionVMRConfig(**settings.config)
    sizes = [entry["feature_size"] for entry in config.backbones or [] if "feature_size" in entry]
    sizes = sizes if sum(sizes) == config.video_feature_size else [config.video_feature_size]
    rows = simulate_truth(arguments.seed, 8 * arguments.batch_size)
    videos, sentences = [row["vid"] for row in rows], [row["qid"] for row in rows]
    num_clips = int(DURATION / SALIENCY_CLIP_SECONDS)
    dataset = MomentRetrievalDataset(
        rows,
        [RandomFeatures(videos, num_clips, size, arguments.seed) for size in sizes],
        RandomFeatures(sentences, NUM_TOKENS, config.text_feature_size, arguments.seed),
        DiffusionVMRProcessor(sizes, config.text_feature_size, config.max_clips, config.max_tokens),
        config,
        SALIENCY_CLIP_SECONDS,
    )
    torch.manual_seed(arguments.seed)
    return DiffusionVMRForMomentRetrieval(config), dataset


def measure_training(arguments: argparse.Namespace) -> dict:
    """Measure the time that each part of a training step takes."""
    check_device(arguments.device)
    device = torch.device(arguments.device)
    settings = SettingsParser("train", ["--preset", arguments.preset, *arguments.flags]).parse_settings()
    model, dataset = make_training(arguments, settings)
    model.to(device).train()
    loader = DataLoader(dataset, arguments.batch_size, shuffle=True, collate_fn=DiffusionVMRDataCollator())
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.training["learning_rate"])
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bool(settings.training.get("bf16")))

    clock = Clock(device)
    with clock.inside(loss_diffusionvmr, "match", "matching"):
        for step in tqdm(range(WARM_UP_STEPS + arguments.steps), desc="training", unit="step"):
            if step == WARM_UP_STEPS:
                clock.seconds.clear()
            with clock("data"):
                batch = send_to_device(next(batches), device)
            with clock("forward and loss"), autocast:
                loss = model(**batch).loss
            with clock("backward"):
                loss.backward()
            with clock("optimizer"):
                torch.nn.utils.clip_grad_norm_(model.parameters(), settings.training["max_grad_norm"])
                optimizer.step()
                optimizer.zero_grad()
    seconds = {name: clock.seconds[name] for name in ("data", "forward and loss", "matching", "backward", "optimizer")}
    seconds["forward and loss"] -= seconds["matching"]
    total = sum(seconds.values())
    return {
        "data": f"simulated (seed {arguments.seed})",
        "preset": " ".join([arguments.preset, *arguments.flags]),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "batch size": arguments.batch_size,
        "samples per second": round(arguments.steps * arguments.batch_size / total, 1),
        "peak MiB": round(torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else peak_mib()),
        "table": [
            {"what": name, "ms per step": round(1000 * value / arguments.steps, 2), "share": f"{value / total:.1%}"}
            for name, value in seconds.items()
        ],
    }


def write_moving_texture(path: Path, seconds: float, seed: int) -> None:
    """Write a video of 720p H.264 at 30 frames per second and 2.5 Mbit/s, over which a blurred texture moves."""
    import av

    width, height, fps = 1280, 720, 30
    rng, margin = np.random.default_rng(seed), 240
    texture = rng.normal(size=(height + margin, width + margin, 3))
    for axis in (0, 1):
        texture = np.cumsum(texture, axis=axis)
        texture = np.roll(texture, -9, axis) - np.roll(texture, 9, axis)  # a moving average
    texture = (127 + 50 * texture / texture.std()).clip(0, 255).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = width, height, "yuv420p", 2_500_000
        for index in range(round(seconds * fps)):
            x, y = (round(margin * (1 + wave(index / fps)) / 2) for wave in (np.cos, np.sin))
            view = np.ascontiguousarray(texture[y : y + height, x : x + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(view, format="rgb24")))
        container.mux(stream.encode())


def random_backbones(seed: int) -> dict[str, Backbone]:
    """Return the backbones of the released features, in full size and with random weights."""
    torch.manual_seed(seed)
    clip = ClipBackbone(CLIPModel(CLIPConfig()), CLIPImageProcessorPil(), CLIPTokenizer())  # ViT-B/32 is the default
    return {"clip": clip, "slowfast": SlowFastBackbone(SlowFastModel(SlowFastConfig()))}


def encode_in_stages(backbones: Sequence[Backbone], video: Video, clock: Clock) -> None:
    """Do the work of `encode_video`, but one stage after the other, to measure each of them."""
    clips = video.clips([backbone.sampling(video.exact_clip_seconds, video.fps) for backbone in backbones])
    inputs: list[list[Any]] = [[] for _ in backbones]
    while True:
        with clock("decoding"):
            which, frames = next(clips, (None, ()))
        if which is None:
            break
        with clock("preparation"):
            inputs[which].append(backbones[which].prepare(frames))
        if len(inputs[which]) == max(1, BATCH_SIZE // len(frames)):
            with clock("forward"):
                backbones[which].encode_clips(default_collate(inputs[which]))
            inputs[which] = []
    for backbone, rest in zip(backbones, inputs):
        if rest:
            with clock("forward"):
                backbone.encode_clips(default_collate(rest))


def measure_extraction(arguments: argparse.Namespace) -> dict:
    """Measure the seconds that extraction takes per hour of video, and where they go."""
    check_device(arguments.device)
    device = torch.device(arguments.device)
    available = {name: backbone.to(device) for name, backbone in random_backbones(arguments.seed).items()}
    per_hour = 3600 / arguments.video_seconds
    table = []
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "video.mp4"
        write_moving_texture(path, arguments.video_seconds, arguments.seed)
        for names in (["clip"], ["slowfast"], ["clip", "slowfast"]):
            backbones = [available[name] for name in names]
            clock = Clock(device)
            for repeat in range(arguments.repeats):
                encode_in_stages(backbones, open_video(path, SALIENCY_CLIP_SECONDS), clock)
                with clock("one video"):
                    encode_video(backbones, open_video(path, SALIENCY_CLIP_SECONDS), BATCH_SIZE)
                outputs = [Output(Path(work, f"{len(table)}_{repeat}", name), available[name], name) for name in names]
                videos = dict.fromkeys(map(str, range(VIDEOS_AT_ONCE)), path)
                cpu_started = time.process_time()
                with clock("extract"):
                    extract_videos(outputs, videos, SALIENCY_CLIP_SECONDS, BATCH_SIZE)
                clock.seconds["CPU of extract"] += time.process_time() - cpu_started
            measured = {name: seconds / arguments.repeats for name, seconds in clock.seconds.items()}
            measured["extract"] /= VIDEOS_AT_ONCE
            measured["CPU of extract"] /= VIDEOS_AT_ONCE
            seconds = {name: round(value * per_hour) for name, value in measured.items()}
            table.append({"backbones": " + ".join(names), **seconds})
    return {
        "data": f"simulated video of {arguments.video_seconds} s (seed {arguments.seed}), random weights",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "unit": "seconds per hour of video",
        "table": table,
    }


PARTS = {
    "data": measure_data,
    "extract": measure_extraction,
    "metrics": measure_metrics,
    "training": measure_training,
}
"""Each returns a "table", a list of rows with the same columns, and further values that describe the measurement."""


def print_table(rows: list[dict]) -> None:
    """Print rows with the same columns as a Markdown table."""
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for index, row in enumerate(cells):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")
        if index == 0:
            print("| " + " | ".join("-" * width for width in widths) + " |")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="python scripts/benchmark.py", description=__doc__)
    parser.add_argument("--part", required=True, choices=PARTS, help="part of the library to measure")
    parser.add_argument("--output", metavar="FILE.json", help="save the results to this file")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each job; the median counts (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of simulated data (default: 0)")
    data = parser.add_argument_group("--part data")
    data.add_argument("--videos", type=int, default=8700, help="videos in the simulated folder (default: 8700)")
    data.add_argument("--samples", type=int, default=6000, help="training samples to read (default: 6000)")
    data.add_argument("--work_dir", metavar="DIR", help="folder for about 9 GB (default: the temporary folder)")
    training = parser.add_argument_group("--part training", "any field of the configuration is a flag, too")
    training.add_argument("--preset", default="qvhighlights", help="preset or YAML file (default: qvhighlights)")
    training.add_argument("--batch_size", type=int, default=32, help="samples per step (default: 32)")
    training.add_argument("--steps", type=int, default=20, help="steps to measure, after a warm-up (default: 20)")
    training.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: a GPU if there is one)"
    )
    extract = parser.add_argument_group("--part extract", "also has --device")
    extract.add_argument("--video_seconds", type=int, default=60, help="length of the simulated video (default: 60)")
    metrics = parser.add_argument_group("--part metrics")
    metrics.add_argument(
        "--predictions", metavar="P.jsonl", help="predictions in the official format (default: simulated)"
    )
    metrics.add_argument("--annotations", help="annotations with true windows (default: simulated)")
    metrics.add_argument(
        "--official",
        metavar="CHECKOUT",
        help="folder of a moment_detr checkout, to measure its script as well (needs scikit-learn)",
    )
    known, flags = parser.parse_known_args(arguments)
    if flags and known.part != "training":
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    known.flags = flags
    return known


def main(arguments: argparse.Namespace) -> None:
    """Measure one part, print the results and save them to `--output`."""
    for name in ("repeats", "videos", "samples", "batch_size", "steps", "video_seconds"):
        check_positive(getattr(arguments, name), f"--{name}")
    if arguments.seed < 0:
        raise ValueError(f"--seed must be at least 0, got {arguments.seed}")
    result = PARTS[arguments.part](arguments)
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "numpy": version("numpy")}
    result = {"part": arguments.part, "version": __version__, **machine, "repeats": arguments.repeats, **result}
    print(", ".join(f"{name}: {value}" for name, value in result.items() if name != "table"))
    print_table(result["table"])
    if arguments.output:
        save_json(result, arguments.output)
        print(f"saved {arguments.output}")


if __name__ == "__main__":
    run_safely(main, parse_arguments())
