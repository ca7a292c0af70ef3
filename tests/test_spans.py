"""Span geometry, compared with numbers worked out by hand and with numerical integrals."""

import itertools
import math

import numpy as np
import pytest
import torch

from modeling_diffusionvmr.spans import (
    bin_edges,
    iou_and_generalized_iou,
    keep_inside,
    nms,
    refine,
    relevant_clips,
    roi_align,
    span_to_window,
    surround,
    window_to_span,
)


def random_spans(*shape: int, min_width: float = 0.02, seed: int = 0) -> torch.Tensor:
    """Return random spans (*shape, 2) inside [0, 1], float64."""
    random = torch.Generator().manual_seed(seed)
    width = min_width + (0.95 - min_width) * torch.rand(shape, generator=random, dtype=torch.float64)
    center = width / 2 + (1 - width) * torch.rand(shape, generator=random, dtype=torch.float64)
    return torch.stack((center, width), dim=-1)


def align(features, num_clips, spans, bins, beyond=None) -> torch.Tensor:
    """Read equal bins of spans (B, N, 2)."""
    return roi_align(surround(features, num_clips, beyond), num_clips, spans, bin_edges(bins))


def test_spans_and_windows():
    spans = torch.tensor([[0.5, 0.4], [0.1, 0.2], [0.25, 0.0]])
    windows = torch.tensor([[0.3, 0.7], [0.0, 0.2], [0.25, 0.25]])
    torch.testing.assert_close(span_to_window(spans), windows)
    torch.testing.assert_close(window_to_span(windows), spans)
    spans = random_spans(4, 7)
    torch.testing.assert_close(window_to_span(span_to_window(spans)), spans)


@pytest.mark.parametrize(
    ("window", "other", "iou", "generalized_iou"),
    [
        ((0.2, 0.6), (0.2, 0.6), 1.0, 1.0),
        ((0.2, 0.6), (0.4, 0.8), 0.2 / 0.6, 0.2 / 0.6),  # the hull is the union
        ((0.0, 1.0), (0.4, 0.5), 0.1, 0.1),
        ((0.0, 0.2), (0.2, 0.5), 0.0, 0.0),  # they touch
        ((0.0, 0.2), (0.6, 0.8), 0.0, -0.4 / 0.8),  # a gap of half the hull
        ((0.1, 0.1), (0.3, 0.9), 0.0, -0.2 / 0.8),  # width 0
        ((0.3, 0.3), (0.3, 0.3), 0.0, 0.0),
    ],
)
def test_iou_by_hand(window, other, iou, generalized_iou):
    spans = window_to_span(torch.tensor([window, other], dtype=torch.float64))
    for first, second in ((0, 1), (1, 0)):
        result = iou_and_generalized_iou(spans[first], spans[second])
        torch.testing.assert_close(torch.stack(result), torch.tensor([iou, generalized_iou], dtype=torch.float64))


def test_iou_broadcasts():
    spans, others = random_spans(5), random_spans(3, seed=1)
    table = torch.stack(iou_and_generalized_iou(spans[:, None], others[None]))
    assert table.shape == (2, 5, 3)
    for row in range(5):
        for column in range(3):
            pair = torch.stack(iou_and_generalized_iou(spans[row], others[column]))
            torch.testing.assert_close(table[:, row, column], pair)
    assert (table <= 1).all() and (table[0] >= 0).all() and (table[1] >= -1).all()


