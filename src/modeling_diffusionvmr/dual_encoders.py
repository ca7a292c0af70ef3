"""Backbones with an encoder of images and one of text: CLIP, SigLIP and SigLIP 2."""

import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    SiglipImageProcessorPil,
    SiglipModel,
)

from .base_backbone import Backbone
from .checks import check_sentence, check_whole
from .video import Frames
from .weights import check_weight_index, check_weights, missing_weights

# Without its files, a tokenizer is loaded without an error, but has only its special tokens: at most these
NUM_SPECIAL_TOKENS = 5


class DualEncoder(Backbone):
    """
    A model of `transformers` with an encoder of images and one of text: the pooled embedding of one frame per clip, and
    the last hidden states of the text encoder. Subclasses add what differs between kinds of models.

    Args:
        model: an instance of `model_class`. It is frozen and set to eval mode.
        image_processor: the Pillow version, because torchvision resizes differently from how CLIP was trained.
        tokenizer: truncation and padding of a fast tokenizer are turned off.
    """

    model_class: Any
    image_processor_class: Any

    def __init__(self, model: Any, image_processor: Any, tokenizer: Any):
        super().__init__(model)
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        # Truncation and padding are state of a fast tokenizer: a call that sets them is not thread-safe, and they are
        # saved with it. Once they are off, calls that do not ask for them leave them alone.
        if tokenizer.is_fast:
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()

    @classmethod
    def from_pretrained(cls, path_or_id: str | os.PathLike, subfolder: str = "", **hub_kwargs) -> "DualEncoder":
        """
        Load a standard checkpoint of `transformers`.

        Raises:
            OSError: if there is none, or it has no tokenizer.
            ValueError: if weights are missing or not finite, or the parts do not fit together.
            ImportError: if the tokenizer needs a package that is not installed.
        """
        options = {"subfolder": subfolder, **hub_kwargs}
        where = os.path.join(path_or_id, subfolder) if subfolder else path_or_id
        if os.path.isdir(where):
            check_weight_index(where)
        model, info = cls.model_class.from_pretrained(path_or_id, output_loading_info=True, **options)
        check_weights(model, missing_weights(info), where)
        tokenizer = cls._load_tokenizer(path_or_id, where, options)
        backbone = cls(model, cls.image_processor_class.from_pretrained(path_or_id, **options), tokenizer)
        if reason := backbone._misfit():
            raise ValueError(f"{where}: {reason}")
        return backbone

    @classmethod
    def _load_tokenizer(cls, path_or_id: Any, where: Any, options: dict[str, Any]) -> Any:
        """Load the tokenizer of a checkpoint, which messages call `where`. Raise OSError if it has none."""
        raise NotImplementedError

    def _misfit(self) -> str | None:
        """Return why the parts do not fit together, or `None` if they do."""
        vocab_size = self.model.config.text_config.vocab_size
        if max(self.tokenizer.get_vocab().values()) >= vocab_size:
            return f"the tokenizer has {len(self.tokenizer)} tokens, but the model only {vocab_size}"
        return None

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Save a standard checkpoint of `transformers`."""
        for part in (self.model, self.image_processor, self.tokenizer):
            part.save_pretrained(folder)

    @property
    def text_feature_size(self) -> int:  # type: ignore[override]
        """Size of a token's feature vector."""
        return self.model.config.text_config.hidden_size

    def prepare(self, frames: Frames) -> dict[str, torch.Tensor]:
        """
        Transform the frame of a clip with the model's own image processor.

        Returns:
            `pixel_values` (3, S, S). For SigLIP 2 NaFlex, (P, D): P patches of D numbers, and their shape and mask.
        """
        images = self.image_processor(images=list(frames), input_data_format="channels_last", return_tensors="pt")
        return {name: tensor[0] for name, tensor in images.items()}

    @torch.inference_mode()
    def encode_clips(self, inputs: dict[str, torch.Tensor]) -> np.ndarray:
        """Encode the prepared frames of F clips to pooled embeddings (F, feature_size) float32."""
        device, dtype = self.model.device, self.model.dtype
        moved = {
            name: tensor.to(device, dtype if tensor.is_floating_point() else None) for name, tensor in inputs.items()
        }
        return self.model.get_image_features(**moved).pooler_output.float().cpu().numpy()

    @torch.inference_mode()
    def encode_text(self, sentences: Sequence[str], max_tokens: int | None = None) -> list[np.ndarray]:
        """
        Encode each sentence, from its first token to its end token, to (tokens, text_feature_size) float32.

        Args:
            sentences: any number of sentences. Each is encoded alone.
            max_tokens: longer sentences are truncated, with a warning, but keep their end token. The default is also
                the maximum: the length that the model supports.

        Raises:
            ValueError: if a sentence is not a string, is blank, or cannot be encoded as UTF-8, or if `max_tokens` is
                invalid.
        """
        if max_tokens is not None:
            check_whole(max_tokens, "`max_tokens`", 1)
        limit = self.model.config.text_config.max_position_embeddings
        limit = limit if max_tokens is None else min(limit, max_tokens)
        features = []
        for sentence in sentences:
            check_sentence(sentence)
            ids = self._token_ids(sentence)
            if len(ids) > limit:
                warnings.warn(f"query truncated from {len(ids)} tokens to {limit}: {sentence[:60]!r}...", stacklevel=2)
                ids = [*ids[: limit - 1], ids[-1]]
            input_ids = torch.tensor([self._padded(ids)], device=self.model.device)
            hidden = self.model.text_model(input_ids=input_ids).last_hidden_state
            features.append(hidden[0, : len(ids)].float().cpu().numpy())
        return features

    def _token_ids(self, sentence: str) -> list[int]:
        """Return the ids of all tokens of a sentence, including its start and end tokens."""
        return self.tokenizer(sentence, verbose=False)["input_ids"]

    def _padded(self, ids: list[int]) -> list[int]:
        """Return the ids, with padding if the text encoder expects it."""
        return ids


