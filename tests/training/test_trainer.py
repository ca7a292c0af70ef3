import copy
import itertools
import warnings

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils.data import ConcatDataset, Subset
from transformers import AutoModel, AutoProcessor, EarlyStoppingCallback, TrainerCallback, TrainingArguments

import small_training
from modeling_diffusionvmr import (
    DiffusionVMRDataCollator,
    DiffusionVMRForMomentRetrieval,
    DiffusionVMRProcessor,
    DiffusionVMRTrainer,
    evaluate_predictions,
    predict_moments,
)
from modeling_diffusionvmr.training import trainer as trainer_module
from modeling_diffusionvmr.training.arguments import DiffusionVMRTrainingArguments
from small_training import LENGTHS, TERMS, weights_of

STEPS = 12


@pytest.fixture(scope="module")
def make_dataset(tiny_config):
    def make(train=True, **options) -> small_training.Recording:
        return small_training.make_dataset(tiny_config() if train else None, **options)

    return make


@pytest.fixture(scope="module")
def make_trainer(tiny_config):
    def make(folder, proposal_schedule="progress", config=None, **arguments) -> DiffusionVMRTrainer:
        return small_training.make_trainer(folder, config or tiny_config(), proposal_schedule, **arguments)

    return make


def proposals_of_calls(model) -> list:
    """Record the number of proposals in every call from now on."""
    seen = []
    model.register_forward_hook(lambda _, arguments, output: seen.append(output.logits.shape[1]))
    return seen


@pytest.fixture(scope="module")
def trained(make_trainer, tmp_path_factory):
    """A trainer after training, and the number of proposals at each step."""
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


def test_sentences_that_are_not_in_the_video(make_trainer, tiny_config, tmp_path):
    config = tiny_config(absent_loss_coefficient=2)
    train, held_out = small_training.make_dataset(config), small_training.make_dataset(None)
    for dataset in (train, held_out):
        dataset.rows[1]["relevant_windows"] = []
    options = {"config": config, "train_dataset": train, "eval_dataset": held_out}
    trainer = make_trainer(tmp_path, **options, max_steps=2, save_strategy="no")
    trainer.train()
    for log in trainer.state.log_history[:2]:
        terms = {name: log[f"loss_{name}"] for name in (*TERMS, "absent")}
        weights = {name: getattr(config, f"{name}_loss_coefficient") for name in terms}
        assert terms["absent"] > 0
        assert log["loss"] == pytest.approx(sum(weights[name] * terms[name] for name in terms), abs=0.01)
    with pytest.warns(UserWarning, match="1 of 8 rows are not scored by the official metrics"):
        metrics = trainer.evaluate()
    assert {"eval_loss", "eval_MR-full-mAP", "eval_GMR-AUROC", "eval_GMR-G-mIoU@1"} <= metrics.keys()


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
    """For any number of steps between logs and of batches per step."""
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


@pytest.mark.parametrize(("growth", "expected"), [(0.5, [1, 2, 3, 4, 5, 6] + [6] * 6), (0.01, [1] + [6] * 11)])
def test_proposals_grow_early(make_trainer, tmp_path, growth, expected):
    trainer = make_trainer(tmp_path, proposal_growth=growth)
    seen = proposals_of_calls(trainer.model)
    trainer.train()
    assert seen == expected


@pytest.mark.parametrize("growth", [0, -0.5, 1.5, float("nan"), "half", None])
def test_impossible_growth(tmp_path, growth):
    with pytest.raises(ValueError, match=r"`proposal_growth` must be a number in \(0, 1\], got"):
        DiffusionVMRTrainingArguments(str(tmp_path), proposal_growth=growth)


def test_unknown_schedule(tmp_path):
    with pytest.raises(ValueError, match="`proposal_schedule` must be one of progress, stable, got 'linear'"):
        DiffusionVMRTrainingArguments(str(tmp_path), proposal_schedule="linear")


def test_plain_training_arguments_have_the_default_growth(make_dataset, tiny_config, tmp_path):
    trainer = DiffusionVMRTrainer(
        DiffusionVMRForMomentRetrieval(tiny_config()),
        TrainingArguments(str(tmp_path), report_to="none"),
        train_dataset=make_dataset(),
    )
    assert (trainer.proposal_schedule, trainer.proposal_growth) == ("progress", 1.0)


