"""One scene in every container, codec, rate, rotation, aspect, offset and stream order that PyAV's FFmpeg can write."""

import os
import struct
from fractions import Fraction
from pathlib import Path

import av
import av.filter
import numpy as np
import pytest

from modeling_diffusionvmr import video_filters
from modeling_diffusionvmr.video import open_video
from test_video import HEIGHT, WIDTH, index_of, picture

SECONDS = 6
MILLISECONDS = Fraction(1, 1000)
FAST_VPX = {"deadline": "realtime", "cpu-used": "8"}
BLACK, GRAY = np.zeros((16, 16, 3), np.uint8), np.full((64, 96, 3), 128, np.uint8)
SILENCE = np.zeros((1, 16000), np.int16)


def write(
    path, times=None, rate=10, codec="libx264", pix_fmt="yuv420p", size=(WIDTH, HEIGHT), pixel_aspect=None, matrix=None,
    start=0.0, sound=None, sound_first=False, decoy=False, codec_options=None, metadata=None, draw=picture, **options
):  # fmt: skip
    """
    Write the scene: frame i is `draw(i)`, shown from `times[i]` (default: i / rate) + `start` seconds on.

    `sound` lasts from one second to another. A `decoy` is a black video stream before the scene, which is the default.
    """
    with av.open(str(path), "w", options=options) as container:
        container.metadata.update(metadata or {})
        sound_stream = container.add_stream("mp2", rate=16000) if sound and sound_first else None
        black = container.add_stream("mpeg4", rate=rate, width=16, height=16, pix_fmt="yuv420p") if decoy else None
        stream = container.add_stream(codec, rate=rate, pix_fmt=pix_fmt, options=codec_options or {})
        stream.width, stream.height = size
        stream.codec_context.time_base = Fraction(1, rate) if times is None else MILLISECONDS
        if pixel_aspect:
            stream.codec_context.sample_aspect_ratio = Fraction(pixel_aspect)
        if matrix:
            stream.set_display_matrix(matrix)
        if decoy:
            black.disposition, stream.disposition = av.stream.Disposition(0), av.stream.Disposition.default
        if sound and not sound_first:
            sound_stream = container.add_stream("mp2", rate=16000)
        packets = []
        for index, time in enumerate(np.arange(SECONDS * rate) / rate if times is None else times):
            for target, pixels in ((stream, draw(index)), (black, BLACK)):
                if target is not None:
                    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                    frame.time_base, frame.pts = MILLISECONDS, round((time + start) * 1000)
                    packets += target.encode(frame)
        for second in range(*sound or (0,)):
            frame = av.AudioFrame.from_ndarray(SILENCE, "s16", "mono")
            frame.sample_rate, frame.time_base, frame.pts = 16000, Fraction(1, 16000), 16000 * second
            packets += sound_stream.encode(frame)
        for target in filter(None, (stream, black, sound_stream)):
            packets += target.encode()
        container.mux(sorted(packets, key=lambda packet: packet.dts * packet.time_base))
    return Path(path)


def shown(path, clip_seconds=1.0) -> list[int]:
    """Return the index of the frame of each clip."""
    return [index_of(frame) for frame in open_video(path, clip_seconds)]


def last_before_centers(times, num_clips, clip_seconds=1.0) -> list[int]:
    """Return the last frame before the center of each clip, or the first frame."""
    centers = (np.arange(num_clips) + 0.5) * clip_seconds
    return np.maximum(np.searchsorted(np.asarray(times), centers - 1e-6) - 1, 0).tolist()


