"""
The diffusion process on spans (section 3.1): noise schedule, forward process, DDIM step and fixed inference noise.

This module works on plain tensors and does not depend on the network. Spans in [0, 1] are scaled to signals in
[-scale, scale].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .checks import check_whole


def cosine_alphas_cumprod(num_steps: int) -> Tensor:
    """
    Return the cumulative products of alpha (Eq. 2) for the cosine schedule of Nichol and Dhariwal (arXiv 2102.09672),
    with beta clamped to 0.999 as in DiffusionDet: a float64 tensor (num_steps,) that falls from nearly 1 to nearly 0.
    """
    steps = torch.arange(num_steps + 1, dtype=torch.float64, device="cpu")
    remaining = torch.cos((steps / num_steps + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = (1 - remaining[1:] / remaining[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - betas, dim=0)


def fixed_noise(num_proposals: int) -> Tensor:
    """
    Return the noise that inference starts from: (num_proposals, 2) float32.

    The rows are a Sobol sequence mapped through the inverse normal CDF. They are normally distributed, and cover the
    space more evenly than independent samples. A smaller table is a prefix of a larger one. The noise is computed on
    the CPU, so that it is the same on every device.
    """
    with torch.device("cpu"):  # a model may be under construction on another device
        uniform = torch.quasirandom.SobolEngine(2).fast_forward(1).draw(num_proposals, dtype=torch.float64)
    return torch.special.ndtri(uniform).float()


def spans_to_signal(spans: Tensor, scale: float) -> Tensor:
    """Convert spans in [0, 1] to signals in [-scale, scale]."""
    return (spans * 2 - 1) * scale


def signal_to_spans(signal: Tensor, scale: float) -> Tensor:
    """Convert signals to spans in [0, 1]. Values outside [-scale, scale] are clamped."""
    return (signal.clamp(-scale, scale) / scale + 1) / 2


def check_num_sampling_steps(value: Any, num_diffusion_steps: int) -> None:
    """Raise `ValueError` unless the number of DDIM steps is a whole number from 1 to `num_diffusion_steps`."""
    check_whole(value, "`num_sampling_steps`")
    if not 1 <= value <= num_diffusion_steps:
        raise ValueError(f"`num_sampling_steps` must be 1 to num_diffusion_steps={num_diffusion_steps}, got {value}")


def sampling_timesteps(timesteps: Tensor, num_sampling_steps: int) -> Tensor:
    """
    Return the timesteps that the sampler visits on its way from `timesteps` (B,) to 0: evenly spaced, starting at
    `timesteps` itself ("trailing" spacing: Lin et al., arXiv 2305.08891).

    Returns:
        A long tensor (num_sampling_steps + 1, B). The last row is -1, the clean signal. Timestep 0 repeats if fewer
        than `num_sampling_steps` steps are left.
    """
    left = torch.arange(num_sampling_steps, 0, -1, device=timesteps.device)[:, None] / num_sampling_steps
    visited = (((timesteps + 1) * left).round().long() - 1).clamp(min=0)
    return torch.cat((visited, torch.full_like(timesteps[None], -1)))


@dataclass(frozen=True)
class Draws:
    """
    The random numbers of B training samples with up to M true spans and N proposals.

    Attributes:
        order: (B, M) in [0, 1), shuffles the true spans.
        padding: (B, N, 2) in [0, 1), the two ends of each random span.
        timesteps: (B,), long, t.
        noise: (B, N, 2), Gaussian.
    """

    order: Tensor
    padding: Tensor
    timesteps: Tensor
    noise: Tensor


class DiffusionSchedule(nn.Module):
    """
    The noise schedule, as tables on the model's device. They stay float32 in any model dtype and are not saved.

    Args:
        num_steps: number of diffusion steps (T).
        scale: signals lie in [-scale, scale].
    """

    alphas_cumprod: Tensor  # (T,)
    noise_table: Tensor  # (table_size, 2)
    table_size = 1024  # rows of fixed noise kept on the device; larger tables are computed on demand

    def __init__(self, num_steps: int, scale: float):
        super().__init__()
        self.num_steps = num_steps
        self.scale = scale
        device = torch.empty(0).device  # the current default device, which may be "meta"
        for name, table in self.tables().items():
            self.register_buffer(name, table.to(device), persistent=False)

    def tables(self) -> dict[str, Tensor]:
        """Return the contents of the buffers by name."""
        return {
            "alphas_cumprod": cosine_alphas_cumprod(self.num_steps).float(),
            "noise_table": fixed_noise(self.table_size),
        }

    def _apply(self, fn, recurse=True):
        # `model.to(torch.bfloat16)` moves the tables but keeps their dtype: bfloat16 resolves only 0.6 s of 150 s
        for name, buffer in self._buffers.items():
            moved = fn(buffer)
            self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self

    def initial_noise(self, num_proposals: int) -> Tensor:
        """Return the first rows of the fixed noise: (num_proposals, 2), on the model's device."""
        if num_proposals <= self.table_size:
            return self.noise_table[:num_proposals]
        return fixed_noise(num_proposals).to(self.noise_table.device)

    def _alpha(self, timesteps: Tensor) -> Tensor:
        alpha = self.alphas_cumprod[timesteps.clamp(min=0)]
        return torch.where(timesteps < 0, 1.0, alpha)[:, None, None]

    def add_noise(self, signal: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Compute X_t from X_0 (Eq. 2). `signal` and `noise` are (B, N, 2), `timesteps` is (B,)."""
        alpha = self._alpha(timesteps)
        return alpha.sqrt() * signal + (1 - alpha).sqrt() * noise

    def ddim_step(self, noisy: Tensor, predicted: Tensor, timesteps: Tensor, next_timesteps: Tensor) -> Tensor:
        """
        Take one deterministic DDIM step (eta = 0; Song et al., arXiv 2010.02502) with a network that predicts X_0.

        Args:
            noisy: X_t, (B, N, 2).
            predicted: the network's prediction of X_0, (B, N, 2). It is clamped to the signal scale.
            timesteps: t, (B,).
            next_timesteps: the timesteps to step to, (B,), below t. -1 means the clean signal.

        Returns:
            X at `next_timesteps`, (B, N, 2).
        """
        predicted = predicted.clamp(-self.scale, self.scale)
        alpha, next_alpha = self._alpha(timesteps), self._alpha(next_timesteps)
        noise = (noisy - alpha.sqrt() * predicted) / (1 - alpha).sqrt()
        return next_alpha.sqrt() * predicted + (1 - next_alpha).sqrt() * noise

    def draw(self, batch: int, max_spans: int, num_proposals: int, device: torch.device | None = None) -> Draws:
        """Draw the random numbers that `corrupt` needs for B samples of up to M spans, from torch's global state."""
        return Draws(
            padding=torch.rand(batch, num_proposals, 2, device=device),
            timesteps=torch.randint(self.num_steps, (batch,), device=device),
            noise=torch.randn(batch, num_proposals, 2, device=device),
            order=torch.rand(max_spans, batch, device=device).T,  # last and transposed: a larger M changes nothing else
        )

    def draw_samples(self, rngs: Sequence[np.random.Generator], max_spans: int, num_proposals: int) -> Draws:
        """Like `draw`, but from one NumPy generator per sample, so that samples do not depend on their batch."""
        padding, timesteps, noise, order = zip(
            *(
                (
                    rng.random((num_proposals, 2), dtype=np.float32),
                    rng.integers(self.num_steps),
                    rng.standard_normal((num_proposals, 2), dtype=np.float32),
                    rng.random(max_spans, dtype=np.float32),  # last: the M of the batch changes nothing else
                )
                for rng in rngs
            )
        )
        return Draws(*(torch.from_numpy(np.stack(numbers)) for numbers in (order, padding, timesteps, noise)))

    def corrupt(self, spans: Tensor, counts: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """
        Pad the true spans with random ones and add the noise of step t (section 3.2).

        The true spans come first, in random order, so that the first N rows are valid for any N. If there are more true
        spans than proposals, some are left out. A random span lies between two random points of the video, so that at
        a small t its width does not distinguish it from a true span.

        Args:
            spans: the true spans, (B, M, 2), padded on the right.
            counts: number of true spans of each sample, (B,).
            draws: from `draw` or `draw_samples`.

        Returns:
            X_t (B, N, 2) in signal space, and t (B,), long.
        """
        max_spans, num_proposals = draws.order.shape[1], draws.noise.shape[1]
        order = draws.order + (torch.arange(max_spans, device=spans.device) >= counts[:, None])
        shuffled = spans.gather(1, order.argsort(dim=1)[..., None].expand(-1, -1, 2))[:, :num_proposals]
        shuffled = nn.functional.pad(shuffled, (0, 0, 0, num_proposals - shuffled.shape[1]))
        padding = torch.stack((draws.padding.mean(-1), draws.padding.diff(dim=-1).abs().squeeze(-1)), dim=-1)
        is_true = torch.arange(num_proposals, device=spans.device) < counts[:, None]
        clean = torch.where(is_true[..., None], shuffled, padding)
        noisy = self.add_noise(spans_to_signal(clean, self.scale), draws.noise, draws.timesteps)
        return noisy, draws.timesteps
