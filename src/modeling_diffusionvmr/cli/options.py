"""What subcommands share: their parser, errors as one line, options for a model and for data."""

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence


class CommandParser(argparse.ArgumentParser):
    """A parser of a subcommand. Errors are one line, since the usage of some commands fills a screen."""

    def __init__(self, command: str | None = None, **options):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        options.setdefault("prog", f"diffusionvmr {command}" if command else "diffusionvmr")
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str):
        """Print one line and exit with status 2."""
        self.exit(2, f"error: {message} (`{self.prog} --help` lists all arguments)\n")


def run_safely(run: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> None:
    """Run a command. What is wrong with its input becomes one line on stderr and a non-zero exit status."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    # Python's default format names a line of code, which means nothing to somebody who runs a command
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        run(arguments)
    except SafetensorError as error:
        sys.exit(f"error: {getattr(arguments, 'model', None)}: weights are damaged or cut off ({error})")
    except StrictDataclassError as error:  # its own first line names a validator; the cause says what is wrong
        sys.exit(f"error: {error.__cause__ or error}")
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--model` and `--trust_remote_code`."""
    parser.add_argument("--model", help="checkpoint folder or Hub id (default: the embedded model)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the checkpoint")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add annotations and features: official files or a converted folder."""
    parser.add_argument(
        "--annotations", required=True, metavar="PATH", help="official or JSONL file, or a converted folder"
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
    parser.add_argument("--skip_invalid", action="store_true", help="skip unusable rows and list them")


def clip_seconds_of(arguments: argparse.Namespace, video_features: Sequence[Mapping], config) -> float | None:
    """The length of a clip from the flag, else from the features, else from the model's backbones; else `None`."""
    from ..data.features import common_clip_seconds

    if arguments.clip_seconds is not None:
        return arguments.clip_seconds
    seconds = [common_clip_seconds(video_features)]
    seconds += [backbone.get("clip_seconds") for backbone in config.backbones or []]
    return next((length for length in seconds if length is not None), None)


def check_device(device: str) -> None:
    """Raise `ValueError` for a device that cannot be used."""
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a PyTorch without GPU support
        raise ValueError(f"--device {device} cannot be used ({str(error).splitlines()[0]})") from error


def resolve_model(model: str | None) -> str:
    """
    The folder or Hub id that `--model` names; the embedded model without one. Raise `ValueError` for what cannot be
    either, before the Hub is asked for it.
    """
    from .. import DEFAULT_MODEL

    if model is None:
        return DEFAULT_MODEL
    if not os.path.isdir(model) and (model.count("/") > 1 or model.startswith((".", "/"))):
        raise ValueError(f"{model}: not a local folder or a valid Hub id")
    return model


def load_model(arguments: argparse.Namespace):
    """Load the model and the processor that `add_model_arguments` describes."""
    from transformers import AutoModel, AutoProcessor

    model = resolve_model(arguments.model)
    options = {"trust_remote_code": arguments.trust_remote_code or None}
    return AutoModel.from_pretrained(model, **options), AutoProcessor.from_pretrained(model, **options)
