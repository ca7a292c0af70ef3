"""Measuring moments, by hand and against the pipeline."""

import numpy as np
import pytest
from transformers import AutoModel, AutoProcessor, pipeline

from make_default_model import retrieve_all
from modeling_diffusionvmr import DEFAULT_MODEL, MomentRetrievalDataset
from modeling_diffusionvmr.modeling_diffusionvmr import TASK
from modeling_diffusionvmr.synthetic.rendered_world import annotation_rows, plan_video, write_video
from modeling_diffusionvmr.training import moment_quality
from modeling_diffusionvmr.training.moment_quality import (
    choose_on_dataset,
    choose_post_processing,
    match_moments,
    measure_moments,
    with_other_videos,
)
from modeling_diffusionvmr.training.prediction import EVERY_PROPOSAL, every_proposal

PRESENT = {
    "relevant_windows": [[0, 10], [20, 30]],
    "pred_relevant_windows": [
        [0, 9, 0.9],  # right
        [1, 10, 0.8],  # the same moment again; IoU 0.8 with the one above
        [20, 25, 0.7],  # right, with an IoU of exactly 0.5
        [26, 31, 0.6],
    ],
}
ABSENT = {"relevant_windows": [], "pred_relevant_windows": [[5, 9, 0.75], [20, 29, 0.65]]}
ALL = {"threshold": 0.0, "nms_threshold": None, "top_k": None}


def test_matching_is_one_to_one():
    assert match_moments(PRESENT, None) == [(0.9, True), (0.8, False), (0.7, True), (0.6, False)]
    assert match_moments(PRESENT, 0.7) == [(0.9, True), (0.7, True), (0.6, False)]
    assert match_moments(ABSENT, 0.7) == [(0.75, False), (0.65, False)]
    assert match_moments({**ABSENT, "pred_relevant_windows": []}, 0.7) == []


def test_a_moment_takes_the_best_free_window():
    # The first takes the window that it fits best, which leaves the other one for the second
    row = {"relevant_windows": [[0, 10], [4, 12]], "pred_relevant_windows": [[4, 12, 0.9], [1, 10, 0.8]]}
    assert match_moments(row, None) == [(0.9, True), (0.8, True)]


def test_figures():
    columns = ("n", "moments per sentence", "precision", "recall", "F1", "no moment")

    def figures(rows, **changes):
        return tuple(measure_moments(rows, **{**ALL, **changes})[column] for column in columns)

    assert figures([PRESENT, ABSENT]) == (2, 3.0, pytest.approx(100 / 3), 100.0, 50.0, 0.0)
    assert figures([PRESENT, ABSENT], nms_threshold=0.7, threshold=0.7) == (2, 1.5, pytest.approx(200 / 3), 100, 80, 0)
    assert figures([PRESENT, ABSENT], threshold=0.8) == (2, 1, 50, 50, 50, 50)
    assert figures([PRESENT, ABSENT], top_k=1) == (2, 1, 50, 50, 50, 0)
    assert figures([ABSENT], threshold=0.8) == (1, 0, "-", "-", "-", 100)


def test_the_best_f1_is_chosen():
    # Both right moments, without [1, 10], [26, 31] and one of the two moments of the absent sentence
    assert choose_post_processing([PRESENT, ABSENT]) == {"threshold": 0.7, "nms_threshold": 0.1, "top_k": 2}


@pytest.mark.filterwarnings("error")
def test_nothing_is_chosen_without_a_right_moment():
    missed = {"relevant_windows": [[50, 60]], "pred_relevant_windows": PRESENT["pred_relevant_windows"]}
    assert choose_post_processing([missed, ABSENT]) == {}
    assert choose_post_processing([ABSENT, ABSENT]) == {}


def test_the_pipeline_returns_what_is_measured(tmp_path):
    retrieve, plan = pipeline(TASK, model=DEFAULT_MODEL), plan_video(30_000_000)
    write_video(plan, tmp_path / f"{plan.vid}.mp4")
    rows = annotation_rows(plan)
    processor = retrieve.processor
    by_default = retrieve_all(retrieve, [(plan, rows)], tmp_path)
    retrieve.processor = every_proposal(processor)
    every = retrieve_all(retrieve, [(plan, rows)], tmp_path)
    defaults = {name: getattr(processor, name) for name in EVERY_PROPOSAL}
    assert {len(row["pred_relevant_windows"]) for row in every} == {20}
    assert 0 < sum(len(row["pred_relevant_windows"]) for row in by_default) < 5 * len(rows)
    assert measure_moments(by_default, **EVERY_PROPOSAL) == measure_moments(every, **defaults)


def test_sentences_with_other_videos():
    rows = [{"qid": qid, "query": "a", "vid": vid, "duration": 10 + vid} for qid, vid in enumerate((3, 3, 1, 2))]
    paired = with_other_videos(rows)
    found = [(row["qid"], row["vid"], row["duration"]) for row in paired]
    assert found == [(0, 1, 11), (1, 1, 11), (2, 2, 12), (3, 3, 13)]
    assert all(row["relevant_windows"] == [] for row in paired)
    assert with_other_videos(rows[:2]) == []


def test_choice_on_validation_data(tmp_path, monkeypatch):
    """What is chosen for a model are the values that are best on its own sentences and on absent ones."""
    model, processor = AutoModel.from_pretrained(DEFAULT_MODEL), AutoProcessor.from_pretrained(DEFAULT_MODEL)
    rng = np.random.default_rng(0)
    rows = [
        {"qid": i, "query": "a", "vid": f"v{i % 4}", "duration": 40, "relevant_windows": [[4, 16]]} for i in range(20)
    ]
    videos = {f"v{i}": rng.normal(size=(20, 192)) for i in range(4)}
    texts = {i: rng.normal(size=(5, 192)) for i in range(20)}
    seen = []
    monkeypatch.setattr(moment_quality, "choose_post_processing", lambda rows: seen.extend(rows) or {"threshold": 0.3})
    dataset = MomentRetrievalDataset(rows, videos, texts, processor, clip_seconds=2.0)
    assert choose_on_dataset(model, processor, dataset) == {"threshold": 0.3}
    assert len(seen) == 40 and all(len(row["pred_relevant_windows"]) == 20 for row in seen)  # every proposal
    assert [row["relevant_windows"] for row in seen] == [[[4, 16]]] * 20 + [[]] * 20

    # Sentences that are labeled as absent count once, and suffice if all others are about one video
    for labeled, wanted in (
        ([{**row, "relevant_windows": []} if i < 5 else row for i, row in enumerate(rows)], 20 + 15),
        ([{**row, "relevant_windows": []} if row["vid"] != "v0" else row for row in rows], 20),
    ):
        seen.clear()
        own = MomentRetrievalDataset(labeled, videos, texts, processor, clip_seconds=2.0)
        assert choose_on_dataset(model, processor, own) == {"threshold": 0.3}
        assert len(seen) == wanted and [row["relevant_windows"] for row in seen[:20]] == [
            row["relevant_windows"] for row in labeled
        ]
        assert all(row["relevant_windows"] == [] for row in seen[20:])

    few = MomentRetrievalDataset(rows[:19], videos, texts, processor, clip_seconds=2.0)
    assert choose_on_dataset(model, processor, few) == {}
    assert choose_on_dataset(model, processor, None) == {}
