"""Several processes, or several micro-batches per step, train like one process with the same global batch."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import small_training

# With its default epsilon Adam turns rounding errors of a gradient near 0 into a whole step. With this one, only a
# dropped sample, a wrong weight or another order makes a difference.
TRAINING = {
    "num_rows": 16,
    "global_batch": 8,
    "num_eval_rows": 8,
    "per_device_eval_batch_size": 2,
    "max_steps": 4,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "no",
    "adam_epsilon": 1e-3,
}
# Steps of 8 and of 3 rows: of the 3, processes have 3 and 0. Evaluation is on 7 rows, 4 at a time
REMAINDER = {**TRAINING, "num_rows": 11, "num_eval_rows": 7}
RUNS = {
    "whole": {**TRAINING, "dataloader_num_workers": 1, "dataloader_multiprocessing_context": "fork"},
    "remainder": REMAINDER,
    "remainder_accumulated": {**REMAINDER, "gradient_accumulation_steps": 2},
    "logged_seldom": {**REMAINDER, "gradient_accumulation_steps": 2, "logging_steps": 3},
}
LAUNCHED = {**RUNS, "split": {**REMAINDER, "accelerator_config": {"split_batches": True}}}


def results(folder: Path, name: str) -> SimpleNamespace:
    return SimpleNamespace(
        weights=load_file(folder / f"{name}.safetensors"), **json.loads((folder / f"{name}.json").read_text())
    )


@pytest.fixture(scope="module")
def specify(tiny_config, tmp_path_factory):
    """Write a specification of runs to a new folder."""

    def make(runs) -> Path:
        config = tiny_config(dropout=0.0, input_dropout=0.0).to_diff_dict()
        path = tmp_path_factory.mktemp("runs") / "specification.json"
        path.write_text(json.dumps({"config": config, "runs": runs}))
        return path

    return make


@pytest.fixture(scope="module")
def alone(specify):
    """The results of one process; each run is done when it is first asked for."""
    done = {}

    def run(name: str) -> SimpleNamespace:
        if name not in done:
            specification = specify({name: RUNS[name]})
            small_training.run_specification(specification)
            done[name] = results(specification.parent, name)
        return done[name]

    return run


@pytest.fixture(scope="module")
def launched(specify) -> Path:
    """The folder with the results of two processes, one run after the other."""
    specification = specify(LAUNCHED)
    small_training.launch(specification, 2)
    return specification.parent


# `epoch` counts micro-batches, and an epoch of 11 rows has 2 steps but 3 of these
NOT_COMPARED = ("epoch", "eval_loss", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")


def assert_same_training(one: SimpleNamespace, other: SimpleNamespace):
    """Compare every number in every log, the weights and the predictions at the end."""
    ours, theirs = ([log for log in run.logs if "train_runtime" not in log] for run in (one, other))
    assert len(ours) == len(theirs)
    for log, expected in zip(ours, theirs):
        assert log.keys() == expected.keys()
        for name, value in log.items():
            if name not in NOT_COMPARED:  # terms are rounded to 4 places
                assert value == pytest.approx(expected[name], abs=2e-4, rel=2e-4), (log["step"], name)
    for name, weights in one.weights.items():
        torch.testing.assert_close(weights, other.weights[name], atol=1e-5, rtol=0, msg=name)
    assert len(one.predictions) == len(other.predictions)
    for prediction, expected in zip(one.predictions, other.predictions):
        assert prediction["qid"] == expected["qid"]
        for window, expected_window in zip(prediction["pred_relevant_windows"], expected["pred_relevant_windows"]):
            assert window == pytest.approx(expected_window, abs=1e-3)


def evaluations(run: SimpleNamespace) -> list[dict]:
    logs = [log for log in run.logs if "eval_loss" in log]
    assert [log["step"] for log in logs] == [2, 4]
    return logs


@pytest.mark.parametrize("name", LAUNCHED)
def test_two_processes_train_as_one(launched, alone, name):
    together = results(launched, name)
    assert together.processes == 2
    single = alone("remainder" if name == "split" else name.removesuffix("_accumulated"))
    assert single.processes == 1
    assert_same_training(together, single)
    qids = [prediction["qid"] for prediction in together.predictions]
    assert qids == list(range(LAUNCHED[name]["num_eval_rows"]))  # each once


@pytest.mark.parametrize("name", ["whole", "remainder"])
def test_two_processes_evaluate_as_one(launched, alone, name):
    """Of 7 rows, 4 at a time, one is seen twice."""
    for log, expected in zip(evaluations(results(launched, name)), evaluations(alone(name))):
        metrics = {name: value for name, value in log.items() if name.startswith("eval_MR-")}
        assert len(metrics) >= 9
        assert metrics == {name: expected[name] for name in metrics}


def test_two_processes_have_the_evaluation_loss_of_one(launched, alone):
    """If they divide the rows: otherwise some rows count twice."""
    for log, expected in zip(evaluations(results(launched, "whole")), evaluations(alone("whole"))):
        assert log["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-4)


def test_micro_batches_train_as_one_batch(alone):
    assert_same_training(alone("remainder_accumulated"), alone("remainder"))


def test_every_term_of_every_step_is_compared(alone):
    """The tests above compare logs with each other; this one checks what is in them."""
    logs = [log for log in alone("remainder").logs if "loss" in log]
    assert [log["num_proposals"] for log in logs] == [1, 2, 4, 5]
    assert all(f"loss_{term}" in log for log in logs for term in small_training.TERMS)