def test_iou_gradients():
    spans, others = random_spans(8).requires_grad_(), random_spans(8, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(iou_and_generalized_iou, (spans, others))
    # Without overlap, only the generalized IoU has a gradient
    apart = window_to_span(torch.tensor([0.0, 0.2], dtype=torch.float64)).requires_grad_()
    _, generalized = iou_and_generalized_iou(apart, window_to_span(torch.tensor([0.6, 0.8], dtype=torch.float64)))
    (gradient,) = torch.autograd.grad(generalized, apart)
    assert gradient[0] > 0
    empty = torch.tensor([0.3, 0.0], dtype=torch.float64).requires_grad_()
    for value in iou_and_generalized_iou(empty, empty.detach()):
        assert torch.autograd.grad(value, empty, retain_graph=True)[0].isfinite().all()


def mean_by_integration(features: np.ndarray, window: tuple[float, float], bins: int, samples: int = 4000):
    """
    Average the linear interpolant of clips (L, D) with centers (i + 0.5) / L, constant before the first and after the
    last center, over each of `bins` parts by the midpoint rule. Return (bins, D).
    """
    centers = (np.arange(len(features)) + 0.5) / len(features)
    edges = np.linspace(*window, bins + 1)
    means = []
    for start, end in itertools.pairwise(edges):
        times = start + (end - start) * (np.arange(samples) + 0.5) / samples
        means.append([np.interp(times, centers, column).mean() for column in features.T])
    return np.array(means)


@pytest.mark.parametrize("bins", [1, 4, 16])
def test_roi_align_is_the_mean_of_the_interpolant(bins):
    random = torch.Generator().manual_seed(0)
    features = torch.randn(3, 9, 2, generator=random, dtype=torch.float64)
    num_clips = torch.tensor([9, 6, 1])
    windows = torch.tensor(
        [
            [[0.0, 1.0], [0.0, 0.03], [0.97, 1.0], [0.31, 0.77]],
            [[0.0, 0.5], [0.4, 0.4001], [0.9, 1.0], [0.0, 1.0]],
            [[0.0, 1.0], [0.0, 0.2], [0.5, 0.6], [0.1, 0.9]],
        ],
        dtype=torch.float64,
    )
    result = align(features, num_clips, window_to_span(windows), bins)
    assert result.shape == (3, 4, bins, 2)
    for sample, length in enumerate(num_clips.tolist()):
        for index, window in enumerate(windows[sample].tolist()):
            expected = mean_by_integration(features[sample, :length].numpy(), window, bins)
            np.testing.assert_allclose(result[sample, index].numpy(), expected, atol=2e-6)


def test_roi_align_by_hand():
    features = torch.tensor([[[1.0], [3.0], [7.0], [100.0]]], dtype=torch.float64)
    num_clips = torch.tensor([3])
    # Clips 1 and 2 have their centers at 1/6 and 1/2. The line between them runs from 1 to 3; before 1/6 it is 1
    windows = torch.tensor([[[1 / 6, 1 / 2], [0.0, 1 / 6], [5 / 6, 1.0], [0.0, 1 / 3]]], dtype=torch.float64)
    result = align(features, num_clips, window_to_span(windows), 1)[0, :, 0, 0]
    # The last window: half of it is 1, the other half runs from 1 to 2
    torch.testing.assert_close(result, torch.tensor([2.0, 1.0, 7.0, 1.25], dtype=torch.float64))


def test_roi_align_of_any_edges():
    """Each bin lies between two neighbors, in either order."""
    features, num_clips = torch.randn(2, 9, 3, dtype=torch.float64), torch.tensor([9, 5])
    spans, beyond = random_spans(2, 4), torch.randn(3, dtype=torch.float64)
    edges = torch.cat((bin_edges(1), bin_edges(5, 2.0)))
    result = roi_align(surround(features, num_clips, beyond), num_clips, spans, edges)
    twice, between = spans * torch.tensor([1.0, 2.0]), spans * torch.tensor([1.0, 1.5])
    between[..., 0] -= spans[..., 1] / 4  # from 1/2 back to -1
    expected = [(spans, 1), (between, 1), (twice, 5)]
    expected = torch.cat([align(features, num_clips, parts, bins, beyond) for parts, bins in expected], dim=2)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)  # edges are in float32


