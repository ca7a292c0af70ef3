"""`scripts/benchmark.py`, on small files and on a stand-in for the official script."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from modeling_diffusionvmr import evaluate_predictions
from modeling_diffusionvmr.data.annotations import check_row
from modeling_diffusionvmr.data.files import save_jsonl

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmark.py"
ROW = {"qid": 7, "query": "a red dog", "vid": "dogs", "duration": 10, "relevant_windows": [[0, 2], [6, 10]]}
PREDICTION = {"qid": 7, "query": "a red dog", "vid": "dogs", "pred_relevant_windows": [[6, 10, 0.9]]}
OFFICIAL = """
import time
from standalone_eval.utils import NUMBERS

def eval_submission(submission, ground_truth, verbose=True):
    assert len(submission) == len(ground_truth) == 1 and not verbose
    print("the official script is not silent")
    time.sleep(0.5)
    return NUMBERS
"""


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, "--part", "metrics", *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import benchmark

    return benchmark


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_jsonl([ROW], tmp_path / "truth.jsonl")
    save_jsonl([PREDICTION], tmp_path / "found.jsonl")
    save_jsonl([{name: ROW[name] for name in ("qid", "query", "vid", "duration")}], tmp_path / "test.jsonl")
    checkout = tmp_path / "checkout" / "standalone_eval"
    checkout.mkdir(parents=True)
    (checkout / "eval.py").write_text(OFFICIAL)
    numbers = evaluate_predictions([PREDICTION], [ROW])
    (checkout / "utils.py").write_text(f"NUMBERS = { {key: numbers[key] for key in ('brief', 'full')} }")
    return tmp_path


def test_metrics_on_simulated_data(folder, script, capsys):
    script.main(script.parse_arguments(["--part", "metrics", "--repeats", "1", "--output", "measured.json"]))
    printed = capsys.readouterr().out
    assert printed.count("| evaluate_predictions |") == 1 and "predictions: simulated (seed 0)" in printed
    measured = json.loads((folder / "measured.json").read_text())
    assert measured["part"] == "metrics" and measured["queries"] == 1550
    assert measured["annotations"] == measured["predictions"] == "simulated (seed 0)"
    (line,) = measured["table"]
    assert line["seconds"] > 0 and line["peak MiB"] > 50 and "same numbers" not in line

    rows = script.simulate_truth(0)
    predictions = script.simulate_predictions(rows, 0)
    assert [check_row(row) for row in rows] == rows == script.simulate_truth(0) != script.simulate_truth(1)
    assert {len(row["pred_relevant_windows"]) for row in predictions} == {10}
    assert {len(row["pred_saliency_scores"]) for row in predictions} == {75}
    scores = evaluate_predictions(predictions, rows)["brief"]
    assert len(scores) == 14 and all(0 < score < 100 for score in scores.values())


def test_metrics_beside_the_official_script(folder):
    files = ["--annotations", "truth.jsonl", "--predictions", "found.jsonl", "--official", "checkout"]
    result = run(*files, "--repeats", "2", "--output", "out/measured.json")
    assert result.returncode == 0, result.stderr
    assert "not silent" not in result.stdout
    measured = json.loads((folder / "out" / "measured.json").read_text())
    assert measured["queries"] == 1 and measured["predictions"] == "found.jsonl"
    ours, official = measured["table"]
    assert (ours["what"], official["what"]) == ("evaluate_predictions", "official script")
    assert ours["times ours"] == 1 and official["times ours"] > 1 and official["seconds"] >= 0.5
    assert ours["same numbers"] is official["same numbers"] is True
    assert official["peak MiB"] >= ours["peak MiB"] > 50

    (folder / "checkout" / "standalone_eval" / "utils.py").write_text("NUMBERS = {'brief': {'MR-full-mAP': 1.0}}")
    result = run(*files, "--repeats", "1")
    assert result.returncode == 0 and result.stdout.count("| False") == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--predictions", "found.jsonl"], "--annotations is needed"),
        (["--annotations", "absent.jsonl"], "absent.jsonl"),
        (["--annotations", "test.jsonl"], "test.jsonl: qid 7 has no true windows"),
        (["--official", "out"], "out: no checkout of moment_detr"),
        (
            ["--annotations", "truth.jsonl", "--official", "checkout"],
            "the official script fails on this (KeyError: 'x')",
        ),
        (["--repeats", "0"], "--repeats must be above 0, got 0"),
    ],
)
def test_bad_input(folder, script, monkeypatch, arguments, message):
    (folder / "checkout" / "standalone_eval" / "eval.py").write_text("def eval_submission(*_, **__): {}['x']")
    monkeypatch.setattr(sys, "path", list(sys.path))  # to which the script adds the checkout
    arguments = script.parse_arguments(["--part", "metrics", "--output", "measured.json", *arguments])
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        script.main(arguments)
    assert not (folder / "measured.json").exists()


def test_bad_input_is_one_line(folder):
    result = run("--predictions", "found.jsonl")
    assert result.returncode != 0
    assert result.stderr == "error: --predictions: --annotations is needed, too\n"


def test_training(script, folder, capsys):
    small = "--d_model 32 --encoder_layers 1 --decoder_layers 1 --encoder_ffn_dim 32 --decoder_ffn_dim 32 --roi_bins 4"
    arguments = ["--part", "training", "--steps", "2", "--batch_size", "3", "--output", "measured.json", *small.split()]
    match = script.loss_diffusionvmr.match
    script.main(script.parse_arguments(arguments))
    assert script.loss_diffusionvmr.match is match  # what was measured is put back
    measured = json.loads((folder / "measured.json").read_text())
    assert measured["data"] == "simulated (seed 0)" and small in measured["preset"]
    table = {line["what"]: line for line in measured["table"]}
    assert list(table) == ["data", "forward and loss", "matching", "backward", "optimizer"]
    assert all(line["ms a step"] > 0 for line in table.values())
    assert sum(float(line["share"].rstrip("%")) for line in table.values()) == pytest.approx(100, abs=0.5)
    with pytest.raises(SystemExit):
        script.main(script.parse_arguments([*arguments, "--d_modell", "3"]))
    assert "unknown flag --d_modell; did you mean --d_model?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.parse_arguments(["--part", "metrics", "--d_model", "32"])


def test_data(script, folder, monkeypatch):
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    arguments = ["--part", "data", "--videos", "12", "--samples", "8", "--repeats", "1", "--work_dir", str(folder)]
    result = script.measure_data(script.parse_arguments(arguments))
    monkeypatch.delenv("HF_DATASETS_CACHE")
    assert result["data"] == "simulated (seed 0)" and result["videos"] == 12
    assert [line["what"] for line in result["table"]] == ["first opening", "second opening"]
    assert all(line["seconds"] > 0 and line["samples a second"] > 0 for line in result["table"])
    assert not list(folder.glob("tmp*"))  # gigabytes are not left behind
