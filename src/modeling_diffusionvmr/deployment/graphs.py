"""
The parts of the model that are exported, as modules whose inputs and outputs are tensors: the encoder, what depends on
the timestep alone, and one call of the decoder. Sampling stays outside, so that the numbers of proposals and of steps
are free.
"""

from torch import Tensor, nn

from ..configuration_diffusionvmr import DiffusionVMRConfig
from ..modeling_diffusionvmr import DiffusionVMRForMomentRetrieval

Axes = dict[str, tuple[str | int, ...]]
"""The shape of each input or output by its name. A string names an axis of free length."""


class Graph(nn.Module):
    """A part of a model that is exported to a file of its own."""

    file_name: str

    def __init__(self, model: DiffusionVMRForMomentRetrieval):
        super().__init__()
        self.config = model.config
        self.network = model

    @staticmethod
    def inputs(config: DiffusionVMRConfig) -> Axes:
        """Return the shapes of the arguments of `forward`, in their order. Masks and timesteps are int64."""
        raise NotImplementedError

    @staticmethod
    def outputs(config: DiffusionVMRConfig) -> Axes:
        """Return the shapes of what `forward` returns, in their order. All are float32."""
        raise NotImplementedError


class EncoderGraph(Graph):
    """The encoder (h, Eq. 7) with the saliency head."""

    file_name = "encoder.onnx"

    @staticmethod
    def inputs(config: DiffusionVMRConfig) -> Axes:
        return {
            "video_features": ("batch", "clips", config.video_feature_size),
            "text_features": ("batch", "tokens", config.text_feature_size),
            "video_mask": ("batch", "clips"),
            "text_mask": ("batch", "tokens"),
        }

    @staticmethod
    def outputs(config: DiffusionVMRConfig) -> Axes:
        return {
            "last_hidden_state": ("batch", "clips + tokens", config.d_model),
            "saliency_scores": ("batch", "clips"),
        }

    def forward(
        self, video_features: Tensor, text_features: Tensor, video_mask: Tensor, text_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the encoded clips, followed by the tokens, (B, Lv + Lt, D), and the saliency of each clip (B, Lv)."""
        memory = self.network.model.encode(video_features, text_features, video_mask, text_mask)
        return memory.last_hidden_state, self.network._saliency(memory)


class TimestepGraph(Graph):
    """
    The decoder's scales and shifts for a timestep. They do not depend on the query, so that a fifth of the weights need
    not be read again for each one.
    """

    file_name = "timestep.onnx"

    @staticmethod
    def inputs(config: DiffusionVMRConfig) -> Axes:
        return {"timesteps": ("batch",)}

    @staticmethod
    def outputs(config: DiffusionVMRConfig) -> Axes:
        return {"modulations": ("batch", config.decoder_layers, 2 * config.d_model)}

    def forward(self, timesteps: Tensor) -> tuple[Tensor]:
        """Return the scales and shifts (B, K, 2 D) of timesteps (B,)."""
        return (self.network.model.decoder.modulations(timesteps),)


class DenoiserGraph(Graph):
    """One call of the denoising decoder (g, Eq. 6), without what depends on the timestep alone."""

    file_name = "denoiser.onnx"

    @staticmethod
    def inputs(config: DiffusionVMRConfig) -> Axes:
        return {
            "noisy_spans": ("batch", "proposals", 2),
            "modulations": ("batch", config.decoder_layers, 2 * config.d_model),
            "video": ("batch", "clips", config.d_model),
            "video_mask": ("batch", "clips"),
        }

    @staticmethod
    def outputs(config: DiffusionVMRConfig) -> Axes:
        return {
            "intermediate_logits": ("batch", config.decoder_layers, "proposals", 2),
            "intermediate_spans": ("batch", config.decoder_layers + 1, "proposals", 2),
        }

    def forward(
        self, noisy_spans: Tensor, modulations: Tensor, video: Tensor, video_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """
        Return the logits (B, K, N, 2) and the spans (B, K + 1, N, 2) of all layers, as the decoder does.

        Args:
            noisy_spans: X_t in signal space, (B, N, 2).
            modulations: of the timestep, from [`TimestepGraph`], (B, K, 2 D).
            video: the encoded clips, (B, Lv, D).
            video_mask: (B, Lv), 1 for real clips.
        """
        decoded = self.network.model.decoder(
            noisy_spans=noisy_spans,
            timesteps=None,
            video=video,
            video_mask=video_mask.bool(),
            modulations=modulations,
            return_dict=True,
        )
        return decoded.intermediate_logits, decoded.intermediate_spans


GRAPHS: tuple[type[Graph], ...] = (EncoderGraph, TimestepGraph, DenoiserGraph)