def test_roi_align_never_reads_padding():
    features = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0))
    spans = random_spans(2, 6).float()
    num_clips = torch.tensor([5, 8])
    result = align(features, num_clips, spans, 4)
    garbage = features.clone()
    garbage[0, 5:] = 1e6
    torch.testing.assert_close(align(garbage, num_clips, spans, 4), result, rtol=0, atol=0)
    alone = align(features[:1, :5], num_clips[:1], spans[:1], 4)
    torch.testing.assert_close(alone, result[:1], rtol=1e-5, atol=1e-6)


def test_roi_align_of_a_constant_is_that_constant():
    # Also for very narrow spans, where float32 has few digits left
    features = torch.full((1, 75, 2), 3.0)
    widths = torch.tensor([1e-4, 1 / 75, 0.5, 1.0])
    spans = torch.stack((torch.full_like(widths, 0.5), widths), dim=-1)[None]
    result, expected = align(features, torch.tensor([75]), spans, 16), torch.full((1, 4, 16, 2), 3.0)
    torch.testing.assert_close(result[:, 1:], expected[:, 1:])
    torch.testing.assert_close(result[:, :1], expected[:, :1], rtol=1e-4, atol=0)  # less than a clip wide


def test_roi_align_beyond_the_video():
    features, num_clips = torch.full((1, 8, 2), 3.0), torch.tensor([4])
    spans = torch.tensor([[[0.125, 0.5], [1.0, 0.5], [0.5, 4.0]]])  # -1/8 to 3/8, 3/4 to 5/4, -3/2 to 5/2
    beyond = torch.tensor([-1.0, 0.0])
    result = align(features, num_clips, spans, 4, beyond)
    inside = torch.tensor([[0.0, 1, 1, 1], [1, 1, 0, 0], [0, 0.5, 0.5, 0]])  # fraction of each bin
    share = inside[None, ..., None]
    torch.testing.assert_close(result, share * 3 + (1 - share) * beyond)
    torch.testing.assert_close(align(features, num_clips, spans, 4), share * features[:, :1, None])
    # No jump where a span just reaches an end
    steps = [align(features, num_clips, spans[:, :1] + delta, 4, beyond) for delta in (0.0, 1e-6)]
    torch.testing.assert_close(*steps, rtol=0, atol=1e-4)


def test_roi_align_types():
    features = torch.randn(1, 8, 3, generator=torch.Generator().manual_seed(0))
    spans = random_spans(1, 6).float()
    expected = align(features, torch.tensor([8]), spans, 4)
    result = align(features.bfloat16(), torch.tensor([8]), spans, 4)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), expected, rtol=0, atol=0.05)
    result = align(features.bfloat16(), torch.tensor([8]), spans * 2, 4, torch.ones(3))
    assert result.dtype == torch.bfloat16
    # Above 256, bfloat16 resolves only multiples of 2
    steps = torch.arange(300.0)[None, :, None] % 2
    alternating = align(steps.bfloat16(), torch.tensor([300]), torch.tensor([[[299.5 / 300, 1 / 300]]]), 2)
    torch.testing.assert_close(alternating.float(), torch.tensor([0.75, 1.0]).reshape(1, 1, 2, 1))


def test_roi_align_gradients():
    features = torch.randn(2, 6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    spans = random_spans(2, 3, min_width=0.1).requires_grad_()
    num_clips = torch.tensor([6, 4])
    assert torch.autograd.gradcheck(lambda f, s: align(f, num_clips, s, 3), (features, spans))
    reaching_out = torch.tensor([[[0.1, 0.5], [1.4, 0.3]], [[0.5, 2.2], [0.9, 0.31]]], dtype=torch.float64)
    beyond = torch.tensor([2.0, -1.0], dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda f, s, b: align(f, num_clips, s, 3, b), (features, reaching_out.requires_grad_(), beyond)
    )


@pytest.mark.parametrize(
    ("span", "min_width", "expected"),
    [
        ((0.5, 0.4), 0.1, (0.5, 0.4)),
        ((0.1, 0.4), 0.1, (0.15, 0.3)),  # from -0.1: cut at 0
        ((0.95, 0.2), 0.1, (0.925, 0.15)),  # to 1.05: cut at 1
        ((0.5, 0.0), 0.1, (0.5, 0.1)),  # widened around its center
        ((0.99, 0.0), 0.1, (0.95, 0.1)),  # widened, and moved inside
        ((0.01, 0.0), 0.1, (0.05, 0.1)),
        ((0.3, 0.2), 1.0, (0.5, 1.0)),
    ],
)
def test_keep_inside(span, min_width, expected):
    result = keep_inside(torch.tensor(span, dtype=torch.float64), min_width)
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64))


