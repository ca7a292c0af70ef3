import dataclasses
import re

import pytest

from modeling_diffusionvmr import (
    DiffusionVMRConfig,
    DiffusionVMRForMomentRetrieval,
    DiffusionVMRProcessor,
    DiffusionVMRTrainingArguments,
)
from modeling_diffusionvmr.cli.settings import NO_FLAGS, SettingsParser
from modeling_diffusionvmr.training.presets import PRESETS, SECTIONS, load_preset
from test_configuration import DEFAULTS

# Settings for which `Trainer` has another default than the paper and Moment-DETR
EXPLICIT = ("learning_rate", "weight_decay", "num_train_epochs", "per_device_train_batch_size", "lr_scheduler_type")
EXPLICIT += ("max_grad_norm", "warmup_steps", "optim", "adam_beta1", "adam_beta2", "adam_epsilon")


# What the benchmarks' presets resolve to. They share settings with the neutral preset, which must not change them
QVHIGHLIGHTS = {
    "config": {
        **{name: value for name, value in DEFAULTS.items() if name != "signal_scale"},
        "backbones": [
            {"name": "slowfast", "feature_size": 2304, "clip_seconds": 2.0},
            {
                "name": "clip",
                "id": "openai/clip-vit-base-patch32",
                "feature_size": 512,
                "text_feature_size": 512,
                "clip_seconds": 2.0,
            },
        ],
    },
    "processor": {"round_to": 2.0},
    "training": {
        "num_train_epochs": 400,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 100,
        "optim": "adamw_torch",
        "learning_rate": 0.0001,
        "weight_decay": 0.0001,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-08,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "max_grad_norm": 0.1,
        "gradient_accumulation_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 0.02,
        "save_strategy": "steps",
        "save_steps": 0.02,
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "MR-full-mAP",
        "greater_is_better": True,
        "logging_steps": 50,
        "report_to": "none",
        "proposal_schedule": "progress",
        "proposal_growth": 1.0,
    },
    "data": {},
}
WORD_VECTORS = {"name": "glove", "text_feature_size": 300}
CHARADES_STA = {
    "processor": {"round_to": None},
    "training": {"metric_for_best_model": "MR-full-R1@0.5"},
    "data": {"hold_out": 0.05},
}
CHANGES = {
    "qvhighlights": {},
    "qvhighlights_clip": {
        "config": {"video_feature_size": 512, "backbones": QVHIGHLIGHTS["config"]["backbones"][1:]},
    },
    "charades_sta": {
        **CHARADES_STA,
        "config": {"backbones": [{**entry, "clip_seconds": 1.0} for entry in QVHIGHLIGHTS["config"]["backbones"]]},
    },
    "charades_sta_vgg": {
        **CHARADES_STA,
        "config": {
            "video_feature_size": 4096,
            "text_feature_size": 300,
            "backbones": [{"name": "vgg", "feature_size": 4096}, WORD_VECTORS],
        },
    },
    "tacos": {
        **CHARADES_STA,
        "config": {
            "video_feature_size": 4096,
            "text_feature_size": 300,
            "backbones": [{"name": "c3d", "feature_size": 4096}, WORD_VECTORS],
        },
        "data": {},
    },
    "qvhighlights_small": {
        "config": {
            "d_model": 128,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": 512,
            "decoder_ffn_dim": 512,
            "dropout": 0.0,
            "input_dropout": 0.1,
            "video_feature_size": 128,
            "text_feature_size": 128,
            "backbones": [{"name": "clip", "feature_size": 128, "text_feature_size": 128, "clip_seconds": 2.0}],
        },
        "training": {
            "learning_rate": 0.0005,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 100,
            "eval_steps": 0.2,
            "save_steps": 0.2,
            "max_steps": 1500,
        },
    },
}


def parse(*argv: str):
    return SettingsParser("train", argv).parse_settings()


def test_there_is_one_for_own_data_and_for_each_setting_of_the_paper():
    paper = ["charades_sta", "charades_sta_vgg", "qvhighlights", "tacos"]
    assert PRESETS == sorted([*paper, "default", "qvhighlights_clip", "qvhighlights_small"])


