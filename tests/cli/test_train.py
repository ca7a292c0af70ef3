"""`scripts/train.py`, in small."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

from modeling_diffusionvmr.data.features import write_features
from modeling_diffusionvmr.data.files import save_jsonl

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train.py"
SMALL = "--d_model 32 --encoder_layers 1 --decoder_layers 1 --encoder_ffn_dim 32 --decoder_ffn_dim 32 --roi_bins 4 "
SMALL += "--dynamic_size 4 --max_steps 4 --eval_steps 2 --save_steps 2 --logging_steps 1 --use_cpu --disable_tqdm "
SMALL += "--per_device_train_batch_size 4 --dataloader_pin_memory false"


@pytest.fixture(scope="module")
def script():
    specification = importlib.util.spec_from_file_location("train_script", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Features of two backbones and of sentences, and annotations to train and to evaluate on."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, first in (("train", 0), ("val", 12)):
        rows = []
        for qid in range(first, first + 12):
            vid = f"v{qid // 2}"
            row = {"qid": qid, "query": f"sentence {qid}", "vid": vid, "duration": 30}
            rows.append({**row, "relevant_windows": [[4, 10 + qid % 5]]})
            write_features(folder / "text", qid, random.normal(size=(5, 6)), "last_hidden_state")
            for name, size in (("slowfast", 8), ("clip", 4)):
                write_features(folder / name, vid, random.normal(size=(15, size)))
        save_jsonl(rows, folder / f"{split}.jsonl")
    return folder


@pytest.fixture
def train(script, folder, tmp_path):
    """Runs the command; gives its output folder."""

    def run(*arguments, small=SMALL, evaluate=True, video=("slowfast", "clip"), output="out") -> Path:
        command = ["--annotations", folder / "train.jsonl", "--text_features", folder / "text"]
        command += ["--video_features", *(folder / name for name in video), "--output_dir", tmp_path / output]
        command += ["--eval_annotations", folder / "val.jsonl"] if evaluate else []
        command = [str(argument) for argument in (*command, *arguments)] + small.split()
        script.main(script.parse_arguments(command))
        return tmp_path / output

    return run


def test_from_nothing(train, capsys):
    output = train()
    model, processor = AutoModel.from_pretrained(output), AutoProcessor.from_pretrained(output)
    assert (model.config.video_feature_size, model.config.text_feature_size) == (12, 6)
    assert model.config.dropout == 0.1 and model.config.d_model == 32  # of the preset, and of the flags
    assert processor.video_feature_sizes == [8, 4] and processor.round_to == 2.0
    printed = capsys.readouterr().out
    assert "features of 8 + 4 and 6 numbers instead of 2816 and 512: the first layers are new" in printed
    metrics = json.loads(printed[printed.rindex("\n{\n") :])
    assert "eval_MR-full-mAP" in metrics and "eval_MR-mIoU" in metrics
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    best = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())["best_model_checkpoint"]
    saved = load_file(output / "model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in load_file(f"{best}/model.safetensors").items())


def test_resume_ends_with_the_same_weights(train):
    whole = load_file(train(output="whole") / "model.safetensors")
    output = train(output="stopped")
    for name in ("checkpoint-4", "model.safetensors"):
        path = output / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    resumed = load_file(train("--resume", output="stopped") / "model.safetensors")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    with pytest.raises(ValueError, match="stopped: is not empty; --resume"):
        train(output="stopped")


def test_fine_tuning_on_other_features(train, capsys):
    first = train()
    capsys.readouterr()
    second = train(
        "--model", first, video=("clip",), output="second", small="--max_steps 1 --use_cpu --disable_tqdm --dropout 0"
    )
    printed = capsys.readouterr().out
    assert "features of 4 and 6 numbers instead of 12 and 6" in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("new, and not from")]
    config = AutoModel.from_pretrained(second).config
    assert (config.video_feature_size, config.d_model, config.dropout) == (4, 32, 0)
    # Only what reads the video is new
    old, new = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    changed = [name for name in new if new[name].shape != old[name].shape]
    assert changed and all(name in line for name in changed)
    assert len(line.split(": ")[1].split(", ")) == len(changed)


def test_validation_rows_are_held_out(train, capsys):
    train("--hold_out", "0.3", evaluate=False)
    printed = capsys.readouterr().out
    assert "30% of the training videos are held out to choose checkpoints: 4 queries" in printed
    assert "eval_MR-full-mAP" in printed


def test_without_validation_rows(train, capsys):
    output = train(evaluate=False)
    assert "nothing is evaluated" in capsys.readouterr().out
    assert (output / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learnin_rate", 1], "no field 'learnin_rate'; is it 'learning_rate'"),
        (["--preset", "tacoz"], "tacoz: neither a preset"),
        (["--model", "/nowhere/at/all"], "/nowhere/at/all: there is no such folder"),
    ],
)
def test_bad_arguments(train, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        train(*arguments)
    assert not (tmp_path / "out").exists()