def test_keep_inside_takes_one_width_per_sample():
    spans = torch.tensor([[[0.5, 0.0]], [[0.5, 0.0]]])
    result = keep_inside(spans, torch.tensor([[0.5], [0.1]]))
    torch.testing.assert_close(result[..., 1], torch.tensor([[0.5], [0.1]]))


@pytest.mark.parametrize(
    ("windows", "num_clips", "expected"),
    [
        # Five clips with centers 0.1, 0.3, 0.5, 0.7 and 0.9
        ([(0.25, 0.65), (0.85, 1.0)], 5, [1, 2, 4]),
        ([(0.35, 0.75)], 5, [2, 3]),
        ([(0.32, 0.38)], 5, [1]),  # contains no clip center: the clip that contains it
        ([(1.0, 1.0)], 5, [4]),
        # Four clips with centers 0.125, 0.375, 0.625 and 0.875. The fifth is padding, however far a moment reaches
        ([(0.3, 0.32)], 4, [1]),
        ([(0.8, 1.3)], 4, [3]),
        ([], 5, []),
    ],
)
def test_relevant_clips_by_hand(windows, num_clips, expected):
    # With two padding windows and a second sample, which change nothing
    padded = window_to_span(torch.tensor([*windows, (0.0, 1.0), (0.0, 1.0)]))
    mask = torch.arange(len(padded)) < len(windows)
    spans, mask = torch.stack((padded, padded)), torch.stack((mask, ~mask))
    relevant = relevant_clips(spans, mask, torch.tensor([num_clips, 5]), 5)
    assert relevant[0].nonzero()[:, 0].tolist() == expected
    assert relevant[1].all()


def test_relevant_clips_without_windows():
    assert not relevant_clips(torch.zeros(2, 0, 2), torch.zeros(2, 0).bool(), torch.tensor([3, 2]), 3).any()


def test_nms_by_hand():
    # IoU with the first: 8/12, 0, 10/10; of the third with the fifth: 5/15
    windows = torch.tensor([[0.0, 10.0], [2.0, 12.0], [20.0, 30.0], [0.0, 10.0], [25.0, 35.0]])
    assert nms(windows, 0.7).tolist() == [True, True, True, False, True]
    assert nms(windows, 0.5).tolist() == [True, False, True, False, True]
    assert nms(windows, 0.3).tolist() == [True, False, True, False, False]
    assert nms(windows, 1.0).all()


def test_nms_compares_with_kept_windows_only():
    # The first removes the second. The third overlaps only the second and is kept
    windows = torch.tensor([[0.0, 10.0], [4.0, 14.0], [8.0, 18.0]])
    assert nms(windows, 0.4).tolist() == [True, False, True]
    assert nms(torch.zeros(0, 2), 0.5).tolist() == []
    assert math.isclose(iou_and_generalized_iou(*window_to_span(windows[1:]))[0].item(), 6 / 14, rel_tol=1e-6)


def test_refine():
    spans = torch.tensor([[0.5, 0.2], [0.5, 0.2], [0.3, 0.01]])
    deltas = torch.tensor([[0.0, 0.0], [1.0, math.log(2)], [-2.0, 50.0]])
    torch.testing.assert_close(refine(spans, deltas), torch.tensor([[0.5, 0.2], [0.6, 0.4], [0.29, 10.0]]))
