"""Simulated features as files in the official layout."""

import multiprocessing
import os
import signal
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..data.features import METADATA_FILE, TEXT_KEY, TEXT_PREFIX, VIDEO_KEY, write_features
from ..data.files import save_json
from ..json_files import read_json_object
from .simulated_features import BACKBONE, NOISE_LEVELS, SimulatedFeatures

TEXT_FOLDER, MOTION = "clip_text", "slowfast"
SETTINGS_FILE = "simulation.json"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

Task = tuple[str, str]  # (folder inside the output, vid or qid)


def write_simulated_features(
    simulation: SimulatedFeatures, output_dir: str | os.PathLike, motion_size: int | None = None, workers: int = 1
) -> tuple[int, int]:
    """
    Write the features of all videos and sentences, with a progress bar. Skip existing files that are readable, so that
    an interrupted run can be resumed.

    Args:
        simulation: the features.
        output_dir: the folder in which to write `clip`, `clip_text` and, with `motion_size`, `slowfast`.
        motion_size: size of a clip's vector in a second backbone, which shares no space with text. Default: no second
            backbone.
        workers: number of processes. The files do not depend on it.

    Returns:
        The number of files written, and of those skipped.

    Raises:
        ValueError: if the folder contains features made with other settings, or an id cannot be a file name.
    """
    output_dir = Path(output_dir)
    _write_settings(simulation, output_dir)
    folders = [BACKBONE] + [MOTION] * (motion_size is not None)
    for folder in folders:
        metadata = {"clip_seconds": simulation.clip_seconds, "simulated": True}
        save_json(metadata, output_dir / folder / METADATA_FILE, indent=None)
    tasks = [(folder, vid) for folder in folders for vid in simulation.rows_of_video]
    tasks += [(TEXT_FOLDER, qid) for qid in simulation.rows]
    results = _run(tasks, _Writer(simulation, output_dir, motion_size), workers)
    written = sum(tqdm(results, total=len(tasks), desc="simulating", unit="file", mininterval=1))
    return written, len(tasks) - written


def _write_settings(simulation: SimulatedFeatures, output_dir: Path) -> None:
    """Save the settings of the folder, or raise `ValueError` if it was made with other ones."""
    path = output_dir / SETTINGS_FILE
    settings: dict[str, Any] = {
        "simulated": True,
        "seed": simulation.seed,
        "noise": next((name for name, level in NOISE_LEVELS.items() if level == simulation.noise), None),
        "noise_level": asdict(simulation.noise),
        "clip_seconds": simulation.clip_seconds,
        "size": simulation.size,
    }
    if not path.exists():
        save_json(settings, path)
        return
    if read_json_object(path) != settings:
        raise ValueError(f"{path}: this folder was made with other settings; choose another folder or remove this one")


@dataclass
class _Writer:
    """Writes the file of a task unless it exists. Returns whether it wrote one."""

    simulation: SimulatedFeatures
    output_dir: Path
    motion_size: int | None

    def __call__(self, task: Task) -> bool:
        folder, identifier = task
        is_text = folder == TEXT_FOLDER
        if _can_be_read(self.output_dir / folder / f"{TEXT_PREFIX if is_text else ''}{identifier}.npz"):
            return False
        if is_text:
            features = self.simulation.text(identifier)
        else:
            features = self.simulation.video(identifier, folder, self.motion_size if folder == MOTION else None)
        write_features(self.output_dir / folder, identifier, features, TEXT_KEY if is_text else VIDEO_KEY)
        return True


def _can_be_read(path: Path) -> bool:
    try:
        with np.load(path, allow_pickle=False) as file:
            return all(file[name].size for name in (VIDEO_KEY, TEXT_KEY) if name in file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        return False


def _run(tasks: Sequence[Task], write: _Writer, workers: int) -> Iterator[bool]:
    if workers == 1:
        yield from map(write, tasks)
        return
    with _one_thread_each():
        resource_tracker.ensure_running()  # otherwise the first worker starts it, which unblocks the signal
        with _blocked(signal.SIGINT):  # Ctrl-C goes to every process, but the main one reports it and ends the others
            pool = multiprocessing.get_context("spawn").Pool(workers, _start_worker, [write])
        with pool:
            yield from pool.imap_unordered(_write, tasks, chunksize=16)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let processes that are started inside the block use one thread each, so that they do not compete for cores."""
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _blocked(signal_number: int) -> Iterator[None]:
    """Block a signal until the end, in this process and in processes that are started meanwhile."""
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal_number])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_writer: _Writer  # in a worker process; sent once, since it contains all annotations


def _start_worker(writer: _Writer) -> None:
    global _writer
    _writer = writer


def _write(task: Task) -> bool:
    with _blocked(signal.SIGTERM):  # with which the main process ends workers: finish the file first
        return _writer(task)
