"""`scripts/gpu_check.sh`, on a CPU with a tiny configuration."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gpu_check
from benchmark_samples import simulate_truth
from modeling_diffusionvmr import DiffusionVMRForMomentRetrieval
from modeling_diffusionvmr.data.files import save_jsonl

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "gpu_check.sh"


HIDE_MODULES = """
from importlib.machinery import PathFinder

HIDDEN = {"av", "datasets", "evaluate", "h5py", "matplotlib", "pandas", "PIL", "pyarrow", "sklearn", "torchvision"}
find_spec = PathFinder.find_spec
PathFinder.find_spec = staticmethod(
    lambda name, *args: None if name.partition(".")[0] in HIDDEN else find_spec(name, *args)
)
"""


def table_of(printed: str) -> dict[str, str]:
    """The printed table, which comes last: values by what they are of."""
    lines = printed[printed.index("| what") :].splitlines()
    return dict([cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:])


@pytest.fixture(scope="module")
def annotations(tmp_path_factory):
    """A folder with the names of QVHighlights' files."""
    folder = tmp_path_factory.mktemp("annotations")
    for seed, (name, count) in enumerate({gpu_check.TRAIN_FILE: 40, gpu_check.VAL_FILE: 10}.items()):
        rows = [{**row, "vid": f"{name}_{row['vid']}"} for row in simulate_truth(seed, count)]
        save_jsonl(({**row, "qid": 1000 * seed + row["qid"]} for row in rows), folder / name)
    return folder


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> dict[str, str]:
    """An environment without a GPU and without packages that an ordinary CUDA image lacks."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "sitecustomize.py").write_text(HIDE_MODULES)
    return {**os.environ, "PYTHONPATH": str(folder), "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}


def test_tiny(tmp_path, bare):
    done = subprocess.run(
        [SCRIPT, "--tiny", "--output_dir", tmp_path], capture_output=True, text=True, env=bare, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    table = table_of(done.stdout)
    assert table["device"].startswith("CPU")
    # Here the device is the CPU itself
    losses = table["training step, loss on CPU and device"].split(", ")
    assert losses[0] == losses[1] and float(losses[0]) > 0
    for what in (
        "training step, relative difference of gradients",
        "sampling, largest difference of spans",
        "training resumed from a checkpoint of the device, relative difference of weights",
        "training resumed from a checkpoint of the CPU, relative difference of weights",
    ):
        assert float(table[what]) == 0
    for size in (1, 2):
        for dtype in ("float32", "bfloat16"):
            assert table[f"inference, batch {size}, {dtype}, eager"].endswith(" ms")
    assert 0 < float(table["epochs"].split()[0]) < gpu_check.EPOCHS_OF_THE_PAPER
    assert "made-up" in " ".join(table)
    DiffusionVMRForMomentRetrieval.from_pretrained(tmp_path)


def test_simulated_features_of_annotations(annotations, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "PARTS", (gpu_check.train_for_a_while,))
    monkeypatch.setattr(gpu_check.os, "cpu_count", lambda: 1)  # a process less to start
    gpu_check.main(gpu_check.parse_arguments([str(annotations), "--tiny", "--output_dir", str(tmp_path)]))
    table = table_of(capsys.readouterr().out)
    assert "training with Trainer, simulated features of QVHighlights" in table
    assert table["evaluation of 10 queries"].endswith(" s")
    assert json.loads((tmp_path / "config.json").read_text())["video_feature_size"] == 24


def test_time_limit(monkeypatch):
    """The number of proposals grows with the time, and the mean step has as many of each."""
    limit, control = gpu_check.TimeLimit(10.0, 3), SimpleNamespace(should_training_stop=False)
    clock, numbers = SimpleNamespace(now=100.0), []
    monkeypatch.setattr(gpu_check, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    while not control.should_training_stop:
        clock.now += limit.num_proposals  # seconds per step
        numbers.append(limit.num_proposals)
        limit.on_step_end(None, None, control)
    assert numbers == [1, 1, 1, 1, 1, 2, 2, 3]  # the first one warms up
    assert limit.elapsed == 11 and limit.num_steps == 7 and limit.seconds_per_step() == 2


def test_faults_are_reported_and_compilation_needs_time():
    plan = gpu_check.tiny_plan(device=torch.device("cpu"), annotations=None, output_dir=Path("unused"))

    def broken(model, batch):
        raise KeyError("a compiler's error")

    values = {row["what"]: row["value"] for row in gpu_check.time_ways(plan, {"broken": broken})}
    assert values["inference, batch 2, float32, broken"] == 'failed: KeyError: "a compiler\'s error"'
    late = replace(plan, started=plan.started - gpu_check.TOTAL_SECONDS + gpu_check.COMPILE_SECONDS - 1)
    values = {row["value"] for row in gpu_check.time_ways(late, {"torch.compile": gpu_check.compiled})}
    assert values == {"skipped: no time left"}


def test_missing_annotations(tmp_path):
    with pytest.raises(FileNotFoundError, match="highlight_train_release.jsonl: no such file"):
        gpu_check.main(gpu_check.parse_arguments([str(tmp_path), "--tiny"]))
