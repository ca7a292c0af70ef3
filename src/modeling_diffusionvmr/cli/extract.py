"""`diffusionvmr extract`: compute the features of videos and sentences with frozen backbones."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from itertools import islice
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
from .processes import Process

DEFAULT_CLIP_SECONDS = 2.0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of `diffusionvmr extract`."""
    parser = CommandParser(
        "extract",
        description="Compute the features of the videos in a folder, and of the sentences in an annotation\n"
        "file, in the official .npz layout. Run the same command again to resume. To share the\n"
        "work between GPUs or machines: accelerate launch -m modeling_diffusionvmr extract ...",
    )
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="where to write NAME/VID.npz and NAME_text/qidQID.npz")
    parser.add_argument("--videos", metavar="DIR", help="folder of videos; a VID is a file name without its extension")
    parser.add_argument(
        "--annotations",
        metavar="FILE",
        help="encode the sentences of this file, and only those videos of --videos that it names",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--backbone",
        nargs="+",
        metavar="ID",
        help="complete checkpoints of backbones: folders or Hub ids. Videos are decoded once for all of them",
    )
    which.add_argument(
        "--model", help="use the backbones of this checkpoint: folder, Hub id, or embedded (the model in this package)"
    )
    parser.add_argument(
        "--name",
        nargs="+",
        help="names of the output folders, one per backbone (default: the backbone's type, such as clip, or its name "
        "in --model)",
    )
    parser.add_argument("--clip_seconds", type=float, help="length of a clip (default: that of --model, or 2)")
    parser.add_argument(
        "--max_video_seconds", type=float, metavar="S", help="refuse videos that last longer (default: one day)"
    )
    parser.add_argument(
        "--batch_size", type=int, default=32, help="frames per batch, which has at least one clip (default: 32)"
    )
    add_device_argument(parser)
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float16", help="type of the written features (default: float16)"
    )
    parser.add_argument(
        "--skip_invalid",
        action="store_true",
        help="skip unusable rows and missing videos, and do not fail if a video is damaged",
    )
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    """Write the features of this process's share of the videos and sentences, and list those that failed."""
    _check(arguments)
    process = Process.current()
    sentences, videos, missing = _share(arguments, process)
    clip_seconds, backbones = _open_backbones(arguments, process)
    of_text, of_video = _choose_backbones(arguments, backbones, process)
    num_failed = _extract_sentences(arguments, process, of_text, sentences)
    num_failed += _extract_videos(arguments, process, of_video, clip_seconds, videos, missing)
    process.wait_for_others()
    if num_failed and not arguments.skip_invalid:
        raise ValueError(
            f"{process.name}{num_failed} videos or sentences could not be encoded, as listed above; the others are "
            "complete (with --skip_invalid, this is not an error)"
        )


def _check(arguments: argparse.Namespace) -> None:
    from ..checks import check_positive

    if not (arguments.videos or arguments.annotations):
        raise ValueError("nothing to extract: pass --videos, --annotations, or both")
    if arguments.clip_seconds is not None:
        check_positive(arguments.clip_seconds, "--clip_seconds")
    check_positive(arguments.batch_size, "--batch_size")
    if arguments.max_video_seconds is not None:
        check_positive(arguments.max_video_seconds, "--max_video_seconds")
    check_output(arguments.output_dir, "OUTPUT_DIR")
    for name in arguments.name or []:
        if name in ("", ".", "..") or Path(name).name != name:
            raise ValueError(f"--name must be a folder name, got {name!r}")


def _share(arguments: argparse.Namespace, process: Process) -> tuple[dict[Any, str], dict[str, Path], dict[str, str]]:
    """
    Return what this process has to encode: sentences by qid, videos by vid, and a reason for each annotated video that
    has no file.
    """
    from ..data.annotations import load_annotations
    from ..data.extraction import share_of_videos

    rows = load_annotations(arguments.annotations, skip_invalid=arguments.skip_invalid) if arguments.annotations else []
    videos: dict[str, Path] = {}
    missing: dict[str, str] = {}
    if arguments.videos:
        videos, missing = _choose_videos(arguments, list(dict.fromkeys(row["vid"] for row in rows)), process)
    sentences = dict(islice(((row["qid"], row["query"]) for row in rows), process.rank, None, process.count))
    videos, missing = (share_of_videos(part, process.rank, process.count) for part in (videos, missing))
    return sentences, videos, missing


def _choose_videos(
    arguments: argparse.Namespace, vids: Sequence[str], process: Process
) -> tuple[dict[str, Path], dict[str, str]]:
    """Return the videos to encode, by vid, and a reason for each annotated video that has no file."""
    from ..data.extraction import find_videos

    videos, others = find_videos(arguments.videos)
    if others and process.is_first:
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
    reads_video: bool
    reads_text: bool

    @property
    def text_folder(self) -> str:
        return f"{self.name}_text"


