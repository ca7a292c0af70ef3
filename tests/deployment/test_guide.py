"""The guide docs/how_to/deploy_with_onnx_runtime.md, run from its first block to its last."""

import re
import shlex
from pathlib import Path

import torch

from modeling_diffusionvmr.cli import main
from modeling_diffusionvmr.synthetic.rendered_world import plan_video, write_video

GUIDE = Path(__file__).parents[2] / "docs" / "how_to" / "deploy_with_onnx_runtime.md"


def test_guide(traced_before, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    write_video(plan_video(70_000_000), tmp_path / "demo" / "video.mp4")
    names: dict = {}
    commands = []
    text = GUIDE.read_text(encoding="utf-8")
    for language, content in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        if language == "python":
            exec(content, names)
        elif content.startswith("diffusionvmr"):
            commands.append(content.strip())
            main(shlex.split(content)[1:])
    assert commands == ["diffusionvmr export embedded onnx", "diffusionvmr export embedded onnx-int8 --int8"]
    clips, tokens = torch.rand(5, 192).numpy(), torch.rand(3, 192).numpy()
    outputs = names["model"](**names["retrieve"].processor([[clips]], [tokens]))
    assert outputs.logits.shape == (1, names["model"].config.num_proposals, 2)
