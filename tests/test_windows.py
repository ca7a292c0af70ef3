"""The plan of windows, and merging. tests/test_pipeline.py searches videos."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from modeling_diffusionvmr import DiffusionVMRForMomentRetrieval, DiffusionVMRProcessor, windows
from modeling_diffusionvmr.windows import MAX_BATCH, check_chunks, merge, plan_windows, search

MAX_CLIPS = 20
LENGTHS = [*range(1, 130), 300, 1001, 1800, 3600]


def scales(plan):
    """Return the windows of each scale, the finest first."""
    lengths = sorted({window.last - window.first for window in plan})
    return [[window for window in plan if window.last - window.first == length] for length in lengths]


@pytest.mark.parametrize("chunk", [1, 2, 7, 20, 75])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.3, 0.49])
def test_every_scale_covers_every_clip_and_owns_every_time_once(chunk, share):
    for num_clips in LENGTHS:
        plan = plan_windows(num_clips, chunk, share * chunk)
        assert [window.last - window.first for window in plan] == sorted(w.last - w.first for w in plan)
        for scale in scales(plan):
            covered = np.zeros(num_clips, bool)
            for window in scale:
                covered[window.first : window.last] = True
            assert covered.all() and scale[0].first == 0 and scale[-1].last == num_clips
            assert scale[0].own_start == -math.inf and scale[-1].own_end == math.inf
            for before, after in zip(scale, scale[1:]):
                assert before.first < after.first <= before.own_end == after.own_start <= before.last
        assert plan[-1][:2] == (0, num_clips)  # the coarsest scale is the whole video


@pytest.mark.parametrize("chunk", [20, 75])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.4])
def test_every_moment_is_whole_in_a_window_that_keeps_it(chunk, share):
    rng = np.random.default_rng(0)
    for num_clips in (21, 76, 100, 301, 1800):
        plan = plan_windows(num_clips, chunk, share * chunk)
        for _ in range(100):
            length = num_clips ** rng.uniform(0, 1) * 0.99
            start = rng.uniform(0, num_clips - length)
            center = start + length / 2
            keeping = [w for w in plan if w.own_start <= center < w.own_end and length > w.shortest]
            # Rounding windows to clips can cost a moment half a clip at each side
            assert any(w.first - 0.5 <= start and start + length <= w.last + 0.5 for w in keeping)


def test_plan_by_hand():
    inf = math.inf
    assert plan_windows(75, 75) == [(0, 75, -inf, inf, -inf)]
    assert plan_windows(40, 75) == [(0, 40, -inf, inf, -inf)]
    assert plan_windows(50, 20, 5) == [
        (0, 20, -inf, 15, -inf),
        (10, 30, 15, 25, -inf),
        (20, 40, 25, 35, -inf),
        (30, 50, 35, inf, -inf),
        (0, 40, -inf, 25, 10),
        (10, 50, 25, inf, 10),
        (0, 50, -inf, inf, 20),
    ]
    assert len(plan_windows(3600, 75)) < 200  # two hours


def logits_of(scores):
    scores = torch.tensor(scores).clamp(1e-6)  # logits are finite
    return torch.stack((scores, 1 - scores), dim=-1).log()


def found_in(plan, moments, max_clips=MAX_CLIPS):
    """
    Merge what a perfect model finds: in each window, the parts of the moments (start, end, score), in clips, that lie
    inside. Return the moments of the processor without NMS, in clips.
    """
    num_clips = plan[-1].last
    spans, scores = torch.full((len(plan), len(moments), 2), 0.5), torch.zeros(len(plan), len(moments))
    for i, window in enumerate(plan):
        for j, (start, end, score) in enumerate(moments):
            start, end = (min(max(t, window.first), window.last) - window.first for t in (start, end))
            if start < end:
                size = window.last - window.first
                spans[i, j] = torch.tensor([(start + end) / 2 / size, (end - start) / size])
                scores[i, j] = score
    findings = merge(plan, logits_of(scores.tolist()), spans, torch.zeros(len(plan), max_clips), max_clips)
    processor = DiffusionVMRProcessor([4], 4, max_clips=max_clips, threshold=0.01)
    (result,) = processor.post_process_moment_retrieval(findings, [num_clips])
    return [(moment["start"], moment["end"]) for moment in result]


@pytest.mark.parametrize("num_clips", [50, 97, 400])
def test_a_moment_on_a_seam_is_found_once(num_clips):
    plan = plan_windows(num_clips, MAX_CLIPS)
    for window in scales(plan)[0][:-1]:
        for length in (1.0, 4.0, 9.0):
            # Its center is exactly where two windows meet; both see all of it
            moment = window.own_end - length / 2, window.own_end + length / 2
            found = found_in(plan, [(*moment, 0.9)])
            assert found == [pytest.approx(moment, abs=1e-4)]


def test_a_moment_longer_than_a_window_is_found_at_a_coarser_scale():
    plan = plan_windows(400, MAX_CLIPS)
    for moment in ((100.0, 130.0), (137.0, 220.0), (31.0, 390.0)):
        found = found_in(plan, [(*moment, 0.9)])
        # Windows of several scales may see all of it, but none returns a part
        assert found and all(one == pytest.approx(moment, abs=1e-3) for one in found)


def test_a_moment_that_reaches_an_end_of_the_video_is_not_cut():
    plan = plan_windows(100, MAX_CLIPS)
    assert found_in(plan, [(0.0, 5.0, 0.9), (96.0, 100.0, 0.8)]) == [
        pytest.approx((0, 5), abs=1e-4),
        pytest.approx((96, 100), abs=1e-4),
    ]


def test_a_single_window_changes_nothing():
    torch.manual_seed(0)
    for num_clips in (1, 7, 19, 20, 75, 333):
        (window,) = plan_windows(num_clips, 400)
        logits, spans, saliency = torch.randn(1, 5, 2), torch.rand(1, 5, 2), torch.randn(1, MAX_CLIPS)
        spans[0, 0] = torch.tensor([1.0, 0.0])
        found = merge([window], logits, spans, saliency, MAX_CLIPS)
        assert torch.equal(found.logits, logits) and torch.equal(found.pred_spans, spans.double())
        assert torch.equal(found.saliency_scores, saliency[:, : min(num_clips, MAX_CLIPS)])


@pytest.mark.parametrize(("num_clips", "chunk"), [(50, 20), (51, 20), (333, 20), (333, 40), (100, 7)])
def test_saliency_of_each_clip_is_of_the_window_that_owns_it(num_clips, chunk):
    plan = plan_windows(num_clips, chunk)
    parts = min(chunk, MAX_CLIPS)
    # As the saliency of each part, its place in the video
    saliency = torch.zeros(len(plan), MAX_CLIPS, dtype=torch.float64)
    for i, window in enumerate(plan):
        size = window.last - window.first
        saliency[i, : min(size, MAX_CLIPS)] = window.first + (torch.arange(min(size, MAX_CLIPS)) + 0.5) * size / min(
            size, MAX_CLIPS
        )
    empty = torch.zeros(len(plan), 0, 2)
    found = merge(plan, empty, empty, saliency, MAX_CLIPS).saliency_scores
    assert found.shape == (1, num_clips)
    places = np.arange(num_clips) + 0.5
    assert np.abs(found[0].numpy() - places).max() <= chunk / parts / 2
    for window in scales(plan)[0]:
        owned = np.flatnonzero((window.own_start <= places) & (places < window.own_end))
        offset = ((owned - window.first) * parts // chunk + 0.5) * chunk / parts
        np.testing.assert_allclose(found[0, owned], window.first + offset)


@pytest.fixture(scope="module")
def model(tiny_config):
    torch.manual_seed(0)
    return DiffusionVMRForMomentRetrieval(tiny_config()).eval()


PROCESSOR = DiffusionVMRProcessor([12], 8, max_clips=MAX_CLIPS, max_tokens=8)


def sentences(count):
    rng = np.random.default_rng(1)
    return PROCESSOR.pad([PROCESSOR.prepare_text(rng.standard_normal((2 + i % 5, 8))) for i in range(count)])


@pytest.mark.parametrize(("num_clips", "count"), [(15, 3), (15, 70), (300, 1), (300, 5), (130, 40)])
def test_batches_are_bounded_and_do_not_change_the_result(model, monkeypatch, num_clips, count):
    array = np.random.default_rng(0).standard_normal((num_clips, 12)).astype(np.float32)
    texts, plan = sentences(count), plan_windows(num_clips, MAX_CLIPS)
    sizes, prepared = [], []
    forward, prepare_video = model.forward, PROCESSOR.prepare_video

    def counting(**inputs):
        sizes.append(len(inputs["text_features"]))
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", counting)
    monkeypatch.setattr(PROCESSOR, "prepare_video", lambda arrays: prepared.append(1) or prepare_video(arrays))
    with torch.inference_mode():
        found = search(model, PROCESSOR, [array], *texts, plan)
        assert max(sizes) <= MAX_BATCH and sum(sizes) == len(plan) * count and len(prepared) == len(plan)
        assert len(sizes) <= 2 * math.ceil(len(plan) * count / MAX_BATCH) + 1
        monkeypatch.setattr(windows, "MAX_BATCH", 1)
        alone = search(model, PROCESSOR, [array], *texts, plan)
    assert len(found) == len(alone) == count
    for one, other in zip(found, alone):
        assert one.logits.shape == other.logits.shape
        for name in ("logits", "pred_spans", "saliency_scores"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=1e-5, rtol=0)


def test_invalid_values_are_found_before_moments_are_dropped(model):
    array = np.zeros((50, 12), np.float32)

    def damaged(**inputs):
        return SimpleNamespace(
            logits=torch.zeros(len(inputs["text_features"]), 5, 2),
            pred_spans=torch.full((len(inputs["text_features"]), 5, 2), math.nan),
            saliency_scores=torch.zeros(len(inputs["text_features"]), MAX_CLIPS),
        )

    damaged.device, damaged.dtype = model.device, model.dtype
    with pytest.raises(ValueError, match="^sample 0: `pred_spans` of the model contains NaN or infinity"):
        search(damaged, PROCESSOR, [array], *sentences(1), plan_windows(50, MAX_CLIPS))


@pytest.mark.parametrize(
    ("chunk", "stride", "message"),
    [
        (0, None, "`chunk_length_s` must be a number above 0, got 0"),
        ("60", None, "`chunk_length_s` must be a number above 0, got '60'"),
        (math.inf, None, "`chunk_length_s` must be a number above 0, got inf"),
        (1.5, None, "`chunk_length_s` must be at least the length of a clip, 2 s, got 1.5"),
        (None, -1, "`stride_length_s` must be a number of at least 0, got -1"),
        (None, (5, 5), r"`stride_length_s` must be a number of at least 0, got \(5, 5\)"),
        (None, 20, "`stride_length_s` must be less than half of `chunk_length_s`, 40 s, got 20"),
        (60, 30.5, "`stride_length_s` must be less than half of `chunk_length_s`, 60 s, got 30.5"),
    ],
)
def test_invalid_chunks(chunk, stride, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        check_chunks(chunk, stride, 2.0, MAX_CLIPS)


def test_valid_chunks():
    for chunk, stride in ((None, None), (2, None), (60, 0), (None, 19.9), (60.5, 30)):
        check_chunks(chunk, stride, 2.0, MAX_CLIPS)
