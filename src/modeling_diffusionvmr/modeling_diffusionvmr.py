"""
The DiffusionVMR model (Zhao et al., arXiv 2308.15109): a cross-modal encoder (section 3.3) and a decoder that denoises
spans (section 3.4).

Shapes: B samples, Lv clips, Lt tokens, N proposals, K decoder layers, R RoI bins, D `d_model`, Dv and Dt feature sizes.
"""

import math
import os
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.decorators import skip
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .backbones import Backbones
from .checkpoint import HUB_ARGUMENTS, save_backbones, save_processor
from .checks import check_whole
from .configuration_diffusionvmr import DiffusionVMRConfig
from .diffusion import DiffusionSchedule, check_num_sampling_steps, sampling_timesteps, signal_to_spans, spans_to_signal
from .hub import PushToHub, take_push_options, upload
from .loss_diffusionvmr import Targets, diffusionvmr_loss
from .model_card import write_model_card
from .spans import bin_edges, keep_inside, refine, roi_align, surround
from .weights import check_form, check_weight_files, missing_weights, naming_mismatch

TASK = "video-moment-retrieval"
RANK_SHARE, BIN_SHARE = 1 / 8, 1 / 4  # of `d_model`, in the dynamic interaction
Output = TypeVar("Output", bound=ModelOutput)


@dataclass
class DiffusionVMRMemory(ModelOutput):
    """
    The encoder's output (Eq. 7), which conditions the decoder.

    last_hidden_state (`torch.Tensor` of shape `(B, Lv + Lt, D)`): clips, then tokens.
    video (`torch.Tensor` of shape `(B, Lv, D)`): M_V, the clips.
    text (`torch.Tensor` of shape `(B, Lt, D)`): M_Q, the tokens.
    video_mask (`torch.BoolTensor` of shape `(B, Lv)`): true for real clips.
    hidden_states, attentions: of every encoder layer, if requested.
    """

    last_hidden_state: Tensor | None = None
    video: Tensor | None = None
    text: Tensor | None = None
    video_mask: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class DiffusionVMRDecoderOutput(ModelOutput):
    """
    The output of one call of the denoising decoder (Eq. 6).

    last_hidden_state (`torch.Tensor` of shape `(B, N, D)`): proposal features after the last layer.
    intermediate_logits (`torch.Tensor` of shape `(B, K, N, 2)`): foreground and background logits of every layer.
    intermediate_spans (`torch.FloatTensor` of shape `(B, K + 1, N, 2)`): the noisy input, then spans of every layer.
    hidden_states, attentions: of every decoder layer, if requested.
    """

    last_hidden_state: Tensor | None = None
    intermediate_logits: Tensor | None = None
    intermediate_spans: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class DiffusionVMRModelOutput(ModelOutput):
    """
    The output of one encoding and one denoising step. `last_hidden_state` (B, N, D) is the decoder's. The other fields
    are those of [`DiffusionVMRMomentRetrievalOutput`], except that spans are not clipped to the video.
    """

    last_hidden_state: Tensor | None = None
    intermediate_logits: Tensor | None = None
    intermediate_spans: Tensor | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None


