"""Atomic training checkpoints: a checkpoint is complete, or it is recognized as damaged and skipped."""

import hashlib
import json
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import TrainerState

from ..checks import is_number
from ..data.files import locked
from ..messages import one_line

STAGING_FOLDER = "_saving"  # `Trainer` never uploads a name that begins with "_"
LOCK = ".training.lock"  # in an output folder while a training writes to it
MANIFEST = "manifest.json"  # the sizes and digests of a checkpoint's files
RESUME_FILES = ("optimizer.pt", "scheduler.pt", "rng_state*.pth")  # all of them, or none with `save_only_model`
STATE_NUMBERS = ("epoch", "train_batch_size", "logging_steps", "save_steps", "eval_steps", "total_flos")  # to resume


def lock_training(folder: str | Path) -> AbstractContextManager[bool]:
    """
    Keep other trainings from writing to an output folder. If this process is killed, the lock ends with it.

    Raises:
        BlockingIOError: on entering, if another training writes to the folder.
    """
    return locked(Path(folder, LOCK), f"{folder}: another training is writing to this folder")


def write_manifest(checkpoint: str | Path) -> None:
    """
    Save the sizes and SHA-256 digests of a checkpoint's files in it, so that a missing or damaged file is noticed.

    Markdown is left out: users may edit the model card.
    """
    checkpoint = Path(checkpoint)
    files = {
        path.relative_to(checkpoint).as_posix(): {"size": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.suffix != ".md" and path != checkpoint / MANIFEST
    }
    (checkpoint / MANIFEST).write_text(json.dumps(files, indent=2) + "\n", encoding="utf-8")


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """
    Return the latest checkpoint in an output folder that training can resume from, or `None`.

    Warn about each later one that is damaged.
    """
    checkpoints = {}
    for path in Path(folder).glob("checkpoint-*"):
        if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir():
            checkpoints[int(path.name.split("-")[1])] = path
    for _, path in sorted(checkpoints.items(), reverse=True):
        fault = find_fault(path)
        if fault is None:
            return str(path)
        warnings.warn(f"{path}: skipped, cannot resume from it: {fault}", stacklevel=2)
    return None


def find_fault(checkpoint: str | Path) -> str | None:
    """Return why training cannot resume from a checkpoint, naming the file, or `None` if it can."""
    for find in (_fault_of_json, _fault_of_presence, _fault_of_weights, _fault_of_archives):
        fault = find(Path(checkpoint))
        if fault is not None:
            return fault
    return None


def _fault_of_json(checkpoint: Path) -> str | None:
    """Check the state of the trainer, the configurations, and the manifest with the files that it lists."""
    for path in (checkpoint / "trainer_state.json", *sorted(checkpoint.glob("*config.json")), checkpoint / MANIFEST):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                return f"{path.name} is not a JSON object"
        except FileNotFoundError:
            if path.name == MANIFEST:  # a checkpoint written by plain `Trainer` has none
                continue
            return f"{path.name} is missing"
        except (OSError, ValueError) as error:
            return f"{path.name} cannot be read ({error})"
        fault = None
        if path.name == "trainer_state.json":
            fault = _fault_of_state(content)
        elif path.name == MANIFEST:
            fault = _fault_of_files(checkpoint, content)
        if fault is not None:
            return fault
    return None


def _fault_of_presence(checkpoint: Path) -> str | None:
    present = [any(checkpoint.glob(pattern)) for pattern in RESUME_FILES]
    if any(present) and not all(present):
        return f"{RESUME_FILES[present.index(False)]} is missing"
    return None


def _fault_of_weights(checkpoint: Path) -> str | None:
    weights = sorted(checkpoint.glob("*.safetensors"))
    if not weights:
        return "no weights"
    for path in weights:
        try:
            with safe_open(path, framework="pt"):  # compares the size of the file with the one in its header
                pass
        except (SafetensorError, OSError) as error:
            return f"{path.name} cannot be read ({error})"
    return None


def _fault_of_archives(checkpoint: Path) -> str | None:
    """Check the zip files that `torch.save` writes."""
    for path in sorted([*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]):
        try:
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
        except (zipfile.BadZipFile, OSError) as error:
            return f"{path.name} cannot be read ({error})"
        if broken is not None:
            return f"{path.name} is damaged in {broken}"
    return None


def _fault_of_state(state: dict[str, Any]) -> str | None:
    """Check the fields of trainer_state.json that `Trainer` uses to resume; it does not check them itself."""
    step, best = state.get("global_step"), state.get("best_metric")
    if type(step) is not int or step < 0:
        return f"trainer_state.json: `global_step` must be a whole number, 0 or more, got {step!r}"
    for name in STATE_NUMBERS:
        if not is_number(state.get(name)):
            return f"trainer_state.json: `{name}` must be a number, got {state.get(name)!r}"
    if best is not None and type(best) not in (int, float):  # NaN if the model diverged
        return f"trainer_state.json: `best_metric` must be a number or null, got {best!r}"
    for name, kind, what in (("log_history", list, "a list"), ("stateful_callbacks", dict, "an object")):
        if not isinstance(state.get(name), kind):
            return f"trainer_state.json: `{name}` must be {what}, got {state.get(name)!r}"
    if not isinstance(state["stateful_callbacks"].get("TrainerControl"), dict):  # `Trainer` writes into it
        return "trainer_state.json: `stateful_callbacks` must have an object `TrainerControl`"
    unknown = sorted(state.keys() - {field.name for field in fields(TrainerState)})
    return f"trainer_state.json: unknown field `{unknown[0]}`" if unknown else None


def _fault_of_files(checkpoint: Path, files: dict[str, Any]) -> str | None:
    """Compare a checkpoint's files with the sizes and digests in its manifest."""
    only_sizes = all(isinstance(entry, int) for entry in files.values())  # written before there were digests
    for name, entry in files.items():
        path = checkpoint / name
        if not only_sizes and not isinstance(entry, dict):
            return f"{MANIFEST}: `{name}` must have a `size` and a `sha256`, got {entry!r}"
        size = entry if only_sizes else entry.get("size")
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if not only_sizes and _digest(path) != entry.get("sha256"):
            return f"{name} is damaged: its digest is not that in {MANIFEST}"
    if only_sizes:
        warnings.warn(f"{checkpoint}: {MANIFEST} has no digests, so only the sizes of files are checked", stacklevel=2)
    return None


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Whether a complete checkpoint fits the training


@contextmanager
def resuming(checkpoint: str, names: str) -> Iterator[None]:
    """Turn whatever PyTorch raises for a state that does not fit into a `ValueError` that names the files."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:  # a RuntimeError, which is not the checkpoint's fault
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, UnpicklingError) as error:
        raise ValueError(
            f"{checkpoint}: cannot resume from it: {names} does not fit this training ({one_line(error)}); "
            "resume with the same settings and features"
        ) from error


def check_shapes(checkpoint: str, model: torch.nn.Module) -> None:
    """Raise `ValueError` if a checkpoint lacks weights of the model, or has them in other shapes."""
    saved: dict[str, list[int]] = {}
    for path in sorted(Path(checkpoint).glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            saved |= {name: file.get_slice(name).get_shape() for name in file.keys()}
    for name, tensor in model.state_dict().items():
        shape = list(tensor.shape)
        if saved and saved.get(name) != shape:  # adapters are in files of other names
            has = f"`{name}` has shape {saved[name]}" if name in saved else f"no `{name}`"
            raise ValueError(
                f"{checkpoint}: {has}, but this training needs {shape}; resume with the same settings and features"
            )


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise `ValueError` if the state that an optimizer has loaded, which it does not check, is not one of its own."""
    for group in optimizer.param_groups:
        missing = optimizer.defaults.keys() - group.keys()
        if missing:
            raise ValueError(f"no `{min(missing)}` in its groups of parameters")
        for parameter in group["params"]:
            for name in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
                average = optimizer.state[parameter].get(name) if parameter in optimizer.state else None
                if average is not None and average.shape != parameter.shape:
                    raise ValueError(f"`{name}` has shape {list(average.shape)} instead of {list(parameter.shape)}")


def check_scheduler(saved: Any, scheduler: Any) -> None:
    """Raise `ValueError` if a saved state is not one of a scheduler, which does not check it when it loads it."""
    if not isinstance(saved, dict) or type(saved.get("last_epoch")) is not int:
        raise ValueError("not the state of a scheduler")
    for name, value in scheduler.state_dict().items():
        if isinstance(value, list) and len(saved.get(name, value)) != len(value):
            raise ValueError(f"`{name}` has {len(saved[name])} entries instead of {len(value)}")
