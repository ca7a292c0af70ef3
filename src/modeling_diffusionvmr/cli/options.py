"""Flags that subcommands share, their parser, and checks of their values."""

import argparse
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from .errors import loading

DTYPES = ("float16", "float32")  # of written features
EMBEDDED = "embedded"  # as a value of --model


class CommandParser(argparse.ArgumentParser):
    """The parser of a subcommand. Errors are one line, without the usage, which fills a screen for some commands."""

    def __init__(self, command: str | None = None, **options):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        options.setdefault("prog", f"diffusionvmr {command}" if command else "diffusionvmr")
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str):
        """Print one line and exit with status 2."""
        self.exit(2, f"error: {message} (`{self.prog} --help` lists all arguments)\n")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--model` and `--trust_remote_code`."""
    parser.add_argument("--model", help="checkpoint folder or Hub id (default: embedded, the model in this package)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the checkpoint")


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--device`, which `choose_device` reads."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is a GPU, otherwise cpu)")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add flags for annotations and features, in official files or a converted folder."""
    parser.add_argument(
        "--annotations",
        required=True,
        metavar="PATH",
        help="official or JSONL file, or a converted folder (also USER/NAME of one on the Hub)",
    )
    parser.add_argument("--split", help="split of a converted folder: train, val or test")
    parser.add_argument(
        "--video_features",
        required=True,
        nargs="+",
        metavar="PATH",
        help="one per backbone, in the model's order: folder of .npz or .npy, HDF5 file, or a converted folder",
    )
    parser.add_argument(
        "--text_features",
        required=True,
        metavar="PATH",
        help="folder of qid*.npz, HDF5 file, GloVe's .txt, or a converted folder",
    )
    parser.add_argument("--clip_seconds", type=float, help="length of a clip, if the features do not state it")
    parser.add_argument(
        "--windows", action="store_true", help="read videos of more than max_clips clips in windows, as `retrieve` does"
    )
    add_skip_invalid(parser)


def add_skip_invalid(parser: argparse.ArgumentParser) -> None:
    """Add `--skip_invalid`."""
    parser.add_argument("--skip_invalid", action="store_true", help="skip unusable rows and list them")


def add_retrieval_arguments(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """
    Add the flags of `retrieve` and `evaluate`, which `check_retrieval_arguments` checks. With `several`, N and S are
    lists of values to try.
    """
    nargs = "+" if several else None
    parser.add_argument("--num_proposals", type=int, nargs=nargs, metavar="N", help="number of spans drawn from noise")
    parser.add_argument("--num_sampling_steps", type=int, nargs=nargs, metavar="S", help="number of DDIM steps")
    parser.add_argument("--top_k", type=int, metavar="K", help="maximum number of moments per query")
    parser.add_argument("--threshold", type=float, metavar="SCORE", help="minimum score of a moment")
    parser.add_argument(
        "--nms_threshold", type=float, metavar="IOU", help="drop a moment if its IoU with a better one is above this"
    )


def check_retrieval_arguments(arguments: argparse.Namespace) -> None:
    """Raise `ValueError` for an invalid number or threshold of `retrieve` or `evaluate`, before the model is loaded."""
    from ..checks import check_positive
    from ..processing_diffusionvmr import POST_PROCESSING, check_post_processing

    for name in ("num_proposals", "num_sampling_steps"):
        value = getattr(arguments, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None:
                check_positive(number, f"--{name}")
    check_post_processing(**{name: value for name, value in vars(arguments).items() if name in POST_PROCESSING})


def clip_seconds_of(arguments: argparse.Namespace, video_features: Sequence[Mapping], config) -> float | None:
    """Return the length of a clip: from the flag, else the features, else the model's backbones, else `None`."""
    from ..data.features import common_clip_seconds

    if arguments.clip_seconds is not None:
        return arguments.clip_seconds
    seconds = [common_clip_seconds(video_features)]
    seconds += [backbone.get("clip_seconds") for backbone in config.backbones or []]
    return next((length for length in seconds if length is not None), None)


def check_output(path: str | os.PathLike, flag: str, is_folder: bool = True) -> None:
    """
    Raise `ValueError` unless a folder, or a file, can be written. It and its parents may be missing. Commands call this
    before the work, since a result that cannot be saved is lost.
    """
    path = Path(path)
    if not is_folder and path.is_dir():
        raise ValueError(f"{flag} {path}: a folder, not a file")
    folder = path if is_folder else path.parent
    existing = next(part for part in (folder, *folder.absolute().parents) if os.path.lexists(part))
    if not existing.is_dir():
        raise ValueError(f"{flag} {path}: {existing} is a file, not a folder")
    try:
        with tempfile.TemporaryFile(dir=existing):  # permissions alone do not tell, for example in /proc
            pass
    except OSError as error:
        raise ValueError(f"{flag} {path}: cannot write to {existing} ({error.strerror})") from None


def check_device(device: str) -> None:
    """Raise `ValueError` for a device that cannot be used."""
    import torch

    try:
        torch.zeros(1, device=device).item()  # tensors on "meta" have no values
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch without GPU support
        raise ValueError(f"--device {device} cannot be used ({str(error).splitlines()[0]})") from error


def choose_device(device: str | None) -> str:
    """Return the device to run on, by default a GPU if there is one. Raise `ValueError` if it cannot be used."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    return device


def resolve_model(model: str | None) -> str:
    """
    Return the folder or Hub id of `--model`; "embedded", the default, names the embedded model. Raise `ValueError` if
    it cannot be either, without asking the Hub.
    """
    from .. import DEFAULT_MODEL

    model = EMBEDDED if model is None else model
    return DEFAULT_MODEL if model == EMBEDDED and not os.path.isdir(model) else check_checkpoint(model)


def check_checkpoint(path_or_id: str) -> str:
    """Return a folder or Hub id. Raise `ValueError` if it cannot be either, without asking the Hub."""
    from ..configuration_diffusionvmr import FOLDER_NAME, HUB_ID

    if os.path.isdir(path_or_id):
        return path_or_id
    if os.path.exists(path_or_id):
        raise ValueError(f"{path_or_id}: a checkpoint must be a folder, not a file")
    if not (HUB_ID.fullmatch(path_or_id) or FOLDER_NAME.fullmatch(path_or_id)):  # the oldest ids have no USER
        raise ValueError(f"{path_or_id}: not a local folder or a valid Hub id")
    return path_or_id


def check_model_type(model: str, **options) -> None:
    """Raise `ValueError`, before weights are loaded, unless a folder or Hub id contains a DiffusionVMR model."""
    from transformers import AutoConfig

    from ..configuration_diffusionvmr import DiffusionVMRConfig

    with loading(model):
        found = AutoConfig.from_pretrained(model, **options).model_type
        if found != DiffusionVMRConfig.model_type:
            raise ValueError(f"{model}: a model of type {found}, not {DiffusionVMRConfig.model_type}")


def load_model(arguments: argparse.Namespace):
    """
    Load the model and the processor that the flags of `add_model_arguments` name. If that fails, raise a `ValueError`
    that names the checkpoint.
    """
    from transformers import AutoModel, AutoProcessor

    from ..checkpoint import check_processor
    from ..weights import check_weights

    model = resolve_model(arguments.model)
    options = {"trust_remote_code": arguments.trust_remote_code or None}
    check_model_type(model, **options)
    with loading(model):
        network = AutoModel.from_pretrained(model, **options)
        check_weights(network, network.missing_weights, model)
        processor = AutoProcessor.from_pretrained(model, **options)
        check_processor(processor, network.config, model)
        return network, processor
