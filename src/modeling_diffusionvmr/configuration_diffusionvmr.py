"""Model configuration: fields, defaults and validation."""

import math
import re
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .checks import check_positive
from .hub import PushToHub
from .json_files import naming_json

FOLDER_NAME = re.compile(r"\w[\w.-]*")
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")

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
    "absent_loss_coefficient",
    "background_coefficient",
    "saliency_margin",
)


@strict
class DiffusionVMRConfig(PushToHub, PreTrainedConfig):
    r"""
    Configuration of a DiffusionVMR model. The defaults follow the paper's QVHighlights setting with SlowFast and CLIP
    features (arXiv 2308.15109, section 4.1), and Moment-DETR (arXiv 2107.09609) where the paper gives no value.

    d_model (`int`, *optional*, defaults to 512):
        Size of the hidden states (D).
    encoder_layers, decoder_layers (`int`, *optional*, defaults to 6):
        Number of self-attention layers in the cross-modal encoder and of denoising layers in the decoder (K).
    encoder_attention_heads, decoder_attention_heads (`int`, *optional*, defaults to 8):
        Number of attention heads per layer. Each must divide `d_model`.
    encoder_ffn_dim, decoder_ffn_dim (`int`, *optional*, defaults to 2048):
        Inner size of the feed-forward network in each layer.
    dropout, input_dropout (`float`, *optional*, defaults to 0.1 and 0.5):
        Dropout inside the layers and in the two input projections.
    video_feature_size, text_feature_size (`int`, *optional*, defaults to 2816 and 512):
        Size of the feature vector of a clip and of a token, without the two positions that the model appends to clips.
    max_clips, max_tokens (`int`, *optional*, defaults to 75 and 32):
        Maximum input length. The processor averages longer videos down and truncates longer sentences. The pipeline
        searches longer videos in windows.
    num_diffusion_steps (`int`, *optional*, defaults to 1000):
        Number of steps of the forward process (T).
    signal_scale (`float`, *optional*, defaults to 2.0):
        Spans in [0, 1] are scaled to signals in [-signal_scale, signal_scale] before noise is added.
    num_proposals, max_training_proposals (`int`, *optional*, defaults to 20):
        Number of proposals (N) at inference, and the maximum that N grows to in training. They may differ.
    num_sampling_steps (`int`, *optional*, defaults to 1):
        Number of DDIM steps at inference (S).
    roi_bins (`int`, *optional*, defaults to 16):
        Number of equal bins that the 1-D RoI-align splits a span into.
    roi_context (`float`, *optional*, defaults to 2.0):
        Width of the region read for a span, as a multiple of the span's width (at least 1). The surroundings help to
        distinguish a whole moment from a part of one.
    dynamic_size (`int`, *optional*, defaults to 16):
        Inner size of the dynamic interaction: each proposal generates filters D -> dynamic_size -> D.
    l1_loss_coefficient, iou_loss_coefficient, class_loss_coefficient, hinge_loss_coefficient,
    contrastive_loss_coefficient (`float`, *optional*, defaults to 10, 2, 4, 1 and 1):
        Weights of the loss terms in Eq. 11 to 13.
    absent_loss_coefficient (`float`, *optional*, defaults to 0):
        Weight of a term that the paper does not have: with a sentence of another video, all proposals are background.
        It teaches the model to give low scores to a sentence that is not true in the video.
    background_coefficient (`float`, *optional*, defaults to 0.1):
        Weight of background proposals in the classification loss.
    saliency_margin (`float`, *optional*, defaults to 0.2):
        Margin of the hinge loss.
    backbones (`list[dict]`, *optional*):
        The frozen backbones that produced the features, in the order of concatenation. Each entry has a `name`, and
        the sizes of its features: `feature_size` per clip of `clip_seconds` seconds, `text_feature_size` per token, or
        both. It says where the backbone is: `folder`, a folder inside the checkpoint, or `id`, a model on the Hub
        (`USER/NAME`). A backbone with neither cannot be run, and `clip_seconds` is optional: without it, the clips
        divide the video's duration equally.
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
    absent_loss_coefficient: float | int = 0.0
    background_coefficient: float | int = 0.1
    saliency_margin: float | int = 0.2
    backbones: list[dict] | None = None
    is_encoder_decoder: bool = True

    def __post_init__(self, **kwargs):
        # `custom_pipelines` is for remote code. With the package installed, the entry would make `pipeline()` ask for
        # `trust_remote_code`. Saving a model writes the entry again.
        if not __name__.startswith("transformers_modules."):
            kwargs.pop("custom_pipelines", None)
        if isinstance(self.backbones, list):
            self.backbones = [_with_folder(entry) for entry in self.backbones]
        # `hidden_size` and the other aliases set fields, so they are checked as fields
        super().__post_init__(**{self.attribute_map.get(name, name): value for name, value in kwargs.items()})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As in `PreTrainedConfig`. Raise a ValueError that names config.json if it is not a JSON object."""
        with naming_json(pretrained_model_name_or_path, **kwargs):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """
        As in `PreTrainedConfig`, but fields in `kwargs` are checked as in the constructor. `PreTrainedConfig` sets them
        after construction, here and in `from_pretrained`.
        """
        kwargs = {cls.attribute_map.get(name, name): value for name, value in kwargs.items()}
        made = super().from_dict(config_dict, **kwargs)
        config = made[0] if isinstance(made, tuple) else made  # with `return_unused_kwargs`
        config.validate()
        return made

    def validate_architecture(self):
        """Raise ValueError, naming the field, if a value is invalid."""
        for field in POSITIVE_FIELDS:
            check_positive(getattr(self, field), f"`{field}`")
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
                f"`d_model` must be even because positions are encoded as pairs of sine and cosine, got {self.d_model}"
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
            _check_backbone(backbone, f"`backbones[{index}]`")
            if names.index(names[index]) != index:
                raise ValueError(f"`backbones[{index}]` repeats the name of another backbone: {backbone}")
        for field, key, total in (
            ("video_feature_size", "feature_size", sum(b.get("feature_size", 0) for b in self.backbones)),
            ("text_feature_size", "text_feature_size", sum(b.get("text_feature_size", 0) for b in self.backbones)),
        ):
            if total != getattr(self, field):
                raise ValueError(
                    f"`{field}` is {getattr(self, field)}, but the `{key}` values in `backbones` add up to {total}"
                )


