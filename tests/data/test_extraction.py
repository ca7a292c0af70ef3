"""`data/extraction.py`, with tiny random backbones."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from modeling_diffusionvmr import open_features
from modeling_diffusionvmr.data import extraction
from modeling_diffusionvmr.data.extraction import Output, extract_sentences, extract_videos, share_of_videos
from modeling_diffusionvmr.slowfast import SlowFastBackbone
from modeling_diffusionvmr.video import open_video
from small_checkpoint import tiny_clip
from small_slowfast import tiny_slowfast
from test_video import write_video

CLIP_SECONDS = 2.0


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> dict[str, Path]:
    """Four videos of 5 to 11 s. Tests must not change them."""
    folder = tmp_path_factory.mktemp("videos")
    return {f"v{i}": write_video(folder / f"v{i}.mp4", np.arange(50 + 20 * i) / 10, noise=True) for i in range(4)}


@pytest.fixture
def outputs(tmp_path) -> list[Output]:
    """A CLIP and a SlowFast that write to `tmp_path`."""
    slowfast = SlowFastBackbone(tiny_slowfast())
    return [Output(tmp_path / "clip", tiny_clip(), "a/clip"), Output(tmp_path / "slowfast", slowfast, "a/slowfast")]


@pytest.fixture
def opened(monkeypatch) -> Counter:
    """Counts how often each video is opened."""
    counter = Counter()

    def counting(video, *arguments, **options):
        counter[Path(video).stem] += 1
        return open_video(video, *arguments, **options)

    monkeypatch.setattr(extraction, "open_video", counting)
    return counter


def contents(folder: Path) -> dict[str, bytes]:
    """The content of all files, hidden ones too, by their path in the folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_several_backbones_in_one_decoding(videos, outputs, opened):
    assert extract_videos(outputs, videos, CLIP_SECONDS, batch_size=3) == {}
    assert opened == dict.fromkeys(videos, 1)
    for folder, backbone, source in outputs:
        features = open_features(folder)
        assert features.backbone == source and features.keys() == videos.keys()
        for vid, path in videos.items():
            expected = backbone.encode_video(open_video(path, CLIP_SECONDS))
            np.testing.assert_allclose(features[vid], expected, atol=1e-5)


def test_a_video_finished_for_one_backbone(videos, outputs, opened, monkeypatch):
    """It is decoded again, and encoded with the other one only."""
    extract_videos(outputs, videos, CLIP_SECONDS)
    clip, slowfast = outputs
    before = contents(clip.folder.parent)
    (slowfast.folder / "v1.npz").unlink()
    (slowfast.folder / "v2.npz").write_bytes(before["slowfast/v2.npz"][:100])
    opened.clear()

    def encode_clips(inputs):
        raise AssertionError("this backbone has the features of all videos")

    monkeypatch.setattr(clip.backbone, "encode_clips", encode_clips)
    assert extract_videos(outputs, videos, CLIP_SECONDS) == {}
    assert opened == {"v1": 1, "v2": 1}
    assert contents(clip.folder.parent) == before


def test_a_bad_video_does_not_stop_the_others(videos, outputs, tmp_path):
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(videos["v0"].read_bytes()[:1000])
    failed = extract_videos(outputs, {"cut": cut, "absent": tmp_path / "absent.mp4", **videos}, CLIP_SECONDS)
    assert failed.keys() == {"cut", "absent"} and str(cut) in failed["cut"]
    assert failed["absent"] == f"{tmp_path / 'absent.mp4'}: no such file"
    for output in outputs:
        assert open_features(output.folder).keys() == videos.keys()


