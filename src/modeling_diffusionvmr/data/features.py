"""
Feature files: open any supported format, and write the official one.

Wherever a store is expected, a plain dict {id: array} works as well.
"""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..json_files import read_json_object
from ..messages import listed
from .feature_store import TEXT_PREFIX, FeatureStore, check_features
from .files import atomic_write
from .glove import GloveFeatures
from .hub import local_path
from .parquet import TEXT_COLUMN, ParquetFeatures, is_converted, video_backbones

VIDEO_KEY, TEXT_KEY = "features", "last_hidden_state"  # names of the arrays in the official npz files
SENTENCE_KEY = "sentence"  # beside the features of a sentence, in files that the library extracts
# A small file can claim, or decompress to, any size. Three hours of 6 vectors of 4,096 numbers per second take 1.06 GB
# in float32, and real features hardly compress
MAX_ARRAY_BYTES = 2**31
MAX_EXPANSION, EXPANDABLE_BYTES = 100, 2**26  # an array above the second may have the first times its bytes in the file
METADATA_FILE = "features.json"  # in folders that the library writes


def open_features(path: str | os.PathLike, column: str | None = None) -> FeatureStore:
    """
    Open the features of videos (by `vid`) or of queries (by `qid`).

    Arrays are read and checked on each access. The store can be used from several processes. Its `clip_seconds` is the
    length of a clip if the files state it, else `None`; in the same way, its `backbone` is the folder or Hub id of the
    backbone that computed the features.

    Args:
        path: a folder of `.npz` files as officially released (`{vid}.npz` with `features`, or `qid{qid}.npz` with
            `last_hidden_state`), a folder of `.npy` files with the same names, an HDF5 file with one dataset per id, or
            a folder written by `diffusionvmr convert`, or `USER/NAME` of such a folder on the Hub.
        column: for a converted folder, the name of a video backbone, or `text_features`. Optional if there is only one
            video backbone.

    Returns:
        A read-only mapping from an id to an array (length, size) float32; its ids iterate as strings. The arrays of a
        converted folder are read-only views of memory-mapped files, in the type in which they are stored.

    Raises:
        FileNotFoundError: if `path` does not exist.
        ValueError: if `path` contains no features. On access: if an array cannot be read, is empty, is not (length,
            size) real numbers, or contains NaN or infinity. The message names the file and the id.
        KeyError: on access, if an id has no features. The message names the file and the id.
    """
    path = local_path(path)
    if not path.exists():
        names = sorted(entry.name for entry in path.parent.glob("[!.]*"))
        hint = f"; {path.parent} contains {listed(names, 5)}" if names else ""
        raise FileNotFoundError(f"{path}: no such file or folder of features{hint}")
    if is_converted(path):
        return ParquetFeatures(path, column)
    if column is not None:
        raise ValueError(f"{path}: only a converted folder has columns, got {column!r}")
    return FolderFeatures(path) if path.is_dir() else Hdf5Features(path)


def open_video_features(paths: Iterable[str | os.PathLike]) -> list[FeatureStore]:
    """
    Open one store per backbone, in the order of `paths`; all its backbones for a converted folder. Raise the same
    errors as `open_features`.
    """
    stores = []
    for path in map(local_path, paths):
        columns = video_backbones(path) if is_converted(path) else [None]
        stores += [open_features(path, column) for column in columns]
    return stores


def open_text_features(path: str | os.PathLike, rows: Iterable[Mapping[str, Any]]) -> Mapping[int | str, np.ndarray]:
    """
    Open the features of queries: any path that `open_features` accepts, or a GloVe `.txt` file, whose word vectors are
    looked up for the queries of `rows`. Raise the same errors as `open_features` and `GloveFeatures`.
    """
    path = local_path(path)
    if path.suffix == ".txt":
        return GloveFeatures(path, rows)
    return open_features(path, TEXT_COLUMN if is_converted(path) else None)


def common_clip_seconds(stores: Sequence[Mapping]) -> float | None:
    """
    Return the length of a clip that the stores of one model state, or `None` if none does. Raise `ValueError` if they
    differ.
    """
    stated = {getattr(store, "clip_seconds", None): store for store in stores}
    stated.pop(None, None)
    if len(stated) > 1:
        lengths = ", ".join(f"{seconds} s in {name_of(store)}" for seconds, store in stated.items())
        raise ValueError(f"all backbones must have clips of the same length, got {lengths}")
    return next(iter(stated), None)


def feature_size(store: Mapping, rows: Iterable[Mapping[str, Any]], key: str) -> int:
    """
    Return the size of a store's vectors: the most common one among the first few arrays that rows need.

    Args:
        store: the features.
        rows: annotations.
        key: `vid` or `qid`, the field by which the store is indexed.

    Raises:
        ValueError: if none of these arrays can be read.
    """
    identifiers = dict.fromkeys(row[key] for row in rows)
    sizes: Counter[int] = Counter()
    for identifier in islice((identifier for identifier in identifiers if identifier in store), 20):
        with suppress(KeyError, ValueError):  # reported later, when the array is needed
            sizes[store[identifier].shape[1]] += 1
    if not sizes:
        raise ValueError(f"{name_of(store)}: no usable features for any {key} of the annotations")
    return sizes.most_common(1)[0][0]


def name_of(store: Mapping) -> str:
    """Return the name of a store for error messages: its path, if it has one."""
    return str(getattr(store, "path", "the given mapping"))


