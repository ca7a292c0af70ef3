import numpy as np
import pytest
import torch
from transformers import BertConfig

from modeling_diffusionvmr.backbones import Backbones, load_backbone
from modeling_diffusionvmr.dual_encoders import ClipBackbone
from small_checkpoint import as_video, description, put_on_hub, tiny_clip


@pytest.fixture(scope="module")
def clip() -> ClipBackbone:
    return tiny_clip()


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (7, 24, 40, 3), dtype=np.uint8)


def test_one_pass_for_all_backbones(clip, frames, monkeypatch):
    other = tiny_clip(seed=1, projection_dim=6)
    both = Backbones([description(), {"name": "other", "feature_size": 6, "clip_seconds": 2.0}], [clip, other])
    video = as_video(frames)
    passes, clips = [], video.clips
    monkeypatch.setattr(video, "clips", lambda samplings: passes.append(len(samplings)) or clips(samplings))
    features = both.encode_video(video, batch_size=2)
    assert passes == [2]
    np.testing.assert_allclose(features[0], clip.encode_video(as_video(frames)), atol=1e-5)
    np.testing.assert_allclose(features[1], other.encode_video(as_video(frames)), atol=1e-5)
    texts = both.encode_text(["a dog", "a red dog"])
    assert [array.shape for array in texts] == [(4, 8), (5, 8)]  # of the first alone, the second reads no text
    assert both.clip_seconds == 2.0
    two_texts = Backbones([{"name": name, "text_feature_size": 8} for name in "ab"], [clip, other])
    assert two_texts.encode_text(["a dog"])[0].shape == (4, 16)
    assert two_texts.clip_seconds is None


def test_invalid_descriptions(clip):
    with pytest.raises(ValueError, match="backbone clip: `feature_size` is 12, but 512 in the config"):
        Backbones([description(feature_size=512)], [clip])
    with pytest.raises(ValueError, match=r"same `clip_seconds`, got \[1.0, 2.0\]"):
        Backbones([description(), description(name="slow", clip_seconds=1.0)], [clip, clip])


def test_one_backbone_alone(clip, frames, tmp_path):
    put_on_hub(clip, tmp_path / "cache", "someone/clip")
    clip.save_pretrained(tmp_path / "clip")
    from_hub = load_backbone("someone/clip", cache_dir=str(tmp_path / "cache"), local_files_only=True)
    for loaded in (from_hub, load_backbone(tmp_path / "clip", "cpu", torch.float32)):
        np.testing.assert_array_equal(loaded.encode_video(as_video(frames)), clip.encode_video(as_video(frames)))
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"bert: model type bert is not supported as a backbone \(supported: clip\)"):
        load_backbone(tmp_path / "bert")
    for name in ("no/model", str(tmp_path / "absent")):
        with pytest.raises(
            OSError, match=f"^{name}: not a checkpoint folder, and it could not be loaded from the Hub"
        ) as caught:
            load_backbone(name, local_files_only=True)
        assert "\n" not in str(caught.value)
