import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import warnings
import wave
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoProcessor, pipeline
from transformers.pipelines.pt_utils import KeyDataset

from modeling_diffusionvmr import (
    DiffusionVMRForMomentRetrieval,
    DiffusionVMRProcessor,
    pipeline_diffusionvmr,
)
from modeling_diffusionvmr.pipeline_diffusionvmr import EncodedVideo
from modeling_diffusionvmr.video import FileVideo, open_video
from small_checkpoint import description, save_checkpoint
from test_video import picture, write_video

TASK = "video-moment-retrieval"
QUERIES = ["a red dog", "dog runs fast"]
SECONDS, RATE = 14.6, 10  # seven clips of 2 s


@pytest.fixture(scope="module")
def checkpoint(tiny_config, tmp_path_factory) -> Path:
    """A folder with a random model, its processor and its backbone."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder, tiny_config)
    return folder


@pytest.fixture(scope="module")
def pipe(checkpoint):
    return pipeline(TASK, model=str(checkpoint))


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "stripes.mp4", np.arange(SECONDS * RATE) / RATE)


@pytest.fixture
def counts(pipe, monkeypatch) -> dict:
    """Count the calls of each part and the decoded frames."""
    counted = {"frames": 0, "videos": 0, "images": 0, "model": 0}

    def count(owner, name, key, amount=lambda *arguments: 1):
        original = getattr(owner, name)

        def counting(*arguments, **kwargs):
            counted[key] += amount(*arguments)
            return original(*arguments, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    count(pipeline_diffusionvmr, "open_video", "videos")
    count(pipe.backbones.models[0], "encode_clips", "images", lambda inputs: len(inputs["pixel_values"]))
    count(pipe.model, "forward", "model")
    original = FileVideo.clips

    def clips(self, samplings):
        for clip in original(self, samplings):
            counted["frames"] += 1
            yield clip

    monkeypatch.setattr(FileVideo, "clips", clips)
    return counted


def check_moments(moments, duration=SECONDS, count=5):
    assert type(moments) is list and len(moments) == count
    for moment in moments:
        assert list(moment) == ["start", "end", "score"]
        assert all(type(value) is float for value in moment.values())
        assert 0 <= moment["start"] <= moment["end"] <= duration + 0.01
        assert 0 < moment["score"] < 1
    scores = [moment["score"] for moment in moments]
    assert scores == sorted(scores, reverse=True)


def assert_close(found, expected, atol=1e-4):
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected):
            assert_close(one, other, atol)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_close(found[key], value, atol)
    else:
        assert found == pytest.approx(expected, abs=atol)


# Inputs


def test_every_form_of_a_video(pipe, video):
    moments = pipe(str(video), QUERIES[0])
    check_moments(moments)
    assert pipe(video, QUERIES[0]) == moments
    with open(video, "rb") as file:
        assert pipe(file, QUERIES[0]) == moments
    assert pipe(io.BytesIO(video.read_bytes()), QUERIES[0]) == moments
    assert pipe({"video": video, "query": QUERIES[0]}) == moments
    frames = np.stack([picture(index) for index in range(round(SECONDS * RATE))])
    decoded = pipe((frames, RATE), QUERIES[0])
    check_moments(decoded)
    assert_close(decoded, moments, 0.5)  # the file is lossily compressed


def test_forms_of_a_query(pipe, video):
    both = pipe(video, QUERIES)
    assert len(both) == 2 and both[0] != both[1]
    for query, moments in zip(QUERIES, both):
        check_moments(moments)
        assert_close(moments, pipe(video, query))
    assert pipe(video, QUERIES[:1]) == [pipe(video, QUERIES[0])]
    assert pipe(video, tuple(QUERIES)) == both
    assert pipe(video, []) == []


def test_many_videos(pipe, video):
    frames = np.stack([picture(index) for index in range(50)])
    inputs = [
        {"video": str(video), "query": QUERIES[0]},
        {"video": (frames, 10), "query": QUERIES},
        {"video": video, "query": []},
    ]
    expected = [pipe(**one) for one in inputs]
    check_moments(expected[1][0], duration=5)
    assert pipe(inputs) == expected
    assert list(pipe(one for one in inputs)) == expected
    assert pipe(inputs[:1], top_k=2) == [expected[0][:2]]


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def test_urls(pipe, video, video_server):
    expected = pipe(video, QUERIES)
    assert pipe(video.as_uri(), QUERIES) == expected
    video_server.files["a.mp4"] = video.read_bytes()
    url = video_server.url("plain/a.mp4")
    assert pipe(url, QUERIES) == expected
    assert pipe([url, video], QUERIES) == [expected] * 2
    assert len(video_server.requested) == 2
    assert pipe([url], QUERIES, num_workers=1) == [expected]
    with pytest.raises(ValueError, match=f"^{url}: .* more than `max_download_bytes`, which is 100$"):
        pipe(url, QUERIES, max_download_bytes=100)
    with pytest.raises(OSError, match="the server answered 404"):
        pipe(video_server.url("plain/b.mp4"), QUERIES)


def test_url_for_all_calls(checkpoint, video, video_server):
    video_server.files["a.mp4"] = video.read_bytes()
    limited = pipeline(TASK, model=str(checkpoint), max_download_bytes=100)
    with pytest.raises(ValueError, match="which is 100$"):
        limited(video_server.url("plain/a.mp4"), QUERIES)
    assert limited(video_server.url("plain/a.mp4"), QUERIES, max_download_bytes=10**6) == limited(video, QUERIES)


def test_progress(pipe, video, video_server, capsys):
    video_server.files["a.mp4"] = video.read_bytes()
    capsys.readouterr()
    pipe(video_server.url("plain/a.mp4"), QUERIES[0])
    assert capsys.readouterr().err == ""
    pipe(video_server.url("plain/a.mp4"), QUERIES[0], progress=True)
    printed = capsys.readouterr().err
    assert "downloading: 100%" in printed and "encoding clips: 100%" in printed


def test_rows_of_a_video_column(pipe, video):
    expected = pipe(video, QUERIES[0])
    content = video.read_bytes()
    for row in (
        {"bytes": None, "path": str(video)},
        {"bytes": content, "path": None},
        {"bytes": content, "path": "only/a/name.mp4"},
        {"path": str(video)},
        {"bytes": None, "path": video.as_uri()},
    ):
        assert pipe(row, QUERIES[0]) == expected
    with pytest.raises(ValueError, match=r"^only/a/name\.mp4: not a readable video"):
        pipe({"bytes": b"no video", "path": "only/a/name.mp4"}, QUERIES[0])
    with pytest.raises(ValueError, match="^a video of 8 bytes: not a readable video"):
        pipe({"bytes": b"no video", "path": None}, QUERIES[0])
    with pytest.raises(ValueError, match="^`bytes` of a video must be bytes, got str: 'no video'"):
        pipe({"bytes": "no video", "path": None}, QUERIES[0])


def test_decoder_of_a_video_column(pipe, video):
    """`datasets` leaves the file of a decoder in an attribute. torchcodec is too large for the tests."""
    decoder = SimpleNamespace(_hf_encoded={"bytes": None, "path": str(video)})
    expected = pipe(video, QUERIES[0])
    assert pipe(decoder, QUERIES[0]) == expected
    assert pipe([decoder], QUERIES[0]) == [expected]


@pytest.fixture
def others(video, tmp_path) -> datasets.Dataset:
    """A dataset of two videos of different lengths, with a column of type `Video`."""
    other = write_video(tmp_path / "other.mp4", np.arange(50) / RATE)
    columns = {"vid": ["a", "b"], "video": [str(video), str(other)], "query": QUERIES}
    return datasets.Dataset.from_dict(columns).cast_column("video", datasets.Video(decode=False))


def test_one_query_for_a_dataset(pipe, others):
    paths = [row["path"] for row in others["video"]]
    expected = [pipe(path, QUERIES) for path in paths]
    assert expected[0] != expected[1]
    for videos in (
        KeyDataset(others, "video"),
        others["video"],
        Rows(paths),
        (path for path in paths),
        map(str, paths),
        dict(zip("ab", paths)).values(),
        (row["video"] for row in others.to_iterable_dataset()),
    ):
        results = pipe(videos, query=QUERIES)
        assert type(results) is not list
        assert list(results) == expected, type(videos)
    assert len(pipe(KeyDataset(others, "video"), query=QUERIES)) == 2
    for many in (paths, tuple(paths), [{"path": path} for path in paths]):
        results = pipe(many, QUERIES)
        assert type(results) is list and results == expected
    decoded = [(np.stack([picture(index) for index in range(length)]), RATE) for length in (50, 146)]
    results = pipe(decoded, QUERIES[0])
    assert results == [pipe(one, QUERIES[0]) for one in decoded]
    assert pipe(tuple(decoded), QUERIES[0]) == results
    files = tuple(io.BytesIO(Path(path).read_bytes()) for path in paths)
    assert pipe(files, QUERIES) == expected
    assert pipe([], QUERIES) == [] and list(pipe(KeyDataset([], "video"), query=QUERIES)) == []
    assert list(pipe(KeyDataset(others, "video"), query=[])) == [[], []]


def test_other_keys_of_a_row_are_ignored(pipe, others):
    expected = [pipe(row["video"], row["query"]) for row in others]
    assert list(pipe(others)) == pipe(list(others)) == list(pipe(others.to_iterable_dataset())) == expected
    assert pipe(others[0]) == expected[0]


def test_bad_video_among_good_ones(pipe, video, tmp_path):
    results = iter(pipe((path for path in (video, tmp_path / "absent.mp4")), QUERIES[0]))
    check_moments(next(results))
    with pytest.raises(FileNotFoundError, match=r"absent\.mp4: no such file"):
        next(results)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_any_iterable_of_dicts(pipe, video, count):
    queries = [QUERIES[0], QUERIES[1], "a dog"][:count]
    rows = [{"video": str(video), "query": query} for query in queries]
    expected = [pipe(video, query) for query in queries]
    iterables = {
        "generator": (row for row in rows),
        "map": map(dict, rows),
        "iterator": iter(rows),
        "tuple": tuple(rows),
        "values": dict(enumerate(rows)).values(),
        "torch": Rows(rows),
        "datasets": datasets.Dataset.from_list(rows),
    }
    if count:
        iterables["streamed"] = iterables["datasets"].to_iterable_dataset()
    for name, iterable in iterables.items():
        assert list(pipe(iterable)) == expected, name
    assert type(pipe(tuple(rows))) is list


def test_iterables_are_read_lazily(pipe, video):
    read = []
    results = iter(pipe(read.append(query) or {"video": video, "query": query} for query in QUERIES * 5))
    check_moments(next(results))
    assert len(read) < 10


def test_one_pass_for_all_queries(pipe, video, counts):
    pipe(video, QUERIES * 3)
    assert counts == {"frames": 7, "videos": 1, "images": 7, "model": 1}


def test_a_video_that_was_encoded_before(pipe, video, counts):
    """It takes the place of the video, and is not decoded again."""
    shares = []
    encoded = pipe.encode(open_video(video, 2.0), advance=shares.append)
    assert sum(shares) == pytest.approx(1) and encoded.num_clips == 7 and encoded.duration == pytest.approx(SECONDS)
    decoded = dict(counts)
    single, several = pipe(encoded, QUERIES[0], return_saliency=True), pipe(encoded, QUERIES)
    many = pipe([encoded, encoded], query=QUERIES[1])
    assert [counts[key] for key in ("frames", "videos", "images")] == [
        decoded[key] for key in ("frames", "videos", "images")
    ]
    assert single == pipe(video, QUERIES[0], return_saliency=True)
    assert several == pipe(video, QUERIES) and many == [pipe(video, QUERIES[1])] * 2
    assert pipe((encoded, encoded), query=QUERIES[1]) == many
    with pytest.raises(ValueError, match="`query` is missing"):
        pipe(encoded)


def test_clips_of_another_length_cannot_be_encoded(pipe, video):
    with pytest.raises(ValueError, match=r"stripes\.mp4: clips of 1 s; the backbones read 2 s"):
        pipe.encode(open_video(video, 1.0))
    encoded = pipe.encode(open_video(video, 2.0))
    with pytest.raises(ValueError, match="the encoded video: clips of 3 s; the backbones read 2 s"):
        pipe(dataclasses.replace(encoded, clip_seconds=3.0), QUERIES[0])


def test_whatever_is_one_video_can_be_encoded(pipe, video):
    expected = pipe.encode(open_video(video, 2.0))
    row = {"path": None, "bytes": video.read_bytes()}
    column = datasets.Dataset.from_list([{"video": row}]).cast_column("video", datasets.Video(decode=False))
    with open(video, "rb") as file:
        for one in (video, str(video), video.as_uri(), file, io.BytesIO(video.read_bytes()), row, column[0]["video"]):
            encoded = pipe.encode(one)
            assert encoded.duration == expected.duration and encoded.clip_seconds == 2.0
            assert np.array_equal(encoded.features[0], expected.features[0])
    assert pipe.encode(expected) is expected
    frames = np.stack([picture(index) for index in range(round(SECONDS * RATE))])
    assert pipe(pipe.encode((frames, RATE)), QUERIES) == pipe((frames, RATE), QUERIES)


def test_what_open_video_returns_can_be_searched(pipe, video):
    opened = open_video(video, 2.0)
    assert pipe(opened, QUERIES) == pipe(video, QUERIES)
    assert pipe([opened, video], query=QUERIES[0]) == [pipe(video, QUERIES[0])] * 2
    with pytest.raises(ValueError, match=r"stripes\.mp4: clips of 1 s; the backbones read 2 s"):
        pipe(open_video(video, 1.0), QUERIES)


def test_videos_that_cannot_be_encoded(checkpoint, pipe, video, tmp_path):
    with pytest.raises(ValueError, match="^a video must be a path, .* got int: 5$"):
        pipe.encode(5)
    with pytest.raises(FileNotFoundError, match="nothing.mp4"):
        pipe.encode(tmp_path / "nothing.mp4")
    with pytest.raises(ValueError, match=r"lasts 15 s; the limit is 10.5 s \(`max_video_seconds`\)$"):
        pipe.encode(video, max_video_seconds=10.5)
    with pytest.raises(ValueError, match="`max_video_seconds` must be a number above 0, got -1"):
        pipe.encode(video, max_video_seconds=-1)
    with pytest.raises(ValueError, match=re.escape("unknown arguments ['threshold']; expected some of ['max_")):
        pipe.encode(video, threshold=0.5)
    strict = pipeline(TASK, model=str(checkpoint), max_video_seconds=10.5)  # for all calls
    with pytest.raises(ValueError, match="the limit is 10.5 s"):
        strict.encode(video)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"features": []}, r"`features` of an encoded video must be a list of one array .* got \[\]$"),
        ({"features": [np.ones((0, 12))]}, "`features` of an encoded video must be a list"),
        ({"features": [np.ones((7, 0))]}, "`features` of an encoded video must be a list"),
        ({"features": [[[1.0], [2.0, 3.0]]]}, "`features` of an encoded video must be a list"),
        ({"features": np.ones((7, 12))}, "`features` of an encoded video must be a list"),
        ({"features": iter([np.ones((7, 12))])}, "`features` of an encoded video must be a list"),
        ({"features": None}, "`features` of an encoded video must be a list .* got None$"),
        ({"backbone_ids": None}, "`backbone_ids` of an encoded video must be one per array .* got None$"),
        ({"backbone_ids": "a"}, "`backbone_ids` of an encoded video must be one per array"),
        ({"backbone_ids": ["a/b", "c/d"]}, "`backbone_ids` of an encoded video must be one per array"),
        ({"features": [np.ones((7, 12)), np.ones((10, 12))]}, r"an encoded video: clip counts \[7, 10\] differ"),
        ({"duration": 0.0}, "`duration` of an encoded video must be a number above 0, got 0.0"),
        ({"clip_seconds": None}, "`clip_seconds` of an encoded video must be a number above 0, got None"),
    ],
)
def test_impossible_encoded_video(changes, message):
    with pytest.raises(ValueError, match=message):
        EncodedVideo(**{"duration": 14.0, "clip_seconds": 2.0, "features": [np.ones((7, 12))], **changes})


def test_encoded_video_of_other_backbones(pipe, video):
    by_hand = EncodedVideo(14.0, 2.0, [np.ones((7, 12), np.float32)])
    check_moments(pipe(by_hand, QUERIES[0]), duration=14.0)
    with pytest.raises(ValueError, match="has features of 2 backbones, expected 1"):
        pipe(EncodedVideo(14.0, 2.0, [np.ones((7, 12))] * 2), QUERIES[0])
    with pytest.raises(ValueError, match=r"features must be \(length, 12\), got \(7, 13\)"):
        pipe(EncodedVideo(14.0, 2.0, [np.ones((7, 13))]), QUERIES[0])


def test_encoded_video_of_another_backbone_on_the_hub(pipe, video, monkeypatch):
    encoded = pipe.encode(video)
    assert encoded.backbone_ids == [None]  # it is in a folder

    def set_id(identifier):
        monkeypatch.setattr(pipe.backbones, "descriptions", [description(id=identifier)])

    set_id("some/clip")
    expected, of_hub = pipe(encoded, QUERIES), pipe.encode(video)
    assert of_hub.backbone_ids == ["some/clip"] and pipe(of_hub, QUERIES) == expected
    set_id("other/clip")
    assert pipe(encoded, QUERIES) == expected
    with pytest.raises(
        ValueError, match="^the encoded video: made by the backbone some/clip; this model's is other/clip$"
    ):
        pipe(of_hub, QUERIES)


def test_backbones_with_different_numbers_of_clips():
    assert EncodedVideo(14.0, 2.0, [np.ones((8, 12)), np.ones((7, 5))]).num_clips == 7


def test_nothing_is_decoded_for_no_query(pipe, video, counts):
    assert pipe(video, []) == []
    assert (counts["frames"], counts["model"]) == (0, 0)


def test_a_video_that_is_too_long_is_refused_before_it_is_decoded(pipe, video, counts):
    with pytest.raises(ValueError, match=r"lasts \d+ s; the limit is 10.5 s \(`max_video_seconds`\)$"):
        pipe(video, QUERIES, max_video_seconds=10.5)
    assert counts["frames"] == 0


def test_equals_processor_and_model_in_a_row(pipe, video):
    clip = pipe.backbones.models[0]
    batch = pipe.processor([[clip.encode_video(open_video(video, 2.0))]], clip.encode_text([QUERIES[0]]))
    with torch.inference_mode():
        outputs = pipe.model(**batch.to(pipe.device))
    (expected,) = pipe.processor.post_process_moment_retrieval(outputs, [14.0], [SECONDS])
    assert_close(pipe(video, QUERIES[0]), expected)


# Options


def test_options_of_a_call(pipe, video):
    moments = pipe(video, QUERIES[0])
    assert pipe(video, QUERIES[0], top_k=2) == moments[:2]
    middle = (moments[1]["score"] + moments[2]["score"]) / 2
    assert pipe(video, QUERIES[0], threshold=middle) == moments[:2]
    assert pipe(video, QUERIES[0], threshold=1.0) == []
    check_moments(pipe(video, QUERIES[0], num_proposals=9), count=9)
    assert pipe(video, QUERIES[0], num_sampling_steps=3) != moments
    kept = pipe(video, QUERIES[0], nms_threshold=0.0, num_proposals=30)
    assert 1 <= len(kept) < 30
    for index, moment in enumerate(kept):
        for other in kept[:index]:
            assert min(moment["end"], other["end"]) - max(moment["start"], other["start"]) <= 1e-4
    for moment in pipe(video, QUERIES[0], round_to=1.0):
        assert moment["start"] % 1 == 0 and (moment["end"] % 1 == 0 or moment["end"] > 14.5)


def test_options_for_all_calls(checkpoint, pipe, video):
    chosen = pipeline(TASK, model=str(checkpoint), top_k=2, num_proposals=9)
    expected = pipe(video, QUERIES[0], num_proposals=9)
    assert chosen(video, QUERIES[0]) == expected[:2]
    assert chosen(video, QUERIES[0], top_k=3) == expected[:3]


def test_saliency(pipe, video):
    moments = pipe(video, QUERIES)
    results = pipe(video, QUERIES, return_saliency=True)
    for result, expected in zip(results, moments):
        assert list(result) == ["moments", "saliency", "clip_seconds"]
        assert result["moments"] == expected
        assert len(result["saliency"]) == 7 and all(type(score) is float for score in result["saliency"])
        assert result["clip_seconds"] == 2.0
    assert results[0]["saliency"] != results[1]["saliency"]
    single = pipe(video, QUERIES[0], return_saliency=True)
    assert_close(single, results[0])
    assert pipe(video, [], return_saliency=True) == []


# Long videos. The model reads 20 clips, 40 s; tests/test_windows.py tests the plan of windows


def frames_of(seconds: int) -> tuple[np.ndarray, int]:
    """Return a video with one frame per second."""
    return np.stack([picture(index) for index in range(seconds)]), 1


@pytest.fixture
def seen(pipe, monkeypatch) -> list[torch.Tensor]:
    """Record the model's inputs, and let it find moments from the first to the last second of each."""
    recorded, forward = [], pipe.model.forward

    def everything(**inputs):
        recorded.append(inputs["video_features"])
        outputs = forward(**inputs)
        outputs.pred_spans = torch.tensor([0.5, 1.0]).expand_as(outputs.pred_spans)
        return outputs

    monkeypatch.setattr(pipe.model, "forward", everything)
    return recorded