def _open_backbones(arguments: argparse.Namespace, process: Process) -> tuple[float, list[_Backbone]]:
    """
    Load the backbones in float32, as the pipeline does, whatever type their weights are stored in. Return them with the
    length of a clip.
    """
    import torch

    from ..backbones import load_backbone
    from ..checkpoint import folder_of_backbone, load_backbones
    from ..configuration_diffusionvmr import DiffusionVMRConfig

    device = choose_device(arguments.device or process.device)
    if arguments.model is None:
        _check_names(arguments.name, len(arguments.backbone))
        backbones = []
        for source in map(check_checkpoint, arguments.backbone):
            with loading(source):
                model = load_backbone(source, device, torch.float32)
            reads = (model.feature_size is not None, model.text_feature_size is not None)
            backbones.append(_Backbone(model.model.config.model_type, source, model, *reads))
        return arguments.clip_seconds or DEFAULT_CLIP_SECONDS, _named(backbones, arguments.name)

    checkpoint = resolve_model(arguments.model)
    check_model_type(checkpoint)
    with loading(checkpoint):
        config = DiffusionVMRConfig.from_pretrained(checkpoint)
        loaded = load_backbones(config, checkpoint, device, torch.float32)
    if arguments.clip_seconds not in (None, loaded.clip_seconds):
        raise ValueError(f"--clip_seconds must be that of {checkpoint}, {loaded.clip_seconds}")
    _check_names(arguments.name, len(loaded.models))
    backbones = [
        _Backbone(
            description["name"],
            folder_of_backbone(description, checkpoint),
            model,
            "feature_size" in description,
            "text_feature_size" in description,
        )
        for description, model in zip(loaded.descriptions, loaded.models)
    ]
    return loaded.clip_seconds, _named(backbones, arguments.name)


def _check_names(names: Sequence[str] | None, count: int) -> None:
    if names and len(names) != count:
        raise ValueError(f"--name needs one name per backbone, got {len(names)} for {count}")


def _named(backbones: Sequence[_Backbone], names: Sequence[str] | None) -> list[_Backbone]:
    """Return the backbones with the names of `--name`, if given. Raise ValueError if two have the same folder."""
    named = [backbone._replace(name=name) for backbone, name in zip(backbones, names or [b.name for b in backbones])]
    folders = [backbone.name for backbone in named if backbone.reads_video]
    folders += [backbone.text_folder for backbone in named if backbone.reads_text]
    repeated = [folder for index, folder in enumerate(folders) if folder in folders[:index]]
    if repeated:
        raise ValueError(f"two backbones would write to the folder {repeated[0]}; name each of them with --name")
    return named


def _choose_backbones(
    arguments: argparse.Namespace, backbones: Sequence[_Backbone], process: Process
) -> tuple[list[_Backbone], list[_Backbone]]:
    """Return the backbones that encode sentences, and those that encode videos. There is at least one of them."""
    of_text = [backbone for backbone in backbones if backbone.reads_text and arguments.annotations]
    of_video = [backbone for backbone in backbones if backbone.reads_video and arguments.videos]
    names = ", ".join(backbone.name for backbone in backbones)
    for wanted, chosen, what in ((arguments.annotations, of_text, "sentences"), (arguments.videos, of_video, "videos")):
        if wanted and not chosen:
            message = f"no {what} are encoded, since none of the backbones reads them: {names}"
            if not (of_text or of_video):
                raise ValueError(message)
            if process.is_first:
                print(f"warning: {message}", file=sys.stderr)
    return of_text, of_video


def _extract_sentences(
    arguments: argparse.Namespace, process: Process, backbones: Sequence[_Backbone], sentences: Mapping[Any, str]
) -> int:
    """Encode sentences with each backbone. Return how many failed."""
    from ..data.extraction import Output, extract_sentences

    num_failed = 0
    for backbone in backbones:
        output = Output(Path(arguments.output_dir) / backbone.text_folder, backbone.model, backbone.source)
        failed = extract_sentences(output, sentences, arguments.dtype, progress=process.is_first)
        num_failed += _report(process, "sentences", len(sentences), failed, [output])
    return num_failed


def _extract_videos(
    arguments: argparse.Namespace,
    process: Process,
    backbones: Sequence[_Backbone],
    clip_seconds: float,
    videos: Mapping[str, Path],
    missing: Mapping[str, str],
) -> int:
    """Encode videos with all backbones. Return how many failed, with those that are missing."""
    from ..data.extraction import Output, extract_videos
    from ..video import MAX_VIDEO_SECONDS

    if not backbones:
        return 0
    folder = Path(arguments.output_dir)
    outputs = [Output(folder / backbone.name, backbone.model, backbone.source) for backbone in backbones]
    failed = extract_videos(
        outputs,
        videos,
        clip_seconds,
        arguments.batch_size,
        arguments.dtype,
        arguments.max_video_seconds or MAX_VIDEO_SECONDS,
        progress=process.is_first,
    )
    failed = {**missing, **failed}
    return _report(process, "videos", len(videos.keys() | failed.keys()), failed, outputs)


def _report(process: Process, what: str, number: int, failed: Mapping[Any, str], outputs: Sequence[Any]) -> int:
    """Print how many are complete, and why the others are not. Return the number of the others."""
    folders = ", ".join(str(output.folder) for output in outputs)
    print(f"{process.name}{folders}: {number - len(failed)} of {number} {what}")
    if failed:
        lines = [f"{process.name}skipped {len(failed)} of {number} {what}:"]
        lines += [f"  {identifier}: {reason}" for identifier, reason in failed.items()]
        print("\n".join(lines), file=sys.stderr)
    return len(failed)
