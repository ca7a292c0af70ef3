"""
The converted folder: Parquet files that `datasets.load_dataset(folder)` opens, written and read here.

The folder contains two tables, each with its splits: `annotations` (the default config: one row per query, with the
features of its sentence) and `videos` (one row per video, one column per backbone), so that the features of a video are
stored once. Its files are named `FOLDER/TABLE/NAME-SPLIT-00000-of-00001-DIGEST.parquet`.

`datasets` and `pyarrow` are slow to import, so they are imported only where such a folder is read or written.
"""

import hashlib
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .feature_store import FeatureStore

if TYPE_CHECKING:
    import datasets

ANNOTATIONS_CONFIG, VIDEOS_CONFIG = "annotations", "videos"  # names of the tables
TEXT_COLUMN = "text_features"
FILE_OF_SPLIT = re.compile(r"(?:^|-)(?P<split>\w+)-(?P<index>\d{5})-of-(?P<count>\d{5})")
MAX_FILE_BYTES = 500 << 20  # as the Hub recommends
MAX_GROUP_BYTES = 64 << 20  # size of a row group, the part of a file that must fit in memory


# Columns


def annotation_columns(qid_type: str, text_size: int, dtype: str) -> "datasets.Features":
    """
    Return the columns of the table `annotations`.

    Args:
        qid_type: "int64" or "string".
        text_size: size of a token's vector.
        dtype: dtype of the features, "float16" or "float32".
    """
    from datasets import Array2D, Features, List, Value

    return Features(
        {
            "qid": Value(qid_type),
            "query": Value("string"),
            "vid": Value("string"),
            "duration": Value("float64"),
            "relevant_windows": List(List(Value("float64"))),
            "relevant_clip_ids": List(Value("int32")),
            "saliency_scores": List(List(Value("float32"))),
            TEXT_COLUMN: Array2D((None, text_size), dtype),
        }
    )


def video_columns(sizes: Mapping[str, int], dtype: str) -> "datasets.Features":
    """
    Return the columns of the table `videos`.

    Args:
        sizes: size of a clip's vector for each backbone.
        dtype: dtype of the features, "float16" or "float32".

    Raises:
        ValueError: if the name of a backbone is not a valid column name.
    """
    from datasets import Array2D, Features, Value

    columns = {"vid": Value("string"), "duration": Value("float64"), "clip_seconds": Value("float64")}
    for name, size in sizes.items():
        if name in columns or name == TEXT_COLUMN or not name.isidentifier():
            raise ValueError(f"{name!r} is not a valid column name for features; pass NAME=PATH to choose another")
        columns[name] = Array2D((None, size), dtype)
    return Features(columns)


# Writing


def write_split(split: "datasets.Dataset", folder: Path, name: str) -> list[Path]:
    """
    Write one split of a table and return the paths of its files.

    Args:
        split: the rows, at least one.
        folder: folder of the table, created if missing.
        name: beginning of the file names, `NAME-SPLIT`.
    """
    # `Dataset.to_parquet` takes 4 times as long: it looks for repeated values and chunks, which features do not have
    import pyarrow.parquet

    folder.mkdir(parents=True, exist_ok=True)
    table = split.data.table
    row_bytes = table.nbytes / len(table)
    rows_per_file, rows_per_group = (max(1, int(limit / row_bytes)) for limit in (MAX_FILE_BYTES, MAX_GROUP_BYTES))
    num_files = math.ceil(len(table) / rows_per_file)
    paths = []
    for index in range(num_files):
        path = folder / f"{name}-{index:05d}-of-{num_files:05d}"
        part = table.slice(index * rows_per_file, rows_per_file)
        pyarrow.parquet.write_table(part, path, row_group_size=rows_per_group, compression="zstd", use_dictionary=False)
        # With the digest, file names depend on the content: the cache of `load_dataset` distinguishes two local folders
        # of the same name only by the names of their files
        paths.append(path.rename(f"{path}-{_digest(path)}.parquet"))
    return paths


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=4)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# Reading


def is_converted(path: str | os.PathLike) -> bool:
    """Return whether a path is a converted folder, rather than a folder of feature files."""
    return (Path(path) / VIDEOS_CONFIG).is_dir()


def open_table(path: str | os.PathLike, config_name: str) -> "datasets.DatasetDict":
    """
    Open the splits of a table. The first time, `datasets` converts Parquet to Arrow files in its cache. Rows are read
    from these, memory-mapped.

    Raises:
        ValueError: if it is not a converted folder, or one of its files is missing or damaged. The message names the
            folder.
    """
    import datasets
    from datasets.exceptions import DatasetGenerationError

    # Open the files rather than the folder, since the cache cannot distinguish two folders of the same name, or an old
    # folder from a new one
    files = _files_of_splits(path, config_name)
    try:
        return datasets.load_dataset("parquet", data_files=files)
    except (ValueError, OSError, DatasetGenerationError) as error:
        raise ValueError(f"{path}: cannot be read ({error.__cause__ or error})") from error