def test_long_video_is_searched_in_windows(pipe, seen):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = pipe(frames_of(98), QUERIES[0], return_saliency=True)
    # Four windows of 20 clips, two of 40, which are averaged, and the whole video, which is the only one that has no
    # neighbor and so cuts no moment
    assert [features.shape for features in seen] == [(7, 20, 12)]
    assert {(moment["start"], moment["end"]) for moment in result["moments"]} == {(0, 98)}
    assert len(result["moments"]) == 5
    clips = pipe.backbones.models[0].encode_video(open_video(frames_of(98), 2.0))
    clips /= np.linalg.norm(clips, axis=1, keepdims=True)
    np.testing.assert_allclose(seen[0][3].cpu(), clips[-20:], atol=1e-4)
    np.testing.assert_allclose(seen[0][6].mean(0).cpu(), clips.mean(0), atol=1e-4)


def test_saliency_of_a_long_video(pipe):
    result = pipe(frames_of(98), QUERIES[0], return_saliency=True)
    assert len(result["saliency"]) == 49 and result["clip_seconds"] == 2.0
    # The first window owns the first 14 clips or more, the last one as many at the end
    frames, rate = frames_of(98)
    for part, clips in ((frames[:40], slice(0, 14)), (frames[-40:], slice(-14, None))):
        alone = pipe((part, rate), QUERIES[0], return_saliency=True)["saliency"]
        assert len(alone) == 20
        assert_close(result["saliency"][clips], alone[clips])