def test_two_gpus_in_one_process_are_rejected(make_dataset, tiny_config, tmp_path):
    arguments = DiffusionVMRTrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    arguments._n_gpu = 2  # what `transformers` finds on a machine with two
    model = DiffusionVMRForMomentRetrieval(tiny_config())
    with pytest.raises(ValueError) as error:
        DiffusionVMRTrainer(model, arguments, train_dataset=make_dataset())
    message = str(error.value)
    assert "2 GPUs need one process each" in message and "\n" not in message
    assert "`accelerate launch --num_processes 2 -m modeling_diffusionvmr train" in message
    assert "CUDA_VISIBLE_DEVICES=0" in message


def test_evaluation_loss(trained, make_dataset):
    trainer, _ = trained
    seen = proposals_of_calls(trainer.model)
    history = len(trainer.state.log_history)
    metrics = trainer.evaluate()
    assert set(seen) == {5}  # of inference
    assert metrics["eval_loss"] > 0
    assert trainer.evaluate()["eval_loss"] == metrics["eval_loss"]
    logs = trainer.state.log_history[history:]
    assert len(logs) == 2 and all("num_proposals" not in log for log in logs)


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


def test_training_resumes_from_a_checkpoint(make_trainer, tiny_config, tmp_path):
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


# Evaluation in training


def official(model, dataset) -> dict[str, float]:
    """Score the model the way the `evaluate` command does."""
    scores = evaluate_predictions(predict_moments(copy.deepcopy(model), dataset, progress=False), dataset.rows)
    return {name: value for name, value in (scores["brief"] | scores["extra"]).items() if value is not None}


def metrics_of(log: dict, prefix: str = "eval_") -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in log.items() if name.startswith(f"{prefix}MR-")}


def evaluations(trainer) -> list[dict]:
    return [log for log in trainer.state.log_history if any(name.startswith("eval_") for name in log)]


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_in_training(make_trainer, make_dataset, tmp_path, workers):
    """The same numbers as the `evaluate` command, with a last batch that is not full."""
    options = {"eval_steps": 2, "save_steps": 2, "max_steps": 4, "metric_for_best_model": "MR-full-mAP"}
    trainer = make_trainer(
        tmp_path, eval_strategy="steps", per_device_eval_batch_size=3, dataloader_num_workers=workers, **options
    )
    trainer.train()
    logs = evaluations(trainer)
    assert [log["step"] for log in logs] == [2, 4]
    for log in logs:
        model = AutoModel.from_pretrained(tmp_path / f"checkpoint-{log['step']}").to(trainer.args.device)
        expected = official(model, make_dataset(train=False))
        assert {"MR-full-mAP", "MR-full-R1@0.5", "MR-full-R1@0.7", "MR-mIoU"} <= expected.keys()
        assert metrics_of(log) == expected
        assert log["eval_loss"] > 0
    assert trainer.state.best_metric == max(log["eval_MR-full-mAP"] for log in logs)


def test_several_evaluation_datasets(make_trainer, make_dataset, tmp_path):
    sets = {"few": make_dataset(train=False, num_rows=3), "all": make_dataset(train=False)}
    trainer = make_trainer(
        tmp_path,
        eval_dataset=sets,
        max_steps=1,
        eval_strategy="steps",
        save_strategy="no",
        metric_for_best_model="all_MR-full-R1@0.5",
    )
    trainer.train()
    logs = evaluations(trainer)
    for name, dataset in sets.items():
        (log,) = (log for log in logs if f"eval_{name}_loss" in log)
        assert metrics_of(log, f"eval_{name}_") == official(trainer.model, dataset)


def test_rows_without_truth(trained, make_dataset):
    trainer, _ = trained
    dataset = make_dataset(train=False, truth=False)
    with pytest.warns(
        UserWarning, match="8 of 8 rows are not scored by the official metrics: 8 without `relevant_windows`"
    ):
        assert not metrics_of(trainer.evaluate(dataset))
    output = trainer.predict(dataset)
    assert not metrics_of(output.metrics, "test_") and "test_loss" not in output.metrics
    assert [prediction["qid"] for prediction in output.predictions] == list(range(8))


