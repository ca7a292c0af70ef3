"""Training and evaluating on windows of long videos instead of averages."""

import numpy as np
import pytest
import torch

from modeling_diffusionvmr import (
    DiffusionVMRDataCollator,
    DiffusionVMRForMomentRetrieval,
    DiffusionVMRProcessor,
    DiffusionVMRTrainer,
    DiffusionVMRTrainingArguments,
    MomentRetrievalDataset,
)
from modeling_diffusionvmr.training.prediction import predict_moments
from modeling_diffusionvmr.training.row_windows import row_in_window
from modeling_diffusionvmr.windows import plan_windows, search

LENGTHS = {"short": 15, "long": 100}  # clips of 2 s; the model reads 20
ROWS = [
    {"qid": 0, "query": "a", "vid": "short", "duration": 30.0, "relevant_windows": [[4.0, 10.0]]},
    {"qid": 1, "query": "b", "vid": "long", "duration": 200.0, "relevant_windows": [[60.0, 70.0]]},
    {"qid": 2, "query": "c", "vid": "long", "duration": 200.0, "relevant_windows": []},
]
PROCESSOR = DiffusionVMRProcessor([12], 8, max_clips=20, max_tokens=8)


@pytest.fixture(scope="module")
def features() -> tuple[dict, dict]:
    rng = np.random.default_rng(0)
    video = {vid: rng.normal(size=(length, 12)).astype(np.float32) for vid, length in LENGTHS.items()}
    return video, {row["qid"]: rng.normal(size=(3, 8)).astype(np.float32) for row in ROWS}


@pytest.fixture
def make_dataset(features, tiny_config):
    def make(rows=ROWS, train=False, windows=True) -> MomentRetrievalDataset:
        config = tiny_config() if train else None
        return MomentRetrievalDataset(rows, *features, PROCESSOR, config, clip_seconds=2.0, windows=windows)

    return make


@pytest.fixture(scope="module")
def model(tiny_config):
    torch.manual_seed(0)
    return DiffusionVMRForMomentRetrieval(tiny_config()).eval()


def test_the_truth_in_a_window():
    window = plan_windows(100, 20)[2]
    assert window[:2] == (20, 40)  # 40 to 80 s
    row = {"qid": 1, "duration": 200.0, "relevant_windows": [[60.0, 70.0]], "saliency_scores": [[1, 1, 1]]}
    assert row_in_window(row, window, 2.0) == {"qid": 1, "duration": 40.0, "relevant_windows": [[20.0, 30.0]]}
    for given, inside in (
        ([[30.0, 50.0]], [[0.0, 10.0]]),  # half of it is inside
        ([[29.0, 50.0]], []),
        ([[70.0, 90.0], [0.0, 40.0], [80.0, 90.0]], [[30.0, 40.0]]),
        ([], []),
    ):
        assert row_in_window({**row, "relevant_windows": given}, window, 2.0)["relevant_windows"] == inside
    assert "relevant_windows" not in row_in_window({"duration": 200.0}, window, 2.0)


def test_every_window_is_a_sample_of_inference(make_dataset, features):
    dataset = make_dataset()
    plan = plan_windows(100, 20)
    assert len(dataset) == 1 + 2 * len(plan)
    for place, window in enumerate(plan, 1):
        sample = dataset[place]
        assert sample["covered_duration"] == pytest.approx(2.0 * (window.last - window.first))
        expected = PROCESSOR.prepare_video([features[0]["long"][window.first : window.last]])
        assert torch.equal(sample["video_features"], expected)
    # 60 to 70 s lie in the middle of the window from 40 to 80 s
    torch.testing.assert_close(dataset[3]["labels"]["spans"], torch.tensor([[25 / 40, 10 / 40]]))


def test_predictions_are_those_of_the_search(make_dataset, features, model):
    for batch_size in (1, 7, 100):
        predictions = predict_moments(model, make_dataset(), batch_size, progress=False)
        assert [prediction["qid"] for prediction in predictions] == [0, 1, 2]
        for row, prediction in zip(ROWS, predictions):
            length = LENGTHS[row["vid"]]
            texts = PROCESSOR.pad([PROCESSOR.prepare_text(features[1][row["qid"]])])
            with torch.inference_mode():
                (found,) = search(model, PROCESSOR, [features[0][row["vid"]]], *texts, plan_windows(length, 20))
            (moments,) = PROCESSOR.post_process_moment_retrieval(found, [2.0 * length])
            expected = [list(moment.values()) for moment in moments]
            np.testing.assert_allclose(prediction["pred_relevant_windows"], expected, atol=1e-3)
            np.testing.assert_allclose(prediction["pred_saliency_scores"], found.saliency_scores[0], atol=1e-4)
            assert len(prediction["pred_saliency_scores"]) == length


def test_the_trainer_merges_windows(make_dataset, model, tmp_path):
    arguments = DiffusionVMRTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], per_device_eval_batch_size=4, disable_tqdm=True
    )
    output = DiffusionVMRTrainer(model=model, args=arguments).predict(make_dataset())
    expected = predict_moments(model, make_dataset(), progress=False)
    assert [row["qid"] for row in output.predictions] == [0, 1, 2]
    for found, wanted in zip(output.predictions, expected):
        np.testing.assert_allclose(found["pred_relevant_windows"], wanted["pred_relevant_windows"], atol=1e-3)
    assert "test_MR-full-mAP" in output.metrics


def test_videos_within_the_limit_are_not_affected(make_dataset, model):
    with_windows = predict_moments(model, make_dataset(ROWS[:1]), progress=False)
    assert with_windows == predict_moments(model, make_dataset(ROWS[:1], windows=False), progress=False)


def test_training_draws_one_window_per_row_and_epoch(make_dataset):
    dataset = make_dataset(train=True)
    assert len(dataset) == len(ROWS)
    short = make_dataset(train=True, windows=False)[0]
    shown, lengths = [], set()
    for epoch in range(40):
        dataset.set_epoch(epoch)
        samples = dataset.__getitems__([0, 1, 2])
        assert torch.equal(samples[0]["video_features"], short["video_features"])
        assert torch.equal(samples[1]["video_features"], dataset[1]["video_features"])  # the same draw
        assert not len(samples[2]["labels"]["spans"])
        shown.append(len(samples[1]["labels"]["spans"]))
        lengths.add(round(samples[1]["covered_duration"]))
        DiffusionVMRDataCollator()(samples)
    assert lengths == {40, 80, 160, 200}
    assert 0.5 < np.mean(shown) < 0.95
