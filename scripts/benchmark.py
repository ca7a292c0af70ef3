"""Time and memory of the library's parts: `python scripts/benchmark.py --part metrics`."""

import argparse
import contextlib
import importlib
import io
import itertools
import json
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

import numpy as np
import psutil
import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from modeling_diffusionvmr import (
    DiffusionVMRConfig,
    DiffusionVMRDataCollator,
    DiffusionVMRForMomentRetrieval,
    DiffusionVMRProcessor,
    MomentRetrievalDataset,
    __version__,
    loss_diffusionvmr,
)
from modeling_diffusionvmr.cli.options import run_safely
from modeling_diffusionvmr.data.annotations import SALIENCY_CLIP_SECONDS, load_annotations
from modeling_diffusionvmr.data.files import atomic_write, load_jsonl
from modeling_diffusionvmr.training.metrics import evaluate_predictions
from modeling_diffusionvmr.training.presets import load_preset, override

# Simulated data have QVHighlights' shape
QUERIES, DURATION, MOST_WINDOWS, PROPOSALS = 1550, 150, 4, 10
BACKBONE_SIZES, TEXT_SIZE, NUM_TOKENS = {"slowfast": 2304, "clip": 512}, 512, 20
BATCH_SIZE = 32
WARM_UP_STEPS = 3


def peak_mib() -> float:
    """The most memory that this process has had so far (not its children's)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def resident_mib() -> float:
    """The memory that this process has now."""
    return psutil.Process().memory_info().rss / 2**20


def alternate(jobs: dict[str, Callable], repeats: int) -> dict[str, tuple]:
    """
    Runs the jobs one after the other, again and again, so that what else the machine does is shared fairly. Gives for
    each the median of its seconds, the peak memory of the process after its first run, and its result.
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
    """Rows of QVHighlights' shape: up to four windows on a grid of clips, and what three people thought of these."""
    random, num_clips = np.random.default_rng(seed), DURATION // SALIENCY_CLIP_SECONDS
    rows = []
    for qid in range(num_queries):
        edges = np.sort(random.choice(num_clips + 1, 2 * random.integers(1, MOST_WINDOWS + 1), replace=False))
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
                "saliency_scores": random.integers(0, 5, (len(clips), 3)).tolist(),
            }
        )
    return rows


def simulate_predictions(rows: list[dict], seed: int) -> list[dict]:
    """For each row ten windows, by falling score, half of them near a true one, and a saliency score a clip."""
    random, predictions = np.random.default_rng([seed, 1]), []
    for row in rows:
        windows = random.uniform(0, row["duration"], (PROPOSALS, 2))
        true = random.choice(np.asarray(row["relevant_windows"], dtype=float), PROPOSALS // 2)
        windows[: len(true)] = true + random.normal(scale=3.0, size=true.shape)
        windows = np.sort(windows.clip(0, row["duration"]), axis=1)
        scores = np.sort(random.random(PROPOSALS))[::-1]
        predictions.append(
            {
                **{name: row[name] for name in ("qid", "query", "vid")},
                "pred_relevant_windows": np.column_stack([random.permutation(windows), scores]).round(4).tolist(),
                "pred_saliency_scores": random.normal(size=int(row["duration"] / SALIENCY_CLIP_SECONDS)).tolist(),
            }
        )
    return predictions


def official_evaluation(checkout: str) -> Callable:
    """`eval_submission` of a checkout of github.com/jayleicn/moment_detr, with its own processes, but silent."""
    if not (Path(checkout) / "standalone_eval" / "eval.py").is_file():
        raise ValueError(f"{checkout}: no checkout of moment_detr, there is no standalone_eval/eval.py")
    sys.path.insert(0, os.fspath(checkout))
    evaluate = importlib.import_module("standalone_eval.eval").eval_submission

    def silently(predictions, references) -> dict:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                return evaluate(predictions, references, verbose=False)
        except Exception as error:  # it checks little, and anything may come of it
            raise ValueError(f"the official script fails on this ({type(error).__name__}: {error})") from error

    return silently


def measure_metrics(arguments: argparse.Namespace) -> dict:
    """`evaluate_predictions`, and beside it the official script where there is a checkout."""
    if arguments.predictions and not arguments.annotations:
        raise ValueError("--predictions: --annotations is needed, too")
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


class SimulatedFeatures(Mapping):
    """Arrays cut from one block of random numbers: as large as real features on disk, and quick to make."""

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
    """A converted folder with a query a video and features of QVHighlights' sizes."""
    from modeling_diffusionvmr.data.benchmarks import Benchmark
    from modeling_diffusionvmr.data.conversion import Source, convert

    rows = simulate_truth(seed, num_videos)
    videos, sentences = [row["vid"] for row in rows], [row["qid"] for row in rows]
    num_clips = int(DURATION / SALIENCY_CLIP_SECONDS)
    backbones = {name: SimulatedFeatures(videos, num_clips, size, seed) for name, size in BACKBONE_SIZES.items()}
    text = SimulatedFeatures(sentences, NUM_TOKENS, TEXT_SIZE, seed)
    simulated = Benchmark("Simulated", "Random numbers in the shape of QVHighlights.")
    convert(simulated, Source({"train": rows}, backbones, text, SALIENCY_CLIP_SECONDS), folder)


def open_folder(folder: Path, samples: int, repeats: int, seed: int) -> dict[str, float]:
    """Seconds and MiB until all is open, and how many training samples a second this process then makes."""
    import datasets  # noqa: F401  what is imported is not what is measured
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
    """A converted folder of QVHighlights' size: opened for the first time, and again, each in a process of its own."""
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as work:
        folder = Path(work) / "simulated"
        # `datasets` keeps its Arrow files here, so that the first opening is one
        os.environ["HF_DATASETS_CACHE"] = f"{work}/cache"
        started = time.perf_counter()
        make_folder(folder, arguments.videos, arguments.seed)
        converted = time.perf_counter() - started
        size = sum(path.stat().st_size for path in folder.rglob("*.parquet"))
        table = []
        for name in ("first opening", "second opening"):
            with ProcessPoolExecutor(1, get_context("spawn")) as process:  # of which this is the only job
                opened = process.submit(open_folder, folder, arguments.samples, arguments.repeats, arguments.seed)
                figures = opened.result()
            table.append(
                {
                    "what": name,
                    "seconds": round(figures["seconds"], 2),
                    "MiB beyond imports": round(figures["MiB"]),
                    "samples a second": round(figures["rate"]),
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
    """Seconds by name. It waits for the device at every edge, which training itself does not do."""

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
        """Measures every call of a module's function."""
        function = getattr(module, function_name)

        def measured(*args, **kwargs):
            with self(name):
                return function(*args, **kwargs)

        setattr(module, function_name, measured)
        try:
            yield
        finally:
            setattr(module, function_name, function)


def make_training(arguments: argparse.Namespace, settings: dict):
    """A preset's model, and a data set of simulated features of its sizes."""
    config = DiffusionVMRConfig(**settings["config"])
    sizes = [entry["feature_size"] for entry in config.backbones or [] if "feature_size" in entry]
    sizes = sizes if sum(sizes) == config.video_feature_size else [config.video_feature_size]
    rows = simulate_truth(arguments.seed, 8 * arguments.batch_size)
    videos, sentences = [row["vid"] for row in rows], [row["qid"] for row in rows]
    num_clips = int(DURATION / SALIENCY_CLIP_SECONDS)
    dataset = MomentRetrievalDataset(
        rows,
        [SimulatedFeatures(videos, num_clips, size, arguments.seed) for size in sizes],
        SimulatedFeatures(sentences, NUM_TOKENS, config.text_feature_size, arguments.seed),
        DiffusionVMRProcessor(sizes, config.text_feature_size, config.max_clips, config.max_tokens),
        config,
        SALIENCY_CLIP_SECONDS,
    )
    torch.manual_seed(arguments.seed)
    return DiffusionVMRForMomentRetrieval(config), dataset


def measure_training(arguments: argparse.Namespace) -> dict:
    """What a training step's time goes into."""
    settings, device = override(load_preset(arguments.preset), arguments.flags), torch.device(arguments.device)
    model, dataset = make_training(arguments, settings)
    model.to(device).train()
    loader = DataLoader(dataset, arguments.batch_size, shuffle=True, collate_fn=DiffusionVMRDataCollator())
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["training"]["learning_rate"])
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bool(settings["training"].get("bf16")))

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
                torch.nn.utils.clip_grad_norm_(model.parameters(), settings["training"]["max_grad_norm"])
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
        "samples a second": round(arguments.steps * arguments.batch_size / total, 1),
        "peak MiB": round(torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else peak_mib()),
        "table": [
            {"what": name, "ms a step": round(1000 * value / arguments.steps, 2), "share": f"{value / total:.1%}"}
            for name, value in seconds.items()
        ],
    }