def test_only_rows_with_windows_are_scored(make_trainer, make_dataset, tmp_path):
    """One message counts the others, however often they are evaluated on."""
    mixed, rest = make_dataset(train=False), make_dataset(train=False)
    del mixed.rows[2]["relevant_windows"]
    mixed.rows[5]["relevant_windows"] = []
    rest.rows = [row for row in rest.rows if row["qid"] not in (2, 5)]
    options = {"eval_steps": 2, "save_steps": 2, "max_steps": 4, "metric_for_best_model": "MR-full-mAP"}
    trainer = make_trainer(tmp_path, eval_dataset=mixed, eval_strategy="steps", **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    messages = [str(warning.message) for warning in caught if "not scored" in str(warning.message)]
    assert messages == [
        "2 of 8 rows are not scored by the official metrics: 1 with `relevant_windows: []` (not in the video), "
        "1 without `relevant_windows` (unlabeled)"
    ]
    logs = evaluations(trainer)
    assert len(logs) == 2 and metrics_of(logs[-1])
    assert metrics_of(logs[-1]) == official(trainer.model, rest)
    # With several processes, one would have a batch without labels, and wait forever for the loss of another
    assert not any("eval_loss" in log for log in trainer.state.log_history)
    assert len(trainer.predict(mixed).predictions) == 8


@pytest.mark.parametrize("train", [False, True])
def test_predictions_of_the_trainer(trained, make_dataset, train):
    """Same as `predict_moments`, also on training data, whose noisy spans hold the truth."""
    trainer, _ = trained
    dataset = make_dataset(train=train)
    output = trainer.predict(dataset)
    for prediction, expected in zip(output.predictions, predict_moments(trainer.model, dataset, progress=False)):
        assert {**prediction, "pred_relevant_windows": 0, "pred_saliency_scores": 0} == {
            **expected,
            "pred_relevant_windows": 0,
            "pred_saliency_scores": 0,
        }
        for key in ("pred_relevant_windows", "pred_saliency_scores"):
            np.testing.assert_allclose(prediction[key], expected[key], atol=1e-4)
    assert metrics_of(output.metrics, "test_") == official(trainer.model, dataset)


@pytest.mark.parametrize("saved", [{"threshold": 0.99}, {"top_k": 1}, {"nms_threshold": 0.0}])
def test_evaluation_sees_every_proposal(trained, make_dataset, saved):
    """What is saved with the processor for people does not change predictions or metrics; `round_to` does."""
    trainer, _ = trained
    dataset = make_dataset(train=False)
    dataset.processor.round_to = 4.0
    expected, metrics = predict_moments(trainer.model, dataset, progress=False), trainer.evaluate(dataset)
    assert all(start % 4 == 0 for row in expected for start, _, _ in row["pred_relevant_windows"])
    vars(dataset.processor).update(saved)
    assert predict_moments(trainer.model, dataset, progress=False) == expected
    assert metrics_of(trainer.evaluate(dataset)) == metrics_of(metrics)
    assert saved.items() <= vars(dataset.processor).items()


def test_evaluation_loss_is_the_mean_over_rows(trained, make_dataset):
    trainer, _ = trained
    dataset = make_dataset(train=False, num_rows=7)
    trainer.args.per_device_eval_batch_size = 3
    try:
        loss = trainer.evaluate(dataset)["eval_loss"]
    finally:
        trainer.args.per_device_eval_batch_size = 8
    batch = DiffusionVMRDataCollator()(dataset.__getitems__(range(7)))
    batch = {name: value.to(trainer.args.device) for name, value in batch.items()}
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).loss.item()
    assert loss == pytest.approx(expected, rel=1e-5)


def test_evaluation_leaves_the_training_alone(make_trainer, make_dataset, tiny_config, tmp_path):
    """Even on the same dataset, whose noisy spans depend on the epoch, and with another batch size."""
    losses = []
    # An evaluation changes the dropout that follows: its loader draws a seed from the same generator
    config = tiny_config(dropout=0.0, input_dropout=0.0)
    for options in ({}, {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 3}):
        dataset = make_dataset()
        trainer = make_trainer(
            tmp_path,
            config=config,
            train_dataset=dataset,
            eval_dataset=dataset,
            max_steps=6,
            save_strategy="no",
            per_device_train_batch_size=2,
            **options,
        )
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == losses[1]


def test_early_stopping(make_trainer, monkeypatch, tmp_path):
    scores = iter([10.0, 20.0, 15.0, 18.0, 30.0])
    monkeypatch.setattr(
        trainer_module, "evaluate_predictions", lambda *_: {"brief": {"MR-full-mAP": next(scores)}, "extra": {}}
    )
    trainer = make_trainer(
        tmp_path,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        max_steps=5,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="MR-full-mAP",
        greater_is_better=True,
    )
    trainer.train()
    assert trainer.state.global_step == 4
    best = AutoModel.from_pretrained(tmp_path / "checkpoint-2")
    for name, weights in weights_of(trainer.model).items():
        assert torch.equal(weights, best.get_parameter(name))


