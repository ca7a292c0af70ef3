"""`diffusionvmr evaluate`, with a tiny model and random features in the official layout."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch

from damaged import cut_off, other_sizes
from modeling_diffusionvmr import (
    DEFAULT_MODEL,
    DiffusionVMRForMomentRetrieval,
    DiffusionVMRProcessor,
    evaluate_predictions,
)
from modeling_diffusionvmr.cli import main
from modeling_diffusionvmr.data import files
from modeling_diffusionvmr.data.features import write_features
from modeling_diffusionvmr.data.files import load_jsonl, save_jsonl

CLIP = os.path.join(DEFAULT_MODEL, "clip")
SIZES = [8, 4]
SEED = 0  # of the weights: with some, no number of proposals finds more than another


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_config):
    """A checkpoint, features of two backbones and of sentences, and annotations with and without the truth."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    torch.manual_seed(SEED)
    DiffusionVMRForMomentRetrieval(tiny_config()).save_pretrained(folder / "model")
    DiffusionVMRProcessor(SIZES, 8, max_clips=20, max_tokens=10, round_to=2.0).save_pretrained(folder / "model")
    rows = []
    for index in range(7):
        vid = f"v{index % 4}"
        row = {"qid": index, "query": f"sentence {index}", "vid": vid, "duration": 30}
        row["relevant_windows"] = [[index, 14 + 2 * index]]
        row |= {"relevant_clip_ids": [2, 3, 4, 5], "saliency_scores": [[1, 2, 3], [4, 4, 4], [2, 2, 2], [0, 1, 0]]}
        rows.append(row)
        write_features(folder / "text", index, rng.normal(size=(5, 8)), "last_hidden_state")
        for name, size in zip(("slowfast", "clip"), SIZES):
            write_features(folder / name, vid, rng.normal(size=(15, size)))
    save_jsonl(rows, folder / "val.jsonl")
    known = ("qid", "query", "vid", "duration")
    save_jsonl([{name: row[name] for name in known} for row in rows], folder / "test.jsonl")
    return folder


@pytest.fixture
def argv(folder, tmp_path):
    """The arguments of a command; later ones override earlier ones."""

    def make(*arguments, annotations="val.jsonl") -> list[str]:
        features = ["--video_features", folder / "slowfast", folder / "clip", "--text_features", folder / "text"]
        options = ["--model", folder / "model", "--annotations", folder / annotations, "--output_dir", tmp_path / "out"]
        return ["evaluate", *map(str, (*options, *features, *arguments))]

    return make


@pytest.fixture
def evaluate(argv, tmp_path):
    """Run the command; return its metrics, or `None`, and its predictions."""

    def run(*arguments, **options):
        main(argv(*arguments, **options))
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
        "windows": False,
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


def test_long_videos_are_searched_in_windows(evaluate, folder, tmp_path):
    rng = np.random.default_rng(1)
    for name, size in zip(("slowfast", "clip"), SIZES):
        for index in range(4):
            write_features(tmp_path / name, f"v{index}", rng.normal(size=(45, size)))  # the model reads 20 at once
    features = "--video_features", tmp_path / "slowfast", tmp_path / "clip"
    averaged, (whole, *_) = evaluate(*features)
    metrics, (found, *_) = evaluate(*features, "--windows")
    assert (averaged["settings"]["windows"], metrics["settings"]["windows"]) == (False, True)
    assert len(found["pred_relevant_windows"]) > len(whole["pred_relevant_windows"]) == 5


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


