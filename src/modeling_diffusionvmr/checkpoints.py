"""Checkpoints of a training that are whole, or are not there."""

import json
import re
import warnings
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

STAGING_FOLDER = "_saving"  # `Trainer` pushes no name that begins so


def last_whole_checkpoint(folder: str | Path) -> str | None:
    """
    The checkpoint of the latest step in an output folder that can be resumed from; `None` where there is none. One
    warning for each later one that cannot.
    """
    checkpoints = {}
    for path in Path(folder).glob("checkpoint-*"):
        if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir():
            checkpoints[int(path.name.split("-")[1])] = path
    for _, path in sorted(checkpoints.items(), reverse=True):
        fault = find_fault(path)
        if fault is None:
            return str(path)
        warnings.warn(f"{path} is not whole and is skipped: {fault}", stacklevel=2)
    return None


def find_fault(checkpoint: str | Path) -> str | None:
    """What keeps a training from being resumed from a checkpoint; `None` where it is whole."""
    checkpoint = Path(checkpoint)
    state = checkpoint / "trainer_state.json"
    try:
        json.loads(state.read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{state.name} cannot be read ({error})"
    weights = sorted(checkpoint.glob("*.safetensors"))
    if not weights:
        return "it has no weights"
    for path in weights:
        try:
            with safe_open(path, framework="pt"):  # compares the size of the file with what its header says
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
