"""Geometry of spans: plain functions without weights.

A span is (center, width) in [0, 1] of the time that the features cover; a window is (start, end) in the unit of the
caller. Clip i of L is centred at (i + 0.5) / L.
"""

import math

import torch
from torch import Tensor

MAX_WIDENING = 1000.0  # keeps e^delta finite


def span_to_window(spans: Tensor) -> Tensor:
    """(center, width) -> (start, end), for spans of shape (..., 2)."""
    center, width = spans.unbind(-1)
    return torch.stack((center - width / 2, center + width / 2), dim=-1)


def window_to_span(windows: Tensor) -> Tensor:
    """(start, end) -> (center, width), for windows of shape (..., 2)."""
    start, end = windows.unbind(-1)
    return torch.stack(((start + end) / 2, end - start), dim=-1)


def iou_and_generalized_iou(spans: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """
    1-D intersection over union of spans (..., 2) and others (..., 2) that broadcast against each other, and the
    generalised one (Rezatofighi et al., arXiv 1902.09630), in [-1, 1], which also has a gradient where spans do not
    touch. Two shapes (...) of numbers; 0 for two spans of width 0.
    """
    start, end = span_to_window(spans).unbind(-1)
    other_start, other_end = span_to_window(other).unbind(-1)
    tiny = torch.finfo(start.dtype).tiny
    intersection = (torch.minimum(end, other_end) - torch.maximum(start, other_start)).clamp(min=0)
    union = (end - start) + (other_end - other_start) - intersection
    hull = torch.maximum(end, other_end) - torch.minimum(start, other_start)
    iou = intersection / union.clamp(min=tiny)
    return iou, iou - (hull - union) / hull.clamp(min=tiny)


def roi_align(features: Tensor, num_clips: Tensor, spans: Tensor, bins: int, beyond: Tensor | None = None) -> Tensor:
    """
    1-D RoI-align (phi of Eq. 8): the mean over each of `bins` equal parts of a span of the linear interpolant through
    the clips, which is constant from the first and the last clip's centre to the ends of the video.

    The mean is exact, not sampled: a clip's weight in a bin is the integral of its hat function, and all bins are read
    by one matrix product, whose gradient needs no scattered additions either.

    Args:
        features: (B, L, D), padded on the right.
        num_clips: (B,), the real clips of each video, at least 1. Padding is never read.
        spans: (B, N, 2), of a width that can still be told from 0 in their type when it is divided by `bins`.
        beyond: (D,), what is read where a span reaches beyond the video, by default 0.

    Returns:
        (B, N, bins, D), in the type of `features`. Coordinates and weights are computed in the type of `spans`.
    """
    windows = span_to_window(spans)
    start, end = windows[..., :1], windows[..., 1:]
    parts = torch.linspace(0, 1, bins + 1, dtype=spans.dtype, device=spans.device)
    edges = (start + (end - start) * parts)[..., None]  # (B, N, bins + 1, 1)
    inside = edges.clamp(0, 1)
    last = num_clips.to(spans.dtype)[:, None, None, None] - 1
    clips = torch.arange(features.shape[1], dtype=spans.dtype, device=spans.device)
    offset = (inside * (last + 1) - 0.5 - clips).clamp(-1, 1)  # in clips, of which the i-th is centred at i
    # The integral of the hat function up to an edge, but for a constant; the two outermost clips stay at 1 outside
    outside = ((clips == 0) & (offset < 0)) | ((clips == last) & (offset > 0))
    integral = offset - torch.where(outside, 0.0, 0.5) * offset * offset.abs()
    weights = integral.diff(dim=2) * (clips <= last)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    share = inside.diff(dim=2) / edges.diff(dim=2)  # of each bin, in the video
    read = torch.matmul((weights * share).to(features.dtype).flatten(1, 2), features)
    read = read.unflatten(1, (spans.shape[1], bins))
    return read if beyond is None else read + (1 - share).to(features.dtype) * beyond.to(features.dtype)


def keep_inside(spans: Tensor, least_width: Tensor | float) -> Tensor:
    """
    The part of each span (..., 2) that lies inside [0, 1], widened to `least_width` (at most 1) where it is narrower,
    and moved inside where that would reach beyond an end.
    """
    window = span_to_window(spans).clamp(0, 1)
    center, width = window_to_span(window).unbind(-1)
    width = width.clamp(min=least_width)
    center = torch.minimum(torch.maximum(center, width / 2), 1 - width / 2)
    return torch.stack((center, width), dim=-1)


def refine(spans: Tensor, deltas: Tensor) -> Tensor:
    """
    Spans moved by what a layer predicts: the center by halves of the width, the width by a factor e^delta, at most
    `MAX_WIDENING`, as boxes in Sparse R-CNN and DiffusionDet. Both (..., 2), every width above 0.
    """
    center, width = spans.unbind(-1)
    shift, growth = deltas.unbind(-1)
    return torch.stack((center + shift / 2 * width, width * growth.clamp(max=math.log(MAX_WIDENING)).exp()), dim=-1)


def relevant_clips(spans: Tensor, window_mask: Tensor, num_clips: Tensor, length: int) -> Tensor:
    """
    Which clips a moment makes relevant: those whose centre it holds, and for a moment that holds none the clip in which
    its own centre lies.

    Args:
        spans: (B, M, 2); window_mask: (B, M), which of them are real.
        num_clips: (B,), the real clips of each video.
        length: L, the clips of the longest.

    Returns:
        bool (B, L).
    """
    start, end = (span_to_window(spans) * num_clips[:, None, None])[..., None, :].unbind(-1)
    clips = torch.arange(length, device=spans.device)
    own = torch.minimum((spans[..., :1] * num_clips[:, None, None]).floor(), num_clips[:, None, None] - 1)
    held = ((start <= clips + 0.5) & (clips + 0.5 <= end)) | (clips == own)
    return (held & window_mask[..., None]).any(1) & (clips < num_clips[:, None])


def nms(windows: Tensor, threshold: float) -> Tensor:
    """
    Non-maximum suppression: which of the windows (M, 2), sorted by falling score, remain when each is dropped whose
    IoU with a better one that remains is above `threshold`. A bool tensor (M,).
    """
    iou, _ = iou_and_generalized_iou(window_to_span(windows)[:, None], window_to_span(windows)[None])
    overlaps = (iou > threshold).tolist()
    keep: list[int] = []
    for index, row in enumerate(overlaps):
        if not any(row[better] for better in keep):
            keep.append(index)
    mask = torch.zeros(len(windows), dtype=torch.bool)
    mask[keep] = True
    return mask
