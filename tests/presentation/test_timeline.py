import numpy as np
import pytest

from modeling_diffusionvmr.presentation.timeline import saliency_curve, tick_label, tick_times, timestamp


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "00:00.0"),
        (32.04, "00:32.0"),
        (59.96, "01:00.0"),
        (3599.9, "59:59.9"),
        (3599.96, "1:00:00.0"),
        (7325.25, "2:02:05.2"),
        (90000, "25:00:00.0"),
    ],
)
def test_timestamp(seconds, text):
    assert timestamp(seconds) == text


def test_timestamp_without_decimals():
    assert [timestamp(seconds, 0) for seconds in (0, 59.6, 3600)] == ["00:00", "01:00", "1:00:00"]


@pytest.mark.parametrize("duration", [0.3, 1, 7, 89.6, 150, 3599, 7200, 86400, 10**6])
@pytest.mark.parametrize("max_ticks", [6, 13])
def test_ticks(duration, max_ticks):
    ticks = tick_times(duration, max_ticks)
    assert ticks[0] == 0 and ticks[-1] <= duration * (1 + 1e-9)
    assert 2 <= len(ticks) <= max_ticks
    assert len({tick_label(tick, ticks) for tick in ticks}) == len(ticks)


def test_ticks_are_round():
    assert tick_times(7200, 6) == [0, 1800, 3600, 5400, 7200]
    assert tick_times(89.6, 6) == [0, 30, 60]


def test_saliency_curve_is_a_ranking():
    scores = np.array([-3.0, 5.0, 0.5, 40.0, -200.0])
    curve = saliency_curve(scores)
    assert np.all(curve >= 0) and np.all(curve <= 1)
    assert np.all(np.diff(curve[np.argsort(scores)]) >= 0)
    np.testing.assert_allclose(saliency_curve(scores + 7), curve)
    np.testing.assert_allclose(saliency_curve([2.0, 2.0]), 0.5)


def test_long_saliency_keeps_its_peaks():
    scores = np.zeros(3601)
    scores[[7, 1000, 3600]] = 5, 10, 20
    curve = saliency_curve(scores, max_points=100)
    assert len(curve) == 100
    assert sorted(np.argsort(curve)[-3:]) == [0, 27, 99]
    assert len(saliency_curve(scores[:50], max_points=100)) == 50
