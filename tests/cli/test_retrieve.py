"""`diffusionvmr retrieve`, with the embedded model."""

import json
import shutil

import pytest
from PIL import Image

from modeling_diffusionvmr import DEFAULT_MODEL
from modeling_diffusionvmr.cli import main
from modeling_diffusionvmr.synthetic.rendered_world import plan_video, write_video


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "video.mp4"
    write_video(plan_video(3), path)
    return path


def retrieve(*arguments) -> None:
    main(["retrieve", *map(str, arguments)])


def error_of(*arguments) -> str:
    """Run the command with bad input and return the one line that Python then prints."""
    with pytest.raises(SystemExit) as end:
        retrieve(*arguments)
    assert end.value.code.startswith("error: ") and "\n" not in end.value.code
    return end.value.code


def test_retrieve(video, tmp_path, capsys):
    queries = ["a red circle", "two yellow triangles"]
    retrieve(video, *queries, "--json", "--top_k", 2, "--plot", tmp_path / "out.png")
    found = json.loads(capsys.readouterr().out)
    assert [entry["query"] for entry in found] == queries
    assert all(len(entry["moments"]) == 2 for entry in found)
    assert Image.open(tmp_path / "out.png").width > 300


@pytest.mark.parametrize(("name", "content"), [("absent.mp4", None), ("text.mp4", b"not a video")])
def test_retrieve_from_what_is_not_a_video(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert name in error_of(tmp_path / name, "a red circle", "--plot", tmp_path / "out.png")
    assert not list(tmp_path.glob("*.png"))


def test_retrieve_with_weights_that_are_cut_off(video, tmp_path):
    shutil.copytree(DEFAULT_MODEL, tmp_path / "model")
    with open(tmp_path / "model" / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    assert str(tmp_path / "model") in error_of(video, "a red circle", "--model", tmp_path / "model")
