"""Measure the time and memory that parts of the library take."""

import argparse
import os
import platform
from importlib.metadata import version

import torch

from benchmark_common import print_table
from benchmark_data import measure_data
from benchmark_extraction import measure_extraction
from benchmark_inference import SIZES, VARIANTS, measure_inference
from benchmark_metrics import measure_metrics
from benchmark_profile import measure_profile
from benchmark_training import measure_training
from modeling_diffusionvmr import __version__
from modeling_diffusionvmr.checks import check_positive
from modeling_diffusionvmr.cli.errors import run_safely
from modeling_diffusionvmr.cli.options import CommandParser
from modeling_diffusionvmr.data.files import save_json

PARTS = {
    "data": measure_data,
    "extract": measure_extraction,
    "inference": measure_inference,
    "metrics": measure_metrics,
    "profile": measure_profile,
    "training": measure_training,
}
"""Each returns a "table", a list of rows with the same columns, and further values that describe the measurement."""


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
    inference = parser.add_argument_group("--part inference, --part profile", "inference also has --official")
    inference.add_argument(
        "--sizes", nargs="+", choices=SIZES, default=list(SIZES), help=f"of the models (default: {' '.join(SIZES)})"
    )
    inference.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=[],
        help="also measure our model in bfloat16, or the models exported to ONNX Runtime (inference)",
    )
    metrics = parser.add_argument_group("--part metrics")
    metrics.add_argument(
        "--predictions", metavar="P.jsonl", help="predictions in the official format (default: simulated)"
    )
    metrics.add_argument("--annotations", help="annotations with true windows (default: simulated)")
    metrics.add_argument(
        "--official",
        metavar="CHECKOUT",
        help="folder of a moment_detr checkout, to measure its script (needs scikit-learn) or model as well",
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