# Name of the file, how it is written, and what differs: the start of the scene in the container, the number of clips
VARIANTS = [
    ("a.mp4", {}),
    ("a.mov", {}),
    ("a.3gp", {}),
    ("a.f4v", {}),
    ("a.mkv", {}),
    ("a.flv", {}),
    ("a.ts", {}),
    ("a.m2ts", {}),
    ("a.avi", {"codec_options": {"bf": "0"}}),
    ("mpeg4.m4v", {"codec": "mpeg4"}),
    ("mpeg4.avi", {"codec": "mpeg4"}),
    ("mpeg4.nut", {"codec": "mpeg4"}),
    ("vp8.ogv", {"codec": "libvpx", "codec_options": FAST_VPX}),
    ("sorenson.flv", {"codec": "flv"}),
    ("sorenson.swf", {"codec": "flv"}),
    ("mjpeg.avi", {"codec": "mjpeg", "pix_fmt": "yuvj420p"}),
    ("a.wmv", {"codec": "wmv2"}),
    ("msmpeg4.asf", {"codec": "msmpeg4"}),
    ("a.mpg", {"codec": "mpeg1video", "rate": 25}),
    ("a.vob", {"codec": "mpeg2video", "rate": 25}),
    ("a.wtv", {"codec": "mpeg2video", "rate": 25}),
    ("a.mxf", {"codec": "mpeg2video", "rate": 25}),
    ("a.rm", {"codec": "rv20"}),
    ("vp8.webm", {"codec": "libvpx", "codec_options": FAST_VPX}),
    ("vp9.webm", {"codec": "libvpx-vp9", "codec_options": FAST_VPX}),
    ("vp8.ivf", {"codec": "libvpx", "codec_options": FAST_VPX}),
    ("hevc.mp4", {"codec": "libx265", "codec_options": {"preset": "ultrafast", "x265-params": "log-level=none"}}),
    ("prores.mov", {"codec": "prores_ks", "pix_fmt": "yuv422p10le"}),
    ("png.mov", {"codec": "png", "pix_fmt": "rgb24"}),
    ("ffv1.mkv", {"codec": "ffv1"}),
    ("gray.mkv", {"codec": "ffv1", "pix_fmt": "gray"}),
    ("raw.y4m", {"codec": "rawvideo"}),
    ("a.gif", {"codec": "gif", "pix_fmt": "rgb8"}),
    ("a.apng", {"codec": "apng", "pix_fmt": "rgb24"}),
    ("ten_bits.mp4", {"pix_fmt": "yuv420p10le"}),
    ("444.mp4", {"pix_fmt": "yuv444p"}),
    ("full_range.mp4", {"pix_fmt": "yuvj420p"}),
    ("faststart.mp4", {"movflags": "faststart"}),
    ("fragments.mp4", {"movflags": "frag_keyframe+empty_moov", "codec_options": {"g": "10"}}),
    ("live.mkv", {"live": "1"}),
    ("intra.mp4", {"codec_options": {"g": "1"}}),
    ("intra_refresh.mp4", {"codec_options": {"x264-params": "intra-refresh=1:keyint=30"}}),
    ("interlaced.mp4", {"codec_options": {"x264-params": "interlaced=1"}}),
    ("rate_1.mkv", {"rate": 1}),
    ("rate_3.mp4", {"rate": 3}),
    ("rate_24.mp4", {"rate": 24}),
    ("rate_30.mp4", {"rate": 30}),
    ("offset.ts", {"output_ts_offset": "50000"}),
    ("wrapping.ts", {"output_ts_offset": "95440"}),  # the clock of 33 bits restarts at 95443.7 s
    ("offset.mkv", {"start": 1000.0}),
    ("late_in_container.mp4", {"start": 2.0}),  # an edit list with a pause, which is where the container starts
    ("sound.mp4", {"sound": (0, 6)}),
    ("sound_first.mp4", {"sound": (0, 6), "sound_first": True}),
    ("sound_first.avi", {"sound": (0, 6), "sound_first": True, "codec": "mpeg4"}),
    ("short_sound.mkv", {"sound": (0, 2)}),
    ("long_sound.mkv", {"sound": (0, 9)}),
    ("late_sound.mkv", {"sound": (2, 6)}),
    ("decoy.mkv", {"decoy": True}),
    ("decoy.mp4", {"decoy": True, "sound": (0, 6), "sound_first": True}),
    ("2024-05-01T12:30.mp4", {}),
    ("latin.avi", {"codec": "mpeg4", "metadata": {"title": "LATIN"}}),
    ("latin.mkv", {"metadata": {"title": "LATIN"}}),
]


