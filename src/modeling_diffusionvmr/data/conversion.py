"""Convert an official release to a folder that `datasets.load_dataset` opens (see `parquet.py` for its layout)."""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from datasets import Features as Columns
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import HfApi
from pyarrow import ArrowInvalid

from ..checks import INT64, check_positive
from ..processing_diffusionvmr import common_length
from .annotations import SKIP_HINT, hold_out, load_annotations
from .benchmarks import Benchmark
from .dataset_card import dataset_card
from .features import feature_size
from .files import move_into_place, staging
from .parquet import ANNOTATIONS_CONFIG, TEXT_COLUMN, VIDEOS_CONFIG, annotation_columns, video_columns, write_split

WRITER_BATCH = 64  # videos in memory at once


def load_splits(
    benchmark: Benchmark, folder: str | os.PathLike, skip_invalid: bool = False
) -> dict[str, list[dict[str, Any]]]:
    """
    Load the annotations of each split of a release.

    Args:
        benchmark: the benchmark.
        folder: folder of its annotation files.
        skip_invalid: see `load_annotations`.

    Raises:
        FileNotFoundError: if the file of a split is missing.
        ValueError: like `load_annotations`.
    """
    rows = {}
    for split, names in benchmark.files.items():
        paths = [path for path in (Path(folder, name) for name in names) if path.exists()]
        if not paths:
            raise FileNotFoundError(f"{folder}: no {' or '.join(names)}, the {split} split of {benchmark.title}")
        rows[split] = load_annotations(paths[0], skip_invalid=skip_invalid)
    if benchmark.hold_out is None:
        return rows
    train, val = hold_out(rows.pop("train"), benchmark.hold_out)
    return {"train": train, "val": val, **rows}


class Source:
    """
    The annotations and features of a release, as the rows of the two tables.

    Args:
        rows: annotations of each split.
        video_features: stores by backbone. The names become columns.
        text_features: store of the sentences.
        clip_seconds: length of a clip. `None` if the clips divide the duration of the video equally.
        dtype: dtype of the written features, "float16" or "float32".
        skip_invalid: skip videos with unusable features, and their queries.

    Attributes:
        columns: the columns of each table.
        skipped: the reason for each skipped row, by its place. Reading a table adds its rows.

    Raises:
        ValueError: if a name is not a valid column name, `clip_seconds` is invalid, or a store has no usable features.
    """

    def __init__(
        self,
        rows: Mapping[str, Sequence[Mapping[str, Any]]],
        video_features: Mapping[str, Mapping],
        text_features: Mapping,
        clip_seconds: float | None,
        dtype: str = "float16",
        skip_invalid: bool = False,
    ):
        video_columns(dict.fromkeys(video_features, 1), dtype)  # rejects invalid names before any features are read
        if clip_seconds is not None:
            check_positive(clip_seconds, "`clip_seconds`")
        self.rows = rows
        self.video_features = video_features
        self.text_features = text_features
        self.clip_seconds = clip_seconds
        self.dtype = dtype
        self.skip_invalid = skip_invalid
        self.skipped: dict[str, str] = {}
        self._skipped_videos: set[str] = set()
        all_rows = [row for split_rows in rows.values() for row in split_rows]
        self.sizes = {name: feature_size(store, all_rows, "vid") for name, store in video_features.items()}
        self.text_size = feature_size(text_features, all_rows, "qid")
        are_numbers = all(isinstance(row["qid"], int) and row["qid"] in INT64 for row in all_rows)
        self.columns: dict[str, Columns] = {
            VIDEOS_CONFIG: video_columns(self.sizes, dtype),
            ANNOTATIONS_CONFIG: annotation_columns("int64" if are_numbers else "string", self.text_size, dtype),
        }

    def table(self, config_name: str, split: str) -> Iterator[dict[str, Any]]:
        """
        Yield the rows of a table. The table `videos` must be read first: the queries of a skipped video are skipped.

        Raises:
            ValueError: if features are unusable and not skipped, or if no row is usable.
        """
        if config_name == VIDEOS_CONFIG:
            key, make = "vid", self._video
            rows = list({row["vid"]: row for row in self.rows[split]}.values())
        else:
            key, make = "qid", self._annotation
            rows = list(self.rows[split])
        num_usable = 0
        for row in rows:
            where = f"{split}, {key} {row[key]}"
            try:
                made = make(row)
            except (KeyError, ValueError) as error:
                if not self.skip_invalid:
                    raise ValueError(f"{where}: {error.args[0]} {SKIP_HINT}") from None
                self.skipped[where] = error.args[0]
                if key == "vid":
                    self._skipped_videos.add(row["vid"])
            else:
                num_usable += 1
                yield made
        if not num_usable:
            raise ValueError(f"the {split} split has no {config_name} with usable features")

    def _video(self, row: Mapping[str, Any]) -> dict[str, Any]:
        arrays = {
            name: self._converted(store[row["vid"]], self.sizes[name], name)
            for name, store in self.video_features.items()
        }
        common_length([len(array) for array in arrays.values()], "the video")
        return {"vid": row["vid"], "duration": row["duration"], "clip_seconds": self.clip_seconds, **arrays}

    def _annotation(self, row: Mapping[str, Any]) -> dict[str, Any]:
        if row["vid"] in self._skipped_videos:
            raise ValueError(f"video {row['vid']} was skipped")
        tokens = self._converted(self.text_features[row["qid"]], self.text_size, TEXT_COLUMN)
        fields = {name: row.get(name) for name in self.columns[ANNOTATIONS_CONFIG]}
        return {**fields, TEXT_COLUMN: tokens}

    def _converted(self, array: np.ndarray, size: int, name: str) -> np.ndarray:
        if array.shape[1] != size:
            raise ValueError(f"{name}: features must be (length, {size}), got {array.shape}")
        with np.errstate(over="ignore"):
            converted = array.astype(self.dtype)
        if not np.isfinite(converted).all():
            raise ValueError(f"{name}: values outside the range of {self.dtype}; use float32 instead")
        return converted


