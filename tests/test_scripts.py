"""The commands, as a person runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from modeling_diffusionvmr import DEFAULT_MODEL

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def run(script: str, *arguments, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPTS / script, *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=300
    )


@pytest.mark.parametrize("script", sorted(p.name for p in SCRIPTS.glob("*.py") if "__main__" in p.read_text()))
def test_help(script, tmp_path):
    result = run(script, "--help", folder=tmp_path)
    assert result.returncode == 0 and result.stdout.startswith("usage:")


def test_demo(tmp_path):
    result = run("demo.py", "--output_dir", "pictures", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("true: ") == 3 == result.stdout.count("retrieved: ")
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"video.mp4", "timeline.png", "refinement.png"}


def test_make_default_model_in_small(tmp_path, monkeypatch, capsys):
    # The stages after the CLIP, whose training tests/test_rendered_backbone.py covers, on two videos and for two steps
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import make_default_model as script

    monkeypatch.setattr(script, "TRAINING_VIDEOS", 2)
    monkeypatch.setattr(script, "TRAINING_STEPS", 2)
    monkeypatch.setattr(script, "HELD_OUT_VIDEOS", 2)
    monkeypatch.setattr(script, "make_backbones", None)  # the stage is there already, and is skipped
    script.open_backbones(Path(DEFAULT_MODEL) / "clip").models[0].save_pretrained(tmp_path / "work" / "seed-0" / "clip")
    arguments = script.parse_arguments(["--work_dir", str(tmp_path / "work"), "--model", str(tmp_path / "model")])
    script.main(arguments)
    printed = capsys.readouterr().out
    assert "| unseen pairs |" in printed and "together" in printed
    assert (tmp_path / "model" / "model.safetensors").exists() and (tmp_path / "model" / "clip").is_dir()
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="other is there and is no checkpoint"):
        script.publish(tmp_path / "model", tmp_path / "other")