@dataclass
class DiffusionVMRMomentRetrievalOutput(ModelOutput):
    """
    The output of moment retrieval. Decoder outputs are those of the last sampling step.

    loss (`torch.FloatTensor`): total loss (Eq. 11), if labels are given.
    loss_dict (`dict[str, torch.FloatTensor]`): the terms of the loss without their coefficients, summed over the
        decoder layers: `class`, `l1`, `iou`, `hinge`, `contrastive`, and `absent` if `absent_loss_coefficient` is above
        0 and negative sentences are given.
    logits (`torch.Tensor` of shape `(B, N, 2)`): index 0 is foreground. A proposal's score is `softmax[..., 0]`.
    pred_spans (`torch.FloatTensor` of shape `(B, N, 2)`): (center, width), as a fraction of the time covered.
    saliency_scores (`torch.Tensor` of shape `(B, Lv)`): how well each clip matches the sentence, unbounded. 0 for
        padding.
    intermediate_logits (`torch.Tensor` of shape `(B, K, N, 2)`): logits of every decoder layer.
    intermediate_spans (`torch.FloatTensor` of shape `(B, K + 1, N, 2)`): the noisy input, then the spans of every
        decoder layer, clipped to the video.
    encoder_last_hidden_state (`torch.Tensor` of shape `(B, Lv + Lt, D)`): encoded clips, then tokens.
    encoder_hidden_states, encoder_attentions, decoder_hidden_states, decoder_attentions: tuples with one entry per
        layer, if requested. Hidden states start with the first layer's input.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    pred_spans: Tensor | None = None
    saliency_scores: Tensor | None = None
    intermediate_logits: Tensor | None = None
    intermediate_spans: Tensor | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None


def sine_embedding(position: Tensor, size: int) -> Tensor:
    """Return sine and cosine in turn (..., size), float32, of positions (...) at wavelengths from 2 pi to 20000 pi."""
    index = torch.arange(size, device=position.device)
    frequency = torch.exp((index - index % 2) * (-math.log(10000.0) / size))
    # A cosine is a sine a quarter of a period ahead. To interleave two tensors takes several times as long
    return torch.sin(position.float()[..., None] * frequency + (index % 2) * (math.pi / 2))


def clip_positions(video_mask: Tensor) -> Tensor:
    """Return (B, Lv, 2) for a mask (B, Lv): start and end of each clip as fractions of its video, 0 for padding."""
    end = video_mask.cumsum(1) * video_mask / video_mask.sum(1, keepdim=True)
    share = video_mask / video_mask.sum(1, keepdim=True)
    return torch.stack((end - share, end), dim=-1)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Compute attention with plain operations. Return the output and the weights."""
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class DiffusionVMRSelfAttention(nn.Module):
    """Multi-head self-attention. As in DETR, positions are added to queries and keys, but not to values."""

    def __init__(self, config: DiffusionVMRConfig, num_heads: int):
        super().__init__()
        self.config = config
        self.head_dim = config.d_model // num_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(config.d_model, config.d_model)
        self.k_proj = nn.Linear(config.d_model, config.d_model)
        self.v_proj = nn.Linear(config.d_model, config.d_model)
        self.o_proj = nn.Linear(config.d_model, config.d_model)

    def forward(self, hidden_states, attention_mask=None, positions=None, **kwargs) -> tuple[Tensor, Tensor | None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        placed = hidden_states if positions is None else hidden_states + positions
        query = self.q_proj(placed).view(shape).transpose(1, 2)
        key = self.k_proj(placed).view(shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs
        )
        return self.o_proj(output.flatten(2)), weights


class DiffusionVMRFeedForward(nn.Module):
    """Two linear layers with a ReLU in between."""

    def __init__(self, config: DiffusionVMRConfig, inner_size: int):
        super().__init__()
        self.fc1 = nn.Linear(config.d_model, inner_size)
        self.fc2 = nn.Linear(inner_size, config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.dropout(F.relu_(self.fc1(hidden_states))))


class DiffusionVMREncoderLayer(GradientCheckpointingLayer):
    """Self-attention and a feed-forward network, each with a residual and then layer norm (as in Moment-DETR)."""

    def __init__(self, config: DiffusionVMRConfig):
        super().__init__()
        self.self_attn = DiffusionVMRSelfAttention(config, config.encoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.feed_forward = DiffusionVMRFeedForward(config, config.encoder_ffn_dim)
        self.feed_forward_layer_norm = nn.LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states, attention_mask=None, positions=None, **kwargs) -> Tensor:
        attended, _ = self.self_attn(hidden_states, attention_mask, positions, **kwargs)
        hidden_states = self.self_attn_layer_norm(hidden_states + self.dropout(attended))
        return self.feed_forward_layer_norm(hidden_states + self.dropout(self.feed_forward(hidden_states)))


class DiffusionVMRDynamicInteraction(nn.Module):
    """
    The dynamic interaction of Sparse R-CNN (Sun et al., arXiv 2011.12450): the feature of each proposal generates two
    filters, D -> dynamic_size -> D, which are applied to the proposal's own RoI bins.

    Generator and output would have more than half of all weights. Two bottlenecks make them almost six times smaller:
    the generator has a low rank, and each bin is projected to `BIN_SHARE` of its size before all of them are joined.
    """

    def __init__(self, config: DiffusionVMRConfig):
        super().__init__()
        self.filter_shape = (config.d_model, config.dynamic_size)
        rank, bin_size = math.ceil(RANK_SHARE * config.d_model), math.ceil(BIN_SHARE * config.d_model)
        self.filter_code = nn.Linear(config.d_model, rank)
        self.filter_generator = nn.Linear(rank, 2 * config.d_model * config.dynamic_size)
        self.inner_layer_norm = nn.LayerNorm(config.dynamic_size)
        self.bin_layer_norm = nn.LayerNorm(config.d_model)
        self.bin_proj = nn.Linear(config.d_model, bin_size)
        self.out_proj = nn.Linear(config.roi_bins * bin_size, config.d_model)
        self.out_layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, proposals: Tensor, bins: Tensor) -> Tensor:
        """Update proposals (B, N, D) from their bins (B, N, R, D). Return (B, N, D)."""
        narrow, wide = self.filter_generator(self.filter_code(proposals)).chunk(2, dim=-1)
        bins = F.relu_(self.inner_layer_norm(bins @ narrow.unflatten(-1, self.filter_shape)))
        bins = F.relu_(self.bin_layer_norm(bins @ wide.unflatten(-1, self.filter_shape[::-1])))
        return F.relu_(self.out_layer_norm(self.out_proj(self.bin_proj(bins).flatten(-2))))


