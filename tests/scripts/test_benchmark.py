"""`scripts/benchmark.py`, on small files and with a stand-in for the official script."""

import itertools
import json
import re
import sys
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

import benchmark
import benchmark_common
import benchmark_data
import benchmark_extraction
import benchmark_inference
import benchmark_profile
import benchmark_training
from benchmark_metrics import simulate_predictions
from benchmark_samples import simulate_truth
from modeling_diffusionvmr import (
    DiffusionVMRConfig,
    DiffusionVMRForMomentRetrieval,
    evaluate_predictions,
    loss_diffusionvmr,
)
from modeling_diffusionvmr.cli.errors import run_safely
from modeling_diffusionvmr.data.annotations import check_row
from modeling_diffusionvmr.data.files import save_jsonl
from modeling_diffusionvmr.slowfast import SlowFastBackbone
from small_checkpoint import tiny_clip
from small_slowfast import tiny_slowfast

ROW = {"qid": 7, "query": "a red dog", "vid": "dogs", "duration": 10, "relevant_windows": [[0, 2], [6, 10]]}
PREDICTION = {"qid": 7, "query": "a red dog", "vid": "dogs", "pred_relevant_windows": [[6, 10, 0.9]]}
OFFICIAL = """
from standalone_eval.utils import NUMBERS

def eval_submission(submission, ground_truth, verbose=True):
    assert len(submission) == len(ground_truth) == 1 and not verbose
    print("the official script is not silent")
    return NUMBERS
"""


def run(*arguments: str) -> None:
    benchmark.main(benchmark.parse_arguments(list(arguments)))


def forget_official_script() -> None:
    """Make the next import of the stand-in read its files again."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "standalone_eval"]:
        del sys.modules[name]


@pytest.fixture
def clock(monkeypatch):
    """Return a function that replaces the script's clock: the seconds between its readings are those given, in turn."""

    def replace(*seconds: float) -> None:
        readings = itertools.accumulate(itertools.cycle(seconds))
        monkeypatch.setattr(benchmark_common, "time", SimpleNamespace(perf_counter=lambda: next(readings)))

    return replace


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the script adds the checkout to it
    save_jsonl([ROW], tmp_path / "truth.jsonl")
    save_jsonl([PREDICTION], tmp_path / "found.jsonl")
    save_jsonl([{name: ROW[name] for name in ("qid", "query", "vid", "duration")}], tmp_path / "test.jsonl")
    checkout = tmp_path / "checkout" / "standalone_eval"
    checkout.mkdir(parents=True)
    (checkout / "eval.py").write_text(OFFICIAL)
    numbers = evaluate_predictions([PREDICTION], [ROW])
    (checkout / "utils.py").write_text(f"NUMBERS = { {key: numbers[key] for key in ('brief', 'full')} }")
    yield tmp_path
    forget_official_script()


def test_metrics_on_simulated_data(folder, clock, capsys):
    clock(0, 2.5)
    run("--part", "metrics", "--repeats", "1", "--output", "measured.json")
    printed = capsys.readouterr().out
    assert printed.count("| evaluate_predictions |") == 1 and "predictions: simulated (seed 0)" in printed
    measured = json.loads((folder / "measured.json").read_text())
    assert measured["part"] == "metrics" and measured["queries"] == 1550
    assert measured["annotations"] == measured["predictions"] == "simulated (seed 0)"
    (line,) = measured["table"]
    assert line["seconds"] == 2.5 and line["peak MiB"] > 50 and "same numbers" not in line

    rows = simulate_truth(0)
    predictions = simulate_predictions(rows, 0)
    assert [check_row(row) for row in rows] == rows == simulate_truth(0) != simulate_truth(1)
    assert {len(row["pred_relevant_windows"]) for row in predictions} == {10}
    assert {len(row["pred_saliency_scores"]) for row in predictions} == {75}
    scores = evaluate_predictions(predictions, rows)["brief"]
    assert len(scores) == 14 and all(0 < score < 100 for score in scores.values())


