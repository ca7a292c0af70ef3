"""`scripts/make_space.py`: the folder runs without the package being installed."""

import os
import re
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


def test_it_runs_the_command_of_its_own_package(space):
    code = (space / "app.py").read_text()
    assert '"--host", "0.0.0.0", "--port", "7860", "--model", "embedded"' in code
    code = code.replace("0.0.0.0", "192.0.2.1")  # where it cannot listen
    (space / "app.py").write_text(f"import modeling_diffusionvmr\nprint(modeling_diffusionvmr.__file__)\n{code}")
    # Without PYTHONPATH, the folder of the script is searched first
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "app.py"], cwd=space, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.stdout.strip() == str(space / "modeling_diffusionvmr" / "__init__.py")
    assert result.stderr.startswith("error: --host 192.0.2.1 --port 7860: cannot listen there")