def test_what_is_saved_for_people_is_ignored(evaluate, folder, tmp_path):
    """The official metrics see every proposal, unless a flag says otherwise. `round_to` belongs to the benchmark."""
    expected, expected_predictions = evaluate()
    model = shutil.copytree(folder / "model", tmp_path / "model")
    few = DiffusionVMRProcessor(SIZES, 8, 20, 10, threshold=0.9, top_k=1, nms_threshold=0.1, round_to=2.0)
    few.save_pretrained(model)
    metrics, predictions = evaluate("--model", model)
    assert predictions == expected_predictions
    assert metrics == {**expected, "settings": {**expected["settings"], "model": str(model)}}

    metrics, predictions = evaluate("--model", model, "--top_k", 2)
    assert [row["pred_relevant_windows"] for row in predictions] == [
        row["pred_relevant_windows"][:2] for row in expected_predictions
    ]
    assert (metrics["settings"]["top_k"], metrics["settings"]["threshold"]) == (2, 0.0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--num_proposals", "5", "0"], "num_proposals"),
        (["--num_sampling_steps", "2", "0"], "num_sampling_steps"),
        (["--threshold", "nan"], "threshold"),
        (["--top_k", "-1"], "top_k"),
        (["--nms_threshold", "2"], "nms_threshold"),
        (["--round_to", "0"], "round_to"),
    ],
)
def test_flags_are_checked_before_the_work(argv, error_of, monkeypatch, arguments, message):
    monkeypatch.setattr(
        "modeling_diffusionvmr.cli.evaluate.resolve_model", lambda _: pytest.fail("the model is loaded")
    )
    assert message in error_of(*argv(*arguments))


def test_the_best_number_of_proposals_is_kept(evaluate, capsys):
    single = {number: evaluate("--num_proposals", number, "--metric", "MR-full-mAP@0.5") for number in (1, 3, 9)}
    values = {number: metrics["brief"]["MR-full-mAP@0.5"] for number, (metrics, _) in single.items()}
    assert len(set(values.values())) > 1, values
    best = max(values, key=values.get)
    capsys.readouterr()
    assert evaluate("--num_proposals", 1, 3, 9, "--metric", "MR-full-mAP@0.5") == single[best]
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].endswith(f" for N = {best}")
    for number in (1, 3, 9):
        assert f'"num_proposals": {number}' in printed


def test_numbers_of_proposals_and_steps_are_searched_together(evaluate, capsys):
    single = {
        (number, steps): evaluate("--num_proposals", number, "--num_sampling_steps", steps)
        for number in (1, 9)
        for steps in (1, 3)
    }
    values = {pair: metrics["brief"]["MR-full-mAP"] for pair, (metrics, _) in single.items()}
    assert len(set(values.values())) > 2, values
    best = max(values, key=values.get)
    capsys.readouterr()
    assert evaluate("--num_proposals", 1, 9, "--num_sampling_steps", 1, 3) == single[best]
    *_, title, line, first, second, third, fourth, last = capsys.readouterr().out.splitlines()
    assert (title, line) == ("| N | S | MR-full-mAP |", "| --- | --- | --- |")
    assert [first, second, third, fourth] == [f"| {n} | {s} | {values[n, s]} |" for n in (1, 9) for s in (1, 3)]
    assert last.endswith(f" for N = {best[0]}, S = {best[1]}")


def test_the_first_of_equally_good_numbers_of_proposals(evaluate):
    metrics, _ = evaluate("--num_proposals", 9, 1, "--threshold", 2)  # no score is that high
    assert metrics["brief"]["MR-full-mAP"] == 0 and metrics["settings"]["num_proposals"] == 9


def test_without_ground_truth_there_are_predictions_only(evaluate, argv, error_of):
    metrics, predictions = evaluate(annotations="test.jsonl")
    assert metrics is None and len(predictions) == 7
    assert predictions == evaluate()[1]  # the truth, where there is one, is not looked at
    assert "choosing N needs rows" in error_of(*argv("--num_proposals", 1, 3, annotations="test.jsonl"))
    assert "choosing S needs rows" in error_of(*argv("--num_sampling_steps", 1, 3, annotations="test.jsonl"))


def test_metrics_of_other_predictions_are_removed(evaluate, capsys):
    assert evaluate()[0] is not None
    assert evaluate(annotations="test.jsonl")[0] is None
    assert "7 of 7 rows are not scored" in capsys.readouterr().out


