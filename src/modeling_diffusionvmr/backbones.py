"""Frozen backbones: frames and sentences -> features, each with its own transform and tokenizer."""

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer, PreTrainedConfig
from transformers.utils import cached_file


class ClipBackbone:
    """
    CLIP as the released features were made with it: a clip is the projected embedding of one frame, a token the last
    hidden state of the text encoder.

    Args:
        model: a `CLIPModel`; it is frozen, and put in eval mode.
        image_processor: Pillow's, since torchvision resizes to other pixels than CLIP was trained on.
        tokenizer: a `CLIPTokenizer`.
    """

    def __init__(self, model: CLIPModel, image_processor: CLIPImageProcessorPil, tokenizer: CLIPTokenizer):
        self.model = model.eval().requires_grad_(False)
        self.image_processor = image_processor
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, path_or_id: str | os.PathLike, subfolder: str = "", **hub_kwargs) -> "ClipBackbone":
        """Loads a standard CLIP checkpoint; raises `OSError` where there is none."""
        parts = (CLIPModel, CLIPImageProcessorPil, CLIPTokenizer)
        return cls(*(part.from_pretrained(path_or_id, subfolder=subfolder, **hub_kwargs) for part in parts))

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes a standard CLIP checkpoint."""
        for part in (self.model, self.image_processor, self.tokenizer):
            part.save_pretrained(folder)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "ClipBackbone":
        """Moves the model in place."""
        self.model.to(device=device, dtype=dtype)
        return self

    @property
    def feature_size(self) -> int:
        """Numbers a clip."""
        return self.model.config.projection_dim

    @property
    def text_feature_size(self) -> int:
        """Numbers a token."""
        return self.model.config.text_config.hidden_size

    @torch.inference_mode()
    def encode_frames(self, frames: Sequence[np.ndarray]) -> np.ndarray:
        """One batch: F frames (H, W, 3) uint8 RGB -> (F, feature_size) float32."""
        inputs = self.image_processor(images=list(frames), input_data_format="channels_last", return_tensors="pt")
        pixel_values = inputs["pixel_values"].to(self.model.device, self.model.dtype)
        return self.model.get_image_features(pixel_values=pixel_values).pooler_output.float().cpu().numpy()

    def encode_video(self, frames: Iterable[np.ndarray], batch_size: int = 32) -> np.ndarray:
        """
        Frames (H, W, 3) uint8 RGB, one a clip -> (num_clips, feature_size) float32.

        Raises:
            ValueError: when there are no frames.
        """
        return _encode_frames([self], frames, batch_size)[0]

    @torch.inference_mode()
    def encode_text(self, sentences: Sequence[str], max_tokens: int | None = None) -> list[np.ndarray]:
        """
        Each sentence alone, from its start token to its end token -> (tokens, text_feature_size) float32.

        Args:
            sentences: in any number.
            max_tokens: a longer sentence is cut with a warning, and keeps its end token; at most, and by default, what
                CLIP can read.

        Raises:
            ValueError: for a sentence that is empty or no string.
        """
        limit = self.model.config.text_config.max_position_embeddings
        limit = limit if max_tokens is None else min(limit, max_tokens)
        features = []
        for sentence in sentences:
            if not isinstance(sentence, str) or not sentence.strip():
                raise ValueError(f"a query must be a sentence, got {sentence!r}")
            tokens = len(self.tokenizer(sentence, verbose=False)["input_ids"])
            if tokens > limit:
                warnings.warn(f"a query of {tokens} tokens is cut to {limit}: {sentence[:60]!r}...", stacklevel=2)
            inputs = self.tokenizer(sentence, truncation=True, max_length=limit, return_tensors="pt")
            hidden = self.model.text_model(input_ids=inputs["input_ids"].to(self.model.device)).last_hidden_state
            features.append(hidden[0].float().cpu().numpy())
        return features


BACKBONE_CLASSES = {"clip": ClipBackbone}  # by the `model_type` of their checkpoints


def load_backbone(
    path_or_id: str | os.PathLike,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **hub_kwargs,
) -> ClipBackbone:
    """
    Loads one backbone from a folder or the Hub: a complete standard checkpoint, with its image processor and tokenizer.

    Raises:
        ValueError: for a model of a type that is not known here.
        OSError: when it is neither a folder of a checkpoint nor a model that can be had.
    """
    try:
        model_type = PreTrainedConfig.get_config_dict(path_or_id, **hub_kwargs)[0].get("model_type")
        if model_type in BACKBONE_CLASSES:
            return BACKBONE_CLASSES[model_type].from_pretrained(path_or_id, **hub_kwargs).to(device, dtype)
    except OSError as error:
        reason = " ".join(str(error).split())
        raise OSError(f"{path_or_id}: neither a checkpoint's folder nor a model that can be had ({reason})") from error
    raise ValueError(f"{path_or_id}: its type is {model_type}; backbones are of {', '.join(BACKBONE_CLASSES)}")


class Backbones:
    """
    The backbones of one model, in the order in which their features are concatenated.

    Args:
        descriptions: the config's `backbones`.
        models: one a description.

    Raises:
        ValueError: for a backbone that gives other sizes than its description says, and where the lengths of clips
            differ, since one pass over the frames serves all.
    """

    def __init__(self, descriptions: Sequence[Mapping[str, Any]], models: Sequence[ClipBackbone]):
        self.descriptions = [dict(description) for description in descriptions]
        self.models = list(models)
        for description, model in zip(self.descriptions, self.models, strict=True):
            for key in ("feature_size", "text_feature_size"):
                if key in description and description[key] != getattr(model, key):
                    raise ValueError(
                        f"backbone {description['name']}: its `{key}` is {getattr(model, key)}, "
                        f"but the config says {description[key]}"
                    )
        lengths = {d["clip_seconds"] for d in self.descriptions if "feature_size" in d}
        if len(lengths) > 1:
            raise ValueError(f"backbones with clips of {sorted(lengths)} seconds cannot read one pass over the frames")
        self.clip_seconds = lengths.pop() if lengths else None

    def _that_give(self, key: str) -> list[ClipBackbone]:
        return [model for description, model in zip(self.descriptions, self.models) if key in description]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Backbones":
        """Moves all models in place."""
        for model in self.models:
            model.to(device, dtype)
        return self

    def encode_video(self, frames: Iterable[np.ndarray], batch_size: int = 32) -> list[np.ndarray]:
        """
        One pass over frames (H, W, 3) uint8 RGB, one a clip -> an array (num_clips, feature_size) a video backbone.

        Raises:
            ValueError: when there are no frames.
        """
        return _encode_frames(self._that_give("feature_size"), frames, batch_size)

    def encode_text(self, sentences: Sequence[str], max_tokens: int | None = None) -> list[np.ndarray]:
        """
        An array (tokens, all text_feature_sizes) a sentence, see `ClipBackbone.encode_text`.

        Raises:
            ValueError: for an empty sentence, and for one that the text backbones split into different tokens.
        """
        by_backbone = [model.encode_text(sentences, max_tokens) for model in self._that_give("text_feature_size")]
        features = []
        for sentence, arrays in zip(sentences, zip(*by_backbone)):
            if len({len(array) for array in arrays}) > 1:
                raise ValueError(f"the text backbones do not agree on the tokens of {sentence!r}")
            features.append(np.concatenate(arrays, axis=1))
        return features

    def save_pretrained(self, checkpoint: str | os.PathLike) -> list[dict[str, Any]]:
        """Writes each into a folder of its name inside the checkpoint; returns the config's `backbones` for it."""
        for description, model in zip(self.descriptions, self.models):
            model.save_pretrained(os.path.join(checkpoint, description["name"]))
        return [{**description, "id": description["name"]} for description in self.descriptions]


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def _encode_frames(models: Sequence[ClipBackbone], frames: Iterable[np.ndarray], batch_size: int) -> list[np.ndarray]:
    batches = [[model.encode_frames(batch) for model in models] for batch in _batches(frames, batch_size)]
    if not batches:
        raise ValueError("there are no frames to encode, at least one is needed")
    return [np.concatenate(parts) for parts in zip(*batches)]


