"""`scripts/make_space.py`: the folder runs without the package being installed."""

import http.client
import os
import re
import socket
import subprocess
import sys

import pytest
import yaml

import make_space as script


@pytest.fixture
def space(tmp_path):
    script.main(script.parse_arguments([str(tmp_path / "space"), "--model", "embedded"]))
    return tmp_path / "space"


def test_files(space):
    header = yaml.safe_load((space / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert header["sdk"] == "gradio" and header["app_file"] == "app.py"
    assert len(header["short_description"]) <= 60  # the Hub's limit
    requirements = (space / "requirements.txt").read_text().split()
    assert any(line.startswith("transformers") for line in requirements) and "torch" in requirements
    assert not any(re.match("gradio|datasets|pytest|modeling", line) for line in requirements)
    assert not list(space.rglob("__pycache__"))


def test_not_into_a_folder_with_files(space):
    with pytest.raises(ValueError, match="not empty"):
        script.main(script.parse_arguments([str(space)]))


def test_it_runs(space):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app = (space / "app.py").read_text()
    assert '"--host", "0.0.0.0", "--port", "7860"' in app
    (space / "app.py").write_text(app.replace("7860", str(port)).replace("0.0.0.0", "127.0.0.1"))
    # Without PYTHONPATH, the folder of the script is searched first
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "app.py"], cwd=space, env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        assert any(line.startswith("Open ") for line in iter(process.stderr.readline, ""))
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", "/")
        assert connection.getresponse().status == 200
    finally:
        process.terminate()
        process.communicate()