PARTS = {
    "data": measure_data,
    "metrics": measure_metrics,
    "training": measure_training,
}  # each gives what it measured on, and a "table" of rows with the same columns


def print_table(rows: list[dict]) -> None:
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for index, row in enumerate(cells):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")
        if index == 0:
            print("| " + " | ".join("-" * width for width in widths) + " |")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", required=True, choices=PARTS, help="what to measure")
    parser.add_argument("--output", metavar="FILE.json", help="save what was measured")
    parser.add_argument(
        "--repeats", type=int, default=5, help="runs of each job, of which the median counts (default: 5)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is simulated")
    data = parser.add_argument_group("--part data")
    data.add_argument("--videos", type=int, default=8700, help="in the simulated folder (default: 8700)")
    data.add_argument("--samples", type=int, default=6000, help="that are read (default: 6000)")
    data.add_argument("--work_dir", metavar="DIR", help="for some 9 GB (default: where temporary files go)")
    training = parser.add_argument_group("--part training", "any field of the configuration is a flag, too")
    training.add_argument("--preset", default="qvhighlights", help="(default: qvhighlights)")
    training.add_argument("--batch_size", type=int, default=32, help="(default: 32)")
    training.add_argument("--steps", type=int, default=20, help="that are measured (default: 20)")
    training.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    metrics = parser.add_argument_group("--part metrics")
    metrics.add_argument("--predictions", metavar="P.jsonl", help="in the official format (default: simulated)")
    metrics.add_argument("--annotations", help="with the truth (default: simulated, of QVHighlights' shape)")
    metrics.add_argument(
        "--official", metavar="CHECKOUT", help="of moment_detr, whose script is measured, too; it needs scikit-learn"
    )
    known, flags = parser.parse_known_args(arguments)
    if flags and known.part != "training":
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    known.flags = flags
    return known


def main(arguments: argparse.Namespace) -> None:
    if arguments.repeats < 1:
        raise ValueError(f"--repeats must be above 0, got {arguments.repeats}")
    result = PARTS[arguments.part](arguments)
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "numpy": version("numpy")}
    result = {"part": arguments.part, "version": __version__, **machine, "repeats": arguments.repeats, **result}
    print(", ".join(f"{name}: {value}" for name, value in result.items() if name != "table"))
    print_table(result["table"])
    if arguments.output:
        with atomic_write(arguments.output) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"saved {arguments.output}")


if __name__ == "__main__":
    run_safely(main, parse_arguments())
