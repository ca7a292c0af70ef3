"""
An official release -> a folder of Parquet that `datasets.load_dataset(folder)` opens as it is.

The folder holds two tables, each with its splits: `annotations` (the default; one row a query, the features of its
sentence beside it) and `videos` (one row a video, one column a backbone), so that features are stored once a video.
`load_annotations` and `open_features` read it back. The commands are in `dataset_scripts/`, one a benchmark.
"""

import argparse
import hashlib
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow.parquet
from datasets import Array2D, BuilderConfig, Dataset, DatasetInfo, GeneratorBasedBuilder, List, SplitGenerator, Value
from datasets import Features as Columns
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import DatasetCard, DatasetCardData, HfApi

from ..cli.options import run_safely
from ..processing_diffusionvmr import common_length
from .annotations import ANNOTATIONS_CONFIG, TEXT_COLUMN, load_annotations
from .features import (
    VIDEOS_CONFIG,
    common_clip_seconds,
    feature_size,
    name_of,
    open_features,
    open_text_features,
)

NEWLINE = "\n"  # which Python 3.10 and 3.11 allow in no f-string's braces
DTYPES = ("float16", "float32")
MAX_FILE_BYTES, MAX_GROUP_BYTES = 500 << 20, 64 << 20  # as the Hub likes them; groups are what must fit in memory
ANNOTATION_COLUMNS = {
    "query": Value("string"),
    "vid": Value("string"),
    "duration": Value("float64"),
    "relevant_windows": List(List(Value("float64"))),
    "relevant_clip_ids": List(Value("int32")),
    "saliency_scores": List(List(Value("float32"))),
}
VIDEO_COLUMNS = {"vid": Value("string"), "duration": Value("float64"), "clip_seconds": Value("float64")}


class MomentRetrievalBuilder(GeneratorBasedBuilder):
    """
    A benchmark's builder: subclasses describe the release by the attributes below, and may override `splits`.

    Args:
        config_name: `videos` or `annotations`, in this order where invalid rows are skipped.
        source: what the release was read as.
        kwargs: `GeneratorBasedBuilder`'s.
    """

    FILES: Mapping[str, Sequence[str]]
    """For each split the official names of its annotation file, of which the first one that is there is read."""
    CLIP_SECONDS: float | None
    """Of the released features; `None` where they cover the whole duration."""
    TITLE: str
    ABOUT: str
    HOMEPAGE: str
    LICENSE: str
    CITATION: str

    BUILDER_CONFIGS = [BuilderConfig(ANNOTATIONS_CONFIG), BuilderConfig(VIDEOS_CONFIG)]
    DEFAULT_CONFIG_NAME = ANNOTATIONS_CONFIG
    DEFAULT_WRITER_BATCH_SIZE = 64  # videos that are in memory at once

    def __init__(self, source: "Source", **kwargs):
        self.source = source
        super().__init__(dataset_name=self.slug(), **kwargs)

    @classmethod
    def slug(cls) -> str:
        """The name of the benchmark in file names."""
        return cls.TITLE.lower().replace("-", "_")

    @classmethod
    def splits(cls, folder: Path, skip_invalid: bool) -> dict[str, list[dict[str, Any]]]:
        """The rows of each split of the release whose annotation files lie in `folder`."""
        rows = {}
        for split, names in cls.FILES.items():
            paths = [folder / name for name in names if (folder / name).exists()]
            if not paths:
                raise FileNotFoundError(f"{folder}: there is no {' or '.join(names)}, the {split} split of {cls.TITLE}")
            rows[split] = load_annotations(paths[0], skip_invalid=skip_invalid)
        return rows

    def _info(self):
        columns = self.source.columns(self.config.name)
        return DatasetInfo(
            description=self.ABOUT,
            homepage=self.HOMEPAGE,
            license=self.LICENSE,
            citation=self.CITATION,
            features=columns,
        )

    def _split_generators(self, dl_manager):
        return [SplitGenerator(split, gen_kwargs={"split": split}) for split in self.source.rows]

    def _generate_examples(self, split):
        yield from enumerate(self.source.table(self.config.name, split))


