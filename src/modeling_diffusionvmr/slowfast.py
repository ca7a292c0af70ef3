"""SlowFast (arXiv 1812.03982) without its classifier. Its pooled features are what was released for benchmarks."""

import math
import os
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .base_backbone import Backbone
from .checks import check_positive, check_whole
from .messages import listed
from .video import Frames, FrameSampling
from .weights import check_weight_index, check_weights, missing_weights

Size = tuple[int, int, int]  # over time, height and width
WHOLE_NUMBER_FIELDS = (
    "width",
    "frame_ratio",
    "channel_ratio",
    "fusion_kernel",
    "fusion_ratio",
    "frame_rate",
    "num_frames",
    "sampling_rate",
    "image_size",
)


@strict
class SlowFastConfig(PreTrainedConfig):
    r"""
    Configuration of a SlowFast network and of the frames that it reads. The defaults are those of SlowFast 8x8 R50 as
    PySlowFast trained it on Kinetics (facebookresearch/SlowFast, `configs/Kinetics/SLOWFAST_8x8_R50.yaml`).

    depths (`list[int]`, *optional*, defaults to `(3, 4, 6, 3)`):
        Number of blocks per stage.
    width (`int`, *optional*, defaults to 64):
        Number of channels of the slow pathway's stem. Stage i, from 0, has 4 * width * 2^i.
    slow_kernels, fast_kernels (`list[int]`, *optional*, default to `(1, 1, 1, 3, 3)` and `(5, 3, 3, 3, 3)`):
        Kernel size over time of the stem and of each stage, per pathway.
    frame_ratio (`int`, *optional*, defaults to 4):
        The fast pathway reads this many times the frames of the slow one (alpha in the paper).
    channel_ratio (`int`, *optional*, defaults to 8):
        The slow pathway has this many times the channels of the fast one (1 / beta in the paper).
    fusion_kernel, fusion_ratio (`int`, *optional*, default to 7 and 2):
        Kernel size over time of the lateral convolutions, and their outputs per channel of the fast pathway.
    frame_rate, num_frames, sampling_rate (`int`, *optional*, default to 30, 32 and 2):
        A clip is read at `frame_rate` frames per second. Of these frames, one in `sampling_rate` is chosen,
        `num_frames` in all. See `SlowFastBackbone.sampling`.
    image_size (`int`, *optional*, defaults to 224):
        Height and width of the frames.
    image_mean, image_std (`float`, *optional*, default to 0.45 and 0.225):
        Mean and standard deviation with which values in [0, 1] are normalized, the same for all colors.
    """

    model_type = "slowfast"

    depths: list[int] | tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    slow_kernels: list[int] | tuple[int, ...] = (1, 1, 1, 3, 3)
    fast_kernels: list[int] | tuple[int, ...] = (5, 3, 3, 3, 3)
    frame_ratio: int = 4
    channel_ratio: int = 8
    fusion_kernel: int = 7
    fusion_ratio: int = 2
    frame_rate: int = 30
    num_frames: int = 32
    sampling_rate: int = 2
    image_size: int = 224
    image_mean: float | int = 0.45
    image_std: float | int = 0.225

    @property
    def feature_sizes(self) -> tuple[int, int]:
        """Sizes of the pooled features of the slow and of the fast pathway."""
        slow = 4 * self.width * 2 ** (len(self.depths) - 1)
        return slow, slow // self.channel_ratio

    def validate_architecture(self):
        """Raise ValueError, naming the field, if a value is invalid."""
        for field in WHOLE_NUMBER_FIELDS:
            check_whole(getattr(self, field), f"`{field}`", low=1)
        if not math.isfinite(self.image_mean):
            raise ValueError(f"`image_mean` must be finite, got {self.image_mean}")
        check_positive(self.image_std, "`image_std`")
        if not self.depths or min(self.depths) < 1:
            raise ValueError(f"`depths` must be numbers of blocks, at least 1 per stage, got {self.depths}")
        for field in ("slow_kernels", "fast_kernels"):
            kernels = getattr(self, field)
            if len(kernels) != len(self.depths) + 1 or any(size < 1 or size % 2 == 0 for size in kernels):
                raise ValueError(f"`{field}` must be odd sizes, one for the stem and one per stage, got {kernels}")
        if self.fusion_kernel % 2 == 0:
            raise ValueError(f"`fusion_kernel` must be odd, got {self.fusion_kernel}")
        for field, multiple in (("channel_ratio", "width"), ("frame_ratio", "num_frames")):
            if getattr(self, multiple) % getattr(self, field):
                raise ValueError(
                    f"`{field}` must divide {multiple}={getattr(self, multiple)}, got {getattr(self, field)}"
                )


