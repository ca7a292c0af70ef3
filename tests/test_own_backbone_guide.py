"""The guide docs/how_to/use_your_own_backbone.md, run from its first block to its last with small random networks."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model, pipeline

from modeling_diffusionvmr import DiffusionVMRForMomentRetrieval, load_backbone, open_video
from modeling_diffusionvmr.backbones import BACKBONE_CLASSES
from modeling_diffusionvmr.data.files import save_jsonl
from modeling_diffusionvmr.modeling_diffusionvmr import TASK
from small_checkpoint import tiny_clip
from test_pipeline import WITHOUT_PACKAGE, run
from test_video import write_video

GUIDE = Path(__file__).parents[1] / "docs" / "how_to" / "use_your_own_backbone.md"
SMALL = "--d_model 32 --encoder_layers 1 --decoder_layers 1 --encoder_ffn_dim 32 --decoder_ffn_dim 32"
LOAD = """
from transformers import pipeline
try:
    pipeline("video-moment-retrieval", model={model!r}, trust_remote_code=True)
except ValueError as error:
    found.append(str(error))
"""


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    """Run the guide in a folder. Return the folder, and the names that each block of Python defines."""
    folder, names = tmp_path_factory.mktemp("guide"), []
    registered = dict(BACKBONE_CLASSES)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        prepare(folder)
        for language, content in re.findall(r"^```(\w*)\n(.*?)^```$", GUIDE.read_text("utf-8"), re.DOTALL | re.M):
            if not language:
                follow(content, patch)
            elif names:
                names.append({})
                exec(content, names[-1])
            else:
                Path("dinov2.py").write_text(content)
                names.append(runpy.run_path("dinov2.py"))
    yield folder, names
    sys.modules.pop("dinov2")
    BACKBONE_CLASSES.clear()
    BACKBONE_CLASSES.update(registered)


def prepare(folder):
    """Create everything that the guide uses."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    processor = BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28})
    for part in (Dinov2Model(Dinov2Config(**sizes)), processor):
        part.save_pretrained(folder / "facebook" / "dinov2-base")
    tiny_clip().save_pretrained(folder / "openai" / "clip-vit-base-patch32")
    (folder / "videos").mkdir()
    rows = []
    for qid, vid in enumerate(("first", "second", "new")):
        write_video(folder / "videos" / f"{vid}.mp4", np.arange(100) / 10)
        rows.append({"qid": qid, "query": "a dog runs", "vid": vid, "duration": 10, "relevant_windows": [[2, 6]]})
    save_jsonl(rows[:2], folder / "train.jsonl")


def follow(commands, patch):
    for line in commands.replace("\\\n", " ").splitlines():
        program, script, *arguments = shlex.split(line)
        assert program == "python"
        small = [*SMALL.split(), "--max_steps", "1", "--use_cpu"] if arguments[0] == "train" else []
        patch.setattr(sys, "argv", [script, *arguments, *small])
        runpy.run_path(script, run_name="__main__")


def test_the_guide_works_as_written(guide):
    folder, (file, search, _) = guide
    moments = search["moments"]
    assert moments and all(0 <= moment["start"] <= moment["end"] <= 10 for moment in moments)
    video, clip = search["retrieve"].backbones.models
    assert type(video) is search["dinov2"].Dinov2Backbone and clip.text_feature_size == 8
    features = np.load(folder / "features" / "dinov2" / "first.npz")["features"]
    expected = file["Dinov2Backbone"].from_pretrained(folder / "facebook" / "dinov2-base")
    assert features.shape == (5, 16)
    np.testing.assert_allclose(features, expected.encode_video(open_video(folder / "videos/first.mp4", 2.0)), atol=1e-2)


def test_several_frames_per_clip(guide, monkeypatch):
    folder, (file, _, averaged) = guide
    monkeypatch.setitem(BACKBONE_CLASSES, "dinov2", averaged["AveragedDinov2Backbone"])
    backbone = load_backbone(folder / "facebook" / "dinov2-base")
    features = backbone.encode_video(open_video(folder / "videos" / "first.mp4", 2.0), batch_size=8)
    one = file["Dinov2Backbone"](backbone.model, backbone.image_processor)
    every = one.encode_video(open_video(folder / "videos" / "first.mp4", 0.5))
    np.testing.assert_allclose(features, every.reshape(5, 4, 16).mean(1), atol=1e-6)
    assert not np.allclose(features, one.encode_video(open_video(folder / "videos" / "first.mp4", 2.0)), atol=1e-3)


def test_saved_again_and_loaded_after_registration(guide, tmp_path, monkeypatch):
    folder, (file, search, _) = guide
    monkeypatch.setitem(BACKBONE_CLASSES, "dinov2", file["Dinov2Backbone"])
    search["retrieve"].save_pretrained(tmp_path)
    again = pipeline(TASK, model=str(tmp_path))
    assert type(again.backbones.models[0]) is file["Dinov2Backbone"]
    assert again(str(folder / "videos" / "new.mp4"), "a dog runs") == search["moments"]


def test_without_registration(guide, tmp_path, monkeypatch):
    folder, _ = guide
    monkeypatch.delitem(BACKBONE_CLASSES, "dinov2")
    message = (
        r"^these backbones cannot be run: dinov2-base \(dinov2\); pass their features to the model instead "
        r"\(supported: clip, .*; a class for another type is not part of a checkpoint: install "
        r"modeling_diffusionvmr, and run the code that registers it with `register_backbone`\)$"
    )
    with pytest.raises(ValueError, match=message):
        pipeline(TASK, model=str(folder / "trained"))
    DiffusionVMRForMomentRetrieval.from_pretrained(folder / "trained")  # takes features all the same
    with pytest.raises(ValueError, match=r"model type dinov2 is not supported .*`register_backbone`"):
        load_backbone(folder / "facebook" / "dinov2-base")
    # Slow: a process that imports everything
    (found,) = run(WITHOUT_PACKAGE + LOAD.format(model=str(folder / "trained")), tmp_path)
    assert re.fullmatch(message, found)
