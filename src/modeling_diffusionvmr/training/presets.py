"""Presets: training settings in YAML files, either those in `presets/` or the user's own."""

import dataclasses
import difflib
import inspect
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from ..configuration_diffusionvmr import DiffusionVMRConfig
from ..messages import one_line
from ..processing_diffusionvmr import DiffusionVMRProcessor
from .arguments import DiffusionVMRTrainingArguments

FOLDER = Path(__file__).parent / "presets"
PRESETS = sorted(path.stem for path in FOLDER.glob("*.yaml"))

FLOAT_TAG = "tag:yaml.org,2002:float"
NUMBER = re.compile(r"([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)(e[-+]?[0-9]+)?|[-+]?\.inf|\.nan)$", re.IGNORECASE)

SECTIONS = {
    "config": [name for name in DiffusionVMRConfig.__annotations__ if name != "model_type"],
    "processor": [
        name for name in inspect.signature(DiffusionVMRProcessor.__init__).parameters if name not in ("self", "kwargs")
    ],
    "training": [
        field.name for field in dataclasses.fields(DiffusionVMRTrainingArguments) if field.name != "output_dir"
    ],
    "data": ["hold_out"],
}
"""The sections of a preset and the fields that each may set."""


class _Loader(yaml.SafeLoader):
    """Reads booleans and numbers as YAML 1.2 does: `no`, the name of a strategy, is text and 1e-4 is a number."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:bool", FLOAT_TAG)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(true|false)$", re.IGNORECASE), list("tTfF"))
_Loader.add_implicit_resolver(FLOAT_TAG, NUMBER, list("-+.0123456789"))


def load_preset(name_or_file: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """
    Load a preset by name or from a file. A preset that `extends` another one starts with the settings of that one.

    Returns:
        The fields that are set, for each section of `SECTIONS`.

    Raises:
        ValueError: if there is no such preset or it is invalid. The message names the file and the field.
    """
    return _load(name_or_file, ())


def _load(name_or_file: str | os.PathLike, extended_by: tuple[Path, ...]) -> dict[str, dict[str, Any]]:
    path = FOLDER / f"{name_or_file}.yaml" if name_or_file in PRESETS else Path(name_or_file)
    if not path.is_file():
        raise ValueError(f"{name_or_file}: not a preset ({', '.join(PRESETS)}) or a file")
    if path.resolve() in extended_by:
        raise ValueError(f"{path}: extends itself")
    given = _read_yaml(path)
    parent = given.pop("extends", None) if isinstance(given, dict) else None
    if not isinstance(given, dict) or not all(isinstance(fields, dict) for fields in given.values()):
        raise ValueError(f"{path}: must contain sections ({', '.join(SECTIONS)}) of fields")
    if not isinstance(parent, str | None):
        raise ValueError(f"{path}: `extends` must be the name of a preset or file, got {parent!r}")

    preset = {section: {} for section in SECTIONS} if parent is None else _load(parent, (*extended_by, path.resolve()))
    for section, fields in given.items():
        _check_name(section, SECTIONS, f"{path}: there is no section")
        for field in fields:
            _check_name(field, SECTIONS[section], f"{path}: `{section}` has no field")
        preset[section].update(fields)
    return preset


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text ({error})") from None
    # ValueError: a date that does not exist. RecursionError: brackets nested too deeply
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not YAML ({one_line(error)})") from None


def _check_name(name: Any, known: Iterable[str], message: str) -> None:
    if name not in known:
        raise ValueError(f"{message} {name!r}{suggest(str(name), known)}")


def suggest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" for the known name that is closest, or "" if none is close."""
    nearest = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {nearest[0]}?" if nearest else ""
