"""`diffusionvmr extract` and `data/extraction.py`, on rendered videos and with the embedded CLIP."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from threading import Thread
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
from modeling_diffusionvmr.backbones import BACKBONE_CLASSES
from modeling_diffusionvmr.cli import main
from modeling_diffusionvmr.cli.processes import Process
from modeling_diffusionvmr.data.extraction import find_videos, share_of_videos
from modeling_diffusionvmr.data.features import METADATA_FILE, TEXT_KEY, VIDEO_KEY, write_features
from modeling_diffusionvmr.data.files import save_jsonl
from modeling_diffusionvmr.dual_encoders import ClipBackbone
from modeling_diffusionvmr.slowfast import SlowFastBackbone
from modeling_diffusionvmr.synthetic.rendered_world import annotation_rows, plan_video, write_video
from modeling_diffusionvmr.training.prediction import every_proposal
from small_slowfast import tiny_slowfast

CLIP = os.path.join(DEFAULT_MODEL, "clip")
SEEDS = (66_000_056, 66_000_006)  # short videos, about 30 s


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of rendered videos, and the file and the rows of their annotations. Tests must not change it."""
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
def argv(tmp_path):
    """The arguments of a command that uses the embedded CLIP and writes to `tmp_path / "output"`."""

    def make(*arguments, backbone=CLIP) -> list[str]:
        backbones = [str(backbone)] if isinstance(backbone, (str, Path)) else list(map(str, backbone))
        return ["extract", str(tmp_path / "output"), "--backbone", *backbones, *map(str, arguments)]

    return make


@pytest.fixture
def extract(argv, tmp_path):
    """Run the command; return its output folder."""

    def run(*arguments, **options) -> Path:
        main(argv(*arguments, **options))
        return tmp_path / "output"

    return run


@pytest.fixture
def extract_error(argv, error_of):
    """Run a command that must fail; return its error."""
    return lambda *arguments, **options: error_of(*argv(*arguments, **options))


@pytest.fixture(scope="module")
def retrieve():
    """The embedded model, returning every proposal as `predict_moments` does."""
    retrieve = pipeline("video-moment-retrieval", model=DEFAULT_MODEL)
    retrieve.processor = every_proposal(retrieve.processor)
    return retrieve


@pytest.fixture
def slowfast(tmp_path, monkeypatch) -> Path:
    """A tiny random SlowFast, which reads no sentences."""
    monkeypatch.setitem(BACKBONE_CLASSES, "slowfast", SlowFastBackbone)
    SlowFastBackbone(tiny_slowfast()).save_pretrained(tmp_path / "tiny_slowfast")
    return tmp_path / "tiny_slowfast"


