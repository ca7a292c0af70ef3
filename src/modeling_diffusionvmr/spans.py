"""
Span geometry: plain functions without weights.

A span is (center, width), as a fraction of the time that the features cover. A window is (start, end) in any unit.
The center of clip i of L is at (i + 0.5) / L.
"""

import math
from collections.abc import Sequence

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


def roi_align(
    features: Tensor, num_clips: Tensor, spans: Tensor, edges: Sequence[Tensor], beyond: Tensor | None = None
) -> Tensor:
    """
    1-D RoI-align (phi in Eq. 8): average the features over each bin of each span.

    Features are interpolated linearly between clip centers, and are constant before the first center and after the
    last. The averages are exact, not sampled: the weight of a clip in a bin is the integral of its hat function. One
    matrix product computes all bins, so the backward pass needs no scatter-add.

    Args:
        features: (B, L, D), padded on the right.
        num_clips: (B,), number of real clips in each video, at least 1. Padding is never read.
        spans: (B, N, 2). The width of a bin must not underflow in their dtype.
        edges: of one or more sets of adjacent bins, as `bin_edges` returns them.
        beyond: (D,), the feature used outside the video. Default: 0.

    Returns:
        (B, N, number of all bins, D), one set after the other, in the dtype of `features`. Coordinates and weights are
        computed in the dtype of `spans`.
    """
    sizes = [len(of_set) for of_set in edges]

    def between(values: Tensor) -> Tensor:
        """Return the differences of neighboring edges (B, N, all edges, ...) in each set."""
        return torch.cat([of_set.diff(dim=2) for of_set in values.split(sizes, dim=2)], dim=2)

    center, width = spans[..., None].split(1, dim=2)  # (B, N, 1, 1)
    position = center + width * torch.cat(tuple(edges)).to(spans.dtype)[:, None]  # (B, N, all edges, 1)
    inside = position.clamp(0, 1)
    clips = torch.arange(features.shape[1], dtype=spans.dtype, device=spans.device)
    last = num_clips.to(spans.dtype)[:, None, None, None] - 1
    place = inside * (last + 1) - 0.5  # in clips, from the center of the first one
    near = torch.minimum(place.clamp(min=0), last)
    # The integral of each clip's hat function up to each edge, up to a constant. The functions of the first and the
    # last clip stay at 1 toward the ends of the video. Beyond the last clip, nothing changes between two edges.
    offset = (near - clips).clamp(-1, 1)
    integral = torch.addcmul(offset, offset, offset.abs(), value=-0.5)
    integral = torch.addcmul(integral, (place - near).clamp(max=0), (clips == 0).to(place.dtype))
    integral = torch.addcmul(integral, (place - near).clamp(min=0), (clips == last).to(place.dtype))
    weights = between(integral)
    share = between(inside) / between(position)  # fraction of each bin that lies inside the video
    weights = weights * (share / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny))
    shape, weights = weights.shape[1:3], weights.flatten(1, 2)
    if beyond is not None:  # as if it were one more clip
        weights = torch.cat((weights, 1 - share.flatten(1, 2)), dim=-1)
        features = torch.cat((features, beyond.to(features.dtype).expand(features.shape[0], 1, -1)), dim=1)
    return torch.matmul(weights.to(features.dtype), features).unflatten(1, shape)


def keep_inside(spans: Tensor, min_width: Tensor | float) -> Tensor:
    """
    Clip spans (..., 2) to [0, 1], widen those narrower than `min_width` (at most 1), and shift them back inside if
    widening pushed them past an end.
    """
    start, end = span_to_window(spans).clamp(0, 1).unbind(-1)
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
