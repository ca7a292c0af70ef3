"""
Training settings as flags: every field of the configuration, the processor and the training arguments.

A preset gives the defaults, and flags override them.
"""

import argparse
import inspect
from collections.abc import Callable, Sequence
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from ..configuration_diffusionvmr import DiffusionVMRConfig
from ..processing_diffusionvmr import DiffusionVMRProcessor
from ..training.arguments import DiffusionVMRTrainingArguments
from ..training.presets import PRESETS, SECTIONS, load_preset, suggest
from .options import CommandParser

DEFAULT_PRESET = "default"
# Feature sizes come from the data and backbones from the preset, and the model always has an encoder and a decoder
NO_FLAGS = ("backbones", "is_encoder_decoder", "video_feature_size", "video_feature_sizes", "text_feature_size")
TYPE_NAMES = {float: "a number", int: "a whole number", bool: "true or false", NoneType: "null"}


class SettingsParser(CommandParser, HfArgumentParser):
    """
    A parser with one flag per setting. If the configuration and the processor have a field of the same name, one flag
    sets both. Callers may add flags of their own before they call `parse_settings`.

    Args:
        command: the subcommand whose `--help` errors refer to.
        argv: the arguments. `--preset` is read immediately, since it gives the defaults of the other flags.
        options: options of `argparse.ArgumentParser`.
    """

    def __init__(self, command: str, argv: Sequence[str], **options):
        options["dataclass_types"] = DiffusionVMRTrainingArguments  # `HfArgumentParser` adds their flags
        super().__init__(command, formatter_class=_HelpFormatter, **options)
        self.argv = list(argv)
        self.hints = get_type_hints(DiffusionVMRTrainingArguments)
        self._complete_training_flags()
        self._add_fields("config", DiffusionVMRConfig)
        self._add_fields("processor", DiffusionVMRProcessor)
        self.hints["hold_out"] = float | None
        self.add_argument("--hold_out", type=_or_null(float), help="share of the training videos to evaluate on")
        self.add_argument("--preset", default=DEFAULT_PRESET, help=f"{', '.join(PRESETS)}, or a YAML file")
        self.preset = self._load_preset()

    def parse_settings(self) -> argparse.Namespace:
        """
        Parse the arguments. If they are invalid, end the process with a one-line error.

        Returns:
            `config`, `processor` and `training`: dicts of the fields that the preset or the command line sets;
            `given`: the names of the flags on the command line; and every other flag, such as `preset`, `hold_out` and
            `output_dir`.
        """
        parsed, unknown = self.parse_known_args(self.argv)
        if unknown:
            self.error(self._describe_unknown(unknown[0]))
        # Arguments on the command line replace the mark, defaults do not
        mark = object()
        marked, _ = self.parse_known_args(self.argv, argparse.Namespace(**dict.fromkeys(vars(parsed), mark)))
        given = {name for name, value in vars(marked).items() if value is not mark}

        options, sections = dict(vars(parsed)), {}
        for section in ("config", "processor", "training"):
            changes = {field: getattr(parsed, field) for field in SECTIONS[section] if field in given}
            sections[section] = {**self.preset[section], **changes}
            for field in SECTIONS[section]:
                options.pop(field, None)
        return argparse.Namespace(**options, **sections, given=given)

    def _complete_training_flags(self) -> None:
        """Allow boolean flags without a value, and null for optional fields. `HfArgumentParser` allows neither."""
        for action in self._actions:
            if action.type is string_to_bool:
                action.nargs, action.const = "?", True
            if callable(action.type) and NoneType in _types_of(self.hints.get(action.dest)):
                action.type = _or_null(action.type)

    def _add_fields(self, section: str, owner: type) -> None:
        """Add a flag for each field of a section that has none yet."""
        group = self.add_argument_group(f"{section} (fields of {owner.__name__})")
        parameters = inspect.signature(owner).parameters
        for name in SECTIONS[section]:
            if name in NO_FLAGS or name in self.hints:
                continue
            hint = self.hints[name] = parameters[name].annotation
            kind, *others = _types_of(hint)
            convert = _or_null(kind) if NoneType in others else kind
            group.add_argument(f"--{name}", type=convert, default=parameters[name].default, help=_describe(hint))

    def _load_preset(self) -> dict[str, dict[str, Any]]:
        """Load the preset of the arguments, and make its values the defaults of the flags."""
        parser = CommandParser(add_help=False)
        parser.prog = self.prog
        parser.add_argument("--preset", default=DEFAULT_PRESET)
        name = parser.parse_known_args(self.argv)[0].preset
        try:
            preset = load_preset(name)
        except (ValueError, OSError) as error:
            self.error(str(error))
        for fields in preset.values():
            for field, value in fields.items():
                if field in self.hints:
                    if not _accepts(self.hints[field], value):
                        self.error(f"{name}: `{field}` must be {_describe(self.hints[field])}, got {value!r}")
                    self.set_defaults(**{field: value})
        return preset

    def _describe_unknown(self, argument: str) -> str:
        flag = argument.partition("=")[0]
        if not flag.startswith("--"):
            return f"unexpected value {argument!r}: no --flag before it"
        return f"unknown flag {flag}{suggest(flag, self._option_string_actions)}"


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the default of every flag that has one, unless the help text names it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or "(default:" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def _types_of(hint: Any) -> list[Any]:
    """Return the types that a field accepts. `float` includes `int`."""
    is_union = isinstance(hint, UnionType) or get_origin(hint) is Union
    types = list(get_args(hint)) if is_union else [hint]
    return [kind for kind in types if kind is not int or float not in types]


def _describe(hint: Any) -> str:
    return " or ".join(TYPE_NAMES[kind] for kind in _types_of(hint))


def _accepts(hint: Any, value: Any) -> bool:
    """Return whether a preset may set a field to a value. Only numbers and booleans are checked here."""
    types = _types_of(hint)
    if any(kind not in TYPE_NAMES for kind in types):
        return True
    return type(value) in types or (type(value) is int and float in types)


def _or_null(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return an argparse type that also accepts "null", as in YAML."""

    def convert_or_null(text: str) -> Any:
        return None if text == "null" else convert(text)

    convert_or_null.__name__ = convert.__name__  # argparse names it in errors
    return convert_or_null
