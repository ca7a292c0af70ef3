"""The model's fields, their defaults, and what is valid."""

import math
import re

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

POSITIVE_FIELDS = (
    "d_model",
    "encoder_layers",
    "decoder_layers",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "video_feature_size",
    "text_feature_size",
    "max_clips",
    "max_tokens",
    "num_diffusion_steps",
    "signal_scale",
    "num_proposals",
    "max_training_proposals",
    "num_sampling_steps",
    "roi_bins",
    "dynamic_size",
)
NON_NEGATIVE_FIELDS = (
    "l1_loss_coefficient",
    "iou_loss_coefficient",
    "class_loss_coefficient",
    "hinge_loss_coefficient",
    "contrastive_loss_coefficient",
    "background_coefficient",
    "saliency_margin",
)


@strict
class DiffusionVMRConfig(PreTrainedConfig):
    r"""
    Configuration of a DiffusionVMR model. The defaults are the paper's setting for QVHighlights with SlowFast and CLIP
    features (arXiv 2308.15109, section 4.1), and Moment-DETR's (arXiv 2107.09609) where the paper is silent.

    d_model (`int`, *optional*, defaults to 512):
        Size D of every hidden state.
    encoder_layers, decoder_layers (`int`, *optional*, defaults to 6):
        Self-attention layers of the cross-modal encoder, and denoising layers of the decoder (K).
    encoder_attention_heads, decoder_attention_heads (`int`, *optional*, defaults to 8):
        Attention heads of a layer; each must divide `d_model`.
    encoder_ffn_dim, decoder_ffn_dim (`int`, *optional*, defaults to 2048):
        Inner size of a layer's feed-forward network.
    dropout, input_dropout (`float`, *optional*, defaults to 0.1 and 0.5):
        Dropout inside the layers, and of the two input projections.
    video_feature_size, text_feature_size (`int`, *optional*, defaults to 2816 and 512):
        Numbers in a clip's and in a token's feature vector, without the two positions that the model appends.
    max_clips, max_tokens (`int`, *optional*, defaults to 75 and 32):
        The longest input. The processor averages longer videos down, and truncates longer sentences.
    num_diffusion_steps (`int`, *optional*, defaults to 1000):
        T, the steps of the forward process.
    signal_scale (`float`, *optional*, defaults to 2.0):
        Spans in [0, 1] are diffused as signals in [-signal_scale, signal_scale].
    num_proposals, max_training_proposals (`int`, *optional*, defaults to 20):
        N in inference, and the number up to which N grows in training. They need not agree.
    num_sampling_steps (`int`, *optional*, defaults to 1):
        S, the DDIM steps of inference.
    roi_bins (`int`, *optional*, defaults to 16):
        Equal parts in which the 1-D RoI-align reads the video memory for a span.
    roi_context (`float`, *optional*, defaults to 2.0):
        Width of what is read for a span, in widths of that span, at least 1: what lies around a moment tells it from a
        part of one.
    dynamic_size (`int`, *optional*, defaults to 16):
        Inner size of the dynamic interaction: a proposal generates filters D -> dynamic_size -> D.
    l1_loss_coefficient, iou_loss_coefficient, class_loss_coefficient, hinge_loss_coefficient,
    contrastive_loss_coefficient (`float`, *optional*, defaults to 10, 2, 4, 1 and 1):
        Weights of the terms of Eq. 11 to 13.
    background_coefficient (`float`, *optional*, defaults to 0.1):
        Weight of background proposals in the classification loss.
    saliency_margin (`float`, *optional*, defaults to 0.2):
        The margin of the hinge loss.
    backbones (`list[dict]`, *optional*):
        The frozen backbones that made the features, in the order of concatenation. Each has a `name`, an `id` (a folder
        inside the checkpoint, or a model on the Hub; `None` where it cannot be run), and what it gives:
        `feature_size` numbers for every `clip_seconds` of video (which may be left out where there is no `id`: then
        the clips share the duration), or `text_feature_size` numbers a token, or both.
    """

    model_type = "diffusionvmr"
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
        "num_hidden_layers": "encoder_layers",
    }

    d_model: int = 512
    encoder_layers: int = 6
    decoder_layers: int = 6
    encoder_attention_heads: int = 8
    decoder_attention_heads: int = 8
    encoder_ffn_dim: int = 2048
    decoder_ffn_dim: int = 2048
    dropout: float | int = 0.1
    input_dropout: float | int = 0.5
    video_feature_size: int = 2816
    text_feature_size: int = 512
    max_clips: int = 75
    max_tokens: int = 32
    num_diffusion_steps: int = 1000
    signal_scale: float | int = 2.0
    num_proposals: int = 20
    max_training_proposals: int = 20
    num_sampling_steps: int = 1
    roi_bins: int = 16
    roi_context: float | int = 2.0
    dynamic_size: int = 16
    l1_loss_coefficient: float | int = 10.0
    iou_loss_coefficient: float | int = 2.0
    class_loss_coefficient: float | int = 4.0
    hinge_loss_coefficient: float | int = 1.0
    contrastive_loss_coefficient: float | int = 1.0
    background_coefficient: float | int = 0.1
    saliency_margin: float | int = 0.2
    backbones: list[dict] | None = None
    is_encoder_decoder: bool = True

    def __post_init__(self, **kwargs):
        # A checkpoint names its pipeline for those who load it as remote code. Where the package is installed the
        # entry would make `pipeline()` ask for `trust_remote_code`; saving a model writes it anew.
        if not __name__.startswith("transformers_modules."):
            kwargs.pop("custom_pipelines", None)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Raises `ValueError`, which names the field, for a value that no model could have."""
        for field in POSITIVE_FIELDS:
            if not 0 < getattr(self, field) < math.inf:
                raise ValueError(f"`{field}` must be above 0 and finite, got {getattr(self, field)}")
        for field in NON_NEGATIVE_FIELDS:
            if not 0 <= getattr(self, field) < math.inf:
                raise ValueError(f"`{field}` must be finite and not negative, got {getattr(self, field)}")
        for field in ("dropout", "input_dropout"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"`{field}` must be in [0, 1), got {getattr(self, field)}")
        if not 1 <= self.roi_context < math.inf:
            raise ValueError(f"`roi_context` must be at least 1 and finite, got {self.roi_context}")
        for field in ("encoder_attention_heads", "decoder_attention_heads"):
            if self.d_model % getattr(self, field):
                raise ValueError(f"`{field}` must divide d_model={self.d_model}, got {getattr(self, field)}")
        if self.d_model % 2:
            raise ValueError(
                f"`d_model` must be even, since positions are pairs of sine and cosine, got {self.d_model}"
            )
        if self.num_sampling_steps > self.num_diffusion_steps:
            raise ValueError(
                f"`num_sampling_steps` must be at most num_diffusion_steps={self.num_diffusion_steps}, "
                f"got {self.num_sampling_steps}"
            )
        if self.backbones is not None:
            self._validate_backbones()

    def _validate_backbones(self):
        names = [backbone.get("name") for backbone in self.backbones]
        for index, backbone in enumerate(self.backbones):
            # Each is saved into a folder of its name
            if not names[index]:
                raise ValueError(f"`backbones[{index}]` has no `name`: {backbone}")
            if not isinstance(names[index], str) or not re.fullmatch(r"\w[\w.-]*", names[index]):
                raise ValueError(
                    f"`backbones[{index}]` needs a `name` of letters, digits, '_', '.' and '-': {backbone}"
                )
            if names.index(names[index]) != index:
                raise ValueError(f"`backbones[{index}]` has the name of another one: {backbone}")
            if not {"feature_size", "text_feature_size"} & backbone.keys():
                raise ValueError(f"`backbones[{index}]` needs `feature_size`, `text_feature_size` or both: {backbone}")
            for key in ("feature_size", "text_feature_size"):
                if key in backbone and not (isinstance(backbone[key], int) and backbone[key] > 0):
                    raise ValueError(f"`backbones[{index}]`: `{key}` must be a whole number above 0: {backbone}")
            # Where it can be run, the video must be cut into clips; released features may just share the duration
            needed = "clip_seconds" in backbone or ("feature_size" in backbone and backbone.get("id") is not None)
            seconds = backbone.get("clip_seconds")
            if needed and not (isinstance(seconds, (int, float)) and 0 < seconds < math.inf):
                raise ValueError(f"`backbones[{index}]`: `clip_seconds` must be a number above 0: {backbone}")
        for field, key, total in (
            ("video_feature_size", "feature_size", sum(b.get("feature_size", 0) for b in self.backbones)),
            ("text_feature_size", "text_feature_size", sum(b.get("text_feature_size", 0) for b in self.backbones)),
        ):
            if total != getattr(self, field):
                raise ValueError(
                    f"`{field}` is {getattr(self, field)}, but the `{key}` of `backbones` add up to {total}"
                )


__all__ = ["DiffusionVMRConfig"]