class Source:
    """
    The rows of a release and the features of its videos and sentences, as the rows of the two tables.

    Args:
        rows: of each split.
        video_features: stores by the names of their columns.
        text_features: of the sentences.
        clip_seconds: length of a clip; `None` where the features cover the whole duration.
        dtype: of the written features, "float16" or "float32".
        skip_invalid: leave out the videos whose features cannot be used and their queries, and keep in `dropped`
            which, and why.
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
        for name in video_features:
            if name in (*VIDEO_COLUMNS, TEXT_COLUMN) or not name.isidentifier():
                raise ValueError(f"{name!r} cannot be the name of a column of features: give NAME=PATH")
        if clip_seconds is not None and not 0 < clip_seconds < math.inf:
            raise ValueError(f"`clip_seconds` must be a number of seconds above 0, got {clip_seconds}")
        self.rows = rows
        self.video_features = video_features
        self.text_features = text_features
        self.clip_seconds = clip_seconds
        self.dtype = dtype
        self.skip_invalid = skip_invalid
        self.dropped: dict[str, str] = {}
        self._dropped_videos: set[str] = set()
        self.sizes = {name: self._size(store, "vid") for name, store in video_features.items()}
        self.text_size = self._size(text_features, "qid")

    def _size(self, store: Mapping, key: str) -> int:
        identifiers = dict.fromkeys(row[key] for rows in self.rows.values() for row in rows)
        size = feature_size(store, (identifier for identifier in identifiers if identifier in store))
        if size is None:
            raise ValueError(f"{name_of(store)}: has usable features for no {key} of the annotations")
        return size

    def columns(self, config_name: str) -> Columns:
        """The types of a table's columns."""
        if config_name == VIDEOS_CONFIG:
            features = {name: Array2D((None, size), self.dtype) for name, size in self.sizes.items()}
            return Columns({**VIDEO_COLUMNS, **features})
        numbers = all(isinstance(row["qid"], int) for rows in self.rows.values() for row in rows)
        qid = Value("int64" if numbers else "string")
        return Columns({"qid": qid, **ANNOTATION_COLUMNS, TEXT_COLUMN: Array2D((None, self.text_size), self.dtype)})

    def table(self, config_name: str, split: str) -> Iterator[dict[str, Any]]:
        """The rows of a table. Raises `ValueError` for features that cannot be used, or leaves them out."""
        if config_name == VIDEOS_CONFIG:
            videos = {row["vid"]: row for row in self.rows[split]}
            make, items, what = self._video, videos.values(), "vid"
        else:
            make, items, what = self._annotation, self.rows[split], "qid"
        for row in items:
            try:
                made = make(row)
            except (KeyError, ValueError) as error:
                if not self.skip_invalid:
                    raise ValueError(f"{split}, {what} {row[what]}: {error.args[0]}") from None
                self.dropped[f"{split}, {what} {row[what]}"] = error.args[0]
                if what == "vid":
                    self._dropped_videos.add(row["vid"])
            else:
                yield made

    def _video(self, row: Mapping[str, Any]) -> dict[str, Any]:
        arrays = {
            name: self._converted(store[row["vid"]], self.sizes[name], name)
            for name, store in self.video_features.items()
        }
        common_length([len(array) for array in arrays.values()], "the video")
        return {"vid": row["vid"], "duration": row["duration"], "clip_seconds": self.clip_seconds, **arrays}

    def _annotation(self, row: Mapping[str, Any]) -> dict[str, Any]:
        if row["vid"] in self._dropped_videos:
            raise ValueError(f"video {row['vid']} was dropped")
        tokens = self._converted(self.text_features[row["qid"]], self.text_size, TEXT_COLUMN)
        return {"qid": row["qid"], **{name: row.get(name) for name in ANNOTATION_COLUMNS}, TEXT_COLUMN: tokens}

    def _converted(self, array: np.ndarray, size: int, name: str) -> np.ndarray:
        if array.shape[1] != size:
            raise ValueError(f"{name}: features must be (length, {size}), got {array.shape}")
        with np.errstate(over="ignore"):
            converted = array.astype(self.dtype)
        if not np.isfinite(converted).all():
            raise ValueError(f"{name}: has values beyond what {self.dtype} holds; float32 would hold them")
        return converted


