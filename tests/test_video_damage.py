"""
Damaged video files are refused, or give the moments of the whole file. They never crash or hang.

A scene that shows the number of its frame is written in several formats, and each file is damaged in six ways with
fixed seeds. Run this file to print a table: `python tests/test_video_damage.py FOLDER` (`--seeds N` for other seeds).
"""

import argparse
import faulthandler
import io
import json
import re
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import av
import numpy as np
import pytest

from modeling_diffusionvmr.video import open_video
from modeling_diffusionvmr.video_damage import MAX_AWAITED, AwaitedPictures, logged_errors, take_error
from test_video import HEIGHT, WIDTH
from test_video_variants import FAST_VPX, write

CLIP_SECONDS = 0.5
MAX_SECONDS = 20  # for a damaged file, whose whole takes 0.02 s
SEEDS = range(8)
FORMATS = {
    "plain.mp4": {},
    "faststart.mp4": {"movflags": "faststart"},
    "fragments.mp4": {"movflags": "frag_keyframe+empty_moov", "codec_options": {"g": "10"}},
    "mjpeg.mov": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "h264.mkv": {},
    "live.mkv": {"live": "1"},
    "vp8.webm": {"codec": "libvpx", "codec_options": FAST_VPX},
    "vp9.webm": {"codec": "libvpx-vp9", "codec_options": FAST_VPX},
    "mpeg4.avi": {"codec": "mpeg4", "codec_options": {"b": "400000"}},
    "h264.flv": {},
    "h264.ts": {},
    "mpeg2.mpg": {"codec": "mpeg2video", "rate": 25, "codec_options": {"b": "400000"}},
    "wmv2.wmv": {"codec": "wmv2", "codec_options": {"b": "400000"}},
    "a.gif": {"codec": "gif", "pix_fmt": "rgb8"},
}
# What nobody can tell from a whole file, by format and what becomes of it
NO_CHECKSUM = "any bits are pictures for its decoder, and pixels stay damaged until the next key frame"
CAPTURE = "without its first key frame it is like a capture that begins between key frames"
TIMES = "a changed time in ASF looks like a pause, and so do zeroed packets, which FFmpeg skips silently"
WHOLE_PICTURES = "pictures that were exchanged, repeated or removed as a whole leave no trace"
CAUSES = {
    ("vp8.webm", "unreadable"): NO_CHECKSUM,
    ("vp9.webm", "unreadable"): NO_CHECKSUM,
    ("vp8.webm", "moved"): NO_CHECKSUM,
    ("vp9.webm", "moved"): NO_CHECKSUM,
    ("plain.mp4", "unreadable"): NO_CHECKSUM,
    ("faststart.mp4", "unreadable"): NO_CHECKSUM,
    ("fragments.mp4", "unreadable"): NO_CHECKSUM,
    ("h264.mkv", "unreadable"): NO_CHECKSUM,
    ("live.mkv", "unreadable"): NO_CHECKSUM,
    ("h264.flv", "unreadable"): NO_CHECKSUM,
    ("h264.ts", "unreadable"): NO_CHECKSUM,
    ("h264.ts", "moved"): CAPTURE,
    ("wmv2.wmv", "unreadable"): NO_CHECKSUM,
    ("wmv2.wmv", "moved"): TIMES,
    ("mjpeg.mov", "moved"): WHOLE_PICTURES,
    ("a.gif", "moved"): WHOLE_PICTURES,
}


