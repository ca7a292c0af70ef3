"""What `diffusionvmr push` refuses. tests/test_hub.py tests what it pushes."""

import json

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from modeling_diffusionvmr import DiffusionVMRForMomentRetrieval
from modeling_diffusionvmr.cli import main
from small_checkpoint import description, tiny_clip


def error_of(*arguments) -> str:
    with pytest.raises(SystemExit) as error:
        main(["push", *map(str, arguments)])
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def checkpoint(tiny_config, tmp_path):
    DiffusionVMRForMomentRetrieval(tiny_config()).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("name", ["model", "user/model/part", "user/", "https://huggingface.co/user/model"])
def test_not_a_repository(checkpoint, name):
    assert error_of(checkpoint, name) == f"error: {name}: a repository on the Hub is USER/NAME"


def test_not_a_checkpoint(checkpoint, tmp_path):
    assert error_of(tmp_path, "user/model") == f"error: {tmp_path}: not a checkpoint: no config.json"
    assert "nowhere: not a checkpoint" in error_of(tmp_path / "nowhere", "user/model")
    assert "not a checkpoint" in error_of(checkpoint / "model.safetensors", "user/model")


def test_a_model_of_another_type(tmp_path):
    layers = {"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8}
    CLIPModel(CLIPConfig(text_config={**layers, "vocab_size": 9}, vision_config=layers)).save_pretrained(tmp_path)
    assert error_of(tmp_path, "user/model") == f"error: {tmp_path}: a model of type clip, not diffusionvmr"


def test_weights_are_missing(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    del weights["saliency_head.weight"]
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    assert error_of(checkpoint, "user/model") == f"error: {checkpoint}: weights are missing: saliency_head.weight"


def test_backbones_are_missing(tiny_config, tmp_path):
    """Saving only warns, so as not to lose the weights."""
    model = DiffusionVMRForMomentRetrieval(tiny_config(backbones=[description()]))
    with pytest.warns(UserWarning, match="saved without backbone `clip`"):
        model.save_pretrained(tmp_path)
    assert error_of(tmp_path, "user/model").startswith(f"error: {tmp_path} lacks backbone `clip`")
    tiny_clip().save_pretrained(tmp_path / "clip")
    save_file({}, tmp_path / "clip" / "model.safetensors", {"format": "pt"})
    assert error_of(tmp_path, "user/model").startswith(f"error: {tmp_path / 'clip'}: weights are missing: ")


def test_the_configuration_is_damaged(checkpoint):
    (checkpoint / "config.json").write_text("{")
    assert "config.json: not JSON" in error_of(checkpoint, "user/model")
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "diffusionvmr", "d_model": -1}))
    assert "d_model" in error_of(checkpoint, "user/model")


def test_offline(checkpoint):
    assert "offline" in error_of(checkpoint, "user/model").lower()


def test_no_connection(checkpoint, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")  # where nothing listens
    error = error_of(checkpoint, "user/model")
    assert error.startswith("error: user/model: http://127.0.0.1:1 cannot be reached (")