def test_averaging_a_long_video_down(pipe, seen):
    results = [
        pipe(frames_of(98), QUERIES[0], return_saliency=True, chunk_length_s=chunk_length_s)
        for chunk_length_s in (98, 98.0, 1000)
    ]
    assert results[0] == results[1] == results[2]
    assert {(moment["start"], moment["end"]) for moment in results[0]["moments"]} == {(0, 98)}
    assert len(results[0]["saliency"]) == 20 and results[0]["clip_seconds"] == pytest.approx(98 / 20)
    # No part of the video is left out
    clips = pipe.backbones.models[0].encode_video(open_video(frames_of(98), 2.0))
    clips /= np.linalg.norm(clips, axis=1, keepdims=True)
    assert seen[0].shape == (1, 20, 12)
    np.testing.assert_allclose(seen[0][0].mean(0).cpu(), clips.mean(0), atol=1e-4)


def test_short_video_is_searched_in_one_pass(pipe, video):
    """To the last bit, the result is that of one call of the model on all clips and sentences."""
    frames = frames_of(40)
    for source, covered, duration in ((video, 14.0, SECONDS), (frames, 40.0, 40.0)):
        clip = pipe.backbones.models[0]
        arrays = [clip.encode_video(open_video(source, 2.0))]
        tokens = clip.encode_text(QUERIES, pipe.processor.max_tokens)
        batch = pipe.processor([arrays] * 2, tokens)
        with torch.inference_mode():
            outputs = pipe.model(**batch.to(pipe.device))
        expected = pipe.processor.post_process_moment_retrieval(outputs, [covered] * 2, [duration] * 2)
        for options in ({}, {"chunk_length_s": 40, "stride_length_s": 5}, {"stride_length_s": 0}):
            results = pipe(source, QUERIES, return_saliency=True, **options)
            assert [result["moments"] for result in results] == expected
            assert [result["saliency"] for result in results] == outputs.saliency_scores.tolist()