def test_clip_length_of_the_checkpoint(evaluate, folder, tmp_path, tiny_config):
    """The same as in training, if the features do not state it."""
    backbones = [{"name": "slowfast", "feature_size": 8, "clip_seconds": 1.0}, {"name": "clip", "feature_size": 4}]
    config = tiny_config(backbones=[*backbones, {"name": "words", "text_feature_size": 8}])
    shutil.copytree(folder / "model", tmp_path / "model")
    config.save_pretrained(tmp_path / "model")
    assert evaluate("--model", tmp_path / "model")[0]["settings"]["clip_seconds"] == 1.0
    assert evaluate("--model", tmp_path / "model", "--clip_seconds", 2)[0]["settings"]["clip_seconds"] == 2.0


def test_unknown_metric(argv, error_of, tmp_path):
    assert re.search("--metric must be one of .*MR-full-mAP.*, got 'mAP'", error_of(*argv("--metric", "mAP")))
    assert not (tmp_path / "out").exists()


def test_unusable_rows_are_skipped_and_listed(evaluate, argv, error_of, folder, capsys):
    rows = load_jsonl(folder / "val.jsonl")
    rows[2]["vid"] = "absent"
    rows[5]["relevant_windows"] = [[9, 9]]
    save_jsonl(rows, folder / "broken.jsonl")
    error = error_of(*argv(annotations="broken.jsonl"))
    assert re.search(r"broken\.jsonl, line 6: .*9", error)
    capsys.readouterr()
    _, predictions = evaluate("--skip_invalid", annotations="broken.jsonl")
    assert [row["qid"] for row in predictions] == [0, 1, 3, 4, 6]
    first, second = capsys.readouterr().err.split("warning: ")[1:]
    assert "line 6" in first and "video absent" in second


# Rows without windows


@pytest.fixture
def mixed(folder):
    """Annotations of which row 2 is not in its video, and row 5 is unlabeled."""
    rows = load_jsonl(folder / "val.jsonl")
    rows[2]["relevant_windows"] = []
    for name in ("relevant_windows", "relevant_clip_ids", "saliency_scores"):
        del rows[5][name]
    save_jsonl(rows, folder / "mixed.jsonl")
    return rows


def test_rows_without_windows_are_predicted_but_not_scored(evaluate, mixed, capsys):
    metrics, predictions = evaluate(annotations="mixed.jsonl")
    assert [row["qid"] for row in predictions] == list(range(7))
    scored = [index for index in range(7) if index != 5]
    settings = metrics.pop("settings")
    assert settings["queries"] == 5
    assert metrics == evaluate_predictions([predictions[i] for i in scored], [mixed[i] for i in scored])
    assert metrics["extra"].keys() > {"GMR-Rej-F1@0.4", "GMR-G-mIoU@1"}
    scored.remove(2)
    without = evaluate_predictions([predictions[i] for i in scored], [mixed[i] for i in scored])
    assert {**metrics, "extra": without["extra"]} == without  # the official metrics do not see row 2
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "not scored" in line]
    assert "2 of 7 rows" in line
    assert "1 with `relevant_windows: []` (not in the video)" in line
    assert "1 without `relevant_windows` (unlabeled)" in line


def test_proposals_are_chosen_on_the_rows_with_windows(evaluate, mixed, capsys):
    metrics, _ = evaluate("--num_proposals", 1, 9, annotations="mixed.jsonl")
    assert metrics["settings"]["num_proposals"] in (1, 9)
    assert capsys.readouterr().out.count("not scored") == 1  # whatever the number of candidates


# Files that fit together


