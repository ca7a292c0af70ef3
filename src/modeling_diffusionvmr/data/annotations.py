"""
Official annotation files -> rows, and every check of an annotation.

A row is a dict: `qid` (whole number or string), `query`, `vid`, `duration` (seconds); with ground truth also
`relevant_windows` ([[start, end], ...] in seconds); QVHighlights adds `relevant_clip_ids` and `saliency_scores` (what
three people gave each of these clips, 0 to 4).
"""

import csv
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

from .files import numbered_lines, parse_json_object

SALIENCY_CLIP_SECONDS = 2  # the clips that QVHighlights' people gave scores to
NUM_SALIENCY_ANNOTATORS = 3
CHARADES_DURATIONS = "Charades_v1_*.csv"
CHARADES_TEST_QID = 12404  # of the first line, in the released features of sentences
ANNOTATIONS_CONFIG, TEXT_COLUMN = "annotations", "text_features"  # of a converted folder, and of sentences there
FILE_OF_SPLIT = re.compile(r"(?:^|-)(?P<split>\w+)-(?P<index>\d{5})-of-(?P<count>\d{5})")


# Readers: each gives (where, row), or (where, error) for what is no row at all; the checks of rows are everyone's

Read = Iterator[tuple[str, dict[str, Any] | ValueError]]


def _attempt(parse: Callable, *arguments) -> dict[str, Any] | ValueError:
    try:
        return parse(*arguments)
    except ValueError as error:
        return error


def _read_jsonl(path: str | os.PathLike) -> Read:
    for where, line in numbered_lines(path):
        yield where, _attempt(parse_json_object, line)


def _read_charades(path: str | os.PathLike) -> Read:
    durations = _charades_durations(Path(path).parent)
    qid = CHARADES_TEST_QID if "test" in Path(path).stem.split("_") else 0
    for where, line in numbered_lines(path):
        row = _attempt(_parse_charades, line, durations)
        start, end = 0, 1
        if isinstance(row, dict):
            row["qid"] = qid
            start, end = row["relevant_windows"][0]
        qid += start < end  # the released features do not count the lines that end before they start
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
        raise ValueError(f"video {vid} is in no {CHARADES_DURATIONS} beside the file, which hold the durations")
    return {"query": query, "vid": vid, "duration": durations[vid], "relevant_windows": [window]}


def _charades_durations(folder: Path) -> dict[str, float]:
    files = sorted(folder.glob(CHARADES_DURATIONS))
    if not files:
        raise ValueError(f"{folder}: the durations of Charades-STA are in {CHARADES_DURATIONS}, which must lie here")
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


def _read_tacos(path: str | os.PathLike) -> Read:
    try:
        with open(path, "rb") as file:
            videos = parse_json_object(file.read())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for name, video in videos.items():
        where = f"{path}, {name}"
        rows = _attempt(_parse_tacos, Path(name).stem, video)
        if isinstance(rows, ValueError):
            yield where, rows
        else:
            yield from ((f"{where}, sentence {index}", row) for index, row in enumerate(rows))


def _parse_tacos(vid: str, video: Mapping[str, Any]) -> list[dict[str, Any]]:
    try:
        fps, duration = video["fps"], video["num_frames"] / video["fps"]
        moments = [[frame / fps for frame in moment] for moment in video["timestamps"]]
        sentences = video["sentences"]
        if len(moments) != len(sentences):
            raise ValueError(f"has {len(moments)} `timestamps` for {len(sentences)} `sentences`")
    except (KeyError, TypeError, ZeroDivisionError):
        raise ValueError("a video needs `fps`, `num_frames`, `timestamps` in frames, and `sentences`") from None
    return [
        {"qid": f"{vid}_{index}", "query": query, "vid": vid, "duration": duration, "relevant_windows": [moment]}
        for index, (query, moment) in enumerate(zip(sentences, moments))
    ]