@pytest.mark.parametrize("name", CHANGES)
def test_benchmarks_keep_their_settings(name):
    expected = {section: {**fields, **CHANGES[name].get(section, {})} for section, fields in QVHIGHLIGHTS.items()}
    assert load_preset(name) == expected


def test_own_data_gets_nothing_of_a_benchmark(tmp_path):
    settings = parse()
    assert settings.preset == "default" and settings.given == set()
    assert settings.processor == {} and settings.hold_out is None
    assert not {"backbones", "video_feature_size", "text_feature_size"} & settings.config.keys()
    assert DiffusionVMRProcessor(**settings.processor).round_to is None
    config = DiffusionVMRConfig(**settings.config)
    assert (config.d_model, config.encoder_layers, config.decoder_layers, config.backbones) == (128, 2, 2, None)
    arguments = DiffusionVMRTrainingArguments(str(tmp_path), **settings.training)
    assert (arguments.num_train_epochs, arguments.per_device_train_batch_size) == (100, 16)
    assert (arguments.learning_rate, arguments.lr_scheduler_type) == (5e-4, "cosine")
    assert arguments.get_warmup_steps(1000) == 50 and arguments.eval_steps == arguments.save_steps == 0.1
    assert (arguments.proposal_schedule, arguments.report_to) == ("stable", [])


@pytest.mark.parametrize(
    ("name", "sizes", "text_size", "metric"),
    [
        ("qvhighlights", [2304, 512], 512, "MR-full-mAP"),
        ("qvhighlights_clip", [512], 512, "MR-full-mAP"),
        ("charades_sta", [2304, 512], 512, "MR-full-R1@0.5"),
        ("charades_sta_vgg", [4096], 300, "MR-full-R1@0.5"),
        ("tacos", [4096], 300, "MR-full-R1@0.5"),
    ],
)
def test_preset(name, sizes, text_size, metric, tmp_path):
    settings = parse("--preset", name)
    assert settings.preset == name and settings.given == {"preset"}
    config = DiffusionVMRConfig(**settings.config)
    assert [backbone["feature_size"] for backbone in config.backbones if "feature_size" in backbone] == sizes
    assert (config.video_feature_size, config.text_feature_size) == (sum(sizes), text_size)
    # Section 4.1
    assert (config.d_model, config.encoder_layers, config.decoder_layers) == (512, 6, 6)
    assert (config.max_clips, config.max_tokens, config.num_diffusion_steps) == (75, 32, 1000)
    assert (config.l1_loss_coefficient, config.iou_loss_coefficient, config.class_loss_coefficient) == (10, 2, 4)
    assert (config.hinge_loss_coefficient, config.contrastive_loss_coefficient) == (1, 1)
    assert config.absent_loss_coefficient == 0  # not in the paper
    assert (config.max_training_proposals, config.num_sampling_steps) == (20, 1)

    arguments = DiffusionVMRTrainingArguments(str(tmp_path), **settings.training)
    assert (arguments.learning_rate, arguments.weight_decay, arguments.num_train_epochs) == (1e-4, 1e-4, 400)
    assert (arguments.per_device_train_batch_size, arguments.max_grad_norm) == (32, 0.1)
    assert arguments.lr_scheduler_type == "constant" and arguments.optim == "adamw_torch"
    assert arguments.load_best_model_at_end and arguments.metric_for_best_model == metric
    assert (arguments.proposal_schedule, arguments.proposal_growth) == ("progress", 1)
    assert set(EXPLICIT) <= set(settings.training)

    processor = DiffusionVMRProcessor(**settings.processor)
    assert processor.round_to == (2.0 if name.startswith("qvhighlights") else None)
    assert settings.hold_out == (0.05 if name.startswith("charades_sta") else None)


@pytest.mark.parametrize("name", PRESETS)
def test_without_flags_settings_are_those_of_the_preset(name):
    settings, preset = parse("--preset", name), load_preset(name)
    for section in ("config", "processor", "training"):
        assert getattr(settings, section) == preset[section]
    assert settings.hold_out == preset["data"].get("hold_out")


