"""
What a checkpoint contains besides the model: its backbones and its processor.

An entry of `backbones` in the configuration names a folder inside the checkpoint, or a model on the Hub. A model in
memory may also have `backbone_sources`, local folders by the name of a backbone. These are not part of the
configuration, so that no path of this machine is saved: `save_backbones` copies them into the checkpoint.
"""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.utils import cached_file

from .backbones import (
    BACKBONE_CLASSES,
    Backbones,
    in_folder,
    load_backbone,
    load_backbone_of_type,
    model_type_of,
    what_is_supported,
)
from .messages import one_line
from .processing_diffusionvmr import DiffusionVMRProcessor
from .weights import check_weight_index

HUB_ARGUMENTS = ("token", "revision", "cache_dir", "local_files_only")
"""Arguments of `from_pretrained` that also apply to the backbones and the processor of a checkpoint."""

MAX_COPIED_BYTES = 50_000_000  # larger backbones stay on the Hub


def load_backbones(
    config: PreTrainedConfig,
    checkpoint: str | os.PathLike | None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    sources: Mapping[str, str | os.PathLike] | None = None,
    **hub_kwargs,
) -> Backbones:
    """
    Load the backbones that produce a model's features.

    Args:
        config: a `DiffusionVMRConfig` with `backbones`.
        checkpoint: the model's folder or Hub id, in which `folder` is looked up.
        device, dtype: device and dtype of the loaded models.
        sources: local folders to load backbones from instead, by name.
        hub_kwargs: `token`, `revision` (of the checkpoint), `cache_dir`, `local_files_only`.

    Raises:
        ValueError: if the configuration has no backbones, if some cannot be run because they have no `folder` or `id`
            or are of an unsupported type (the message names all of them), if weights are missing or NaN, or if they do
            not fit together (see `Backbones`).
        OSError: if a backbone is not where the configuration says. The message names it.
    """
    if not config.backbones:
        raise ValueError("the config has no `backbones`: the model takes features, not videos and sentences")
    places, cannot_run = [], []
    found = [(entry, find_backbone(entry, checkpoint, sources or {}, hub_kwargs)) for entry in config.backbones]
    all_can_run = all(place is not None for _, place in found)
    for description, place in found:
        if "id" in description and not all_can_run:
            continue  # do not ask the Hub for something that cannot be used
        model_type = "features only"
        if place is not None:
            path_or_id, kwargs = place
            model_type = _model_type(description["name"], path_or_id, kwargs)
            places.append((model_type, path_or_id, kwargs))
        if model_type not in BACKBONE_CLASSES:
            cannot_run.append(f"{description['name']} ({model_type})")
    if cannot_run:
        hint = (
            f" ({what_is_supported()})"
            if any(model_type not in BACKBONE_CLASSES for model_type, _, _ in places)
            else ""
        )
        raise ValueError(
            f"these backbones cannot be run: {', '.join(cannot_run)}; pass their features to the model instead{hint}"
        )
    models = [load_backbone_of_type(model_type, where, **kwargs) for model_type, where, kwargs in places]
    names = [os.path.join(where, kwargs.get("subfolder", "")).rstrip(os.sep) for _, where, kwargs in places]
    return Backbones(config.backbones, models, names).to(device, dtype)


def origin_of(model) -> str | None:
    """
    Return the folder or Hub id that a model was loaded from, or `None` if there is none. A folder that is gone since
    must not be taken for a Hub id: `runs/1` could be a repository of somebody else.
    """
    name = model.config.name_or_path
    is_on_hub = model.hub_id is not None or getattr(model.config, "_commit_hash", None) is not None
    return name if name and (is_on_hub or os.path.isdir(name)) else None


def _model_type(name: str, path_or_id: str | os.PathLike, kwargs: Mapping[str, Any]) -> str:
    try:
        return model_type_of(path_or_id, **kwargs)
    except OSError as error:
        raise OSError(f"backbone `{name}` could not be loaded from {path_or_id} ({one_line(error)})") from error


def find_backbone(
    description: Mapping[str, Any],
    checkpoint: str | os.PathLike | None,
    sources: Mapping[str, str | os.PathLike],
    hub_kwargs: Mapping[str, Any],
) -> tuple[str | os.PathLike, dict[str, Any]] | None:
    """
    Return the arguments of `from_pretrained` for one backbone, or `None` if it cannot be run. See `load_backbones`.

    Raises:
        FileNotFoundError: if the checkpoint lacks the folder of the backbone.
        ValueError: if the folder refers to files outside of the checkpoint.
    """
    name, folder = description["name"], description.get("folder")
    if name in sources:
        return sources[name], {}
    if folder is None:
        # The revision belongs to the checkpoint and does not apply to another repository
        kwargs = {key: value for key, value in hub_kwargs.items() if key != "revision"}
        return (description["id"], kwargs) if "id" in description else None
    if checkpoint is not None and os.path.isdir(checkpoint):
        path = Path(checkpoint, folder)
        if (path / "config.json").is_file():
            _check_inside(path, Path(checkpoint))
            return path, {}
    elif checkpoint is not None and cached_file(
        checkpoint, "config.json", subfolder=folder, _raise_exceptions_for_missing_entries=False, **hub_kwargs
    ):
        return checkpoint, {**hub_kwargs, "subfolder": folder}
    raise FileNotFoundError(
        f"{checkpoint or 'the model'} lacks backbone `{folder}`; pass `backbones=` or save it with the model"
    )


