import json
import shutil
import sys
from fractions import Fraction
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedConfig

from convert_slowfast import pytorchvideo_name
from modeling_diffusionvmr.slowfast import SlowFastBackbone, SlowFastConfig, SlowFastModel
from modeling_diffusionvmr.video import open_video
from small_slowfast import random_slowfast, tiny_slowfast

SLOW_FRAMES_OF_32 = [0, 4, 8, 13, 17, 22, 26, 31]


@pytest.fixture(scope="module")
def backbone() -> SlowFastBackbone:
    return SlowFastBackbone(tiny_slowfast())


def published_slowfast(monkeypatch) -> nn.Module:
    """PyTorchVideo's SlowFast 8x8 R50, with random weights. Its classifier returns what it gets."""
    pytest.importorskip("pytorchvideo", reason="pytorchvideo, of the extra `dev`, is not installed")
    if find_spec("torchvision") is None:
        # PyTorchVideo imports one class of torchvision, for detection, and does not declare that it needs it
        torchvision, operations = ModuleType("torchvision"), ModuleType("torchvision.ops")
        operations.RoIAlign = None
        monkeypatch.setitem(sys.modules, "torchvision", torchvision)
        monkeypatch.setitem(sys.modules, "torchvision.ops", operations)
    from pytorchvideo.models.slowfast import create_slowfast

    network = create_slowfast().eval()
    network.blocks[-1].dropout = network.blocks[-1].proj = network.blocks[-1].output_pool = nn.Identity()
    return network


def test_features_equal_those_of_a_published_implementation(monkeypatch):
    network = published_slowfast(monkeypatch)
    own = random_slowfast(SlowFastConfig())
    weights = {pytorchvideo_name(name, (3, 4, 6, 3)): value for name, value in own.state_dict().items()}
    of_batches = {name for name in network.state_dict() if name.endswith("num_batches_tracked")}
    assert network.state_dict().keys() - of_batches == weights.keys()
    network.load_state_dict(weights, strict=False)
    clip = torch.randn(1, 3, 32, 224, 224, generator=torch.manual_seed(1))
    with torch.inference_mode():
        published = network([clip[:, :, SLOW_FRAMES_OF_32], clip]).flatten()
        features = own(clip).pooler_output[0]
    assert features.shape == (2304,) == published.shape
    assert published.std() > 0.1
    torch.testing.assert_close(features, published, atol=1e-4, rtol=1e-4)


def test_slow_pathway_reads_some_frames_and_comes_first(backbone):
    model = backbone.model
    numbered = torch.arange(32.0).view(1, 1, 32, 1, 1).expand(1, 3, 32, 16, 16)
    inputs, outputs = {}, {}
    hooks = []
    for name, pathway in (("slow", model.slow), ("fast", model.fast)):
        hooks.append(pathway.stem.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]})))
        hooks.append(pathway.stages[-1].register_forward_hook(lambda *args, name=name: outputs.update({name: args[2]})))
    pooled = model(numbered).pooler_output
    for hook in hooks:
        hook.remove()
    assert inputs["slow"][0, 0, :, 0, 0].tolist() == SLOW_FRAMES_OF_32
    assert inputs["fast"][0, 0, :, 0, 0].tolist() == list(range(32))
    assert outputs["slow"].shape == (1, 128, 8, 1, 1) and outputs["fast"].shape == (1, 16, 32, 1, 1)
    torch.testing.assert_close(pooled[:, :128], outputs["slow"].mean(dim=(2, 3, 4)))
    torch.testing.assert_close(pooled[:, 128:], outputs["fast"].mean(dim=(2, 3, 4)))


def test_number_of_frames_must_fit_both_pathways(backbone):
    with pytest.raises(ValueError, match="^a clip must have a multiple of 4 frames, got 6$"):
        backbone.model(torch.zeros(1, 3, 6, 16, 16))


def test_normalization_stays_as_it_is_in_train_mode():
    model, clip = tiny_slowfast(), torch.randn(2, 3, 32, 16, 16, generator=torch.manual_seed(0))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    features = model(clip).pooler_output
    torch.testing.assert_close(model.train()(clip).pooler_output, features)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_small_frames_and_random_weights_give_features_that_float16_can_hold():
    features = SlowFastModel(SlowFastConfig())(torch.randn(1, 3, 32, 32, 32)).pooler_output
    assert features.shape == (1, 2304)
    assert 1e-3 < features.std() < features.abs().max() < 1e3


@pytest.mark.parametrize(
    "fps, seconds, indices",
    [
        # 64 frames, of which the clip has 60
        (30, 2, [*range(0, 29, 2), 30, 32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 59, 59]),
        (30000 / 1001, 2, None),
        (15, 2, list(range(32))),  # the window's length depends on the frame rate of the source
        (60, 2, None),
        (25, Fraction(3, 2), None),
        (7.9, 1, None),
        (0.5, 2, [0] * 32),
        (0, 2, [0] * 32),
        (30, Fraction(1, 100), [0] * 32),
    ],
)
def test_frames_of_a_clip_are_those_of_the_released_features(backbone, fps, seconds, indices):
    sampling = backbone.sampling(Fraction(seconds), fps)
    assert (sampling.rate, sampling.crop) == (30, 16)
    # In NumPy's double precision; the ends of the window are exact in any
    window = np.linspace(0, 64 * np.floor(fps) / 30 - 1, 32)
    wanted = np.clip(window, 0, max(round(seconds * 30) - 1, 0)).astype(int).tolist()
    assert list(sampling.indices) == wanted
    assert indices is None or wanted == indices
    assert max(wanted) < max(seconds * 30, 1)


