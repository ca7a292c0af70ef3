import itertools

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoProcessor, TrainingArguments, set_seed

from modeling_diffusionvmr import (
    DiffusionVMRForMomentRetrieval,
    DiffusionVMRProcessor,
    DiffusionVMRTrainer,
    MomentRetrievalDataset,
    evaluate_predictions,
    predict_moments,
)

TERMS = ("class", "l1", "iou", "hinge", "contrastive")
STEPS = 12
LENGTHS = (10, 15, 20, 34)


class Recording(MomentRetrievalDataset):
    """Knows which epochs it was told of."""

    def set_epoch(self, epoch):
        super().set_epoch(epoch)
        self.epochs = [*getattr(self, "epochs", []), epoch]


@pytest.fixture(scope="module")
def make_dataset(tiny_config):
    random = np.random.default_rng(0)
    rows = [
        {
            "qid": qid,
            "query": f"query {qid}",
            "vid": f"v{qid % 4}",
            "duration": 2.0 * LENGTHS[qid % 4],
            "relevant_windows": [[2.0, 8.0], [10.0, 18.0]][: 1 + qid % 2],
        }
        for qid in range(8)
    ]
    video = {f"v{index}": random.normal(size=(length, 12)).astype("f4") for index, length in enumerate(LENGTHS)}
    text = {row["qid"]: random.normal(size=(2 + row["qid"], 8)).astype("f4") for row in rows}
    processor = DiffusionVMRProcessor([12], 8, max_clips=20, max_tokens=10)

    def make(train=True) -> MomentRetrievalDataset:
        return Recording(rows, video, text, processor, tiny_config() if train else None, clip_seconds=2.0)

    return make


@pytest.fixture(scope="module")
def make_trainer(make_dataset, tiny_config):
    def make(folder, proposal_schedule="progress", config=None, processor=None, **arguments) -> DiffusionVMRTrainer:
        set_seed(0)
        options = {
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_steps": STEPS,
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        return DiffusionVMRTrainer(
            model=DiffusionVMRForMomentRetrieval(config or tiny_config()),
            args=TrainingArguments(str(folder), **{**options, **arguments}),
            train_dataset=make_dataset(),
            eval_dataset=make_dataset(train=False),
            processing_class=processor,
            proposal_schedule=proposal_schedule,
        )

    return make


def proposals_of_calls(model) -> list:
    """N of every call from now on."""
    seen = []
    model.register_forward_hook(lambda _, arguments, output: seen.append(output.logits.shape[1]))
    return seen


@pytest.fixture(scope="module")
def trained(make_trainer, tmp_path_factory):
    """A trainer that is done, and N of its steps."""
    trainer = make_trainer(tmp_path_factory.mktemp("trained"))
    seen = proposals_of_calls(trainer.model)
    trainer.train()
    return trainer, list(seen)


def test_proposals_grow_with_the_training(trained):
    assert trained[1] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]


def test_logs(trained):
    trainer, proposals = trained
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == STEPS
    config = trainer.model.config
    for log in logs:
        terms = {name: log[f"loss_{name}"] for name in TERMS}
        assert all(term > 0 for term in terms.values())
        total = sum(getattr(config, f"{name}_loss_coefficient") * term for name, term in terms.items())
        assert log["loss"] == pytest.approx(total, abs=0.01)
    assert [log["num_proposals"] for log in logs] == proposals  # those of the step that is logged


def test_each_epoch_has_its_own_draws(trained):
    trainer, _ = trained
    epochs = [epoch for epoch, _ in itertools.groupby(trainer.train_dataset.epochs)]
    assert epochs == [0, 1, 2, 3, 4, 5]  # of two steps each


def test_constant_number_of_proposals(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, "stable", max_steps=3, save_strategy="no")
    seen = proposals_of_calls(trainer.model)
    trainer.train()
    assert seen == [6, 6, 6]
    assert [log["num_proposals"] for log in trainer.state.log_history if "loss" in log] == [6, 6, 6]


