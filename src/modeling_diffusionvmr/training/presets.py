"""A training's settings: published ones from `presets/*.yaml`, and what a command line changes of them."""

import copy
import dataclasses
import difflib
import inspect
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from ..configuration_diffusionvmr import DiffusionVMRConfig
from ..processing_diffusionvmr import DiffusionVMRProcessor

FOLDER = Path(__file__).parent / "presets"
PRESETS = sorted(path.stem for path in FOLDER.glob("*.yaml"))

FLOAT_TAG = "tag:yaml.org,2002:float"
NUMBER = re.compile(r"([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)(e[-+]?[0-9]+)?|[-+]?\.inf|\.nan)$", re.IGNORECASE)

FIELDS = {
    "config": [name for name in DiffusionVMRConfig.__annotations__ if name != "model_type"],
    "processor": [
        name for name in inspect.signature(DiffusionVMRProcessor.__init__).parameters if name not in ("self", "kwargs")
    ],
    "training": [field.name for field in dataclasses.fields(TrainingArguments) if field.name != "output_dir"],
    "trainer": ["proposal_schedule", "proposal_growth"],
    "data": ["hold_out"],
}
"""What each section of a preset may hold. A name that several sections have is set in all of them."""


class _Loader(yaml.SafeLoader):
    """Of YAML 1.2, as people read it: `no`, a strategy's name, is a word, and 1e-4 a number."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:bool", FLOAT_TAG)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(true|false)$", re.IGNORECASE), list("tTfF"))
_Loader.add_implicit_resolver(FLOAT_TAG, NUMBER, list("-+.0123456789"))


def load_preset(name_or_file: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """
    A preset by its name or file, as sections of fields; of one that `extends` another, with what that one sets.

    Raises:
        ValueError: for an unknown preset, or a file that is none; it names the file and the field.
    """
    path = FOLDER / f"{name_or_file}.yaml" if name_or_file in PRESETS else Path(name_or_file)
    if not path.is_file():
        raise ValueError(f"{name_or_file}: neither a preset ({', '.join(PRESETS)}) nor a file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text ({error})") from None
    given = _parsed(text, path)
    if not isinstance(given, dict) or not all(
        isinstance(part, dict) for key, part in given.items() if key != "extends"
    ):
        raise ValueError(f"{path}: must hold sections ({', '.join(FIELDS)}) of fields")
    preset = load_preset(given.pop("extends")) if "extends" in given else {section: {} for section in FIELDS}
    for section, fields in given.items():
        _check_names(section, FIELDS, f"{path}: there is no section")
        for field, value in fields.items():
            _check_names(field, FIELDS[section], f"{path}: `{section}` has no field")
            preset[section][field] = value
    return preset


def override(preset: Mapping[str, Mapping[str, Any]], flags: Iterable[str]) -> dict[str, dict[str, Any]]:
    """
    A preset with what `--field value` and `--field=value` change; values are read as YAML, and a flag alone is true.

    Raises:
        ValueError: for what is no flag, and an unknown field, with the nearest known one.
    """
    preset = copy.deepcopy({section: dict(fields) for section, fields in preset.items()})
    known = [name for names in FIELDS.values() for name in names]
    flags = list(flags)
    while flags:
        field, separator, value = flags.pop(0).partition("=")
        if not field.startswith("--"):
            raise ValueError(f"{field!r} belongs to no flag")
        field = field[2:]
        _check_names(field, known, "there is no field")
        if not separator:
            values = []
            while flags and not flags[0].startswith("--"):
                values.append(flags.pop(0))
            value = " ".join(values) if len(values) < 2 else f"[{', '.join(values)}]"
        parsed = True if value == "" and not separator else _parsed(value, f"--{field}")
        for section, names in FIELDS.items():
            if field in names:
                preset[section][field] = parsed
    return preset


def _parsed(text: str, where: str | os.PathLike) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not YAML ({' '.join(str(error).split())})") from None


def _check_names(name: str, known: Iterable[str], message: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(str(name), list(known), 1)
        raise ValueError(f"{message} {name!r}" + (f"; is it {near[0]!r}?" if near else ""))
