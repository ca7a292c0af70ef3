"""`diffusionvmr simulate`: make features from annotations alone."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .options import CommandParser, add_skip_invalid, check_output

# The same as in `synthetic/simulated_features.py`, which is slow to import; a test compares them
NOISE_LEVELS = ("real", "easy")
CLIP_SIZE = 512


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of `diffusionvmr simulate`."""
    parser = CommandParser(
        "simulate",
        description="Make features in the official layout from annotations alone. They behave like those of a\n"
        "frozen CLIP; call whatever you measure on them simulated. Run the same command again to resume.",
    )
    parser.add_argument(
        "--annotations",
        nargs="+",
        required=True,
        metavar="FILE",
        help="annotation files; pass all of them at once, since distractors come from the rows of all files",
    )
    parser.add_argument(
        "--output_dir", type=Path, required=True, metavar="DIR", help="where to write the folders clip and clip_text"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same files (default: 0)")
    parser.add_argument(
        "--noise",
        choices=NOISE_LEVELS,
        default="real",
        help="real: about as hard as CLIP's features; easy: can be learned on a CPU (default: real)",
    )
    parser.add_argument("--clip_seconds", type=float, default=2.0, help="length of a clip (default: 2)")
    parser.add_argument(
        "--size", type=int, default=CLIP_SIZE, help=f"size of a clip's and a token's vector (default: {CLIP_SIZE})"
    )
    parser.add_argument(
        "--motion_size",
        type=int,
        metavar="SIZE",
        help="also write the folder slowfast: a backbone with vectors of this size that shares no space with text "
        "(size of real features: 2304)",
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="number of processes; the files do not depend on it (default: 1)"
    )
    add_skip_invalid(parser)
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    """Write the features, and print how many files were written and skipped."""
    from ..checks import check_positive
    from ..data.annotations import load_annotations
    from ..synthetic.simulated_features import BACKBONE, SimulatedFeatures
    from ..synthetic.simulated_folder import MOTION, TEXT_FOLDER, write_simulated_features

    check_positive(arguments.workers, "--workers")
    if arguments.motion_size is not None:
        check_positive(arguments.motion_size, "--motion_size")
    check_output(arguments.output_dir, "--output_dir")
    rows = [
        row for path in arguments.annotations for row in load_annotations(path, skip_invalid=arguments.skip_invalid)
    ]
    simulation = SimulatedFeatures(rows, arguments.seed, arguments.noise, arguments.clip_seconds, arguments.size)
    written, skipped = write_simulated_features(
        simulation, arguments.output_dir, arguments.motion_size, arguments.workers
    )
    print(f"{arguments.output_dir}: wrote {written} files, skipped {skipped} existing ones", file=sys.stderr)
    video = [MOTION, BACKBONE] if arguments.motion_size is not None else [BACKBONE]
    folders = " ".join(str(arguments.output_dir / name) for name in video)
    text = arguments.output_dir / TEXT_FOLDER
    print(f"train on them with --video_features {folders} --text_features {text}", file=sys.stderr)
