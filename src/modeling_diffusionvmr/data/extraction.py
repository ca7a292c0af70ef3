"""Encode videos and sentences with frozen backbones, and write feature files in the official layout."""

import hashlib
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from ..base_backbone import Backbone, VideoError, encode_video
from ..checks import check_sentence
from ..json_files import read_json_object
from ..video import MAX_VIDEO_SECONDS, open_video
from .backbone_record import absolute
from .feature_store import VIDEO_SUFFIXES
from .features import (
    METADATA_FILE,
    TEXT_KEY,
    VIDEO_KEY,
    features_path,
    open_features,
    recorded_sentence,
    write_features,
)
from .files import remove_free_locks, save_json

# Folders of videos often contain other files too
VIDEO_FILE_SUFFIXES = (*VIDEO_SUFFIXES, ".3gp", ".flv", ".m4v", ".mpeg", ".mpg", ".ogv", ".ts", ".wmv")
# Decoding uses one core, and a short video is a single batch, so that its decoding and its encoding do not overlap
VIDEOS_AT_ONCE = 2


class ItemError(ValueError):
    """A video or sentence cannot be used, or its id cannot name a file. The others are not affected."""


class Output(NamedTuple):
    """
    A backbone and the folder for its features.

    Args:
        folder: created if missing.
        backbone: computes the features.
        source: the backbone's Hub id or folder. It is saved in the folder's `features.json`, folders as absolute paths.
    """

    folder: str | os.PathLike
    backbone: Backbone
    source: str | os.PathLike


def extract_video(
    backbones: Mapping[str | os.PathLike, Backbone],
    video: Any,
    vid: str,
    clip_seconds: float,
    batch_size: int = 32,
    dtype: str = "float32",
    max_video_seconds: float = MAX_VIDEO_SECONDS,
    advance: Callable[[float], None] | None = None,
) -> None:
    """
    Write the features (clips, size) of one video, computed from the same frames as in the pipeline. It is decoded once
    for all backbones. Each file is written atomically. If one cannot be written, the others still are.

    Args:
        backbones: encode the frames, each by the folder of its file, `folder/{vid}.npz`.
        video: anything that `open_video` reads.
        clip_seconds: length of a clip in seconds.
        batch_size: frames per batch. A batch has at least one clip.
        dtype: dtype of the written features, such as "float16".
        max_video_seconds: maximum duration.
        advance: see `encode_video`.

    Raises:
        ItemError, VideoError: if the file is missing, damaged, too long or not a video. The message names it.
        ValueError: if features are not finite in this dtype. The message names the backbone and the video.
        OSError: if a file cannot be written.
    """
    with _errors_of_item():
        for folder in backbones:
            features_path(folder, vid, VIDEO_KEY)
        opened = open_video(video, clip_seconds, max_video_seconds=max_video_seconds)
    arrays = encode_video(list(backbones.values()), opened, batch_size, advance=advance)
    errors = []
    for (folder, backbone), clips in zip(backbones.items(), arrays):
        try:
            write_features(folder, vid, _finite(clips, dtype, f"{folder}, {opened.name}", backbone), VIDEO_KEY)
        except (ValueError, OSError) as error:
            errors.append(error)
    if errors:
        raise errors[0]


def extract_sentence(
    backbone: Backbone, sentence: str, folder: str | os.PathLike, qid: int | str, dtype: str = "float32"
) -> Path:
    """
    Write the features (tokens, size) of one sentence, and the sentence itself, to `folder/qid{qid}.npz`, atomically.

    Returns:
        The path of the file.

    Raises:
        ItemError: if `check_sentence` rejects the sentence.
        ValueError: if features are not finite in this dtype. The message names the backbone and the sentence.
        OSError: if the file cannot be written.
    """
    with _errors_of_item():
        features_path(folder, qid, TEXT_KEY)
        check_sentence(sentence)
    (tokens,) = backbone.encode_text([sentence])
    return write_features(folder, qid, _finite(tokens, dtype, f"{folder}, {qid}", backbone), TEXT_KEY, sentence)