class Reporter(TrainerCallback):
    """Records logs, as Weights & Biases and the like do."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(logs)


def test_reporters_get_everything(make_trainer, tmp_path):
    reporter = Reporter()
    make_trainer(
        tmp_path, callbacks=[reporter], max_steps=2, save_strategy="no", eval_strategy="epoch", logging_steps=2
    ).train()
    (loss,) = (log for log in reporter.logs if "loss" in log)
    assert {f"loss_{term}" for term in TERMS} < loss.keys()
    (scores,) = (log for log in reporter.logs if "eval_loss" in log)
    assert "eval_MR-full-mAP" in scores and "eval_MR-mIoU" in scores


# Features of `Trainer`


def losses_of(trainer) -> list[float]:
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def test_training_does_not_depend_on_workers(make_trainer, tmp_path):
    """Dropout included."""
    alone, shared = (
        losses_of(make_trainer(tmp_path, max_steps=6, save_strategy="no", dataloader_num_workers=workers))
        for workers in (0, 2)
    )
    assert shared == alone
    assert len(set(alone)) == 6


def test_model_from_a_function(make_trainer, make_dataset, tiny_config, tmp_path):
    trainer = DiffusionVMRTrainer(
        args=TrainingArguments(str(tmp_path), max_steps=2, save_strategy="no", report_to="none", disable_tqdm=True),
        train_dataset=make_dataset(),
        model_init=lambda: DiffusionVMRForMomentRetrieval(tiny_config()),
    )
    assert trainer.train().global_step == 2


def test_arguments_by_position(make_dataset, tiny_config, tmp_path):
    arguments = TrainingArguments(str(tmp_path), max_steps=1, save_strategy="no", report_to="none", disable_tqdm=True)
    model, collator = DiffusionVMRForMomentRetrieval(tiny_config()), DiffusionVMRDataCollator()
    trainer = DiffusionVMRTrainer(model, arguments, collator, make_dataset(), make_dataset(train=False))
    assert trainer.data_collator is collator and len(trainer.eval_dataset) == 8
    assert trainer.train(None, None).global_step == 1
    trainer = DiffusionVMRTrainer(model, arguments, None, make_dataset())
    assert type(trainer.data_collator) is DiffusionVMRDataCollator


# What cannot be trained


@pytest.mark.parametrize("wrap", [list, lambda rows: Subset(rows, [0, 1]), lambda rows: ConcatDataset([rows])])
@pytest.mark.parametrize(
    "changes, message",
    [
        (None, "the training dataset was built without `config`"),
        ({"num_diffusion_steps": 50}, "the training dataset was built with num_diffusion_steps=50, the model has 100"),
        ({"signal_scale": 1.0}, "the training dataset was built with signal_scale=1.0, the model has 2.0"),
        ({"max_training_proposals": 3}, "the training dataset was built with max_training_proposals=3, the model has"),
    ],
)
def test_dataset_of_another_configuration(make_trainer, tiny_config, tmp_path, wrap, changes, message):
    """Without the model's configuration, terms of the loss would be 0, or its noise would not fit."""
    dataset = small_training.make_dataset(None if changes is None else tiny_config(**changes))
    trainer = make_trainer(tmp_path, train_dataset=dataset if wrap is list else wrap(dataset))
    with pytest.raises(ValueError, match=f"^{message}.*: pass config=model.config to MomentRetrievalDataset$"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_fields_that_do_not_concern_the_dataset_may_differ(make_trainer, tiny_config, tmp_path):
    dataset = small_training.make_dataset(tiny_config(dropout=0, num_proposals=3))
    trainer = make_trainer(tmp_path, train_dataset=Subset(dataset, range(4)), max_steps=1, save_strategy="no")
    assert trainer.train().global_step == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_that_lose_updates(make_trainer, tmp_path, dtype):
    trainer = make_trainer(tmp_path, max_steps=1, save_strategy="no")
    trainer.model.to(dtype)
    with pytest.raises(ValueError, match=f"weights are {dtype}, .* load the model with dtype=torch.float32; .*--bf16"):
        trainer.train()
    trainer.model.float()
    assert trainer.train().global_step == 1


def test_no_batch(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, per_device_train_batch_size=9, dataloader_drop_last=True)
    with pytest.raises(ValueError, match="fewer samples than a batch, and `dataloader_drop_last` drops it"):
        trainer.train()


@pytest.mark.parametrize("field, value", [("eval_do_concat_batches", False), ("batch_eval_metrics", True)])
def test_arguments_that_rule_out_metrics(make_trainer, tmp_path, field, value):
    with pytest.raises(ValueError, match=f"`{field}` must be {not value}"):
        make_trainer(tmp_path, **{field: value})


def test_custom_metrics_are_rejected(make_dataset, tiny_config, tmp_path):
    with pytest.raises(ValueError, match="`compute_metrics`"):
        DiffusionVMRTrainer(
            DiffusionVMRForMomentRetrieval(tiny_config()),
            TrainingArguments(str(tmp_path), report_to="none"),
            train_dataset=make_dataset(),
            compute_metrics=lambda prediction: {},
        )


def test_predictions_kept_on_the_host(make_trainer, tmp_path):
    """`eval_accumulation_steps` changes no number."""
    metrics = [
        metrics_of(make_trainer(tmp_path, eval_accumulation_steps=steps, per_device_eval_batch_size=3).evaluate())
        for steps in (None, 1)
    ]
    assert metrics[0] == metrics[1] and metrics[0]


# Precision and compilation


def test_training_in_bfloat16(make_trainer, tiny_config, tmp_path):
    """Autocast gives losses close to float32, and weights stay float32."""
    config = tiny_config(dropout=0.0, input_dropout=0.0)
    exact, rough = (
        make_trainer(
            tmp_path, config=config, bf16=bf16, use_cpu=True, max_steps=6, learning_rate=3e-4, save_strategy="no"
        )
        for bf16 in (False, True)
    )
    expected = losses_of(exact)
    types = set()
    rough.model.saliency_head.register_forward_hook(lambda _, inputs, output: types.add(output.dtype))
    losses = losses_of(rough)
    assert types == {torch.bfloat16}  # it was on
    assert {weights.dtype for weights in weights_of(rough.model).values()} == {torch.float32}
    assert losses != expected
    assert losses[0] == pytest.approx(expected[0], rel=0.02)
    assert losses == pytest.approx(expected, rel=0.15)
    metrics = rough.evaluate()
    assert np.isfinite(metrics["eval_loss"]) and metrics_of(metrics)


def test_evaluation_in_bfloat16(make_trainer, tmp_path):
    """With `bf16_full_eval` the model is bfloat16 meanwhile, and batches are converted."""
    trainer = make_trainer(tmp_path, bf16_full_eval=True, use_cpu=True)
    before = small_training.weights_of(trainer.model)
    metrics = trainer.evaluate()
    assert np.isfinite(metrics["eval_loss"]) and metrics_of(metrics)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.named_parameters())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("absent", [0, 1])