class DiffusionVMRDenoisingLayer(GradientCheckpointingLayer):
    """One decoder layer: the denoising head on RoI features, then the class and span heads."""

    def __init__(self, config: DiffusionVMRConfig):
        super().__init__()
        size = config.d_model
        self.span_projection = nn.Linear(2 * size, size)
        self.self_attn = DiffusionVMRSelfAttention(config, config.decoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(size)
        self.interaction = DiffusionVMRDynamicInteraction(config)
        self.interaction_layer_norm = nn.LayerNorm(size)
        self.feed_forward = DiffusionVMRFeedForward(config, config.decoder_ffn_dim)
        self.feed_forward_layer_norm = nn.LayerNorm(size)
        self.dropout = nn.Dropout(config.dropout)
        self.time_modulation = nn.Sequential(nn.SiLU(), nn.Linear(4 * size, 2 * size))
        self.class_head = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, 2))
        self.span_head = nn.Sequential(
            nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size), nn.ReLU(), nn.Linear(size, 2)
        )

    def forward(
        self, proposals: Tensor, bins: Tensor, spans: Tensor, modulation: Tensor, **kwargs
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            proposals: proposal features, (B, N, D).
            bins: RoI bins of each proposal, (B, N, R, D).
            spans: spans of the proposals, (B, N, 2), float32.
            modulation: scale and shift for the timestep, (B, 2 D).

        Returns:
            Proposal features (B, N, D), logits (B, N, 2) and refined spans (B, N, 2), float32.
        """
        # Embed position and width of each proposal, as in DAB-DETR: the pooled feature does not contain them
        placed = sine_embedding(spans * (2 * math.pi), proposals.shape[-1]).flatten(-2).to(proposals.dtype)
        attended, _ = self.self_attn(proposals, positions=self.span_projection(placed), **kwargs)
        proposals = self.self_attn_layer_norm(proposals + self.dropout(attended))
        proposals = self.interaction_layer_norm(proposals + self.dropout(self.interaction(proposals, bins)))
        proposals = self.feed_forward_layer_norm(proposals + self.dropout(self.feed_forward(proposals)))
        scale, shift = modulation[:, None].chunk(2, dim=-1)
        modulated = proposals * (scale + 1) + shift
        return proposals, self.class_head(modulated), refine(spans, self.span_head(modulated).float())


class DiffusionVMRPreTrainedModel(PushToHub, PreTrainedModel):  # type: ignore[misc]  # `push_to_hub` is ours
    """Weight initialization, and attributes that `transformers` reads."""

    config: DiffusionVMRConfig
    config_class = DiffusionVMRConfig
    base_model_prefix = "model"
    main_input_name = "video_features"
    input_modalities = ["video", "text"]
    _input_embed_layer = "video_projection"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DiffusionVMREncoderLayer", "DiffusionVMRDecoder"]  # the decoder has a parameter of its own
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info=False, **kwargs):
        """
        As in `transformers`, but refuse checkpoints of the larger dynamic interaction that version 0.1.0 replaced.

        Raises:
            ValueError: if the sizes of the weights are not those of the configuration, or if the folder is one that
                `diffusionvmr export` wrote.
        """
        if os.path.isdir(pretrained_model_name_or_path or ""):
            check_weight_files(pretrained_model_name_or_path)
        with naming_mismatch(pretrained_model_name_or_path):
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        check_form(info, pretrained_model_name_or_path)
        return (model, info) if output_loading_info else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Initialize with Xavier (section 4.1), and fill the schedule's tables, which are not part of a checkpoint."""
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, DiffusionVMRDecoder):
            init.normal_(module.beyond_video)  # same scale as the encoder's output, which is layer-normalized
        elif isinstance(module, DiffusionSchedule):
            for name, table in module.tables().items():
                init.copy_(getattr(module, name), table)


class DiffusionVMREncoder(DiffusionVMRPreTrainedModel):
    """The cross-modal encoder h (Eq. 7), without the input projections."""

    _can_record_outputs = {"hidden_states": DiffusionVMREncoderLayer, "attentions": DiffusionVMRSelfAttention}

    def __init__(self, config: DiffusionVMRConfig):
        super().__init__(config)
        self.layers = nn.ModuleList([DiffusionVMREncoderLayer(config) for _ in range(config.encoder_layers)])
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor, positions: Tensor, **kwargs) -> BaseModelOutput:
        """Encode embeddings (B, L, D) with mask (B, L) and positions (B, L, D) to hidden states (B, L, D)."""
        # By default, `transformers` checks whether the mask has any padding, which would wait for the device
        layer_mask = create_bidirectional_mask(
            self.config, inputs_embeds, attention_mask, allow_is_bidirectional_skip=False
        )
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(hidden_states, layer_mask, positions, **kwargs)
        return BaseModelOutput(last_hidden_state=hidden_states)