@pytest.mark.parametrize(("name", "how"), VARIANTS, ids=[name for name, _ in VARIANTS])
def test_containers_codecs_rates_and_streams(tmp_path, monkeypatch, name, how):
    monkeypatch.chdir(tmp_path)
    path = write(f"./{name}", **how)
    path.write_bytes(path.read_bytes().replace(b"LATIN", "Mus\xe9e".encode("latin-1")))
    rate = how.get("rate", 10)
    expected = last_before_centers(np.arange(SECONDS * rate) / rate, SECONDS)
    video = open_video(path, 1.0)
    assert abs(video.duration - SECONDS) < 0.1
    assert video.fps == pytest.approx(rate, rel=0.02)
    assert shown(name) == shown(path) == [index % 256 for index in expected]


def test_frames_without_times_of_presentation(tmp_path):
    # FFmpeg shows B-frames in AVI when they are decoded, here two frames late
    assert shown(write(tmp_path / "a.avi"), 0.5) == [0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55]


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "a.ts"])
def test_pictures_that_begin_after_the_sound(tmp_path, name):
    path = write(tmp_path / name, start=2.5, sound=(0, 9), sound_first=True)
    assert open_video(path, 1.0).duration == pytest.approx(2.5 + SECONDS, abs=0.1)
    times = np.arange(10 * SECONDS) / 10 + open_video(path, 1.0).duration - SECONDS
    assert shown(path) == [0, 0, *last_before_centers(times, 9)[2:]]


def test_edit_list_that_cuts_off_the_beginning(tmp_path):
    path = write(tmp_path / "a.mp4", start=-2.0)
    assert open_video(path, 1.0).duration == 4
    assert shown(path) == [24, 34, 44, 54]


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_variable_rate(tmp_path, name):
    rng = np.random.default_rng(0)
    for start in (0.0, 3.0):
        times = np.concatenate([[0], np.cumsum(rng.choice([0.04, 0.1, 0.5, 1.7], 30))])
        path = write(tmp_path / name, times, start=start)
        for clip_seconds in (0.5, 2.0, 7.0):
            frames = shown(path, clip_seconds)
            assert frames == last_before_centers(times, len(frames), clip_seconds) == filtered(path, clip_seconds)


def filtered(path, clip_seconds) -> list[int]:
    """Return the frames that FFmpeg's filter takes, without our code."""
    with av.open(str(path)) as container:
        start, frames = Fraction(container.start_time, av.time_base), [*container.decode(video=0)]
    graph = av.filter.Graph()
    nodes = [graph.add_buffer(template=frames[0], time_base=frames[0].time_base)]
    nodes += [graph.add("fps", f"fps=1/{clip_seconds}:start_time=0"), graph.add("buffersink")]
    graph.link_nodes(*nodes).configure()
    result = []
    for frame in (*frames, None):
        if frame is not None:
            frame.pts -= round(start / frame.time_base)
        graph.push(frame)
        try:
            while True:
                result.append(index_of(graph.vpull().to_ndarray(format="rgb24")))
        except (BlockingIOError, EOFError):
            pass
    return result


@pytest.mark.parametrize("fps", [Fraction(5), Fraction(10), Fraction(25), Fraction(30000, 1001), Fraction(15, 2)])
@pytest.mark.parametrize("clip_seconds", [0.1, 0.5, 1.0, 1.7, 2.0])
def test_decoded_frames_follow_the_filter(fps, clip_seconds):
    for count in (1, 7, 10, 44, 55, 110):
        pixels = np.arange(count, dtype=np.uint8)[:, None, None, None].repeat(16, 1).repeat(16, 2).repeat(3, 3)
        graph = av.filter.Graph()
        buffer = graph.add("buffer", f"video_size=16x16:pix_fmt=rgb24:time_base={1 / fps}")
        rate = graph.add("fps", f"fps=1/{clip_seconds}:start_time=0")
        graph.link_nodes(buffer, rate, graph.add("buffersink")).configure()
        expected = []
        for index in range(count + 1):
            frame = None
            if index < count:
                frame = av.VideoFrame.from_ndarray(pixels[index], format="rgb24")
                frame.time_base, frame.pts, frame.duration = 1 / fps, index, 1
            graph.push(frame)
            try:
                while True:
                    expected.append(int(graph.vpull().to_ndarray()[0, 0, 0]))
            except (BlockingIOError, EOFError):
                pass
        video = open_video((pixels, float(fps)), clip_seconds)
        assert [int(frame[0, 0, 0]) for frame in video] == (expected or [count - 1])