@contextmanager
def _errors_of_item() -> Iterator[None]:
    """Turn errors into `ItemError`."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise ItemError(str(error)) from error


def _finite(features: np.ndarray, dtype: str, where: str, backbone: Backbone) -> np.ndarray:
    """Return features in another dtype. Raise ValueError if they are not finite."""
    with np.errstate(over="ignore"):  # numbers that are too large become infinity
        converted = features.astype(dtype)
    if np.isfinite(converted).all():
        return converted
    name = type(backbone).__name__
    if np.isfinite(features).all():
        raise ValueError(f"{where}: features of {name} are too large for {dtype}; choose float32")
    raise ValueError(f"{where}: features of {name} contain NaN or infinity")


def find_videos(folder: str | os.PathLike) -> tuple[dict[str, Path], list[str]]:
    """
    Find the video files in a folder by their `vid`, the file name without its extension.

    Returns:
        The files in the order of their `vid`, and the names of all other entries except hidden ones.

    Raises:
        FileNotFoundError, NotADirectoryError: if there is no such folder.
        ValueError: if two files have the same `vid`, or if the folder contains no videos.
    """
    videos: dict[str, Path] = {}
    others = []
    for path in sorted(Path(folder).iterdir()):
        if path.name.startswith("."):
            continue
        if path.suffix.lower() not in VIDEO_FILE_SUFFIXES or not path.is_file():
            others.append(path.name)
        elif path.stem in videos:
            raise ValueError(f"{folder}: {videos[path.stem].name} and {path.name} are both video {path.stem}")
        else:
            videos[path.stem] = path
    if not videos:
        raise ValueError(f"{folder}: no videos (files that end in {', '.join(VIDEO_FILE_SUFFIXES)})")
    return dict(sorted(videos.items())), others


def share_of_videos(videos: Mapping[str, Any], rank: int, num_processes: int) -> dict[str, Any]:
    """
    Return the entries, by `vid`, that one of several processes is responsible for.

    The choice depends on the `vid` alone: processes that start at different times can see different files, and each
    video must still belong to exactly one of them. A hash spreads videos, long ones too, evenly if there are many.
    """
    return {vid: value for vid, value in videos.items() if _stable_hash(vid) % num_processes == rank}


def _stable_hash(text: str) -> int:
    """Return a number that is the same in all processes, unlike Python's `hash`."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest())


def extract_videos(
    outputs: Sequence[Output],
    videos: Mapping[str, str | os.PathLike],
    clip_seconds: float,
    batch_size: int = 32,
    dtype: str = "float32",
    max_video_seconds: float = MAX_VIDEO_SECONDS,
    progress: bool = True,
) -> dict[str, str]:
    """
    Write the features of many videos. Each is decoded once, for the backbones of which it has no readable features yet,
    so that an interrupted run can be resumed. A video that cannot be opened or decoded does not stop the others; any
    error of a backbone stops the run.

    Args:
        outputs: the backbones and their folders. `clip_seconds` and `dtype` are saved in `features.json`, too.
        videos: files by `vid`.
        progress: show a progress bar. It counts bytes, since the duration of a video is only known once it is open.
        clip_seconds, batch_size, dtype, max_video_seconds: see `extract_video`.

    Returns:
        The reason for each video that could not be opened or decoded, by `vid`.

    Raises:
        ValueError: if a folder contains features made with another backbone, `clip_seconds` or `dtype`, if it does not
            record how they were made, or if features are not finite.
        OSError: if a file cannot be written.
    """
    settings = {"clip_seconds": clip_seconds, "dtype": dtype}
    present = [_open_output(output, settings) for output in outputs]
    unfinished = {}
    for vid in tqdm(videos, desc="checking features", leave=False, disable=not (progress and any(present))):
        missing = [output for output, features in zip(outputs, present) if not _can_be_read(features, vid)]
        if missing:
            unfinished[vid] = {output.folder: output.backbone for output in missing}

    sizes = {vid: _num_bytes(videos[vid]) for vid in unfinished}
    stopped = threading.Event()

    def extract(vid: str) -> str | None:
        def advance(fraction: float) -> None:
            if stopped.is_set():
                raise CancelledError
            with bar.get_lock():
                bar.update(min(fraction * sizes[vid], total - bar.n))  # fractions are rounded

        options = (clip_seconds, batch_size, dtype, max_video_seconds, advance)
        return _reason_of_failure(extract_video, unfinished[vid], videos[vid], vid, *options)

    total = sum(sizes.values())
    bar = tqdm(desc=f"encoding {len(sizes)} videos", total=total, unit="B", unit_scale=True, disable=not progress)
    with bar, ThreadPoolExecutor(VIDEOS_AT_ONCE) as executor:
        try:
            return _failures(unfinished, executor.map(extract, unfinished))
        finally:
            stopped.set()  # the pool waits for the videos that have begun