class DiffusionVMRDecoder(DiffusionVMRPreTrainedModel):
    """The denoising decoder g (Eq. 6): a cascade of layers, each of which refines the spans of the previous one."""

    _can_record_outputs = {"hidden_states": DiffusionVMRDenoisingLayer, "attentions": DiffusionVMRSelfAttention}

    def __init__(self, config: DiffusionVMRConfig):
        super().__init__(config)
        size = config.d_model
        self.time_embedding = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, 4 * size))
        self.layers = nn.ModuleList([DiffusionVMRDenoisingLayer(config) for _ in range(config.decoder_layers)])
        self.beyond_video = nn.Parameter(torch.empty(size))  # the feature outside the video
        self.post_init()

    def modulations(self, timesteps: Tensor) -> Tensor:
        """Return the scales and shifts (B, K, 2 D) for timesteps (B,) in all layers."""
        time = self.time_embedding(sine_embedding(timesteps, self.config.d_model).to(self.beyond_video.dtype))
        modulations = [layer.get_submodule("time_modulation")(time) for layer in self.layers]
        return torch.stack(modulations, dim=1)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        noisy_spans: Tensor,
        timesteps: Tensor | None,
        video: Tensor,
        video_mask: Tensor,
        modulations: Tensor | None = None,
        **kwargs,
    ) -> DiffusionVMRDecoderOutput:
        """
        Args:
            noisy_spans: X_t in signal space, (B, N, 2).
            timesteps: t, (B,). Not used if `modulations` are given.
            video: M_V, (B, Lv, D).
            video_mask: (B, Lv), true for real clips.
            modulations: (B, K, 2 D), what `self.modulations` returns for the timesteps, if it is known already.
        """
        if modulations is None:
            assert timesteps is not None
            modulations = self.modulations(timesteps)
        num_clips = video_mask.sum(1)
        own = bin_edges(1, device=video.device)
        around = bin_edges(self.config.roi_bins, self.config.roi_context, video.device)
        edges = torch.cat((own, around))  # bin 0 is the span itself; bin 1 lies between the two sets and is not used
        surrounded = surround(video, num_clips, self.beyond_video)
        # One clip: a narrower span has no features of its own, and a width of 0 could never grow
        min_width = 1 / num_clips[:, None]
        spans = [signal_to_spans(noisy_spans.float(), self.config.signal_scale)]
        logits = []
        for layer, modulation in zip(self.layers, modulations.unbind(1)):
            layer_spans = keep_inside(spans[-1].detach(), min_width)
            # Eq. 8, repeated in each layer for the current spans. A single bin is the exact mean over the span.
            read = roi_align(surrounded, num_clips, layer_spans, edges)
            proposals, bins = read[:, :, 0], read[:, :, 2:]
            proposals, layer_logits, layer_spans = layer(proposals, bins, layer_spans, modulation, **kwargs)
            logits.append(layer_logits)
            spans.append(layer_spans)
        return DiffusionVMRDecoderOutput(
            last_hidden_state=proposals,
            intermediate_logits=torch.stack(logits, dim=1),
            intermediate_spans=torch.stack(spans, dim=1),
        )


class DiffusionVMRProjection(nn.Sequential):
    """The two-layer MLP that projects the features of one modality to size D, as in Moment-DETR."""

    def __init__(self, config: DiffusionVMRConfig, feature_size: int):
        super().__init__(
            nn.LayerNorm(feature_size),
            nn.Dropout(config.input_dropout),
            nn.Linear(feature_size, config.d_model),
            nn.ReLU(),
            nn.LayerNorm(config.d_model),
            nn.Dropout(config.input_dropout),
            nn.Linear(config.d_model, config.d_model),
        )


