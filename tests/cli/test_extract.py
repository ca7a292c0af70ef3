"""`scripts/extract_features.py` and `extraction.py`, on rendered videos and with the embedded CLIP."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import pipeline

from modeling_diffusionvmr import (
    DEFAULT_MODEL,
    MomentRetrievalDataset,
    load_annotations,
    open_features,
    predict_moments,
)
from modeling_diffusionvmr.data.features import METADATA_FILE, TEXT_KEY, VIDEO_KEY
from modeling_diffusionvmr.data.files import save_jsonl
from modeling_diffusionvmr.synthetic.rendered_world import annotation_rows, plan_video, write_video

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
CLIP = os.path.join(DEFAULT_MODEL, "clip")
SEEDS = (66_000_056, 66_000_006)  # short videos, about 30 s


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of rendered videos, and the file and the rows of their annotations. Nothing may write there."""
    folder = tmp_path_factory.mktemp("world")
    plans = [plan_video(seed) for seed in SEEDS]
    (folder / "videos").mkdir()
    for plan in plans:
        write_video(plan, folder / "videos" / f"{plan.vid}.mp4")
    rows = [row for plan in plans for row in annotation_rows(plan)]
    save_jsonl(rows, folder / "rows.jsonl")
    return SimpleNamespace(
        videos=folder / "videos", annotations=folder / "rows.jsonl", rows=rows, vids=[plan.vid for plan in plans]
    )


