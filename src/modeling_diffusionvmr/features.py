"""
Id -> array of features, and every check of a feature file.

A plain dict {id: array} serves wherever a mapping is asked for here.
"""

import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .annotations import whole_file

VIDEO_KEY, TEXT_KEY = "features", "last_hidden_state"  # of the arrays in the official npz files
TEXT_PREFIX = "qid"  # of the official files of sentences


def open_features(path: str | os.PathLike) -> Mapping[int | str, np.ndarray]:
    """
    Opens features by their id, a `vid` or a `qid`.

    Args:
        path: a folder of `.npz` files as officially released (`{vid}.npz` with `features`, or `qid{qid}.npz` with
            `last_hidden_state`), a folder of `.npy` files of these names, or an HDF5 file of one data set an id.

    Returns:
        A read-only mapping, whose ids iterate as strings, to arrays (length, size) float32. They are read, and checked,
        each time that they are asked for. It may be used from several processes.

    Raises:
        FileNotFoundError: when there is nothing at `path`.
        ValueError: when there are no features at `path`. On access: for an array that cannot be read, is empty, is not
            (length, size) numbers or holds NaN or infinity. It names file and id.
        KeyError: on access, for an id without features; it names file and id.
    """
    path = Path(path)
    if path.is_dir():
        return FolderFeatures(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder of features")
    return Hdf5Features(path)


class Features(Mapping):
    """What all stores share. `places` says, for each name in the store, where `_read` finds its array."""

    def __init__(self, path: Path, places: Mapping[str, Any]):
        if not places:
            raise ValueError(f"{path}: holds no features")
        self.path = path
        # Sentences lie under "qid" and their id
        prefix = TEXT_PREFIX if all(name.startswith(TEXT_PREFIX) for name in places) else ""
        self._places = {name.removeprefix(prefix): place for name, place in places.items()}

    def __getitem__(self, identifier: int | str) -> np.ndarray:
        place = self._places.get(str(identifier))
        if place is None:
            raise KeyError(f"{self.path}: no features of {identifier}")
        try:
            array = self._read(place)
        # Whatever NumPy and zipfile raise for a file that is cut off, pickled, or something else altogether
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
            raise ValueError(f"{self.path}, {identifier}: cannot be read ({error})") from error
        return _checked(array, f"{self.path}, {identifier}")

    def __contains__(self, identifier: object) -> bool:
        return str(identifier) in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def _read(self, place: Any) -> np.ndarray:
        raise NotImplementedError


class FolderFeatures(Features):
    """One `.npz` or `.npy` file an id."""

    def __init__(self, path: Path):
        places = {}
        with os.scandir(path) as files:
            for file in files:
                name, suffix = os.path.splitext(file.name)
                if suffix not in (".npz", ".npy") or name.startswith("."):
                    continue
                if name in places:
                    raise ValueError(f"{path}: has both {name}.npz and {name}.npy")
                places[name] = file.path
        super().__init__(path, dict(sorted(places.items())))

    def _read(self, place):
        # Never pickle, which runs what a file says
        loaded = np.load(place, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            for key in (VIDEO_KEY, TEXT_KEY):
                if key in loaded:
                    return loaded[key]
            raise ValueError(f"needs an array `{VIDEO_KEY}` or `{TEXT_KEY}`, has {loaded.files}")


class Hdf5Features(Features):
    """One data set an id. The file is opened for each read, since an open one does not outlive a fork."""

    def __init__(self, path: Path):
        with self._opened(path) as file:
            super().__init__(path, {name: name for name in file})

    @staticmethod
    def _opened(path):
        try:
            import h5py  # optional: only those who have such files need it
        except ImportError:
            raise ImportError(f"{path}: reading HDF5 needs h5py: `pip install h5py`") from None
        try:
            return h5py.File(path, "r")
        except OSError as error:
            raise ValueError(f"{path}: neither a folder of features nor an HDF5 file ({error})") from error

    def _read(self, place):
        with self._opened(self.path) as file:
            if not hasattr(file[place], "shape"):
                raise ValueError("a group, not a data set")
            return file[place][()]


def _checked(array: np.ndarray, where: str) -> np.ndarray:
    array = np.asarray(array)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{where}: features must be real numbers, got {array.dtype}")
    if array.ndim != 2:
        raise ValueError(f"{where}: features must be (length, size), got the shape {array.shape}")
    if not array.size:
        raise ValueError(f"{where}: features are empty, of the shape {array.shape}")
    with np.errstate(over="ignore"):  # what float32 cannot hold is found as infinity
        array = array.astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        raise ValueError(f"{where}: features have NaN or infinity in row {np.argwhere(~np.isfinite(array))[0][0]}")
    return array


def write_features(folder: str | os.PathLike, identifier: int | str, array: np.ndarray, key: str = VIDEO_KEY) -> Path:
    """
    Writes one array in the official layout, whole or not at all.

    Args:
        folder: made where there is none.
        identifier: `vid` or `qid`.
        array: (length, size) numbers, written as they are.
        key: `features` of a video, or `last_hidden_state` of a sentence, whose file is called `qid{identifier}.npz`.

    Returns:
        The path of the file.

    Raises:
        ValueError: for an array that could not be read back, an unknown key, or an identifier that is no file name.
    """
    if key not in (VIDEO_KEY, TEXT_KEY):
        raise ValueError(f"`key` must be `{VIDEO_KEY}` or `{TEXT_KEY}`, got {key!r}")
    name = f"{TEXT_PREFIX if key == TEXT_KEY else ''}{identifier}.npz"
    if Path(name).name != name or name.startswith(".") or "\0" in name:
        raise ValueError(f"{folder}: {identifier!r} cannot be the name of a file")
    _checked(array, f"{folder}, {identifier}")
    path = Path(folder) / name
    with whole_file(path) as temporary:
        np.savez_compressed(temporary, **{key: array})
    return path