@pytest.mark.parametrize("flags", ["initial_discontinuity", "resend_headers"])
@pytest.mark.parametrize("offset", ["0", "1000"])
def test_joined_files_whose_clock_restarts_or_jumps(tmp_path, flags, offset):
    first = write(tmp_path / "first.ts").read_bytes()
    second = write(tmp_path / "second.ts", mpegts_flags=flags, output_ts_offset=offset).read_bytes()
    path = tmp_path / "joined.ts"
    path.write_bytes(first + second)
    assert open_video(path, 1.0).duration == pytest.approx(2 * SECONDS)
    assert shown(path) == 2 * [4, 14, 24, 34, 44, 54]


@pytest.mark.parametrize(("name", "distance"), [("a.ts", 188), ("a.m2ts", 192)])
@pytest.mark.parametrize("how", [{"rate": 25}, {"rate": 25, "codec": "mpeg2video"}], ids=str)
def test_joined_files_whose_counters_restart(tmp_path, name, distance, how):
    path = write(tmp_path / name, **how)
    content, rate = path.read_bytes(), how.get("rate", 10)
    expected = last_before_centers(np.arange(SECONDS * rate) / rate, SECONDS)
    if name == "a.m2ts":  # which FFmpeg ends inside a packet
        content = content[: len(content) // distance * distance]
    path.write_bytes(2 * content)
    assert open_video(path, 1.0).duration == pytest.approx(2 * SECONDS, abs=0.1)
    assert shown(path) == 2 * expected


def test_joined_segments_whose_counters_restart(tmp_path):
    """`ffmpeg -f segment` starts each file anew, while the clock goes on."""
    how = {"codec_options": {"bf": "0"}}
    first = write(tmp_path / "first.ts", **how).read_bytes()
    second = write(tmp_path / "second.ts", output_ts_offset=str(SECONDS), **how).read_bytes()
    path = tmp_path / "joined.ts"
    path.write_bytes(first + second)
    assert open_video(path, 1.0).duration == pytest.approx(2 * SECONDS)
    assert shown(path) == 2 * [4, 14, 24, 34, 44, 54]
    lost = 188 * 3  # the tables before the first picture
    path.write_bytes(first + second[lost:])
    with pytest.raises(ValueError, match=r"joined\.ts: damaged or cut off at .* convert it first"):
        open_video(path, 1.0)


@pytest.mark.parametrize("zeros", [1, 1000, 200_000])
@pytest.mark.parametrize("name", ["a.ts", "a.m2ts", "fragments.mp4"])
def test_zeros_after_the_end(tmp_path, name, zeros):
    how = {"movflags": "frag_keyframe+empty_moov+skip_trailer"} if name == "fragments.mp4" else {}
    path = write(tmp_path / name, **how)
    content = path.read_bytes()
    path.write_bytes(content + bytes(zeros))
    assert shown(path) == [4, 14, 24, 34, 44, 54]
    path.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=rf"{name}: .*cut off at"):
        open_video(path, 1.0)


def test_dv(tmp_path):
    path = write(
        tmp_path / "a.dv", codec="dvvideo", rate=25, size=(720, 576),
        draw=lambda index: picture(index).repeat(12, 0)[:576].repeat(12, 1)[:, :720],
    )  # fmt: skip
    video = open_video(path, 1.0)
    assert video.fps == 25 and video.duration == SECONDS and len(list(video)) == SECONDS


