"""
File -> iterator of frames at clip times.

Clip i is centred at (i + 0.5) * clip_seconds, counted from the first frame, and is seen through the frame that a player
shows at that moment: the last one whose time stamp is not later.
"""

import importlib
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

SECONDS_ALLOWED_TO_MISS = 0.5  # headers round, and streams of one file end a little apart; more than that was cut off
TIME_TOLERANCE = 1e-6  # seconds; a centre that falls on a frame's own time is not to round into the frame before


def _import_av():
    # Optional, and loaded when needed: frames that are decoded already, and features, need none of it
    try:
        return importlib.import_module("av")
    except ImportError as error:
        raise ImportError("reading a video file needs PyAV: `pip install av`") from error


class Video:
    """
    Frames with their times, seen once a clip. `open_video` makes it.

    Attributes:
        duration: seconds.
        num_clips: clips whose centre lies inside the duration, at least 1.

    Iterating gives `num_clips` frames (H, W, 3) uint8 RGB, and can be done again.
    """

    def __init__(self, duration: float, clip_seconds: float):
        if not (math.isfinite(clip_seconds) and clip_seconds > 0):
            raise ValueError(f"`clip_seconds` must be a positive number, got {clip_seconds}")
        self.duration = duration
        self.clip_seconds = clip_seconds
        self.num_clips = max(1, math.ceil(duration / clip_seconds - 0.5 - TIME_TOLERANCE))

    def __iter__(self) -> Iterator[np.ndarray]:
        shown, clip = None, 0
        for time, frame in self._timed_frames():
            while shown is not None and (clip + 0.5) * self.clip_seconds < time - TIME_TOLERANCE:
                yield self._to_rgb(shown)
                clip += 1
                if clip == self.num_clips:
                    return
            shown = frame
        for _ in range(clip, self.num_clips):
            yield self._to_rgb(shown)

    def _timed_frames(self) -> Iterator[tuple[float, Any]]:
        raise NotImplementedError

    def _to_rgb(self, frame: Any) -> np.ndarray:
        raise NotImplementedError


class FrameVideo(Video):
    """A video that is decoded already."""

    def __init__(self, frames: np.ndarray, fps: float, clip_seconds: float):
        self.frames = np.asarray(frames)
        if self.frames.ndim != 4 or self.frames.shape[-1] != 3 or self.frames.dtype != np.uint8:
            raise ValueError(f"frames must be (T, H, W, 3) uint8, got {self.frames.shape} {self.frames.dtype}")
        if not self.frames.size:
            raise ValueError(f"frames must hold at least one frame and one pixel, got {self.frames.shape}")
        if not (math.isfinite(fps) and fps > 0):
            raise ValueError(f"fps must be a positive number of frames a second, got {fps}")
        self.fps = float(fps)
        super().__init__(len(self.frames) / self.fps, clip_seconds)

    def _timed_frames(self):
        return ((index / self.fps, frame) for index, frame in enumerate(self.frames))

    def _to_rgb(self, frame):
        return frame