class FolderFeatures(FeatureStore):
    """
    A folder with one `.npz` or `.npy` file per id and, optionally, a `features.json` that states
    `clip_seconds` and `backbone`.
    """

    def __init__(self, path: Path):
        places, metadata = {}, {}
        with os.scandir(path) as files:
            for file in files:
                name, suffix = os.path.splitext(file.name)
                if file.name == METADATA_FILE:
                    metadata = read_json_object(file.path)
                if suffix not in (".npz", ".npy") or name.startswith(".") or not file.is_file():
                    continue
                if name in places:
                    raise ValueError(f"{path}: contains both {name}.npz and {name}.npy")
                places[name] = file.path
        super().__init__(path, dict(sorted(places.items())), metadata.get("clip_seconds"), metadata.get("backbone"))
        self.metadata = metadata

    def _read(self, place):
        size = os.path.getsize(place)
        _check_size(size, size)
        loaded = np.load(place, allow_pickle=False)  # unpickling would run code from the file
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            for key in (VIDEO_KEY, TEXT_KEY):
                if key in loaded:
                    member = loaded.zip.getinfo(f"{key}.npy")
                    _check_size(member.file_size, member.compress_size)
                    return loaded[key]
            raise ValueError(f"needs an array `{VIDEO_KEY}` or `{TEXT_KEY}`, has {loaded.files}")


def _check_size(num_bytes: int, stored_bytes: int) -> None:
    """Raise ValueError for an array of a size that no features have, before it is read."""
    if num_bytes > MAX_ARRAY_BYTES:
        raise ValueError(f"an array of {num_bytes:,} bytes; the limit is {MAX_ARRAY_BYTES:,}")
    if num_bytes > max(EXPANDABLE_BYTES, MAX_EXPANSION * stored_bytes):
        raise ValueError(
            f"an array of {num_bytes:,} bytes, of which the file stores {stored_bytes:,}; features do not compress "
            f"more than {MAX_EXPANSION} times"
        )


class Hdf5Features(FeatureStore):
    """
    An HDF5 file with one dataset per id and, optionally, a file attribute `clip_seconds`. The file is opened for each
    read, since an open file does not survive a fork. Datasets must be in the file itself.
    """

    def __init__(self, path: Path):
        with self._opened(path) as file:
            try:
                places = {name: name for name in file}
                seconds = file.attrs.get("clip_seconds")
            # h5py raises errors of many types: KeyError, RuntimeError, TypeError for a type that NumPy lacks
            except Exception as error:
                raise ValueError(f"{path}: damaged HDF5 file ({error})") from error
        super().__init__(path, places, seconds.tolist() if isinstance(seconds, (np.generic, np.ndarray)) else seconds)

    @staticmethod
    def _opened(path):
        try:
            import h5py  # optional dependency, only needed for such files
        except ImportError:
            raise ImportError(f"{path}: h5py is required to read HDF5 files: `pip install h5py`") from None
        if not path.is_file():  # opening a named pipe would wait for somebody to write to it
            raise ValueError(f"{path}: neither a file nor a folder of features")
        try:
            return h5py.File(path, "r")
        except OSError as error:
            raise ValueError(f"{path}: neither a folder of features nor an HDF5 file ({error})") from error

    def _read(self, place):
        with self._opened(self.path) as file:
            if type(file.get(place, getlink=True)).__name__ == "ExternalLink":
                raise ValueError("a link to another file")
            dataset = file[place]
            if not hasattr(dataset, "shape"):
                raise ValueError("a group, not a dataset")
            if dataset.is_virtual or dataset.external:
                raise ValueError("its values are in another file")
            _check_size(dataset.nbytes, dataset.id.get_storage_size())
            return dataset[()]


def write_features(
    folder: str | os.PathLike,
    identifier: int | str,
    array: np.ndarray,
    key: str = VIDEO_KEY,
    sentence: str | None = None,
) -> Path:
    """
    Write one array in the official layout, atomically.

    Args:
        folder: created if missing.
        identifier: `vid` or `qid`.
        array: (length, size), written in its own type.
        key: `features` for a video, or `last_hidden_state` for a query, whose file is named `qid{identifier}.npz`.
        sentence: the query, to record what the features are of. See `recorded_sentence`.

    Returns:
        The path of the file.

    Raises:
        ValueError: if the array could not be read back, the key is unknown, or the identifier cannot be part of a file
            name.
    """
    path = features_path(folder, identifier, key)
    check_features(array, f"{folder}, {identifier}")
    arrays: dict[str, Any] = {key: array} if sentence is None else {key: array, SENTENCE_KEY: np.array(sentence)}
    with atomic_write(path) as temporary:
        np.savez_compressed(temporary, **arrays)
    return path


def features_path(folder: str | os.PathLike, identifier: int | str, key: str) -> Path:
    """
    Return the file that `write_features` writes.

    Raises:
        ValueError: if the key is unknown, or the identifier cannot be part of a file name.
    """
    if key not in (VIDEO_KEY, TEXT_KEY):
        raise ValueError(f"`key` must be `{VIDEO_KEY}` or `{TEXT_KEY}`, got {key!r}")
    name = f"{TEXT_PREFIX if key == TEXT_KEY else ''}{identifier}.npz"
    if Path(name).name != name or name.startswith(".") or "\0" in name:
        raise ValueError(f"{folder}: {identifier!r} cannot be part of a file name")
    return Path(folder) / name


def recorded_sentence(folder: str | os.PathLike, qid: int | str) -> str | None:
    """Return the sentence that an existing file of `write_features` records, or `None` if it records none."""
    with np.load(Path(folder, f"{TEXT_PREFIX}{qid}.npz"), allow_pickle=False) as file:
        return str(file[SENTENCE_KEY]) if SENTENCE_KEY in file else None