def numbered(index: int) -> np.ndarray:
    """Return a frame with its number as eight stripes, one per bit, and below them the inverted bits, under noise."""
    bits = (index >> np.arange(8)) & 1
    rows = np.stack([bits, 1 - bits]).repeat(HEIGHT // 2, 0).repeat(WIDTH // 8, 1)
    noise = np.random.default_rng(index).integers(0, 40, (HEIGHT, WIDTH, 3))
    return (200 * rows[:, :, None] + noise).astype(np.uint8)


def number_of(frame: np.ndarray) -> int | None:
    """Return the number of a frame, or `None` if its pixels are damaged."""
    if frame.shape != (HEIGHT, WIDTH, 3):
        return None
    stripes = frame.reshape(2, HEIGHT // 2, 8, WIDTH // 8, 3).mean((1, 3, 4))
    bits = stripes > 120
    if (bits[0] == bits[1]).any() or (abs(stripes - 120) < 40).any():
        return None
    return int(bits[0] @ (1 << np.arange(8)))


def cut_off(data, rng):
    return data[: rng.integers(1, len(data))]


def zero_block(data, rng):
    start, end = block(data, rng)
    return data[:start] + bytes(end - start) + data[end:]


def flip_bits(data, rng):
    data = bytearray(data)
    for place in rng.integers(0, len(data), rng.integers(1, 30)):
        data[place] ^= 1 << rng.integers(8)
    return bytes(data)


def remove_block(data, rng):
    start, end = block(data, rng)
    return data[:start] + data[end:]


def insert_block(data, rng):
    start, end = block(data, rng)
    place = rng.integers(0, len(data))
    return data[:place] + data[start:end] + data[place:]


def exchange_blocks(data, rng):
    (start, end), (other, _) = sorted([block(data, rng), block(data, rng)])
    end = min(end, other)
    after = min(other + end - start, len(data))
    return data[:start] + data[other:after] + data[end:other] + data[start:end] + data[after:]


def block(data, rng) -> tuple[int, int]:
    size = rng.integers(1, len(data) // 8)
    start = rng.integers(0, len(data) - size)
    return int(start), int(start + size)


KINDS = [cut_off, zero_block, flip_bits, remove_block, insert_block, exchange_blocks]


def numbers(content: bytes, name: str) -> list[int | None]:
    """Return the number of the frame of each clip."""
    file = io.BytesIO(content)
    file.name = name
    return [number_of(frame) for frame in open_video(file, CLIP_SECONDS)]


def verdict(found: list[int | None], whole: list[int], rate: int) -> str:
    """
    Return "right" if a moment in the damaged file is at most 1 s off.

    It is "moved" if a clip shows a frame of more than 1 s before or after that of the whole file, or if the length
    differs by more than 1 s, and "unreadable" if pictures at the right times have lost their number for more than 1 s.
    """
    if abs(len(found) - len(whole)) * CLIP_SECONDS > 1:
        return "moved"
    if any(one is not None and abs(one - other) > rate for one, other in zip(found, whole, strict=False)):
        return "moved"
    readable = "".join(".x"[number is None] for number in found)
    return "unreadable" if "x" * (int(1 / CLIP_SECONDS) + 1) in readable else "right"


def damage_all(folder: Path, seeds) -> None:
    """Damage each file and print what becomes of it, one JSON list per line."""
    for name, how in FORMATS.items():
        content = write(folder / name, draw=numbered, **how).read_bytes()
        whole = numbers(content, name)
        for kind in KINDS:
            for seed in seeds:
                damaged = kind(content, np.random.default_rng(seed))
                faulthandler.dump_traceback_later(MAX_SECONDS, exit=True)
                try:
                    outcome = verdict(numbers(damaged, name), whole, how.get("rate", 10))
                except ValueError as error:
                    outcome = "refused" if str(error).startswith(f"{name}: ") else repr(error)
                except Exception as error:
                    outcome = repr(error)
                print(json.dumps([name, kind.__name__, seed, outcome]), flush=True)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[tuple[str, str, int], str]:
    """Damage all files in another process, which ends with an error if one of them crashes it or hangs."""
    command = [sys.executable, __file__, str(tmp_path_factory.mktemp("damaged"))]
    process = subprocess.run(command, capture_output=True, text=True, timeout=600)
    lines = process.stdout.splitlines()
    assert process.returncode == 0, f"after {lines[-1:]}: {process.stderr[-2000:]}"
    return {(name, kind, seed): outcome for name, kind, seed, outcome in map(json.loads, lines)}


def test_damaged_files_are_refused_or_give_the_same_moments(outcomes):
    assert len(outcomes) == len(FORMATS) * len(KINDS) * len(SEEDS) >= 300
    print(table(outcomes))
    other = {which: outcome for which, outcome in outcomes.items() if outcome not in ("refused", "right")}
    assert set(other.values()) <= {"moved", "unreadable"}, other  # no other exception
    assert list(other.values()).count("moved") <= 0.01 * len(outcomes), other
    assert {(name, outcome) for (name, _, _), outcome in other.items()} <= CAUSES.keys(), other


def table(outcomes) -> str:
    """Return the number of files by format, kind of damage and outcome."""
    counts = Counter((name, kind, outcome) for (name, kind, _), outcome in outcomes.items())
    results = ["refused", "right", "unreadable", "moved"]
    rows = [["/".join(results), *[kind.__name__ for kind in KINDS]], ["---"] * (1 + len(KINDS))]
    for title, names in ({name: [name] for name in FORMATS} | {"all": FORMATS}).items():
        rows.append([title])
        for kind in KINDS:
            sums = [sum(counts[name, kind.__name__, result] for name in names) for result in results]
            rows[-1].append("/".join(map(str, sums)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def refusal(content: bytes, name: str) -> str:
    with pytest.raises(ValueError) as error:
        numbers(content, name)
    return str(error.value)


def test_what_only_the_log_of_ffmpeg_tells(tmp_path):
    for name, message in (("h264.mkv", "Element at .* exceeds"), ("h264.flv", "Packet mismatch")):
        content = write(tmp_path / name, draw=numbered, **FORMATS[name]).read_bytes()
        middle = len(content) // 2
        damaged = content[:middle] + content[middle + 1000 :] + bytes(1000)
        assert re.match(rf"{name}: damaged after \d\.\d\d s \(.*{message}", refusal(damaged, name))


@pytest.mark.parametrize("level", [None, av.logging.PANIC, av.logging.VERBOSE])
def test_logging_is_as_before(tmp_path, level):
    path = write(tmp_path / "a.mkv", draw=numbered)
    content = path.read_bytes()
    try:
        for skip in (True, False):
            av.logging.set_level(level)
            av.logging.set_skip_repeated(skip)
            open_video(path, 1.0)
            refusal(content[: len(content) // 2], "a.mkv")
            assert (av.logging.get_level(), av.logging.get_skip_repeated()) == (level, skip)
    finally:
        av.logging.set_level(None)
        av.logging.set_skip_repeated(True)


def test_messages_of_other_threads_stay_silent(caplog):
    with logged_errors(av.logging) as logs:
        thread = Thread(target=av.logging.log, args=(av.logging.ERROR, "flv", "of another file"))
        thread.start()
        thread.join()
        av.logging.log(av.logging.ERROR, "flv", "of this file")
        av.logging.log(av.logging.ERROR, "mov", "of another demuxer")
        assert take_error(logs, "flv") == "of this file"
        assert take_error(logs, "flv") is None
    assert not caplog.records


def test_transport_stream_that_ends_inside_a_packet(tmp_path):
    for name in ("a.ts", "a.m2ts"):
        content = write(tmp_path / name, draw=numbered, sound=(0, 9)).read_bytes()
        length = len(numbers(content, name))
        assert "a.m2ts: cut off at" in refusal(content[: len(content) * 2 // 3 // 192 * 192 + 100], "a.m2ts")
        assert len(numbers(bytes(100) + content, name)) == length  # a capture begins inside a packet


def test_fragments_that_end_inside_a_box(tmp_path):
    content = write(tmp_path / "a.mp4", draw=numbered, **FORMATS["fragments.mp4"]).read_bytes()
    header = content.rindex(b"moof") + 20
    assert re.search(r"a\.mp4: cut off at [45]\.\d+ s", refusal(content[:header], "a.mp4"))
    second = content.index(b"moof", content.index(b"moof") + 4) - 4
    assert numbers(content[:second], "a.mp4") == [2, 7]  # a recording that ends between two boxes is whole


def test_end_of_gif(tmp_path):
    content = write(tmp_path / "a.gif", draw=numbered, **FORMATS["a.gif"]).read_bytes()
    whole = numbers(content, "a.gif")
    assert numbers(content[:-1], "a.gif") == numbers(content + b"comment", "a.gif") == whole
    assert "a.gif: cut off at" in refusal(content[:-10], "a.gif")


def test_asf_that_is_shorter_than_it_says(tmp_path):
    content = write(tmp_path / "a.wmv", draw=numbered, **FORMATS["wmv2.wmv"]).read_bytes()
    assert re.search(r"a\.wmv: cut off at [0-5]\.\d+ s", refusal(content[: len(content) // 2 // 3200 * 3200], "a.wmv"))


def test_avi_with_fewer_or_more_pictures_than_it_says(tmp_path):
    content = write(tmp_path / "a.avi", draw=numbered, **FORMATS["mpeg4.avi"]).read_bytes()
    chunk = content.index(b"00dc", len(content) // 2)
    assert re.search(r"a\.avi: cut off at [0-5]\.\d+ s of 6\.00 s", refusal(content[:chunk], "a.avi"))
    place = content.index(b"vids") + 32
    assert struct.unpack("<I", content[place : place + 4]) == (60,)
    damaged = content[:place] + struct.pack("<I", 40) + content[place + 4 :]
    assert "a.avi: damaged: 6.00 s of pictures, not 4.00 s" in refusal(damaged, "a.avi")


def test_pictures_that_the_decoder_drops(tmp_path):
    path = write(tmp_path / "a.mp4", draw=numbered, codec_options={"x264-params": "keyint=20:scenecut=0"})
    with av.open(str(path)) as container:
        first = next(container.demux(video=0))
    content = bytearray(path.read_bytes())
    content[first.pos : first.pos + first.size] = bytes(first.size)
    assert "a.mp4: decoding failed after 0.00 s" in refusal(bytes(content), "a.mp4")

    awaited = AwaitedPictures()
    for time in (10, 5, 20, 30, 40):  # 5 needs a picture before the first key frame
        awaited.add(SimpleNamespace(pts=time, dts=time, size=100))
    awaited.add(SimpleNamespace(pts=50, dts=50, size=7))  # nothing has changed
    assert awaited.lost(before=10) == []
    assert awaited.lost(before=30) == [20]
    assert awaited.times == [40]
    for time in range(100, 1_000_000, 100):
        awaited.add(SimpleNamespace(pts=time, dts=time, size=100))
    assert len(awaited.times) == MAX_AWAITED and awaited.times[-1] == 999_900


def test_sound_that_begins_late(tmp_path):
    """PyAV fails after the last packet if a stream appeared in the middle."""
    path = write(tmp_path / "a.flv", draw=numbered)
    content = path.read_bytes()
    last_tag = len(content) - 4 - int.from_bytes(content[-4:])
    size, time = (101).to_bytes(3), (5900).to_bytes(3)
    sound = b"\x08" + size + time + bytes(4) + b"\x34" + bytes(100) + (112).to_bytes(4)  # PCM
    late = content[:last_tag] + sound + content[last_tag:]
    assert numbers(late, "a.flv") == numbers(content, "a.flv")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs=2, default=[SEEDS.start, SEEDS.stop])
    arguments = parser.parse_args()
    damage_all(arguments.folder, range(*arguments.seeds))
