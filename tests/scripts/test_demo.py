"""`scripts/demo.py`, in full."""

import sys

import pytest

import demo
from modeling_diffusionvmr.cli.errors import run_safely


def test_demo(tmp_path, capsys):
    demo.main(demo.parse_arguments(["--output_dir", str(tmp_path / "pictures")]))
    printed = capsys.readouterr().out
    assert printed.count("true: ") == 3 == printed.count("retrieved: ")
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"video.mp4", "timeline.png", "refinement.png"}


def test_without_matplotlib(tmp_path, monkeypatch):
    """Which `pip install .` does not install."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "modeling_diffusionvmr.plotting", raising=False)
    with pytest.raises(SystemExit, match=r"^error: .*; install it with: pip install 'modeling_diffusionvmr\[train\]'$"):
        run_safely(demo.main, demo.parse_arguments(["--output_dir", str(tmp_path / "pictures")]))
    assert not list(tmp_path.iterdir())


def test_bad_input(tmp_path, capsys):
    with pytest.raises(ValueError, match="--seed must be at least 0, got -1"):
        demo.main(demo.parse_arguments(["--output_dir", str(tmp_path / "pictures"), "--seed", "-1"]))
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        demo.parse_arguments(["--seeed", "1"])
    assert capsys.readouterr().err == (
        "error: unrecognized arguments: --seeed 1 (`python scripts/demo.py --help` lists all arguments)\n"
    )
