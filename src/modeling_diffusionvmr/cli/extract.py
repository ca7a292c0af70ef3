"""`diffusionvmr extract`: compute the features of videos and sentences with a frozen backbone."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .options import DTYPES, CommandParser, add_device_argument, check_output, choose_device, loading, resolve_model

MAX_NAMES = 10  # number of file names to list in a message


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of `diffusionvmr extract`."""
    parser = CommandParser(
        "extract",
        description="Compute the features of the videos in a folder, and of the sentences in an annotation\n"
        "file, in the official .npz layout. Run the same command again to resume.",
    )
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="where to write NAME/VID.npz and NAME_text/qidQID.npz")
    parser.add_argument("--videos", metavar="DIR", help="folder of videos; a VID is a file name without its extension")
    parser.add_argument(
        "--annotations",
        metavar="FILE",
        help="encode the sentences of this file, and only those videos of --videos that it names",
    )
    parser.add_argument("--backbone", metavar="ID", required=True, help="complete CLIP checkpoint: folder or Hub id")
    parser.add_argument("--name", help="name of the output folders (default: the backbone's type, such as clip)")
    parser.add_argument("--clip_seconds", type=float, default=2.0, help="length of a clip (default: 2)")
    parser.add_argument("--batch_size", type=int, default=32, help="frames per batch (default: 32)")
    add_device_argument(parser)
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float16", help="type of the written features (default: float16)"
    )
    parser.add_argument(
        "--skip_invalid", action="store_true", help="skip unusable rows and missing or damaged videos, and list them"
    )
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    """Write the features, and list what was skipped."""
    from ..data.annotations import load_annotations
    from ..data.extraction import extract_sentences, extract_videos

    _check(arguments)
    rows = load_annotations(arguments.annotations, skip_invalid=arguments.skip_invalid) if arguments.annotations else []
    videos: dict[str, Path] = {}
    missing: dict[str, str] = {}
    if arguments.videos:
        videos, missing = _choose_videos(arguments, list(dict.fromkeys(row["vid"] for row in rows)))

    backbone = _open_backbone(arguments)
    # Shell completion may append a slash to a folder
    identifier = os.path.normpath(arguments.backbone) if os.path.isdir(arguments.backbone) else arguments.backbone
    folder = Path(arguments.output_dir) / (arguments.name or backbone.model.config.model_type)
    options = {"dtype": arguments.dtype, "skip_invalid": arguments.skip_invalid}
    if rows:
        sentences, text_folder = {row["qid"]: row["query"] for row in rows}, folder.with_name(f"{folder.name}_text")
        skipped = extract_sentences(backbone, identifier, sentences, text_folder, **options)
        _report("sentences", len(sentences), skipped, text_folder)
    if arguments.videos:
        damaged = extract_videos(
            backbone, identifier, videos, folder, arguments.clip_seconds, arguments.batch_size, **options
        )
        _report("videos", len(videos) + len(missing), {**missing, **damaged}, folder)


def _check(arguments: argparse.Namespace) -> None:
    from ..checks import check_positive

    if not (arguments.videos or arguments.annotations):
        raise ValueError("nothing to extract: pass --videos, --annotations, or both")
    check_positive(arguments.clip_seconds, "--clip_seconds")
    check_positive(arguments.batch_size, "--batch_size")
    check_output(arguments.output_dir, "OUTPUT_DIR")
    name = arguments.name
    if name is not None and (name in ("", ".", "..") or Path(name).name != name):
        raise ValueError(f"--name must be a folder name, got {name!r}")


def _choose_videos(arguments: argparse.Namespace, vids: Sequence[str]) -> tuple[dict[str, Path], dict[str, str]]:
    """Return the videos to encode, by vid, and a reason for each annotated video that has no file."""
    from ..data.extraction import find_videos

    videos, others = find_videos(arguments.videos)
    if others:
        print(f"{arguments.videos}: ignored (not video files): {_listed(others)}", file=sys.stderr)
    if not vids:
        return videos, {}
    missing = [vid for vid in vids if vid not in videos]
    if missing and not arguments.skip_invalid:
        raise ValueError(
            f"{arguments.videos}: {len(missing)} of {len(vids)} annotated videos are missing: {_listed(missing)}"
        )
    chosen = {vid: videos[vid] for vid in vids if vid in videos}
    return chosen, dict.fromkeys(missing, f"no such file in {arguments.videos}")


def _open_backbone(arguments: argparse.Namespace):
    """Load the backbone in float32, as the pipeline does, whatever type its weights are stored in."""
    import torch

    from ..backbones import load_backbone

    device = choose_device(arguments.device)
    backbone = resolve_model(arguments.backbone)
    with loading(backbone):
        return load_backbone(backbone, device, torch.float32)


def _listed(names: Sequence[str]) -> str:
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


def _report(what: str, number: int, skipped: Mapping[Any, str], folder: Path) -> None:
    print(f"{folder}: {number - len(skipped)} of {number} {what}")
    if skipped:
        print(f"skipped {len(skipped)} of {number} {what}:", file=sys.stderr)
        for identifier, reason in skipped.items():
            print(f"  {identifier}: {reason}", file=sys.stderr)