def open_converted(path: str | os.PathLike, config_name: str) -> dict[str, Any]:
    """
    The splits of a table of a converted folder, each a `datasets.Dataset`. `datasets` turns Parquet into Arrow files in
    its cache the first time; from then on rows are read from these, memory-mapped.

    Raises:
        ValueError: when it is no such folder, or a file of it is broken; it names the folder.
    """
    import datasets  # slow to import, and only those who have such a folder need it
    from datasets.exceptions import DatasetGenerationError

    files: dict[str, list[str]] = {}
    present: dict[str, list[tuple[int, int]]] = {}
    for file in sorted(Path(path, config_name).glob("*.parquet")):
        name = FILE_OF_SPLIT.search(file.stem)
        if name:
            files.setdefault(name["split"], []).append(str(file))
            present.setdefault(name["split"], []).append((int(name["index"]), int(name["count"])))
    if not files:
        raise ValueError(f"{path}: is no converted folder, as it has no {config_name}/*-SPLIT-00000-of-00001*.parquet")
    for split, numbers in present.items():
        if numbers != [(index, len(numbers)) for index in range(len(numbers))]:
            raise ValueError(
                f"{path}: files of {config_name}, {split}, are missing or of several conversions: {numbers}"
            )
    try:
        # By its files, since the cache tells apart neither two folders of one name nor an old and a new one
        return datasets.load_dataset("parquet", data_files=files)
    except (ValueError, OSError, DatasetGenerationError) as error:
        raise ValueError(f"{path}: cannot be read ({error.__cause__ or error})") from error


def _read_converted(path: str | os.PathLike, split: str | None) -> Read:
    splits = open_converted(path, ANNOTATIONS_CONFIG)
    if split not in splits:
        raise ValueError(f"{path}: `split` must be one of {', '.join(splits)}, got {split!r}")
    table = splits[split].select_columns([name for name in splits[split].column_names if name != TEXT_COLUMN])
    for index, row in enumerate(table.to_list()):
        yield f"{path}, {split}, row {index}", {name: value for name, value in row.items() if value is not None}


READERS = {".jsonl": _read_jsonl, ".txt": _read_charades, ".json": _read_tacos}  # by suffix


def load_annotations(
    path: str | os.PathLike, split: str | None = None, skip_invalid: bool = False
) -> list[dict[str, Any]]:
    """
    Rows of an annotation file: JSONL in the QVHighlights shape, Charades-STA's `.txt` (with `Charades_v1_*.csv` beside
    it), TACoS' `.json` as released with 2D-TAN, or a folder that one of `dataset_scripts/` made.

    Charades-STA's rows get the numbers, and TACoS' the names, that the released features of their sentences have: lines
    that end before they start are not counted, and the test file goes on where the training file ends; `{vid}_{index}`.

    A row without `relevant_windows` is one to predict. A window that ends after its video is cut there, and one warning
    counts them. Fields that the library does not know are kept.

    Args:
        path: of the file or folder.
        split: of a folder, "train", "val" or "test".
        skip_invalid: drop what cannot be used, with one warning that says how many rows and which.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: for a file of another kind or without rows, and for a row that is not as described at the top of
            this module, by one line that names the file, the line and the field.
    """
    path = Path(path)
    if path.is_dir():
        found = _read_converted(path, split)
    elif split is not None:
        raise ValueError(f"{path}: only a converted folder has a `split`, got {split!r}")
    elif path.suffix in READERS:
        found = READERS[path.suffix](path)
    else:
        raise ValueError(f"{path}: annotations are read from {', '.join(READERS)} files and from converted folders")
    rows, seen, num_cut, dropped = [], {}, 0, []
    for where, row in found:
        try:
            if isinstance(row, ValueError):
                raise row
            checked = check_row(row)
            if str(row["qid"]) in seen:
                raise ValueError(f"`qid` {row['qid']!r} was used before ({seen[str(row['qid'])]})")
        except ValueError as error:
            if not skip_invalid:
                raise ValueError(f"{where}: {error}") from None
            dropped.append(f"{where}: {error}")
            continue
        seen[str(row["qid"])] = where
        num_cut += checked.get("relevant_windows") != row.get("relevant_windows")
        rows.append(checked)
    if dropped:
        warn_dropped(path, dropped, len(rows))
    if not rows:
        raise ValueError(f"{path}: there are no rows")
    if num_cut:
        warnings.warn(f"{path}: windows of {num_cut} rows end after their video, and were cut there", stacklevel=2)
    return rows