def contents(folder: Path) -> dict[str, bytes]:
    """The content of all files, hidden ones too, by their path in the folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copied(world, folder: Path) -> Path:
    """A copy of the videos that a test may change."""
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
            assert file.files == [key, *(["sentence"] if key == TEXT_KEY else [])] and file[key].dtype == dtype
            np.testing.assert_allclose(file[key], array, rtol=np.finfo(dtype).eps, atol=1e-5)


def test_moments_are_those_of_the_pipeline(world, extract, retrieve):
    """The written features lead to the moments that the pipeline finds in the videos."""
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


def test_metadata_beside_the_features(world, extract):
    output = extract(
        "--videos", world.videos, "--annotations", world.annotations, "--clip_seconds", 1, "--name", "tiny"
    )
    made_with = {"backbone": CLIP, "backbone_class": "ClipBackbone", "dtype": "float16"}
    assert json.loads((output / "tiny" / METADATA_FILE).read_text()) == {**made_with, "clip_seconds": 1.0}
    assert json.loads((output / "tiny_text" / METADATA_FILE).read_text()) == made_with
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
    (videos / "not_annotated.mp4").write_bytes(b"damaged, and nobody asks for it")
    (videos / "notes.txt").touch()
    (videos / ".hidden.mp4").touch()
    output = extract("--videos", videos, "--annotations", world.annotations)
    assert sorted(open_features(output / "clip")) == sorted(world.vids)
    assert f"{videos}: ignored (not video files): notes.txt" in capsys.readouterr().err


def test_names_in_another_unicode_normalization(world, extract, tmp_path):
    (tmp_path / "videos").mkdir()
    shutil.copy(world.videos / f"{world.vids[0]}.mp4", tmp_path / "videos" / "caf\u00e9.mp4")
    save_jsonl([{**world.rows[0], "vid": "cafe\u0301"}], tmp_path / "rows.jsonl")
    output = extract("--videos", tmp_path / "videos", "--annotations", tmp_path / "rows.jsonl")
    assert [*open_features(output / "clip")] == ["cafe\u0301"]


def test_annotated_videos_that_are_missing(world, extract, extract_error, tmp_path, capsys):
    videos = copied(world, tmp_path / "videos")
    (videos / f"{world.vids[0]}.mp4").unlink()
    arguments = ("--videos", videos, "--annotations", world.annotations)
    assert extract_error(*arguments).endswith(
        f"1 of 2 annotated videos are missing: {world.vids[0]} (a vid is a file name without its extension)"
    )
    output = extract(*arguments, "--skip_invalid")
    assert list(open_features(output / "clip")) == world.vids[1:]
    said = capsys.readouterr()
    assert f"{output / 'clip'}: 1 of 2 videos" in said.out
    assert f"skipped 1 of 2 videos:\n  {world.vids[0]}: no such file in {videos}\n" in said.err


def test_damaged_video(world, extract, extract_error, tmp_path, capsys):
    videos = copied(world, tmp_path / "videos")
    damaged = videos / f"{world.vids[0]}.mp4"
    with open(damaged, "r+b") as file:
        file.truncate(damaged.stat().st_size // 2)
    assert extract_error("--videos", videos).startswith("error: 1 videos or sentences could not be encoded, as listed")
    listed = f"skipped 1 of 2 videos:\n  {world.vids[0]}: {damaged}: "
    assert listed in capsys.readouterr().err
    output = extract("--videos", videos, "--skip_invalid")
    assert list(open_features(output / "clip")) == world.vids[1:]
    assert listed in capsys.readouterr().err
    shutil.copy(world.videos / damaged.name, damaged)
    extract("--videos", videos)
    assert sorted(open_features(output / "clip")) == sorted(world.vids)


def test_fault_of_a_backbone(world, extract_error, monkeypatch):
    """It is not a damaged video, which `--skip_invalid` would skip."""

    def encode_clips(self, inputs):
        raise ValueError("a fault of the backbone")

    monkeypatch.setattr(ClipBackbone, "encode_clips", encode_clips)
    assert extract_error("--videos", world.videos, "--skip_invalid") == "error: a fault of the backbone"


def test_two_files_of_one_video(world, extract_error, tmp_path):
    videos = copied(world, tmp_path / "videos")
    shutil.copy(videos / f"{world.vids[0]}.mp4", videos / f"{world.vids[0]}.MKV")
    error = extract_error("--videos", videos, "--skip_invalid")
    assert f"{world.vids[0]}.MKV and {world.vids[0]}.mp4 are both video {world.vids[0]}" in error


# Several backbones


def test_several_backbones(world, extract, slowfast, capsys):
    output = extract("--videos", world.videos, "--annotations", world.annotations, backbone=(slowfast, CLIP))
    folders = {path.name: sorted(file.stem for file in path.glob("*.npz")) for path in output.iterdir()}
    qids = sorted(f"qid{row['qid']}" for row in world.rows)
    assert folders == {"slowfast": sorted(world.vids), "clip": sorted(world.vids), "clip_text": qids}
    assert f"{output / 'slowfast'}, {output / 'clip'}: 2 of 2 videos" in capsys.readouterr().out
    assert json.loads((output / "slowfast" / METADATA_FILE).read_text())["backbone"] == str(slowfast)
    alone = extract("--videos", world.videos, "--name", "alone")
    for vid in world.vids:
        assert (alone / "clip" / f"{vid}.npz").read_bytes() == (alone / "alone" / f"{vid}.npz").read_bytes()


def test_names_of_several_backbones(world, extract, extract_error):
    twice = (CLIP, CLIP)
    arguments = ("--annotations", world.annotations)
    error = extract_error(*arguments, backbone=twice)
    assert error == "error: two backbones would write to the folder clip; name each of them with --name"
    error = extract_error(*arguments, "--name", "one", backbone=twice)
    assert error == "error: --name needs one name per backbone, got 1 for 2"
    error = extract_error(*arguments, "--name", "a", "a_text", backbone=twice)
    assert "two backbones would write to the folder a_text" in error
    output = extract(*arguments, "--name", "one", "two", backbone=twice)
    assert sorted(path.name for path in output.iterdir()) == ["one_text", "two_text"]


def test_names_of_the_backbones_of_a_model(world, tmp_path, error_of):
    arguments = ("extract", tmp_path / "output", "--model", "embedded", "--annotations", world.annotations)
    assert "--name needs one name per backbone, got 2 for 1" in error_of(*arguments, "--name", "one", "two")
    main([*map(str, arguments), "--name", "one"])
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["one_text"]


def test_no_backbone_reads_sentences(world, extract, extract_error, slowfast, capsys):
    message = "no sentences are encoded, since none of the backbones reads them: slowfast"
    assert extract_error("--annotations", world.annotations, backbone=slowfast) == f"error: {message}"
    output = extract("--annotations", world.annotations, "--videos", world.videos, backbone=slowfast)
    assert [path.name for path in output.iterdir()] == ["slowfast"]
    assert f"warning: {message}\n" in capsys.readouterr().err


def test_max_video_seconds(world, extract, capsys):
    output = extract("--videos", world.videos, "--max_video_seconds", 5, "--skip_invalid")
    assert not list(output.rglob("*.npz"))
    assert capsys.readouterr().err.count("the limit is 5 s") == len(world.vids)


# Several processes


def test_several_processes(world, extract, argv, tmp_path, monkeypatch, capsys):
    """They write the same files as one process, and each lists its own share."""
    arguments = ("--videos", world.videos, "--annotations", world.annotations)
    output = extract(*arguments)
    expected = contents(output)
    shutil.rmtree(output)
    capsys.readouterr()
    monkeypatch.setenv("WORLD_SIZE", "3")
    shares = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        before = contents(output) if rank else {}
        extract(*arguments)
        shares.append(contents(output).keys() - before.keys())
        number = len(share_of_videos(dict.fromkeys(world.vids), rank, 3))
        assert f"process {rank + 1} of 3: {output / 'clip'}: {number} of {number} videos" in capsys.readouterr().out
    assert all(any(name.startswith("clip_text/qid") for name in share) for share in shares)
    assert contents(output) == expected

    shutil.rmtree(output / "clip_text")
    monkeypatch.setenv("WORLD_SIZE", "2")  # another number of processes resumes
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        extract(*arguments)
    assert contents(output) == expected


def test_each_missing_video_is_reported_by_one_process(world, extract, tmp_path, monkeypatch, capsys):
    """Even if it is there when another process starts."""
    videos = copied(world, tmp_path / "videos")
    vid = world.vids[0]
    (owner,) = (rank for rank in range(2) if share_of_videos({vid: None}, rank, 2))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1 - owner, owner):
        monkeypatch.setenv("RANK", str(rank))
        extract("--videos", videos, "--annotations", world.annotations, "--skip_invalid")
        assert (f"{vid}: no such file" in capsys.readouterr().err) == (rank == owner)
        (videos / f"{vid}.mp4").unlink(missing_ok=True)


@pytest.mark.parametrize("rank, world_size", [("2", "2"), ("-1", "2"), ("0", "two")])
def test_impossible_process(world, extract_error, monkeypatch, rank, world_size):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    assert f"with RANK < WORLD_SIZE, got {rank}, {world_size}, 0" in extract_error("--videos", world.videos)


def test_a_process_waits_for_the_others(monkeypatch):
    """Launchers end all processes as soon as one fails."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(listener.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    events = []

    def first():
        Process(0, 2).wait_for_others()
        events.append("the first process ends")

    thread = Thread(target=first)
    thread.start()
    thread.join(0.5)
    events.append("the second process has done its work")
    Process(1, 2).wait_for_others()
    thread.join()
    assert events == ["the second process has done its work", "the first process ends"]


