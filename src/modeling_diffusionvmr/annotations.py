"""
Official annotation files -> rows, and every check of an annotation.

A row is a dict: `qid` (whole number or string), `query`, `vid`, `duration` (seconds); with ground truth also
`relevant_windows` ([[start, end], ...] in seconds); QVHighlights adds `relevant_clip_ids` and `saliency_scores` (what
three people gave each of these clips, 0 to 4).
"""

import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SALIENCY_CLIP_SECONDS = 2  # the clips that QVHighlights' people gave scores to
NUM_SALIENCY_ANNOTATORS = 3


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """
    Gives a temporary path beside `path` to write to; it takes the name `path` when the block ends without an error, so
    that nobody ever finds a file half written. Makes the folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_jsonl(rows: Iterable[Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Writes rows, annotations or predictions, one JSON object a line."""
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def load_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
    """
    Reads what `save_jsonl` writes, or an official file of annotations or predictions, without any check of its fields.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: for a line that is no JSON object; file and line are named.
    """
    return [row for _, row in _read_jsonl(path)]


def _read_jsonl(path: str | os.PathLike) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:  # of the encoding, too
                raise ValueError(f"{where}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{where}: a row must be a JSON object, got {line.strip()[:60]!r}")
            yield where, row


READERS = {".jsonl": _read_jsonl}  # by suffix; each gives (where, row), and the checks below are everyone's


def load_annotations(path: str | os.PathLike) -> list[dict[str, Any]]:
    """
    Rows of an annotation file: JSONL in the QVHighlights shape.

    A row without `relevant_windows` is one to predict. A window that ends after its video is cut there, and one warning
    counts them. Fields that the library does not know are kept.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: for a file of another kind or without rows, and for a row that is not as described at the top of
            this module, by one line that names the file, the line and the field.
    """
    reader = READERS.get(Path(path).suffix)
    if reader is None:
        raise ValueError(f"{path}: annotations are read from {', '.join(READERS)} files")
    rows, seen, num_cut = [], {}, 0
    for where, row in reader(path):
        try:
            rows.append(check_row(row))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if str(row["qid"]) in seen:
            raise ValueError(f"{where}: `qid` {row['qid']!r} was used before ({seen[str(row['qid'])]})")
        seen[str(row["qid"])] = where
        num_cut += rows[-1].get("relevant_windows") != row.get("relevant_windows")
    if not rows:
        raise ValueError(f"{path}: there are no rows")
    if num_cut:
        warnings.warn(f"{path}: windows of {num_cut} rows end after their video, and were cut there", stacklevel=2)
    return rows


def check_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a row, checked; windows that end after the video are cut there. Raises `ValueError`."""
    row = dict(row)
    for field in ("qid", "query", "vid", "duration"):
        if row.get(field) is None:
            raise ValueError(f"`{field}` is missing")
    if not isinstance(row["qid"], (int, str)) or isinstance(row["qid"], bool) or row["qid"] == "":
        raise ValueError(f"`qid` must be a whole number or a string, got {row['qid']!r}")
    for field in ("query", "vid"):
        if not isinstance(row[field], str) or not row[field].strip():
            raise ValueError(f"`{field}` must be a string that is not blank, got {row[field]!r}")
    _check_duration(row["duration"])
    if row.get("relevant_windows") is not None:
        if not isinstance(row["relevant_windows"], list):
            raise ValueError(f"`relevant_windows` must be a list of windows, got {row['relevant_windows']!r}")
        row["relevant_windows"] = [_check_window(window, row["duration"]) for window in row["relevant_windows"]]
    else:
        row.pop("relevant_windows", None)
    if row.get("saliency_scores") is not None:
        check_saliency(row)
    return row


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_duration(duration: Any) -> None:
    if not _is_number(duration) or duration <= 0:
        raise ValueError(f"`duration` must be a positive number of seconds, got {duration!r}")


def _check_window(window: Any, duration: float) -> list[float]:
    if not isinstance(window, list) or len(window) != 2 or not all(map(_is_number, window)):
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
    """Raises `ValueError` unless a row's `saliency_scores` fit its `relevant_clip_ids`, and these its video."""
    clips, scores, duration = row.get("relevant_clip_ids"), row["saliency_scores"], row.get("duration")
    if not isinstance(clips, list) or not isinstance(scores, list) or len(clips) != len(scores):
        raise ValueError("`saliency_scores` and `relevant_clip_ids` must be lists of the same length")
    _check_duration(duration)
    num_clips = int(duration / SALIENCY_CLIP_SECONDS)
    for clip in clips:
        if not isinstance(clip, int) or isinstance(clip, bool) or not 0 <= clip < num_clips:
            raise ValueError(f"`relevant_clip_ids` must be whole numbers from 0 to {num_clips - 1}, got {clip!r}")
    if len(set(clips)) < len(clips):
        raise ValueError("`relevant_clip_ids` names a clip twice")
    for score in scores:
        if not isinstance(score, list) or len(score) != NUM_SALIENCY_ANNOTATORS or not all(map(_is_number, score)):
            raise ValueError(f"each of `saliency_scores` must be {NUM_SALIENCY_ANNOTATORS} numbers, got {score!r}")