def test_a_video_damaged_at_its_end_does_not_stop_the_others(videos, outputs, tmp_path):
    """Its fault is found while it is decoded."""
    content = bytearray(videos["v3"].read_bytes())
    start = content.index(b"mdat") + 4
    end = start - 8 + int.from_bytes(content[start - 8 : start - 4], "big")
    content[(start + end) // 2 : end] = bytes(end - (start + end) // 2)
    (tmp_path / "damaged.mp4").write_bytes(content)
    open_video(tmp_path / "damaged.mp4", CLIP_SECONDS)
    failed = extract_videos(outputs, {"damaged": tmp_path / "damaged.mp4", **videos}, CLIP_SECONDS)
    assert failed.keys() == {"damaged"} and failed["damaged"].startswith(f"{tmp_path / 'damaged.mp4'}: ")
    for output in outputs:
        assert open_features(output.folder).keys() == videos.keys()


def test_a_sentence_that_cannot_be_encoded_does_not_stop_the_others(outputs):
    failed = extract_sentences(outputs[0], {1: "red dog", 2: " ", 3: "dog runs", "a/b": "red dog"})
    assert failed.keys() == {2, "a/b"}
    assert list(open_features(outputs[0].folder)) == ["1", "3"]


@pytest.mark.parametrize("name", ["sampling", "prepare", "encode_clips", "encode_text"])
def test_a_fault_of_a_backbone_stops_all(videos, outputs, monkeypatch, name):
    def fail(*arguments):
        raise ValueError("a fault of the backbone")

    monkeypatch.setattr(outputs[0].backbone, name, fail)
    with pytest.raises(ValueError, match="^a fault of the backbone$"):
        if name == "encode_text":
            extract_sentences(outputs[0], {1: "red dog"})
        else:
            extract_videos(outputs, videos, CLIP_SECONDS)


@pytest.mark.parametrize(
    "value, fault", [(np.nan, "contain NaN or infinity"), (1e5, "are too large for float16; choose float32")]
)
def test_features_that_are_not_finite_stop_all(videos, outputs, monkeypatch, value, fault):
    """The features that the other backbone computed of the same video are written."""
    clip, slowfast = outputs
    one = {"v0": videos["v0"]}
    encode_clips, encode_text = clip.backbone.encode_clips, clip.backbone.encode_text
    monkeypatch.setattr(clip.backbone, "encode_clips", lambda inputs: value + 0 * encode_clips(inputs))
    monkeypatch.setattr(clip.backbone, "encode_text", lambda texts: [value + 0 * encode_text(texts)[0]])
    with pytest.raises(ValueError, match=f"^{clip.folder}, {videos['v0']}: features of ClipBackbone {fault}$"):
        extract_videos(outputs, one, CLIP_SECONDS, dtype="float16")
    assert list(open_features(slowfast.folder)) == ["v0"] and not list(clip.folder.glob("*.npz"))
    with pytest.raises(ValueError, match=f"^{clip.folder}, 7: features of ClipBackbone {fault}$"):
        extract_sentences(clip, {7: "red dog"}, dtype="float16")


@pytest.mark.parametrize("order", [1, -1])
def test_one_folder_that_cannot_be_written(videos, outputs, monkeypatch, order):
    """The other backbone's features of the video are written, whichever comes first."""
    clip, slowfast = outputs
    write_features = extraction.write_features

    def write_some(folder, *arguments):
        if folder == clip.folder:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        return write_features(folder, *arguments)

    monkeypatch.setattr(extraction, "write_features", write_some)
    with pytest.raises(OSError, match="Permission denied"):
        extract_videos(outputs[::order], {"v0": videos["v0"]}, CLIP_SECONDS)
    assert list(open_features(slowfast.folder)) == ["v0"]


def test_max_video_seconds(videos, outputs):
    failed = extract_videos(outputs, videos, CLIP_SECONDS, max_video_seconds=8)
    assert failed.keys() == {"v2", "v3"} and "the limit is 8 s" in failed["v2"]


def test_full_disk_stops_all(videos, outputs, monkeypatch):
    """What is written until then is complete, and the same call resumes."""
    extract_videos(outputs, videos, CLIP_SECONDS)
    root = outputs[0].folder.parent
    expected = contents(root)
    for path in root.rglob("*.npz"):
        path.unlink()

    save, number = np.savez_compressed, count(1)

    def save_some(path, **arrays):
        if next(number) > 3:
            Path(path).write_bytes(b"cut")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(path, **arrays)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(np, "savez_compressed", save_some)
        extract_videos(outputs, videos, CLIP_SECONDS)
    written = contents(root)
    assert len(written) == 3 + len(outputs) and written.items() <= expected.items()
    assert extract_videos(outputs, videos, CLIP_SECONDS) == {}
    assert contents(root) == expected


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import numpy as np
from itertools import count
from pathlib import Path
from modeling_diffusionvmr.data.extraction import Output, extract_videos
from small_checkpoint import tiny_clip

save, number = np.savez_compressed, count(1)

def save_some(path, **arrays):
    if next(number) == 4:
        Path(path).write_bytes(b"cut")
        os.kill(os.getpid(), signal.SIGKILL)
    save(path, **arrays)

np.savez_compressed = save_some
root, *videos = map(Path, sys.argv[1:])
outputs = [Output(root / name, tiny_clip(seed), f"a/{{name}}") for seed, name in enumerate("ab")]
extract_videos(outputs, {{path.stem: path for path in videos}}, 2.0)
"""


def test_killed_while_writing(videos, tmp_path):
    tests = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", KILLED.format(tests=tests), tmp_path / "killed", *videos.values()]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    root = tmp_path / "killed"
    (root / "b" / ".v0.npz.lock").touch()  # remains if the process was killed just after it had completed this file
    assert any(path.read_bytes() == b"cut" for path in root.rglob(".*"))

    def outputs(root):
        return [Output(root / name, tiny_clip(seed), f"a/{name}") for seed, name in enumerate("ab")]

    for folder in (root, tmp_path / "whole"):
        assert extract_videos(outputs(folder), videos, CLIP_SECONDS) == {}
    killed, whole = contents(root), contents(tmp_path / "whole")
    assert killed.keys() == whole.keys() and len(whole) == 2 * (len(videos) + 1)
    for output in outputs(root):
        features, expected = open_features(output.folder), open_features(tmp_path / "whole" / output.folder.name)
        for vid in videos:
            np.testing.assert_allclose(features[vid], expected[vid], atol=1e-6)


def test_progress_counts_the_bytes_of_what_is_left(videos, outputs, monkeypatch):
    bars = []

    class Recording(extraction.tqdm):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            bars.append(self)

    monkeypatch.setattr(extraction, "tqdm", Recording)
    extract_videos(outputs, {"v0": videos["v0"]}, CLIP_SECONDS)
    extract_videos(outputs, videos, CLIP_SECONDS, batch_size=1)
    bar = bars[-1]
    assert bar.total == sum(path.stat().st_size for vid, path in videos.items() if vid != "v0")
    assert bar.total - 1 < bar.n <= bar.total


def test_shares_of_processes():
    videos = {f"v{index}": Path(f"v{index}.mp4") for index in range(3000)}
    assert share_of_videos(videos, 0, 1) == videos
    shares = [share_of_videos(videos, rank, 3) for rank in range(3)]
    assert sorted(vid for share in shares for vid in share) == sorted(videos)
    assert all(900 < len(share) < 1100 for share in shares)
    backwards = dict(reversed(videos.items()))
    assert [share_of_videos(backwards, rank, 3) for rank in range(3)] == shares


def test_shares_fit_together_while_files_change(tmp_path):
    """A file grows and another is added between the starts of two processes."""
    videos = {f"v{index}": tmp_path / f"v{index}.mp4" for index in range(10)}
    for size, path in enumerate(videos.values()):
        path.write_bytes(bytes(10 * size))
    for late in videos:
        early = {vid: path for vid, path in videos.items() if vid != late}
        share = share_of_videos(early, 0, 2)
        videos["v0"].write_bytes(bytes(100))
        other = share_of_videos(videos, 1, 2)
        videos["v0"].write_bytes(b"")
        assert (share.keys() | other.keys()) - {late} == early.keys() and not share.keys() & other.keys()


def test_shares_are_the_same_on_all_machines():
    """Python's `hash` differs between processes."""
    videos = dict.fromkeys(["a", "b", "café", "\udcff"])
    assert [list(share_of_videos(videos, rank, 2)) for rank in range(2)] == [["café"], ["a", "b", "\udcff"]]


def test_features_of_another_class(videos, outputs):
    """Somebody can register another class for the same checkpoint, which reads other frames."""
    clip, _ = outputs
    extract_videos([clip], videos, CLIP_SECONDS)

    class Other(type(clip.backbone)):
        pass

    other = Other(clip.backbone.model, clip.backbone.image_processor, clip.backbone.tokenizer)
    message = "contains features with backbone_class 'ClipBackbone', not 'Other'; choose another folder"
    with pytest.raises(ValueError, match=message):
        extract_videos([clip._replace(backbone=other)], videos, CLIP_SECONDS)
    record = json.loads((clip.folder / "features.json").read_text())
    del record["backbone_class"]  # as earlier versions wrote it
    (clip.folder / "features.json").write_text(json.dumps(record))
    assert extract_videos([clip], videos, CLIP_SECONDS) == {}