def test_metrics_beside_the_official_script(folder, clock, capsys):
    files = ["--annotations", "truth.jsonl", "--predictions", "found.jsonl", "--official", "checkout"]
    # Ours takes 1 s, then 3 s; the official script 6 s, then 10 s
    clock(0, 1, 0, 6, 0, 3, 0, 10)
    run("--part", "metrics", *files, "--repeats", "2", "--output", "out/measured.json")
    assert "not silent" not in capsys.readouterr().out
    measured = json.loads((folder / "out" / "measured.json").read_text())
    assert measured["queries"] == 1 and measured["predictions"] == "found.jsonl"
    ours, theirs = measured["table"]
    assert (ours["what"], theirs["what"]) == ("evaluate_predictions", "official script")
    assert (ours["seconds"], theirs["seconds"]) == (2, 8) and (ours["times ours"], theirs["times ours"]) == (1, 4)
    assert ours["same numbers"] is theirs["same numbers"] is True
    assert theirs["peak MiB"] >= ours["peak MiB"] > 50

    (folder / "checkout" / "standalone_eval" / "utils.py").write_text("NUMBERS = {'brief': {'MR-full-mAP': 1.0}}")
    forget_official_script()
    run("--part", "metrics", *files, "--repeats", "1")
    assert capsys.readouterr().out.count("| False") == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--predictions", "found.jsonl"], "--predictions also needs --annotations"),
        (["--annotations", "absent.jsonl"], "absent.jsonl"),
        (["--annotations", "test.jsonl"], "test.jsonl: qid 7 has no true windows"),
        (["--official", "out"], "out: not a checkout of moment_detr"),
        (
            ["--annotations", "truth.jsonl", "--official", "checkout"],
            "the official script fails on these files (KeyError: 'x')",
        ),
        (["--repeats", "0"], "--repeats must be a number above 0, got 0"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
    ],
)
def test_bad_input(folder, arguments, message):
    (folder / "checkout" / "standalone_eval" / "eval.py").write_text("def eval_submission(*_, **__): {}['x']")
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        run("--part", "metrics", "--output", "measured.json", *arguments)
    assert not (folder / "measured.json").exists()


@pytest.mark.parametrize(
    "part, arguments, message",
    [
        ("training", ["--steps", "-3"], "--steps must be a number above 0, got -3"),
        ("training", ["--batch_size", "0"], "--batch_size must be a number above 0, got 0"),
        ("data", ["--samples", "-1"], "--samples must be a number above 0, got -1"),
        ("extract", ["--video_seconds", "0"], "--video_seconds must be a number above 0, got 0"),
        ("data", ["--videos", "0"], "--videos must be a number above 0, got 0"),
        ("data", ["--repeats", "0"], "--repeats must be a number above 0, got 0"),
        ("data", ["--work_dir", "absent"], "--work_dir: absent is not a folder"),
        ("inference", ["--official", "out"], "out: not a checkout of moment_detr (it has no moment_detr/model.py)"),
        ("training", ["--device", "toaster"], "--device toaster cannot be used"),
    ],
)
def test_bad_input_is_rejected_before_any_work(folder, monkeypatch, part, arguments, message):
    for module, name in ((benchmark_data, "make_folder"), (benchmark_training, "make_training")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("work has begun"))
    with pytest.raises(ValueError, match=re.escape(message)):
        run("--part", part, *arguments)


def test_bad_input_is_one_line(folder, capsys):
    with pytest.raises(SystemExit) as exit:
        run_safely(benchmark.main, benchmark.parse_arguments(["--part", "metrics", "--predictions", "found.jsonl"]))
    assert exit.value.code == "error: --predictions also needs --annotations"
    for arguments in (["--part", "cooking"], ["--part", "metrics", "--d_model", "32"], ["--part", "data", "--seed"]):
        with pytest.raises(SystemExit) as exit:
            benchmark.parse_arguments(arguments)
        lines = capsys.readouterr().err.splitlines()
        assert exit.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
        assert lines[0].endswith("(`python scripts/benchmark.py --help` lists all arguments)")


def test_extraction(folder, monkeypatch):
    tiny = {"clip": tiny_clip(), "slowfast": SlowFastBackbone(tiny_slowfast())}
    monkeypatch.setattr(benchmark_extraction, "random_backbones", lambda seed: tiny)
    run("--part", "extract", "--repeats", "2", "--video_seconds", "3", "--output", "measured.json", "--device", "cpu")
    measured = json.loads((folder / "measured.json").read_text())
    assert measured["data"] == "simulated video of 3 s (seed 0), random weights"
    assert [line["backbones"] for line in measured["table"]] == ["clip", "slowfast", "clip + slowfast"]
    columns = ["decoding", "preparation", "forward", "one video", "extract", "CPU of extract"]
    for line in measured["table"]:
        assert list(line)[1:] == columns
        assert line["decoding"] > 0 and line["extract"] > 0