def check_backbones(config: PreTrainedConfig, checkpoint: str | os.PathLike) -> None:
    """Raise OSError or ValueError unless a checkpoint has all backbones that should be in it, with their weights."""
    for description in config.backbones or []:
        if "folder" in description:
            path_or_id, kwargs = find_backbone(description, checkpoint, {}, {})  # type: ignore[misc]  # not None
            load_backbone(path_or_id, **kwargs)


def folder_of_backbone(description: Mapping[str, Any], checkpoint: str | os.PathLike) -> str:
    """Return the local folder of a loaded backbone, or its Hub id if it is not in the checkpoint."""
    place = find_backbone(description, checkpoint, {}, {})
    if place is None:
        raise ValueError(f"backbone {description['name']} cannot be run")
    path_or_id, kwargs = place
    if not kwargs.get("subfolder"):
        return str(path_or_id)
    return os.path.dirname(str(cached_file(path_or_id, "config.json", **kwargs)))


def _check_inside(folder: Path, checkpoint: Path) -> None:
    """Raise ValueError if a folder of a checkpoint refers to files outside of it."""
    root = checkpoint.resolve()
    if root.parent.name == "snapshots":  # in the cache of the Hub, files are links into the folder of the repository
        root = root.parent.parent
    for path in (folder, *sorted(folder.rglob("*"))):
        if not path.resolve().is_relative_to(root):
            raise ValueError(f"{path}: a link that leaves the checkpoint; copy the file or folder instead")
    check_weight_index(folder)


def save_backbones(model, folder: str | os.PathLike, loaded: Backbones | None = None) -> list[dict[str, Any]] | None:
    """
    Save the backbones of a model in a checkpoint: those that are in a local folder or in another checkpoint, and those
    on the Hub that have been downloaded and are small.

    Args:
        model: a `DiffusionVMRForMomentRetrieval`.
        folder: the checkpoint to write.
        loaded: save all of these instead.

    Returns:
        `backbones` for the configuration in the checkpoint.
    """
    if loaded is not None:
        return loaded.save_pretrained(folder)
    return model.config.backbones and [_save_backbone(entry, model, folder) for entry in model.config.backbones]


def _save_backbone(description: dict[str, Any], model, folder: str | os.PathLike) -> dict[str, Any]:
    name = description["name"]
    try:
        place = find_backbone(description, origin_of(model), model.backbone_sources, model.hub_kwargs)
        if place is None or ("id" in description and not _is_small_and_cached(*place)):
            return description
        path_or_id, kwargs = place
        if os.path.realpath(path_or_id) == os.path.realpath(os.path.join(folder, name)):
            return in_folder(description)
        size = _size_of_folder(path_or_id)
        if size >= MAX_COPIED_BYTES:
            warnings.warn(f"backbone `{name}` is copied into the checkpoint: {size / 1e6:,.0f} MB", stacklevel=4)
        backbone = load_backbone(path_or_id, **kwargs)
    # A backbone that has disappeared or is damaged, whatever that raises, must not cost the weights of a training
    except Exception as error:
        warnings.warn(f"saved without backbone `{name}`: {one_line(error)}", stacklevel=4)
        return description
    backbone.save_pretrained(os.path.join(folder, name))
    return in_folder(description)


def _size_of_folder(path_or_id: str | os.PathLike) -> int:
    """Return the number of bytes in a local folder, or 0 if there is none."""
    return sum(path.stat().st_size for path in Path(path_or_id).rglob("*") if path.is_file())


def _is_small_and_cached(path_or_id: str | os.PathLike, kwargs: Mapping[str, Any]) -> bool:
    weights = cached_file(
        path_or_id,
        "model.safetensors",
        cache_dir=kwargs.get("cache_dir"),
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return weights is not None and os.path.getsize(weights) < MAX_COPIED_BYTES


def save_processor(model, folder: str | os.PathLike) -> None:
    """
    Save a processor that fits the model, unless the folder has one: the processor that the model was loaded beside, or
    else a new one.
    """
    processor = _saved_processor(folder, model.config, {})
    if processor is not None:
        return
    if (origin := origin_of(model)) is not None:
        processor = _saved_processor(origin, model.config, model.hub_kwargs)
    if processor is None:
        config = model.config
        sizes = [entry["feature_size"] for entry in config.backbones or [] if "feature_size" in entry]
        processor = DiffusionVMRProcessor(
            sizes or [config.video_feature_size], config.text_feature_size, config.max_clips, config.max_tokens
        )
    if model._auto_class is not None:
        processor.register_for_auto_class()
    processor.save_pretrained(folder)


def _saved_processor(
    path_or_id: str | os.PathLike, config: PreTrainedConfig, hub_kwargs: Mapping[str, Any]
) -> DiffusionVMRProcessor | None:
    """Return the processor of a checkpoint if there is one with the feature sizes of `config`."""
    try:
        processor = DiffusionVMRProcessor.from_pretrained(path_or_id, **hub_kwargs)
    except (OSError, ValueError):
        return None
    return processor if _fits(processor, config) else None


def check_processor(processor: DiffusionVMRProcessor, config: PreTrainedConfig, name: str) -> None:
    """
    Raise ValueError unless a processor fits a model. The message begins with `name`.

    Where a checkpoint has no processor, `transformers` makes one with the default sizes.
    """
    if not _fits(processor, config):
        raise ValueError(
            f"{name}: the model and processor_config.json have different feature sizes, or there is no such file"
        )


def _fits(processor: DiffusionVMRProcessor, config: PreTrainedConfig) -> bool:
    found = (sum(processor.video_feature_sizes), processor.text_feature_size)
    return found == (config.video_feature_size, config.text_feature_size)