def check_new(output: str | os.PathLike) -> None:
    """Raise `FileExistsError` if the folder to write exists."""
    if os.path.lexists(output):
        raise FileExistsError(f"{output}: already exists; remove it or choose another name")


def convert(benchmark: Benchmark, source: Source, output: str | os.PathLike) -> dict[str, dict[str, int]]:
    """
    Write the converted folder, atomically.

    Returns:
        The number of rows, by table and split.

    Raises:
        FileExistsError: if `output` exists.
        BlockingIOError: if another process is writing `output`.
        ValueError: if features are unusable and not skipped, or if a split has no usable rows.
    """
    output = Path(output)
    check_new(output)
    counts: dict[str, dict[str, int]] = {VIDEOS_CONFIG: {}, ANNOTATIONS_CONFIG: {}}
    files: dict[str, dict[str, list[str]]] = {VIDEOS_CONFIG: {}, ANNOTATIONS_CONFIG: {}}
    existing_parent = next(parent for parent in output.absolute().parents if parent.exists())
    with staging(existing_parent / output.name, f"{output}: another process is writing it") as work:
        folder = work / "folder"
        for config_name in counts:
            for split in source.rows:
                table = _generate(source, config_name, split, f"{work}/cache")
                paths = write_split(table, folder / config_name, f"{benchmark.name}-{split}")
                files[config_name][split] = [f"{config_name}/{path.name}" for path in paths]
                counts[config_name][split] = len(table)
        card = dataset_card(
            benchmark,
            files,
            counts,
            source.sizes,
            source.text_size,
            source.clip_seconds,
            source.dtype,
            source.skipped,
        )
        card.save(folder / "README.md")
        output.parent.mkdir(parents=True, exist_ok=True)
        move_into_place(folder, output)
    if source.skipped:
        lines = "\n  ".join(f"{what}: {why}" for what, why in source.skipped.items())
        warnings.warn(f"skipped {len(source.skipped)} rows with unusable features:\n  {lines}", stacklevel=2)
    return counts


def _generate(source: Source, config_name: str, split: str, cache: str) -> Dataset:
    """Return a split of a table, memory-mapped from Arrow files in `cache`."""
    try:
        return Dataset.from_generator(
            partial(source.table, config_name, split),
            features=source.columns[config_name],
            cache_dir=cache,
            split=split,
            fingerprint=f"{config_name}-{split}",  # otherwise `datasets` would hash all annotations
            writer_batch_size=WRITER_BATCH,
        )
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        if isinstance(cause, (OverflowError, ArrowInvalid)):  # a number out of the range of its column
            raise ValueError(f"the {split} split of {config_name} cannot be written ({cause})") from None
        raise cause from None  # its message is the one that names the row


def push_folder(folder: str | os.PathLike, repo_id: str, private: bool = False) -> str:
    """
    Upload a converted folder to the Hub and return its URL.

    Args:
        folder: a converted folder.
        repo_id: `USER/NAME` of the dataset, created if missing.
        private: create a private dataset.
    """
    api = HfApi()
    url = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    api.upload_folder(
        repo_id=url.repo_id,
        folder_path=os.fspath(folder),
        repo_type="dataset",
        delete_patterns="*.parquet",  # files of an earlier conversion have other names
    )
    return str(url)
