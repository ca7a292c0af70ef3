"""
Id -> array of features, and every check of a feature file.

A plain dict {id: array} serves wherever a mapping is asked for here.
"""

import json
import math
import os
import string
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..processing_diffusionvmr import check_finite
from .annotations import ANNOTATIONS_CONFIG, TEXT_COLUMN, open_converted
from .files import atomic_write

VIDEO_KEY, TEXT_KEY = "features", "last_hidden_state"  # of the arrays in the official npz files
TEXT_PREFIX = "qid"  # of the official files of sentences
VIDEO_SUFFIXES = (".avi", ".mp4", ".mkv", ".webm", ".mov")  # that the names in some released files have
METADATA_FILE = "features.json"  # of a folder that the library wrote
VIDEOS_CONFIG = "videos"  # of a converted folder


def open_features(path: str | os.PathLike, column: str | None = None) -> "Features":
    """
    Opens features by their id, a `vid` or a `qid`.

    Args:
        path: a folder of `.npz` files as officially released (`{vid}.npz` with `features`, or `qid{qid}.npz` with
            `last_hidden_state`), a folder of `.npy` files of these names, an HDF5 file of one data set an id, or a
            folder that one of `dataset_scripts/` made.
        column: of such a folder: the name of a video backbone, or `text_features`. May be left out where there is one
            video backbone.

    Returns:
        A read-only mapping, whose ids iterate as strings, to arrays (length, size) float32. They are read, and checked,
        each time that they are asked for. Those of a converted folder are read-only views of the mapped files, in the
        type in which they are stored. It may be used from several processes. Its `clip_seconds` is the length of a clip
        where the files say it, otherwise `None`.

    Raises:
        FileNotFoundError: when there is nothing at `path`.
        ValueError: when there are no features at `path`. On access: for an array that cannot be read, is empty, is not
            (length, size) numbers or holds NaN or infinity. It names file and id.
        KeyError: on access, for an id without features; it names file and id.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder of features")
    if (path / VIDEOS_CONFIG).is_dir():
        return ConvertedFeatures(path, column)
    if column is not None:
        raise ValueError(f"{path}: only a converted folder has columns, got {column!r}")
    return FolderFeatures(path) if path.is_dir() else Hdf5Features(path)


def open_video_features(paths: Iterable[str | os.PathLike]) -> list["Features"]:
    """One store a backbone, in order; of a converted folder all its backbones. Raises as `open_features`."""
    stores = []
    for path in map(Path, paths):
        converted = (path / VIDEOS_CONFIG).is_dir()
        columns = ConvertedFeatures.columns(path) if converted else [None]
        stores += [open_features(path, column) for column in columns]
    return stores


def open_text_features(path: str | os.PathLike, rows: Iterable[Mapping[str, Any]]) -> Mapping[int | str, np.ndarray]:
    """
    The features of sentences: `open_features`, or where `path` is GloVe's `.txt`, word vectors for the queries of
    `rows`. Raises as `open_features` and `GloveFeatures`.
    """
    if Path(path).suffix == ".txt":
        return GloveFeatures(path, rows)
    return open_features(path, TEXT_COLUMN if (Path(path) / VIDEOS_CONFIG).is_dir() else None)


def common_clip_seconds(stores: Sequence[Mapping]) -> float | None:
    """
    The length of a clip that the stores of one video say, `None` where none does. Raises `ValueError` where they
    differ.
    """
    said = {store.clip_seconds: store for store in stores if getattr(store, "clip_seconds", None) is not None}
    if len(said) > 1:
        lengths = ", ".join(f"{seconds} s in {name_of(store)}" for seconds, store in said.items())
        raise ValueError(f"the backbones of one video need clips of the same length, got {lengths}")
    return next(iter(said), None)


def feature_size(store: Mapping, identifiers: Iterable[int | str]) -> int | None:
    """
    The numbers in a vector of a store: what most of the first few arrays have. `None` where none of these can be read.
    """
    sizes = Counter()
    for identifier in islice(identifiers, 20):
        with suppress(KeyError, ValueError):  # who reads it for its content says what is wrong with it
            sizes[store[identifier].shape[1]] += 1
    return sizes.most_common(1)[0][0] if sizes else None


def name_of(store: Mapping) -> str:
    """What an error calls a store."""
    return str(getattr(store, "path", "the given mapping"))


class Features(Mapping):
    """What all stores share. `places` says, for each name in the store, where `_read` finds its array."""

    def __init__(self, path: Path, places: Mapping[str, Any], clip_seconds: float | None = None):
        if not places:
            raise ValueError(f"{path}: holds no features")
        if clip_seconds is not None and not (isinstance(clip_seconds, (int, float)) and 0 < clip_seconds < math.inf):
            raise ValueError(f"{path}: its `clip_seconds` must be a number above 0, got {clip_seconds!r}")
        self.path = path
        self.clip_seconds = clip_seconds
        # Sentences lie under "qid" and their id
        prefix = TEXT_PREFIX if all(name.startswith(TEXT_PREFIX) for name in places) else ""
        self._places = {}
        for name, place in places.items():
            identifier = _without_suffix(name.removeprefix(prefix))
            if identifier in self._places:
                raise ValueError(f"{path}: has features of {identifier} twice")
            self._places[identifier] = place

    def __getitem__(self, identifier: int | str) -> np.ndarray:
        place = self._places.get(_without_suffix(str(identifier)))
        if place is None:
            raise KeyError(f"{self.path}: no features of {identifier}")
        try:
            array = self._read(place)
        # What NumPy, zipfile and h5py raise for a file that is cut off, pickled, or something else altogether, is of
        # many kinds, MemoryError and tokenize.TokenError among them
        except Exception as error:
            raise ValueError(f"{self.path}, {identifier}: cannot be read ({error})") from error
        return self._check(array, f"{self.path}, {identifier}")

    def __contains__(self, identifier: object) -> bool:
        return _without_suffix(str(identifier)) in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def _read(self, place: Any) -> np.ndarray:
        raise NotImplementedError

    def _check(self, array: Any, where: str) -> np.ndarray:
        return _checked(array, where)


def _without_suffix(name: str) -> str:
    stem, suffix = os.path.splitext(name)
    return stem if suffix in VIDEO_SUFFIXES else name


class FolderFeatures(Features):
    """One `.npz` or `.npy` file an id, and maybe a `features.json` with `clip_seconds`."""

    def __init__(self, path: Path):
        places, metadata = {}, {}
        with os.scandir(path) as files:
            for file in files:
                name, suffix = os.path.splitext(file.name)
                if file.name == METADATA_FILE:
                    metadata = _read_metadata(file.path)
                if suffix not in (".npz", ".npy") or name.startswith("."):
                    continue
                if name in places:
                    raise ValueError(f"{path}: has both {name}.npz and {name}.npy")
                places[name] = file.path
        super().__init__(path, dict(sorted(places.items())), metadata.get("clip_seconds"))

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


def _read_metadata(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            metadata = json.load(file)
        if not isinstance(metadata, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise ValueError(f"{path}: must be a JSON object ({error})") from None
    return metadata


class Hdf5Features(Features):
    """
    One data set an id, and maybe an attribute `clip_seconds` of the file. The file is opened for each read, since an
    open one does not outlive a fork.
    """

    def __init__(self, path: Path):
        with self._opened(path) as file:
            try:
                places = {name: name for name in file}
                seconds = file.attrs.get("clip_seconds")
            except (RuntimeError, KeyError) as error:
                raise ValueError(f"{path}: a broken HDF5 file ({error})") from error
        super().__init__(path, places, seconds.item() if isinstance(seconds, np.generic) else seconds)

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


class ConvertedFeatures(Features):
    """A column of a folder that one of `dataset_scripts/` made, see `open_converted`."""

    def __init__(self, path: Path, column: str | None = None):
        backbones = self.columns(path)
        if column is None and len(backbones) == 1:
            column = backbones[0]
        if column not in (*backbones, TEXT_COLUMN):
            raise ValueError(f"{path}: `column` must be one of {', '.join((*backbones, TEXT_COLUMN))}, got {column!r}")
        config_name, key = (ANNOTATIONS_CONFIG, "qid") if column == TEXT_COLUMN else (VIDEOS_CONFIG, "vid")
        self.column = column
        self._chunks, places, seconds = [], {}, None
        for split in open_converted(path, config_name).values():
            identifiers = iter(split.data.column(key).to_pylist())
            if "clip_seconds" in split.column_names:
                seconds = split.data.column("clip_seconds")[0].as_py()
            for chunk in split.data.column(column).chunks:
                arrays = chunk.storage  # a list (rows) of lists (length) of lists (size)
                vectors = arrays.values
                starts = vectors.offsets.to_numpy()[arrays.offsets.to_numpy()]
                values = vectors.values.to_numpy(zero_copy_only=True)
                places.update((str(next(identifiers)), (len(self._chunks), row)) for row in range(len(arrays)))
                self._chunks.append((values, starts, split.features[column].shape[1]))
        super().__init__(path, places, seconds)

    @staticmethod
    def columns(path: Path) -> list[str]:
        """The video backbones of a converted folder."""
        import datasets

        features = next(iter(open_converted(path, VIDEOS_CONFIG).values())).features
        return [name for name, kind in features.items() if isinstance(kind, datasets.Array2D)]

    def __reduce__(self):  # another process maps the files itself
        return type(self), (self.path, self.column)

    def _read(self, place):
        chunk, row = place
        values, starts, size = self._chunks[chunk]
        return values[starts[row] : starts[row + 1]].reshape(-1, size)

    def _check(self, array, where):
        # All was checked when the folder was made; the processor, which makes float32 of it in the same pass in which
        # it is read from the disk, finds what was broken since
        return array


class GloveFeatures(Mapping):
    """
    Queries -> GloVe vectors of their words, (words, size) float32, by qid.

    Words are split at spaces and in lower case, as in Moment-DETR's and UMT's loaders; a word that is unknown with the
    punctuation around it ("bag.") is looked up without. One that is still unknown is a vector of zeros, and one warning
    counts them.

    Args:
        path: a text file of a word and its numbers a line, as released (`glove.6B.300d.txt`).
        rows: whose queries are asked for.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: for a line that is not as the first one; it names file and line.
        KeyError: on access, for a qid that is not of the rows.
    """

    def __init__(self, path: str | os.PathLike, rows: Iterable[Mapping[str, Any]]):
        self.path = path
        queries = {str(row["qid"]): row["query"].lower().split() for row in rows}
        written = {word for words in queries.values() for word in words}
        vectors = self._load(path, written | {word.strip(string.punctuation) for word in written})
        index = {word: number for number, word in enumerate(vectors, start=1)}
        self._vectors = np.stack([np.zeros_like(next(iter(vectors.values()))), *vectors.values()])
        place = {word: index.get(word, index.get(word.strip(string.punctuation), 0)) for word in written}
        self._words = {qid: np.array([place[word] for word in words]) for qid, words in queries.items()}
        unknown = sorted(word for word in written if not place[word])
        if unknown:
            warnings.warn(
                f"{path}: {len(unknown)} of {len(written)} words are unknown, and get zeros: "
                f"{', '.join(unknown[:10])}{', ...' if len(unknown) > 10 else ''}",
                stacklevel=3,
            )

    @staticmethod
    def _load(path, words: set[str]) -> dict[str, np.ndarray]:
        vectors, size, encoded = {}, None, {word.encode() for word in words}
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if size is not None and line.partition(b" ")[0] not in encoded:
                    continue
                try:
                    # From the right: some words of the largest release hold spaces
                    word, *numbers = line.decode().rstrip().rsplit(" ", -1 if size is None else size)
                    size = size or len(numbers)
                    if word in words:
                        with np.errstate(over="ignore"):  # what float32 cannot hold is found as infinity
                            vectors[word] = np.array(numbers, dtype=np.float32)
                        if not size or len(numbers) != size or not np.isfinite(vectors[word]).all():
                            raise ValueError
                except ValueError:
                    raise ValueError(f"{path}, line {number}: must be a word and {size or 'its'} numbers") from None
        if not vectors:
            raise ValueError(f"{path}: has a vector for none of {len(words)} words")
        return vectors

    def __getitem__(self, identifier: int | str) -> np.ndarray:
        words = self._words.get(str(identifier))
        if words is None:
            raise KeyError(f"{self.path}: qid {identifier} is not of the rows that it was opened for")
        return self._vectors[words]

    def __contains__(self, identifier: object) -> bool:
        return str(identifier) in self._words

    def __iter__(self) -> Iterator[str]:
        return iter(self._words)

    def __len__(self) -> int:
        return len(self._words)


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
    check_finite(torch.from_numpy(array), where)
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
    with atomic_write(path) as temporary:
        np.savez_compressed(temporary, **{key: array})
    return path