def _with_folder(backbone: Any) -> Any:
    """Return an entry of `backbones` as it is written now. Earlier versions wrote folders as an `id` without "/"."""
    if not isinstance(backbone, dict) or "id" not in backbone:
        return backbone
    identifier = backbone["id"]
    rest = {key: value for key, value in backbone.items() if key != "id"}
    if identifier is None:
        return rest
    if isinstance(identifier, str) and "folder" not in rest and FOLDER_NAME.fullmatch(identifier):
        return {"name": rest.pop("name", None), "folder": identifier, **rest}
    return backbone


def _check_backbone(backbone: dict, where: str) -> None:
    """Raise ValueError if an entry of `backbones` is invalid. The message begins with `where`."""
    name = backbone.get("name")
    if not name:
        raise ValueError(f"{where} has no `name`: {backbone}")
    # The name becomes a folder of the checkpoint
    if not isinstance(name, str) or not FOLDER_NAME.fullmatch(name):
        raise ValueError(f"{where} needs a `name` of letters, digits, '_', '.' and '-': {backbone}")
    if {"folder", "id"} <= backbone.keys():
        raise ValueError(f"{where} must have a `folder` or an `id`, not both: {backbone}")
    # A checkpoint must not make the library read files elsewhere on the machine that loads it
    for key, pattern, meaning in (
        ("folder", FOLDER_NAME, "the name of a folder inside the checkpoint"),
        ("id", HUB_ID, "a model on the Hub, USER/NAME"),
    ):
        if key in backbone and not (isinstance(backbone[key], str) and pattern.fullmatch(backbone[key])):
            raise ValueError(f"{where}: `{key}` must be {meaning}: {backbone}")
    if not {"feature_size", "text_feature_size"} & backbone.keys():
        raise ValueError(f"{where} needs `feature_size`, `text_feature_size` or both: {backbone}")
    for key in ("feature_size", "text_feature_size"):
        if key in backbone and not (type(backbone[key]) is int and backbone[key] > 0):
            raise ValueError(f"{where}: `{key}` must be an integer above 0: {backbone}")
    # A backbone that can be run needs `clip_seconds` to divide the video into clips. Released features do not.
    if "clip_seconds" in backbone or ("feature_size" in backbone and {"folder", "id"} & backbone.keys()):
        check_positive(backbone.get("clip_seconds"), f"{where}: `clip_seconds`")


__all__ = ["DiffusionVMRConfig"]