def _locate(
    identifier: str, checkpoint: str | os.PathLike | None, hub_kwargs: dict[str, Any]
) -> tuple[str | os.PathLike, dict[str, Any]]:
    """The arguments of `from_pretrained`: a folder inside the checkpoint comes before a model on the Hub."""
    if checkpoint is not None:
        inside = cached_file(
            checkpoint, "config.json", subfolder=identifier, _raise_exceptions_for_missing_entries=False, **hub_kwargs
        )
        if inside is not None:
            return checkpoint, {**hub_kwargs, "subfolder": identifier}
    # A revision is the checkpoint's, and means nothing in another repository
    return identifier, {key: value for key, value in hub_kwargs.items() if key != "revision"}


def load_backbones(
    config: PreTrainedConfig,
    checkpoint: str | os.PathLike | None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **hub_kwargs,
) -> Backbones:
    """
    Loads the backbones that a model's features come from.

    Args:
        config: a `DiffusionVMRConfig`, for its `backbones`.
        checkpoint: the model's folder or Hub id, in which an `id` that is a folder is looked for first.
        device, dtype: of the loaded models.
        hub_kwargs: `token`, `revision` (of the checkpoint), `cache_dir`, `local_files_only`.

    Raises:
        ValueError: when the config names no backbones, or some that cannot be run (no `id`, or a type that is not known
            here), all of which it names; and for those that `Backbones` refuses.
        OSError: when an `id` is neither a folder in the checkpoint nor a model that can be had.
    """
    if not config.backbones:
        raise ValueError("the config names no `backbones`, so the model reads features only, no video and no sentences")
    places, cannot_run = [], []
    for description in config.backbones:
        model_type = "no `id`"
        if description.get("id") is not None:
            where, kwargs = _locate(description["id"], checkpoint, hub_kwargs)
            model_type = PreTrainedConfig.get_config_dict(where, **kwargs)[0].get("model_type")
            places.append((model_type, where, kwargs))
        if model_type not in BACKBONE_CLASSES:
            cannot_run.append(f"{description['name']} ({model_type})")
    if cannot_run:
        raise ValueError(
            f"these backbones cannot be run here: {', '.join(cannot_run)}; give the model their features instead"
        )
    models = [BACKBONE_CLASSES[model_type].from_pretrained(where, **kwargs) for model_type, where, kwargs in places]
    return Backbones(config.backbones, models).to(device, dtype)