def test_length_and_stride_of_windows(pipe, seen):
    pipe(frames_of(98), QUERIES[0], chunk_length_s=20)
    # 9 windows of 10 clips, 4 of 20, 2 of 40, which are averaged, and the whole video
    assert [features.shape for features in seen] == [(16, 20, 12)]
    seen.clear()
    pipe(frames_of(98), QUERIES[0], stride_length_s=0)
    assert [features.shape for features in seen] == [(3 + 2 + 1, 20, 12)]
    seen.clear()
    pipe(frames_of(38), QUERIES[0], chunk_length_s=20)
    assert [features.shape for features in seen] == [(3 + 1, 19, 12)]


def test_progress_of_a_long_video(pipe, capsys):
    pipe(frames_of(98), QUERIES[0], progress=True)
    assert "searching windows: 100%" in capsys.readouterr().err


def test_length_for_all_calls_and_stride_of_a_call(checkpoint, pipe):
    chosen = pipeline(TASK, model=str(checkpoint), chunk_length_s=20)
    video = frames_of(98)
    assert chosen(video, QUERIES[0], stride_length_s=2) == pipe(video, QUERIES[0], chunk_length_s=20, stride_length_s=2)
    with pytest.raises(ValueError, match="^`stride_length_s` must be less than half of `chunk_length_s`, 20 s, got 12"):
        chosen(video, QUERIES[0], stride_length_s=12)


