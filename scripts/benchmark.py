"""Time and memory of the library's parts: `python scripts/benchmark.py --part metrics`."""

import argparse
import contextlib
import importlib
import io
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil

from modeling_diffusionvmr import __version__
from modeling_diffusionvmr.annotations import SALIENCY_CLIP_SECONDS, load_annotations, load_jsonl, whole_file
from modeling_diffusionvmr.command_line import run
from modeling_diffusionvmr.metrics import evaluate_predictions

# Simulated data have QVHighlights' shape
QUERIES, DURATION, MOST_WINDOWS, PROPOSALS = 1550, 150, 4, 10
BACKBONE_SIZES, TEXT_SIZE, NUM_TOKENS = {"slowfast": 2304, "clip": 512}, 512, 20
BATCH_SIZE = 32


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
    from modeling_diffusionvmr.conversion import MomentRetrievalBuilder, Source, convert

    class Simulated(MomentRetrievalBuilder):
        TITLE, ABOUT, LICENSE = "Simulated", "Random numbers of QVHighlights' shape.", "other"
        HOMEPAGE = CITATION = ""

    rows = simulate_truth(seed, num_videos)
    videos, sentences = [row["vid"] for row in rows], [row["qid"] for row in rows]
    num_clips = int(DURATION / SALIENCY_CLIP_SECONDS)
    backbones = {name: SimulatedFeatures(videos, num_clips, size, seed) for name, size in BACKBONE_SIZES.items()}
    text = SimulatedFeatures(sentences, NUM_TOKENS, TEXT_SIZE, seed)
    convert(Simulated, Source({"train": rows}, backbones, text, SALIENCY_CLIP_SECONDS), folder)


def open_folder(folder: Path, samples: int, repeats: int, seed: int) -> dict[str, float]:
    """Seconds and MiB until all is open, and how many training samples a second this process then makes."""
    import datasets  # noqa: F401  what is imported is not what is measured
    import pyarrow.parquet  # noqa: F401

    from modeling_diffusionvmr import DiffusionVMRConfig, DiffusionVMRProcessor, MomentRetrievalDataset
    from modeling_diffusionvmr.features import open_text_features, open_video_features

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


PARTS = {
    "data": measure_data,
    "metrics": measure_metrics,
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
    metrics = parser.add_argument_group("--part metrics")
    metrics.add_argument("--predictions", metavar="P.jsonl", help="in the official format (default: simulated)")
    metrics.add_argument("--annotations", help="with the truth (default: simulated, of QVHighlights' shape)")
    metrics.add_argument(
        "--official", metavar="CHECKOUT", help="of moment_detr, whose script is measured, too; it needs scikit-learn"
    )
    return parser.parse_args(arguments)


def main(arguments: argparse.Namespace) -> None:
    if arguments.repeats < 1:
        raise ValueError(f"--repeats must be above 0, got {arguments.repeats}")
    result = PARTS[arguments.part](arguments)
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "numpy": version("numpy")}
    result = {"part": arguments.part, "version": __version__, **machine, "repeats": arguments.repeats, **result}
    print(", ".join(f"{name}: {value}" for name, value in result.items() if name != "table"))
    print_table(result["table"])
    if arguments.output:
        with whole_file(arguments.output) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"saved {arguments.output}")


if __name__ == "__main__":
    run(main, parse_arguments())
