"""`benchmark.py --part metrics`: the official metrics, beside the official script."""

import argparse
import contextlib
import io
from collections.abc import Callable

import numpy as np

from benchmark_common import alternate, official_module
from benchmark_samples import simulate_truth
from modeling_diffusionvmr.data.annotations import SALIENCY_CLIP_SECONDS, load_annotations
from modeling_diffusionvmr.data.files import load_jsonl
from modeling_diffusionvmr.training.metrics import evaluate_predictions

PROPOSALS = 10


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
    evaluate = official_module(checkout, "standalone_eval.eval").eval_submission

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
