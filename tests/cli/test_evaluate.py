"""`scripts/evaluate.py`, with a tiny model and random features in the official layout."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from modeling_diffusionvmr import DiffusionVMRForMomentRetrieval, DiffusionVMRProcessor, evaluate_predictions
from modeling_diffusionvmr.data.features import write_features
from modeling_diffusionvmr.data.files import load_jsonl, save_jsonl

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "evaluate.py"
SIZES = [8, 4]


@pytest.fixture(scope="module")
def script():
    specification = importlib.util.spec_from_file_location("evaluate_script", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_config):
    """A checkpoint, features of two backbones and of sentences, and annotations with and without the truth."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    DiffusionVMRForMomentRetrieval(tiny_config()).save_pretrained(folder / "model")
    DiffusionVMRProcessor(SIZES, 8, max_clips=20, max_tokens=10, round_to=2.0).save_pretrained(folder / "model")
    rows = []
    for index in range(7):
        vid = f"v{index % 4}"
        row = {"qid": index, "query": f"sentence {index}", "vid": vid, "duration": 30}
        row["relevant_windows"] = [[index, 14 + 2 * index]]
        row |= {"relevant_clip_ids": [2, 3, 4, 5], "saliency_scores": [[1, 2, 3], [4, 4, 4], [2, 2, 2], [0, 1, 0]]}
        rows.append(row)
        write_features(folder / "text", index, random.normal(size=(5, 8)), "last_hidden_state")
        for name, size in zip(("slowfast", "clip"), SIZES):
            write_features(folder / name, vid, random.normal(size=(15, size)))
    save_jsonl(rows, folder / "val.jsonl")
    known = ("qid", "query", "vid", "duration")
    save_jsonl([{name: row[name] for name in known} for row in rows], folder / "test.jsonl")
    return folder


@pytest.fixture
def evaluate(script, folder, tmp_path):
    """Runs the command; gives its metrics, or `None`, and its predictions."""

    def run(*arguments, annotations="val.jsonl"):
        features = ["--video_features", folder / "slowfast", folder / "clip", "--text_features", folder / "text"]
        options = ["--model", folder / "model", "--annotations", folder / annotations, "--output_dir", tmp_path / "out"]
        script.main(script.parse_arguments([str(argument) for argument in (*options, *features, *arguments)]))
        metrics = tmp_path / "out" / "metrics.json"
        return (
            json.loads(metrics.read_text()) if metrics.exists() else None,
            load_jsonl(tmp_path / "out" / "predictions.jsonl"),
        )

    return run


def test_metrics_are_those_of_the_predictions(evaluate, folder):
    metrics, predictions = evaluate()
    rows = load_jsonl(folder / "val.jsonl")
    settings = metrics.pop("settings")
    assert metrics == evaluate_predictions(predictions, rows) and "HL-min-Fair" in metrics
    assert settings == {
        "num_proposals": 5,
        "num_sampling_steps": 1,
        "threshold": 0.0,
        "top_k": None,
        "nms_threshold": None,
        "round_to": 2.0,
        "clip_seconds": None,
        "queries": 7,
        "annotations": str(folder / "val.jsonl"),
        "split": None,
        "model": str(folder / "model"),
    }
    for row, prediction in zip(rows, predictions, strict=True):
        assert {name: prediction[name] for name in ("qid", "query", "vid")} == {
            name: row[name] for name in ("qid", "query", "vid")
        }
        windows = np.array(prediction["pred_relevant_windows"])
        assert windows.shape == (5, 3) and (windows[:, :2] % 2 == 0).all() and (np.diff(windows[:, 2]) <= 0).all()
        assert len(prediction["pred_saliency_scores"]) == 15


