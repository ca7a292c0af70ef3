"""`diffusionvmr train`, on small data."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

from modeling_diffusionvmr import DiffusionVMRTrainer, MomentRetrievalDataset
from modeling_diffusionvmr.cli import main
from modeling_diffusionvmr.cli import train as train_command
from modeling_diffusionvmr.data.features import write_features
from modeling_diffusionvmr.data.files import save_jsonl
from modeling_diffusionvmr.training import moment_quality
from modeling_diffusionvmr.training.checkpoints import LOCK, lock_training, write_manifest

SMALL = "--d_model 32 --encoder_layers 1 --decoder_layers 1 --encoder_ffn_dim 32 --decoder_ffn_dim 32 --roi_bins 4 "
SMALL += "--dynamic_size 4 --max_steps 4 --eval_steps 2 --save_steps 2 --logging_steps 1 --use_cpu --disable_tqdm "
SMALL += "--per_device_train_batch_size 4 --dataloader_pin_memory false"
ONE_STEP = "--max_steps 1 --use_cpu --disable_tqdm"  # for a checkpoint, whose sizes stay


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Features of two backbones and of sentences, and annotations to train and to evaluate on."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, first in (("train", 0), ("val", 12)):
        rows = []
        for qid in range(first, first + 12):
            vid = f"v{qid // 2}"
            row = {"qid": qid, "query": f"sentence {qid}", "vid": vid, "duration": 30}
            rows.append({**row, "relevant_windows": [[4, 10 + qid % 5]]})
            write_features(folder / "text", qid, rng.normal(size=(5, 6)), "last_hidden_state")
            for name, size in (("slowfast", 8), ("clip", 4)):
                write_features(folder / name, vid, rng.normal(size=(15, size)))
        save_jsonl(rows, folder / f"{split}.jsonl")
    return folder


def run_train(data, output, *arguments, small=SMALL, evaluate=True, video=("slowfast", "clip")) -> Path:
    """Run the command on the data of `folder` and return its output folder."""
    command = ["--annotations", data / "train.jsonl", "--text_features", data / "text"]
    command += ["--video_features", *(data / name for name in video), "--output_dir", output]
    command += ["--eval_annotations", data / "val.jsonl"] if evaluate else []
    main(["train", *map(str, command), *small.split(), *map(str, arguments)])
    return output


@pytest.fixture
def train(folder, tmp_path):
    """Run the command and return its output folder, which is in `tmp_path`."""

    def run(*arguments, output="out", **options) -> Path:
        return run_train(folder, tmp_path / output, *arguments, **options)

    return run


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory) -> Path:
    """The output folder of a training without other flags."""
    return run_train(folder, tmp_path_factory.mktemp("trained") / "out")


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    """A copy of it, where `train` and `fail` write."""
    return shutil.copytree(trained, tmp_path / "out")


@pytest.fixture
def fail(train, capsys):
    """Run the command with bad input and return the one line that it prints."""

    def run(*arguments, **options) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            train(*arguments, **options)
        if isinstance(end.value.code, str):  # Python itself prints it when the process ends
            error = end.value.code
        else:
            assert end.value.code == 2
            error = capsys.readouterr().err.removesuffix("\n")
        assert error.startswith("error: ") and "\n" not in error
        return error

    return run


def test_from_nothing(train, capsys):
    output = train()
    model, processor = AutoModel.from_pretrained(output), AutoProcessor.from_pretrained(output)
    assert (model.config.video_feature_size, model.config.text_feature_size) == (12, 6)
    assert model.config.dropout == 0.1 and model.config.d_model == 32  # of the preset, and of the flags
    assert processor.video_feature_sizes == [8, 4] and processor.round_to is None
    printed = capsys.readouterr().out
    assert model.config.backbones == [  # the features do not say what computed them
        {"name": "slowfast", "feature_size": 8},
        {"name": "clip", "feature_size": 4},
        {"name": "text", "text_feature_size": 6},
    ]
    metrics = json.loads(printed[printed.rindex("\n{\n") :])
    assert "eval_MR-full-mAP" in metrics and "eval_MR-mIoU" in metrics
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    best = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())["best_model_checkpoint"]
    saved = load_file(output / "model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in load_file(f"{best}/model.safetensors").items())


def test_windows_of_long_videos(train, monkeypatch):
    planned, plan = [], MomentRetrievalDataset._plan_windows
    monkeypatch.setattr(MomentRetrievalDataset, "_plan_windows", lambda self: planned.append(plan(self)) or planned[-1])
    train("--windows", "--max_clips", 10, small=SMALL.replace("max_steps 4", "max_steps 1"))  # of 15 clips
    training, evaluation = planned
    assert all(len(windows) > 1 for windows in [*training.values(), *evaluation.values()])


def test_moments_for_people_are_chosen(train, monkeypatch):
    chosen = {"threshold": 0.4, "nms_threshold": 0.3, "top_k": 2}
    monkeypatch.setattr(moment_quality, "choose_post_processing", lambda rows: chosen)
    processor = AutoProcessor.from_pretrained(train(output="few"))  # twelve sentences are too few
    assert (processor.threshold, processor.nms_threshold, processor.top_k) == (0.0, 0.5, 5)
    monkeypatch.setattr(moment_quality, "MIN_SENTENCES", 12)
    processor = AutoProcessor.from_pretrained(train("--top_k", "null", output="enough"))  # a flag takes precedence
    assert (processor.threshold, processor.nms_threshold, processor.top_k) == (0.4, 0.3, None)


def test_resume_ends_with_the_same_weights(trained, copied, train, fail, capsys):
    whole = load_file(trained / "model.safetensors")
    shutil.rmtree(copied / "checkpoint-4")
    (copied / "model.safetensors").unlink()
    resumed = load_file(train("--resume") / "model.safetensors")
    assert capsys.readouterr().out.count("'loss': ") == 2  # steps 3 and 4
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    assert "out: not empty; use --resume to continue the training in it" in fail()
    (copied.parent / "file").touch()
    assert "file is a file, not a folder" in fail(output="file")


def test_a_folder_in_which_another_training_runs(train, fail, tmp_path, monkeypatch):
    """It is refused before the data are loaded. What a killed training left is no obstacle."""
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(train_command, "load_rows", None)
    with lock_training(tmp_path / "out"):
        for arguments in ((), ("--resume",)):
            assert fail(*arguments) == f"error: {tmp_path}/out: another training is writing to this folder"
    monkeypatch.undo()
    (tmp_path / "out" / LOCK).touch()
    assert not (train(small=SMALL.replace("max_steps 4", "max_steps 1")) / LOCK).exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_resume_with_states_of_something_else(copied, fail, name):
    """They are valid files with right digests."""
    checkpoint = copied / "checkpoint-4"
    torch.save({"weights": torch.zeros(3)}, checkpoint / name)
    write_manifest(checkpoint)
    assert f"checkpoint-4: cannot resume from it: {name[:9]}" in fail("--resume")


def test_fine_tuning_on_other_features(trained, train, capsys):
    second = train("--model", trained, video=("clip",), small=f"{ONE_STEP} --dropout 0", evaluate=False)
    printed = capsys.readouterr().out
    assert "feature sizes 4 (video) and 6 (text) instead of 12 and 6: the input layers are newly" in printed
    (line,) = [line for line in printed.splitlines() if line.startswith(f"newly initialized (not in {trained}): ")]
    config = AutoModel.from_pretrained(second).config
    assert (config.video_feature_size, config.d_model, config.dropout) == (4, 32, 0)
    # Only what reads the video is new
    old, new = load_file(trained / "model.safetensors"), load_file(second / "model.safetensors")
    changed = [name for name in new if new[name].shape != old[name].shape]
    assert changed and all(name in line for name in changed)
    assert len(line.split(": ")[1].split(", ")) == len(changed)


def test_fine_tuning_keeps_the_settings_of_the_processor(train):
    own = "--round_to 0.5 --threshold 0.1 --top_k 9 --nms_threshold 0.7 --max_clips 12 --max_tokens 4"
    first = train(*own.split(), small=SMALL.replace("max_steps 4", "max_steps 1"), evaluate=False)

    def settings(output):
        processor = AutoProcessor.from_pretrained(output)
        names = "round_to threshold top_k nms_threshold max_clips max_tokens".split()
        return [getattr(processor, name) for name in names], processor.video_feature_sizes

    one = {"small": ONE_STEP, "evaluate": False}
    kept = train("--model", first, **one, video=("clip",), output="kept")
    assert settings(kept) == ([0.5, 0.0, 9, 0.7, 12, 4], [4])  # the threshold was for other features
    flags = train("--model", first, "--top_k", "null", "--max_clips", 13, **one, output="flags")
    assert settings(flags) == ([0.5, 0.1, None, 0.7, 13, 4], [8, 4])
    assert AutoModel.from_pretrained(flags).config.max_clips == 13
    preset = train("--model", first, "--preset", "charades_sta", **one, output="preset")
    assert settings(preset) == ([None, 0.1, 9, 0.7, 12, 4], [8, 4])
    (first / "processor_config.json").unlink()
    alone = train("--model", first, **one, output="alone")
    assert settings(alone) == ([None, 0.0, 5, 0.5, 12, 4], [8, 4])


def test_fine_tuning_a_checkpoint_in_bfloat16(trained, train, tmp_path):
    """It is trained in float32, since a step of 1e-4 is lost in bfloat16."""
    first = tmp_path / "first"
    AutoModel.from_pretrained(trained, dtype=torch.bfloat16).save_pretrained(first)
    assert load_file(first / "model.safetensors")["model.video_projection.2.weight"].dtype == torch.bfloat16
    second = train("--model", first, small=ONE_STEP, evaluate=False)
    assert {tensor.dtype for tensor in load_file(second / "model.safetensors").values()} == {torch.float32}


def test_validation_rows_are_held_out(train, capsys):
    train("--hold_out", "0.3", evaluate=False)
    printed = capsys.readouterr().out
    assert "30% of the training videos are held out to choose the best checkpoint: 4 queries" in printed
    assert "eval_MR-full-mAP" in printed


@pytest.mark.parametrize("share", ["inf", "nan", "1", "-1"])
def test_impossible_shares_to_hold_out(fail, share):
    assert f"cannot hold out a share of {float(share)} of 6 videos" in fail("--hold_out", share, evaluate=False)


def test_one_of_several_processes_prints_the_metrics(train, capsys, monkeypatch):
    monkeypatch.setattr(DiffusionVMRTrainer, "is_world_process_zero", lambda trainer: False)
    train()
    printed = capsys.readouterr()
    assert "\n{\n" not in printed.out and "saved " not in printed.err


def test_without_validation_rows(train, capsys):
    output = train(evaluate=False)
    assert "nothing is evaluated" in capsys.readouterr().out
    assert (output / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learnin_rate", 1], "unknown flag --learnin_rate; did you mean --learning_rate?"),
        (["--learning_rate", "abc"], "argument --learning_rate/--learning-rate: invalid float value: 'abc'"),
        (["--encoder_layers", "1.5"], "argument --encoder_layers: invalid int value: '1.5'"),
        (["--d_model", 33], "`encoder_attention_heads` must divide d_model=33, got 8"),
        (["--nms_threshold", "2"], "`nms_threshold`"),
        (["--proposal_growth", 2], "training arguments: `proposal_growth` must be a number in (0, 1], got 2.0"),
        (["--eval_strategy", "epoch"], "training arguments: --load_best_model_at_end requires"),
        (["--lr_scheduler_kwargs", "{"], "training arguments: Expecting property name"),
        (["--gradient_accumulation_steps", 0], "`gradient_accumulation_steps` must be a number above 0, got 0"),
        (["--eval_accumulation_steps", 0], "`eval_accumulation_steps` must be a number above 0, got 0"),
        (["--num_train_epochs", "inf"], "training arguments: `num_train_epochs` must be a finite number, got inf"),
        (["--weight_decay", "nan"], "training arguments: `weight_decay` must be a finite number, got nan"),
        (
            ["--max_steps", -5, "--num_train_epochs", 0],
            "training arguments: `num_train_epochs` must be a number above 0",
        ),
        (["--max_steps", 0], "training arguments: `max_steps` must be a number above 0, or -1 to train for"),
        (["--report_to", "clearml"], "training arguments: `report_to`: clearml is not installed"),
        (["--report_to", "paper"], "training arguments: `report_to` must be none, all or some of azure_ml, comet_ml,"),
        (["--torch_compile_mode", "foo"], "training arguments: `torch_compile_backend` or `torch_compile_mode`: Unrec"),
        (["--lr_scheduler_kwargs", '{"foo": 1}'], "`lr_scheduler_type` and `lr_scheduler_kwargs` do not fit (get_cos"),
        (
            ["--lr_scheduler_type", "warmup_stable_decay"],
            "do not fit (get_wsd_schedule() missing 1 required positional",
        ),
        (["--lr_scheduler_kwargs", "3"], "`lr_scheduler_type` and `lr_scheduler_kwargs` do not fit ("),
        (["--preset", "tacoz"], "tacoz: not a preset"),
        (["--model", "/nowhere/at/all"], "/nowhere/at/all: not a local folder or a valid Hub id"),
        (["--output_dir", ""], "the following arguments are required: --output_dir"),
    ],
)
def test_bad_arguments(fail, tmp_path, arguments, message):
    assert message in fail(*arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can train in bfloat16")
def test_bfloat16_without_a_gpu(fail, tmp_path):
    assert "use_cpu" in fail("--bf16", small=SMALL.replace("--use_cpu ", ""))
    assert not (tmp_path / "out").exists()


def test_resume_with_other_settings(copied, fail):
    error = fail("--resume", small=SMALL.replace("--d_model 32", "--d_model 64"))
    assert "out/checkpoint-4: `" in error and "resume with the same settings and features" in error
    error = fail("--resume", video=("clip",))
    assert "resume with the same settings and features" in error


def test_checkpoints_that_cannot_be_loaded(fail, tmp_path):
    for content in ("[1]", "{", '{"model_type": "diffusionvmr", "d_model": "x"}'):
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / "config.json").write_text(content)
        assert str(tmp_path / "model") in fail("--model", tmp_path / "model")
    assert not (tmp_path / "out").exists()


def test_metric_that_is_not_computed(fail):
    assert "'eval_nosuch'" in fail("--metric_for_best_model", "nosuch")


def test_nothing_to_score(fail, folder, tmp_path):
    rows = [json.loads(line) for line in (folder / "val.jsonl").read_text().splitlines()]
    lines = [json.dumps({**row, "relevant_windows": []}) for row in rows]
    (tmp_path / "absent.jsonl").write_text("\n".join(lines))
    error = fail("--eval_annotations", tmp_path / "absent.jsonl")
    assert f"none of the {len(rows)} rows" in error and "`metric_for_best_model` (MR-full-mAP)" in error
    assert not (tmp_path / "out").exists()


def test_evaluation_features_of_another_size(fail, folder, tmp_path):
    error = fail("--eval_video_features", folder / "clip", folder / "slowfast")
    assert "feature sizes differ: 8 + 4 (video) and 6 (text) for training, 4 + 8 (video)" in error
    assert not (tmp_path / "out").exists()