def test_avi_written_to_a_pipe(tmp_path):
    path = write(tmp_path / "a.avi", codec="mpeg4")
    content = bytearray(path.read_bytes())
    place = content.index(b"vids") + 32
    content[place : place + 4] = struct.pack("<I", 1 << 30)
    content[4:8] = struct.pack("<I", 0xFFFFFFFF)
    path.write_bytes(content)
    assert open_video(path, 1.0).duration == SECONDS
    assert shown(path) == [4, 14, 24, 34, 44, 54]


def test_pictures_before_time_0(tmp_path):
    path = write(tmp_path / "a.mkv", start=-2.0, avoid_negative_ts="disabled", codec_options={"bf": "0"})
    assert open_video(path, 1.0).duration == 4
    assert shown(path) == [24, 34, 44, 54]


def test_times_of_decoding_that_are_squeezed(tmp_path):
    """The cut of a stream of one picture per second puts the times of decoding close together."""
    whole, path = write(tmp_path / "whole.ts", rate=1, codec_options={"bf": "0"}), tmp_path / "a.ts"
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for index, packet in enumerate(packet for packet in source.demux(video=0) if packet.size):
            packet.dts = packet.pts - 45000 * min(index, 2)
            packet.stream = stream
            target.mux(packet)
    assert open_video(path, 1.0).duration == SECONDS
    assert shown(path) == [0, 1, 2, 3, 4, 5]


def test_joined_files_of_different_sizes(tmp_path):
    first = write(tmp_path / "a.vob", codec="mpeg2video", rate=25).read_bytes()
    second = write(tmp_path / "b.vob", codec="mpeg2video", rate=25, size=(96, 64), draw=lambda i: GRAY).read_bytes()
    path = tmp_path / "joined.vob"
    path.write_bytes(first + second)
    assert [frame.shape[:2] for frame in open_video(path, 1.0)] == 6 * [(HEIGHT, WIDTH)] + 6 * [(64, 96)]


def test_capture_that_begins_between_key_frames(tmp_path):
    whole = write(tmp_path / "a.ts", codec_options={"x264-params": "keyint=40:min-keyint=40:scenecut=0:bframes=0"})
    with av.open(str(whole)) as container:
        begin = [packet.pos for packet in container.demux(video=0) if packet.size][30] // 188 * 188
    path, content = tmp_path / "capture.ts", whole.read_bytes()
    path.write_bytes(content[:564] + content[begin:])  # the tables, and from 3 s on; the next key frame is at 4 s
    assert open_video(path, 1.0).duration == 3
    assert shown(path) == [40, 44, 54]


def test_last_picture_that_stays(tmp_path):
    path = write(tmp_path / "a.webm", codec="libvpx", codec_options=FAST_VPX)
    content = bytearray(path.read_bytes())
    place = content.index(b"\x44\x89\x88") + 3  # the duration in milliseconds, of a recorder of an unchanged screen
    content[place : place + 8] = struct.pack(">d", 8900.0)
    path.write_bytes(content)
    assert open_video(path, 1.0).duration == 8.9
    assert shown(path) == [4, 14, 24, 34, 44, 54, 59, 59, 59]
    path.write_bytes(content[:-20])
    with pytest.raises(ValueError, match=r"a\.webm: cut off at [56]\.\d+ s of 8\.90 s"):
        open_video(path, 1.0)

    whole, path = write(tmp_path / "a.mp4"), tmp_path / "a.flv"
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        last = max(packets, key=lambda packet: packet.pts)
        last.duration = int(3 / last.time_base)
        for packet in packets:
            packet.stream = stream
            target.mux(packet)
    assert open_video(path, 1.0).duration == pytest.approx(8.9)
    assert shown(path) == [4, 14, 24, 34, 44, 54, 59, 59, 59]


