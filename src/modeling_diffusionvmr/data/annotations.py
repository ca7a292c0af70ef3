"""
Read official annotation files, and check annotations.

An annotation, or row, is a dict: `qid` (whole number or string), `query`, `vid`, `duration` (seconds). With ground
truth it also has `relevant_windows` ([[start, end], ...] in seconds). QVHighlights adds `relevant_clip_ids` and
`saliency_scores` (for each of these clips, the scores of three annotators, 0 to 4).
"""

import csv
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from ..checks import check_positive, check_sentence, is_number
from ..json_files import parse_json_object, read_json_object
from .files import numbered_lines
from .hub import local_path
from .parquet import ANNOTATIONS_CONFIG, read_annotations

SALIENCY_CLIP_SECONDS = 2  # the clips that QVHighlights' annotators scored
NUM_SALIENCY_ANNOTATORS = 3
MAX_SALIENCY = 4  # the highest score that an annotator can give
CHARADES_DURATIONS = "Charades_v1_*.csv"
CHARADES_TEST_QID = 12404  # qid of the first test line in the released sentence features
TACOS_FIELDS = ("fps", "num_frames", "timestamps", "sentences")
SKIP_HINT = "(skip_invalid=True, or --skip_invalid, skips such rows)"


def load_annotations(
    path: str | os.PathLike, split: str | None = None, skip_invalid: bool = False
) -> list[dict[str, Any]]:
    """
    Load an annotation file: JSONL in the QVHighlights shape, Charades-STA's `.txt` (with `Charades_v1_*.csv` beside
    it), TACoS' `.json` as released with 2D-TAN, or a folder written by `diffusionvmr convert`, also on the Hub.

    Charades-STA and TACoS get the qids of their released sentence features. Charades-STA's are line numbers that do not
    count windows that end before they start; the test file continues where the training file ends. TACoS' are
    `{vid}_{index}`.

    A row without `relevant_windows` is unlabeled. A window that ends after its video is cut at the video's end; one
    warning counts these rows. Unknown fields are kept.

    Args:
        path: the file or folder, or `USER/NAME` of a data set on the Hub.
        split: for a converted folder, "train", "val" or "test".
        skip_invalid: skip unusable rows and list them in one warning.

    Raises:
        FileNotFoundError: if `path` does not exist.
        ValueError: if the file has another format or no rows, or if `check_row` rejects a row. The message is one line
            that names the file, the line and the field.
    """
    path = local_path(path, (ANNOTATIONS_CONFIG,))
    rows: list[dict[str, Any]] = []
    seen: dict[str, str] = {}  # where each qid was found
    skipped: list[str] = []
    num_cut = 0
    for where, row in _read(path, split):
        try:
            if isinstance(row, ValueError):
                raise row
            checked = check_row(row)
            qid = str(checked["qid"])  # as strings, since 7 and "7" would share a feature file
            if qid in seen:
                raise ValueError(f"`qid` {checked['qid']!r} was already used ({seen[qid]})")
        except ValueError as error:
            if not skip_invalid:
                raise ValueError(f"{where}: {error} {SKIP_HINT}") from None
            skipped.append(f"{where}: {error}")
            continue
        seen[qid] = where
        num_cut += checked.get("relevant_windows") != row.get("relevant_windows")
        rows.append(checked)
    if skipped:
        warn_skipped(path, skipped, len(rows))
    if not rows:
        raise ValueError(f"{path}: contains no rows")
    if num_cut:
        warnings.warn(f"{path}: {num_cut} rows have windows that end after the video; they were cut", stacklevel=2)
    return rows


def warn_skipped(what: str | os.PathLike, skipped: Sequence[str], num_kept: int) -> None:
    """Issue one warning that counts the skipped rows and lists each with its reason."""
    lines = "\n  ".join(skipped)
    warnings.warn(f"{what}: skipped {len(skipped)} of {len(skipped) + num_kept} rows:\n  {lines}", stacklevel=3)