def test_training(folder, clock, capsys):
    small = "--d_model 32 --encoder_layers 1 --decoder_layers 1 --encoder_ffn_dim 32 --decoder_ffn_dim 32 --roi_bins 4"
    arguments = ["--part", "training", "--steps", "2", "--batch_size", "3", "--output", "measured.json", *small.split()]
    match = loss_diffusionvmr.match
    clock(1)  # per reading, of which matching takes two inside of "forward and loss"
    run(*arguments)
    assert loss_diffusionvmr.match is match  # the original function is restored
    measured = json.loads((folder / "measured.json").read_text())
    assert measured["data"] == "simulated (seed 0)" and small in measured["preset"]
    assert {line["what"]: line["ms per step"] for line in measured["table"]} == {
        "data": 1000,
        "forward and loss": 2000,
        "matching": 1000,
        "backward": 1000,
        "optimizer": 1000,
    }
    assert [line["share"] for line in measured["table"]] == ["16.7%", "33.3%", "16.7%", "16.7%", "16.7%"]
    assert measured["samples per second"] == 0.5  # 3 in 6 s
    with pytest.raises(SystemExit):
        run(*arguments, "--d_modell", "3")
    assert "unknown flag --d_modell; did you mean --d_model?" in capsys.readouterr().err


MOMENT_DETR = """
import torch
from moment_detr.criterion import Criterion

class MomentDETR(torch.nn.Module):
    def __init__(self, args):
        super().__init__()
        self.video = torch.nn.Linear(args.v_feat_dim, args.hidden_dim)
        self.text = torch.nn.Linear(args.t_feat_dim, args.hidden_dim)

    def forward(self, src_vid, src_vid_mask, src_txt, src_txt_mask):
        assert src_vid_mask.shape == src_vid.shape[:2] and src_txt_mask.shape == src_txt.shape[:2]
        return self.video(src_vid).sum((1, 2)) + self.text(src_txt).sum((1, 2))

def build_model(args):
    return MomentDETR(args), Criterion()
"""
CRITERION = """
class Criterion:
    weight_dict = {"loss_span": 10}

    def __call__(self, outputs, targets):
        assert len(outputs) == len(targets["span_labels"]) == len(targets["saliency_pos_labels"])
        return {"loss_span": outputs.mean(), "class_error": None}
"""
TINY = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
TINY |= {"video_feature_size": 24, "text_feature_size": 8, "roi_bins": 4, "dynamic_size": 4}


@pytest.fixture
def small_sizes(monkeypatch):
    """Replace models and batches by small ones."""
    for module in (benchmark_inference, benchmark_profile):
        columns = [column._replace(batch_size=min(3, column.batch_size)) for column in module.COLUMNS]
        monkeypatch.setattr(module, "SIZES", {"published": TINY})
        monkeypatch.setattr(module, "COLUMNS", columns)


