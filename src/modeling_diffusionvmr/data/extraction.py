"""Videos and sentences -> feature files in the official layout, by one frozen backbone."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..backbones import ClipBackbone
from ..video import open_video
from .features import METADATA_FILE, TEXT_KEY, VIDEO_KEY, VIDEO_SUFFIXES, open_features, write_features
from .files import atomic_write

# Of the files that count as videos, since a folder of videos often holds other files, too
VIDEO_FILE_SUFFIXES = (*VIDEO_SUFFIXES, ".3gp", ".flv", ".m4v", ".mpeg", ".mpg", ".ogv", ".ts", ".wmv")


def extract_video(
    backbone: ClipBackbone,
    video: Any,
    folder: str | os.PathLike,
    vid: str,
    clip_seconds: float,
    batch_size: int = 32,
    dtype: str = "float32",
) -> Path:
    """
    Writes the features (clips, size) of one video, of the frames that the pipeline takes.

    Args:
        video: what `open_video` reads.
        folder, vid: the file is `folder/{vid}.npz`.
        clip_seconds: length of a clip.
        batch_size: frames at once.
        dtype: NumPy's name of the type that is written.

    Returns:
        The path of the file, which is there whole, or not at all.

    Raises:
        FileNotFoundError, ValueError: for what is no video, or a broken one; it is named.
    """
    clips = backbone.encode_video(open_video(video, clip_seconds), batch_size)
    return write_features(folder, vid, clips.astype(dtype), VIDEO_KEY)


def extract_sentence(
    backbone: ClipBackbone, sentence: str, folder: str | os.PathLike, qid: int | str, dtype: str = "float32"
) -> Path:
    """
    Writes the features (tokens, size) of all tokens of one sentence to `folder/qid{qid}.npz`, see `extract_video`.

    Raises:
        ValueError: for an empty sentence.
    """
    (tokens,) = backbone.encode_text([sentence])
    return write_features(folder, qid, tokens.astype(dtype), TEXT_KEY)


def find_videos(folder: str | os.PathLike) -> tuple[dict[str, Path], list[str]]:
    """
    The video files that lie in a folder, by their `vid`: the name of the file without its extension.

    Returns:
        The files in the order of their `vid`, and the names of whatever else lies there (but for hidden files).

    Raises:
        FileNotFoundError, NotADirectoryError: when there is no such folder.
        ValueError: for two files of one `vid`, which it names, and where there are no videos.
    """
    videos, others = {}, []
    for path in sorted(Path(folder).iterdir()):
        if path.name.startswith("."):
            continue
        if path.suffix.lower() not in VIDEO_FILE_SUFFIXES or not path.is_file():
            others.append(path.name)
        elif path.stem in videos:
            raise ValueError(f"{folder}: both {videos[path.stem].name} and {path.name} would be the video {path.stem}")
        else:
            videos[path.stem] = path
    if not videos:
        raise ValueError(f"{folder}: there are no videos; their names end in one of {', '.join(VIDEO_FILE_SUFFIXES)}")
    return dict(sorted(videos.items())), others


def extract_videos(
    backbone: ClipBackbone,
    name: str,
    videos: Mapping[str, Any],
    folder: str | os.PathLike,
    clip_seconds: float,
    batch_size: int = 32,
    dtype: str = "float32",
    skip_invalid: bool = False,
) -> dict[str, str]:
    """
    Writes the features of videos, with a progress bar. Those that the folder holds already, and that can be read, are
    left as they are, so that a run that was stopped can be continued.

    Args:
        name: of the backbone, its Hub id or folder. It is kept in the folder's `features.json`, with `clip_seconds` and
            `dtype`.
        videos: files by `vid`.
        skip_invalid: whether to go on where a video is broken or missing.
        backbone, folder, clip_seconds, batch_size, dtype: see `extract_video`.

    Returns:
        Why videos were skipped, by `vid`.

    Raises:
        FileNotFoundError, ValueError: for a video that is broken or missing.
        ValueError: when the folder holds features of another making, or of an unknown one, which nobody could tell
            from these.
    """

    def extract(vid, video):
        extract_video(backbone, video, folder, vid, clip_seconds, batch_size, dtype)

    made_with = {"backbone": name, "clip_seconds": clip_seconds, "dtype": dtype}
    return _extract_missing(videos, extract, Path(folder), made_with, skip_invalid, "encoding videos")


def extract_sentences(
    backbone: ClipBackbone,
    name: str,
    sentences: Mapping[int | str, str],
    folder: str | os.PathLike,
    dtype: str = "float32",
    skip_invalid: bool = False,
) -> dict[int | str, str]:
    """As `extract_videos`, for sentences by `qid`."""

    def extract(qid, sentence):
        extract_sentence(backbone, sentence, folder, qid, dtype)

    made_with = {"backbone": name, "dtype": dtype}
    return _extract_missing(sentences, extract, Path(folder), made_with, skip_invalid, "encoding sentences")


def _extract_missing(items, extract, folder, made_with, skip_invalid, description):
    present = _open_output(folder, made_with)
    skipped = {}
    for identifier, item in tqdm(items.items(), desc=description):
        if _can_be_read(present, identifier):
            continue
        try:
            extract(identifier, item)
        except (ValueError, FileNotFoundError) as error:  # another OSError is of the output, and of all that follow
            if not skip_invalid:
                raise
            skipped[identifier] = str(error)
    return skipped


def _open_output(folder: Path, made_with: Mapping[str, Any]) -> Mapping:
    """The features that a folder holds already, after a check that they are of this making."""
    path = folder / METADATA_FILE
    if not any(folder.glob("[!.]*.npz")):  # a file that is not finished is hidden
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(made_with) + "\n", encoding="utf-8")
        return {}
    if not path.exists():
        raise ValueError(f"{folder}: holds features without a {METADATA_FILE} that says how they were made")
    features = open_features(folder)
    found = json.loads(path.read_bytes())
    for key, value in made_with.items():
        if found.get(key) != value:
            raise ValueError(
                f"{folder}: holds features of {key} {found.get(key)!r}, these would be of {value!r}; use another"
            )
    return features


def _can_be_read(features: Mapping, identifier: int | str) -> bool:
    try:
        return features[identifier] is not None
    except (KeyError, ValueError):
        return False
