"""
Features in the official layout, made from annotations alone: `python scripts/simulate_features.py --annotations A.jsonl
--output_dir D --seed N`. Whatever is measured on them is to be called simulated.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from modeling_diffusionvmr import load_annotations
from modeling_diffusionvmr.cli.options import run_safely
from modeling_diffusionvmr.data.features import METADATA_FILE, TEXT_KEY, VIDEO_KEY, write_features
from modeling_diffusionvmr.data.files import atomic_write
from modeling_diffusionvmr.synthetic.simulated_features import BACKBONE, CLIP_SIZE, NOISE_LEVELS, SimulatedFeatures

TEXT_FOLDER, MOTION = "clip_text", "slowfast"
SETTINGS_FILE = "simulation.json"

Task = tuple[str, str]  # (folder inside the output, vid or qid)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--annotations",
        nargs="+",
        required=True,
        metavar="FILE",
        help="annotation files; distractors are drawn from the rows of all of them, words depend on the seed alone",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        required=True,
        help=f"gets the folders {BACKBONE} and {TEXT_FOLDER}; may be continued",
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed, same files (default: 0)")
    parser.add_argument(
        "--noise", choices=NOISE_LEVELS, default="real", help="real: meant to be as hard as CLIP's; easy: for a CPU"
    )
    parser.add_argument("--clip_seconds", type=float, default=2.0, help="length of a clip (default: 2)")
    parser.add_argument("--size", type=int, default=CLIP_SIZE, help=f"numbers a clip and token (default: {CLIP_SIZE})")
    parser.add_argument(
        "--motion_size", type=int, help=f"also makes {MOTION}, a backbone that knows no text, of this size (real: 2304)"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes (default: 1); files do not depend on it")
    return parser.parse_args(arguments)


def write_settings(arguments: argparse.Namespace) -> None:
    """Keeps what the folder was made with, and refuses to mix."""
    path = arguments.output_dir / SETTINGS_FILE
    settings = {
        "simulated": True,
        "seed": arguments.seed,
        "noise": arguments.noise,
        "noise_level": dataclasses.asdict(NOISE_LEVELS[arguments.noise]),
        "clip_seconds": arguments.clip_seconds,
        "size": arguments.size,
    }
    if path.exists():
        if json.loads(path.read_text()) != settings:
            raise ValueError(f"{path}: this folder was made with other settings; name another one, or remove it")
        return
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n")


def is_whole(path: Path) -> bool:
    """Whether features can be read from a file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return all(file[name].size for name in (VIDEO_KEY, TEXT_KEY) if name in file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        return False


def start_worker(simulation: SimulatedFeatures, output_dir: Path, motion_size: int | None) -> None:
    global _simulation, _output_dir, _motion_size
    _simulation, _output_dir, _motion_size = simulation, output_dir, motion_size


def make(task: Task) -> bool:
    """Writes one file, unless it is there; says whether it did."""
    folder, identifier = task
    is_text = folder == TEXT_FOLDER
    if is_whole(_output_dir / folder / f"{'qid' if is_text else ''}{identifier}.npz"):
        return False
    if is_text:
        features = _simulation.text(identifier)
    else:
        features = _simulation.video(identifier, folder, _motion_size if folder == MOTION else None)
    write_features(_output_dir / folder, identifier, features, TEXT_KEY if is_text else VIDEO_KEY)
    return True


def results(tasks: list[Task], workers: int, *state) -> Iterable[bool]:
    if workers == 1:
        start_worker(*state)
        yield from map(make, tasks)
    else:
        # One thread each: NumPy's own would fight for the cores with the other processes'
        os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
        with multiprocessing.get_context("spawn").Pool(workers, start_worker, state) as pool:
            yield from pool.imap_unordered(make, tasks, chunksize=16)


def main(arguments: argparse.Namespace) -> None:
    if arguments.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {arguments.workers}")
    if arguments.motion_size is not None and arguments.motion_size < 1:
        raise ValueError(f"--motion_size must be at least 1, got {arguments.motion_size}")
    rows = [row for path in arguments.annotations for row in load_annotations(path)]
    simulation = SimulatedFeatures(rows, arguments.seed, arguments.noise, arguments.clip_seconds, arguments.size)
    write_settings(arguments)
    folders = [BACKBONE] + [MOTION] * (arguments.motion_size is not None)
    for folder in folders:
        with atomic_write(arguments.output_dir / folder / METADATA_FILE) as temporary:
            temporary.write_text(json.dumps({"clip_seconds": arguments.clip_seconds, "simulated": True}) + "\n")
    tasks = [(folder, vid) for folder in folders for vid in simulation.rows_of_video]
    tasks += [(TEXT_FOLDER, qid) for qid in simulation.rows]
    made = results(tasks, arguments.workers, simulation, arguments.output_dir, arguments.motion_size)
    number = sum(tqdm(made, total=len(tasks), desc="simulating", unit="file", mininterval=1))
    print(f"{arguments.output_dir}: {number} files made, {len(tasks) - number} were there", file=sys.stderr)


if __name__ == "__main__":
    run_safely(main, parse_arguments())
