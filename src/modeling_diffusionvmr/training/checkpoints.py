"""Checkpoints of a training that are whole, or are not there."""

import json
import re
import warnings
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

STAGING_FOLDER = "_saving"  # `Trainer` pushes no name that begins so
MANIFEST = "manifest.json"  # the sizes of a checkpoint's files
RESUME_FILES = ("optimizer.pt", "scheduler.pt", "rng_state*.pth")  # all of them, or none where only models are saved


def write_manifest(checkpoint: str | Path) -> None:
    """Lists a checkpoint's files and their sizes in it, so that it is known when one is missing."""
    checkpoint = Path(checkpoint)
    sizes = {path.name: path.stat().st_size for path in sorted(checkpoint.iterdir()) if path.is_file()}
    (checkpoint / MANIFEST).write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")


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
    for path in (checkpoint / "trainer_state.json", *sorted(checkpoint.glob("*config.json")), checkpoint / MANIFEST):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                return f"{path.name} is no JSON object"
        except FileNotFoundError:
            if path.name != MANIFEST:  # which a checkpoint of `Trainer`'s own has not
                return f"{path.name} is missing"
            content = {}
        except (OSError, ValueError) as error:
            return f"{path.name} cannot be read ({error})"
        if path.name == MANIFEST:
            for name, size in content.items():
                if not (checkpoint / name).is_file():
                    return f"{name} is missing"
                if (checkpoint / name).stat().st_size != size:
                    return f"{name} has {(checkpoint / name).stat().st_size} bytes instead of {size}"
    present = [any(checkpoint.glob(pattern)) for pattern in RESUME_FILES]
    if any(present) and not all(present):
        return f"{RESUME_FILES[present.index(False)]} is missing"
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