def test_small_preset_is_the_recipe_in_small():
    """The terms of the loss, the diffusion and the schedule of proposals are those of the paper."""
    small, whole = load_preset("qvhighlights_small"), load_preset("qvhighlights")
    changed = {
        (section, field): value
        for section in SECTIONS
        for field, value in small[section].items()
        if whole[section].get(field) != value
    }
    config = {"d_model": 128, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 512, "decoder_ffn_dim": 512}
    config |= {"dropout": 0.0, "input_dropout": 0.1, "video_feature_size": 128, "text_feature_size": 128}
    config["backbones"] = [{"name": "clip", "feature_size": 128, "text_feature_size": 128, "clip_seconds": 2.0}]
    training = {"max_steps": 1500, "learning_rate": 5e-4, "lr_scheduler_type": "cosine", "warmup_steps": 100}
    training |= {"eval_steps": 0.2, "save_steps": 0.2}
    assert changed == {("config", field): value for field, value in config.items()} | {
        ("training", field): value for field, value in training.items()
    }
    DiffusionVMRForMomentRetrieval(DiffusionVMRConfig(**small["config"]))


def test_presets_set_the_same_training_fields():
    for name in PRESETS:
        preset = load_preset(name)
        assert list(preset) == list(SECTIONS)
        assert preset["training"].keys() - {"max_steps"} == load_preset("qvhighlights")["training"].keys()


def test_file_that_extends(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: tacos\nconfig:\n  d_model: 64\ntraining:\n  save_strategy: no\n  learning_rate: 5e-4\n")
    tacos, mine = load_preset("tacos"), load_preset(path)
    assert mine["config"] == {**tacos["config"], "d_model": 64}
    assert mine["training"] == {**tacos["training"], "save_strategy": "no", "learning_rate": 0.0005}
    assert parse("--preset", str(path)).training == mine["training"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("config:\n  d_modell: 3\n", r"mine\.yaml: `config` has no field 'd_modell'; did you mean d_model\?"),
        ("trainng:\n  seed: 3\n", r"mine\.yaml: there is no section 'trainng'; did you mean training\?"),
        ("- 1\n", r"mine\.yaml: must contain sections"),
        ("config: 1\n", r"mine\.yaml: must contain sections"),
        ("", r"mine\.yaml: must contain sections"),
        ("config: {\n", r"mine\.yaml: not YAML"),
        ("data:\n  hold_out: 2001-02-30\n", r"mine\.yaml: not YAML"),
        ("config: " + "[" * 5000, r"mine\.yaml: not YAML"),
        ("extends: nobody\n", r"nobody: not a preset \(charades_sta, .*\) or a file"),
        ("extends: [tacos]\n", r"mine\.yaml: `extends` must be the name of a preset or file, got \['tacos'\]"),
        ("extends: {}/mine.yaml\n", r"mine\.yaml: extends itself"),
    ],
)
def test_file_that_cannot_be_used(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text.format(tmp_path) if "itself" in message else text)
    with pytest.raises(ValueError, match=message) as error:
        load_preset(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training:\n  learning_rate: abc\n", "`learning_rate` must be a number, got 'abc'"),
        ("training:\n  max_steps: 1.5\n", "`max_steps` must be a whole number, got 1.5"),
        ("training:\n  bf16: no\n", "`bf16` must be true or false, got 'no'"),
        ("training:\n  seed: null\n", "`seed` must be a whole number, got None"),
        ("config:\n  d_model: true\n", "`d_model` must be a whole number, got True"),
        ("processor:\n  round_to: [2]\n", "`round_to` must be a number or null, got [2]"),
        ("data:\n  hold_out: some\n", "`hold_out` must be a number or null, got 'some'"),
    ],
)
def test_file_with_a_value_of_another_type(tmp_path, capsys, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit):
        parse("--preset", str(path))
    assert capsys.readouterr().err.startswith(f"error: {path}: {message} (")


def test_flags():
    before = load_preset("default")
    flags = "--learning_rate 5e-4 --bf16 --max_clips=50 --round_to null --lr_scheduler_type=linear --disable_tqdm "
    flags += "--proposal_schedule progress --hold_out 0.1 --eval_strategy no --use_cpu=false --save_total_limit null "
    settings = parse(*flags.split())
    assert settings.training == {
        **before["training"],
        "learning_rate": 5e-4,
        "bf16": True,
        "lr_scheduler_type": "linear",
        "use_cpu": False,
        "eval_strategy": "no",
        "disable_tqdm": True,
        "save_total_limit": None,
        "proposal_schedule": "progress",
    }
    assert settings.config == {**before["config"], "max_clips": 50}  # also a field of the processor
    assert settings.processor == {"round_to": None, "max_clips": 50}
    assert settings.hold_out == 0.1
    assert settings.given == {re.sub("=.*", "", flag)[2:] for flag in flags.split() if flag.startswith("--")}
    assert before == load_preset("default")


