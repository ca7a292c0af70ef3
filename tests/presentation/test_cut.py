import warnings
from fractions import Fraction

import av
import numpy as np
import pytest

from modeling_diffusionvmr.presentation.cut import cut_moments, file_name
from modeling_diffusionvmr.video_file import VideoFile
from test_video import HEIGHT, WIDTH, index_of, picture, write_video

RATE = 10  # pictures per second


def cut(path, folder, *moments):
    """Cut (start, end) in seconds out of a video, and return the files in this order."""
    result = {"moments": [{"start": start, "end": end, "score": 0.5} for start, end in moments]}
    return cut_moments(path, ["a red circle"], [result], folder)


def pictures_of(path) -> list[tuple[int, float]]:
    """The index and the time of each picture."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        return [(index_of(frame.to_ndarray(format="rgb24")), round(frame.time, 3)) for frame in frames]


def tone_starts(path) -> list[float]:
    """The seconds since the start of the file at which a silent sound track becomes loud."""
    with av.open(str(path)) as container:
        start = container.start_time / av.time_base
        frames = list(container.decode(audio=0))
    loud = np.concatenate([np.abs(frame.to_ndarray()).max(0) for frame in frames]) > 0.05
    loud[1:] = np.convolve(loud, np.ones(480), "same")[1:] > 0  # a tone crosses zero
    return [
        index / frames[0].sample_rate + frames[0].time - start
        for index in np.flatnonzero(np.diff(loud.astype(int)) == 1) + 1
    ]


def write_with_tones(
    path, seconds=20, tone_every=2, codec="aac", rate=44100, layout="mono", start=0, picture_codec="libx264"
):
    """A video whose pictures are numbered, with a tone of a tenth of a second whenever `tone_every` seconds pass."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(picture_codec, rate=RATE, width=WIDTH, height=HEIGHT, pix_fmt="yuv420p")
        sound = container.add_stream(codec, rate=rate, layout=layout)
        for index in range(seconds * RATE):
            frame = av.VideoFrame.from_ndarray(picture(index), format="rgb24")
            frame.time_base, frame.pts = Fraction(1, RATE), index + start * RATE
            container.mux(stream.encode(frame))
            time = (index + np.arange(rate // RATE) / rate * RATE) / RATE
            wave = np.where(time % tone_every < 0.1, 0.5 * np.sin(2 * np.pi * 1000 * time), 0).astype(np.float32)
            samples = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
            samples.sample_rate, samples.time_base = rate, Fraction(1, rate)
            samples.pts = index * rate // RATE + start * rate
            container.mux(sound.encode(samples))
        container.mux(stream.encode())
        container.mux(sound.encode())
    return path


@pytest.mark.parametrize("name, codec", [("a.mp4", "libx264"), ("a.webm", "libvpx"), ("a.avi", "mpeg4")])
def test_exact_to_a_frame(tmp_path, name, codec):
    path = write_video(tmp_path / name, np.arange(73) / RATE, codec=codec)
    # Between pictures, on them (1.1 and 2.3 are no exact floats), without length, at the end, everything
    moments = [(1.05, 1.95), (1.1, 2.3), (3, 3), (7.25, 7.3), (0, 7.3)]
    files = cut(path, tmp_path / "out", *moments)
    found = [pictures_of(file) for file in files]
    ranges = [(11, 19), (11, 22), (30, 30), (72, 72), (0, 72)]
    assert [[index for index, _ in pictures] for pictures in found] == [
        list(range(first, last + 1)) for first, last in ranges
    ]
    assert found[0] == [(11, 0), *((index, round(index / 10 - 1.05, 3)) for index in range(12, 20))]
    lengths = [float(VideoFile(file).end) for file in files]
    assert lengths == pytest.approx([0.9, 1.2, 0.04, 0.05, 7.3], abs=1e-3)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [file.name for file in files]


def test_variable_frame_rate_and_late_start(tmp_path):
    times = np.array([3, 3.1, 3.2, 4.4, 4.6, 4.9, 8.0, 8.1])
    for name in ("a.mkv", "a.ts"):
        path = write_video(tmp_path / name, times)
        moments = [(0.05, 1.5), (2, 5.05), (2.5, 4), (0.3, 0.9)]
        late = [(start + 3, end + 3) for start, end in moments] if name == "a.mkv" else moments
        with av.open(str(path)) as container:  # mkv keeps the late start, and ts begins whenever it wants
            late = moments if container.start_time > 2e6 else late
        found = [pictures_of(file) for file in cut(path, tmp_path / name[2:], *late)]
        assert found[0] == [(1, 0), (2, 0.15), (3, 1.35)]
        # A picture that stays for more than a second is shown, although it began before
        assert found[1] == [(5, 0), (6, 3)]
        assert found[2] == [(5, 0)]
        assert found[3] == [(2, 0)]


def test_slides(tmp_path):
    """Two pictures in a minute: moments keep their length, and show the slide that is on the screen."""
    path = write_video(tmp_path / "a.mkv", [0, 30, 60], rate=Fraction(1, 30))
    files = cut(path, tmp_path / "out", (5, 9), (28, 34), (29.5, 34))
    assert [pictures_of(file) for file in files] == [[(0, 0)], [(0, 0), (1, 2)], [(1, 0)]]
    assert [float(VideoFile(file).end) for file in files] == pytest.approx([4, 6, 4.5], abs=1e-3)


@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_pictures_are_upright(tmp_path, rotation):
    path = write_video(tmp_path / "a.mp4", np.arange(10) / RATE, rotation=rotation)
    (file,) = cut(path, tmp_path, (0.4, 0.6))
    with av.open(str(file)) as container:
        frames = list(container.decode(video=0))
        assert all("DISPLAYMATRIX" not in frame.side_data for frame in frames)
        pixels = [frame.to_ndarray(format="rgb24") for frame in frames]
    assert [index_of(np.rot90(picture, -rotation // 90)) for picture in pixels] == [4, 5]
    assert pixels[0].shape == ((HEIGHT, WIDTH, 3) if rotation == 180 else (WIDTH, HEIGHT, 3))


def test_odd_sizes_square_pixels_and_colors(tmp_path):
    color = (200, 60, 30)
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, width=33, height=21, pix_fmt="yuv444p")
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)
        for _ in range(5):
            pixels = np.full((21, 33, 3), color, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    (file,) = cut(tmp_path / "a.mkv", tmp_path, (0, 0.5))
    with av.open(str(file)) as container:
        (stream,) = container.streams
        assert (stream.width, stream.height, stream.pix_fmt) == (66, 22, "yuv420p")
        assert stream.sample_aspect_ratio in (None, 1)
        frame = next(container.decode(stream))
    np.testing.assert_allclose(frame.to_ndarray(format="rgb24")[5, 5], color, atol=6)


@pytest.mark.parametrize(
    "name, options",
    [
        ("a.mp4", {}),
        ("a.mkv", {"codec": "pcm_s16le", "rate": 22050}),
        ("a.ts", {"start": 5}),
        ("a.avi", {"codec": "libmp3lame", "picture_codec": "mpeg4"}),
        ("a.flv", {"picture_codec": "flv1"}),
        ("b.mkv", {"codec": "libopus", "rate": 48000, "layout": "stereo"}),
    ],
)
def test_sound_stays_in_sync(tmp_path, name, options):
    path = write_with_tones(tmp_path / name, **options)
    times, tones = [frame.time for frame in VideoFile(path).decoded()], tone_starts(path)
    # Pictures and sound of the file itself, with the delay of its codec; AVI shows its second picture late
    assert tones[-5:] == pytest.approx([times[index] for index in range(100, 200, 20)], abs=0.12)
    moments = [(3.5, 8.5), (0, 3), (17, 20)]
    for file, (begin, end) in zip(cut(path, tmp_path / "out", *moments), moments):
        first, _ = pictures_of(file)[0]
        assert times[first] - 0.1 < begin <= times[first] + 1e-6
        expected = [time - begin for time in tones if begin + 0.05 < time < end]
        assert len(expected) >= 1
        assert [time for time in tone_starts(file) if time > 0.05] == pytest.approx(expected, abs=0.01)
        with av.open(str(file)) as container:
            video, sound = container.streams
            assert (video.codec_context.name, sound.codec_context.name) == ("h264", "aac")
            assert float(sound.duration * sound.time_base) == pytest.approx(end - begin, abs=0.03)


def test_sound_that_cannot_be_decoded(tmp_path):
    path = write_with_tones(tmp_path / "a.mkv", seconds=4, codec="aac")
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [bytes(packet) for packet in container.demux(audio=0) if packet.size > 20]
    for packet in packets:
        at = bytes(content).find(packet)
        content[at : at + len(packet)] = b"\xff" * len(packet)
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"a\.mkv: parts of its sound cannot be decoded"):
        (file,) = cut(path, tmp_path, (1, 2))
    assert [index for index, _ in pictures_of(file)] == list(range(10, 20))


def test_no_sound(tmp_path):
    path = write_video(tmp_path / "a.mp4", np.arange(20) / RATE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (file,) = cut(path, tmp_path, (1, 2))
    with av.open(str(file)) as container:
        assert len(container.streams) == 1


def test_many_moments_are_cut_in_one_decoding(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", np.arange(100) / RATE)
    decoded, decodings = VideoFile.decoded, []
    monkeypatch.setattr(VideoFile, "decoded", lambda *args: decodings.append(1) or decoded(*args))
    moment = {"start": 2.0, "end": 4.0, "score": 0.9}
    results = [{"moments": [moment, {**moment, "end": 3.5}]}, {"moments": []}, {"moments": [moment]}]
    files = cut_moments(path, ["a: b/c", "nothing", "x"], results, tmp_path / "out")
    assert [file.name for file in files] == [
        "01-01_a-b-c_0002.0-0004.0.mp4",
        "01-02_a-b-c_0002.0-0003.5.mp4",
        "03-01_x_0002.0-0004.0.mp4",
    ]
    assert [len(pictures_of(file)) for file in files] == [20, 15, 20]
    assert len(decodings) == 1
    assert cut_moments(path, ["a"], [{"moments": []}], tmp_path / "none") == []
    assert len(decodings) == 1 and not (tmp_path / "none").exists()


def test_nothing_half_written(tmp_path):
    content = write_video(tmp_path / "a.mkv", np.arange(100) / RATE, noise=True).read_bytes()
    with av.open(str(tmp_path / "a.mkv")) as container:
        packet = [bytes(packet) for packet in container.demux(video=0)][60]
    at = content.find(packet[10:60]) - 10
    (tmp_path / "a.mkv").write_bytes(content[:at] + b"\0" * len(packet) + content[at + len(packet) :])
    with pytest.raises(ValueError, match=r"a\.mkv: "):
        cut(tmp_path / "a.mkv", tmp_path / "out", (0, 1), (4, 9))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["01-01_a-red-circle_0000.0-0001.0.mp4"]


@pytest.mark.parametrize(
    "query, slug",
    [
        ("A red circle!", "a-red-circle"),
        ("../../etc/passwd", "etc-passwd"),
        ('CON: <"|?*\\>', "con"),
        ("  \t\n", ""),
        ("犬が走る", "犬が走る"),
        ("कुत्ता दौड़ता", "कुत्ता-दौड़ता"),
        ("e\u0301te\u0301", "\u00e9t\u00e9"),
        ("long " * 100, "long-" * 12),
        ("犬" * 100, "犬" * 20),
    ],
)
def test_file_names(query, slug):
    name = file_name(1, 2, query, {"start": 32.04, "end": 7200, "score": 1})
    assert name == f"01-02_{slug.strip('-')}_0032.0-7200.0.mp4"
    assert len(name.encode()) < 100
