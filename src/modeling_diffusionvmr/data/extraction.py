"""Encode videos and sentences with one frozen backbone, and write feature files in the official layout."""

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..base_backbone import Backbone
from ..video import open_video
from .backbone_record import absolute
from .feature_store import VIDEO_SUFFIXES
from .features import METADATA_FILE, TEXT_KEY, VIDEO_KEY, open_features, recorded_sentence, write_features
from .files import parse_json_object, save_json

# Folders of videos often contain other files too
VIDEO_FILE_SUFFIXES = (*VIDEO_SUFFIXES, ".3gp", ".flv", ".m4v", ".mpeg", ".mpg", ".ogv", ".ts", ".wmv")


def extract_video(
    backbone: Backbone,
    video: Any,
    folder: str | os.PathLike,
    vid: str,
    clip_seconds: float,
    batch_size: int = 32,
    dtype: str = "float32",
) -> Path:
    """
    Write the features (clips, size) of one video, computed from the same frames as in the pipeline.

    Args:
        backbone: encodes the frames.
        video: anything that `open_video` reads.
        folder, vid: the file is `folder/{vid}.npz`.
        clip_seconds: length of a clip in seconds.
        batch_size: frames per batch.
        dtype: dtype of the written features, such as "float16".

    Returns:
        The path of the file. It is written atomically.

    Raises:
        FileNotFoundError, ValueError: if the file is missing, damaged or not a video. The message names the file.
    """
    clips = backbone.encode_video(open_video(video, clip_seconds), batch_size)
    return write_features(folder, vid, clips.astype(dtype), VIDEO_KEY)


def extract_sentence(
    backbone: Backbone, sentence: str, folder: str | os.PathLike, qid: int | str, dtype: str = "float32"
) -> Path:
    """
    Write the features (tokens, size) of one sentence, and the sentence itself, to `folder/qid{qid}.npz`. See
    `extract_video`.

    Raises:
        ValueError: if `check_sentence` rejects the sentence.
    """
    (tokens,) = backbone.encode_text([sentence])
    return write_features(folder, qid, tokens.astype(dtype), TEXT_KEY, sentence)


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


def extract_videos(
    backbone: Backbone,
    name: str,
    videos: Mapping[str, Any],
    folder: str | os.PathLike,
    clip_seconds: float,
    batch_size: int = 32,
    dtype: str = "float32",
    skip_invalid: bool = False,
) -> dict[str, str]:
    """
    Write the features of many videos, with a progress bar. Skip videos that already have readable features, so that an
    interrupted run can be resumed.

    Args:
        name: the backbone's Hub id or folder. It is saved in the folder's `features.json`, folders as absolute paths,
            with `clip_seconds` and `dtype`.
        videos: files by `vid`.
        skip_invalid: skip a video that is damaged or missing, instead of raising.
        backbone, folder, clip_seconds, batch_size, dtype: see `extract_video`.

    Returns:
        The reason for each skipped video, by `vid`.

    Raises:
        FileNotFoundError, ValueError: if a video is damaged or missing.
        ValueError: if the folder contains features made with another backbone, `clip_seconds` or `dtype`, or if it does
            not record how they were made.
    """

    def extract(vid, video):
        extract_video(backbone, video, folder, vid, clip_seconds, batch_size, dtype)

    def is_done(present, vid, video):
        return _can_be_read(present, vid)

    made_with = {"backbone": absolute(name), "clip_seconds": clip_seconds, "dtype": dtype}
    return _extract_missing(videos, extract, is_done, Path(folder), made_with, skip_invalid, "encoding videos")


def extract_sentences(
    backbone: Backbone,
    name: str,
    sentences: Mapping[int | str, str],
    folder: str | os.PathLike,
    dtype: str = "float32",
    skip_invalid: bool = False,
) -> dict[int | str, str]:
    """
    Write the features of many sentences, given by `qid`. See `extract_videos`. If a file holds the features of another
    sentence, replace it; one warning lists these.
    """
    changed = []

    def extract(qid, sentence):
        extract_sentence(backbone, sentence, folder, qid, dtype)

    def is_done(present, qid, sentence):
        recorded = recorded_sentence(folder, qid) if _can_be_read(present, qid) else None
        if recorded not in (None, sentence):
            changed.append(qid)
        return recorded == sentence

    made_with = {"backbone": absolute(name), "dtype": dtype}
    skipped = _extract_missing(sentences, extract, is_done, Path(folder), made_with, skip_invalid, "encoding sentences")
    if changed:
        qids = ", ".join(map(str, changed))
        warnings.warn(f"{folder}: replaced features of other sentences with the same qid: {qids}", stacklevel=2)
    return skipped


def _extract_missing(
    items: Mapping[Any, Any],
    extract: Callable[[Any, Any], None],
    is_done: Callable[[Mapping, Any, Any], bool],
    folder: Path,
    made_with: Mapping[str, Any],
    skip_invalid: bool,
    description: str,
) -> dict[Any, str]:
    present = _open_output(folder, made_with)
    skipped = {}
    for identifier, item in tqdm(items.items(), desc=description):
        if is_done(present, identifier, item):
            continue
        try:
            extract(identifier, item)
        except (ValueError, FileNotFoundError) as error:  # any other OSError is about the output, so about all items
            if not skip_invalid:
                raise
            skipped[identifier] = str(error)
    return skipped


def _open_output(folder: Path, made_with: Mapping[str, Any]) -> Mapping:
    """Return the features that a folder already contains. Raise `ValueError` if they were made with other settings."""
    path = folder / METADATA_FILE
    if not any(folder.glob("[!.]*.npz")):  # temporary files are hidden
        save_json(made_with, path, indent=None)
        return {}
    if not path.exists():
        raise ValueError(f"{folder}: contains features, but no {METADATA_FILE} that records how they were made")
    features = open_features(folder)
    found = parse_json_object(path.read_bytes())
    if isinstance(found.get("backbone"), str):  # a relative path in folders that earlier versions wrote
        found["backbone"] = absolute(found["backbone"])
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
