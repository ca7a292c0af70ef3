"""Register and load the frozen backbones that encode videos and sentences, and use those of a model together."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from .base_backbone import Backbone, encode_video
from .dual_encoders import ClipBackbone, Siglip2Backbone, SiglipBackbone
from .json_files import naming_json
from .messages import one_line
from .slowfast import SlowFastBackbone
from .video import Video

BACKBONE_CLASSES: dict[str, type[Backbone]] = {
    "clip": ClipBackbone,
    "siglip": SiglipBackbone,
    "siglip2": Siglip2Backbone,
    "slowfast": SlowFastBackbone,
}
"""Classes by `model_type` in the backbone's `config.json`."""


def register_backbone(model_type: str, backbone_class: type[Backbone]) -> None:
    """
    Register the class that loads backbones whose `config.json` has this `model_type`. It replaces the class that the
    type had before, even one of this package. See docs/how_to/use_your_own_backbone.md.

    Raises:
        TypeError: if `model_type` is not a string, or the class is not a subclass of `Backbone`.
    """
    if not isinstance(model_type, str) or not model_type:
        raise TypeError(f"a model type must be a string that is not empty, got {model_type!r}")
    if not (isinstance(backbone_class, type) and issubclass(backbone_class, Backbone)):
        raise TypeError(f"a backbone must be a subclass of `Backbone`, got {backbone_class!r}")
    BACKBONE_CLASSES[model_type] = backbone_class


def what_is_supported() -> str:
    """Return the part of an error message that lists the supported types and says how to add one."""
    return (
        f"supported: {', '.join(BACKBONE_CLASSES)}; a class for another type is not part of a checkpoint: install "
        "modeling_diffusionvmr, and run the code that registers it with `register_backbone`"
    )


def load_backbone(
    path_or_id: str | os.PathLike,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **hub_kwargs,
) -> Backbone:
    """
    Load one backbone.

    Args:
        path_or_id: folder or Hub id of a complete checkpoint.
        device, dtype: where to move the model, and its type. `None` leaves them as they were loaded.
        hub_kwargs: options of the Hub, such as `revision`, `token`, `cache_dir` and `local_files_only`.

    Raises:
        ValueError: if the model type is not supported, weights are missing or not finite, or the parts do not fit
            together.
        OSError: if there is no such checkpoint, or a part of it is missing.
        ImportError: if it needs a package that is not installed.
    """
    try:
        model_type = model_type_of(path_or_id, **hub_kwargs)
    except OSError as error:
        if os.path.isdir(path_or_id):
            raise OSError(f"{path_or_id}: could not be loaded ({one_line(error)})") from error
        raise OSError(
            f"{path_or_id}: not a checkpoint folder, and it could not be loaded from the Hub ({one_line(error)})"
        ) from error
    if model_type not in BACKBONE_CLASSES:
        raise ValueError(
            f"{path_or_id}: model type {model_type} is not supported as a backbone ({what_is_supported()})"
        )
    return load_backbone_of_type(model_type, path_or_id, **hub_kwargs).to(device, dtype)


def model_type_of(path_or_id: str | os.PathLike, **hub_kwargs) -> str:
    """Return the `model_type` in the config.json of a backbone. See `load_backbone`."""
    with naming_json(path_or_id, **hub_kwargs):
        return str(PreTrainedConfig.get_config_dict(path_or_id, **hub_kwargs)[0].get("model_type"))


def load_backbone_of_type(model_type: str, path_or_id: str | os.PathLike, **hub_kwargs) -> Backbone:
    """Load a backbone of a type in `BACKBONE_CLASSES`. See `load_backbone`."""
    with naming_json(path_or_id, **hub_kwargs):
        return BACKBONE_CLASSES[model_type].from_pretrained(path_or_id, **hub_kwargs)


class Backbones:
    """
    The backbones of one model, in the order in which their features are concatenated.

    Args:
        descriptions: `backbones` of the configuration.
        models: one model per description.
        places: where each model was loaded from, for error messages.

    Raises:
        ValueError: if a model's feature sizes differ from its description, or if the backbones differ in clip length:
            their features are concatenated clip by clip.
    """

    def __init__(
        self,
        descriptions: Sequence[Mapping[str, Any]],
        models: Sequence[Backbone],
        places: Sequence[str | os.PathLike] | None = None,
    ):
        self.descriptions = [dict(description) for description in descriptions]
        self.models = list(models)
        for index, (description, model) in enumerate(zip(self.descriptions, self.models, strict=True)):
            for key in ("feature_size", "text_feature_size"):
                if key in description and description[key] != getattr(model, key):
                    place = f" in {places[index]}" if places else ""
                    raise ValueError(
                        f"backbone {description['name']}: `{key}` is {description[key]} in the model's config, "
                        f"but {getattr(model, key)} for the backbone{place}"
                    )
        lengths = {d["clip_seconds"] for d in self.descriptions if "feature_size" in d}
        if len(lengths) > 1:
            raise ValueError(f"all backbones must have the same `clip_seconds`, got {sorted(lengths)}")
        self.clip_seconds: Any = lengths.pop() if lengths else None  # `None` if no backbone reads video

    def _models_with(self, key: str) -> list[Backbone]:
        return [model for description, model in zip(self.descriptions, self.models) if key in description]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Backbones":
        """Move all models in place."""
        for model in self.models:
            model.to(device, dtype)
        return self

    def encode_video(
        self,
        video: Video,
        batch_size: int = 32,
        progress: bool = False,
        advance: Callable[[float], None] | None = None,
    ) -> list[np.ndarray]:
        """
        Encode a video with all video backbones in one decoding. See `base_backbone.encode_video`.

        Returns:
            One array (num_clips, feature_size) float32 per video backbone.
        """
        return encode_video(self._models_with("feature_size"), video, batch_size, progress, advance)

    def encode_text(self, sentences: Sequence[str], max_tokens: int | None = None) -> list[np.ndarray]:
        """
        Encode sentences, see `Backbone.encode_text`.

        Returns:
            One array (tokens, sum of the text_feature_sizes) per sentence.

        Raises:
            ValueError: if a sentence is invalid, or if the backbones split it into different numbers of tokens.
        """
        by_backbone = [model.encode_text(sentences, max_tokens) for model in self._models_with("text_feature_size")]
        features = []
        for sentence, arrays in zip(sentences, zip(*by_backbone)):
            if len({len(array) for array in arrays}) > 1:
                raise ValueError(f"the text backbones split {sentence!r} into different numbers of tokens")
            features.append(np.concatenate(arrays, axis=1))
        return features

    def save_pretrained(self, checkpoint: str | os.PathLike) -> list[dict[str, Any]]:
        """Save each backbone in a subfolder of the checkpoint. Return the `backbones` for its configuration."""
        for description, model in zip(self.descriptions, self.models):
            model.save_pretrained(os.path.join(checkpoint, description["name"]))
        return [in_folder(description) for description in self.descriptions]


def in_folder(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description of a backbone that is saved inside the checkpoint, in a folder of its name."""
    rest = {key: value for key, value in description.items() if key not in ("name", "folder", "id")}
    return {"name": description["name"], "folder": description["name"], **rest}