def test_options_reach_the_predictions(evaluate):
    metrics, predictions = evaluate("--num_proposals", 9, "--top_k", 3, "--num_sampling_steps", 2, "--round_to", 0.5)
    assert {name: metrics["settings"][name] for name in ("num_proposals", "top_k", "num_sampling_steps")} == {
        "num_proposals": 9,
        "top_k": 3,
        "num_sampling_steps": 2,
    }
    windows = np.array([row["pred_relevant_windows"] for row in predictions])
    assert windows.shape == (7, 3, 3)
    assert (windows[..., :2] % 0.5 == 0).all() and (windows[..., :2] % 2 != 0).any()


def test_the_best_number_of_proposals_is_kept(evaluate, capsys):
    single = {number: evaluate("--num_proposals", number, "--metric", "MR-full-mAP@0.5") for number in (1, 3, 9)}
    values = {number: metrics["brief"]["MR-full-mAP@0.5"] for number, (metrics, _) in single.items()}
    assert len(set(values.values())) > 1, values
    best = max(values, key=values.get)
    assert evaluate("--num_proposals", 1, 3, 9, "--metric", "MR-full-mAP@0.5") == single[best]
    printed = capsys.readouterr().out
    for number in (1, 3, 9):
        assert f'"num_proposals": {number}' in printed


def test_without_ground_truth_there_are_predictions_only(evaluate):
    metrics, predictions = evaluate(annotations="test.jsonl")
    assert metrics is None and len(predictions) == 7
    assert predictions == evaluate()[1]  # the truth, where there is one, is not looked at
    with pytest.raises(ValueError, match="N cannot be chosen"):
        evaluate("--num_proposals", 1, 3, annotations="test.jsonl")


def test_metrics_of_other_predictions_do_not_stay(evaluate, capsys):
    assert evaluate()[0] is not None
    assert evaluate(annotations="test.jsonl")[0] is None
    assert "7 of 7 rows have no `relevant_windows`" in capsys.readouterr().out


def test_clip_length_of_the_checkpoint(evaluate, folder, tmp_path, tiny_config):
    """As in training, where the features say nothing."""
    backbones = [{"name": "slowfast", "feature_size": 8, "clip_seconds": 1.0}, {"name": "clip", "feature_size": 4}]
    config = tiny_config(backbones=[*backbones, {"name": "words", "text_feature_size": 8}])
    shutil.copytree(folder / "model", tmp_path / "model")
    config.save_pretrained(tmp_path / "model")
    assert evaluate("--model", tmp_path / "model")[0]["settings"]["clip_seconds"] == 1.0
    assert evaluate("--model", tmp_path / "model", "--clip_seconds", 2)[0]["settings"]["clip_seconds"] == 2.0


def test_unknown_metric(evaluate, tmp_path):
    with pytest.raises(ValueError, match="--metric must be one of .*MR-full-mAP.*, got 'mAP'"):
        evaluate("--metric", "mAP")
    assert not (tmp_path / "out").exists()


def test_rows_that_cannot_be_used_are_dropped_and_named(evaluate, folder, tmp_path):
    rows = load_jsonl(folder / "val.jsonl")
    rows[2]["vid"] = "absent"
    rows[5]["relevant_windows"] = [[9, 9]]
    save_jsonl(rows, folder / "broken.jsonl")
    with pytest.raises(ValueError, match=r"broken\.jsonl, line 6: .*does not end after it starts"):
        evaluate(annotations="broken.jsonl")
    with pytest.warns(UserWarning) as caught:
        _, predictions = evaluate("--skip_invalid", annotations="broken.jsonl")
    assert [row["qid"] for row in predictions] == [0, 1, 3, 4, 6]
    assert ["line 6" in str(caught[0].message), "video absent" in str(caught[1].message)] == [True, True]


def test_bad_input_is_one_line(folder, tmp_path):
    command = [sys.executable, SCRIPT, "--model", folder / "model", "--annotations", folder / "val.jsonl"]
    command += ["--video_features", folder / "clip", "--text_features", folder / "text"]  # of one backbone of two
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1] == "error: video v0 has features of 1 backbones, expected 2"
    assert not list(tmp_path.iterdir())