def test_prepared_clip():
    backbone = SlowFastBackbone(tiny_slowfast(image_mean=0.25, image_std=0.5))
    frames = [np.full((16, 16, 3), [index, 51, 255], np.uint8) for index in range(32)]
    pixels = backbone.prepare(tuple(frames))
    assert pixels.shape == (3, 32, 16, 16) and pixels.dtype == torch.float32
    torch.testing.assert_close(pixels[0, :, 3, 5], (torch.arange(32) / 255 - 0.25) / 0.5)
    torch.testing.assert_close(pixels[1], torch.full((32, 16, 16), (0.2 - 0.25) / 0.5))
    torch.testing.assert_close(pixels[2], torch.full((32, 16, 16), 1.5))
    assert (SlowFastConfig().image_mean, SlowFastConfig().image_std) == (0.45, 0.225)


def test_features_of_a_clip_come_from_its_frames(backbone):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (160, 16, 16, 3), dtype=np.uint8)  # 2.7 clips: the last frame fills the third
    video = open_video((frames, 30.0), 2.0)
    features = backbone.encode_video(video, batch_size=64)
    assert features.shape == (video.num_clips, 144) == (3, backbone.feature_size) and features.dtype == np.float32
    for clip, feature in enumerate(features):
        indices = [min(60 * clip + index, 159) for index in backbone.sampling(Fraction(2), 30).indices]
        alone = backbone.encode_clips(backbone.prepare([frames[index] for index in indices])[None])[0]
        np.testing.assert_allclose(feature, alone, atol=1e-5)
    assert np.abs(features[0] - features[1]).max() > 1e-3


def test_saved_backbone_is_the_same(backbone, tmp_path):
    clips = torch.randn(2, 3, 32, 16, 16, generator=torch.manual_seed(0))
    features = backbone.encode_clips(clips)
    backbone.save_pretrained(tmp_path / "checkpoint" / "slowfast")
    assert PreTrainedConfig.get_config_dict(tmp_path / "checkpoint" / "slowfast")[0]["model_type"] == "slowfast"
    for loaded in (
        SlowFastBackbone.from_pretrained(tmp_path / "checkpoint" / "slowfast"),
        SlowFastBackbone.from_pretrained(tmp_path / "checkpoint", subfolder="slowfast"),
    ):
        np.testing.assert_array_equal(loaded.encode_clips(clips), features)
        assert loaded.sampling(Fraction(2), 30) == backbone.sampling(Fraction(2), 30)
        assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
        assert (loaded.feature_size, loaded.text_feature_size) == (144, None)
    half = loaded.to("cpu", torch.bfloat16).encode_clips(clips)
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, features, atol=0.05 * np.abs(features).max())


def test_damaged_checkpoints_are_refused(backbone, tmp_path):
    backbone.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "fast.stages.1.0.spatial.norm.running_var"
    for damaged, message in (
        ({key: value for key, value in weights.items() if key != name}, f"weights are missing: {name}$"),
        ({**weights, name: torch.full_like(weights[name], torch.nan)}, f"weights contain NaN or infinity: {name}$"),
    ):
        save_file(damaged, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            SlowFastBackbone.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")  # a pickle
    with pytest.raises(OSError, match="model.safetensors"):
        SlowFastBackbone.from_pretrained(tmp_path)
    index = {"weight_map": dict.fromkeys(weights, "../elsewhere.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="is not a file in the same folder"):
        SlowFastBackbone.from_pretrained(tmp_path)
    shutil.rmtree(tmp_path)
    with pytest.raises(OSError):
        SlowFastBackbone.from_pretrained(tmp_path, local_files_only=True)


@pytest.mark.parametrize(
    "field, value",
    [
        ("width", 0),
        ("width", 60),
        ("channel_ratio", 5),
        ("frame_ratio", 3),
        ("num_frames", 30),
        ("sampling_rate", 0),
        ("frame_rate", 29.97),
        ("image_size", -1),
        ("fusion_kernel", 6),
        ("fusion_ratio", 0),
        ("depths", ()),
        ("depths", (3, 4, 0, 3)),
        ("depths", (3, 4, 6)),
        ("slow_kernels", (1, 1, 1, 3)),
        ("fast_kernels", (5, 3, 2, 3, 3)),
        ("image_std", 0.0),
        ("image_mean", float("nan")),
    ],
)
def test_invalid_values_are_named(field, value):
    with pytest.raises((ValueError, TypeError, StrictDataclassError)) as caught:
        SlowFastConfig(**{field: value})
    named = {"width": "channel_ratio" if value else "width", "num_frames": "frame_ratio"}.get(field, field)
    named = "slow_kernels" if value == (3, 4, 6) else named
    assert named in str(caught.value.__cause__ or caught.value)


def test_weights_of_a_deeper_network(tmp_path):
    SlowFastBackbone(tiny_slowfast()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "depths": [2, 1, 2]}))
    with pytest.raises(ValueError, match=r"config.json describes another network, without fast\.stages\.2"):
        SlowFastBackbone.from_pretrained(tmp_path)
