"""`diffusionvmr extract`: compute the features of videos and sentences with frozen backbones."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import normalize

from ..messages import listed
from .errors import loading
from .options import (
    DTYPES,
    CommandParser,
    add_device_argument,
    check_checkpoint,
    check_model_type,
    check_output,
    choose_device,
    resolve_model,
)

DEFAULT_CLIP_SECONDS = 2.0


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
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--backbone", metavar="ID", help="complete CLIP checkpoint: folder or Hub id")
    which.add_argument(
        "--model", help="use the backbones of this checkpoint: folder, Hub id, or embedded (the model in this package)"
    )
    parser.add_argument("--name", help="name of the output folders (default: the backbone's type, such as clip)")
    parser.add_argument("--clip_seconds", type=float, help="length of a clip (default: that of --model, or 2)")
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

    clip_seconds, backbones = _open_backbones(arguments)
    options = {"dtype": arguments.dtype, "skip_invalid": arguments.skip_invalid}
    for backbone in backbones:
        folder = Path(arguments.output_dir) / backbone.name
        if rows and backbone.reads_text:
            sentences, text_folder = {row["qid"]: row["query"] for row in rows}, folder.with_name(f"{folder.name}_text")
            skipped = extract_sentences(backbone.model, backbone.source, sentences, text_folder, **options)
            _report("sentences", len(sentences), skipped, text_folder)
        if arguments.videos and backbone.reads_video:
            damaged = extract_videos(
                backbone.model, backbone.source, videos, folder, clip_seconds, arguments.batch_size, **options
            )
            _report("videos", len(videos) + len(missing), {**missing, **damaged}, folder)


def _check(arguments: argparse.Namespace) -> None:
    from ..checks import check_positive

    if not (arguments.videos or arguments.annotations):
        raise ValueError("nothing to extract: pass --videos, --annotations, or both")
    if arguments.clip_seconds is not None:
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
        print(f"{arguments.videos}: ignored (not video files): {listed(others)}", file=sys.stderr)
    if not vids:
        return videos, {}
    # Some file systems decompose accented letters, so names that look the same can differ
    by_name = {normalize("NFC", vid): path for vid, path in videos.items()}
    chosen = {vid: videos.get(vid) or by_name.get(normalize("NFC", vid)) for vid in vids}
    missing = [vid for vid, path in chosen.items() if path is None]
    if missing and not arguments.skip_invalid:
        raise ValueError(
            f"{arguments.videos}: {len(missing)} of {len(vids)} annotated videos are missing: {listed(missing)} "
            "(a vid is a file name without its extension)"
        )
    found = {vid: path for vid, path in chosen.items() if path is not None}
    return found, dict.fromkeys(missing, f"no such file in {arguments.videos}")


class _Backbone(NamedTuple):
    """A backbone, the name of its output folder, and where it was loaded from."""

    name: str
    source: str
    model: Any
    reads_video: bool = True
    reads_text: bool = True


def _open_backbones(arguments: argparse.Namespace) -> tuple[float, list[_Backbone]]:
    """
    Load the backbones in float32, as the pipeline does, whatever type their weights are stored in. Return them with the
    length of a clip.
    """
    import torch

    from ..backbones import load_backbone
    from ..checkpoint import folder_of_backbone, load_backbones
    from ..configuration_diffusionvmr import DiffusionVMRConfig

    device = choose_device(arguments.device)
    if arguments.model is None:
        source = check_checkpoint(arguments.backbone)
        with loading(source):
            model = load_backbone(source, device, torch.float32)
        name = arguments.name or model.model.config.model_type
        return arguments.clip_seconds or DEFAULT_CLIP_SECONDS, [_Backbone(name, source, model)]

    checkpoint = resolve_model(arguments.model)
    check_model_type(checkpoint)
    with loading(checkpoint):
        config = DiffusionVMRConfig.from_pretrained(checkpoint)
        loaded = load_backbones(config, checkpoint, device, torch.float32)
    if arguments.clip_seconds not in (None, loaded.clip_seconds):
        raise ValueError(f"--clip_seconds must be that of {checkpoint}, {loaded.clip_seconds}")
    if arguments.name and len(loaded.models) > 1:
        raise ValueError(f"--name: {checkpoint} has {len(loaded.models)} backbones, whose names are used")
    return loaded.clip_seconds, [
        _Backbone(
            arguments.name or description["name"],
            folder_of_backbone(description, checkpoint),
            model,
            "feature_size" in description,
            "text_feature_size" in description,
        )
        for description, model in zip(loaded.descriptions, loaded.models)
    ]


def _report(what: str, number: int, skipped: Mapping[Any, str], folder: Path) -> None:
    print(f"{folder}: {number - len(skipped)} of {number} {what}")
    if skipped:
        print(f"skipped {len(skipped)} of {number} {what}:", file=sys.stderr)
        for identifier, reason in skipped.items():
            print(f"  {identifier}: {reason}", file=sys.stderr)