def test_accelerate_launch(world, argv, tmp_path):
    """One of two processes fails, on bad videos."""
    videos = copied(world, tmp_path / "videos")
    assert share_of_videos(dict.fromkeys(world.vids), 1, 2).keys() == set(world.vids)
    of_first = share_of_videos(dict.fromkeys(f"bad_{index}" for index in range(20)), 0, 2)
    for vid in list(of_first)[:2]:
        (videos / f"{vid}.mp4").write_bytes(b"bad")
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --main_process_port 0 -m".split()
    command = [*launch, "modeling_diffusionvmr", *argv("--videos", videos, "--device", "cpu")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
    print(ended.stdout, ended.stderr)
    assert ended.returncode != 0
    assert "process 1 of 2: 2 videos or sentences could not be encoded" in ended.stderr
    assert f"process 2 of 2: {tmp_path / 'output' / 'clip'}: 2 of 2 videos" in ended.stdout
    assert sorted(open_features(tmp_path / "output" / "clip")) == sorted(world.vids)


# Resuming


def test_finished_files_are_skipped(world, extract):
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


def test_sentences_that_changed(world, extract, tmp_path, capsys):
    """They are encoded again, and so is a sentence whose file does not say what it is of."""
    changed, unknown, *same = world.rows
    output = extract("--annotations", world.annotations) / "clip_text"
    assert "replaced" not in capsys.readouterr().err
    with np.load(output / f"qid{unknown['qid']}.npz") as file:
        write_features(output, unknown["qid"], 0 * file[TEXT_KEY], TEXT_KEY)
    before = times(output)
    save_jsonl([{**changed, "query": same[0]["query"]}, unknown, *same], tmp_path / "rows.jsonl")
    extract("--annotations", tmp_path / "rows.jsonl")
    assert f"replaced features of other sentences with the same qid: {changed['qid']}\n" in capsys.readouterr().err
    after, written = times(output), {f"qid{row['qid']}.npz" for row in (changed, unknown)}
    assert {name for name in before if before[name] != after[name]} == written
    features = open_features(output)
    np.testing.assert_array_equal(features[changed["qid"]], features[same[0]["qid"]])
    assert features[unknown["qid"]].any()


def test_features_made_with_other_settings(world, extract, extract_error):
    arguments = ("--annotations", world.annotations)
    output = extract("--videos", world.videos, *arguments, backbone=CLIP + os.sep)
    error = extract_error("--videos", world.videos, "--clip_seconds", 1)
    assert "clip: contains features with clip_seconds 2.0, not 1.0;" in error
    error = extract_error(*arguments, "--dtype", "float32")
    assert "clip_text: contains features with dtype 'float16', not 'float32'" in error
    extract(*arguments, "--clip_seconds", 1)  # sentences have none
    metadata = output / "clip_text" / METADATA_FILE
    metadata.write_text("no JSON")
    assert METADATA_FILE in extract_error(*arguments)
    metadata.unlink()
    assert f"clip_text: contains features, but no {METADATA_FILE}" in extract_error(*arguments)


# Bad input


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "nothing to extract: pass --videos, --annotations, or both"),
        (["--videos", "absent"], "absent"),
        (["--videos", "file.txt"], "file.txt"),
        (["--annotations", "absent.jsonl"], "absent.jsonl"),
        (["--videos", "."], "no videos (files that end in .avi"),
        (["--videos", ".", "--clip_seconds", "nan"], "--clip_seconds must be a number above 0, got nan"),
        (["--videos", ".", "--clip_seconds", "-1"], "--clip_seconds must be a number above 0, got -1.0"),
        (["--videos", ".", "--batch_size", 0], "--batch_size must be a number above 0, got 0"),
        (["--videos", ".", "--name", "../outside"], "--name must be a folder name, got '../outside'"),
        (["--videos", ".", "--name", ""], "--name must be a folder name, got ''"),
    ],
)
def test_bad_arguments(extract_error, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").touch()
    assert message in extract_error(*arguments)
    assert not (tmp_path / "output").exists()


def test_output_that_is_a_file(world, extract_error, tmp_path):
    (tmp_path / "output").touch()
    assert "output" in extract_error("--annotations", world.annotations)
    assert (tmp_path / "output").is_file()


def test_unknown_device(world, extract_error):
    error = extract_error("--annotations", world.annotations, "--device", "nonsense")
    assert "--device nonsense cannot be used" in error


@pytest.mark.parametrize(
    "backbone, message",
    [
        (DEFAULT_MODEL, "type diffusionvmr is not supported as a backbone"),
        ("/absent", "/absent: not a local folder or a valid Hub id"),
        ("a/b/c", "a/b/c: not a local folder or a valid Hub id"),
        (__file__, f"{__file__}: a checkpoint must be a folder, not a file"),
        ("absent", "absent: "),
    ],
)
def test_not_a_backbone(world, extract_error, backbone, message):
    assert message in extract_error("--annotations", world.annotations, backbone=backbone)


def cut_off(folder):
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(1000)


@pytest.mark.parametrize(
    "damage, message",
    [
        (cut_off, "clip: weights are damaged or cut off"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json: must be a JSON object"),
        (lambda folder: (folder / "preprocessor_config.json").write_text("[]"), "preprocessor_config.json: must be a"),
    ],
    ids="cut_off list_config list_preprocessor".split(),
)
def test_damaged_backbone(world, extract_error, tmp_path, damage, message):
    shutil.copytree(CLIP, tmp_path / "clip")
    damage(tmp_path / "clip")
    assert message in extract_error("--annotations", world.annotations, backbone=tmp_path / "clip")


def test_sentence_that_cannot_be_encoded(world, extract, extract_error, tmp_path, capsys):
    rows = [world.rows[0], {**world.rows[1], "query": "a red \ud800 circle"}]
    save_jsonl(rows, tmp_path / "rows.jsonl")
    error = extract_error("--annotations", tmp_path / "rows.jsonl")
    assert re.search(r"rows\.jsonl, line 2: .*query.*UTF-8.*ud800", error)
    output = extract("--annotations", tmp_path / "rows.jsonl", "--skip_invalid")
    assert list(open_features(output / "clip_text")) == [str(rows[0]["qid"])]
    said = capsys.readouterr().err
    assert "line 2" in said and "ud800" in said


def test_file_that_is_not_a_video(extract_error, tmp_path, capsys):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "text.mp4").write_bytes(b"no video")
    extract_error("--videos", tmp_path / "videos")
    assert f"\n  text: {tmp_path / 'videos' / 'text.mp4'}: " in capsys.readouterr().err


def test_find_videos(tmp_path):
    for name in ("b.mp4", "a.MKV", "notes.txt", ".hidden.mp4"):
        (tmp_path / name).touch()
    (tmp_path / "folder.mp4").mkdir()
    videos, others = find_videos(tmp_path)
    assert list(videos.items()) == [("a", tmp_path / "a.MKV"), ("b", tmp_path / "b.mp4")]
    assert others == ["folder.mp4", "notes.txt"]