def convert(
    builder: type[MomentRetrievalBuilder], source: Source, output: str | os.PathLike
) -> dict[str, dict[str, int]]:
    """
    Writes the folder, whole or not at all.

    Returns:
        For each table the rows of its splits.

    Raises:
        FileExistsError: when there is something at `output`.
        ValueError: for features that cannot be used, unless they are skipped.
    """
    output = Path(output)
    if output.exists():
        raise FileExistsError(f"{output}: is there already; remove it, or give another name")
    counts, files = {}, {}
    around = next(parent for parent in output.absolute().parents if parent.exists())
    with TemporaryDirectory(dir=around, prefix=f".{output.name}.") as work:
        folder = Path(work) / "folder"
        for config_name in (VIDEOS_CONFIG, ANNOTATIONS_CONFIG):  # the queries of a dropped video are dropped after it
            table = builder(source, config_name=config_name, cache_dir=f"{work}/cache")
            try:
                table.download_and_prepare()
            except DatasetGenerationError as error:
                raise error.__cause__ from None  # the line that says what is wrong
            counts[config_name], files[config_name] = {}, {}
            for split, info in table.info.splits.items():
                if not info.num_examples:
                    raise ValueError(f"the {split} split has no {config_name} whose features can be used")
                paths = _write_parquet(table.as_dataset(split), folder / config_name, f"{builder.slug()}-{split}")
                files[config_name][split] = [f"{config_name}/{path.name}" for path in paths]
                counts[config_name][split] = info.num_examples
        DatasetCard(_card(builder, source, counts, files)).save(folder / "README.md")
        output.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(output)
    return counts


def _write_parquet(dataset: Dataset, folder: Path, name: str) -> list[Path]:
    # Not `Dataset.to_parquet`: it looks for repeated values and repeated chunks, which features do not have, and took
    # 4 times as long here
    folder.mkdir(parents=True, exist_ok=True)
    table = dataset.data.table
    row_bytes = table.nbytes / len(table)
    in_file, in_group = (max(1, int(limit / row_bytes)) for limit in (MAX_FILE_BYTES, MAX_GROUP_BYTES))
    num_files = math.ceil(len(table) / in_file)
    paths = []
    for index in range(num_files):
        path = folder / f"{name}-{index:05d}-of-{num_files:05d}"
        part = table.slice(index * in_file, in_file)
        pyarrow.parquet.write_table(part, path, row_group_size=in_group, compression="zstd", use_dictionary=False)
        # `load_dataset` tells two local folders of one name apart by the names of their files alone
        digest = hashlib.blake2b(digest_size=4)
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        paths.append(path.rename(f"{path}-{digest.hexdigest()}.parquet"))
    return paths


def _card(
    builder: type[MomentRetrievalBuilder],
    source: Source,
    counts: Mapping[str, Mapping[str, int]],
    files: Mapping[str, Mapping[str, list[str]]],
) -> str:
    data = DatasetCardData(
        pretty_name=builder.TITLE,
        language=["en"],
        license=builder.LICENSE,
        tags=["video-moment-retrieval", "temporal-grounding", "video"],
        configs=[
            {
                "config_name": name,
                **({"default": True} if name == ANNOTATIONS_CONFIG else {}),
                "data_files": [{"split": split, "path": paths} for split, paths in files[name].items()],
            }
            for name in (ANNOTATIONS_CONFIG, VIDEOS_CONFIG)
        ],
    )
    splits = [
        f"| {split} | {counts[ANNOTATIONS_CONFIG][split]} | {counts[VIDEOS_CONFIG][split]} |" for split in source.rows
    ]
    columns = [f"| `{VIDEOS_CONFIG}` | `{name}` | clips x {size} |" for name, size in source.sizes.items()]
    columns.append(f"| `{ANNOTATIONS_CONFIG}` | `{TEXT_COLUMN}` | tokens x {source.text_size} |")
    clip = "The clips share the duration" if source.clip_seconds is None else f"A clip has {source.clip_seconds:g} s"
    dropped = "".join(f"- {what}\n" for what in source.dropped)
    return f"""---
{data.to_yaml()}
---
# {builder.TITLE}

{builder.ABOUT} [Homepage]({builder.HOMEPAGE}).

| split | queries | videos |
| --- | ---: | ---: |
{NEWLINE.join(splits)}

```python
load_dataset(folder, split="train")            # one row a query
load_dataset(folder, "{VIDEOS_CONFIG}", split="train")  # one row a video
```

Times are seconds. {clip}. Features ({source.dtype}) are as released, not normalised:

| table | column | features |
| --- | --- | --- |
{NEWLINE.join(columns)}

{"Left out, since features could not be used:" if dropped else "No query was left out for its features."}

{dropped}
The licence is that of the annotations, by their authors; cite them:

```bibtex
{builder.CITATION.strip()}
```
"""