@pytest.mark.parametrize("step", ["save_jsonl", "save_json"])
@pytest.mark.parametrize("is_written", [False, True])
def test_metrics_always_belong_to_the_predictions_beside_them(evaluate, argv, tmp_path, monkeypatch, step, is_written):
    old = evaluate("--num_proposals", 1)
    write = getattr(files, step)

    def stop(content, path):
        if is_written:
            write(content, path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, step, stop)
        with pytest.raises(SystemExit):
            main(argv("--num_proposals", 9))
    predictions = load_jsonl(tmp_path / "out" / "predictions.jsonl")
    new_predictions = step == "save_json" or is_written
    assert (predictions == old[1]) != new_predictions
    saved = tmp_path / "out" / "metrics.json"
    assert saved.exists() == (step == "save_json" and is_written)
    if saved.exists():
        assert json.loads(saved.read_text())["settings"]["num_proposals"] == 9
    assert not list((tmp_path / "out").glob(".*"))


# Bad input


def test_features_of_one_backbone_of_two(argv, error_of, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["evaluate", "--model", folder / "model", "--annotations", folder / "val.jsonl"]
    command += ["--video_features", folder / "clip", "--text_features", folder / "text"]
    assert error_of(*command) == "error: video v0 has features of 1 backbones, expected 2"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--annotations", "{tmp}/absent.jsonl"], "absent.jsonl"),
        (["--annotations", "{tmp}"], "{tmp}"),
        (["--split", "val"], "val.jsonl: only a converted folder has"),
        (["--video_features", "{tmp}/absent"], "{tmp}/absent: no such file or folder"),
        (["--text_features", "{tmp}/absent.txt"], "absent.txt"),
        (["--text_features", "{data}/clip"], "no features of its sentence"),
        (["--video_features", "{data}/clip", "{data}/slowfast"], "must be (length, 8), got (15, 4)"),
        (["--model", "{tmp}/absent"], "{tmp}/absent: not a local folder or a valid Hub id"),
        (["--model", "a/b/c"], "a/b/c: not a local folder or a valid Hub id"),
        (["--model", "{data}/val.jsonl"], "val.jsonl: a checkpoint must be a folder, not a file"),
        (["--model", "{tmp}"], "{tmp}: cannot be loaded"),
        (["--model", CLIP], "a model of type clip, not diffusionvmr"),
        (["--num_proposals", "1000000000000000"], "not enough memory"),
        (["--output_dir", "{data}/val.jsonl"], "val.jsonl is a file"),
        (["--output_dir", "{data}/val.jsonl/below"], "val.jsonl is a file"),
        (["--num_sampling_steps", "9999"], "num_sampling_steps"),
        (["--clip_seconds", "-1"], "--clip_seconds must be a number above 0, got -1"),
        (["--clip_seconds", "nan"], "--clip_seconds must be a number above 0, got nan"),
        (["--batch_size", "0"], "--batch_size must be a number above 0, got 0"),
        (["--device", "nonsense"], "--device nonsense cannot be used"),
        (["--device", "meta"], "--device meta cannot be used"),
    ],
)
def test_bad_arguments(argv, error_of, folder, tmp_path, arguments, message):
    places = {"data": folder, "tmp": tmp_path}
    error = error_of(*argv(*(argument.format(**places) for argument in arguments)))
    assert message.format(**places) in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "damage, message",
    [
        (cut_off, "weights are damaged or cut off"),
        (other_sizes, "the sizes in its config.json do not fit its weights"),
        (lambda model: (model / "config.json").write_text("[1]"), "config.json: must be a JSON object, got"),
        (lambda model: (model / "config.json").write_text("{"), "config.json: not JSON"),
        (lambda model: (model / "config.json").unlink(), "cannot be loaded"),
        (lambda model: (model / "model.safetensors").unlink(), "model.safetensors"),
        (
            lambda model: (model / "processor_config.json").write_text("[]"),
            "processor_config.json: must be a JSON",
        ),
    ],
    ids="cut_off other_sizes list_config bad_config no_config no_weights list_processor".split(),
)
def test_damaged_checkpoint(argv, error_of, folder, tmp_path, damage, message):
    shutil.copytree(folder / "model", tmp_path / "model")
    damage(tmp_path / "model")
    error = error_of(*argv("--model", tmp_path / "model"))
    assert str(tmp_path / "model") in error and message in error
