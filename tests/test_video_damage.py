"""
Damaged video files are refused, or give the moments of the whole file. They never crash or hang.

A scene that shows the number of its frame is written in several formats, and each file is damaged in six ways with
fixed seeds. Run this file to print a table: `python tests/test_video_damage.py FOLDER` (`--seeds N` for other seeds).
"""

import argparse
import faulthandler
import io
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from modeling_diffusionvmr.video import open_video
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
    "mpeg4.avi": {"codec": "mpeg4"},
    "h264.flv": {},
    "h264.ts": {},
    "mpeg2.mpg": {"codec": "mpeg2video", "rate": 25, "codec_options": {"b": "400000"}},
    "wmv2.wmv": {"codec": "wmv2"},
    "a.gif": {"codec": "gif", "pix_fmt": "rgb8"},
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs=2, default=[SEEDS.start, SEEDS.stop])
    arguments = parser.parse_args()
    damage_all(arguments.folder, range(*arguments.seeds))
