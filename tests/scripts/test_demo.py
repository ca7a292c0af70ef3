"""`scripts/demo.py`, in full."""

import pytest

import demo


def test_demo(tmp_path, capsys):
    demo.main(demo.parse_arguments(["--output_dir", str(tmp_path / "pictures")]))
    printed = capsys.readouterr().out
    assert printed.count("true: ") == 3 == printed.count("retrieved: ")
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"video.mp4", "timeline.png", "refinement.png"}


def test_bad_input(tmp_path, capsys):
    with pytest.raises(ValueError, match="--seed must be at least 0, got -1"):
        demo.main(demo.parse_arguments(["--output_dir", str(tmp_path / "pictures"), "--seed", "-1"]))
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        demo.parse_arguments(["--seeed", "1"])
    assert capsys.readouterr().err == (
        "error: unrecognized arguments: --seeed 1 (`python scripts/demo.py --help` lists all arguments)\n"
    )
