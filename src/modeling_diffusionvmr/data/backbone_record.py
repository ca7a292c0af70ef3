"""Which backbones computed some features: what a model needs to know in order to run on videos."""

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..configuration_diffusionvmr import HUB_ID
from .features import name_of

TRAINING_FOLDER = re.compile(r"checkpoint-\d+|last-checkpoint")
SIZES = ("feature_size", "text_feature_size", "clip_seconds")


def absolute(backbone: str | os.PathLike) -> str:
    """Return the absolute path of a backbone's folder, or its Hub id unchanged."""
    return os.path.realpath(backbone) if os.path.isdir(backbone) else str(backbone)


def describe_backbones(
    video_features: Sequence[Mapping],
    text_features: Mapping,
    video_sizes: Sequence[int],
    text_size: int,
    clip_seconds: float | None = None,
    known: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """
    Describe the backbones that computed the features of a training.

    Args:
        video_features: one store per video backbone. Its `backbone` says what computed it, if the files record it.
        text_features: the store of the sentences.
        video_sizes, text_size: sizes of their vectors.
        clip_seconds: length of a clip, where a store does not state it.
        known: descriptions to use for features that do not record their backbone, if the sizes agree: those of a preset
            or of the checkpoint that training starts from.

    Returns:
        `backbones` for the configuration, and `backbone_sources` for the model: local folders by name.
    """
    known_video = [entry for entry in known or [] if "feature_size" in entry]
    known_text = [entry for entry in known or [] if "text_feature_size" in entry]
    if [entry["feature_size"] for entry in known_video] != list(video_sizes):
        known_video = []
    if sum(entry["text_feature_size"] for entry in known_text) != text_size:
        known_text = []

    parts = []  # where each backbone is, and the sizes of its features
    for index, (store, size) in enumerate(zip(video_features, video_sizes)):
        known_entry = known_video[index] if known_video else {}
        seconds = getattr(store, "clip_seconds", None) or clip_seconds or known_entry.get("clip_seconds")
        sizes = {"feature_size": size} | ({} if seconds is None else {"clip_seconds": seconds})
        parts.append((_recorded(store, known_entry) or _place(known_entry) or _unknown(store), sizes))
    recorded = _recorded(text_features, known_text[0] if len(known_text) == 1 else {})
    if recorded is None and known_text:
        parts += [(_place(entry), {"text_feature_size": entry["text_feature_size"]}) for entry in known_text]
    else:
        parts.append((recorded or _unknown(text_features), {"text_feature_size": text_size}))

    backbones: list[dict[str, Any]] = []
    for place, sizes in parts:
        same = [entry for entry in backbones if _place(entry) == place and not entry.keys() & sizes.keys()]
        if same:
            same[0].update(sizes)
        else:
            backbones.append({**place, **sizes})
    return backbones, _name(backbones)


def _place(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in SIZES}


def _recorded(store: Mapping, known: Mapping[str, Any]) -> dict[str, Any] | None:
    """
    Return where the backbone is that computed some features, if they record it. A local folder is a `source`. If it is
    gone, as where features were copied from another machine, it may be the known one: that of the same name.
    """
    if (backbone := getattr(store, "backbone", None)) is None:
        return None
    backbone = absolute(backbone)
    name = _cleaned(Path(backbone).name)
    if os.path.isdir(backbone):
        return {"name": name, "source": backbone}
    if HUB_ID.fullmatch(backbone):
        return {"name": name, "id": backbone}
    is_known = name == known.get("name") and bool({"folder", "id"} & known.keys())
    result = f"assuming backbone `{name}` of the model or preset" if is_known else "so the model will not run on videos"
    warnings.warn(f"{name_of(store)}: computed by {backbone}, which is not here, {result}", stacklevel=4)
    return _place(known) if is_known else {"name": name}


def _unknown(store: Mapping) -> dict[str, Any]:
    return {"name": _cleaned(getattr(store, "column", None) or Path(name_of(store)).name)}


def _cleaned(name: str) -> str:
    """
    Return a name that can be a folder of a checkpoint: letters, digits, "_", "." and "-". It is none of those that
    `Trainer` gives to its checkpoints, since a fine-tuned backbone may be in such a folder.
    """
    name = re.sub(r"[^\w.-]", "_", name).lstrip(".-") or "backbone"
    return f"backbone-{name}" if TRAINING_FOLDER.fullmatch(name) else name


def _name(backbones: list[dict[str, Any]]) -> dict[str, str]:
    """Give each description a name of its own, and a `folder` instead of a `source`. Return the sources by name."""
    names: set[str] = set()
    sources = {}
    for entry in backbones:
        name, number = entry["name"], 2
        while entry["name"] in names:
            entry["name"], number = f"{name}_{number}", number + 1
        names.add(entry["name"])
        if "source" in entry:
            entry["folder"] = entry["name"]
            sources[entry["name"]] = entry.pop("source")
    return sources