def test_long_sentence_is_truncated_with_a_warning(pipe, video):
    with pytest.warns(UserWarning, match="query truncated from 22 tokens to 8"):
        moments = pipe(video, "a red dog runs " * 5)
    assert_close(moments, pipe(video, "a red dog runs a red"))


def test_bfloat16(checkpoint, pipe, video):
    half = pipeline(TASK, model=str(checkpoint), dtype=torch.bfloat16)
    assert half.model.dtype == half.backbones.models[0].model.dtype == torch.bfloat16
    result, exact = (one(video, QUERIES[0], return_saliency=True) for one in (half, pipe))
    check_moments(result["moments"])
    assert_close(result["saliency"], exact["saliency"], 0.2)


# Invalid inputs


def test_files_that_are_not_videos(pipe, video, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.mp4: no such file"):
        pipe(tmp_path / "nothing.mp4", QUERIES[0])
    (tmp_path / "notes.mp4").write_text("no video\n" * 100)
    with pytest.raises(ValueError, match=r"notes\.mp4: not a readable video"):
        pipe(str(tmp_path / "notes.mp4"), QUERIES[0])
    with open(tmp_path / "notes.mp4", "rb") as file, pytest.raises(ValueError, match=r"notes\.mp4: not a readable"):
        pipe(file, QUERIES[0])
    whole = write_video(tmp_path / "whole.mp4", np.arange(100) / 10, noise=True, movflags="faststart").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.mp4: .*cut off"):
        pipe(tmp_path / "cut.mp4", QUERIES[0])
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(16000))
    with pytest.raises(ValueError, match=r"sound\.wav: not a readable video \(not in a supported"):
        pipe(tmp_path / "sound.wav", QUERIES[0])
    with pytest.raises(ValueError, match="at least one frame"):
        pipe((np.zeros((0, 8, 8, 3), np.uint8), 5), QUERIES[0])
    with pytest.raises(ValueError, match=r"frames must be \(T, H, W, 3\) uint8"):
        pipe((np.zeros((4, 8, 8)), 5), QUERIES[0])