class FrozenBatchNorm(nn.Module):
    """Batch normalization (B, C, T, H, W) with fixed statistics, in train mode too."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int):
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


class ConvNorm(nn.Module):
    """A 3-D convolution of (B, C, T, H, W), padded so that only its stride changes the size, and a normalization."""

    def __init__(self, inputs: int, outputs: int, kernel: Size, stride: Size = (1, 1, 1)):
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        self.conv = nn.Conv3d(inputs, outputs, kernel, stride, padding, bias=False)
        self.norm = FrozenBatchNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Bottleneck(nn.Module):
    """A residual block: (B, inputs, T, H, W) to (B, 4 * width, T, H / stride, W / stride)."""

    def __init__(self, inputs: int, width: int, kernel: int, stride: int):
        super().__init__()
        outputs = 4 * width
        self.reduce = ConvNorm(inputs, width, (kernel, 1, 1))
        self.spatial = ConvNorm(width, width, (1, 3, 3), (1, stride, stride))
        self.expand = ConvNorm(width, outputs, (1, 1, 1))
        changes_shape = inputs != outputs or stride != 1
        self.shortcut = ConvNorm(inputs, outputs, (1, 1, 1), (1, stride, stride)) if changes_shape else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.spatial(F.relu(self.reduce(x))))
        return F.relu(self.expand(hidden) + self.shortcut(x))


class Stem(ConvNorm):
    """The first layers of a pathway: (B, 3, T, H, W) to (B, width, T, H / 4, W / 4)."""

    def __init__(self, width: int, kernel: int):
        super().__init__(3, width, (kernel, 7, 7), (1, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool3d(F.relu(super().forward(x)), (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))


class Pathway(nn.Module):
    """
    A stem and stages.

    Args:
        width: channels of the stem.
        kernels: kernel size over time of the stem and of each stage.
        depths: number of blocks per stage.
        fused: number of channels that each stage reads from the other pathway, after its own.
    """

    def __init__(self, width: int, kernels: Sequence[int], depths: Sequence[int], fused: Sequence[int]):
        super().__init__()
        self.stem = Stem(width, kernels[0])
        self.stages = nn.ModuleList()
        inputs = width
        for index, depth in enumerate(depths):
            first = Bottleneck(inputs + fused[index], width, kernels[index + 1], stride=1 if index == 0 else 2)
            rest = [Bottleneck(4 * width, width, kernels[index + 1], stride=1) for _ in range(depth - 1)]
            self.stages.append(nn.Sequential(first, *rest))
            inputs, width = 4 * width, 2 * width


class SlowFastModel(PreTrainedModel):
    """The two pathways, and the lateral connections from the fast one to the slow one."""

    config_class = SlowFastConfig
    config: SlowFastConfig
    main_input_name = "pixel_values"

    def __init__(self, config: SlowFastConfig):
        super().__init__(config)
        width = config.width // config.channel_ratio
        fast_sizes = [width, *(4 * width * 2**index for index in range(len(config.depths) - 1))]  # before each stage
        fused = [config.fusion_ratio * size for size in fast_sizes]
        self.slow = Pathway(config.width, config.slow_kernels, config.depths, fused)
        self.fast = Pathway(width, config.fast_kernels, config.depths, [0] * len(fused))
        kernel, stride = (config.fusion_kernel, 1, 1), (config.frame_ratio, 1, 1)
        self.laterals = nn.ModuleList(ConvNorm(*sizes, kernel, stride) for sizes in zip(fast_sizes, fused))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv3d):
            init.lecun_normal_(module.weight)
        elif isinstance(module, FrozenBatchNorm):
            for name, buffer in module.named_buffers():
                init.constant_(buffer, 1.0 if name in ("weight", "running_var") else 0.0)

    def forward(self, pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """
        Encode clips.

        Args:
            pixel_values: (B, 3, T, H, W), the normalized frames of the fast pathway. The slow pathway reads one in
                `frame_ratio` of them (PySlowFast, `pack_pathway_output`).

        Returns:
            An output with `pooler_output` (B, sum of the feature sizes): the average of each pathway over time and
            space, the slow one first.

        Raises:
            ValueError: if T is not a multiple of `frame_ratio`.
        """
        num_frames, ratio = pixel_values.shape[2], self.config.frame_ratio
        if num_frames % ratio:
            raise ValueError(f"a clip must have a multiple of {ratio} frames, got {num_frames}")
        slow_frames = torch.linspace(0, num_frames - 1, num_frames // ratio).long()
        slow, fast = self.slow.stem(pixel_values[:, :, slow_frames]), self.fast.stem(pixel_values)
        for slow_stage, fast_stage, lateral in zip(self.slow.stages, self.fast.stages, self.laterals):
            slow = slow_stage(torch.cat([slow, F.relu(lateral(fast))], dim=1))
            fast = fast_stage(fast)
        pooled = torch.cat([features.mean(dim=(2, 3, 4)) for features in (slow, fast)], dim=1)
        return BaseModelOutputWithPooling(pooler_output=pooled)


class SlowFastBackbone(Backbone):
    """
    SlowFast, used in the same way as for the released features (linjieli222/HERO_Video_Feature_Extractor,
    `slowfast/extract_feature/`): one vector per clip, of frames at 30 per second.
    """

    def __init__(self, model: SlowFastModel):
        super().__init__(model)
        self.feature_size = sum(model.config.feature_sizes)

    @classmethod
    def from_pretrained(cls, path_or_id: str | os.PathLike, subfolder: str = "", **hub_kwargs) -> "SlowFastBackbone":
        """
        Load a checkpoint that `save_pretrained` or `scripts/convert_slowfast.py` wrote.

        Raises:
            OSError: if there is no checkpoint.
            ValueError: if weights are missing or not finite, or the configuration does not describe all of them.
        """
        where = os.path.join(path_or_id, subfolder) if subfolder else path_or_id
        if os.path.isdir(where):
            check_weight_index(where)
        loaded: Any = SlowFastModel.from_pretrained(
            path_or_id, subfolder=subfolder, output_loading_info=True, use_safetensors=True, **hub_kwargs
        )
        model, info = loaded
        check_weights(model, missing_weights(info), where)
        if unexpected := sorted(info["unexpected_keys"]):
            raise ValueError(f"{where}: config.json describes another network, without {listed(unexpected)}")
        return cls(model)

    def sampling(self, clip_seconds: Fraction, fps: float) -> FrameSampling:
        """
        Return the frames of a clip, chosen as for the released features (`preprocessing.py` there): from the first one
        on, evenly over a window of `num_frames * sampling_rate * floor(fps) / frame_rate` frames, rounded down, and not
        beyond the clip's last one. The window depends on the frame rate of the source, although frames are counted at
        `frame_rate`. So at 15 frames per second, only the first half of the usual window is read. This looks like an
        oversight, but the released features were made this way.
        """
        config = self.model.config
        last = max(round(clip_seconds * config.frame_rate) - 1, 0)
        end = config.num_frames * config.sampling_rate * math.floor(fps) / config.frame_rate - 1
        indices = torch.linspace(0, end, config.num_frames).clamp(0, last).long()
        return FrameSampling(Fraction(config.frame_rate), tuple(indices.tolist()), config.image_size)

    def prepare(self, frames: Frames) -> Tensor:
        """Turn the frames (H, W, 3) uint8 RGB of a clip into (3, num_frames, H, W) float32."""
        pixels = torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).float()
        return pixels.div_(255).sub_(self.model.config.image_mean).div_(self.model.config.image_std)

    @torch.inference_mode()
    def encode_clips(self, inputs: Tensor) -> np.ndarray:
        """Encode clips (clips, 3, num_frames, H, W) to (clips, feature_size) float32."""
        pixel_values = inputs.to(self.model.device, self.model.dtype)
        return self.model(pixel_values).pooler_output.float().cpu().numpy()
