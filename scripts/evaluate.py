"""
A model on a benchmark: the predictions in the official format, and where there is ground truth, the official metrics.

Writes `predictions.jsonl` and `metrics.json` into the output folder. With several numbers of proposals each is tried,
and the best one's are written: do that on a validation split.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from modeling_diffusionvmr import (
    MomentRetrievalDataset,
    evaluate_predictions,
    load_annotations,
    predict_moments,
)
from modeling_diffusionvmr.cli.options import (
    add_data_arguments,
    add_model_arguments,
    check_device,
    clip_seconds_of,
    load_model,
    run_safely,
)
from modeling_diffusionvmr.data.features import open_text_features, open_video_features
from modeling_diffusionvmr.data.files import atomic_write, save_jsonl

POST_PROCESSING = ("threshold", "top_k", "nms_threshold", "round_to")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    add_data_arguments(parser)
    parser.add_argument("--output_dir", type=Path, default=Path("evaluation"), help="(default: evaluation)")
    parser.add_argument("--num_proposals", type=int, nargs="+", metavar="N", help="spans drawn from noise")
    parser.add_argument("--num_sampling_steps", type=int, metavar="S", help="DDIM steps")
    parser.add_argument("--metric", default="MR-full-mAP", help="by which N is chosen (default: MR-full-mAP)")
    parser.add_argument("--threshold", type=float, help="least score of a moment")
    parser.add_argument("--top_k", type=int, help="moments a query at most")
    parser.add_argument("--nms_threshold", type=float, help="drop a moment whose IoU with a better one is above it")
    parser.add_argument("--round_to", type=float, metavar="SECONDS", help="QVHighlights officially: 2")
    parser.add_argument("--batch_size", type=int, default=100)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def check_references(rows: Sequence[dict], metric: str) -> None:
    """Raises `ValueError` for rows that could not be scored, and an unknown metric, before anything is predicted."""
    nothing = [{"qid": row["qid"], "pred_relevant_windows": [], "pred_saliency_scores": []} for row in rows]
    brief = evaluate_predictions(nothing, rows)["brief"]
    if brief.get(metric) is None:
        known = [name for name, value in brief.items() if value is not None]
        raise ValueError(f"--metric must be one of {', '.join(known)}, got {metric!r}")


def main(arguments: argparse.Namespace) -> None:
    model, processor = load_model(arguments)
    check_device(arguments.device)
    model.to(arguments.device)
    rows = load_annotations(arguments.annotations, arguments.split, arguments.skip_invalid)
    video = open_video_features(arguments.video_features)
    dataset = MomentRetrievalDataset(
        rows,
        video,
        open_text_features(arguments.text_features, rows),
        processor,
        clip_seconds=clip_seconds_of(arguments, video, model.config),
        skip_invalid=arguments.skip_invalid,
    )
    without_truth = sum(not row.get("relevant_windows") for row in dataset.rows)
    has_truth = not without_truth
    if without_truth:
        print(f"{without_truth} of {len(dataset.rows)} rows have no `relevant_windows`: predictions only, no metrics")
    else:
        check_references(dataset.rows, arguments.metric)
    candidates = arguments.num_proposals or [model.config.num_proposals]
    if len(candidates) > 1 and not has_truth:
        raise ValueError(f"{arguments.annotations}: N cannot be chosen on rows without `relevant_windows`")

    options = {name: getattr(arguments, name) for name in POST_PROCESSING if getattr(arguments, name) is not None}
    # They stand beside the figures, which depend on them: only 10 predictions count
    settings = {name: getattr(processor, name) for name in POST_PROCESSING} | options
    settings |= {
        "num_sampling_steps": arguments.num_sampling_steps or model.config.num_sampling_steps,
        "clip_seconds": dataset.clip_seconds,
        "queries": len(dataset.rows),
        "annotations": arguments.annotations,
        "split": arguments.split,
        "model": arguments.model,
    }

    best = None
    for num_proposals in candidates:
        predictions = predict_moments(
            model, dataset, arguments.batch_size, num_proposals, arguments.num_sampling_steps, **options
        )
        if not has_truth:
            break
        metrics = evaluate_predictions(predictions, dataset.rows)
        metrics["settings"] = {"num_proposals": num_proposals, **settings}
        print(json.dumps({name: metrics[name] for name in ("settings", "brief", "extra")}, indent=2))
        if best is None or metrics["brief"][arguments.metric] > best[0]["brief"][arguments.metric]:
            best = metrics, predictions

    if has_truth:
        metrics, predictions = best
        with atomic_write(arguments.output_dir / "metrics.json") as path:
            path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    else:
        (arguments.output_dir / "metrics.json").unlink(missing_ok=True)  # of other predictions
    save_jsonl(predictions, arguments.output_dir / "predictions.jsonl")
    print(f"wrote {arguments.output_dir}")


if __name__ == "__main__":
    run_safely(main, parse_arguments())