@pytest.mark.parametrize(
    "query", ["", "  \n", ["a dog", ""], ["a dog", None], [5], 5, b"a dog", "a \ud83d dog", ["a dog", "a \udcff dog"]]
)
def test_invalid_queries(pipe, video, counts, query):
    with pytest.raises(ValueError, match="^a query (must be a string that is not blank|cannot be encoded as UTF-8)"):
        pipe(video, query)
    assert counts["frames"] == 0


def test_query_is_missing(pipe, video):
    frames = np.zeros((4, 8, 8, 3), np.uint8)
    for one in (str(video), video, str(video).encode(), (frames, 2), frames, torch.from_numpy(frames)):
        with pytest.raises(ValueError, match="`query` is missing"):
            pipe(one)
    with open(video, "rb") as file, pytest.raises(ValueError, match="`query` is missing"):
        pipe(file)
    for inputs in ([{"video": str(video)}], [str(video)], {"video": str(video), "sentence": "a dog"}, None, 5):
        with pytest.raises(ValueError, match="must be a dict with 'video' and 'query'"):
            pipe(inputs)


def test_values_that_are_not_videos(pipe, video):
    frames = np.zeros((4, 8, 8, 3), np.uint8)
    values = (5, str(video).encode(), frames, {"video": str(video), "query": "a dog"}, {"bytes": None, "path": None})
    for value in (*values, *([value] for value in values)):
        name = type(value[0] if type(value) is list else value).__name__
        with pytest.raises(ValueError, match=f"^a video must be a path, a URL.* got {name}: "):
            pipe(value, QUERIES[0])