def main(builder: type[MomentRetrievalBuilder]) -> None:
    """The command of a benchmark's script."""
    parser = argparse.ArgumentParser(
        description=f"{builder.TITLE}, as released -> a folder that datasets.load_dataset opens. {builder.ABOUT}"
    )
    parser.add_argument("output", help="folder to write; nothing may be there")
    files = ", ".join(" or ".join(names) for names in builder.FILES.values())
    parser.add_argument("--annotations", required=True, type=Path, metavar="DIR", help=f"folder of {files}")
    parser.add_argument(
        "--video_features",
        required=True,
        nargs="+",
        metavar="[NAME=]PATH",
        help="one a backbone, in the order of concatenation: folder of .npz or .npy, or HDF5 file; NAME is its column",
    )
    parser.add_argument("--text_features", required=True, help="folder of qid*.npz, HDF5 file, or GloVe's .txt")
    parser.add_argument(
        "--clip_seconds",
        type=float,
        help="length of a clip (default: what the features say, "
        + ("or else duration / clips)" if builder.CLIP_SECONDS is None else f"or else {builder.CLIP_SECONDS:g})"),
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of the features (default: float16)")
    parser.add_argument("--skip_invalid", action="store_true", help="leave out what cannot be used, and say what")
    parser.add_argument("--push_to_hub", metavar="REPO_ID", help="send the folder to the Hub")
    parser.add_argument("--private", action="store_true", help="to a private repository")
    run_safely(partial(_run, builder), parser.parse_args())


def _run(builder: type[MomentRetrievalBuilder], arguments: argparse.Namespace) -> None:
    rows = builder.splits(arguments.annotations, arguments.skip_invalid)
    stores = {}
    for given in arguments.video_features:
        name, _, path = given.partition("=")
        if not path or not name.isidentifier():
            name, path = Path(given).stem, given
        if name in stores:
            raise ValueError(f"two backbones are called {name}: give NAME=PATH")
        stores[name] = open_features(path)
    clip_seconds = arguments.clip_seconds
    if clip_seconds is None:
        clip_seconds = common_clip_seconds(list(stores.values())) or builder.CLIP_SECONDS
    every_row = [row for split in rows.values() for row in split]
    source = Source(
        rows,
        stores,
        open_text_features(arguments.text_features, every_row),
        clip_seconds,
        arguments.dtype,
        arguments.skip_invalid,
    )
    counts = convert(builder, source, arguments.output)
    if source.dropped:
        lines = "\n  ".join(f"{what}: {why}" for what, why in source.dropped.items())
        warnings.warn(f"{len(source.dropped)} rows were left out for their features:\n  {lines}", stacklevel=2)
    for split in rows:
        print(f"{split}: {counts[ANNOTATIONS_CONFIG][split]} queries, {counts[VIDEOS_CONFIG][split]} videos")
    print(f"wrote {arguments.output}")
    if arguments.push_to_hub:
        api = HfApi()
        repository = api.create_repo(
            arguments.push_to_hub, repo_type="dataset", private=arguments.private, exist_ok=True
        )
        api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=arguments.output,
            repo_type="dataset",
            delete_patterns="*.parquet",  # of an earlier conversion, whose names differ
        )
        print(f"sent to {repository}")
