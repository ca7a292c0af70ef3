"""The base class of all feature stores: read-only mappings from an id to an array, checked when it is read."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checks import check_positive
from ..processing_diffusionvmr import check_finite

TEXT_PREFIX = "qid"  # begins the names of official sentence files
VIDEO_SUFFIXES = (".avi", ".mp4", ".mkv", ".webm", ".mov")  # some released files have them in their names


class FeatureStore(Mapping):
    """
    Mapping from an id (`vid` or `qid`, as a number or a string) to an array (length, size). Ids iterate as strings.

    Subclasses implement `_read`.

    Args:
        path: the file or folder, for error messages.
        places: what `_read` needs to find each array, by name in the store.
        clip_seconds: length of a clip, if the files state it.
        backbone: folder or Hub id of the backbone that computed the features, if the files state it.

    Raises:
        ValueError: if there are no features, two names mean the same id, or `clip_seconds` or `backbone` is invalid.
    """

    def __init__(
        self,
        path: Path,
        places: Mapping[str, Any],
        clip_seconds: float | None = None,
        backbone: str | None = None,
    ):
        if not places:
            raise ValueError(f"{path}: contains no features")
        if clip_seconds is not None:
            check_positive(clip_seconds, f"{path}: `clip_seconds`")
        self.path = path
        if backbone is not None and not isinstance(backbone, str):
            raise ValueError(f"{path}: `backbone` must be the folder or Hub id of a backbone, got {backbone!r}")
        self.clip_seconds = clip_seconds
        self.backbone = backbone
        prefix = TEXT_PREFIX if all(name.startswith(TEXT_PREFIX) for name in places) else ""
        self._places: dict[str, Any] = {}
        for name, place in places.items():
            identifier = _without_suffix(name.removeprefix(prefix))
            if identifier in self._places:
                raise ValueError(f"{path}: contains features of {identifier} twice")
            self._places[identifier] = place

    def __getitem__(self, identifier: int | str) -> np.ndarray:
        place = self._places.get(_without_suffix(str(identifier)))
        if place is None:
            raise KeyError(f"{self.path}: no features of {identifier}")
        try:
            array = self._read(place)
        # NumPy, zipfile and h5py raise errors of many types for a file that is truncated, pickled or in another format,
        # MemoryError and tokenize.TokenError among them
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
        return check_features(array, where)


def _without_suffix(name: str) -> str:
    stem, suffix = os.path.splitext(name)
    return stem if suffix in VIDEO_SUFFIXES else name


def check_features(array: Any, where: str) -> np.ndarray:
    """
    Return an array (length, size) as float32.

    Raises:
        ValueError: if it is empty, has another shape or type, or contains NaN, infinity, or values that float32 cannot
            represent. The message begins with `where`.
    """
    array = np.asarray(array)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{where}: features must be real numbers, got {array.dtype}")
    if array.ndim != 2:
        raise ValueError(f"{where}: features must be (length, size), got shape {array.shape}")
    if not array.size:
        raise ValueError(f"{where}: features are empty, with shape {array.shape}")
    with np.errstate(over="ignore"):  # values that float32 cannot represent become infinity, which is rejected below
        array = array.astype(np.float32, copy=False)
    check_finite(torch.from_numpy(array), where)
    return array
