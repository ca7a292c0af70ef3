import json
import math
from functools import partial

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from modeling_diffusionvmr import DiffusionVMRConfig, DiffusionVMRForMomentRetrieval
from modeling_diffusionvmr.cli.errors import run_safely

# The paper's QVHighlights setting, and Moment-DETR's where the paper gives no value. The RoI fields are our own.
DEFAULTS = {
    "d_model": 512,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "encoder_ffn_dim": 2048,
    "decoder_ffn_dim": 2048,
    "dropout": 0.1,
    "input_dropout": 0.5,
    "video_feature_size": 2816,
    "text_feature_size": 512,
    "max_clips": 75,
    "max_tokens": 32,
    "num_diffusion_steps": 1000,
    "signal_scale": 2.0,
    "num_proposals": 20,
    "max_training_proposals": 20,
    "num_sampling_steps": 1,
    "l1_loss_coefficient": 10,
    "iou_loss_coefficient": 2,
    "class_loss_coefficient": 4,
    "hinge_loss_coefficient": 1,
    "contrastive_loss_coefficient": 1,
    "absent_loss_coefficient": 0,
    "background_coefficient": 0.1,
    "saliency_margin": 0.2,
    "backbones": None,
}
COUNTS = [
    *("d_model", "encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"),
    *("encoder_ffn_dim", "decoder_ffn_dim", "video_feature_size", "text_feature_size", "max_clips", "max_tokens"),
    *("num_diffusion_steps", "num_proposals", "max_training_proposals", "num_sampling_steps"),
    *("roi_bins", "dynamic_size"),
]
WEIGHTS = [
    *("l1_loss_coefficient", "iou_loss_coefficient", "class_loss_coefficient", "hinge_loss_coefficient"),
    *("contrastive_loss_coefficient", "absent_loss_coefficient", "background_coefficient", "saliency_margin"),
]


def slowfast(**changes) -> dict:
    return {"name": "slowfast", "id": None, "feature_size": 2304, "clip_seconds": 2.0, **changes}


def clip(**changes) -> dict:
    return {"name": "clip", "id": "x/y", "feature_size": 512, "text_feature_size": 512, "clip_seconds": 2, **changes}


def test_defaults():
    config = DiffusionVMRConfig()
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS
    assert config.model_type == "diffusionvmr"
    assert config.is_encoder_decoder


def test_common_names():
    config = DiffusionVMRConfig(hidden_size=64)
    assert config.d_model == config.hidden_size == 64
    config.hidden_size = 128
    assert config.d_model == 128
    assert (config.num_hidden_layers, config.num_attention_heads) == (6, 8)


def test_integers_for_float_fields():
    fields = dict.fromkeys([*WEIGHTS, "dropout", "input_dropout"], 0) | {"signal_scale": 2, "roi_context": 1}
    config = DiffusionVMRConfig(**fields)
    assert {name: getattr(config, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, value) for field in COUNTS for value in (0, -1, 2.5, "2", None)),
        *((field, value) for field in WEIGHTS for value in (-0.1, math.nan, math.inf, "1")),
        *((field, value) for field in ("dropout", "input_dropout") for value in (-0.1, 1, 1.5, math.nan, None)),
        *(("signal_scale", value) for value in (0, -2.0, math.nan, math.inf, "2")),
        *(("roi_context", value) for value in (0.9, -2.0, math.nan, math.inf, "2")),
        ("encoder_attention_heads", 7),
        ("decoder_attention_heads", 7),
        ("num_sampling_steps", 1001),
        ("backbones", "clip"),
        ("backbones", ["clip"]),
    ],
)
def test_invalid_values_name_the_field(field, value):
    with pytest.raises(StrictDataclassError, match=field):
        DiffusionVMRConfig(**{field: value})


OVERRIDES = [
    ("d_model", 33),
    ("d_model", True),
    ("hidden_size", 33),
    ("num_hidden_layers", 2.5),
    ("num_attention_heads", "8"),
    ("dropout", 2),
    ("num_sampling_steps", 5000),
    ("backbones", []),
]


@pytest.mark.parametrize(("field", "value"), OVERRIDES)
def test_overridden_fields_are_checked(tmp_path, field, value):
    """As the constructor checks them, wherever they are given and by whatever name."""
    DiffusionVMRConfig().save_pretrained(tmp_path)
    messages = set()
    for make in (
        DiffusionVMRConfig,
        partial(DiffusionVMRConfig.from_dict, {}),
        partial(DiffusionVMRConfig.from_dict, {}, return_unused_kwargs=True),
        partial(DiffusionVMRConfig.from_pretrained, tmp_path),
        partial(AutoConfig.from_pretrained, tmp_path),
        partial(DiffusionVMRForMomentRetrieval.from_pretrained, tmp_path),
    ):
        with pytest.raises(StrictDataclassError) as error:
            make(**{field: value})
        messages.add(str(error.value))
    assert len(messages) == 1


def test_overridden_fields(tmp_path):
    DiffusionVMRConfig(d_model=64).save_pretrained(tmp_path)
    config, unused = DiffusionVMRConfig.from_pretrained(
        tmp_path, hidden_size=128, dropout=0, other=1, return_unused_kwargs=True
    )
    assert (config.d_model, config.dropout, unused) == (128, 0, {"other": 1})
    assert DiffusionVMRConfig.from_dict(config.to_dict(), d_model=32).d_model == 32