def test_terms_are_means_between_two_logs(make_trainer, tmp_path):
    """Whatever the number of steps, and of batches in a step."""
    trainer = make_trainer(
        tmp_path,
        max_steps=4,
        save_strategy="no",
        logging_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    seen = proposals_of_calls(trainer.model)
    trainer.train()
    assert seen == [1, 1, 2, 2, 4, 4, 5, 5]
    for log in trainer.state.log_history:
        if "loss" in log:
            terms = {name: log[f"loss_{name}"] for name in TERMS}
            weights = {name: getattr(trainer.model.config, f"{name}_loss_coefficient") for name in TERMS}
            assert log["loss"] == pytest.approx(sum(weights[name] * terms[name] for name in TERMS), abs=0.01)


def test_unknown_schedule():
    with pytest.raises(ValueError, match="`proposal_schedule` must be one of .*'progress', 'stable'.*'linear'"):
        DiffusionVMRTrainer(proposal_schedule="linear")


def test_evaluation_loss(trained, make_dataset):
    trainer, _ = trained
    seen = proposals_of_calls(trainer.model)
    history = len(trainer.state.log_history)
    metrics = trainer.evaluate()
    assert set(seen) == {5}  # of inference
    assert metrics["eval_loss"] > 0
    assert trainer.evaluate()["eval_loss"] == metrics["eval_loss"]
    assert all("num_proposals" not in log for log in trainer.state.log_history[history:])


def test_checkpoint_loads(trained, make_dataset):
    trainer, _ = trained
    model = AutoModel.from_pretrained(f"{trainer.args.output_dir}/checkpoint-{STEPS}").to(trainer.args.device)
    assert type(model) is DiffusionVMRForMomentRetrieval
    dataset = make_dataset(train=False)
    expected = predict_moments(trainer.model, dataset, progress=False)
    assert predict_moments(model, dataset, progress=False) == expected


def test_processor_is_saved_with_a_checkpoint(make_trainer, make_dataset, tmp_path):
    make_trainer(tmp_path, processor=make_dataset().processor, max_steps=1, save_steps=1).train()
    processor = AutoProcessor.from_pretrained(tmp_path / "checkpoint-1")
    assert type(processor) is DiffusionVMRProcessor
    assert (processor.video_feature_sizes, processor.max_clips) == ([12], 20)


def test_training_goes_on_from_a_checkpoint(make_trainer, tiny_config, tmp_path):
    """In the middle of an epoch, to the same weights."""
    config = tiny_config(dropout=0, input_dropout=0)
    whole = make_trainer(tmp_path, config=config, max_steps=6, save_steps=3)
    whole.train()
    again = make_trainer(tmp_path, config=config, max_steps=6, save_steps=3)
    seen = proposals_of_calls(again.model)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert seen == [4, 5, 6]
    for name, parameter in again.model.named_parameters():
        torch.testing.assert_close(parameter, whole.model.get_parameter(name), atol=1e-6, rtol=0)


# Predictions


def test_predictions_are_in_the_official_format(trained, make_dataset):
    trainer, _ = trained
    model, dataset = trainer.model.train(), make_dataset(train=False)
    predictions = predict_moments(model, dataset, batch_size=3, progress=False)
    assert not model.training
    assert [prediction["qid"] for prediction in predictions] == list(range(8))
    for prediction, row in zip(predictions, dataset.rows):
        assert list(prediction) == ["qid", "query", "vid", "pred_relevant_windows", "pred_saliency_scores"]
        assert (prediction["query"], prediction["vid"]) == (row["query"], row["vid"])
        assert len(prediction["pred_relevant_windows"]) == 5
        scores = [score for _, _, score in prediction["pred_relevant_windows"]]
        assert scores == sorted(scores, reverse=True) and 0 < scores[-1] and scores[0] < 1
        for start, end, _ in prediction["pred_relevant_windows"]:
            assert 0 <= start <= end <= row["duration"]
        assert len(prediction["pred_saliency_scores"]) == min(LENGTHS[row["qid"] % 4], 20)
    scores = evaluate_predictions(predictions, dataset.rows)
    assert 0 <= scores["extra"]["MR-mIoU"] <= 100 and "MR-full-mAP" in scores["brief"]


def test_predictions_do_not_depend_on_the_batch(trained, make_dataset):
    model, dataset = trained[0].model, make_dataset(train=False)
    for one, other in zip(
        predict_moments(model, dataset, batch_size=1, progress=False), predict_moments(model, dataset, progress=False)
    ):
        for key in ("pred_relevant_windows", "pred_saliency_scores"):
            np.testing.assert_allclose(one[key], other[key], atol=1e-3)


def test_options_of_predictions(trained, make_dataset):
    model, dataset = trained[0].model, make_dataset(train=False)
    many = predict_moments(model, dataset, num_proposals=12, num_sampling_steps=2, progress=False)
    assert {len(prediction["pred_relevant_windows"]) for prediction in many} == {12}
    few = predict_moments(model, dataset, num_proposals=12, top_k=2, round_to=2.0, progress=False)
    for prediction, row in zip(few, dataset.rows):
        assert len(prediction["pred_relevant_windows"]) == 2
        for start, end, _ in prediction["pred_relevant_windows"]:
            assert start % 2 == 0 and (end % 2 == 0 or end == row["duration"])


def test_predictions_of_a_model_in_bfloat16(trained, make_dataset):
    trainer, _ = trained
    dataset = make_dataset(train=False)
    exact = predict_moments(trainer.model, dataset, progress=False)
    folder = f"{trainer.args.output_dir}/checkpoint-{STEPS}"
    model = AutoModel.from_pretrained(folder, dtype=torch.bfloat16).to(trainer.args.device)
    for one, other in zip(predict_moments(model, dataset, progress=False), exact):
        np.testing.assert_allclose(one["pred_saliency_scores"], other["pred_saliency_scores"], atol=0.1)


def test_predictions_do_not_depend_on_the_truth(make_dataset, tiny_config):
    """A data set of training carries its windows under little noise; a model that starts there would look good."""
    model = DiffusionVMRForMomentRetrieval(tiny_config())
    with_draws, without = (predict_moments(model, make_dataset(train=train), progress=False) for train in (True, False))
    assert with_draws == without
