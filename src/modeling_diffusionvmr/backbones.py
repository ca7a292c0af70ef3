"""Frozen backbones that turn frames and sentences into features, each with its own image processor and tokenizer."""

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer, PreTrainedConfig

from .checks import check_sentence
from .messages import one_line
from .weights import check_weight_index, check_weights, missing_weights

NUM_SPECIAL_TOKENS = 3  # all that `CLIPTokenizer` has, without an error, where its files are missing


class ClipBackbone:
    """
    CLIP, used in the same way as for the released features: the projected embedding of one frame per clip, and the last
    hidden states of the text encoder.

    Args:
        model: a `CLIPModel`. It is frozen and set to eval mode.
        image_processor: the Pillow version, because torchvision resizes differently from how CLIP was trained.
        tokenizer: a `CLIPTokenizer`. Its truncation and padding are turned off.
    """

    def __init__(self, model: CLIPModel, image_processor: CLIPImageProcessorPil, tokenizer: CLIPTokenizer):
        self.model = model.eval().requires_grad_(False)
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        # Truncation and padding are state of the tokenizer: a call that sets them is not thread-safe, and they are
        # saved with it. Once they are off, calls that do not ask for them leave them alone.
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()

    @classmethod
    def from_pretrained(cls, path_or_id: str | os.PathLike, subfolder: str = "", **hub_kwargs) -> "ClipBackbone":
        """
        Load a standard CLIP checkpoint.

        Raises:
            OSError: if there is none, or it has no tokenizer.
            ValueError: if weights are missing or not finite, or the tokenizer does not fit the model.
        """
        options = {"subfolder": subfolder, **hub_kwargs}
        where = os.path.join(path_or_id, subfolder) if subfolder else path_or_id
        if os.path.isdir(where):
            check_weight_index(where)
        loaded: Any = CLIPModel.from_pretrained(path_or_id, output_loading_info=True, **options)
        model, info = loaded
        check_weights(model, missing_weights(info), where)
        tokenizer = CLIPTokenizer.from_pretrained(path_or_id, **options)
        if len(tokenizer) <= NUM_SPECIAL_TOKENS:
            raise OSError(f"{where}: has no tokenizer (tokenizer.json, or vocab.json and merges.txt)")
        if max(tokenizer.get_vocab().values()) >= model.config.text_config.vocab_size:
            raise ValueError(
                f"{where}: the tokenizer has {len(tokenizer)} tokens, but the model only "
                f"{model.config.text_config.vocab_size}"
            )
        return cls(model, CLIPImageProcessorPil.from_pretrained(path_or_id, **options), tokenizer)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Save a standard CLIP checkpoint."""
        for part in (self.model, self.image_processor, self.tokenizer):
            part.save_pretrained(folder)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "ClipBackbone":
        """Move the model in place."""
        self.model.to(device=device, dtype=dtype)
        return self

    @property
    def feature_size(self) -> int:
        """Size of a clip's feature vector."""
        return self.model.config.projection_dim

    @property
    def text_feature_size(self) -> int:
        """Size of a token's feature vector."""
        return self.model.config.text_config.hidden_size

    @torch.inference_mode()
    def encode_frames(self, frames: Sequence[np.ndarray]) -> np.ndarray:
        """Encode one batch of F frames, each (H, W, 3) uint8 RGB, to (F, feature_size) float32."""
        inputs = self.image_processor(images=list(frames), input_data_format="channels_last", return_tensors="pt")
        pixel_values = inputs["pixel_values"].to(self.model.device, self.model.dtype)
        return self.model.get_image_features(pixel_values=pixel_values).pooler_output.float().cpu().numpy()

    def encode_video(self, frames: Iterable[np.ndarray], batch_size: int = 32) -> np.ndarray:
        """
        Encode frames (H, W, 3) uint8 RGB, one per clip, to (num_clips, feature_size) float32.

        Raises:
            ValueError: if there are no frames.
        """
        return _encode_frames([self], frames, batch_size)[0]

    @torch.inference_mode()
    def encode_text(self, sentences: Sequence[str], max_tokens: int | None = None) -> list[np.ndarray]:
        """
        Encode each sentence, from its start token to its end token, to (tokens, text_feature_size) float32.

        Args:
            sentences: any number of sentences. Each is encoded alone.
            max_tokens: longer sentences are truncated, with a warning, but keep their end token. The default is also
                the maximum: the length that CLIP supports.

        Raises:
            ValueError: if a sentence is not a string, is blank, or cannot be encoded as UTF-8.
        """
        limit = self.model.config.text_config.max_position_embeddings
        limit = limit if max_tokens is None else min(limit, max_tokens)
        features = []
        for sentence in sentences:
            check_sentence(sentence)
            ids = self.tokenizer(sentence, verbose=False)["input_ids"]
            if len(ids) > limit:
                warnings.warn(f"query truncated from {len(ids)} tokens to {limit}: {sentence[:60]!r}...", stacklevel=2)
                ids = [*ids[: limit - 1], ids[-1]]
            input_ids = torch.tensor([ids], device=self.model.device)
            hidden = self.model.text_model(input_ids=input_ids).last_hidden_state
            features.append(hidden[0].float().cpu().numpy())
        return features


