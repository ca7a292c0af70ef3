"""Data sets on the Hub: converted folders that `diffusionvmr convert --push_to_hub` uploaded."""

import os
from pathlib import Path

from huggingface_hub import snapshot_download

from ..configuration_diffusionvmr import HUB_ID
from .parquet import ANNOTATIONS_CONFIG, VIDEOS_CONFIG

FILE_SUFFIXES = (".jsonl", ".json", ".txt", ".csv", ".npz", ".npy", ".h5", ".hdf5")  # a file that was misspelled


def is_hub_id(path: str | os.PathLike) -> bool:
    """
    Return whether something is a Hub id rather than a path: `USER/NAME`, and nothing on this machine. If there is a
    folder USER, it is a path in it that does not exist.
    """
    path = os.fspath(path)
    is_path = path.endswith(FILE_SUFFIXES) or os.path.exists(path) or os.path.isdir(os.path.dirname(path))
    return HUB_ID.fullmatch(path) is not None and not is_path


def has_splits(path: str | os.PathLike) -> bool:
    """Return whether annotations are a folder or a data set on the Hub. Files have no splits."""
    return os.path.isdir(path) or is_hub_id(path)


def local_path(path: str | os.PathLike, tables: tuple[str, ...] = (ANNOTATIONS_CONFIG, VIDEOS_CONFIG)) -> Path:
    """
    Return the path of data on this machine. If it is the Hub id of a data set, download its converted folder first.

    Args:
        path: a path, or `USER/NAME`.
        tables: the tables to download.

    Raises:
        FileNotFoundError: if there is no such data set, or it cannot be downloaded.
        ValueError: if the data set is not a converted folder.
    """
    if not is_hub_id(path):
        return Path(path)
    patterns = [f"{table}/*.parquet" for table in tables]
    try:
        folder = Path(snapshot_download(os.fspath(path), repo_type="dataset", allow_patterns=patterns))
    except (OSError, ValueError) as error:  # errors of the Hub and of the connection are OSErrors
        reason = str(error).strip().splitlines()
        raise FileNotFoundError(
            f"{path}: no such file or folder, and no data set that could be loaded from the Hub "
            f"({reason[0] if reason else type(error).__name__})"
        ) from error
    for table in tables:
        if not (folder / table).is_dir():
            raise ValueError(f"{path}: not a converted folder: no {table}/*.parquet")
    return folder
