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
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from modeling_diffusionvmr import __version__
from modeling_diffusionvmr.annotations import SALIENCY_CLIP_SECONDS, load_annotations, load_jsonl, whole_file
from modeling_diffusionvmr.command_line import run
from modeling_diffusionvmr.metrics import evaluate_predictions

QUERIES, DURATION, MOST_WINDOWS, PROPOSALS = 1550, 150, 4, 10  # of simulated data, which have QVHighlights' shape


def peak_mib() -> float:
    """The most memory that this process has had so far (not its children's)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


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


def simulate_truth(seed: int) -> list[dict]:
    """Rows of QVHighlights' shape: up to four windows on a grid of clips, and what three people thought of these."""
    random, num_clips = np.random.default_rng(seed), DURATION // SALIENCY_CLIP_SECONDS
    rows = []
    for qid in range(QUERIES):
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


PARTS = {"metrics": measure_metrics}  # each gives what it measured on, and a "table" of rows with the same columns


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
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "numpy": np.__version__}
    result = {"part": arguments.part, "version": __version__, **machine, "repeats": arguments.repeats, **result}
    print(", ".join(f"{name}: {value}" for name, value in result.items() if name != "table"))
    print_table(result["table"])
    if arguments.output:
        with whole_file(arguments.output) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"saved {arguments.output}")


if __name__ == "__main__":
    run(main, parse_arguments())