def test_no_videos(pipe):
    assert pipe([]) == []


@pytest.mark.parametrize(
    "option",
    [
        *({"top_k": value} for value in ("5", 2.5, True, -1)),
        *({"threshold": value} for value in ("0.5", float("nan"), True)),
        *({"nms_threshold": value} for value in ("0.5", 1.5, -0.5)),
        *({"round_to": value} for value in (0, "2", float("inf"))),
        *({"num_proposals": value} for value in (0, -3, 2.5, "5", True)),
        *({"num_sampling_steps": value} for value in (0, 1000, 2.5, "2", True)),
        *({"max_download_bytes": value} for value in (0, 2.5, "5", None)),
        *({"max_video_seconds": value} for value in (0, -1.0, "5", None, float("nan"))),
        *({"chunk_length_s": value} for value in (0, 1.5, "60", True, float("nan"))),
        *({"stride_length_s": value} for value in (-1, 20, "5", True, (5, 5))),
        *({"batch_size": value} for value in (0, 2, "2")),
    ],
    ids=lambda option: "-".join(map(str, *option.items())),
)
def test_invalid_options(checkpoint, pipe, video, counts, option):
    """They are named before the work."""
    (name,) = option
    for inputs in ([video, QUERIES[0]], [[{"video": video, "query": QUERIES[0]}]]):
        with pytest.raises(ValueError, match=f"^`{name}` must be .*, got {re.escape(repr(option[name]))}"):
            pipe(*inputs, **option)
    assert counts["videos"] == 0
    with pytest.raises(ValueError, match=f"^`{name}` must be .*, got {re.escape(repr(option[name]))}"):
        pipeline(TASK, model=str(checkpoint), **option)


def test_batch_size_of_one(checkpoint, pipe, video):
    expected = pipe(video, QUERIES[0])
    assert pipe([video, video], QUERIES[0], batch_size=1) == [expected] * 2
    assert pipeline(TASK, model=str(checkpoint), batch_size=1)([video], QUERIES[0]) == [expected]


def test_damaged_weights(checkpoint, video):
    """NaN is an error, not an empty list."""
    damaged = pipeline(TASK, model=str(checkpoint))
    with torch.no_grad():
        damaged.model.saliency_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="^sample 0: `saliency_scores` .* are its weights damaged?"):
        damaged(video, QUERIES)
    with torch.no_grad():
        for parameter in damaged.model.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(ValueError, match="^sample 0: `logits` .* NaN or infinity; are its weights damaged?"):
        damaged(video, QUERIES)


def test_unknown_arguments(checkpoint, pipe, video):
    with pytest.raises(ValueError, match=r"unknown arguments \['topk'\]; expected some of .*'top_k'"):
        pipe(video, QUERIES[0], topk=3)
    with pytest.raises(ValueError, match=r"unknown arguments \['iou'\]"):
        pipeline(TASK, model=str(checkpoint), iou=3)


def test_backbones_that_cannot_be_run_are_named(tiny_config, tmp_path):
    backbones = [
        {"name": "vgg", "id": None, "feature_size": 4096, "clip_seconds": 1.0},
        {"name": "c3d", "id": None, "feature_size": 500, "clip_seconds": 1.0},
        {"name": "glove", "id": None, "text_feature_size": 300},
    ]
    config = tiny_config(backbones=backbones, video_feature_size=4596, text_feature_size=300)
    DiffusionVMRForMomentRetrieval(config).save_pretrained(tmp_path)
    DiffusionVMRProcessor([4096, 500], 300).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"cannot be run: vgg .*, c3d .*, glove "):
        pipeline(TASK, model=str(tmp_path))


# Saving


def test_checkpoint_holds_everything(checkpoint):
    names = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    assert {"config.json", "model.safetensors", "processor_config.json"} <= names
    assert {"clip/config.json", "clip/model.safetensors", "clip/tokenizer_config.json"} <= names
    parts = ("configuration", "modeling", "processing", "pipeline", "loss")
    assert {f"{part}_diffusionvmr.py" for part in parts} <= names
    assert {"spans.py", "diffusion.py", "video.py", "download.py", "backbones.py", "checks.py", "windows.py"} <= names
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["custom_pipelines"][TASK]["pt"] == ["AutoModel"]
    assert config["custom_pipelines"][TASK]["impl"] == "pipeline_diffusionvmr.VideoMomentRetrievalPipeline"
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel"}
    assert config["backbones"] == [description()]
    assert type(AutoModel.from_pretrained(checkpoint)) is DiffusionVMRForMomentRetrieval
    assert AutoProcessor.from_pretrained(checkpoint).max_tokens == 8


