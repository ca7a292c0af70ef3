"""The command line of `diffusionvmr convert`; what it writes is tested in `tests/data/test_conversion.py`."""

import subprocess
import sys

import pytest

from modeling_diffusionvmr.cli import main

REQUIRED = ["--annotations", ".", "--video_features", "clip", "--text_features", "text"]
HELP = """
import sys
import diffusionvmr_command
sys.argv = ["diffusionvmr", "convert", "--help"]
try:
    diffusionvmr_command.main()
finally:
    print([name for name in ("torch", "transformers", "datasets", "numpy") if name in sys.modules])
"""


def test_help_loads_no_library():
    result = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: diffusionvmr convert") and result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["youcook", "output", *REQUIRED], "argument benchmark: invalid choice: 'youcook'"),
        (["tacos", *REQUIRED], "required: output"),
        (["tacos", "output", *REQUIRED[:-2]], "required: --text_features"),
        (["tacos", "output", *REQUIRED, "--clip_seconds", "two"], "--clip_seconds: invalid float value: 'two'"),
        (["tacos", "output", *REQUIRED, "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["tacos", "output", *REQUIRED, "--split", "val"], "unrecognized arguments: --split val"),
    ],
)
def test_rejected_arguments(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        main(["convert", *arguments])
    said = capsys.readouterr()
    assert error.value.code == 2 and not said.out
    assert message in said.err and said.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_missing_release(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        main(["convert", "tacos", "output", *REQUIRED])
    assert error.value.code == "error: .: no train.json, the train split of TACoS"
    assert not list(tmp_path.iterdir())
