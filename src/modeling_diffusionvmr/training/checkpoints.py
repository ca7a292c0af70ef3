"""Atomic training checkpoints: a checkpoint is complete, or it is recognized as damaged and skipped."""

import json
import re
import warnings
import zipfile
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import TrainerState

from ..checks import is_number
from ..model_card import CARD_NAME

STAGING_FOLDER = "_saving"  # `Trainer` never uploads a name that begins with "_"
MANIFEST = "manifest.json"  # the sizes of a checkpoint's files
RESUME_FILES = ("optimizer.pt", "scheduler.pt", "rng_state*.pth")  # all of them, or none with `save_only_model`
STATE_NUMBERS = ("epoch", "train_batch_size", "logging_steps", "save_steps", "eval_steps", "total_flos")  # to resume


def write_manifest(checkpoint: str | Path) -> None:
    """
    Save the names and sizes of a checkpoint's files in it, so that a missing or incomplete file is noticed. Its card is
    left out, since people edit it.
    """
    checkpoint = Path(checkpoint)
    paths = [path for path in sorted(checkpoint.iterdir()) if path.is_file() and path.name != CARD_NAME]
    sizes = {path.name: path.stat().st_size for path in paths}
    (checkpoint / MANIFEST).write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")


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
    checkpoint = Path(checkpoint)
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
    present = [any(checkpoint.glob(pattern)) for pattern in RESUME_FILES]
    if any(present) and not all(present):
        return f"{RESUME_FILES[present.index(False)]} is missing"
    weights = sorted(checkpoint.glob("*.safetensors"))
    if not weights:
        return "no weights"
    for path in weights:
        try:
            with safe_open(path, framework="pt"):  # compares the size of the file with the one in its header
                pass
        except (SafetensorError, OSError) as error:
            return f"{path.name} cannot be read ({error})"
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


def _fault_of_files(checkpoint: Path, sizes: dict[str, Any]) -> str | None:
    """Compare a checkpoint's files with the sizes in its manifest."""
    for name, size in sizes.items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if (checkpoint / name).stat().st_size != size:
            return f"{name} has {(checkpoint / name).stat().st_size} bytes instead of {size}"
    return None
