"""The backbones of a model: how they are registered, loaded and used together."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import BertConfig

from modeling_diffusionvmr.backbones import BACKBONE_CLASSES, Backbones, load_backbone, register_backbone
from modeling_diffusionvmr.checkpoint import load_backbones
from modeling_diffusionvmr.dual_encoders import ClipBackbone, SiglipBackbone
from modeling_diffusionvmr.video import open_video
from small_checkpoint import as_video, description, put_on_hub, tiny_clip, tiny_siglip, tiny_siglip2
from test_video import write_video


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


def test_clips_that_show_the_same_frame_are_encoded_once(clip, frames, monkeypatch):
    encoded, encode = [], clip.encode_clips
    monkeypatch.setattr(
        clip, "encode_clips", lambda inputs: encoded.append(len(inputs["pixel_values"])) or encode(inputs)
    )
    for batch_size, batches in ((32, [2]), (1, [1, 1])):
        encoded.clear()
        features = clip.encode_video(open_video((frames[:2], 1 / 20), 2.0), batch_size)
        assert encoded == batches
        np.testing.assert_allclose(features, clip.encode_video(as_video(frames[:2])).repeat(10, axis=0), atol=1e-6)


@pytest.mark.parametrize(
    ("returned", "found"),
    [
        (np.zeros((7, 5), np.float32), r"\(7, 5\) float32"),
        (np.zeros((6, 12), np.float32), r"\(6, 12\) float32"),
        (np.zeros(12, np.float32), r"\(12,\) float32"),
        (np.zeros((7, 12)), r"\(7, 12\) float64"),
        (None, "NoneType"),
    ],
)
def test_a_backbone_that_does_not_return_one_vector_per_clip(clip, frames, monkeypatch, returned, found):
    monkeypatch.setattr(clip, "encode_clips", lambda inputs: returned)
    message = rf"^ClipBackbone.encode_clips must return an array \(7, 12\) float32, got {found}$"
    with pytest.raises(TypeError, match=message):
        clip.encode_video(as_video(frames))


@pytest.mark.parametrize("batch_size", [0, -1, 2.5])
def test_invalid_batch_size(clip, frames, batch_size):
    with pytest.raises(ValueError, match="^`batch_size` must be"):
        clip.encode_video(as_video(frames), batch_size)


def test_backbones_cannot_change_the_frames_that_they_share(clip, frames, monkeypatch):
    def prepare(shared):
        shared[0][:] = 0

    monkeypatch.setattr(clip, "prepare", prepare)
    with pytest.raises(ValueError, match="read-only"):
        clip.encode_video(as_video(frames))


def test_an_error_while_decoding_ends_the_encoding(clip, tmp_path):
    path = write_video(tmp_path / "a.ts", np.arange(200) / 10, noise=True)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 20000] = bytes(20000)
    path.write_bytes(content)
    threads = threading.active_count()
    with pytest.raises(ValueError, match=r"a\.ts: "):
        clip.encode_video(open_video(path, 1.0), batch_size=1)
    assert threading.active_count() == threads


def test_backbones_of_different_kinds(clip, frames):
    models = [clip, tiny_siglip(), tiny_siglip2()]
    sizes = [{"feature_size": model.feature_size, "clip_seconds": 2.0} for model in models]
    names = ("clip", "siglip", "siglip2")
    backbones = Backbones([{"name": name, **size} for name, size in zip(names, sizes)], models)
    features = backbones.encode_video(as_video(frames), batch_size=2)
    assert [array.shape for array in features] == [(7, 12), (7, 16), (7, 16)]
    for array, model in zip(features, models):
        np.testing.assert_allclose(array, model.encode_video(as_video(frames)), atol=1e-5)
    # CLIP has a start token, SigLIP has not
    texts = Backbones([{"name": name, "text_feature_size": 8} for name in names[:2]], models[:2])
    with pytest.raises(ValueError, match="the text backbones split 'a dog' into different numbers of tokens"):
        texts.encode_text(["a dog"])


def test_invalid_descriptions(clip, tmp_path):
    message = "backbone clip: `feature_size` is 512 in the model's config, but 12 for the backbone"
    with pytest.raises(ValueError, match=f"^{message}$"):
        Backbones([description(feature_size=512)], [clip])
    clip.save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match=f"^{message} in {tmp_path / 'clip'}$"):
        load_backbones(SimpleNamespace(backbones=[description(feature_size=512)]), tmp_path)
    with pytest.raises(ValueError, match=r"same `clip_seconds`, got \[1.0, 2.0\]"):
        Backbones([description(), description(name="slow", clip_seconds=1.0)], [clip, clip])


def test_one_backbone_alone(clip, frames, tmp_path):
    put_on_hub(clip, tmp_path / "cache", "someone/clip")
    clip.save_pretrained(tmp_path / "clip")
    from_hub = load_backbone("someone/clip", cache_dir=str(tmp_path / "cache"), local_files_only=True)
    for loaded in (from_hub, load_backbone(tmp_path / "clip", "cpu", torch.float32)):
        np.testing.assert_array_equal(loaded.encode_video(as_video(frames)), clip.encode_video(as_video(frames)))
    BertConfig().save_pretrained(tmp_path / "bert")
    message = r"bert: model type bert is not supported as a backbone \(supported: clip, siglip, siglip2.*; .*register_"
    with pytest.raises(ValueError, match=message):
        load_backbone(tmp_path / "bert")
    for name in ("no/model", str(tmp_path / "absent")):
        with pytest.raises(
            OSError, match=f"^{name}: not a checkpoint folder, and it could not be loaded from the Hub"
        ) as caught:
            load_backbone(name, local_files_only=True)
        assert "\n" not in str(caught.value)


def test_registered_class_replaces_an_earlier_one(clip, tmp_path, monkeypatch):
    monkeypatch.setattr("modeling_diffusionvmr.backbones.BACKBONE_CLASSES", dict(BACKBONE_CLASSES))

    class First(ClipBackbone):
        pass

    class Second(ClipBackbone):
        pass

    clip.save_pretrained(tmp_path)
    assert type(load_backbone(tmp_path)) is ClipBackbone
    for backbone_class in (First, Second):
        register_backbone("clip", backbone_class)
        assert type(load_backbone(tmp_path)) is backbone_class


@pytest.mark.parametrize(
    "model_type, backbone_class, message",
    [
        ("mine", object, "a backbone must be a subclass of `Backbone`, got <class 'object'>"),
        ("mine", tiny_siglip, "a backbone must be a subclass of `Backbone`, got <function"),
        (SiglipBackbone, "mine", "a model type must be a string that is not empty, got <class "),
    ],
)
def test_invalid_registration(model_type, backbone_class, message):
    before = dict(BACKBONE_CLASSES)
    with pytest.raises(TypeError, match=message):
        register_backbone(model_type, backbone_class)
    assert before == BACKBONE_CLASSES
