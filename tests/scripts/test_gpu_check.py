"""`scripts/gpu_check.sh`, on a CPU with a tiny configuration."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gpu_check
from benchmark_samples import simulate_truth
from modeling_diffusionvmr import DiffusionVMRForMomentRetrieval
from modeling_diffusionvmr.data.files import save_jsonl

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "gpu_check.sh"


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


def test_shell_script():
    command = [SCRIPT, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable})
    assert done.returncode == 0 and "ANNOTATIONS_DIR" in done.stdout


def test_tiny(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    gpu_check.main(gpu_check.parse_arguments(["--tiny", "--output_dir", str(tmp_path)]))
    table = table_of(capsys.readouterr().out)
    assert table["device"].startswith("CPU")
    # Here the device is the CPU itself
    losses = table["training step, loss on CPU and device"].split(", ")
    assert losses[0] == losses[1] and float(losses[0]) > 0
    for what in (
        "training step, relative difference of gradients",
        "sampling, largest difference of spans",
        "resumed training, largest difference of weights",
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


def test_missing_annotations(tmp_path):
    with pytest.raises(FileNotFoundError, match="highlight_train_release.jsonl: no such file"):
        gpu_check.main(gpu_check.parse_arguments([str(tmp_path), "--tiny"]))