def test_odd_size():
    with pytest.raises(StrictDataclassError, match="`d_model` must be even"):
        DiffusionVMRConfig(d_model=33, encoder_attention_heads=3, decoder_attention_heads=3)


def test_backbones():
    config = DiffusionVMRConfig(backbones=[slowfast(), clip()])
    assert [backbone["name"] for backbone in config.backbones] == ["slowfast", "clip"]
    # Backbones for one modality only, such as GloVe
    glove = {"name": "glove", "id": None, "text_feature_size": 300}
    DiffusionVMRConfig(backbones=[slowfast(), glove], video_feature_size=2304, text_feature_size=300)


@pytest.mark.parametrize(
    ("backbones", "message"),
    [
        ([slowfast(name=""), clip()], r"`backbones\[0\]` has no `name`"),
        ([slowfast(), {"id": "x/y", "feature_size": 512}], r"`backbones\[1\]` has no `name`"),
        ([slowfast(), clip(), {"name": "glove"}], r"`backbones\[2\]` needs `feature_size`, `text_feature_size`"),
        ([slowfast(clip_seconds=0), clip()], r"`backbones\[0\]`.*`clip_seconds`"),
        ([slowfast(), clip(id="x/y", clip_seconds=None)], r"`backbones\[1\]`.*clip_sec"),
        ([clip()], "`video_feature_size` is 2816, but the `feature_size` values in `backbones` add up to 512"),
        ([slowfast(feature_size=2816)], "`text_feature_size` is 512, but .* add up to 0"),
        ([slowfast(feature_size="2304"), clip()], r"backbones\[0\]"),
        ([slowfast(clip_seconds="2"), clip()], r"backbones\[0\]"),
        # Each is saved in a folder of its name
        ([slowfast(name="clip"), clip()], r"`backbones\[1\]` repeats the name"),
        ([slowfast(folder="clip", id="x/y"), clip()], r"`backbones\[0\]` must have a `folder` or an `id`, not both"),
        ([slowfast(folder=".."), clip()], r"`backbones\[0\]`: `folder` must be the name of a folder inside the check"),
        ([slowfast(folder="/etc"), clip()], r"`backbones\[0\]`: `folder` must be the name of a folder"),
        ([slowfast(folder="a/b"), clip()], r"`backbones\[0\]`: `folder` must be the name of a folder"),
        ([slowfast(id="../clip"), clip()], r"`backbones\[0\]`: `id` must be a model on the Hub, USER/NAME"),
        ([slowfast(id="/home/clip"), clip()], r"`backbones\[0\]`: `id` must be a model on the Hub, USER/NAME"),
        ([slowfast(id=3), clip()], r"`backbones\[0\]`: `id` must be a model on the Hub, USER/NAME"),
        ([slowfast(feature_size=True), clip()], r"`backbones\[0\]`: `feature_size` must be an integer"),
    ],
)
def test_invalid_backbones(backbones, message):
    with pytest.raises(StrictDataclassError, match=message):
        DiffusionVMRConfig(backbones=backbones)


def test_json_round_trip(tmp_path):
    config = DiffusionVMRConfig(d_model=64, dropout=0, backbones=[slowfast(), clip()], num_sampling_steps=4)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["model_type"], written["d_model"], written["backbones"][1]["id"]) == ("diffusionvmr", 64, "x/y")
    for loaded in (DiffusionVMRConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is DiffusionVMRConfig
        assert {**loaded.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}


def test_config_file_is_validated(tmp_path):
    DiffusionVMRConfig().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "roi_bins": 0}))
    with pytest.raises(StrictDataclassError, match="`roi_bins` must be a number above 0, got 0"):
        DiffusionVMRConfig.from_pretrained(tmp_path)


def test_pipeline_entry_is_dropped_if_the_package_is_installed(tmp_path):
    # Otherwise `pipeline()` would ask for `trust_remote_code`
    DiffusionVMRConfig().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    entry = {"video-moment-retrieval": {"impl": "pipeline_diffusionvmr.VideoMomentRetrievalPipeline", "pt": []}}
    path.write_text(json.dumps({**json.loads(path.read_text()), "custom_pipelines": entry}))
    assert not hasattr(AutoConfig.from_pretrained(tmp_path), "custom_pipelines")


@pytest.mark.parametrize(("field", "value"), [("roi_context", 0.5), ("roi_bins", 0), ("roi_bins", "half")])
def test_commands_report_invalid_fields_in_one_line(field, value):
    with pytest.raises(SystemExit) as exit_:
        run_safely(lambda _: DiffusionVMRConfig(**{field: value}), None)
    assert exit_.value.code.startswith("error: ") and "\n" not in exit_.value.code
    assert field in exit_.value.code and str(value) in exit_.value.code


def test_id_of_earlier_versions_is_a_folder():
    config = DiffusionVMRConfig(backbones=[slowfast(id=None), clip(id="clip")])
    assert "id" not in config.backbones[0] and "folder" not in config.backbones[0]
    assert "id" not in config.backbones[1] and config.backbones[1]["folder"] == "clip"
    (_, kept) = DiffusionVMRConfig(backbones=[slowfast(), clip(id="x/y")]).backbones
    assert kept["id"] == "x/y" and "folder" not in kept
