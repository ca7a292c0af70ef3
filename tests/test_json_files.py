"""Files of a checkpoint that are JSON, but not the object that they must be."""

import shutil

import pytest

from modeling_diffusionvmr import (
    DEFAULT_MODEL,
    DiffusionVMRConfig,
    DiffusionVMRForMomentRetrieval,
    DiffusionVMRModel,
    DiffusionVMRProcessor,
    VideoMomentRetrievalPipeline,
    load_backbone,
)
from modeling_diffusionvmr.hub import checkpoint_files
from small_checkpoint import put_on_hub, tiny_clip

NOT_OBJECTS = ["[1]", "5", '"text"']


def load_pipeline(folder):
    return VideoMomentRetrievalPipeline(model=DiffusionVMRForMomentRetrieval.from_pretrained(folder))


@pytest.fixture
def checkpoint(tmp_path):
    return shutil.copytree(DEFAULT_MODEL, tmp_path / "checkpoint")


@pytest.mark.parametrize("content", NOT_OBJECTS)
@pytest.mark.parametrize(
    "file, load",
    [
        ("config.json", DiffusionVMRConfig.from_pretrained),
        ("config.json", DiffusionVMRModel.from_pretrained),
        ("config.json", DiffusionVMRForMomentRetrieval.from_pretrained),
        ("config.json", checkpoint_files),
        ("processor_config.json", DiffusionVMRProcessor.from_pretrained),
        ("processor_config.json", load_pipeline),
        ("clip/config.json", load_pipeline),
        ("clip/config.json", lambda folder: load_backbone(folder / "clip")),
        ("clip/preprocessor_config.json", load_pipeline),
        ("clip/tokenizer_config.json", lambda folder: load_backbone(folder / "clip")),
    ],
)
def test_not_an_object(checkpoint, file, load, content):
    (checkpoint / file).write_text(content)
    with pytest.raises(ValueError) as error:
        load(checkpoint)
    assert str(error.value) == f"{checkpoint / file}: must be a JSON object, got {content.encode()!r}"


@pytest.mark.parametrize("cls", [DiffusionVMRModel, DiffusionVMRForMomentRetrieval])
@pytest.mark.parametrize("content", NOT_OBJECTS)
def test_index_of_weights(checkpoint, cls, content):
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=f"^{checkpoint}/model.safetensors.index.json: not an index of weights"):
        cls.from_pretrained(checkpoint)


def test_tokenizer_settings_that_are_not_json(checkpoint):
    (checkpoint / "clip" / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=f"^{checkpoint}/clip/tokenizer_config.json: not JSON"):
        load_pipeline(checkpoint)


@pytest.mark.parametrize("subfolder", ["", "clip"])
def test_in_the_cache_of_the_hub(tmp_path, subfolder):
    put_on_hub(tiny_clip(), tmp_path, "some/clip", subfolder)
    file = tmp_path / "models--some--clip" / "snapshots" / ("0" * 40) / subfolder / "preprocessor_config.json"
    file.write_text("[1]")
    with pytest.raises(ValueError) as error:
        load_backbone("some/clip", cache_dir=tmp_path, subfolder=subfolder, local_files_only=True)
    assert str(error.value) == f"{file}: must be a JSON object, got b'[1]'"


def test_a_file_by_itself(checkpoint):
    (checkpoint / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=f"^{checkpoint}/config.json: must be a JSON object"):
        DiffusionVMRConfig.from_pretrained(checkpoint / "config.json")


def test_cut_off_backbone_in_a_folder(checkpoint):
    (checkpoint / "clip" / "config.json").write_text('{"a":')
    with pytest.raises(OSError, match=f"^{checkpoint}/clip: could not be loaded"):
        load_backbone(checkpoint / "clip")


def test_files_that_are_not_read_hide_no_error(checkpoint):
    (checkpoint / "zz_config.json").write_text("[1]")
    (checkpoint / "x_config.json").mkdir()
    with pytest.raises(Exception, match="d_model"):
        DiffusionVMRConfig.from_pretrained(checkpoint, d_model=-3)


def test_other_errors_stay(checkpoint):
    with pytest.raises(ValueError, match="^`top_k` must be a whole number"):
        DiffusionVMRProcessor.from_pretrained(checkpoint, top_k="many")


def test_saving_replaces_a_processor_that_cannot_be_read(checkpoint):
    (checkpoint / "processor_config.json").write_text("[1]")
    DiffusionVMRForMomentRetrieval.from_pretrained(DEFAULT_MODEL).save_pretrained(checkpoint)
    saved = DiffusionVMRProcessor.from_pretrained(checkpoint)
    assert saved.to_dict() == DiffusionVMRProcessor.from_pretrained(DEFAULT_MODEL).to_dict()