def hold_out(rows: Sequence[dict[str, Any]], share: float, seed: int = 0) -> tuple[list, list]:
    """
    Split rows by video, for a benchmark without a validation split.

    Args:
        share: share of the videos to hold out, in (0, 1). At least one video is held out.
        seed: seed of the choice, which depends only on the seed and the set of videos.

    Returns:
        The remaining rows, and those that are held out.

    Raises:
        ValueError: if either side would have no video.
    """
    videos = sorted({row["vid"] for row in rows})
    count = max(1, round(share * len(videos))) if 0 < share < 1 else 0
    if not 0 < count < len(videos):
        raise ValueError(f"cannot hold out a share of {share} of {len(videos)} videos: one side would be empty")
    chosen = {videos[index] for index in np.random.default_rng(seed).permutation(len(videos))[:count]}
    return [row for row in rows if row["vid"] not in chosen], [row for row in rows if row["vid"] in chosen]


# Checks


def check_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return a checked copy of an annotation. Windows that end after the video are cut at its end.

    Raises:
        ValueError: if the row is not as described at the top of this module. The message names the field.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"a row must be a dict of fields, got {row!r}")
    row = dict(row)
    for field in ("qid", "query", "vid", "duration"):
        if row.get(field) is None:
            raise ValueError(f"`{field}` is missing")
    if not isinstance(row["qid"], (Integral, str)) or isinstance(row["qid"], bool):
        raise ValueError(f"`qid` must be a whole number or a string, got {row['qid']!r}")
    if isinstance(row["qid"], str):
        check_sentence(row["qid"], "`qid`")
    check_sentence(row["query"], "`query`")
    check_sentence(row["vid"], "`vid`")
    check_positive(row["duration"], "`duration`")
    if row.get("relevant_windows") is not None:
        row["relevant_windows"] = _check_windows(row["relevant_windows"], row["duration"])
    else:
        row.pop("relevant_windows", None)
    if row.get("saliency_scores") is not None:
        check_saliency(row)
    return row


def _check_windows(windows: Any, duration: float) -> list[list[float]]:
    if isinstance(windows, np.ndarray):
        windows = windows.tolist()
    if not isinstance(windows, (list, tuple)):
        raise ValueError(f"`relevant_windows` must be a list of windows, got {windows!r}")
    return [_check_window(window, duration) for window in windows]


def _check_window(window: Any, duration: float) -> list[float]:
    if not isinstance(window, (list, tuple)) or len(window) != 2 or not all(map(is_number, window)):
        raise ValueError(f"a window of `relevant_windows` must be [start, end] in seconds, got {window!r}")
    start, end = window
    if start < 0:
        raise ValueError(f"the window {window} starts before the video")
    if end <= start:
        raise ValueError(f"the window {window} does not end after it starts")
    if start >= duration:
        raise ValueError(f"the window {window} starts at or after the end of the video, {duration} s")
    return [start, min(end, duration)]


