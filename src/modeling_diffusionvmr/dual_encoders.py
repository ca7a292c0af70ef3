"""Backbones with an encoder of images and one of text: CLIP."""

import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from .base_backbone import Backbone
from .checks import check_sentence
from .video import Frames
from .weights import check_weight_index, check_weights, missing_weights

NUM_SPECIAL_TOKENS = 3  # all that `CLIPTokenizer` has, without an error, where its files are missing


class ClipBackbone(Backbone):
    """
    CLIP, used in the same way as for the released features: the projected embedding of one frame per clip, and the last
    hidden states of the text encoder.

    Args:
        model: a `CLIPModel`. It is frozen and set to eval mode.
        image_processor: the Pillow version, because torchvision resizes differently from how CLIP was trained.
        tokenizer: a `CLIPTokenizer`. Its truncation and padding are turned off.
    """

    def __init__(self, model: CLIPModel, image_processor: CLIPImageProcessorPil, tokenizer: CLIPTokenizer):
        super().__init__(model)
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

    @property
    def feature_size(self) -> int:  # type: ignore[override]
        """Size of a clip's feature vector."""
        return self.model.config.projection_dim

    @property
    def text_feature_size(self) -> int:  # type: ignore[override]
        """Size of a token's feature vector."""
        return self.model.config.text_config.hidden_size

    def prepare(self, frames: Frames) -> torch.Tensor:
        """Transform the frame of a clip to pixel values (3, S, S), with CLIP's own image processor."""
        images = self.image_processor(images=list(frames), input_data_format="channels_last", return_tensors="pt")
        return images["pixel_values"][0]

    @torch.inference_mode()
    def encode_clips(self, inputs: torch.Tensor) -> np.ndarray:
        """Encode pixel values (F, 3, S, S) to projected embeddings (F, feature_size) float32."""
        pixel_values = inputs.to(self.model.device, self.model.dtype)
        return self.model.get_image_features(pixel_values=pixel_values).pooler_output.float().cpu().numpy()

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
