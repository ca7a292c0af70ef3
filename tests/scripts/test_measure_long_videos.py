"""`scripts/measure_long_videos.py`, in small."""

import re
from itertools import pairwise

import av
import numpy as np
import pytest

import measure_long_videos as script
from modeling_diffusionvmr.synthetic.rendered_world import clip_frames, render_frame
from modeling_diffusionvmr.video import open_video


def table(printed: str) -> list[list[str]]:
    """Return the cells of the rows of the Markdown table in what was printed."""
    lines = [line for line in printed.splitlines() if line.startswith("| ") and "---" not in line]
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]


def test_curve(tmp_path, capsys):
    options = ["--part", "curve", "--videos", "2", "1", "0", "0", "--plot", str(tmp_path / "curve.png")]
    script.main(script.parse_arguments(options))
    header, short, long = table(capsys.readouterr().out)
    assert header[3:5] == ["R1@0.5, windows", "in another scene, windows"]
    assert short[:2] == ["one scene", "2"] and long[:2] == ["10 min", "1"]
    # A video of one scene is searched in one pass, and has no other scene
    assert float(short[3]) == float(short[5]) > 50 and short[4] == short[6] == "0.0"
    assert float(long[3]) > float(long[5])
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_frames_are_those_that_the_pipeline_reads_of_a_file(tmp_path):
    plan = script.draw_plan(0, 0.0)
    frames, rate = clip_frames(plan, 2.0)
    video = open_video((frames, rate), 2.0)
    assert video.num_clips == len(frames) and all(np.array_equal(a, b) for a, b in zip(video, frames))
    assert np.array_equal(frames[3], render_frame(plan, 6.8))


def test_memory(capsys):
    options = ["--part", "memory", "--files", "10 s", "--sentences", "2", "--fps", "2", "--size", "64", "48"]
    script.main(script.parse_arguments(options))
    header, one, two = table(capsys.readouterr().out)
    assert header[:2] == ["file", "sentences"] and [one[:2], two[:2]] == [["10 s", "1"], ["10 s", "2"]]
    assert float(one[5]) > 100 and one[6] == "0"


def test_repeated_file(tmp_path):
    script.write_file(tmp_path / "video.mp4", 30, 5, (64, 48))
    with av.open(str(tmp_path / "video.mp4")) as container:
        times = [frame.time for frame in container.decode(video=0)]
        assert container.duration == 30 * av.time_base
    assert len(times) == 150 and all(b - a == pytest.approx(0.2) for a, b in pairwise(times))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--videos", "1", "2"], "--videos must be 4 numbers"),
        (["--sentences", "0"], "--sentences must be between 1 and 100, got 0"),
        (["--fps", "0"], "--fps and --size must be at least 1"),
        (["--plot", "curve.nothing"], "--plot curve.nothing: the extension must be one of"),
        (["--model", "no/such/model"], "no/such/model: not a local folder or a valid Hub id"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        script.main(script.parse_arguments(options))
