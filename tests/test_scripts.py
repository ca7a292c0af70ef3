"""The commands, as a person runs them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from modeling_diffusionvmr import DEFAULT_MODEL
from modeling_diffusionvmr.synthetic.rendered_world import plan_video, write_video

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def run(script: str, *arguments, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPTS / script, *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=300
    )


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "video.mp4"
    write_video(plan_video(3), path)
    return path


@pytest.mark.parametrize("script", sorted(p.name for p in SCRIPTS.glob("*.py") if "__main__" in p.read_text()))
def test_help(script, tmp_path):
    result = run(script, "--help", folder=tmp_path)
    assert result.returncode == 0 and result.stdout.startswith("usage:")


def test_retrieve(video, tmp_path):
    queries = ["a red circle", "two yellow triangles"]
    result = run("retrieve.py", video, *queries, "--json", "--top_k", 2, "--plot", "out.png", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert [entry["query"] for entry in found] == queries
    assert all(len(entry["moments"]) == 2 for entry in found)
    assert Image.open(tmp_path / "out.png").width > 300


def test_retrieve_from_what_is_no_video(tmp_path):
    for name, content in (("absent.mp4", None), ("text.mp4", b"no video")):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        result = run("retrieve.py", tmp_path / name, "a red circle", "--plot", "out.png", folder=tmp_path)
        assert result.returncode != 0
        assert result.stderr.splitlines()[-1].startswith("error: ") and name in result.stderr.splitlines()[-1]
        assert "Traceback" not in result.stderr
    assert not list(tmp_path.glob("*.png"))


def test_retrieve_with_weights_that_are_cut_off(video, tmp_path):
    shutil.copytree(DEFAULT_MODEL, tmp_path / "model")
    with open(tmp_path / "model" / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    result = run("retrieve.py", video, "a red circle", "--model", tmp_path / "model", folder=tmp_path)
    last = result.stderr.splitlines()[-1]
    assert result.returncode != 0 and last.startswith("error: ") and str(tmp_path / "model") in last


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
