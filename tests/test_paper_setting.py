"""A model of the paper's main setting searches raw video: SlowFast and CLIP, 2816 numbers per clip."""

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel, pipeline

from modeling_diffusionvmr import DiffusionVMRConfig, DiffusionVMRForMomentRetrieval, DiffusionVMRProcessor
from modeling_diffusionvmr.backbones import Backbones
from modeling_diffusionvmr.dual_encoders import ClipBackbone
from modeling_diffusionvmr.pipeline_diffusionvmr import VideoMomentRetrievalPipeline
from modeling_diffusionvmr.slowfast import SlowFastBackbone, SlowFastConfig
from modeling_diffusionvmr.training.presets import load_preset
from modeling_diffusionvmr.video_file import VideoFile
from small_checkpoint import tiny_clip
from small_slowfast import random_slowfast
from test_video import write_video

TASK = "video-moment-retrieval"
QUERIES = ["a red dog", "a dog runs fast", "a fast dog"]


def wide_clip() -> ClipBackbone:
    """CLIP with the features' sizes of ViT-B/32, and few layers."""
    tiny = tiny_clip()
    config = tiny.model.config
    text = {**config.text_config.to_dict(), "hidden_size": 512}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=config.vision_config.to_dict(), projection_dim=512))
    return ClipBackbone(model, tiny.image_processor, tiny.tokenizer)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The configuration of the preset with random weights. The backbones have few layers, and features of full size."""
    preset = load_preset("qvhighlights")
    config = DiffusionVMRConfig(**preset["config"])
    slowfast = SlowFastBackbone(random_slowfast(SlowFastConfig(depths=(1, 1, 1, 1), image_size=32)))
    backbones = Backbones(config.backbones, [slowfast, wide_clip()])
    torch.manual_seed(0)
    processor = DiffusionVMRProcessor([2304, 512], 512, config.max_clips, config.max_tokens, **preset["processor"])
    folder = tmp_path_factory.mktemp("qvhighlights")
    VideoMomentRetrievalPipeline(
        model=DiffusionVMRForMomentRetrieval(config), processor=processor, backbones=backbones
    ).save_pretrained(folder)
    return folder


def test_raw_video(checkpoint, tmp_path, monkeypatch):
    retrieve = pipeline(TASK, model=str(checkpoint))
    assert [model.feature_size for model in retrieve.backbones.models] == [2304, 512]
    decoded, decode, seen = [], VideoFile.decoded, []
    monkeypatch.setattr(VideoFile, "decoded", lambda self: decoded.append(self) or decode(self))
    retrieve.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    path = write_video(tmp_path / "a.mp4", np.arange(73) / 10)
    results = retrieve(str(path), QUERIES, threshold=0, top_k=3, return_saliency=True)
    assert len(decoded) == 1 and len(seen) == 1
    assert seen[0]["video_features"].shape == (1, 4, 2816) and seen[0]["text_features"].shape[-1] == 512
    for result in results:
        assert len(result["saliency"]) == 4 and result["clip_seconds"] == 2.0
        assert 1 <= len(result["moments"]) <= 3
        for moment in result["moments"]:
            assert 0 <= moment["start"] <= moment["end"] <= 7.31
            assert moment["start"] % 2 == 0  # the preset rounds to 2 s