class DiffusionVMRModel(DiffusionVMRPreTrainedModel):
    """Encoder and denoising decoder. `forward` is [`~DiffusionVMRModel.encode`], then one call of `denoise`."""

    def __init__(self, config: DiffusionVMRConfig):
        super().__init__(config)
        self.video_projection = DiffusionVMRProjection(config, config.video_feature_size + 2)
        self.text_projection = DiffusionVMRProjection(config, config.text_feature_size)
        self.encoder = DiffusionVMREncoder(config)
        self.decoder = DiffusionVMRDecoder(config)
        self.schedule = DiffusionSchedule(config.num_diffusion_steps, config.signal_scale)
        self.post_init()

    def encode(
        self,
        video_features: Tensor,
        text_features: Tensor,
        video_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        **kwargs,
    ) -> DiffusionVMRMemory:
        """
        Encode clips and tokens together (h, Eq. 7).

        Args:
            video_features: (B or 1, Lv, Dv). The model appends the start and end position of each clip. One video is
                projected once for all B sentences.
            text_features: (B, Lt, Dt).
            video_mask, text_mask: as the features, 1 = real, 0 = padding (on the right). Default: no padding.
            kwargs: `output_attentions`, `output_hidden_states`.
        """
        self.check_features(video_features, text_features, video_mask, text_mask)
        video_mask, text_mask = mask_of(video_features, video_mask), mask_of(text_features, text_mask)
        return self.fuse(self.project_video(video_features, video_mask), video_mask, text_features, text_mask, **kwargs)

    def project_video(self, video_features: Tensor, video_mask: Tensor) -> Tensor:
        """Project features (B, Lv, Dv) with a bool mask (B, Lv) to (B, Lv, D), the input of `fuse`."""
        positions = clip_positions(video_mask).to(video_features.dtype)
        return self.video_projection(torch.cat((video_features, positions), dim=-1))

    def fuse(
        self, video: Tensor, video_mask: Tensor, text_features: Tensor, text_mask: Tensor, **kwargs
    ) -> DiffusionVMRMemory:
        """Encode projected videos (B or 1, Lv, D) with sentences (B, Lt, Dt), both with bool masks."""
        batch_size = text_features.shape[0]
        video, video_mask = video.expand(batch_size, -1, -1), video_mask.expand(batch_size, -1)
        text = self.text_projection(text_features)
        # As in Moment-DETR: the position of a clip is its end, scaled so that the last one is 2 pi. Words have none
        sine = sine_embedding(clip_positions(video_mask)[..., 1] * (2 * math.pi), self.config.d_model).to(video.dtype)
        hidden = self.encoder(
            inputs_embeds=torch.cat((video, text), dim=1),
            attention_mask=torch.cat((video_mask, text_mask), dim=1),
            positions=F.pad(sine, (0, 0, 0, text.shape[1])),
            return_dict=True,
            **kwargs,
        )
        video, text = hidden.last_hidden_state.split((video.shape[1], text.shape[1]), dim=1)
        return DiffusionVMRMemory(
            last_hidden_state=hidden.last_hidden_state,
            video=video,
            text=text,
            video_mask=video_mask,
            hidden_states=hidden.hidden_states,
            attentions=hidden.attentions,
        )

    def denoise(
        self, memory: DiffusionVMRMemory, noisy_spans: Tensor, timesteps: Tensor, **kwargs
    ) -> DiffusionVMRDecoderOutput:
        """
        Call the decoder once (g, Eq. 6).

        Args:
            memory: the output of `encode`, which can be reused for any number of calls.
            noisy_spans: X_t in signal space, (B, N, 2).
            timesteps: t, (B,).
            kwargs: `output_attentions`, `output_hidden_states`.
        """
        return self.decoder(
            noisy_spans=noisy_spans,
            timesteps=timesteps,
            video=memory.video,
            video_mask=memory.video_mask,
            return_dict=True,
            **kwargs,
        )

    @can_return_tuple
    def forward(
        self,
        video_features: Tensor,
        text_features: Tensor,
        video_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        noisy_spans: Tensor | None = None,
        timesteps: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> DiffusionVMRModelOutput:
        """Call `encode`, then `denoise`. By default, start from the fixed noise at step T - 1."""
        flags = recording_flags(output_attentions, output_hidden_states)
        memory = self.encode(video_features, text_features, video_mask, text_mask, **flags)
        noisy_spans, timesteps = self.starting_point(text_features.shape[0], None, noisy_spans, timesteps)
        return DiffusionVMRModelOutput(**combine(memory, self.denoise(memory, noisy_spans, timesteps, **flags)))

    def starting_point(
        self, batch_size: int, num_proposals: int | None, noisy_spans: Tensor | None, timesteps: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """
        Return X_t (B, N, 2) and t (B,): the first N rows of `noisy_spans`, by default of the fixed noise, and
        `timesteps`, by default the last step.

        Raises:
            ValueError: if a shape is wrong, or if N is below 1 or above the number of rows of `noisy_spans`.
        """
        if num_proposals is None:
            num_proposals = self.config.num_proposals if noisy_spans is None else noisy_spans.shape[-2]
        if not isinstance(num_proposals, torch.SymInt):  # a length that `torch.export` leaves free, at least 1
            check_whole(num_proposals, "`num_proposals`", 1)
        if noisy_spans is None:
            noisy_spans = self.schedule.initial_noise(num_proposals)[None]
        elif noisy_spans.ndim != 3 or noisy_spans.shape[0] not in (1, batch_size) or noisy_spans.shape[2] != 2:
            raise ValueError(f"`noisy_spans` must be ({batch_size} or 1, N, 2), got {tuple(noisy_spans.shape)}")
        elif noisy_spans.shape[1] < num_proposals:
            raise ValueError(f"`num_proposals` is {num_proposals}, but `noisy_spans` has {noisy_spans.shape[1]} rows")
        if timesteps is None:
            last = self.config.num_diffusion_steps - 1
            timesteps = torch.full((batch_size,), last, dtype=torch.long, device=noisy_spans.device)
        elif timesteps.shape != (batch_size,):
            raise ValueError(f"`timesteps` must be ({batch_size},), got {tuple(timesteps.shape)}")
        return noisy_spans[:, :num_proposals].float().expand(batch_size, -1, -1), timesteps

    def check_features(self, video_features, text_features, video_mask, text_mask, text_name: str = "text"):
        """Raise ValueError, naming the argument, if the shape of features or a mask is wrong."""
        for name, features, mask, size, axes in (
            ("video", video_features, video_mask, self.config.video_feature_size, "(B, Lv, Dv)"),
            (text_name, text_features, text_mask, self.config.text_feature_size, "(B, Lt, Dt)"),
        ):
            if features.ndim != 3 or features.shape[-1] != size or not features.shape[1]:
                raise ValueError(
                    f"`{name}_features` must be {axes} with {size} values per vector, got {tuple(features.shape)}"
                )
            if mask is not None and mask.shape != features.shape[:2]:
                raise ValueError(
                    f"`{name}_mask` must be {tuple(features.shape[:2])} like the features, got {tuple(mask.shape)}"
                )
        num_videos, num_sentences = video_features.shape[0], text_features.shape[0]
        if num_videos != num_sentences and num_videos != 1:
            raise ValueError(f"got {num_videos} videos but {num_sentences} `{text_name}_features`")


def recording_flags(output_attentions: bool | None, output_hidden_states: bool | None) -> dict[str, bool]:
    """Return the flags that the caller set. The configuration decides the others."""
    flags = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
    return {name: value for name, value in flags.items() if value is not None}


def combine(memory: DiffusionVMRMemory, decoded: DiffusionVMRDecoderOutput) -> dict:
    """Return the fields that the outputs of both models share."""
    return {
        "last_hidden_state": decoded.last_hidden_state,
        "intermediate_logits": decoded.intermediate_logits,
        "intermediate_spans": decoded.intermediate_spans,
        "encoder_last_hidden_state": memory.last_hidden_state,
        "encoder_hidden_states": memory.hidden_states,
        "encoder_attentions": memory.attentions,
        "decoder_hidden_states": decoded.hidden_states,
        "decoder_attentions": decoded.attentions,
    }


class DiffusionVMRForMomentRetrieval(DiffusionVMRPreTrainedModel):
    """DiffusionVMR with diffusion, sampling, saliency head and loss."""

    def __init__(self, config: DiffusionVMRConfig):
        super().__init__(config)
        self.model = DiffusionVMRModel(config)
        self.saliency_head = nn.Linear(config.d_model, 1)
        self.backbone_sources: dict[str, str] = {}  # see checkpoint.py
        self.hub_id: str | None = None  # of the repository on the Hub that the model was loaded from
        self.hub_kwargs: dict[str, Any] = {}  # with which the model was loaded
        self.missing_weights: list[str] = []  # that the checkpoint lacked
        self.card_facts: dict[str, Any] = {}  # what happened since the model was loaded, see model_card.py
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info=False, **kwargs):
        """
        As in `transformers`. Also remember which weights were missing, and how to load the backbones from the same
        place.
        """
        is_folder = os.path.isdir(pretrained_model_name_or_path or "")
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model.missing_weights = missing_weights(info)
        if pretrained_model_name_or_path is not None and not is_folder:
            model.hub_id = str(pretrained_model_name_or_path)
        model.hub_kwargs = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
        if (commit := getattr(model.config, "_commit_hash", None)) is not None:
            model.hub_kwargs["revision"] = commit
        return (model, info) if output_loading_info else model

    # `transformers` always passes the other arguments by name
    def save_pretrained(  # type: ignore[override]
        self, save_directory, push_to_hub: bool = False, backbones: Backbones | None = None, **kwargs
    ):
        """
        Save the model with all that the pipeline needs: the processor, the backbones, and the code if it is saved too.
        Also write the model card.

        Args:
            save_directory: the folder to write.
            push_to_hub: also push the folder, see `hub.upload` for the arguments.
            backbones: loaded backbones to save. Default: those of the configuration, except larger ones on the Hub.
            kwargs: as in `transformers`.
        """
        push_options = take_push_options(kwargs, save_directory)
        if self._auto_class is not None:
            # `transformers` follows relative imports, so this import adds the pipeline's files to the checkpoint
            from .pipeline_diffusionvmr import VideoMomentRetrievalPipeline as pipeline_class

            implementation = f"{pipeline_class.__module__.split('.')[-1]}.{pipeline_class.__name__}"
            self.config.custom_pipelines = {TASK: {"impl": implementation, "pt": ["AutoModel"], "type": "multimodal"}}
        in_memory = self.config.backbones
        try:
            if kwargs.get("is_main_process", True):
                os.makedirs(save_directory, exist_ok=True)
                save_processor(self, save_directory)
                self.config.backbones = save_backbones(self, save_directory, backbones)
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.config.backbones = in_memory
        if kwargs.get("is_main_process", True):
            write_model_card(self, save_directory)
            if push_to_hub:
                upload(save_directory, **push_options)

    # Compile the modules that this function calls, but not the function: it would recompile for every shape of labels.
    # Unlike `torch.compiler.disable(recursive=False)`, which does the same, `skip` lets `torch.export` trace it
    @skip
    def forward(
        self,
        video_features: Tensor,
        text_features: Tensor,
        video_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        noisy_spans: Tensor | None = None,
        timesteps: Tensor | None = None,
        num_proposals: int | None = None,
        num_sampling_steps: int | None = None,
        labels: list[dict[str, Tensor]] | Targets | None = None,
        negative_text_features: Tensor | None = None,
        negative_text_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> DiffusionVMRMomentRetrievalOutput | tuple:
        """
        In train mode with labels, run one denoising step from X_t. Otherwise, run the deterministic sampler
        (section 3.5, "Inference").

        Args:
            video_features: (B or 1, Lv, Dv). The model appends the start and end position of each clip.
            text_features: (B, Lt, Dt).
            video_mask, text_mask: as the features, 1 = real, 0 = padding (on the right). Default: no padding.
            noisy_spans: X_t in signal space, (B or 1, N, 2). Default: drawn from the labels in train mode with labels,
                the fixed noise otherwise.
            timesteps: t of `noisy_spans`, (B,), in [0, T). Default: drawn together with them, or T - 1.
            num_proposals: N. Default: the number of rows of `noisy_spans`, or the configuration's value. If
                `noisy_spans` has more rows, the first N are used.
            num_sampling_steps: number of DDIM steps (S). Default: the configuration's value.
            labels: B dicts with `spans`, float (n, 2) with n >= 0; and optionally `saliency_pos` and `saliency_neg`,
                long (p,), pairs of clips of which the first is more salient (hinge term). Or the same as `Targets`.
            negative_text_features, negative_text_mask: a sentence of another video for each video, (B, L, Dt) and
                (B, L) (contrastive term). It must not be true in the video if `absent_loss_coefficient` is above 0:
                then the decoder also starts from `noisy_spans` with this sentence, and should find nothing (absent
                term).

        Raises:
            ValueError: if a shape is wrong, the number of labels is not B, N is below 1, or S is not in [1, T].
        """
        if num_proposals is not None:
            check_whole(num_proposals, "`num_proposals`", 1)
        batch_size = text_features.shape[0]  # not `len`, which `torch.export` takes for a constant
        if labels is not None and len(labels) != batch_size:
            raise ValueError(f"got {batch_size} samples but {len(labels)} labels")
        flags = recording_flags(output_attentions, output_hidden_states)
        targets = (
            labels
            if labels is None or isinstance(labels, Targets)
            else Targets.from_labels(labels, video_features.device)
        )
        inputs = (video_features, text_features, video_mask, text_mask)
        if negative_text_features is None:
            both = memory = self.model.encode(*inputs, **flags)
            negative_memory = None
        else:
            both = self._encode_with_negative(inputs, negative_text_features, negative_text_mask, flags)
            memory, negative_memory = halves(both)
        with_absent = negative_memory is not None and targets is not None and self.config.absent_loss_coefficient > 0

        if self.training and targets is not None:
            if (noisy_spans is None) != (timesteps is None):
                raise ValueError("in training, `noisy_spans` and `timesteps` must be given together")
            if noisy_spans is None:
                drawn = self.config.max_training_proposals if num_proposals is None else num_proposals
                schedule = self.model.schedule
                draws = schedule.draw(*targets.spans.shape[:2], drawn, device=targets.spans.device)
                noisy_spans, timesteps = schedule.corrupt(targets.spans, targets.window_mask.sum(1), draws)
        start, timesteps = self.model.starting_point(batch_size, num_proposals, noisy_spans, timesteps)
        if with_absent:
            start, timesteps = start.repeat(2, 1, 1), timesteps.repeat(2)
        condition = both if with_absent else memory
        if self.training and targets is not None:
            decoded = self.model.denoise(condition, start, timesteps, **flags)
        else:
            decoded = self._sample(condition, start, timesteps, num_sampling_steps, flags)
        decoded, negative_decoded = halves(decoded) if with_absent else (decoded, None)

        saliency_scores = self._saliency(memory)
        loss, loss_dict = None, None
        if targets is not None:
            loss, loss_dict = diffusionvmr_loss(
                decoded.intermediate_logits,
                decoded.intermediate_spans[:, 1:],
                saliency_scores,
                targets,
                memory.video_mask,
                self.config,
                None if negative_memory is None else self._saliency(negative_memory),
                None if negative_decoded is None else negative_decoded.intermediate_logits,
            )
        output = self._output(memory, decoded, saliency_scores, loss, loss_dict)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def retrieve(
        self, memory: DiffusionVMRMemory, num_proposals: int | None = None, num_sampling_steps: int | None = None
    ) -> DiffusionVMRMomentRetrievalOutput:
        """
        Run the sampler, as `forward` does in eval mode.

        Args:
            memory: from `model.encode`. It can be reused for other N and S, which only repeat the decoder.
            num_proposals, num_sampling_steps: as for `forward`.
        """
        start, timesteps = self.model.starting_point(len(memory["video"]), num_proposals, None, None)
        decoded = self._sample(memory, start, timesteps, num_sampling_steps, {})
        return self._output(memory, decoded, self._saliency(memory))

    def _output(
        self,
        memory: DiffusionVMRMemory,
        decoded: DiffusionVMRDecoderOutput,
        saliency_scores: Tensor,
        loss: Tensor | None = None,
        loss_dict: dict[str, Tensor] | None = None,
    ) -> DiffusionVMRMomentRetrievalOutput:
        fields = combine(memory, decoded)
        fields.pop("last_hidden_state")
        # The loss needs spans that extend beyond the video. In the output, they are clipped.
        noisy, refined = fields.pop("intermediate_spans").split((1, self.config.decoder_layers), dim=1)
        intermediate_spans = torch.cat((noisy, keep_inside(refined, 0.0)), dim=1)
        return DiffusionVMRMomentRetrievalOutput(
            loss=loss,
            loss_dict=loss_dict,
            logits=decoded["intermediate_logits"][:, -1],
            pred_spans=intermediate_spans[:, -1],
            intermediate_spans=intermediate_spans,
            saliency_scores=saliency_scores,
            **fields,
        )

    @skip  # compile the decoder, not this loop: it would be recompiled for every number of steps
    def _sample(
        self,
        memory: DiffusionVMRMemory,
        noisy_spans: Tensor,
        timesteps: Tensor,
        num_sampling_steps: int | None,
        flags: dict[str, bool],
    ) -> DiffusionVMRDecoderOutput:
        """Run DDIM with `num_sampling_steps` calls of the decoder. Return the output of the last call."""
        steps = self.config.num_sampling_steps if num_sampling_steps is None else num_sampling_steps
        check_num_sampling_steps(steps, self.config.num_diffusion_steps)
        schedule = self.model.schedule
        visited = sampling_timesteps(timesteps, steps)
        for index in range(steps):
            decoded = self.model.denoise(memory, noisy_spans, visited[index], **flags)
            if index + 1 < steps:
                predicted = spans_to_signal(decoded.intermediate_spans[:, -1], schedule.scale)
                noisy_spans = schedule.ddim_step(noisy_spans, predicted, visited[index], visited[index + 1])
        return decoded

    def _saliency(self, memory: DiffusionVMRMemory) -> Tensor:
        return self.saliency_head(memory.video).squeeze(-1).masked_fill(~memory["video_mask"], 0.0)

    def _encode_with_negative(self, inputs, negative_text, negative_mask, flags) -> DiffusionVMRMemory:
        """Encode B videos with their own sentences, and then with those of other videos, in one batch of 2 B."""
        video, text, video_mask, text_mask = inputs
        self.model.check_features(*inputs)
        self.model.check_features(video, negative_text, video_mask, negative_mask, "negative_text")
        video_mask = mask_of(video, video_mask)
        text, text_mask = pad_pair(text, text_mask, negative_text, negative_mask)
        video = self.model.project_video(video, video_mask)  # shared by both halves
        batch_size = inputs[1].shape[0]
        video, video_mask = video.expand(batch_size, -1, -1), video_mask.expand(batch_size, -1)
        return self.model.fuse(torch.cat((video, video)), torch.cat((video_mask, video_mask)), text, text_mask, **flags)


@torch.compiler.disable  # nothing to gain, and it would be recompiled for every shape
def halves(output: Output) -> tuple[Output, Output]:
    """Split an output of 2 B samples into two of B."""

    def half(value, index: int):
        if isinstance(value, tuple):
            return tuple(half(item, index) for item in value)
        return value.chunk(2)[index]

    first, second = (type(output)(**{name: half(v, index) for name, v in output.items()}) for index in (0, 1))
    return first, second


def mask_of(features: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mask of features (B, L, D) as bool (B, L). Default: no padding."""
    return features.new_ones(features.shape[:2], dtype=torch.bool) if mask is None else mask.bool()


def pad_pair(text, text_mask, negative_text, negative_mask) -> tuple[Tensor, Tensor]:
    """Join two batches of sentences (B, L, D) and (B, M, D), and their masks, into one of 2 B, padded to the longer."""
    length = max(text.shape[1], negative_text.shape[1])
    features, masks = [], []
    for sentence, mask in ((text, text_mask), (negative_text, negative_mask)):
        mask = mask_of(sentence, mask)
        features.append(F.pad(sentence, (0, 0, 0, length - sentence.shape[1])))
        masks.append(F.pad(mask, (0, length - mask.shape[1])))
    return torch.cat(features), torch.cat(masks)


__all__ = ["DiffusionVMRForMomentRetrieval", "DiffusionVMRModel", "DiffusionVMRPreTrainedModel"]
