"""`diffusionvmr convert`: convert an official release to a folder that `datasets.load_dataset` opens."""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..data.benchmarks import BENCHMARKS
from .options import DTYPES, CommandParser, add_skip_invalid, check_output


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of `diffusionvmr convert`."""
    parser = CommandParser(
        "convert",
        description="Convert an official release to a folder that datasets.load_dataset opens.",
        epilog="annotation files:\n" + "\n".join(_describe(name) for name in BENCHMARKS),
    )
    parser.add_argument("benchmark", choices=BENCHMARKS, help="the benchmark to convert")
    parser.add_argument("output", help="folder to write; must not exist")
    parser.add_argument(
        "--annotations", required=True, type=Path, metavar="DIR", help="folder of the annotation files listed below"
    )
    parser.add_argument(
        "--video_features",
        required=True,
        nargs="+",
        metavar="[NAME=]PATH",
        help="one per backbone, in the order of concatenation: folder of .npz or .npy, or HDF5 file; NAME becomes the "
        "name of its column (default: the name of the file or folder)",
    )
    parser.add_argument(
        "--text_features", required=True, metavar="PATH", help="folder of qid*.npz, HDF5 file, or GloVe's .txt"
    )
    parser.add_argument(
        "--clip_seconds",
        type=float,
        help="length of a clip (default: as the features state; else 2 for qvhighlights, duration / clips for others)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float16", help="type of the written features (default: %(default)s)"
    )
    add_skip_invalid(parser)
    parser.add_argument("--push_to_hub", metavar="USER/NAME", help="also upload the folder to the Hub")
    parser.add_argument("--private", action="store_true", help="upload to a private dataset")
    return parser.parse_args(argv)


def _describe(name: str) -> str:
    benchmark = BENCHMARKS[name]
    files = ", ".join(" or ".join(names) for names in benchmark.files.values())
    return f"  {name} ({benchmark.title}): {files}"


def run(arguments: argparse.Namespace) -> None:
    """Convert the release, and upload the result with `--push_to_hub`."""
    from ..checks import check_positive
    from ..data.conversion import Source, check_new, convert, load_splits, push_folder
    from ..data.features import common_clip_seconds, open_text_features
    from ..data.parquet import ANNOTATIONS_CONFIG, VIDEOS_CONFIG

    check_new(arguments.output)
    check_output(arguments.output, "OUTPUT")
    if arguments.clip_seconds is not None:
        check_positive(arguments.clip_seconds, "--clip_seconds")
    benchmark = BENCHMARKS[arguments.benchmark]
    rows = load_splits(benchmark, arguments.annotations, arguments.skip_invalid)
    video_features = _open_backbones(arguments.video_features)
    clip_seconds = arguments.clip_seconds
    if clip_seconds is None:
        clip_seconds = common_clip_seconds(list(video_features.values())) or benchmark.clip_seconds
    source = Source(
        rows,
        video_features,
        open_text_features(arguments.text_features, [row for split_rows in rows.values() for row in split_rows]),
        clip_seconds,
        arguments.dtype,
        arguments.skip_invalid,
    )
    counts = convert(benchmark, source, arguments.output)
    for split in rows:
        print(f"{split}: {counts[ANNOTATIONS_CONFIG][split]} queries, {counts[VIDEOS_CONFIG][split]} videos")
    print(f"wrote {arguments.output}")
    if arguments.push_to_hub:
        print(f"uploaded to {push_folder(arguments.output, arguments.push_to_hub, arguments.private)}")


def _open_backbones(values: Iterable[str]) -> dict[str, Mapping]:
    """Open the stores that `[NAME=]PATH` values name, and return them by column name."""
    from ..data.features import open_features

    stores: dict[str, Mapping] = {}
    for value in values:
        name, _, path = value.partition("=")
        if not path or not name.isidentifier():  # a path may contain "=" as well
            name, path = Path(value).stem, value
        if name in stores:
            raise ValueError(f"two backbones are named {name}; pass NAME=PATH to choose another name")
        stores[name] = open_features(path)
    return stores