class ClipBackbone(DualEncoder):
    """
    CLIP, used in the same way as for the released features: the projected embedding of one frame per clip, and the last
    hidden states of the text encoder, from the start token to the end token.
    """

    model_class = CLIPModel
    image_processor_class = CLIPImageProcessorPil

    @classmethod
    def _load_tokenizer(cls, path_or_id, where, options):
        tokenizer = CLIPTokenizer.from_pretrained(path_or_id, **options)
        if len(tokenizer) <= NUM_SPECIAL_TOKENS:
            raise OSError(f"{where}: has no tokenizer (tokenizer.json, or vocab.json and merges.txt)")
        return tokenizer

    @property
    def feature_size(self) -> int:  # type: ignore[override]
        """Size of a clip's feature vector."""
        return self.model.config.projection_dim


class SiglipBackbone(DualEncoder):
    """
    SigLIP, and SigLIP 2 at a fixed resolution: the embedding of one frame per clip by the attention pooling head, and
    the last hidden states of the text encoder, up to the end token.

    The text encoder was trained on sentences in lower case, padded to its full length, without an attention mask
    (big_vision; https://huggingface.co/docs/transformers/model_doc/siglip). So sentences are put in lower case, which
    not every tokenizer of SigLIP 2 does, and padded, but only the features of their own tokens are returned.
    """

    model_class: Any = SiglipModel
    image_processor_class: Any = SiglipImageProcessorPil

    @classmethod
    def _load_tokenizer(cls, path_or_id, where, options):
        # SigLIP has a SentencePiece tokenizer, SigLIP 2 that of Gemma
        try:
            tokenizer = AutoTokenizer.from_pretrained(path_or_id, trust_remote_code=False, **options)
        except ImportError as error:
            raise ImportError(
                f"{where}: its tokenizer needs two packages; install them with: pip install sentencepiece protobuf"
            ) from error
        except ValueError as error:
            raise OSError(
                f"{where}: has no tokenizer that can be loaded (tokenizer.json, or spiece.model and the packages "
                "sentencepiece and protobuf)"
            ) from error
        if len(tokenizer) <= NUM_SPECIAL_TOKENS:
            raise OSError(f"{where}: has no tokenizer (tokenizer.json)")
        return tokenizer

    def _misfit(self):
        if not self.model.vision_model.use_head:
            return "the model has no pooling head, so it has no embedding of a frame"
        if self.tokenizer.pad_token_id is None:
            return "the tokenizer has no padding token"
        return super()._misfit()

    @property
    def feature_size(self) -> int:  # type: ignore[override]
        """Size of a clip's feature vector."""
        return self.model.config.vision_config.hidden_size

    def _token_ids(self, sentence):
        return super()._token_ids(sentence.lower())

    def _padded(self, ids):
        missing = self.model.config.text_config.max_position_embeddings - len(ids)
        return ids + [self.tokenizer.pad_token_id] * missing


class Siglip2Backbone(SiglipBackbone):
    """
    SigLIP 2 NaFlex, which keeps the aspect ratio of a frame: it is resized to at most as many patches as the image
    processor says, and padded to this number.
    """

    model_class = Siglip2Model
    image_processor_class = Siglip2ImageProcessorPil