def test_saved_again(pipe, video, tmp_path):
    pipe.save_pretrained(tmp_path / "again")
    assert pipeline(TASK, model=str(tmp_path / "again"))(video, QUERIES) == pipe(video, QUERIES)


NOT_LOADED = {"datasets", "pandas", "av", "evaluate", "matplotlib", "h5py", "gradio"}
# What the package imports from transformers, which may load anything
IMPORT = """
from transformers import AutoConfig, AutoModel, AutoProcessor, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
from transformers import Pipeline, PreTrainedConfig
from transformers.feature_extraction_utils import BatchFeature
from transformers.modeling_utils import PreTrainedModel
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.processing_utils import ProcessorMixin
before = set(sys.modules)
import modeling_diffusionvmr
found.append(sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""
RETRIEVE = """
from transformers import pipeline
pipe = pipeline("video-moment-retrieval", model={model!r}{arguments})
found.append(pipe({video!r}, {queries!r}, return_saliency=True))
"""
# Hide the package, so that only remote code can be used
WITHOUT_PACKAGE = """
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_diffusionvmr":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
"""
REMOTE = """
import torch
from transformers import AutoConfig, AutoModel, AutoProcessor
folder = {model!r}
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
for part in (config, model, processor):
    assert type(part).__module__.startswith("transformers_modules."), type(part).__module__
assert type(model).__name__ == "DiffusionVMRForMomentRetrieval", type(model)
assert (config.d_model, processor.max_tokens) == (32, 8)
assert model(torch.zeros(1, 4, 12), torch.zeros(1, 3, 8)).pred_spans.shape == (1, 5, 2)
model.save_pretrained({again!r} + "/model")
processor.save_pretrained({again!r} + "/model")
pipe.save_pretrained({again!r} + "/pipe")
"""
NO_PACKAGE = """
assert type(pipe).__module__.startswith("transformers_modules.pipe."), type(pipe).__module__
assert not any(name.split(".")[0] == "modeling_diffusionvmr" for name in sys.modules)
"""


def run(code: str, home: Path) -> list:
    """Run code in a fresh process with its own caches. Return the list `found` that it fills."""
    code = f"import json, sys\nfound = []\n{code}\nprint(json.dumps(found))"
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("HF_MODULES_CACHE", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=home)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_model_in_memory(checkpoint, pipe, video, tiny_config):
    """The processor is that of the model's checkpoint, unless one is given."""
    expected, model = pipe(video, QUERIES), AutoModel.from_pretrained(checkpoint)
    assert pipeline(TASK, model=model)(video, QUERIES) == expected
    assert pipeline(TASK, model=model, processor=str(checkpoint))(video, QUERIES) == expected
    processor = DiffusionVMRProcessor([12], 8, max_clips=20, max_tokens=8, top_k=1)
    assert pipeline(TASK, model=model, processor=processor).processor is processor
    with pytest.raises(ValueError, match="the model was not loaded from a checkpoint, so it has no processor"):
        pipeline(TASK, model=DiffusionVMRForMomentRetrieval(tiny_config()))
    with pytest.raises((OSError, ValueError), match="nothing"):
        pipeline(TASK, model=model, processor=str(checkpoint / "nothing"))


# Slow: each starts a process that imports everything


def test_fresh_process(checkpoint, pipe, video, tmp_path):
    places = {"model": str(checkpoint), "video": str(video), "queries": QUERIES, "arguments": ""}
    loaded, found = run(IMPORT + RETRIEVE.format(**places), tmp_path)
    assert "modeling_diffusionvmr" in loaded
    assert NOT_LOADED.intersection(loaded) == set()
    assert_close(found, pipe(video, QUERIES, return_saliency=True))


def test_without_the_package(checkpoint, pipe, video, tmp_path):
    again = tmp_path / "again"
    places = {"model": str(checkpoint), "video": str(video), "queries": QUERIES, "again": str(again)}
    places["arguments"] = ", trust_remote_code=True"
    expected = pipe(video, QUERIES, return_saliency=True)
    code = WITHOUT_PACKAGE + RETRIEVE.format(**places) + REMOTE.format(**places)
    code += RETRIEVE.format(**{**places, "model": str(again / "pipe")}) + NO_PACKAGE
    for found in run(code, tmp_path):
        assert_close(found, expected)

    # What remote code saves is a complete checkpoint, with and without the package
    assert pipeline(TASK, model=str(again / "pipe"))(video, QUERIES, return_saliency=True) == expected
    assert type(AutoModel.from_pretrained(again / "model")) is DiffusionVMRForMomentRetrieval
    assert type(AutoProcessor.from_pretrained(again / "model")) is DiffusionVMRProcessor
