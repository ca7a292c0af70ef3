"""Queries of one or several prediction files against the truth: `python scripts/plot_predictions.py --qid Q ...`."""

import argparse
from pathlib import Path

from modeling_diffusionvmr.cli.options import run_safely
from modeling_diffusionvmr.data.annotations import load_annotations
from modeling_diffusionvmr.data.files import load_jsonl
from modeling_diffusionvmr.plotting import TOP_K, plot_predictions, prediction_panels, save_figure
from modeling_diffusionvmr.training.metrics import rows_by_qid


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--annotations", required=True, help="an annotation file; what it knows of the truth is drawn")
    parser.add_argument(
        "--predictions", required=True, nargs="+", metavar="P.jsonl", help="prediction files in the official format"
    )
    parser.add_argument("--names", nargs="+", help="what the files are called in the picture (default: their names)")
    parser.add_argument("--qid", required=True, nargs="+", help="queries, a panel each")
    parser.add_argument("--output", required=True, metavar="OUT.png", help="the picture")
    parser.add_argument("--top_k", type=int, default=TOP_K, help=f"windows of a file at most (default: {TOP_K})")
    parser.add_argument(
        "--clip_seconds", type=float, help="seconds a saliency score covers (default: 2 for QVHighlights, else shared)"
    )
    return parser.parse_args(arguments)


def find(rows: dict[str, dict], qid: str, path: str) -> dict:
    if qid not in rows:
        raise ValueError(f"{path}: there is no qid {qid}")
    return rows[qid]


def main(arguments: argparse.Namespace) -> None:
    paths = arguments.predictions
    names = arguments.names or [Path(path).stem for path in paths]
    if len(names) != len(paths):
        raise ValueError(f"--names: there are {len(names)} names for {len(paths)} prediction files")
    if len(set(names)) < len(names):
        raise ValueError(f"--names: two prediction files are called the same ({', '.join(names)})")
    truth = rows_by_qid(load_annotations(arguments.annotations), "annotation")
    files = []
    for path in paths:
        try:
            files.append(rows_by_qid(load_jsonl(path), "prediction"))
        except ValueError as error:
            raise ValueError(error if str(path) in str(error) else f"{path}: {error}") from None
    panels = prediction_panels(len(arguments.qid), len(files), arguments.top_k)
    for qid, axes in zip(arguments.qid, panels):
        row = find(truth, qid, arguments.annotations)
        predictions = {name: find(rows, qid, path) for name, rows, path in zip(names, files, paths)}
        plot_predictions(row, predictions, arguments.top_k, arguments.clip_seconds, axes)
    save_figure(panels[0].figure, arguments.output)
    print(f"saved {arguments.output}")


if __name__ == "__main__":
    run_safely(main, parse_arguments())
