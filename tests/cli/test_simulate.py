"""`diffusionvmr simulate`: the files that it writes. Their content is tested in tests/synthetic/."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from modeling_diffusionvmr.cli import main
from modeling_diffusionvmr.data import hub
from modeling_diffusionvmr.data.features import open_features
from modeling_diffusionvmr.data.files import save_jsonl
from modeling_diffusionvmr.synthetic import simulated_folder
from modeling_diffusionvmr.synthetic.simulated_features import CLIP_SIZE, NOISE_LEVELS, NoiseLevel, SimulatedFeatures
from modeling_diffusionvmr.synthetic.simulated_folder import write_simulated_features

WORDS = ["red dog", "green guitar", "blue kitchen", "white lamp", "red bicycle", "blue mountain"]
ROWS = [
    {
        "qid": index,
        "query": f"A {WORDS[index % 6]} moves with the {WORDS[(index + 1) % 6]}",
        "vid": f"v{index}",
        "duration": 60,
        "relevant_windows": [[2 * index, 2 * index + 20]],
    }
    for index in range(12)
]


@pytest.fixture
def simulate(capsys):
    """Run the command; return what it prints to stderr."""

    def run(*arguments) -> str:
        capsys.readouterr()
        main(["simulate", *map(str, arguments)])
        return capsys.readouterr().err

    return run


@pytest.fixture
def options(tmp_path):
    """Arguments for two annotation files, 12 videos in all."""
    train, val = tmp_path / "train.jsonl", tmp_path / "val.jsonl"
    save_jsonl(ROWS[:8], train)
    save_jsonl(ROWS[8:12], val)
    return ["--annotations", train, val, "--seed", 3, "--noise", "easy", "--size", 32, "--motion_size", 40]


def test_says_what_to_train_on(tmp_path, simulate, options):
    """A second video backbone only if there is one."""
    folder = tmp_path / "features"
    printed = simulate(*options, "--output_dir", folder)
    text = f"--text_features {folder}/clip_text\n"
    assert printed.endswith(f"train on them with --video_features {folder}/slowfast {folder}/clip {text}")
    printed = simulate(*options[:-2], "--output_dir", folder)
    assert printed.endswith(f"train on them with --video_features {folder}/clip {text}")


def test_training_on_a_backbone_that_was_not_simulated(tmp_path, simulate, options, error_of, monkeypatch):
    """A relative path of two parts looks like the id of a dataset on the Hub, which must not be asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("the Hub was asked"))
    simulate(*options[:-2], "--output_dir", "simulated")
    features = ["--video_features", "simulated/slowfast", "simulated/clip", "--text_features", "simulated/clip_text"]
    for command in ("train", "evaluate"):
        line = error_of(command, "--annotations", options[1], *features, "--output_dir", tmp_path / "output")
        assert line == (
            "error: simulated/slowfast: no such file or folder of features; simulated contains clip, clip_text, "
            "simulation.json"
        )
    line = error_of("train", "--annotations", "simulated/none", *features, "--output_dir", tmp_path / "output")
    assert line == "error: simulated/none: no such annotation file or folder"


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_files(tmp_path, simulate, options, error_of):
    for name, workers in (("one", 1), ("two", 2)):
        printed = simulate(*options, "--output_dir", tmp_path / name, "--workers", workers)
        assert "wrote 36 files, skipped 0" in printed and "simulating: 100%" in printed
    made = contents(tmp_path / "one")
    assert made == contents(tmp_path / "two") and len(made) == 39

    simulation = SimulatedFeatures(ROWS[:12], 3, "easy", size=32)
    clips, text, motion = (open_features(tmp_path / "one" / name) for name in ("clip", "clip_text", "slowfast"))
    assert set(clips) == set(motion) == {f"v{i}" for i in range(12)} and set(text) == {str(i) for i in range(12)}
    np.testing.assert_array_equal(clips["v5"], simulation.video("v5"))
    np.testing.assert_array_equal(text[5], simulation.text(5))
    np.testing.assert_array_equal(motion["v5"], simulation.video("v5", "slowfast", 40))
    with np.load(tmp_path / "one" / "clip_text" / "qid5.npz") as file:
        assert file.files == ["last_hidden_state"]
    settings = json.loads(made["simulation.json"])
    assert settings["simulated"] is True and settings["noise"] == "easy" and settings["seed"] == 3
    assert clips.clip_seconds == motion.clip_seconds == 2.0

    # Missing and damaged files are written again, all others are left alone
    (tmp_path / "one" / "clip" / "v2.npz").unlink()
    (tmp_path / "one" / "clip_text" / "qid2.npz").write_bytes(made["clip_text/qid2.npz"][:100])
    assert "wrote 2 files, skipped 34" in simulate(*options, "--output_dir", tmp_path / "one")
    assert contents(tmp_path / "one") == made
    error = error_of("simulate", *options, "--output_dir", tmp_path / "one", "--seed", 4)
    assert "made with other settings" in error
    assert contents(tmp_path / "one") == made


