"""What the commands in `scripts/` and `dataset_scripts/` share: errors and warnings as lines, arguments for data."""

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModel, AutoProcessor

from .. import DEFAULT_MODEL
from ..data.features import common_clip_seconds


def run(main: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> None:
    """Runs a command: what is wrong with its input is one line on stderr, and a non-zero exit."""
    # Python's own form names a line of code, which means nothing to who runs a command
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        main(arguments)
    except SafetensorError as error:
        sys.exit(f"error: {getattr(arguments, 'model', None)}: its weights are broken or cut off ({error})")
    except StrictDataclassError as error:  # its own first line names a validator, the cause says what is wrong
        sys.exit(f"error: {error.__cause__ or error}")
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """`--model` and `--trust_remote_code`."""
    parser.add_argument("--model", default=DEFAULT_MODEL, help="checkpoint folder or Hub id (default: embedded)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the checkpoint")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Annotations and features, official files or a converted folder."""
    parser.add_argument(
        "--annotations", required=True, metavar="PATH", help="official or JSONL file, or a converted folder"
    )
    parser.add_argument("--split", help="of a converted folder: train, val or test")
    parser.add_argument(
        "--video_features",
        required=True,
        nargs="+",
        metavar="PATH",
        help="one a backbone, in the model's order: folder of .npz or .npy, HDF5 file; or a converted folder",
    )
    parser.add_argument(
        "--text_features",
        required=True,
        metavar="PATH",
        help="folder of qid*.npz, HDF5 file, GloVe's .txt, or a converted folder",
    )
    parser.add_argument("--clip_seconds", type=float, help="length of a clip, where the features do not say it")
    parser.add_argument("--skip_invalid", action="store_true", help="drop what cannot be used, and say what")


def clip_seconds_of(arguments: argparse.Namespace, video_features: Sequence[Mapping], config) -> float | None:
    """The length of a clip: as the flag says, else the features, else the model's backbones; `None` where none does."""
    if arguments.clip_seconds is not None:
        return arguments.clip_seconds
    seconds = [common_clip_seconds(video_features)]
    seconds += [backbone.get("clip_seconds") for backbone in config.backbones or []]
    return next((length for length in seconds if length is not None), None)


def check_device(device: str) -> None:
    """Raises `ValueError` for a device that cannot be used."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a PyTorch that knows no GPU
        raise ValueError(f"--device {device} cannot be used ({str(error).splitlines()[0]})") from error


def check_model(model: str) -> None:
    """Raises `ValueError` for what is neither a folder nor could be a Hub id, before anyone asks the Hub for it."""
    if not os.path.isdir(model) and (model.count("/") > 1 or model.startswith((".", "/"))):
        raise ValueError(f"{model}: there is no such folder, and it is no Hub id")


def load_model(arguments: argparse.Namespace):
    """The model and the processor of `add_model_arguments`."""
    check_model(arguments.model)
    options = {"trust_remote_code": arguments.trust_remote_code or None}
    return (
        AutoModel.from_pretrained(arguments.model, **options),
        AutoProcessor.from_pretrained(arguments.model, **options),
    )
