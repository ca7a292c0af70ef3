"""
Features of the videos of a folder, and of the sentences of an annotation file, in the official npz layout:
`python scripts/extract_features.py OUTPUT_DIR --videos DIR --annotations FILE --backbone openai/clip-vit-base-patch32`.
"""

import argparse
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from modeling_diffusionvmr import load_annotations
from modeling_diffusionvmr.backbones import ClipBackbone, load_backbone
from modeling_diffusionvmr.cli.options import check_device, run_safely
from modeling_diffusionvmr.data.extraction import extract_sentences, extract_videos, find_videos

MOST_NAMES = 10  # on one line


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output_dir", help="gets NAME/VID.npz and NAME_text/qidQID.npz; what is there already is kept")
    parser.add_argument("--videos", metavar="DIR", help="a folder of videos; a VID is a file's name without extension")
    parser.add_argument(
        "--annotations", metavar="FILE", help="its sentences are encoded, and of --videos only those that it names"
    )
    parser.add_argument(
        "--backbone", metavar="ID", required=True, help="a complete CLIP checkpoint: a folder, or a Hub id"
    )
    parser.add_argument("--name", help="of the folders (default: the backbone's type, such as clip)")
    parser.add_argument("--clip_seconds", type=float, default=2.0, help="length of a clip (default: 2)")
    parser.add_argument("--batch_size", type=int, default=32, help="frames at once (default: 32)")
    parser.add_argument("--device", help="default: cuda where there is one, otherwise cpu")
    parser.add_argument(
        "--dtype", choices=("float16", "float32"), default="float16", help="what is written (default: float16)"
    )
    parser.add_argument(
        "--skip_invalid", action="store_true", help="go on without what is missing or broken, and say at the end what"
    )
    return parser.parse_args(arguments)


def open_backbone(arguments: argparse.Namespace) -> ClipBackbone:
    """In float32, whatever it is stored in: the type of the pipeline's backbones."""
    try:
        backbone = load_backbone(arguments.backbone, dtype=torch.float32)
    except SafetensorError as error:
        raise ValueError(f"{arguments.backbone}: its weights are broken or cut off ({error})") from error
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    return backbone.to(device)


def choose_videos(arguments: argparse.Namespace, vids: Sequence[str]) -> tuple[dict[str, Path], dict[str, str]]:
    """The videos to extract, those of the annotations where there are any, and why some of these cannot be."""
    videos, others = find_videos(arguments.videos)
    if others:
        print(f"{arguments.videos}: taken for no videos, by their names: {listed(others)}", file=sys.stderr)
    if not vids:
        return videos, {}
    missing = [vid for vid in vids if vid not in videos]
    if missing and not arguments.skip_invalid:
        raise ValueError(
            f"{arguments.videos}: {len(missing)} of the {len(vids)} annotated videos are not there: {listed(missing)}"
        )
    chosen = {vid: videos[vid] for vid in vids if vid in videos}
    return chosen, dict.fromkeys(missing, f"there is no such file in {arguments.videos}")


def listed(names: Sequence[str]) -> str:
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def report(what: str, number: int, skipped: Mapping[Any, str], folder: Path) -> None:
    print(f"{folder}: {number - len(skipped)} of {number} {what}")
    if skipped:
        print(f"skipped {len(skipped)} of {number} {what}:", file=sys.stderr)
        for identifier, reason in skipped.items():
            print(f"  {identifier}: {reason}", file=sys.stderr)


def main(arguments: argparse.Namespace) -> None:
    check(arguments)
    rows = load_annotations(arguments.annotations, skip_invalid=arguments.skip_invalid) if arguments.annotations else []
    videos, missing = {}, {}
    if arguments.videos:
        videos, missing = choose_videos(arguments, list(dict.fromkeys(row["vid"] for row in rows)))

    backbone = open_backbone(arguments)
    # A folder is the same one with and without the slash that a shell appends to it
    identifier = os.path.normpath(arguments.backbone) if os.path.isdir(arguments.backbone) else arguments.backbone
    folder = Path(arguments.output_dir) / (arguments.name or backbone.model.config.model_type)
    options = {"dtype": arguments.dtype, "skip_invalid": arguments.skip_invalid}
    if rows:
        sentences, text_folder = {row["qid"]: row["query"] for row in rows}, folder.with_name(f"{folder.name}_text")
        skipped = extract_sentences(backbone, identifier, sentences, text_folder, **options)
        report("sentences", len(sentences), skipped, text_folder)
    if arguments.videos:
        broken = extract_videos(
            backbone, identifier, videos, folder, arguments.clip_seconds, arguments.batch_size, **options
        )
        report("videos", len(videos) + len(missing), {**missing, **broken}, folder)


def check(arguments: argparse.Namespace) -> None:
    if not (arguments.videos or arguments.annotations):
        raise ValueError("there is nothing to extract: give --videos, --annotations, or both")
    if not (math.isfinite(arguments.clip_seconds) and arguments.clip_seconds > 0):
        raise ValueError(f"--clip_seconds must be a positive number, got {arguments.clip_seconds}")
    if arguments.batch_size < 1:
        raise ValueError(f"--batch_size must be at least 1, got {arguments.batch_size}")


if __name__ == "__main__":
    run_safely(main, parse_arguments())
