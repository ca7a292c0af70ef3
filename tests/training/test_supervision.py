"""Each mapping from annotations to the clips of the features, against numbers worked out by hand."""

import numpy as np
import pytest
import torch

from modeling_diffusionvmr.training.supervision import (
    annotated_clips_at,
    annotated_scores,
    clip_scores,
    draw_saliency_pairs,
    feature_clips_at,
    true_spans,
)


def test_true_spans():
    spans = true_spans([[2, 4], [18, 30], [20, 25], [0, 20]], 20.0)
    torch.testing.assert_close(spans, torch.tensor([[0.15, 0.1], [0.95, 0.1], [0.5, 1.0]]))
    assert true_spans([], 20.0).shape == true_spans([[20, 25]], 20.0).shape == (0, 2)


@pytest.mark.parametrize(
    ("covered", "num_clips", "of_annotated", "of_clips"),
    [
        (10, 5, [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),  # the same clips
        (12, 3, [0, 0, 1, 1, 2], [1, 3, 5]),  # of 4 s: centers at 2, 6 and 10 s, where an annotated clip begins
        (10, 10, [1, 3, 5, 7, 9], [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]),  # of 1 s
        (9, 3, [0, 1, 1, 2, 2], [0, 2, 3]),  # of 3 s: the last annotated center, 9 s, is the end
    ],
)
def test_clips_at_centers(covered, num_clips, of_annotated, of_clips):
    assert feature_clips_at(np.arange(5), covered, num_clips).tolist() == of_annotated
    assert annotated_clips_at(covered, num_clips).tolist() == of_clips


def test_scores_of_annotated_clips():
    # Clips of 4 s, which hold two annotated clips each, and of 1 s, two of which lie in each annotated clip
    scores = annotated_scores(np.array([0, 1, 5]), np.array([3.0, 7.0, 2.0]), 12, 3)
    assert scores.tolist() == [7, 0, 2]
    scores = annotated_scores(np.array([0, 2]), np.array([3.0, 7.0]), 6, 6)
    assert scores.tolist() == [3, 3, 0, 0, 7, 7]
    # A clip of 8 s holds four: the highest counts, neither the last nor the one at its center
    assert annotated_scores(np.arange(4), np.array([9.0, 2.0, 3.0, 1.0]), 16, 2).tolist() == [9, 0]


def test_scores_without_annotators_are_those_of_the_windows():
    row = {"relevant_clip_ids": [9], "saliency_scores": [[4, 4, 4]]}
    spans = torch.tensor([[0.5, 0.4]])
    for annotations in ({}, row):  # the annotated clip lies beyond the features
        assert clip_scores(annotations, spans, 10.0, 5).tolist() == [0, 1, 1, 1, 0]


def test_pairs():
    rng = np.random.default_rng(0)
    drawn = [draw_saliency_pairs(np.array([0.0, 3.0, 5.0, 0.0]), rng) for _ in range(40)]
    assert all(pairs.shape == (2, 2) and pairs.dtype == torch.long for pairs in drawn)
    assert {tuple(pairs[:, 0].tolist()) for pairs in drawn} == {(2, 1)}  # the best and the worst relevant clip
    assert {tuple(pairs[:, 1].tolist()) for pairs in drawn} == {(1, 0), (1, 3), (2, 0), (2, 3)}
    for scores in ([0.0, 0.0], [2.0, 2.0]):
        assert draw_saliency_pairs(np.array(scores), rng).shape == (2, 0)
