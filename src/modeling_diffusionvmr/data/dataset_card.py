"""The card (README.md) of a converted folder."""

from collections.abc import Mapping

from huggingface_hub import DatasetCard, DatasetCardData

from .benchmarks import Benchmark
from .parquet import ANNOTATIONS_CONFIG, TEXT_COLUMN, VIDEOS_CONFIG

CARD = """\
---
{metadata}
---
# {title}

{about} [Homepage]({homepage}).

| split | queries | videos |
| --- | ---: | ---: |
{splits}

```python
load_dataset(folder, split="train")            # one row per query
load_dataset(folder, "videos", split="train")  # one row per video
```

Times are in seconds. {clips} Features ({dtype}) are as released, not normalized:

| table | column | features |
| --- | --- | --- |
{columns}

{left_out}

The license is that of the annotations. Please cite their authors:

```bibtex
{citation}
```
"""


def dataset_card(
    benchmark: Benchmark,
    files: Mapping[str, Mapping[str, list[str]]],
    counts: Mapping[str, Mapping[str, int]],
    sizes: Mapping[str, int],
    text_size: int,
    clip_seconds: float | None,
    dtype: str,
    skipped: Mapping[str, str],
) -> DatasetCard:
    """
    Return the card of a converted folder.

    Args:
        benchmark: the benchmark that was converted.
        files: paths in the folder, by table and split.
        counts: numbers of rows, by table and split.
        sizes: size of a clip's vector for each video backbone.
        text_size: size of a token's vector.
        clip_seconds: length of a clip. `None` if the clips divide the duration of the video equally.
        dtype: dtype of the features.
        skipped: the reason for each skipped row, by its place.
    """
    metadata = DatasetCardData(
        pretty_name=benchmark.title,
        language=["en"],
        license=benchmark.license,
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
        f"| {split} | {num_queries} | {counts[VIDEOS_CONFIG][split]} |"
        for split, num_queries in counts[ANNOTATIONS_CONFIG].items()
    ]
    columns = [f"| `{VIDEOS_CONFIG}` | `{name}` | clips x {size} |" for name, size in sizes.items()]
    columns.append(f"| `{ANNOTATIONS_CONFIG}` | `{TEXT_COLUMN}` | tokens x {text_size} |")
    left_out = ["Skipped because of unusable features:", "", *(f"- {what}" for what in skipped)]
    return DatasetCard(
        CARD.format(
            metadata=metadata.to_yaml(),
            title=benchmark.title,
            about=benchmark.about,
            homepage=benchmark.homepage,
            splits="\n".join(splits),
            clips="The clips of a video divide its duration equally."
            if clip_seconds is None
            else f"A clip is {clip_seconds:g} s long.",
            dtype=dtype,
            columns="\n".join(columns),
            left_out="\n".join(left_out) if skipped else "No query was skipped because of unusable features.",
            citation=benchmark.citation.strip(),
        )
    )
