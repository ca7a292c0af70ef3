"""
DiffusionVMR for Hugging Face: video moment retrieval by denoising spans.

Importing the package registers the Auto classes and `pipeline("video-moment-retrieval")`.
"""

import importlib
from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from .backbones import load_backbone, register_backbone
from .base_backbone import Backbone
from .configuration_diffusionvmr import DiffusionVMRConfig
from .modeling_diffusionvmr import TASK, DiffusionVMRForMomentRetrieval, DiffusionVMRModel
from .pipeline_diffusionvmr import VideoMomentRetrievalPipeline
from .processing_diffusionvmr import DiffusionVMRProcessor
from .video import FrameSampling, open_video

__version__ = "0.1.0"

DEFAULT_MODEL = str(Path(__file__).parent / "default_model")
"""Folder of the embedded checkpoint."""

# Imported on first access: `transformers.Trainer` loads `datasets`, and retrieval needs neither features nor metrics
LAZY = {
    "DiffusionVMRDataCollator": "training.collator",
    "DiffusionVMRTrainer": "training.trainer",
    "DiffusionVMRTrainingArguments": "training.arguments",
    "MomentRetrievalDataset": "training.dataset",
    "OnnxDiffusionVMR": "deployment.onnx_model",
    "evaluate_predictions": "training.metrics",
    "load_annotations": "data.annotations",
    "open_features": "data.features",
    "predict_moments": "training.prediction",
}

__all__ = [
    "DEFAULT_MODEL",
    "Backbone",
    "DiffusionVMRConfig",
    "DiffusionVMRForMomentRetrieval",
    "DiffusionVMRModel",
    "DiffusionVMRProcessor",
    "FrameSampling",
    "VideoMomentRetrievalPipeline",
    "load_backbone",
    "open_video",
    "register_backbone",
    *LAZY,
]


def __getattr__(name: str):
    if name in LAZY:
        return getattr(importlib.import_module(f".{LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *LAZY})


AutoConfig.register(DiffusionVMRConfig.model_type, DiffusionVMRConfig)
AutoModel.register(DiffusionVMRConfig, DiffusionVMRForMomentRetrieval)
AutoProcessor.register(DiffusionVMRConfig, DiffusionVMRProcessor)
PIPELINE_REGISTRY.register_pipeline(
    TASK, pipeline_class=VideoMomentRetrievalPipeline, pt_model=AutoModel, type="multimodal"
)

# Save the code with each checkpoint, so that `trust_remote_code=True` loads it without the package
DiffusionVMRConfig.register_for_auto_class()
DiffusionVMRForMomentRetrieval.register_for_auto_class("AutoModel")
DiffusionVMRProcessor.register_for_auto_class("AutoProcessor")