def extract_sentences(
    output: Output, sentences: Mapping[Any, str], dtype: str = "float32", progress: bool = True
) -> dict[Any, str]:
    """
    Write the features of many sentences, given by `qid`. See `extract_videos`. If a file holds the features of another
    sentence, replace it; one warning lists these.
    """
    folder, backbone, _ = output
    present = _open_output(output, {"dtype": dtype})
    changed = []

    def extract(qid) -> str | None:
        recorded = recorded_sentence(folder, qid) if _can_be_read(present, qid) else None
        if recorded == sentences[qid]:
            return None
        if recorded is not None:
            changed.append(str(qid))
        return _reason_of_failure(extract_sentence, backbone, sentences[qid], folder, qid, dtype)

    bar = tqdm(sentences, desc="encoding sentences", disable=not progress)
    failures = _failures(sentences, map(extract, bar))
    if changed:
        qids = ", ".join(changed)
        warnings.warn(f"{folder}: replaced features of other sentences with the same qid: {qids}", stacklevel=2)
    return failures


def _reason_of_failure(extract: Callable, *arguments) -> str | None:
    """Call the function. Return why its item is unusable, or `None`."""
    try:
        extract(*arguments)
    except (ItemError, VideoError) as error:  # any other error is about a backbone or the output, so about all items
        return str(error)
    return None


def _failures(identifiers: Iterable[Any], reasons: Iterable[str | None]) -> dict[Any, str]:
    return {identifier: reason for identifier, reason in zip(identifiers, reasons) if reason is not None}


def _num_bytes(path: str | os.PathLike) -> int:
    return os.path.getsize(path) if os.path.isfile(path) else 0


def _open_output(output: Output, settings: Mapping[str, Any]) -> Mapping:
    """Return the features that a folder already contains. Raise `ValueError` if they were made with other settings."""
    # The class, too, since somebody can register another one for the same checkpoint
    made_with = {"backbone": absolute(output.source), "backbone_class": type(output.backbone).__name__, **settings}
    folder = Path(output.folder)
    path = folder / METADATA_FILE
    remove_free_locks(folder)
    if not any(folder.glob("[!.]*.npz")):  # temporary files are hidden
        save_json(made_with, path, indent=None)
        return {}
    if not path.exists():
        raise ValueError(f"{folder}: contains features, but no {METADATA_FILE} that records how they were made")
    features = open_features(folder)
    found = read_json_object(path)
    if isinstance(found.get("backbone"), str):  # a relative path in folders that earlier versions wrote
        found["backbone"] = absolute(found["backbone"])
    found.setdefault("backbone_class", made_with["backbone_class"])  # earlier versions did not record it
    for key, value in made_with.items():
        if found.get(key) != value:
            raise ValueError(
                f"{folder}: contains features with {key} {found.get(key)!r}, not {value!r}; choose another folder"
            )
    return features


def _can_be_read(features: Mapping, identifier: int | str) -> bool:
    try:
        return features[identifier] is not None
    except (KeyError, ValueError):
        return False