def test_workers_do_not_change_the_environment(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    before = dict(os.environ)
    with simulated_folder._one_thread_each():
        assert os.environ["OMP_NUM_THREADS"] == os.environ["MKL_NUM_THREADS"] == "1"
    assert dict(os.environ) == before


def test_workers_do_not_hear_interrupts():
    code = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    with simulated_folder._blocked(signal.SIGINT):
        inside = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    outside = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert (inside, outside) == ("True\n", "False\n")


def test_flags_list_the_noise_levels_and_the_size_of_the_library():
    from modeling_diffusionvmr.cli import simulate

    assert simulate.NOISE_LEVELS == tuple(NOISE_LEVELS) and simulate.CLIP_SIZE == CLIP_SIZE


def test_noise_level_without_a_name(tmp_path):
    level = NoiseLevel(**{**vars(NOISE_LEVELS["easy"]), "hidden": 0.1})
    write_simulated_features(SimulatedFeatures(ROWS[:2], 0, level, size=8), tmp_path)
    settings = json.loads((tmp_path / "simulation.json").read_text())
    assert settings["noise"] is None and settings["noise_level"]["hidden"] == 0.1


def test_damaged_settings(tmp_path, options, error_of):
    (tmp_path / "out").mkdir()
    for text in ("{", "[]"):
        (tmp_path / "out" / "simulation.json").write_text(text)
        assert "simulation.json: " in error_of("simulate", *options, "--output_dir", tmp_path / "out")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{tmp}/train.jsonl", "{tmp}/train.jsonl"], "`qid` 0 is used twice"),
        (["{tmp}/train.jsonl", "--workers", "0"], "--workers must be a number above 0, got 0"),
        (["{tmp}/train.jsonl", "--workers", "-1"], "--workers must be a number above 0, got -1"),
        (["{tmp}/train.jsonl", "--motion_size", "0"], "--motion_size must be a number above 0, got 0"),
        (["{tmp}/train.jsonl", "--size", "0"], "size"),
        (["{tmp}/train.jsonl", "--size", "-5"], "size"),
        (["{tmp}/train.jsonl", "--size", "100000000000000000"], "not enough memory"),
        (["{tmp}/train.jsonl", "--clip_seconds", "nan"], "clip_seconds"),
        (["{tmp}/train.jsonl", "--clip_seconds", "0"], "clip_seconds"),
        (["{tmp}/nowhere.jsonl"], "nowhere.jsonl"),
        (["{tmp}"], "{tmp}"),
        (["{tmp}/train.jsonl", "--output_dir", "{tmp}/val.jsonl"], "val.jsonl"),
        (["{tmp}/train.jsonl", "--output_dir", "{tmp}/val.jsonl/below"], "val.jsonl"),
    ],
)
def test_bad_arguments(tmp_path, options, error_of, arguments, message):
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    error = error_of("simulate", "--output_dir", tmp_path / "out", "--annotations", *arguments)
    assert message.format(tmp=tmp_path) in error
    assert not (tmp_path / "out").exists()


def test_vid_that_cannot_be_a_file_name(tmp_path, error_of):
    save_jsonl([{**ROWS[0], "vid": "../v"}], tmp_path / "rows.jsonl")
    error = error_of("simulate", "--annotations", tmp_path / "rows.jsonl", "--output_dir", tmp_path / "out")
    assert "../v" in error
    assert not list(tmp_path.glob("*.npz"))
