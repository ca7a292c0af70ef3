"""SlowFast networks with random weights, for tests."""

import torch

from modeling_diffusionvmr.slowfast import SlowFastConfig, SlowFastModel

TINY = {
    "depths": (2, 1, 3),
    "width": 8,
    "slow_kernels": (1, 1, 3, 3),
    "fast_kernels": (5, 3, 3, 3),
    "channel_ratio": 8,
    "image_size": 16,
}


def random_slowfast(config: SlowFastConfig, seed: int = 0) -> SlowFastModel:
    """A network whose statistics of batches are random, too."""
    rng = torch.manual_seed(seed)
    model = SlowFastModel(config).eval()
    for name, buffer in model.named_buffers():
        if name.endswith(("weight", "running_var")):
            buffer.uniform_(0.5, 1.5, generator=rng)
        else:
            buffer.normal_(0, 0.2, generator=rng)
    return model


def tiny_slowfast(seed: int = 0, **changes) -> SlowFastModel:
    """A small random network that reads 32 frames of 16 x 16 pixels."""
    return random_slowfast(SlowFastConfig(**{**TINY, **changes}), seed)
