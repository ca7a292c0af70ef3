"""Errors of commands in one line."""

import argparse
import errno
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..messages import one_line

EXTRAS = {  # modules of each extra
    "train": ("accelerate", "datasets", "evaluate", "h5py", "matplotlib", "pyarrow", "yaml"),
    "onnx": ("onnx", "onnx_ir", "onnxruntime", "onnxscript"),
    "app": ("gradio", "httpx", "starlette"),
}
DAMAGED_WEIGHTS = "weights are damaged or cut off"
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
# Neither safetensors nor `torch.save` raises OSError, and the latter does not say why it cannot write
SIGNS_OF_FULL_DISK = ("(os error 28)", "(os error 122)", "PytorchStreamWriter failed", "unexpected pos")


@contextmanager
def ending_on_interrupt() -> Iterator[None]:
    """End the process with one line and exit status 130 on Ctrl-C, as shells expect."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


@ending_on_interrupt()
def run_safely(run: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> None:
    """
    Run a command. Bad input ends with one line on stderr and exit status 1, and so does a full disk; warnings are
    printed as one line. See also `ending_on_interrupt`.
    """
    with warnings.catch_warnings():
        # Python's default format includes a line of code, which means nothing to the user of a command
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        try:
            run(arguments)
        except Exception as error:
            line = _describe(error, arguments)
            if line is None:
                raise
            sys.exit(f"error: {line}")


def _describe(error: Exception, arguments: argparse.Namespace) -> str | None:
    """Return the line that tells the user of a command about an error, or `None` for a fault of the code."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    if _is_full_disk(error):
        where = _output_of(arguments) or "the output"
        return f"{where}: cannot be written, because the disk is full ({one_line(error)})"
    if isinstance(error, SafetensorError):
        return f"{getattr(arguments, 'model', None)}: {DAMAGED_WEIGHTS} ({error})"
    if isinstance(error, (ValueError, OSError, ImportError, StrictDataclassError)):
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        extra = next((extra for extra, modules in EXTRAS.items() if missing in modules), None)
        hint = f"; install it with: pip install 'modeling_diffusionvmr[{extra}]'" if extra else ""
        return f"{_cause(error)}{hint}"
    if _is_out_of_memory(error):
        return f"not enough memory; use smaller sizes or batches ({one_line(error)})"
    return None


def _is_full_disk(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in FULL_DISK
    return any(sign in str(error) for sign in SIGNS_OF_FULL_DISK)


def _output_of(arguments: argparse.Namespace) -> Any:
    return getattr(arguments, "output_dir", None) or getattr(arguments, "output", None)


def _is_out_of_memory(error: Exception) -> bool:
    # PyTorch has a special error type for GPUs, but only a special message for the CPU
    return isinstance(error, MemoryError) or any(
        sign in f"{type(error).__name__}: {error}" for sign in ("OutOfMemoryError", "DefaultCPUAllocator")
    )


@contextmanager
def loading(checkpoint: str) -> Iterator[None]:
    """Turn whatever `transformers` raises for an unusable checkpoint into a one-line `ValueError` that names it."""
    from safetensors import SafetensorError
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # `transformers` lists missing weights in a long table. Commands refuse or print them
    try:
        yield
    except ImportError:  # a package is missing, which is not the checkpoint's fault
        raise
    except SafetensorError as error:
        raise ValueError(f"{checkpoint}: {DAMAGED_WEIGHTS} ({error})") from error
    # A broken config.json causes errors of many types: TypeError, AttributeError, KeyError and more
    except Exception as error:
        reason = _unusable_json(checkpoint) or _cause(error)
        if not reason.startswith(str(checkpoint)):
            reason = f"{checkpoint}: cannot be loaded ({reason})"
        raise ValueError(reason) from error
    finally:
        logging.set_verbosity(verbosity)


def _unusable_json(checkpoint: str) -> str | None:
    """
    Return what is wrong with the configuration files in a checkpoint folder and in the folders of its backbones, or
    `None`. Each must be a JSON object.
    """
    from ..json_files import check_configurations

    try:
        for folder in (Path(checkpoint), *sorted(Path(checkpoint).glob("*/"))):
            check_configurations(folder)
    except (ValueError, OSError) as error:
        return one_line(error)
    return None


def _cause(error: BaseException) -> str:
    """Return the message of an error, or of the cause of a `StrictDataclassError`, which only names a validator."""
    from huggingface_hub.errors import StrictDataclassError

    return one_line((isinstance(error, StrictDataclassError) and error.__cause__) or error)