def test_lost_packet_of_sound(tmp_path):
    path = write(tmp_path / "a.ts", sound=(0, 6))
    content = path.read_bytes()
    with av.open(str(path)) as container:
        sound = container.streams.audio[0].id
    packets = [content[i : i + 188] for i in range(0, len(content), 188)]
    inside = [i for i, p in enumerate(packets) if (p[1] & 31) << 8 | p[2] == sound and not p[1] & 64]
    del packets[inside[len(inside) // 2]]
    path.write_bytes(b"".join(packets))
    assert shown(path) == [4, 14, 24, 34, 44, 54]


@pytest.mark.parametrize("first", [1, -1])
@pytest.mark.parametrize("second", [1, -1])
@pytest.mark.parametrize("transposed", [False, True])
def test_display_matrices(tmp_path, first, second, transposed):
    a, b, c, d = (0, first, second, 0) if transposed else (first, 0, 0, second)
    corner = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    corner[: HEIGHT // 2, : WIDTH // 2] = 255  # white at the top left
    one = 1 << 16
    matrix = [a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30]
    path = write(
        tmp_path / "a.mp4", times=[0, 1], matrix=matrix, draw=lambda index: corner, pixel_aspect=Fraction(3, 2)
    )
    frame = next(iter(open_video(path, 1.0)))
    assert frame.shape[:2] == ((HEIGHT, 96) if a else (96, HEIGHT))
    # The point (-1, -1) is shown at (-a - c, -b - d)
    x, y = -a - c, -b - d
    bright = frame[frame.shape[0] * (2 + y) // 4, frame.shape[1] * (2 + x) // 4]
    assert bright.min() > 200 and np.mean(frame > 127) == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize(
    ("aspect", "width"), [(Fraction(2), 128), (Fraction(1, 2), 32), (Fraction(9, 8), 72), (None, 64)]
)
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_pixels_that_are_not_square(tmp_path, name, aspect, width):
    path = write(tmp_path / name, pixel_aspect=aspect)
    assert {frame.shape for frame in open_video(path, 1.0)} == {(HEIGHT, width, 3)}
    assert shown(path) == [4, 14, 24, 34, 44, 54]


@pytest.mark.parametrize("space", ["bt709", "smpte170m"])
@pytest.mark.parametrize("color_range", ["tv", "pc"])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_colors(tmp_path, name, space, color_range):
    for color in ((255, 0, 0), (0, 200, 40), (30, 60, 220), (128, 128, 128)):
        pixels = np.broadcast_to(np.array(color, np.uint8), (HEIGHT, WIDTH, 3)).copy()
        with av.open(str(tmp_path / name), "w") as container:
            options = {"colorspace": space, "color_range": color_range, "crf": "1"}
            stream = container.add_stream("libx264", rate=10, width=WIDTH, height=HEIGHT, options=options)
            stream.pix_fmt = "yuv420p"
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
                format="yuv420p",
                dst_colorspace={"bt709": "ITU709", "smpte170m": "ITU601"}[space],
                dst_color_range={"tv": "MPEG", "pc": "JPEG"}[color_range],
            )
            container.mux([*stream.encode(frame), *stream.encode()])
        (shown_frame,) = open_video(tmp_path / name, 1.0)
        np.testing.assert_allclose(shown_frame.mean((0, 1)), color, atol=4)


def test_large_frames_are_reduced(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", pixel_aspect=Fraction(3, 2))
    monkeypatch.setattr(video_filters, "MAX_SHORT_SIDE", 24)
    assert {frame.shape for frame in open_video(path, 1.0)} == {(24, 48, 3)}
    assert shown(path) == [4, 14, 24, 34, 44, 54]
    monkeypatch.setattr(video_filters, "MAX_SHORT_SIDE", HEIGHT)
    assert {frame.shape for frame in open_video(path, 1.0)} == {(HEIGHT, 96, 3)}


SDP = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:6\n#EXTINF:6,\na.ts\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize("name", ["list.ffconcat", "list.m3u8", "list.sdp", "list.mp4"])
@pytest.mark.parametrize("content", ["ffconcat version 1.0\nfile a.ts\n", HLS, SDP])
def test_files_that_refer_to_other_files(tmp_path, monkeypatch, name, content):
    monkeypatch.chdir(tmp_path)
    write("a.ts")
    Path(name).write_text(content)
    for video in (name, open(name, "rb")):
        with pytest.raises(ValueError, match=rf"^{name}: not a readable video \("):
            open_video(video, 1.0)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_pipe(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match=r"a\.mp4: not a readable video \(not a regular file\)"):
        open_video(tmp_path / "a.mp4", 1.0)
