import dataclasses

import pytest
from transformers import TrainingArguments

from modeling_diffusionvmr import DiffusionVMRConfig, DiffusionVMRForMomentRetrieval, DiffusionVMRProcessor
from modeling_diffusionvmr.training.presets import FIELDS, PRESETS, load_preset, override

# What Trainer would fill in by itself, and the paper and Moment-DETR do otherwise
EXPLICIT = ("learning_rate", "weight_decay", "num_train_epochs", "per_device_train_batch_size", "lr_scheduler_type")
EXPLICIT += ("max_grad_norm", "warmup_steps", "optim", "adam_beta1", "adam_beta2", "adam_epsilon")


def test_there_is_one_for_each_setting_of_the_paper():
    assert PRESETS == ["charades_sta", "charades_sta_vgg", "qvhighlights", "qvhighlights_small", "tacos"]


@pytest.mark.parametrize(
    ("name", "sizes", "text_size", "metric"),
    [
        ("qvhighlights", [2304, 512], 512, "MR-full-mAP"),
        ("charades_sta", [2304, 512], 512, "MR-full-R1@0.5"),
        ("charades_sta_vgg", [4096], 300, "MR-full-R1@0.5"),
        ("tacos", [4096], 300, "MR-full-R1@0.5"),
    ],
)
def test_preset(name, sizes, text_size, metric, tmp_path):
    preset = load_preset(name)
    config = DiffusionVMRConfig(**preset["config"])
    assert [backbone["feature_size"] for backbone in config.backbones if "feature_size" in backbone] == sizes
    assert (config.video_feature_size, config.text_feature_size) == (sum(sizes), text_size)
    # Section 4.1
    assert (config.d_model, config.encoder_layers, config.decoder_layers) == (512, 6, 6)
    assert (config.max_clips, config.max_tokens, config.num_diffusion_steps) == (75, 32, 1000)
    assert (config.l1_loss_coefficient, config.iou_loss_coefficient, config.class_loss_coefficient) == (10, 2, 4)
    assert (config.hinge_loss_coefficient, config.contrastive_loss_coefficient) == (1, 1)
    assert (config.max_training_proposals, config.num_sampling_steps) == (20, 1)
    assert preset["trainer"] == {"proposal_schedule": "progress", "proposal_growth": 1}

    arguments = TrainingArguments(str(tmp_path), **preset["training"])
    assert (arguments.learning_rate, arguments.weight_decay, arguments.num_train_epochs) == (1e-4, 1e-4, 400)
    assert (arguments.per_device_train_batch_size, arguments.max_grad_norm) == (32, 0.1)
    assert arguments.lr_scheduler_type == "constant" and arguments.optim == "adamw_torch"
    assert arguments.load_best_model_at_end and arguments.metric_for_best_model == metric
    assert set(EXPLICIT) <= set(preset["training"])

    processor = DiffusionVMRProcessor(**preset["processor"])
    assert processor.round_to == (2.0 if name == "qvhighlights" else None)
    assert ("hold_out" in preset["data"]) == name.startswith("charades_sta")


def test_small_preset_is_the_recipe_in_small():
    """No term of the loss, nothing of the diffusion, and nothing of the schedule of proposals differs."""
    small, whole = load_preset("qvhighlights_small"), load_preset("qvhighlights")
    changed = {
        (section, field)
        for section in FIELDS
        for field, value in small[section].items()
        if whole[section].get(field) != value
    }
    sizes = ("d_model", "encoder_layers", "decoder_layers", "encoder_ffn_dim", "decoder_ffn_dim", "video_feature_size")
    sizes += ("text_feature_size", "backbones", "dropout", "input_dropout")
    training = ("max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "eval_steps", "save_steps")
    assert changed == {*(("config", field) for field in sizes), *(("training", field) for field in training)}
    DiffusionVMRForMomentRetrieval(DiffusionVMRConfig(**small["config"]))


def test_presets_repeat_nothing_of_what_they_extend():
    for name in PRESETS:
        preset = load_preset(name)
        assert list(preset) == list(FIELDS)
        assert preset["training"].keys() - {"max_steps"} == load_preset("qvhighlights")["training"].keys()


def test_file_that_extends(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: tacos\nconfig:\n  d_model: 64\ntraining:\n  save_strategy: no\n  learning_rate: 5e-4\n")
    tacos, mine = load_preset("tacos"), load_preset(path)
    assert mine["config"] == {**tacos["config"], "d_model": 64}
    assert mine["training"] == {**tacos["training"], "save_strategy": "no", "learning_rate": 0.0005}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("config:\n  d_modell: 3\n", r"mine\.yaml: `config` has no field 'd_modell'; is it 'd_model'\?"),
        ("trainng:\n  seed: 3\n", r"mine\.yaml: there is no section 'trainng'; is it 'training'\?"),
        ("- 1\n", r"mine\.yaml: must hold sections"),
        ("config: 1\n", r"mine\.yaml: must hold sections"),
        ("", r"mine\.yaml: must hold sections"),
        ("config: {\n", r"mine\.yaml: not YAML"),
        ("extends: nobody\n", r"nobody: neither a preset \(charades_sta, .*\) nor a file"),
    ],
)
def test_file_that_is_none(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_preset(path)
    assert "\n" not in str(error.value)


def test_flags():
    before = load_preset("qvhighlights")
    flags = ["--learning_rate", "5e-4", "--bf16", "--max_clips=50", "--round_to", "null", "--lr_scheduler_type=cosine"]
    flags += [
        "--proposal_schedule",
        "stable",
        "--hold_out",
        "0.1",
        "--eval_strategy",
        "no",
        "--use_cpu=false",
        "--video_feature_sizes",
        "3",
        "4",
    ]
    after = override(before, flags)
    assert after["training"] == {
        **before["training"],
        "learning_rate": 5e-4,
        "bf16": True,
        "lr_scheduler_type": "cosine",
        "use_cpu": False,
        "eval_strategy": "no",
    }
    assert after["config"] == {**before["config"], "max_clips": 50}  # the processor's, too
    assert after["processor"] == {"round_to": None, "max_clips": 50, "video_feature_sizes": [3, 4]}
    assert after["trainer"] == {"proposal_schedule": "stable", "proposal_growth": 1}
    assert after["data"] == {"hold_out": 0.1}
    assert before == load_preset("qvhighlights")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learnin_rate", "1"], "there is no field 'learnin_rate'; is it 'learning_rate'"),
        (["5"], "'5' belongs to no flag"),
        (["--seed", "{"], "--seed: not YAML"),
        (["--output_dir", "x"], "'output_dir'"),
    ],
)
def test_flags_that_are_none(flags, message):
    with pytest.raises(ValueError, match=message):
        override(load_preset("tacos"), flags)


def test_every_field_is_known():
    assert set(FIELDS["training"]) == {field.name for field in dataclasses.fields(TrainingArguments)} - {"output_dir"}
    assert {"d_model", "backbones", "roi_bins"} <= set(FIELDS["config"])
    assert {"video_feature_sizes", "nms_threshold"} <= set(FIELDS["processor"])