@pytest.fixture
def extract(monkeypatch, tmp_path):
    """Runs the command in this process, with the embedded CLIP, into the folder that it returns."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import extract_features as script

    def run(*arguments, backbone=CLIP) -> Path:
        output = tmp_path / "output"
        script.main(script.parse_arguments([str(output), "--backbone", backbone, *map(str, arguments)]))
        return output

    return run


@pytest.fixture(scope="module")
def retrieve():
    return pipeline("video-moment-retrieval", model=DEFAULT_MODEL)


def copied(world, folder: Path) -> Path:
    """The videos in a folder that a test may change."""
    return Path(shutil.copytree(world.videos, folder))


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npz")}


# What is written


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_features_are_those_of_the_pipeline(world, extract, retrieve, monkeypatch, dtype):
    used = {"video": [], "text": []}
    prepare_video, prepare_text = retrieve.processor.prepare_video, retrieve.processor.prepare_text
    monkeypatch.setattr(retrieve.processor, "prepare_video", lambda a: used["video"].append(a[0]) or prepare_video(a))
    monkeypatch.setattr(retrieve.processor, "prepare_text", lambda a: used["text"].append(a) or prepare_text(a))
    for vid in world.vids:
        retrieve(world.videos / f"{vid}.mp4", [row["query"] for row in world.rows if row["vid"] == vid])

    output = extract("--videos", world.videos, "--annotations", world.annotations, "--dtype", dtype)
    expected = {f"clip/{vid}.npz": (VIDEO_KEY, array) for vid, array in zip(world.vids, used["video"])}
    for row, array in zip(world.rows, used["text"]):
        expected[f"clip_text/qid{row['qid']}.npz"] = (TEXT_KEY, array)
    assert {str(path.relative_to(output)) for path in output.rglob("*.npz")} == expected.keys()
    for name, (key, array) in expected.items():
        with np.load(output / name) as file:
            assert file.files == [key] and file[key].dtype == dtype
            np.testing.assert_allclose(file[key], array, rtol=np.finfo(dtype).eps, atol=1e-5)


def test_the_whole_road(world, extract, retrieve):
    """Files of features lead to the moments that the pipeline finds in the videos."""
    output = extract("--videos", world.videos, "--annotations", world.annotations, "--dtype", "float32")
    video_features = open_features(output / "clip")
    dataset = MomentRetrievalDataset(
        load_annotations(world.annotations),
        video_features,
        open_features(output / "clip_text"),
        retrieve.processor,
        clip_seconds=video_features.clip_seconds,
    )
    for prediction in predict_moments(retrieve.model, dataset, progress=False):
        moments = retrieve(world.videos / f"{prediction['vid']}.mp4", prediction["query"])
        windows = [[moment["start"], moment["end"], moment["score"]] for moment in moments]
        np.testing.assert_allclose(prediction["pred_relevant_windows"], windows, atol=1e-3)


def test_what_is_said_beside_the_features(world, extract):
    output = extract(
        "--videos", world.videos, "--annotations", world.annotations, "--clip_seconds", 1, "--name", "tiny"
    )
    assert json.loads((output / "tiny" / METADATA_FILE).read_text()) == {
        "backbone": CLIP,
        "clip_seconds": 1.0,
        "dtype": "float16",
    }
    assert json.loads((output / "tiny_text" / METADATA_FILE).read_text()) == {"backbone": CLIP, "dtype": "float16"}
    features = open_features(output / "tiny")
    assert features.clip_seconds == 1.0
    assert len(features[world.vids[0]]) == 30  # plan_video(SEEDS[0]) is 30 s long


# What is extracted


def test_videos_alone_and_sentences_alone(world, extract, capsys):
    output = extract("--videos", world.videos, "--batch_size", 3)
    assert sorted(open_features(output / "clip")) == sorted(world.vids)
    assert not (output / "clip_text").exists()
    assert f"{output / 'clip'}: 2 of 2 videos" in capsys.readouterr().out
    extract("--annotations", world.annotations, "--name", "other")
    assert sorted(open_features(output / "other_text")) == sorted(row["qid"] for row in world.rows)
    assert not (output / "other").exists()


def test_only_annotated_videos(world, extract, tmp_path, capsys):
    videos = copied(world, tmp_path / "videos")
    (videos / "not_annotated.mp4").write_bytes(b"broken, and nobody asks for it")
    (videos / "notes.txt").touch()
    (videos / ".hidden.mp4").touch()
    output = extract("--videos", videos, "--annotations", world.annotations)
    assert sorted(open_features(output / "clip")) == sorted(world.vids)
    assert f"{videos}: taken for no videos, by their names: notes.txt" in capsys.readouterr().err


def test_annotated_videos_that_are_missing(world, extract, tmp_path, capsys):
    videos = copied(world, tmp_path / "videos")
    (videos / f"{world.vids[0]}.mp4").unlink()
    arguments = ("--videos", videos, "--annotations", world.annotations)
    with pytest.raises(ValueError, match=f"1 of the 2 annotated videos are not there: {world.vids[0]}$"):
        extract(*arguments)
    output = extract(*arguments, "--skip_invalid")
    assert list(open_features(output / "clip")) == world.vids[1:]
    said = capsys.readouterr()
    assert f"{output / 'clip'}: 1 of 2 videos" in said.out
    assert f"skipped 1 of 2 videos:\n  {world.vids[0]}: there is no such file in {videos}\n" in said.err


def test_broken_video(world, extract, tmp_path, capsys):
    videos = copied(world, tmp_path / "videos")
    broken = videos / f"{world.vids[0]}.mp4"
    with open(broken, "r+b") as file:
        file.truncate(broken.stat().st_size // 2)
    with pytest.raises(ValueError, match=f"^{broken}: "):
        extract("--videos", videos)
    output = extract("--videos", videos, "--skip_invalid")
    assert list(open_features(output / "clip")) == world.vids[1:]
    assert f"skipped 1 of 2 videos:\n  {world.vids[0]}: {broken}: " in capsys.readouterr().err
    shutil.copy(world.videos / broken.name, broken)
    extract("--videos", videos)
    assert sorted(open_features(output / "clip")) == sorted(world.vids)


def test_two_files_of_one_video(world, extract, tmp_path):
    videos = copied(world, tmp_path / "videos")
    shutil.copy(videos / f"{world.vids[0]}.mp4", videos / f"{world.vids[0]}.MKV")
    with pytest.raises(ValueError, match=f"both {world.vids[0]}.MKV and {world.vids[0]}.mp4 would be the video"):
        extract("--videos", videos, "--skip_invalid")


# A run that is continued


def test_what_is_there_is_kept(world, extract):
    arguments = ("--videos", world.videos, "--annotations", world.annotations)
    output = extract(*arguments)
    clip, text = output / "clip", output / "clip_text"
    before = {**times(clip), **times(text)}
    contents = {name: (clip / name).read_bytes() for name in times(clip)}
    cut, absent, sentence = f"{world.vids[0]}.npz", f"{world.vids[1]}.npz", f"qid{world.rows[0]['qid']}.npz"
    (clip / cut).write_bytes(contents[cut][:1000])
    (clip / absent).unlink()
    (text / sentence).write_bytes(b"")
    extract(*arguments)
    after = {**times(clip), **times(text)}
    assert {name for name in before if before[name] != after[name]} == {cut, absent, sentence}
    assert {name: (clip / name).read_bytes() for name in times(clip)} == contents
    open_features(text)[world.rows[0]["qid"]]


def test_features_of_another_making(world, extract):
    arguments = ("--annotations", world.annotations)
    output = extract("--videos", world.videos, *arguments, backbone=CLIP + os.sep)
    with pytest.raises(ValueError, match=r"clip: holds features of clip_seconds 2\.0, these would be of 1\.0;"):
        extract("--videos", world.videos, "--clip_seconds", 1)
    with pytest.raises(ValueError, match="clip_text: holds features of dtype 'float16', these would be of 'float32'"):
        extract(*arguments, "--dtype", "float32")
    extract(*arguments, "--clip_seconds", 1)  # sentences have none
    metadata = output / "clip_text" / METADATA_FILE
    metadata.write_text("no JSON")
    with pytest.raises(ValueError, match=METADATA_FILE):
        extract(*arguments)
    metadata.unlink()
    with pytest.raises(ValueError, match=f"clip_text: holds features without a {METADATA_FILE}"):
        extract(*arguments)


# What cannot be done


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "nothing to extract: give --videos, --annotations, or both"),
        (["--videos", "absent"], "absent"),
        (["--annotations", "absent.jsonl"], "absent.jsonl"),
        (["--videos", SCRIPTS], "there are no videos; their names end in one of .avi"),
        (["--videos", ".", "--clip_seconds", "nan"], "--clip_seconds must be a positive number, got nan"),
        (["--videos", ".", "--batch_size", 0], "--batch_size must be at least 1, got 0"),
    ],
)
def test_arguments_that_are_wrong(extract, tmp_path, arguments, message):
    with pytest.raises((ValueError, OSError), match=message):
        extract(*arguments)
    assert not (tmp_path / "output").exists()


def test_device_that_is_not_there(world, extract):
    with pytest.raises(ValueError, match="--device nonsense cannot be used"):
        extract("--annotations", world.annotations, "--device", "nonsense")


def test_backbones_that_cannot_be_loaded(world, extract, tmp_path):
    with pytest.raises(ValueError, match="its type is diffusionvmr; backbones are of clip"):
        extract("--annotations", world.annotations, backbone=DEFAULT_MODEL)
    shutil.copytree(CLIP, tmp_path / "clip")
    with open(tmp_path / "clip" / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match="clip: its weights are broken or cut off"):
        extract("--annotations", world.annotations, backbone=str(tmp_path / "clip"))


def test_a_person_sees_one_line(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "text.mp4").write_bytes(b"no video")
    command = [sys.executable, SCRIPTS / "extract_features.py", "output", "--videos", "videos", "--backbone", CLIP]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    last = result.stderr.splitlines()[-1]
    assert result.returncode == 1 and last.startswith(f"error: {Path('videos') / 'text.mp4'}: ")
    assert "Traceback" not in result.stderr