def _files_of_splits(path: str | os.PathLike, config_name: str) -> dict[str, list[str]]:
    files: dict[str, list[str]] = {}
    numbers: dict[str, list[tuple[int, int]]] = {}  # (index, count) in the names of a split's files
    for file in sorted(Path(path, config_name).glob("*.parquet")):
        name = FILE_OF_SPLIT.search(file.stem)
        if name:
            files.setdefault(name["split"], []).append(str(file))
            numbers.setdefault(name["split"], []).append((int(name["index"]), int(name["count"])))
    if not files:
        raise ValueError(f"{path}: not a converted folder: no {config_name}/*-SPLIT-00000-of-00001*.parquet")
    for split, found in numbers.items():
        if found != [(index, len(found)) for index in range(len(found))]:
            raise ValueError(
                f"{path}: files of {config_name}, {split}, are missing or from several conversions: {found}"
            )
    return files


def read_annotations(path: str | os.PathLike, split: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """
    Yield each annotation of a split with its place: its fields that are not null, without features.

    Raises:
        ValueError: like `open_table`, and if there is no such split.
    """
    splits = open_table(path, ANNOTATIONS_CONFIG)
    if split not in splits:
        raise ValueError(f"{path}: `split` must be one of {', '.join(splits)}, got {split!r}")
    table = splits[split].select_columns([name for name in splits[split].column_names if name != TEXT_COLUMN])
    for index, row in enumerate(table.to_list()):
        yield f"{path}, {split}, row {index}", {name: value for name, value in row.items() if value is not None}


def video_backbones(path: str | os.PathLike) -> list[str]:
    """Return the names of the video backbones of a converted folder. Raise the same errors as `open_table`."""
    import datasets

    columns = next(iter(open_table(path, VIDEOS_CONFIG).values())).features
    return [name for name, kind in columns.items() if isinstance(kind, datasets.Array2D)]


class ParquetFeatures(FeatureStore):
    """
    A column of features of a converted folder, memory-mapped.

    Args:
        path: the folder.
        column: a video backbone or `text_features`. Optional if there is only one video backbone.
    """

    def __init__(self, path: Path, column: str | None = None):
        import datasets

        backbones = video_backbones(path)
        if column is None and len(backbones) == 1:
            column = backbones[0]
        if column not in (*backbones, TEXT_COLUMN):
            raise ValueError(f"{path}: `column` must be one of {', '.join((*backbones, TEXT_COLUMN))}, got {column!r}")
        config_name, key = (ANNOTATIONS_CONFIG, "qid") if column == TEXT_COLUMN else (VIDEOS_CONFIG, "vid")
        self.column = column
        self._chunks: list[tuple[np.ndarray, np.ndarray, int]] = []  # values, index of each row's first vector, size
        places: dict[str, tuple[int, int]] = {}  # (chunk, row in the chunk)
        seconds = None
        for name, split in open_table(path, config_name).items():
            if key not in split.column_names or not isinstance(split.features.get(column), datasets.Array2D):
                raise ValueError(f"{path}: {config_name}, {name}, needs a column {key!r} and an Array2D {column!r}")
            identifiers = iter(split.data.column(key).to_pylist())
            if "clip_seconds" in split.column_names and len(split):
                seconds = split.data.column("clip_seconds")[0].as_py()
            for chunk in split.data.column(column).chunks:
                arrays = chunk.storage  # a list (rows) of lists (length) of lists (size)
                vectors = arrays.values
                starts = vectors.offsets.to_numpy()[arrays.offsets.to_numpy()]
                values = vectors.values.to_numpy(zero_copy_only=True)
                places.update((str(next(identifiers)), (len(self._chunks), row)) for row in range(len(arrays)))
                self._chunks.append((values, starts, split.features[column].shape[1]))
        super().__init__(path, places, seconds)

    def __reduce__(self):
        return type(self), (self.path, self.column)  # another process maps the files itself

    def _read(self, place):
        chunk, row = place
        values, starts, size = self._chunks[chunk]
        return values[starts[row] : starts[row + 1]].reshape(-1, size)

    def _check(self, array, where):
        # Values were checked when the folder was written. The processor finds later damage, in the same pass in which
        # it reads them from disk and converts them to float32.
        return array
