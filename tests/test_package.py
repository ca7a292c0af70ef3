import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

import modeling_diffusionvmr

CONTRACT = [
    *("DiffusionVMRConfig", "DiffusionVMRModel", "DiffusionVMRForMomentRetrieval", "DiffusionVMRProcessor"),
    *("VideoMomentRetrievalPipeline", "MomentRetrievalDataset", "DiffusionVMRDataCollator", "DiffusionVMRTrainer"),
    *("open_features", "load_annotations", "evaluate_predictions", "DEFAULT_MODEL"),
]
NOT_LOADED = {"datasets", "pandas", "av", "evaluate", "matplotlib", "h5py", "gradio"}
# What the package asks of transformers. It may load what it likes
TRANSFORMERS = """
from transformers import AutoConfig, AutoModel, AutoProcessor, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
from transformers import Pipeline, PreTrainedConfig
from transformers.feature_extraction_utils import BatchFeature
from transformers.modeling_utils import PreTrainedModel
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.processing_utils import ProcessorMixin
"""


def loaded_by(code: str) -> set[str]:
    """The packages that a fresh process has loaded when it has run `code`."""
    code = f"{code}\nimport json, sys\nprint(json.dumps([name.split('.')[0] for name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_is_light():
    allowed = loaded_by(TRANSFORMERS)
    loaded = loaded_by("import modeling_diffusionvmr")
    assert "modeling_diffusionvmr" in loaded
    assert (loaded - allowed) & NOT_LOADED == set()


def test_names_of_the_contract():
    for name in CONTRACT:
        assert getattr(modeling_diffusionvmr, name) is not None
        assert name in modeling_diffusionvmr.__all__ and name in dir(modeling_diffusionvmr)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = modeling_diffusionvmr.nothing
    with pytest.raises(ImportError):
        from modeling_diffusionvmr import nothing  # noqa: F401


def test_everything_that_is_named_is_there():
    namespace = {}
    exec("from modeling_diffusionvmr import *", namespace)
    assert set(modeling_diffusionvmr.__all__) <= namespace.keys()


def test_auto_classes(tiny_config, tmp_path):
    config = tiny_config()
    assert type(AutoConfig.for_model("diffusionvmr")) is modeling_diffusionvmr.DiffusionVMRConfig
    model = AutoModel.from_config(config)
    assert type(model) is modeling_diffusionvmr.DiffusionVMRForMomentRetrieval
    model.save_pretrained(tmp_path)
    modeling_diffusionvmr.DiffusionVMRProcessor([12], 8).save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is modeling_diffusionvmr.DiffusionVMRForMomentRetrieval
    assert type(AutoProcessor.from_pretrained(tmp_path)) is modeling_diffusionvmr.DiffusionVMRProcessor


def test_pipeline_task():
    _, task, _ = PIPELINE_REGISTRY.check_task("video-moment-retrieval")
    assert task["impl"] is modeling_diffusionvmr.VideoMomentRetrievalPipeline
    assert task["pt"] == (AutoModel,)


def test_default_model_is_a_folder_of_the_package():
    folder = Path(modeling_diffusionvmr.__file__).parent / "default_model"
    assert modeling_diffusionvmr.DEFAULT_MODEL == str(folder)