BACKBONE_CLASSES = {"clip": ClipBackbone}  # by `model_type` of the checkpoint


def load_backbone(
    path_or_id: str | os.PathLike,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **hub_kwargs,
) -> ClipBackbone:
    """
    Load one backbone from a folder or the Hub: a complete standard checkpoint with its image processor and tokenizer.

    Raises:
        ValueError: if the model type is not supported, weights are missing or not finite, or the parts do not fit
            together.
        OSError: if there is no such checkpoint, or a part of it is missing.
    """
    try:
        model_type = PreTrainedConfig.get_config_dict(path_or_id, **hub_kwargs)[0].get("model_type")
        if model_type in BACKBONE_CLASSES:
            return BACKBONE_CLASSES[model_type].from_pretrained(path_or_id, **hub_kwargs).to(device, dtype)
    except OSError as error:
        raise OSError(
            f"{path_or_id}: not a checkpoint folder, and it could not be loaded from the Hub ({one_line(error)})"
        ) from error
    supported = ", ".join(BACKBONE_CLASSES)
    raise ValueError(f"{path_or_id}: model type {model_type} is not supported as a backbone (supported: {supported})")


class Backbones:
    """
    The backbones of one model, in the order in which their features are concatenated.

    Args:
        descriptions: `backbones` of the configuration.
        models: one model per description.

    Raises:
        ValueError: if a model's feature sizes differ from its description, or if the backbones differ in clip length:
            all of them read the same frames.
    """

    def __init__(self, descriptions: Sequence[Mapping[str, Any]], models: Sequence[ClipBackbone]):
        self.descriptions = [dict(description) for description in descriptions]
        self.models = list(models)
        for description, model in zip(self.descriptions, self.models, strict=True):
            for key in ("feature_size", "text_feature_size"):
                if key in description and description[key] != getattr(model, key):
                    raise ValueError(
                        f"backbone {description['name']}: `{key}` is {getattr(model, key)}, "
                        f"but {description[key]} in the config"
                    )
        lengths = {d["clip_seconds"] for d in self.descriptions if "feature_size" in d}
        if len(lengths) > 1:
            raise ValueError(f"all backbones must have the same `clip_seconds`, got {sorted(lengths)}")
        self.clip_seconds: Any = lengths.pop() if lengths else None  # `None` if no backbone reads video

    def _models_with(self, key: str) -> list[ClipBackbone]:
        return [model for description, model in zip(self.descriptions, self.models) if key in description]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Backbones":
        """Move all models in place."""
        for model in self.models:
            model.to(device, dtype)
        return self

    def encode_video(self, frames: Iterable[np.ndarray], batch_size: int = 32) -> list[np.ndarray]:
        """
        Encode frames (H, W, 3) uint8 RGB, one per clip, in one pass.

        Returns:
            One array (num_clips, feature_size) per video backbone.

        Raises:
            ValueError: if there are no frames.
        """
        return _encode_frames(self._models_with("feature_size"), frames, batch_size)

    def encode_text(self, sentences: Sequence[str], max_tokens: int | None = None) -> list[np.ndarray]:
        """
        Encode sentences, see `ClipBackbone.encode_text`.

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
    """Return the description of a backbone that is in the folder of its name inside the checkpoint."""
    rest = {key: value for key, value in description.items() if key not in ("name", "folder", "id")}
    return {"name": description["name"], "folder": description["name"], **rest}


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def _encode_frames(models: Sequence[ClipBackbone], frames: Iterable[np.ndarray], batch_size: int) -> list[np.ndarray]:
    batches = [[model.encode_frames(batch) for model in models] for batch in _batches(frames, batch_size)]
    if not batches:
        raise ValueError("no frames to encode; at least one is required")
    return [np.concatenate(parts) for parts in zip(*batches)]