class FileVideo(Video):
    """A video in a file. Opening it reads time stamps only; iterating decodes, and never holds more than two frames."""

    def __init__(self, file: Any, clip_seconds: float):
        self.file = file
        is_path = isinstance(file, (str, os.PathLike))
        self.name = str(file if is_path else getattr(file, "name", file))  # a `Path` has a name, too: the last part
        if is_path and not os.path.exists(file):
            raise FileNotFoundError(f"{self.name}: no such file")
        super().__init__(self._measure(), clip_seconds)

    @contextmanager
    def _opened(self):
        av = _import_av()
        if not isinstance(self.file, (str, os.PathLike)):
            self.file.seek(0)
        try:
            container = av.open(self.file)
        except (av.FFmpegError, TypeError) as error:  # TypeError: a file object that reads text
            raise ValueError(f"{self.name}: not a video that can be read ({_reason(error)})") from error
        with container:
            # FFmpeg plays these two as videos: a picture, and text as a terminal would show it
            if container.format.name.endswith("_pipe") or container.format.name in ("image2", "tty"):
                raise ValueError(f"{self.name}: not a video ({container.format.long_name})")
            # The cover of an audio file is a video stream too, of one picture
            cover = av.stream.Disposition.attached_pic
            streams = [stream for stream in container.streams.video if not stream.disposition & cover]
            if not streams:
                raise ValueError(f"{self.name}: has no video stream")
            yield container, streams[0]

    def _measure(self) -> float:
        """
        Seconds from the first frame to the end of the last one, by the time stamps of the packets, since the header's
        duration may be absent, wrong, or that of a longer audio track. Reads the file once, without decoding.
        """
        av = _import_av()
        start, end, end_of_all, stamped = math.inf, -math.inf, 0.0, True
        with self._opened() as (container, stream):
            promised = (container.duration or 0) / av.time_base
            frame_seconds = float(1 / stream.average_rate) if stream.average_rate else 0.0
            try:
                for packet in container.demux():
                    if packet.is_corrupt:
                        raise ValueError(f"{self.name}: damaged or cut off at {end_of_all:.2f} s")
                    stamp = packet.pts if packet.pts is not None else packet.dts
                    if packet.size and packet.stream_index == stream.index:
                        stamped &= stamp is not None
                    if not packet.size or packet.is_discard or stamp is None:
                        continue
                    packet_start = float(stamp * packet.time_base)
                    packet_end = packet_start + float((packet.duration or 0) * packet.time_base)
                    end_of_all = max(end_of_all, packet_end)
                    if packet.stream_index == stream.index:
                        start = min(start, packet_start)
                        end = max(end, packet_end if packet.duration else packet_start + frame_seconds)
            except av.FFmpegError as error:
                raise ValueError(f"{self.name}: reading breaks at {end_of_all:.2f} s ({_reason(error)})") from error
        if end_of_all < promised - SECONDS_ALLOWED_TO_MISS:
            raise ValueError(f"{self.name}: cut off, it ends at {end_of_all:.2f} s of {promised:.2f} s")
        if not stamped:
            raise ValueError(f"{self.name}: its frames have no time stamps; put them into a container such as mp4")
        if end <= start:
            raise ValueError(f"{self.name}: holds no frames")
        return end - start

    def _timed_frames(self):
        av = _import_av()
        time, start = 0.0, None
        try:
            with self._opened() as (container, stream):
                # PyAV's other way, a thread a frame, drops a frame that it cannot decode without a word
                stream.thread_type = "SLICE"
                for frame in container.decode(stream):
                    start = frame.time if start is None else start
                    time = frame.time - start
                    if frame.is_corrupt:
                        raise ValueError(f"{self.name}: the frame at {time:.2f} s is broken")
                    yield time, frame
        except av.FFmpegError as error:
            raise ValueError(
                f"{self.name}: decoding breaks after {time:.2f} s of {self.duration:.2f} s ({_reason(error)})"
            ) from error
        if start is None:
            raise ValueError(f"{self.name}: holds no frames that can be decoded")

    def _to_rgb(self, frame):
        # A phone held upright stores its frames lying down, and says so
        return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def open_video(video: Any, clip_seconds: float) -> Video:
    """
    Opens a video for one frame a clip.

    Args:
        video: a path, a binary file object that can seek, or `(frames (T, H, W, 3) uint8 RGB, fps)`.
        clip_seconds: length of a clip in seconds.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: for a file that is no video, has no video stream or no frames, is broken or cut off (here, or while
            iterating; the file and the second are named), and for frames of another shape.
        ImportError: for a file, where PyAV is not installed.
    """
    if not isinstance(video, tuple):
        return FileVideo(video, clip_seconds)
    if len(video) != 2 or not isinstance(video[1], (int, float, np.number)):
        raise ValueError(f"a decoded video must be (frames, fps), got a tuple of {[type(part) for part in video]}")
    return FrameVideo(*video, clip_seconds)
