"""
Search a long video: the model runs on overlapping windows of the video's clips, and what it finds is merged.

A search window is a slice of the clips, [first, last). Windows of the finest scale have `chunk` clips and overlap by
two strides. Those of the next scale are twice as long and overlap by twice as much, and so on; the coarsest scale is
one window, the whole video. The processor averages a window of more clips than the model reads. The model itself never
hears of windows.

Within a scale, one window owns each point in time: neighbors divide their overlap in the middle. A window keeps the
moments whose center it owns, so a moment in an overlap is found once. A moment of up to two strides lies completely in
the window that owns its center. Longer moments may not, so the next scale looks for these, and only for these.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .checks import check_positive, is_number
from .processing_diffusionvmr import DiffusionVMRProcessor, check_outputs

MAX_BATCH = 32  # pairs of a window and a sentence: memory does not grow with the number of either
EDGE = 0.5  # in clips that the model reads: a moment that comes closer to the edge of its window counts as cut


class SearchWindow(NamedTuple):
    """
    A slice of a video that the model searches alone. All fields count clips of the video.

    `first`, `last`: the slice is [first, last). `own_start`, `own_end`: the window keeps moments whose center lies in
    [own_start, own_end). `shortest`: the window keeps moments longer than this; finer scales find the others.
    """

    first: int
    last: int
    own_start: float
    own_end: float
    shortest: float


def check_chunks(chunk_length_s: Any, stride_length_s: Any, clip_seconds: float, max_clips: int) -> None:
    """Raise `ValueError` if the length or the stride of the windows, in seconds, is invalid. `None` is valid."""
    if chunk_length_s is not None:
        check_positive(chunk_length_s, "`chunk_length_s`")
        if chunk_length_s < clip_seconds:
            raise ValueError(
                f"`chunk_length_s` must be at least the length of a clip, {clip_seconds:g} s, got {chunk_length_s!r}"
            )
    if stride_length_s is not None:
        if not is_number(stride_length_s) or stride_length_s < 0:
            raise ValueError(f"`stride_length_s` must be a number of at least 0, got {stride_length_s!r}")
        chunk = max_clips * clip_seconds if chunk_length_s is None else chunk_length_s
        if 2 * stride_length_s >= chunk:
            raise ValueError(
                f"`stride_length_s` must be less than half of `chunk_length_s`, {chunk:g} s, got {stride_length_s!r}"
            )


def plan_windows(num_clips: int, chunk: int, stride: float | None = None) -> list[SearchWindow]:
    """
    Return the windows of all scales, the finest first, each scale in the order of time.

    Args:
        num_clips: number of clips of the video.
        chunk: number of clips of a window of the finest scale. If it is at least `num_clips`, there is one window.
        stride: the part at each side of such a window, in clips, that is left to its neighbor. At most half of `chunk`.
            Default: a quarter of `chunk`.
    """
    stride = chunk / 4 if stride is None else stride
    windows: list[SearchWindow] = []
    shortest = -math.inf
    while True:
        windows += _scale(num_clips, chunk, stride, shortest)
        if chunk >= num_clips:
            return windows
        shortest, chunk, stride = 2 * stride, 2 * chunk, 2 * stride


def _scale(num_clips: int, chunk: int, stride: float, shortest: float) -> Iterator[SearchWindow]:
    """Yield the windows of one scale: of equal length, spread evenly over the video."""
    length = min(chunk, num_clips)
    count = 1 + math.ceil((num_clips - length) / max(1, length - 2 * stride))
    firsts = [round(first) for first in np.linspace(0, num_clips - length, count)]
    borders = [-math.inf, *((before + length + after) / 2 for before, after in zip(firsts, firsts[1:])), math.inf]
    for first, own_start, own_end in zip(firsts, borders, borders[1:]):
        yield SearchWindow(first, first + length, own_start, own_end, shortest)


@dataclass(frozen=True)
class Findings:
    """
    The merged outputs of the model for one sentence in a video, as `post_process_moment_retrieval` takes them.

    logits: (1, M, 2) of M moments. pred_spans: (1, M, 2), float64, as fractions of the time that all clips cover.
    saliency_scores: (1, L), for L equal parts of that time.
    """

    logits: Tensor
    pred_spans: Tensor
    saliency_scores: Tensor


def merge(windows: Sequence[SearchWindow], logits: Tensor, spans: Tensor, saliency: Tensor, max_clips: int) -> Findings:
    """
    Merge the outputs of the model for one sentence in the W windows of a video. A single window changes nothing.

    Args:
        windows: from `plan_windows`.
        logits, spans: of each window, (W, N, 2).
        saliency: of each window, (W, at least the number of clips that the model reads of the first one).
        max_clips: the largest number of clips that the model reads.
    """
    first, last, own_start, own_end, shortest = torch.tensor(windows, dtype=torch.float64).T[..., None]
    size, num_clips = last - first, windows[-1].last
    # In float64, multiplying by the number of clips and dividing by it again changes no float32 number
    center, width = (spans.double() * size[..., None]).unbind(-1)
    center = center + first
    edge = EDGE * size / size.clamp(max=max_clips)
    is_cut = ((first > 0) & (center - width / 2 < first + edge)) | (
        (last < num_clips) & (center + width / 2 > last - edge)
    )
    kept = (own_start <= center) & (center < own_end) & (width > shortest) & ~is_cut
    placed = torch.stack((center, width), dim=-1) / num_clips
    return Findings(logits[kept][None], placed[kept][None], _merged_saliency(windows, saliency, max_clips)[None])


def _merged_saliency(windows: Sequence[SearchWindow], saliency: Tensor, max_clips: int) -> Tensor:
    """Return the saliency of each clip (L,) from the window of the finest scale that owns it."""
    length = windows[0].last - windows[0].first
    num_parts = min(length, max_clips)
    if len(windows) == 1:
        return saliency[0, :num_parts]
    clips = np.arange(windows[-1].last)
    finest = [window for window in windows if window.last - window.first == length]
    owner = np.searchsorted([window.own_end for window in finest], clips + 0.5, side="right")
    offset = clips - np.array([window.first for window in finest])[owner]
    return saliency[owner, offset * num_parts // length]


def search(
    model,
    processor: DiffusionVMRProcessor,
    arrays: Sequence[np.ndarray],
    texts: Tensor,
    text_mask: Tensor,
    windows: Sequence[SearchWindow],
    progress: bool = False,
    **options,
) -> list[Findings]:
    """
    Search the windows of one video for each of S sentences, in batches of at most `MAX_BATCH` pairs.

    Args:
        model: a `DiffusionVMRForMomentRetrieval` in eval mode.
        processor: prepares each window.
        arrays: features of the video, (L, D) per backbone.
        texts, text_mask: prepared sentences, (S, Lt, Dt) and (S, Lt).
        windows: from `plan_windows`.
        progress: show a progress bar, if there are several windows.
        options: `num_proposals` and `num_sampling_steps`.

    Raises:
        ValueError: if features or outputs contain NaN or infinity.
    """
    per_group = max(1, MAX_BATCH // len(texts))
    groups = range(0, len(windows), per_group)
    parts: list[tuple[Tensor, ...]] = []
    for start in tqdm(groups, desc="searching windows", disable=not progress or len(windows) == 1):
        group = windows[start : start + per_group]
        clips, clip_mask = processor.pad(
            [processor.prepare_video([array[window.first : window.last] for array in arrays]) for window in group]
        )
        parts.append(_search_group(model, clips, clip_mask, texts, text_mask, options))
    shortest = min(saliency.shape[-1] for _, _, saliency in parts)  # windows of the finest scale are not longer
    findings = []
    for sentence in range(len(texts)):  # one by one, so that there is no second copy of all outputs
        logits = torch.cat([part[0][sentence] for part in parts])
        spans = torch.cat([part[1][sentence] for part in parts])
        saliency = torch.cat([part[2][sentence, :, :shortest] for part in parts])
        findings.append(merge(windows, logits, spans, saliency, processor.max_clips))
    return findings


def _search_group(model, clips: Tensor, clip_mask: Tensor, texts: Tensor, text_mask: Tensor, options) -> tuple:
    """Return logits (S, W, N, 2), spans (S, W, N, 2) and saliency (S, W, L) of W windows for S sentences."""
    found = []
    for sentences, mask in zip(texts.split(MAX_BATCH), text_mask.split(MAX_BATCH)):
        count, num_windows = len(sentences), len(clips)
        repeats = count if num_windows > 1 else 1  # the model itself repeats a single video, after projecting it once
        outputs = model(
            video_features=clips.to(model.device, model.dtype).repeat(repeats, 1, 1),
            video_mask=clip_mask.to(model.device).repeat(repeats, 1),
            text_features=sentences.to(model.device, model.dtype).repeat_interleave(num_windows, 0),
            text_mask=mask.to(model.device).repeat_interleave(num_windows, 0),
            **options,
        )
        check_outputs(outputs)
        fields = outputs.logits, outputs.pred_spans, outputs.saliency_scores
        found.append([field.float().cpu().unflatten(0, (count, num_windows)) for field in fields])
    return tuple(torch.cat(field) for field in zip(*found))