def test_flag_with_the_value_of_the_preset_is_given():
    """A fine-tuning keeps the configuration of its checkpoint but for the flags that are given."""
    assert parse("--d_model", "128").given == {"d_model"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--learnin_rate 1", "unknown flag --learnin_rate; did you mean --learning_rate?"),
        ("--learnin_rate=1", "unknown flag --learnin_rate; did you mean --learning_rate?"),
        ("5", "unexpected value '5': no --flag before it"),
        ("--seed {", "argument --seed: invalid int value: '{'"),
        ("--bf16=maybe", "argument --bf16: "),
        ("--round_to two", "argument --round_to: invalid float value: 'two'"),
        ("--proposal_schedule fast", "invalid choice: 'fast' (choose from"),
        ("--video_feature_size 3", "unknown flag --video_feature_size"),
        ("--backbones clip", "unknown flag --backbones"),
        ("--preset", "argument --preset: expected one argument"),
    ],
)
def test_flags_that_cannot_be_used(capsys, flags, message):
    with pytest.raises(SystemExit) as error:
        parse(*flags.split())
    assert error.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and message in printed and printed.count("\n") == 1


def test_every_field_is_known():
    training = {field.name for field in dataclasses.fields(DiffusionVMRTrainingArguments)}
    assert set(SECTIONS["training"]) == training - {"output_dir"}
    assert {"d_model", "backbones", "roi_bins"} <= set(SECTIONS["config"])
    assert {"video_feature_sizes", "nms_threshold"} <= set(SECTIONS["processor"])


def test_help_lists_every_field_with_its_default(capsys):
    with pytest.raises(SystemExit):
        parse("--preset", "tacos", "--proposal_growth", "0.5", "--help")
    printed = " ".join(capsys.readouterr().out.split())
    for fields in SECTIONS.values():
        for field in fields:
            assert (f" --{field} " in printed or f" --{field}," in printed) == (field not in NO_FLAGS)
    assert re.search(r"--roi_bins ROI_BINS a whole number \(default: 16\)", printed)  # of the configuration
    assert re.search(r"--max_grad_norm [^(]*\(default: 0\.1\)", printed)  # of the preset
    assert re.search(r"--l1_loss_coefficient L1_LOSS_COEFFICIENT a number \(default: 10\)", printed)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"proposal_schedule": "fast"}, "`proposal_schedule` must be one of progress, stable, got 'fast'"),
        ({"proposal_growth": 0}, "`proposal_growth` must be a number in (0, 1], got 0"),
        ({"proposal_growth": 1.5}, "`proposal_growth` must be a number in (0, 1], got 1.5"),
        ({"proposal_growth": float("nan")}, "`proposal_growth` must be a number in (0, 1], got nan"),
        ({"max_steps": 0}, "`max_steps` must be a number above 0, or -1 to train for `num_train_epochs`, got 0"),
        ({"max_steps": -5}, "`max_steps` must be a number above 0, or -1 to train for `num_train_epochs`, got -5"),
        ({"num_train_epochs": 0}, "`num_train_epochs` must be a number above 0, got 0"),
        ({"num_train_epochs": -1.0}, "`num_train_epochs` must be a number above 0, got -1.0"),
        ({"learning_rate": 0.0}, "`learning_rate` must be a number above 0, got 0.0"),
        ({"per_device_train_batch_size": 0}, "`per_device_train_batch_size` must be a number above 0, got 0"),
        ({"dataloader_prefetch_factor": 0}, "`dataloader_prefetch_factor` must be a number above 0, got 0"),
        ({"neftune_noise_alpha": -1.0}, "`neftune_noise_alpha` must be a number above 0, got -1.0"),
        ({"proposal_growth": "1"}, "`proposal_growth` must be a number in (0, 1], got '1'"),
    ],
)
def test_training_arguments_are_checked(tmp_path, fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DiffusionVMRTrainingArguments(str(tmp_path), **fields)
