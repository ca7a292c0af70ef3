"""`benchmark.py --part extract`: the stages of extracting features from videos."""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from benchmark_common import Clock, device_name
from modeling_diffusionvmr.base_backbone import Backbone, encode_video
from modeling_diffusionvmr.cli.options import check_device
from modeling_diffusionvmr.data.annotations import SALIENCY_CLIP_SECONDS
from modeling_diffusionvmr.data.extraction import VIDEOS_AT_ONCE, Output, extract_videos
from modeling_diffusionvmr.dual_encoders import ClipBackbone
from modeling_diffusionvmr.slowfast import SlowFastBackbone, SlowFastConfig, SlowFastModel
from modeling_diffusionvmr.video import Video, open_video

BATCH_SIZE = 32


def write_moving_texture(path: Path, seconds: float, seed: int) -> None:
    """Write a video of 720p H.264 at 30 frames per second and 2.5 Mbit/s, over which a blurred texture moves."""
    import av

    width, height, fps = 1280, 720, 30
    rng, margin = np.random.default_rng(seed), 240
    texture = rng.normal(size=(height + margin, width + margin, 3))
    for axis in (0, 1):
        texture = np.cumsum(texture, axis=axis)
        texture = np.roll(texture, -9, axis) - np.roll(texture, 9, axis)  # a moving average
    texture = (127 + 50 * texture / texture.std()).clip(0, 255).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = width, height, "yuv420p", 2_500_000
        for index in range(round(seconds * fps)):
            x, y = (round(margin * (1 + wave(index / fps)) / 2) for wave in (np.cos, np.sin))
            view = np.ascontiguousarray(texture[y : y + height, x : x + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(view, format="rgb24")))
        container.mux(stream.encode())


def random_backbones(seed: int) -> dict[str, Backbone]:
    """Return the backbones of the released features, in full size and with random weights."""
    torch.manual_seed(seed)
    clip = ClipBackbone(CLIPModel(CLIPConfig()), CLIPImageProcessorPil(), CLIPTokenizer())  # ViT-B/32 is the default
    return {"clip": clip, "slowfast": SlowFastBackbone(SlowFastModel(SlowFastConfig()))}


def encode_in_stages(backbones: Sequence[Backbone], video: Video, clock: Clock) -> None:
    """Do the work of `encode_video`, but one stage after the other, to measure each of them."""
    clips = video.clips([backbone.sampling(video.exact_clip_seconds, video.fps) for backbone in backbones])
    inputs: list[list[Any]] = [[] for _ in backbones]
    while True:
        with clock("decoding"):
            which, frames = next(clips, (None, ()))
        if which is None:
            break
        with clock("preparation"):
            inputs[which].append(backbones[which].prepare(frames))
        if len(inputs[which]) == max(1, BATCH_SIZE // len(frames)):
            with clock("forward"):
                backbones[which].encode_clips(default_collate(inputs[which]))
            inputs[which] = []
    for backbone, rest in zip(backbones, inputs):
        if rest:
            with clock("forward"):
                backbone.encode_clips(default_collate(rest))


def measure_extraction(arguments: argparse.Namespace) -> dict:
    """Measure the seconds that extraction takes per hour of video, and where they go."""
    check_device(arguments.device)
    device = torch.device(arguments.device)
    available = {name: backbone.to(device) for name, backbone in random_backbones(arguments.seed).items()}
    per_hour = 3600 / arguments.video_seconds
    table = []
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "video.mp4"
        write_moving_texture(path, arguments.video_seconds, arguments.seed)
        for names in (["clip"], ["slowfast"], ["clip", "slowfast"]):
            backbones = [available[name] for name in names]
            clock = Clock(device)
            for repeat in range(arguments.repeats):
                encode_in_stages(backbones, open_video(path, SALIENCY_CLIP_SECONDS), clock)
                with clock("one video"):
                    encode_video(backbones, open_video(path, SALIENCY_CLIP_SECONDS), BATCH_SIZE)
                outputs = [Output(Path(work, f"{len(table)}_{repeat}", name), available[name], name) for name in names]
                videos = dict.fromkeys(map(str, range(VIDEOS_AT_ONCE)), path)
                cpu_started = time.process_time()
                with clock("extract"):
                    extract_videos(outputs, videos, SALIENCY_CLIP_SECONDS, BATCH_SIZE)
                clock.seconds["CPU of extract"] += time.process_time() - cpu_started
            measured = {name: seconds / arguments.repeats for name, seconds in clock.seconds.items()}
            measured["extract"] /= VIDEOS_AT_ONCE
            measured["CPU of extract"] /= VIDEOS_AT_ONCE
            seconds = {name: round(value * per_hour) for name, value in measured.items()}
            table.append({"backbones": " + ".join(names), **seconds})
    return {
        "data": f"simulated video of {arguments.video_seconds} s (seed {arguments.seed}), random weights",
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "unit": "seconds per hour of video",
        "table": table,
    }