def check_saliency(row: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless `saliency_scores` fit `relevant_clip_ids`, and these fit `duration`."""
    clips, scores = row.get("relevant_clip_ids"), row["saliency_scores"]
    if not isinstance(clips, list) or not isinstance(scores, list) or len(clips) != len(scores):
        raise ValueError("`saliency_scores` and `relevant_clip_ids` must be lists of the same length")
    check_positive(row.get("duration"), "`duration`")
    num_clips = int(row["duration"] / SALIENCY_CLIP_SECONDS)
    for clip in clips:
        if type(clip) is not int or not 0 <= clip < num_clips:
            raise ValueError(f"`relevant_clip_ids` must be whole numbers from 0 to {num_clips - 1}, got {clip!r}")
    if len(set(clips)) < len(clips):
        raise ValueError("`relevant_clip_ids` contains a clip twice")
    for score in scores:
        is_triple = type(score) is list and len(score) == NUM_SALIENCY_ANNOTATORS and all(map(is_number, score))
        if not is_triple or min(score) < 0:
            raise ValueError(
                f"each of `saliency_scores` must be {NUM_SALIENCY_ANNOTATORS} numbers of 0 or more, got {score!r}"
            )


# Readers. Each yields the place of a row and the row, or the error if it cannot be parsed. They only parse:
# `load_annotations` checks the rows of all formats.

Found = Iterator[tuple[str, dict[str, Any] | ValueError]]


def _read(path: Path, split: str | None) -> Found:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such annotation file or folder")
    if path.is_dir():
        return read_annotations(path, split)
    if split is not None:
        raise ValueError(f"{path}: only a converted folder has a `split`, got {split!r}")
    if path.suffix not in READERS:
        raise ValueError(f"{path}: annotations must be a {', '.join(READERS)} file or a converted folder")
    return READERS[path.suffix](path)


def _attempt(parse: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any] | ValueError:
    try:
        return parse(*arguments)
    except ValueError as error:
        return error


def _read_jsonl(path: Path) -> Found:
    for where, line in numbered_lines(path):
        yield where, _attempt(parse_json_object, line)


def _read_charades(path: Path) -> Found:
    durations = _charades_durations(path.parent)
    qid = CHARADES_TEST_QID if "test" in path.stem.split("_") else 0
    for where, line in numbered_lines(path):
        row = _attempt(_parse_charades, line, durations)
        start, end = 0, 1
        if isinstance(row, dict):
            row["qid"] = qid
            start, end = row["relevant_windows"][0]
        qid += start < end  # the released features do not count lines that end before they start
        yield where, row


def _parse_charades(line: bytes, durations: Mapping[str, float]) -> dict[str, Any]:
    times, separator, query = line.decode().strip().partition("##")
    try:
        vid, start, end = times.split()
        window = [float(start), float(end)]
    except ValueError:
        separator = ""
    if not separator:
        raise ValueError(f"a line must be 'vid start end##query', got {line.strip()[:60]!r}")
    if vid not in durations:
        raise ValueError(f"the duration of video {vid} is not in {CHARADES_DURATIONS} beside the file")
    return {"query": query, "vid": vid, "duration": durations[vid], "relevant_windows": [window]}


def _charades_durations(folder: Path) -> dict[str, float]:
    files = sorted(folder.glob(CHARADES_DURATIONS))
    if not files:
        raise ValueError(f"{folder}: Charades-STA needs {CHARADES_DURATIONS} in this folder to know the durations")
    durations = {}
    for path in files:
        with open(path, newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            try:
                for row in table:
                    durations[row["id"]] = float(row["length"])
            except (KeyError, TypeError, ValueError, csv.Error) as error:
                raise ValueError(
                    f"{path}, line {table.line_num}: needs an `id` and a `length` in seconds ({error})"
                ) from None
    return durations


def _read_tacos(path: Path) -> Found:
    for name, video in read_json_object(path).items():
        where = f"{path}, {name}"
        try:
            _check_tacos_video(video)
        except ValueError as error:
            yield where, error
            continue
        for index in range(len(video["sentences"])):
            yield f"{where}, sentence {index}", _attempt(_parse_tacos, Path(name).stem, video, index)


def _check_tacos_video(video: Any) -> None:
    if not isinstance(video, dict) or any(video.get(field) is None for field in TACOS_FIELDS):
        raise ValueError("a video needs `fps`, `num_frames`, `timestamps` in frames, and `sentences`")
    check_positive(video["fps"], "`fps`")
    check_positive(video["num_frames"], "`num_frames`")
    moments, sentences = video["timestamps"], video["sentences"]
    if not isinstance(moments, list) or not isinstance(sentences, list):
        raise ValueError("`timestamps` and `sentences` must be lists")
    if len(moments) != len(sentences):
        raise ValueError(f"has {len(moments)} `timestamps` for {len(sentences)} `sentences`")


def _parse_tacos(vid: str, video: Mapping[str, Any], index: int) -> dict[str, Any]:
    moment, fps = video["timestamps"][index], video["fps"]
    if not isinstance(moment, list) or len(moment) != 2 or not all(map(is_number, moment)):
        raise ValueError(f"each of `timestamps` must be [start, end] in frames, got {moment!r}")
    return {
        "qid": f"{vid}_{index}",
        "query": video["sentences"][index],
        "vid": vid,
        "duration": video["num_frames"] / fps,
        "relevant_windows": [[frame / fps for frame in moment]],
    }


READERS = {".jsonl": _read_jsonl, ".txt": _read_charades, ".json": _read_tacos}  # by suffix
