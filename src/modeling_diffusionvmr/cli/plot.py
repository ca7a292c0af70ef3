"""`diffusionvmr plot`: plot predictions beside the truth."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .options import CommandParser, add_skip_invalid, check_output


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of `diffusionvmr plot`."""
    parser = CommandParser("plot", description="Plot the predictions of one or more files beside the truth.")
    parser.add_argument(
        "--annotations",
        required=True,
        metavar="PATH",
        help="annotation file or converted folder; its windows and saliency are the truth",
    )
    parser.add_argument("--split", help="split of a converted folder: train, val or test")
    parser.add_argument(
        "--predictions", required=True, nargs="+", metavar="FILE", help="prediction files in the official format"
    )
    parser.add_argument(
        "--names",
        nargs="+",
        metavar="NAME",
        help="what to call the prediction files in the picture (default: their file names)",
    )
    parser.add_argument("--qid", required=True, nargs="+", help="ids of the queries to plot, one panel each")
    parser.add_argument("--output", required=True, metavar="OUT.png", help="file to write")
    parser.add_argument(
        "--top_k", type=int, default=5, metavar="K", help="maximum number of windows per file (default: 5)"
    )
    parser.add_argument(
        "--clip_seconds",
        type=float,
        help="seconds per saliency score (default: 2 with annotated saliency; otherwise duration / number of scores)",
    )
    add_skip_invalid(parser)
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    """Save the picture."""
    from ..checks import check_positive
    from ..data.annotations import load_annotations
    from ..plotting import check_picture, plot_predictions, prediction_panels, save_figure
    from ..training.metrics import rows_by_qid

    check_output(arguments.output, "--output", is_folder=False)
    check_picture(arguments.output, "--output")
    check_positive(arguments.top_k, "--top_k")
    if arguments.clip_seconds is not None:
        check_positive(arguments.clip_seconds, "--clip_seconds")
    paths = arguments.predictions
    names = _names(arguments)
    truth = rows_by_qid(load_annotations(arguments.annotations, arguments.split, arguments.skip_invalid), "annotation")
    files = [_load_predictions(path) for path in paths]
    panels = prediction_panels(len(arguments.qid), len(files), arguments.top_k)
    for qid, axes in zip(arguments.qid, panels):
        row = _find(truth, qid, arguments.annotations)
        predictions = {name: _find(rows, qid, path) for name, rows, path in zip(names, files, paths)}
        figure = plot_predictions(row, predictions, arguments.top_k, arguments.clip_seconds, axes)
    save_figure(figure, arguments.output)
    print(f"saved {arguments.output}")


def _names(arguments: argparse.Namespace) -> list[str]:
    """Return the name of each prediction file in the picture. Names are unique."""
    names = arguments.names or [Path(path).stem for path in arguments.predictions]
    if len(names) != len(arguments.predictions):
        raise ValueError(f"--names: got {len(names)} names for {len(arguments.predictions)} prediction files")
    if len(set(names)) < len(names):
        raise ValueError(f"--names: prediction files must have different names, got {', '.join(names)}")
    return names


def _load_predictions(path: str) -> dict[str, Mapping[str, Any]]:
    """Read a prediction file and index it by qid. Every error names the file."""
    from ..data.files import load_jsonl
    from ..training.metrics import rows_by_qid

    rows = load_jsonl(path)
    try:
        return rows_by_qid(rows, "prediction")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _find(rows: Mapping[str, Mapping[str, Any]], qid: str, path: str) -> Mapping[str, Any]:
    if qid not in rows:
        raise ValueError(f"{path}: no qid {qid}")
    return rows[qid]