def warn_dropped(what: str | os.PathLike, dropped: Sequence[str], num_kept: int) -> None:
    """One warning that says how many rows were dropped, and each of them with its reason."""
    lines = "\n  ".join(dropped)
    warnings.warn(f"{what}: dropped {len(dropped)} of {len(dropped) + num_kept} rows:\n  {lines}", stacklevel=3)


def hold_out(rows: Sequence[dict[str, Any]], share: float, seed: int = 0) -> tuple[list, list]:
    """
    Splits rows by their videos, for a benchmark without a validation split: (kept, held out).

    Args:
        share: of the videos that are held out, at least one; in (0, 1).
        seed: of the choice, which depends on nothing else than the set of videos.

    Raises:
        ValueError: for a share that leaves one side without a video.
    """
    videos = sorted({row["vid"] for row in rows})
    count = max(1, round(share * len(videos)))
    if not 0 < share < 1 or count >= len(videos):
        raise ValueError(f"a share of {share} of {len(videos)} videos leaves one side empty")
    chosen = {videos[index] for index in np.random.default_rng(seed).permutation(len(videos))[:count]}
    return [row for row in rows if row["vid"] not in chosen], [row for row in rows if row["vid"] in chosen]


def check_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a row, checked; windows that end after the video are cut there. Raises `ValueError`."""
    row = dict(row)
    for field in ("qid", "query", "vid", "duration"):
        if row.get(field) is None:
            raise ValueError(f"`{field}` is missing")
    if not isinstance(row["qid"], (Integral, str)) or isinstance(row["qid"], bool) or row["qid"] == "":
        raise ValueError(f"`qid` must be a whole number or a string, got {row['qid']!r}")
    for field in ("query", "vid"):
        if not isinstance(row[field], str) or not row[field].strip():
            raise ValueError(f"`{field}` must be a string that is not blank, got {row[field]!r}")
    _check_duration(row["duration"])
    if row.get("relevant_windows") is not None:
        if isinstance(row["relevant_windows"], np.ndarray):
            row["relevant_windows"] = row["relevant_windows"].tolist()
        if not isinstance(row["relevant_windows"], (list, tuple)):
            raise ValueError(f"`relevant_windows` must be a list of windows, got {row['relevant_windows']!r}")
        row["relevant_windows"] = [_check_window(window, row["duration"]) for window in row["relevant_windows"]]
    else:
        row.pop("relevant_windows", None)
    if row.get("saliency_scores") is not None:
        check_saliency(row)
    return row


def _is_number(value: Any) -> bool:
    # NumPy's are numbers, too. The largest float is a bound that NaN is not within, nor a whole number that is no float
    is_real = type(value) in (int, float) or (isinstance(value, Real) and not isinstance(value, bool))
    return is_real and -sys.float_info.max <= value <= sys.float_info.max


def _check_duration(duration: Any) -> None:
    if not _is_number(duration) or duration <= 0:
        raise ValueError(f"`duration` must be a positive number of seconds, got {duration!r}")


def _check_window(window: Any, duration: float) -> list[float]:
    if not isinstance(window, (list, tuple)) or len(window) != 2 or not all(map(_is_number, window)):
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
        if type(clip) is not int or not 0 <= clip < num_clips:
            raise ValueError(f"`relevant_clip_ids` must be whole numbers from 0 to {num_clips - 1}, got {clip!r}")
    if len(set(clips)) < len(clips):
        raise ValueError("`relevant_clip_ids` names a clip twice")
    for score in scores:
        given = type(score) is list and len(score) == NUM_SALIENCY_ANNOTATORS and all(map(_is_number, score))
        if not given or min(score) < 0:
            raise ValueError(
                f"each of `saliency_scores` must be {NUM_SALIENCY_ANNOTATORS} numbers of 0 or more, got {score!r}"
            )
