"""
Span geometry: plain functions without weights.

A span is (center, width), as a fraction of the time that the features cover. A window is (start, end) in any unit.
The center of clip i of L is at (i + 0.5) / L.
"""

import math

import torch
from torch import Tensor

MAX_WIDENING = 1000.0  # keeps e^delta finite


def span_to_window(spans: Tensor) -> Tensor:
    """Convert spans (..., 2) from (center, width) to (start, end)."""
    center, width = spans.unbind(-1)
    return torch.stack((center - width / 2, center + width / 2), dim=-1)


def window_to_span(windows: Tensor) -> Tensor:
    """Convert windows (..., 2) from (start, end) to (center, width)."""
    start, end = windows.unbind(-1)
    return torch.stack(((start + end) / 2, end - start), dim=-1)


def iou_and_generalized_iou(spans: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """
    Return the 1-D IoU and the generalized IoU (Rezatofighi et al., arXiv 1902.09630) of two sets of spans.

    The generalized IoU lies in [-1, 1] and also has a gradient if the spans do not overlap. Both are 0 for two equal
    spans of width 0.

    Args:
        spans, other: (..., 2), broadcast against each other.

    Returns:
        Two tensors (...).
    """
    start, end = span_to_window(spans).unbind(-1)
    other_start, other_end = span_to_window(other).unbind(-1)
    tiny = torch.finfo(start.dtype).tiny
    intersection = (torch.minimum(end, other_end) - torch.maximum(start, other_start)).clamp(min=0)
    union = (end - start) + (other_end - other_start) - intersection
    hull = torch.maximum(end, other_end) - torch.minimum(start, other_start)
    iou = intersection / union.clamp(min=tiny)
    return iou, iou - (hull - union) / hull.clamp(min=tiny)


def bin_edges(bins: int, context: float = 1.0, device: torch.device | None = None) -> Tensor:
    """
    Return the edges (bins + 1,) of equal bins, from the center of a span and in widths of the span. Together they are
    `context` times as wide as the span.
    """
    return torch.linspace(-context / 2, context / 2, bins + 1, device=device)


def surround(features: Tensor, num_clips: Tensor, beyond: Tensor | None = None) -> Tensor:
    """
    Return what `roi_align` reads: the features, then what it finds before the center of the first clip, after the
    center of the last one, and outside the video.

    Args:
        features: (B, L, D), padded on the right.
        num_clips: (B,), number of real clips in each video, at least 1.
        beyond: (D,), the feature outside the video. Default: 0.

    Returns:
        (B, L + 3, D), in the dtype of `features`.
    """
    batch, _, size = features.shape
    last = features[torch.arange(batch, device=features.device), num_clips - 1]
    outside = features.new_zeros(size) if beyond is None else beyond.to(features.dtype)
    return torch.cat((features, features[:, :1], last[:, None], outside.expand(batch, 1, size)), dim=1)


def roi_align(surrounded: Tensor, num_clips: Tensor, spans: Tensor, edges: Tensor) -> Tensor:
    """
    1-D RoI-align (phi in Eq. 8): average the features over bins of each span.

    Features are interpolated linearly between clip centers, and are constant before the first center and after the
    last. The averages are exact, not sampled: the weight of a clip in a bin is the integral of its hat function. One
    matrix product computes all bins, so the backward pass needs no scatter-add.

    Args:
        surrounded: the features, from `surround`, (B, L + 3, D). Padding has no weight.
        num_clips: (B,), number of real clips in each video.
        spans: (B, N, 2). No bin may be so narrow that its edges are the same number in their dtype.
        edges: (E,), from the center of a span and in widths of the span, see `bin_edges`. Two neighbors bound a bin.

    Returns:
        (B, N, E - 1, D), in the dtype of the features. Coordinates and weights are computed in the dtype of `spans`.
    """
    num_clips = num_clips.to(spans.dtype)[:, None, None]
    center, width = (spans * num_clips).split(1, dim=2)
    place = torch.addcmul(center - 0.5, width, edges.to(spans.dtype))  # (B, N, E), in clips from the first center
    inside = torch.minimum(place.clamp(min=-0.5), num_clips - 0.5)
    near = torch.minimum(place.clamp(min=0), num_clips - 1)
    clips = torch.arange(surrounded.shape[1] - 3, dtype=spans.dtype, device=spans.device)
    # Up to each edge: the integral of each clip's hat function, up to a constant, and the lengths of the other parts
    offset = (near[..., None] - clips).clamp(-1, 1)
    integral = torch.addcmul(offset, offset, offset.abs(), value=-0.5)
    past = inside - near
    others = torch.stack((past.clamp(max=0), past.clamp(min=0), place - inside), dim=-1)
    weights = torch.cat([part.diff(dim=2).flatten(1, 2) for part in (integral, others)], dim=-1)
    length = place.diff(dim=2)
    weights = weights / length.flatten(1)[..., None]
    return torch.matmul(weights.to(surrounded.dtype), surrounded).unflatten(1, length.shape[1:])


def keep_inside(spans: Tensor, min_width: Tensor | float) -> Tensor:
    """
    Clip spans (..., 2) to [0, 1], widen those narrower than `min_width` (at most 1), and shift them back inside if
    widening pushed them past an end.
    """
    center, width = spans.unbind(-1)
    start, end = (center - width / 2).clamp(0, 1), (center + width / 2).clamp(0, 1)
    half = (end - start).clamp(min=min_width) / 2
    center = ((start + end) / 2).clamp(half, 1 - half)
    return torch.stack((center, 2 * half), dim=-1)


def refine(spans: Tensor, deltas: Tensor) -> Tensor:
    """
    Apply predicted deltas (..., 2) to spans (..., 2) of positive width, as Sparse R-CNN and DiffusionDet do for boxes.

    The center moves by delta / 2 widths. The width is multiplied by e^delta, at most by `MAX_WIDENING`.
    """
    center, width = spans.unbind(-1)
    shift, growth = deltas.unbind(-1)
    return torch.stack((center + shift / 2 * width, width * growth.clamp(max=math.log(MAX_WIDENING)).exp()), dim=-1)


def relevant_clips(spans: Tensor, window_mask: Tensor, num_clips: Tensor, length: int) -> Tensor:
    """
    Mark the clips that belong to a moment: those whose center lies in it, and the one that contains its center.

    Args:
        spans: (B, M, 2).
        window_mask: (B, M), true for real spans.
        num_clips: (B,), number of real clips in each video.
        length: L, number of clips including padding.

    Returns:
        A bool tensor (B, L).
    """
    start, end = (span_to_window(spans) * num_clips[:, None, None])[..., None, :].unbind(-1)
    clips = torch.arange(length, device=spans.device)
    central = torch.minimum((spans[..., :1] * num_clips[:, None, None]).floor(), num_clips[:, None, None] - 1)
    belongs = ((start <= clips + 0.5) & (clips + 0.5 <= end)) | (clips == central)
    return (belongs & window_mask[..., None]).any(1) & (clips < num_clips[:, None])


def nms(windows: Tensor, threshold: float) -> Tensor:
    """
    Non-maximum suppression: drop each window whose IoU with a better window that was kept is above `threshold`.

    Args:
        windows: (M, 2), sorted by descending score.

    Returns:
        A bool tensor (M,), true for windows to keep.
    """
    spans = window_to_span(windows)
    keep = torch.ones(len(windows), dtype=torch.bool)
    for index in range(len(windows)):
        if keep[index]:
            iou, _ = iou_and_generalized_iou(spans[index], spans[index + 1 :])
            keep[index + 1 :] &= iou <= threshold
    return keep
