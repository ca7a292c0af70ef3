"""
The training targets of one sample, from the annotations of its row: true spans, saliency of clips, and pairs of clips.

Annotated clips are 2 s long, as in QVHighlights; the clips of the features can have any length. `covered` is the time
in seconds that the features cover, which can differ slightly from the video's duration.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.annotations import SALIENCY_CLIP_SECONDS
from ..spans import relevant_clips, window_to_span

NUM_SALIENCY_PAIRS = 2  # per sample, as in Moment-DETR: a hard and an easy one


def true_spans(windows: Sequence[Sequence[float]], covered: float) -> Tensor:
    """
    Return the spans (n, 2) of windows in seconds, in a video whose features cover `covered` seconds.

    A window that reaches beyond the features is cut there. A window that lies entirely beyond them is ignored.
    """
    shares = torch.tensor(windows, dtype=torch.float32).reshape(-1, 2) / covered
    return window_to_span(shares[shares[:, 0] < 1].clamp(max=1))


def clip_scores(row: Mapping[str, Any], spans: Tensor, covered: float, num_clips: int) -> np.ndarray:
    """
    Return the saliency of each clip, (num_clips,): above 0 if it is relevant, and higher for higher annotators' scores.

    Without annotators' scores, all relevant clips have the same saliency.

    Args:
        row: the annotations.
        spans: the row's true spans, (n, 2).
        covered: seconds that the features cover.
        num_clips: the number of clips in the features.
    """
    if row.get("saliency_scores"):
        annotated = np.asarray(row["relevant_clip_ids"])
        totals = np.sum(row["saliency_scores"], axis=1) + 1.0
        inside = (annotated + 0.5) * SALIENCY_CLIP_SECONDS < covered
        if inside.any():
            return annotated_scores(annotated[inside], totals[inside], covered, num_clips)
    is_real = torch.ones(1, len(spans), dtype=torch.bool)
    return relevant_clips(spans[None], is_real, torch.tensor([num_clips]), num_clips)[0].numpy().astype(float)


def annotated_scores(annotated: np.ndarray, totals: np.ndarray, covered: float, num_clips: int) -> np.ndarray:
    """
    Map scores of annotated clips, of 2 s each, to clips of the features: (A,) to (num_clips,).

    A clip gets the highest score among the annotated clips whose center it contains and the annotated clip that
    contains its own center.
    """
    scores = np.zeros(num_clips)
    np.maximum.at(scores, feature_clips_at(annotated, covered, num_clips), totals)
    around = annotated_clips_at(covered, num_clips)
    total_of = np.zeros(max(annotated.max(), around.max()) + 1)
    total_of[annotated] = totals
    return np.maximum(scores, total_of[around])


def feature_clips_at(annotated: np.ndarray, covered: float, num_clips: int) -> np.ndarray:
    """Return the clip of the features that contains the center of each annotated clip, (A,)."""
    centers = (annotated + 0.5) * SALIENCY_CLIP_SECONDS
    return np.minimum((centers / covered * num_clips).astype(int), num_clips - 1)


def annotated_clips_at(covered: float, num_clips: int) -> np.ndarray:
    """Return the annotated clip that contains the center of each clip of the features, (num_clips,)."""
    centers = (np.arange(num_clips) + 0.5) * (covered / num_clips)
    return (centers / SALIENCY_CLIP_SECONDS).astype(int)


def draw_saliency_pairs(scores: np.ndarray, rng: np.random.Generator) -> Tensor:
    """
    Draw pairs of a more and a less salient clip: long (2, P), the more salient first. P is 0 if all clips are equal.

    As in Moment-DETR, one pair is hard (the best against the worst of the relevant clips) and one is easy (a relevant
    clip against an irrelevant one). If only one kind is possible, both pairs are of that kind.

    Args:
        scores: (L,) from `clip_scores`.
    """
    relevant, irrelevant = np.flatnonzero(scores > 0), np.flatnonzero(scores == 0)
    best = np.flatnonzero(scores == scores.max())
    worst = relevant[scores[relevant] == scores[relevant].min(initial=np.inf)]
    kinds = []
    if len(relevant) and scores[best[0]] > scores[worst[0]]:
        kinds.append((best, worst))
    if len(relevant) and len(irrelevant):
        kinds.append((relevant, irrelevant))
    pairs = [kinds[pair % len(kinds)] for pair in range(NUM_SALIENCY_PAIRS)] if kinds else []
    drawn = [[rng.choice(better), rng.choice(worse)] for better, worse in pairs]
    return torch.tensor(drawn, dtype=torch.long).reshape(-1, 2).T
