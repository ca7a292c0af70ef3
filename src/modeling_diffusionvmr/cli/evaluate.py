"""`diffusionvmr evaluate`: score a model with the official metrics."""

import argparse
import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from .options import (
    CommandParser,
    add_data_arguments,
    add_device_argument,
    add_model_arguments,
    add_retrieval_arguments,
    check_output,
    check_retrieval_arguments,
    choose_device,
    clip_seconds_of,
    load_model,
    resolve_model,
)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of `diffusionvmr evaluate`."""
    parser = CommandParser(
        "evaluate",
        description="Predict the moments of a benchmark, and score them with the official metrics.\n"
        "Writes predictions.jsonl and, if there is ground truth, metrics.json.\n"
        "With several numbers of proposals or of sampling steps, tries each pair, encodes every\n"
        "query only once, and writes the results of the best; use a validation split for that.\n"
        "Every proposal counts, unless --top_k, --threshold\n"
        "or --nms_threshold is given: what is saved with the model for its users is ignored.",
    )
    add_model_arguments(parser)
    add_data_arguments(parser)
    parser.add_argument(
        "--output_dir", type=Path, default=Path("evaluation"), metavar="DIR", help="output folder (default: evaluation)"
    )
    add_retrieval_arguments(parser, several=True)
    parser.add_argument("--metric", default="MR-full-mAP", help="metric that chooses N and S (default: MR-full-mAP)")
    parser.add_argument(
        "--round_to",
        type=float,
        metavar="SECONDS",
        help="round starts and ends to multiples of this (2 in the official evaluation of QVHighlights)",
    )
    parser.add_argument("--batch_size", type=int, default=100, help="queries per batch (default: 100)")
    add_device_argument(parser)
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    """Write the predictions and their metrics."""
    from ..processing_diffusionvmr import POST_PROCESSING
    from ..training.metrics import evaluate_predictions, scorable
    from ..training.prediction import every_proposal, predict_for_settings

    _check(arguments)
    device = choose_device(arguments.device)
    model, processor = load_model(arguments)
    model.to(device)
    dataset = _open_dataset(arguments, model.config, processor)
    _, scored, message = scorable([], dataset.rows)
    if message is not None:
        print(message)
    tried = {
        "N": arguments.num_proposals or [model.config.num_proposals],
        "S": arguments.num_sampling_steps or [model.config.num_sampling_steps],
    }
    pairs = list(product(*tried.values()))
    to_choose = [name for name, values in tried.items() if len(values) > 1]
    if scored:
        _check_references(scored, arguments.metric)
    elif to_choose:
        raise ValueError(
            f"{arguments.annotations}: choosing {' and '.join(to_choose)} needs rows with `relevant_windows`"
        )

    options = {name: getattr(arguments, name) for name in POST_PROCESSING if getattr(arguments, name) is not None}
    # Saved with the metrics, which depend on them
    settings = {name: getattr(every_proposal(processor), name) for name in POST_PROCESSING} | options
    settings |= {
        "clip_seconds": dataset.clip_seconds,
        "windows": arguments.windows,
        "queries": sum(bool(row["relevant_windows"]) for row in scored),
        "annotations": arguments.annotations,
        "split": arguments.split,
        "model": resolve_model(arguments.model),
    }
    found = predict_for_settings(model, dataset, pairs, arguments.batch_size, **options)
    if not scored:
        _save(arguments.output_dir, found[0], None)
        print(f"wrote {arguments.output_dir}")
        return
    all_metrics, scores = [], []
    for (num_proposals, num_sampling_steps), predictions in zip(pairs, found):
        metrics: dict[str, dict[str, Any]] = evaluate_predictions(*scorable(predictions, dataset.rows)[:2])
        metrics["settings"] = {"num_proposals": num_proposals, "num_sampling_steps": num_sampling_steps, **settings}
        print(json.dumps({name: metrics[name] for name in ("settings", "brief", "extra")}, indent=2))
        all_metrics.append(metrics)
        scores.append(metrics["brief"][arguments.metric])
    best = scores.index(max(scores))  # the first of equally good ones
    _save(arguments.output_dir, found[best], all_metrics[best])
    chosen = ", ".join(f"{name} = {value}" for name, value in zip(tried, pairs[best]) if name in to_choose)
    if chosen:
        print(f"| N | S | {arguments.metric} |\n| --- | --- | --- |")
        for pair, score in zip(pairs, scores):
            print("| " + " | ".join(map(str, (*pair, score))) + " |")
    print(f"wrote {arguments.output_dir}" + (f" for {chosen}" if chosen else ""))


def _check(arguments: argparse.Namespace) -> None:
    """Raise an error for invalid flags that would otherwise only fail after the work is done."""
    from ..checks import check_positive

    check_retrieval_arguments(arguments)
    check_positive(arguments.batch_size, "--batch_size")
    if arguments.clip_seconds is not None:
        check_positive(arguments.clip_seconds, "--clip_seconds")
    check_output(arguments.output_dir, "--output_dir")


def _open_dataset(arguments: argparse.Namespace, config, processor):
    from ..data.annotations import load_annotations
    from ..data.features import open_text_features, open_video_features
    from ..training.dataset import MomentRetrievalDataset

    rows = load_annotations(arguments.annotations, arguments.split, arguments.skip_invalid)
    video = open_video_features(arguments.video_features)
    return MomentRetrievalDataset(
        rows,
        video,
        open_text_features(arguments.text_features, rows),
        processor,
        clip_seconds=clip_seconds_of(arguments, video, config),
        skip_invalid=arguments.skip_invalid,
        windows=arguments.windows,
    )


def _check_references(rows: Sequence[Mapping[str, Any]], metric: str) -> None:
    """Raise `ValueError` if rows cannot be scored or the metric is unknown, before the model runs."""
    from ..training.metrics import evaluate_predictions

    nothing = [{"qid": row["qid"], "pred_relevant_windows": [], "pred_saliency_scores": []} for row in rows]
    brief = evaluate_predictions(nothing, rows)["brief"]
    if brief.get(metric) is None:
        known = [name for name, value in brief.items() if value is not None]
        raise ValueError(f"--metric must be one of {', '.join(known)}, got {metric!r}")


def _save(output_dir: Path, predictions: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any] | None) -> None:
    """
    Write `predictions.jsonl` and, if there are metrics, `metrics.json`.

    Two files cannot be replaced atomically. The old metrics are removed first and the new ones are written last, so
    that metrics never belong to other predictions than those beside them, even if this is interrupted.
    """
    from ..data.files import save_json, save_jsonl

    (output_dir / "metrics.json").unlink(missing_ok=True)
    save_jsonl(predictions, output_dir / "predictions.jsonl")
    if metrics is not None:
        save_json(metrics, output_dir / "metrics.json")
