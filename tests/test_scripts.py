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
