"""The help of every script, run as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.mark.parametrize("script", sorted(p.name for p in SCRIPTS.glob("*.py") if "__main__" in p.read_text()))
def test_help(script, tmp_path):
    command = [sys.executable, SCRIPTS / script, "--help"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0 and result.stdout.startswith("usage:")