def test_compiled_training(make_dataset, make_trainer, tiny_config, tmp_path, absent):
    """20 numbers of proposals and varying numbers of windows need few graphs and give the same losses."""
    config = tiny_config(max_training_proposals=20, encoder_layers=1, decoder_layers=1, absent_loss_coefficient=absent)
    dataset = small_training.make_dataset(config, num_rows=16, lengths=(15, 15, 15, 15), num_tokens=6)
    options = {"config": config, "train_dataset": dataset, "max_steps": 20, "save_strategy": "no", "use_cpu": True}
    expected = losses_of(make_trainer(tmp_path, **options))
    torch._dynamo.reset()
    counters.clear()
    # Beyond the limit, 8 by default, a function is never compiled again, and only a warning says so
    with torch._dynamo.config.patch(recompile_limit=4, fail_on_recompile_limit_hit=True):
        trainer = make_trainer(tmp_path, **options, torch_compile=True, torch_compile_backend="eager")
        seen = proposals_of_calls(trainer.model)
        losses = losses_of(trainer)
    torch._dynamo.reset()
    assert seen == list(range(1, 21))
    assert losses == pytest.approx(expected, rel=1e-5)
    assert 0 < counters["stats"]["unique_graphs"] <= 12
    assert counters["stats"]["calls_captured"] > 100  # it is the model that was compiled
    assert not counters["graph_break"]


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
    """Training samples hold their windows under some noise; a model that started there would look too good."""
    model = DiffusionVMRForMomentRetrieval(tiny_config())
    with_draws, without = (predict_moments(model, make_dataset(train=train), progress=False) for train in (True, False))
    assert with_draws == without


def test_evaluation_leaves_the_epoch_of_its_data_set(tiny_config, tmp_path):
    trainer = small_training.make_trainer(tmp_path, tiny_config())
    trainer.eval_dataset.set_epoch(3)
    for _ in range(2):
        trainer.evaluate()
    assert trainer.eval_dataset.epoch == 3
