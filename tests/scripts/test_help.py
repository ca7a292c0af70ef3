"""The help of every script, run as a user runs it."""

import runpy
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.mark.parametrize("script", sorted(p.name for p in SCRIPTS.glob("*.py") if "__main__" in p.read_text()))
def test_help(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPTS / script), "--help"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    assert exit.value.code == 0 and capsys.readouterr().out.startswith("usage:")
