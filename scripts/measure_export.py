"""
Compare a checkpoint with what `diffusionvmr export` makes of it, in float32 and int8, on the held-out rendered videos
of the embedded model: metrics of every proposal, for how many sentences the moments that a person gets are not the same
(another number, or a start or end that differs by more than 0.01 s), and the time and size of the network without its
backbones.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import pipeline

from make_default_model import HELD_OUT_SEEDS, OTHER_VIDEOS, draw_videos, figures_of, render, retrieve_all, table
from modeling_diffusionvmr import DiffusionVMRForMomentRetrieval, OnnxDiffusionVMR
from modeling_diffusionvmr.checks import check_whole
from modeling_diffusionvmr.cli import main as diffusionvmr
from modeling_diffusionvmr.cli.errors import run_safely
from modeling_diffusionvmr.cli.options import CommandParser, resolve_model
from modeling_diffusionvmr.modeling_diffusionvmr import TASK
from modeling_diffusionvmr.training.prediction import every_proposal

SAME = 0.01  # seconds: moments that differ by less are the same
TIMED_CALLS = 50


def export(model: str, folder: Path, *options: str) -> OnnxDiffusionVMR:
    """Export a checkpoint and load the result."""
    diffusionvmr(["export", model, str(folder), *options])
    return OnnxDiffusionVMR.from_pretrained(folder)


def difference(row: dict, other: dict) -> float:
    """
    Return the largest difference of a start or an end in two lists of moments for one sentence, in seconds; infinity if
    the lists differ in length.
    """
    windows, others = (np.array(one["pred_relevant_windows"]).reshape(-1, 3)[:, :2] for one in (row, other))
    return float(np.abs(windows - others).max(initial=0)) if len(windows) == len(others) else float("inf")


def milliseconds_per_query(model: DiffusionVMRForMomentRetrieval) -> float:
    """Return the median time of the network for a video of `max_clips` clips and a sentence of 12 tokens."""
    rng, config = torch.Generator().manual_seed(0), model.config
    video = torch.randn(1, config.max_clips, config.video_feature_size, generator=rng)
    text = torch.randn(1, min(12, config.max_tokens), config.text_feature_size, generator=rng)
    seconds = []
    with torch.inference_mode():
        for _ in range(TIMED_CALLS):
            began = time.perf_counter()
            model(video, text)
            seconds.append(time.perf_counter() - began)
    return 1000 * float(np.median(seconds))


def megabytes(model: DiffusionVMRForMomentRetrieval) -> float:
    """Return the size of the network: its parameters in memory, or its ONNX files."""
    if isinstance(model, OnnxDiffusionVMR):
        return sum(path.stat().st_size for path in Path(model.name_or_path).glob("*.onnx")) / 2**20
    return sum(parameter.nbytes for parameter in model.parameters()) / 2**20


def measure(model: str, num_videos: int, work: Path) -> str:
    """Return a Markdown table with one row per kind of model. Videos and exported models are written to `work`."""
    drawn = draw_videos(*HELD_OUT_SEEDS)
    videos = drawn[: (num_videos + 1) // 2] + drawn[OTHER_VIDEOS : OTHER_VIDEOS + num_videos // 2]
    for plan, _ in videos:
        render(plan, work)
    original = DiffusionVMRForMomentRetrieval.from_pretrained(model)
    kinds = {
        "PyTorch": original,
        "ONNX": export(model, work / "float32"),
        "ONNX, int8": export(model, work / "int8", "--int8"),
    }
    figures: dict[str, dict[str, Any]] = {}
    expected: list[dict] = []
    for kind, network in kinds.items():
        retrieve = pipeline(TASK, model=network, device="cpu")
        moments = retrieve_all(retrieve, videos, work)
        expected = expected or moments
        differences = np.array([difference(*pair) for pair in zip(moments, expected)])
        retrieve.processor = every_proposal(retrieve.processor)
        proposals = retrieve_all(retrieve, videos, work)
        figures[kind] = {
            **figures_of([row for row in proposals if row["relevant_windows"]]),
            "sentences": len(moments),
            "with other moments": int((differences > SAME).sum()),
            "median difference (s)": f"{np.median(differences):.4f}",
            "one query (ms)": milliseconds_per_query(network),
            "size (MiB)": megabytes(network),
        }
    return table(figures, f"{len(videos)} videos")


def main(arguments: argparse.Namespace) -> None:
    """Print the table."""
    check_whole(arguments.videos, "--videos", 1)
    if arguments.videos > 2 * OTHER_VIDEOS:
        raise ValueError(f"--videos must be at most {2 * OTHER_VIDEOS}, got {arguments.videos}")
    model = resolve_model(arguments.model)
    with tempfile.TemporaryDirectory() as work:
        print(measure(model, arguments.videos, Path(work)))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="python scripts/measure_export.py", description=__doc__)
    parser.add_argument("--model", help="checkpoint folder or Hub id (default: embedded, the model in this package)")
    parser.add_argument(
        "--videos", type=int, default=2 * OTHER_VIDEOS, help=f"number of videos (default: all {2 * OTHER_VIDEOS})"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_safely(main, parse_arguments())
