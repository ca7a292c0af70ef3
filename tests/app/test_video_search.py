import itertools
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest

from modeling_diffusionvmr import video_file
from modeling_diffusionvmr.app import video_search
from modeling_diffusionvmr.app.guard import restrict_gradio
from modeling_diffusionvmr.app.video_search import VideoSearch
from modeling_diffusionvmr.presentation.timeline import frames_of
from test_video import write_video


@pytest.fixture
def search(retrieve):
    return VideoSearch(retrieve, max_video_seconds=100)


@pytest.fixture
def decodings(monkeypatch):
    """The names of the files whose pictures were decoded."""
    names = []
    decoded = video_file.VideoFile.decoded

    def spy(self, *arguments):
        names.append(self.name)
        return decoded(self, *arguments)

    monkeypatch.setattr(video_file.VideoFile, "decoded", spy)
    return names


def test_same_as_the_pipeline(search, retrieve, rendered):
    answer = search(rendered.path, [rendered.sentence, rendered.absent])
    assert answer.results == retrieve(str(rendered.path), [rendered.sentence, rendered.absent], return_saliency=True)
    assert not answer.was_known and answer.queries == [rendered.sentence, rendered.absent]


def test_frames_come_from_the_same_decoding(search, rendered, decodings):
    answer = search(rendered.path, [rendered.sentence])
    assert len(decodings) == 1
    expected = frames_of(str(rendered.path), answer.duration)
    assert len(answer.frames) == len(expected) == 12
    differences = [np.abs(a.astype(int) - b).mean() for a, b in zip(answer.frames, expected)]
    assert np.median(differences) < 5  # at most half a clip apart


def test_frames_of_a_short_video(search, tmp_path):
    answer = search(write_video(tmp_path / "a.mp4", [i / 10 for i in range(30)]), ["a"])
    assert len(answer.frames) == 12 and len(answer.results[0]["saliency"]) == 2


def test_second_search_decodes_nothing(search, rendered, decodings, tmp_path):
    """Videos are known by their content, not by their names."""
    search(rendered.path, [rendered.sentence])
    copy = shutil.copy(rendered.path, tmp_path / "copy.mp4")
    decodings.clear()
    assert search(copy, [rendered.absent]).was_known and decodings == [] and search.num_encoded == 1


def test_progress(search, tmp_path):
    shares = []
    search(write_video(tmp_path / "a.mp4", range(90), rate=1), ["a"], shares.append)
    assert len(shares) > 1 and sum(shares) == pytest.approx(1)


def test_closing_ends_searches(search, tmp_path):
    path = write_video(tmp_path / "a.mp4", range(90), rate=1)
    with pytest.raises(ValueError, match=r"^a\.mp4: not searched, because the server is stopping"):
        search(path, ["a"], lambda share: search.close())


def test_encoding_has_a_time_limit(retrieve, tmp_path, monkeypatch):
    """It also ends within a clip, which can have any number of frames. The error is not kept."""
    search = VideoSearch(retrieve, 100, max_encoding_seconds=10)
    path = write_video(tmp_path / "a.mp4", [i / 10 for i in range(19)])  # one clip
    seconds, numbers = itertools.count(), []
    monkeypatch.setattr(video_search, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    decoded = video_file.VideoFile.decoded

    def spy(self):
        for number, frame in enumerate(decoded(self)):
            numbers.append(number)
            yield frame

    monkeypatch.setattr(video_file.VideoFile, "decoded", spy)
    expected = r"^a\.mp4: reading it takes too long; the limit is 10 s \(`max_encoding_seconds`\)$"
    with pytest.raises(ValueError, match=expected):
        search(path, ["a"])
    assert max(numbers) == 10 and not search._known
    search.max_encoding_seconds = 1000
    assert len(search(path, ["a"]).frames) == 12
    for wrong in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="`max_encoding_seconds` must be above 0"):
            VideoSearch(retrieve, 100, max_encoding_seconds=wrong)


def test_one_encoding_for_several_at_once(retrieve, rendered, monkeypatch):
    search = VideoSearch(retrieve, 100, num_threads=4)
    encode, begun = search.pipeline.encode, threading.Event()

    def slowly(*arguments, **options):
        begun.set()
        time.sleep(0.2)
        return encode(*arguments, **options)

    monkeypatch.setattr(search.pipeline, "encode", slowly)
    with ThreadPoolExecutor(4) as executor:
        answers = list(executor.map(lambda _: search(rendered.path, [rendered.sentence]), range(4)))
    assert search.num_encoded == 1 and sum(not answer.was_known for answer in answers) == 1
    assert all(answer.results == answers[0].results for answer in answers)


def test_errors_are_not_shared(retrieve, tmp_path, monkeypatch):
    """Two visitors search the same broken file at once: each reads the name of their own."""
    search = VideoSearch(retrieve, 100, num_threads=2)
    paths = [tmp_path / "mine.mp4", tmp_path / "yours.mp4"]
    for path in paths:
        path.write_bytes(b"not a video")
    encode = search._encode

    def slowly(*arguments):
        time.sleep(0.3)
        return encode(*arguments)

    def error_of(path):
        with pytest.raises(ValueError) as caught:
            search(path, ["a"])
        return str(caught.value)

    monkeypatch.setattr(search, "_encode", slowly)
    with ThreadPoolExecutor(2) as executor:
        errors = list(executor.map(error_of, paths))
    assert [error.split(":")[0] for error in errors] == ["mine.mp4", "yours.mp4"]


def test_cache_is_bounded(retrieve, tmp_path):
    """The one that was not used for the longest time goes first."""
    paths = [write_video(tmp_path / f"{i}.mp4", range(i, i + 20), rate=1) for i in range(3)]
    one = VideoSearch(retrieve, 100)
    one(paths[0], ["a"])
    (future,) = one._known.values()
    search = VideoSearch(retrieve, 100, max_cache_bytes=2 * future.result().num_bytes)
    for path in (paths[0], paths[1], paths[0], paths[2]):
        search(path, ["a"])
    assert search.num_encoded == 3 and len(search._known) == 2
    assert search(paths[0], ["a"]).was_known and not search(paths[1], ["a"]).was_known


def test_errors(search, tmp_path):
    """They do not name folders, and are not kept."""
    path = write_video(tmp_path / "a.mp4", [i / 10 for i in range(50)])
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^a\.mp4: ") as caught:
            search(path, ["a"])
        assert str(tmp_path) not in str(caught.value) and not search._known
    with pytest.raises(ValueError, match=r"lasts 101 s; the limit is 100 s"):
        search(write_video(tmp_path / "long.mp4", range(101), rate=1), ["a"])


def test_gradio_does_not_convert_videos(app, tmp_path, monkeypatch):
    """It would start FFmpeg, which follows playlists."""
    path = write_video(app.folder / "old.avi", [i / 10 for i in range(20)], codec="mpeg4")
    restrict_gradio()
    monkeypatch.setattr("subprocess.Popen.__init__", lambda *arguments, **options: pytest.fail("a program was started"))
    assert gr.Video().postprocess(str(path)).path == str(path)
