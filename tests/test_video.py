import io
import shutil
import subprocess
import sys
import tempfile
import wave
from fractions import Fraction

import av
import numpy as np
import pytest

from modeling_diffusionvmr.video import FrameSampling, open_video
from modeling_diffusionvmr.video_file import VideoFile
from modeling_diffusionvmr.video_filters import ToRGB

WIDTH, HEIGHT = 64, 48


def picture(index: int) -> np.ndarray:
    """A frame that encodes its index as eight stripes, one per bit."""
    bits = (index >> np.arange(8)) & 1
    return np.broadcast_to((bits.repeat(WIDTH // 8) * 255).astype(np.uint8)[None, :, None], (HEIGHT, WIDTH, 3)).copy()


def index_of(frame: np.ndarray) -> int:
    stripes = frame.mean(axis=(0, 2)).reshape(8, -1).mean(axis=1)
    return int((stripes > 127) @ (1 << np.arange(8)))


def write_video(path, times, rate=10, codec="libx264", rotation=None, noise=False, **options):
    """Write a video in which frame i is shown from `times[i]` seconds on."""
    random = np.random.default_rng(0)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate, width=WIDTH, height=HEIGHT, pix_fmt="yuv420p")
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for index, time in enumerate(times):
            pixels = random.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8) if noise else picture(index)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.time_base, frame.pts = Fraction(1, 1000), round(time * 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def expected_indices(path, clip_seconds, num_clips) -> list[int]:
    """Decode the whole file to find the last frame before each clip center."""
    with av.open(str(path)) as container:
        times = np.array([frame.time for frame in container.decode(video=0)])
    centers = (np.arange(num_clips) + 0.5) * clip_seconds
    return [max(np.flatnonzero(times - times[0] < center - 1e-6)) for center in centers]


@pytest.mark.parametrize(
    "name, codec",
    [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.webm", "libvpx"), ("a.avi", "mpeg4"), ("a.ts", "libx264")],
)
def test_frames_at_clip_centers_in_every_container(tmp_path, name, codec):
    path = write_video(tmp_path / name, np.arange(73) / 10, codec=codec)
    video = open_video(path, 1.0)
    assert video.duration == pytest.approx(7.3, abs=0.02)
    assert video.num_clips == 7
    found = [index_of(frame) for frame in video]
    assert found == [4, 14, 24, 34, 44, 54, 64] == expected_indices(path, 1.0, 7)
    assert [index_of(frame) for frame in video] == found  # can be iterated again


def test_variable_frame_rate_and_late_start(tmp_path):
    times = 3.0 + np.array([0, 0.1, 0.2, 1.4, 1.6, 1.9, 4.0, 4.1, 6.6])
    for name in ("a.mkv", "a.mp4"):
        path = write_video(tmp_path / name, times)
        video = open_video(str(path), 1.0)
        assert 6.6 <= video.duration < 7.5
        assert [index_of(frame) for frame in video] == [2, 3, 5, 5, 7, 7, 7]
        assert expected_indices(path, 1.0, 7) == [2, 3, 5, 5, 7, 7, 7]


def test_binary_file_object(tmp_path):
    path = write_video(tmp_path / "a.mp4", np.arange(40) / 10)
    with open(path, "rb") as file:
        file.read(10)
        video = open_video(file, 2.0)
        assert [index_of(frame) for frame in video] == [9, 29]
        assert [index_of(frame) for frame in video] == [9, 29]
    assert [index_of(frame) for frame in open_video(io.BytesIO(path.read_bytes()), 2.0)] == [9, 29]


class OnlyReadAndSeek:
    def __init__(self, content):
        file = io.BytesIO(content)
        self.read, self.seek = file.read, file.seek


@pytest.mark.parametrize(
    "make", [lambda: tempfile.SpooledTemporaryFile(max_size=1 << 20), tempfile.TemporaryFile, io.BytesIO]
)
def test_other_file_objects(tmp_path, make):
    content = write_video(tmp_path / "a.mp4", np.arange(40) / 10).read_bytes()
    with make() as file:
        file.write(content)  # opened for writing too, with the position at the end
        assert [index_of(frame) for frame in open_video(file, 2.0)] == [9, 29]
    assert [index_of(frame) for frame in open_video(OnlyReadAndSeek(content), 2.0)] == [9, 29]
    with tempfile.TemporaryFile() as file, pytest.raises(ValueError, match="^<.*>: not a readable video"):
        file.write(b"text " * 100)
        open_video(file, 2.0)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (b"a.mp4", "got bytes: b'a.mp4'"),
        ({"bytes": None, "path": None}, "got dict: {'bytes': None, 'path': None}"),
        ({"video": "a.mp4"}, "got dict: {'video': 'a.mp4'}"),
        ([np.zeros((4, 2, 2, 3), np.uint8), 5], r"got list: \[array\("),
        (np.zeros((4, 2, 2, 3), np.uint8), r"got ndarray: array\("),
        ((np.zeros((4, 2, 2, 3), np.uint8),), r"got tuple: \(array\("),
        (None, "got NoneType: None"),
    ],
)
def test_values_that_are_not_videos(video, message):
    with pytest.raises(ValueError, match=rf"^a video must be a path, a URL, .* or \(frames, fps\), {message}"):
        open_video(video, 2.0)


def test_header_without_duration(tmp_path):
    path = write_video(tmp_path / "a.mkv", np.arange(40) / 10, live="1")
    with av.open(str(path)) as container:
        assert container.duration is None
    assert open_video(path, 1.0).duration == pytest.approx(4.0)


@pytest.mark.parametrize("seconds, num_clips", [(0.1, 1), (2.9, 1), (3.0, 2), (5.0, 3), (6.0, 3), (11.0, 6)])
def test_number_of_clips(seconds, num_clips):
    video = open_video((np.zeros((round(seconds * 10), 2, 2, 3), np.uint8), 10), 2.0)
    assert video.duration == pytest.approx(seconds)
    assert video.num_clips == num_clips == len(list(video))


def test_decoded_frames():
    frames = np.arange(25, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    assert [frame[0, 0, 0] for frame in open_video((frames, 5), 1.0)] == [2, 7, 12, 17, 22]
    for fps in (Fraction(5), np.float32(5), np.int64(5), Fraction(10, 2)):
        video = open_video((frames, fps), 1.0)
        assert video.duration == 5 and type(video.duration) is float
        assert [frame[0, 0, 0] for frame in video] == [2, 7, 12, 17, 22]
    assert [frame[0, 0, 0] for frame in open_video((frames, 12.5), 0.2)] == [1, 3, 6, 8, 11, 13, 16, 18, 21, 23]


@pytest.mark.parametrize(
    "frames, fps, message",
    [
        (np.zeros((0, 2, 2, 3), np.uint8), 5, "at least one frame"),
        (np.zeros((4, 2, 3), np.uint8), 5, r"\(T, H, W, 3\) uint8, got \(4, 2, 3\)"),
        (np.zeros((4, 2, 2, 4), np.uint8), 5, r"\(T, H, W, 3\)"),
        (np.zeros((4, 2, 2, 3)), 5, "float64"),
        (np.zeros((4, 2, 2, 3), np.uint8), 0, "fps"),
        (np.zeros((4, 2, 2, 3), np.uint8), float("nan"), "fps"),
        (np.zeros((4, 2, 2, 3), np.uint8), "10", "fps must be a number above 0, got '10'"),
        ("a.mp4", "b.mp4", "frames must be"),
    ],
)
def test_invalid_frames(frames, fps, message):
    with pytest.raises(ValueError, match=message):
        open_video((frames, fps), 2.0)


def test_invalid_clip_seconds():
    for seconds in (0, -1, float("nan"), float("inf"), "2", None):
        with pytest.raises(ValueError, match="`clip_seconds` must be a number above 0, got"):
            open_video((np.zeros((4, 2, 2, 3), np.uint8), 5), seconds)


@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_rotation(tmp_path, rotation):
    path = write_video(tmp_path / "a.mp4", np.arange(10) / 10, rotation=rotation)
    frame = next(iter(open_video(path, 1.0)))
    assert index_of(np.rot90(frame, -rotation // 90)) == 4
    assert frame.shape == ((HEIGHT, WIDTH, 3) if rotation == 180 else (WIDTH, HEIGHT, 3))


def test_cut_off_file(tmp_path):
    whole = write_video(tmp_path / "whole.mp4", np.arange(100) / 10, noise=True, movflags="faststart").read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.mp4: .*cut off.* [45]\.\d+ s"):
        open_video(path, 2.0)
    path.write_bytes(whole[:-100])  # without a part of the last frame
    with pytest.raises(ValueError, match=r"cut\.mp4: damaged or cut off at 9\.\d+ s"):
        open_video(path, 2.0)
    # A container whose demuxer drops incomplete packets
    path = tmp_path / "cut.mkv"
    whole = write_video(tmp_path / "whole.mkv", np.arange(100) / 10, noise=True).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.mkv: .*cut off.* 4\.\d+ s of 10\.\d+ s"):
        open_video(path, 2.0)
    path = tmp_path / "no_index.mp4"
    whole = write_video(tmp_path / "whole.mp4", np.arange(100) / 10, noise=True).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"no_index\.mp4: not a readable video"):
        open_video(path, 2.0)


@pytest.mark.parametrize("index", [50, 99])  # FFmpeg's frame threads hide errors in the last frames
def test_broken_frame(tmp_path, index):
    path = write_video(tmp_path / "broken.mp4", np.arange(100) / 10, noise=True)
    with av.open(str(path)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    content[places[index] : places[index] + 500] = b"\xff" * 500
    path.write_bytes(content)
    video = open_video(path, 0.1)
    assert video.num_clips == 100
    with pytest.raises(ValueError, match=r"broken\.mp4: (decoding failed after|the frame at) \d\.\d+ s"):
        list(video)


def write_sound_with_cover(path):
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=8000)
        cover = container.add_stream("mjpeg", rate=1, width=WIDTH, height=HEIGHT, pix_fmt="yuvj420p")
        cover.disposition = av.stream.Disposition.attached_pic
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 8000
        for stream, frame in ((cover, av.VideoFrame.from_ndarray(picture(1), format="rgb24")), (sound, samples)):
            container.mux(stream.encode(frame))
            container.mux(stream.encode())


def test_files_that_are_not_videos(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.mp4: no such file"):
        open_video(tmp_path / "nothing.mp4", 2.0)
    for name in ("notes.txt", "notes.mp4"):
        (tmp_path / name).write_text("no video\n" * 100)
        with pytest.raises(ValueError, match=f"{name}: not a (readable )?video"):
            open_video(tmp_path / name, 2.0)
    with open(tmp_path / "notes.txt") as text, pytest.raises(ValueError, match="notes.txt: not a readable video"):
        open_video(text, 2.0)
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(ValueError, match=r"empty\.mp4: not a readable video \(the file is empty\)$"):
        open_video(tmp_path / "empty.mp4", 2.0)
    with pytest.raises(ValueError, match="not a readable video"):
        open_video(tmp_path, 2.0)
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(16000))
    with pytest.raises(ValueError, match=r"sound\.wav: not a readable video \(not in a supported video format\)"):
        open_video(tmp_path / "sound.wav", 2.0)
    write_sound_with_cover(tmp_path / "song.mp4")
    with pytest.raises(ValueError, match=r"song\.mp4: no video stream"):
        open_video(tmp_path / "song.mp4", 2.0)
    av.VideoFrame.from_ndarray(picture(3), format="rgb24").save(tmp_path / "picture.png")
    with pytest.raises(ValueError, match=r"picture\.png: not a readable video \(not in a supported"):
        open_video(tmp_path / "picture.png", 2.0)
    write_video(tmp_path / "raw.h264", np.arange(10) / 10)
    with pytest.raises(ValueError, match=r"raw\.h264: frames have no timestamps"):
        open_video(tmp_path / "raw.h264", 2.0)


def test_without_pyav(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").write_text("a video")
    with pytest.raises(ImportError, match="pip install av"):
        open_video(tmp_path / "a.mp4", 2.0)
    assert open_video((np.zeros((4, 2, 2, 3), np.uint8), 1), 2.0).num_clips == 2


def test_only_needed_frames_are_converted(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", np.arange(100) / 10)
    converted = []
    convert = ToRGB.__call__
    monkeypatch.setattr(ToRGB, "__call__", lambda self, frame: converted.append(frame) or convert(self, frame))
    assert len(list(open_video(path, 2.0))) == 5 == len(converted)


def test_real_video(shared):
    path = shared / "videos" / "charades.mp4"
    video = open_video(path, 2.0)
    assert video.duration == pytest.approx(30.72, abs=0.05)
    assert video.num_clips == 15
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    wanted = expected_indices(path, 2.0, 15)
    for frame, index in zip(video, wanted, strict=True):
        np.testing.assert_array_equal(frame, frames[index])


def test_work_is_not_sized_by_what_a_file_claims(tmp_path):
    """A file of two pictures that are four months apart, and frames at next to no rate."""
    path = write_video(tmp_path / "far.mkv", np.array([0.0, 10_000_000.0]))
    with pytest.raises(ValueError, match="far.mkv: lasts 1000000[01] s; the limit is 86400 s"):
        open_video(path, 2.0)
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="the video: lasts .* the limit is 86400 s"):
        open_video((frames, 1e-5), 2.0)
    with pytest.raises(ValueError, match="the limit is 86400 s"):
        open_video((frames, 1e-300), 2.0)
    with pytest.raises(ValueError, match="the video: 2000000 clips of 1e-06 s; the limit is 1000000"):
        open_video((frames, 1), 1e-6)


def test_several_samplings_in_one_decoding(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", np.arange(73) / 10)
    frames = np.stack([picture(index) for index in range(73)])
    samplings = [
        FrameSampling(Fraction(1, 2)),
        FrameSampling(Fraction(10), (0, 0, 3, 19)),
        FrameSampling(Fraction(30), (0, 59)),
    ]
    decoded, decode = [], VideoFile.decoded
    monkeypatch.setattr(VideoFile, "decoded", lambda self: decoded.append(self) or decode(self))
    for source in (path, (frames, 10)):
        shown = [[], [], []]
        for which, clip in open_video(source, 2.0).clips(samplings):
            shown[which].append([index_of(frame) for frame in clip])
        # The last clip lasts from 6 to 8 s, and the last frame is repeated to its end
        assert shown[0] == [[9], [29], [49], [69]]
        assert shown[1] == [[0, 0, 3, 19], [20, 20, 23, 39], [40, 40, 43, 59], [60, 60, 63, 72]]
        assert shown[2] == [[0, 19], [20, 39], [40, 59], [60, 72]]
    assert len(decoded) == 1


def test_clips_whose_frames_overlap(tmp_path):
    """A window of frames that is longer than a clip."""
    path = write_video(tmp_path / "a.mp4", np.arange(73) / 10)
    frames = np.stack([picture(index) for index in range(73)])
    for source in (path, (frames, 10)):
        clips = open_video(source, 1.0).clips([FrameSampling(10, (0, 8, 16, 24))])
        found = [[index_of(frame) for frame in clip] for _, clip in clips]
        assert found == [[min(first + step, 72) for step in (0, 8, 16, 24)] for first in range(0, 70, 10)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rate": 0}, "`rate` must be a whole number or a Fraction above 0, got 0"),
        ({"rate": 29.97}, "`rate` must be a whole number or a Fraction above 0, got 29.97"),
        ({"rate": 10, "indices": ()}, "`indices` must contain at least one frame"),
        ({"rate": 10, "indices": (5, 0)}, r"`indices` must be in ascending order, got \[5, 0\]"),
        ({"rate": 10, "indices": (-5, 0)}, "each of `indices` must be at least 0, got -5"),
        ({"rate": 10, "indices": (0.5,)}, "each of `indices` must be a whole number, got 0.5"),
        ({"rate": 10, "crop": 0}, "`crop` must be at least 1, got 0"),
    ],
)
def test_invalid_samplings(values, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        FrameSampling(**values)


def test_a_frame_that_is_repeated_is_converted_once(tmp_path, monkeypatch):
    """A file in which the first frame is shown for a minute."""
    path = write_video(tmp_path / "a.mkv", [0.0, 60.0, 61.0])
    converted, convert = [], ToRGB.__call__
    monkeypatch.setattr(ToRGB, "__call__", lambda self, frame: converted.append(frame) or convert(self, frame))
    for source in (path, (np.stack([picture(0), picture(1), picture(2)]), 1 / 60)):
        pictures = list(open_video(source, 1.0))
        assert [index_of(frame) for frame in pictures[:60]] == [0] * 60
        assert len({id(frame) for frame in pictures[:60]}) == 1
    assert len(converted) == 2


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (85, 48)])
@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="needs the ffmpeg command")
def test_cropped_frames_are_those_of_the_ffmpeg_command(tmp_path, size):
    """The sizes and the position as in HERO_Video_Feature_Extractor, `slowfast/extract_feature/video_dataflow.py`."""
    width, height = size
    rng = np.random.default_rng(0)
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=10, width=width, height=height, pix_fmt="yuv444p")
        for _ in range(20):
            pixels = rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
            pixels = np.pad(pixels, ((0, height - len(pixels)), (0, width - pixels.shape[1]), (0, 0)), "edge")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    crop, short_side = 24, min(size)
    scaled = [side * crop // short_side for side in size]
    left, top = ((side - crop) // 2 for side in scaled)
    command = [
        *("ffmpeg", "-v", "error", "-i", str(tmp_path / "a.mkv"), "-vf"),
        f"fps=30,scale={scaled[0]}:{scaled[1]}:flags=bicubic,crop={crop}:{crop}:{left}:{top}",
        *("-f", "rawvideo", "-pix_fmt", "rgb24", "-"),
    ]
    output = subprocess.run(command, check=True, capture_output=True).stdout
    expected = np.frombuffer(output, np.uint8).reshape(-1, crop, crop, 3)
    sampling = FrameSampling(Fraction(30), range(60), crop)
    ((_, clip),) = open_video(tmp_path / "a.mkv", 2.0).clips([sampling])
    assert len(expected) == len(clip) == 60
    np.testing.assert_allclose(np.stack(clip).astype(int), expected, atol=2)