def test_inference(folder, small_sizes, clock):
    """On a stand-in for Moment-DETR, whose operations can be counted by hand."""
    (folder / "checkout" / "moment_detr").mkdir()
    (folder / "checkout" / "moment_detr" / "model.py").write_text(MOMENT_DETR)
    (folder / "checkout" / "moment_detr" / "criterion.py").write_text(CRITERION)
    arguments = ["--part", "inference", "--repeats", "1", "--output", "measured.json"]

    run(*arguments, "--sizes", "published")
    (ours,) = json.loads((folder / "measured.json").read_text())["table"]
    assert ours["model"] == "ours, published" and ours["parameters"].endswith(" M")

    # A turn: Moment-DETR's four columns, then ours, then the matrices
    clock(0, 0.1, 0, 0.02, 0, 0.02, 0, 0.06, 0, 0.3, 0, 0.03, 0, 0.02, 0, 0.09, 0, 1e-6)
    run(*arguments, "--sizes", "published", "--official", "checkout")
    measured = json.loads((folder / "measured.json").read_text())
    assert measured["data"] == "simulated (seed 0), 75 x 24 clips, 32 x 8 tokens"
    assert [row["model"] for row in measured["table"]] == [
        "Moment-DETR, published",
        "ours, published",
        "ours / Moment-DETR, published",
    ]
    theirs, ours, ratios = (list(row.values())[2:] for row in measured["table"])
    assert [cell.split()[0] for cell in theirs] == ["10.0", "20.0", "20.0", "60.0"]  # batch 1 is called ten times
    assert [cell.split()[0] for cell in ours] == ["30.0", "30.0", "20.0", "90.0"]
    assert ratios == ["3.00", "1.50", "1.00", "1.50"]

    flops = 2 * 32 * (75 * 26 + 32 * 8)  # per sample, of the two layers
    batches = {size: benchmark_inference.make_batch(DiffusionVMRConfig(**TINY), size, 0) for size in (1, 3)}
    theirs = benchmark_inference.official_contender("theirs", DiffusionVMRConfig(**TINY), "checkout")
    assert benchmark_inference.flops_of(lambda: theirs.retrieve(batches[3])) == 3 * flops
    assert benchmark_inference.flops_of(lambda: theirs.train(batches[1])) == 2 * flops  # and the weights' gradients

    pytest.importorskip("onnxscript")
    run(*arguments, "--sizes", "published", "--official", "checkout", "--variants", "bfloat16", "onnx")
    rows = {row.pop("model"): row for row in json.loads((folder / "measured.json").read_text())["table"]}
    assert list(rows) == [
        "Moment-DETR, published",
        "ours, published",
        "ours, published, bfloat16",
        "Moment-DETR, published, ONNX Runtime",
        "ours, published, ONNX Runtime",
        "ours / Moment-DETR, published",
        "ours / Moment-DETR, published, ONNX Runtime",
    ]
    assert all(rows["ours, published, bfloat16"].values())
    for name in list(rows)[3:5] + list(rows)[-1:]:  # exported for one query
        assert float(rows[name]["batch 1"]) > 0 and not any(list(rows[name].values())[2:])
    for name in [name for name in sys.modules if name.partition(".")[0] == "moment_detr"]:
        del sys.modules[name]


def test_profile(folder, small_sizes, clock):
    clock(0, 0.03, 0, 0.02, 0, 0.04)
    run("--part", "profile", "--sizes", "published", "--repeats", "1", "--output", "measured.json")
    table = json.loads((folder / "measured.json").read_text())["table"]
    query, batch, step = list(table[0])[1:]
    total = table.pop()
    assert [total[name] for name in (query, batch, step)] == ["3.0 ms", "20.0 ms", "40.0 ms"]
    for name in (query, batch, step):
        shares = {row["kind"]: float(row[name].rstrip("%")) for row in table}
        absent = {"optimizer", "loss and matching"} if name != step else set()
        assert sum(shares.values()) == pytest.approx(100, abs=1)
        assert {kind for kind, share in shares.items() if share == 0} <= absent


def test_backward_counts_with_the_forward_work():
    model = DiffusionVMRForMomentRetrieval(DiffusionVMRConfig(**TINY))
    layer = model.model.encoder.layers[0].feed_forward
    before = benchmark_profile.modeling_diffusionvmr.roi_align
    with benchmark_profile.marked(model), torch.profiler.profile() as profiler:
        (layer(torch.randn(3, 32)) @ torch.randn(32, 2)).sum().backward()
    kinds = defaultdict(set)
    for event, kind in benchmark_profile.kinds_of(profiler.events()):
        kinds[event.name].add(kind)
    assert kinds["aten::addmm"] == {"feed-forward"}
    assert kinds["AddmmBackward0"] == {"feed-forward"}
    assert kinds["MmBackward0"] == kinds["aten::sum"] - {"feed-forward"} == {"other operators"}
    assert benchmark_profile.modeling_diffusionvmr.roi_align is before and not layer._forward_hooks


def test_data(folder, monkeypatch):
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    arguments = ["--part", "data", "--videos", "12", "--samples", "8", "--repeats", "1", "--work_dir", str(folder)]
    result = benchmark_data.measure_data(benchmark.parse_arguments(arguments))
    monkeypatch.delenv("HF_DATASETS_CACHE")
    assert result["data"] == "simulated (seed 0)" and result["videos"] == 12
    assert result["MiB of Parquet"] > 0
    assert [line["what"] for line in result["table"]] == ["first opening", "second opening"]
    assert all(line["seconds"] > 0 and line["samples per second"] > 0 for line in result["table"])
    assert not list(folder.glob("tmp*"))  # the folder of gigabytes is removed
