"""
Read one frame per clip from a video.

The center of clip i is at (i + 0.5) * clip_seconds, counted from the first frame. The clip's frame is the one that a
player shows at that time: the last frame whose timestamp is not later.
"""

import importlib
import io
import math
import os
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from .checks import check_positive
from .download import MAX_DOWNLOAD_BYTES, fetch

# In seconds: a file that ends earlier than its header says was cut off, but headers are rounded and the streams of a
# file end at slightly different times
MISSING_END_TOLERANCE = 0.5
# In seconds: a clip center that equals a frame's timestamp must not round down to the previous frame
TIME_TOLERANCE = 1e-6


def _import_av():
    # Imported on demand: features and decoded frames do not need it
    try:
        return importlib.import_module("av")
    except ImportError as error:
        raise ImportError("PyAV is required to read video files: `pip install av`") from error


class Video:
    """
    A video as one frame per clip, created by `open_video`.

    Iterating yields `num_clips` frames (H, W, 3) uint8 RGB. A video can be iterated more than once.

    Attributes:
        duration: in seconds.
        clip_seconds: length of a clip in seconds.
        num_clips: number of clips whose center lies within the duration, at least 1.
    """

    def __init__(self, duration: float, clip_seconds: float):
        check_positive(clip_seconds, "`clip_seconds`")
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
    """A video given as decoded frames."""

    def __init__(self, frames: np.ndarray, fps: float, clip_seconds: float):
        self.frames = np.asarray(frames)
        if self.frames.ndim != 4 or self.frames.shape[-1] != 3 or self.frames.dtype != np.uint8:
            raise ValueError(f"frames must be (T, H, W, 3) uint8, got {self.frames.shape} {self.frames.dtype}")
        if not self.frames.size:
            raise ValueError(f"frames must contain at least one frame and one pixel, got {self.frames.shape}")
        check_positive(fps, "fps")
        self.fps = float(fps)
        super().__init__(len(self.frames) / self.fps, clip_seconds)

    def _timed_frames(self):
        return ((index / self.fps, frame) for index, frame in enumerate(self.frames))

    def _to_rgb(self, frame):
        return frame


class _ReadOnly:
    """The methods of a binary file that PyAV needs. Others mislead it: the `mode` of a temporary file is "w+b"."""

    def __init__(self, file: Any):
        self.read = file.read
        self.seek = file.seek

    def tell(self) -> int:
        return self.seek(0, os.SEEK_CUR)


class FileVideo(Video):
    """A video file. Opening it reads timestamps only. Iterating decodes, with at most two frames in memory."""

    def __init__(self, file: Any, clip_seconds: float):
        self.file = file
        self.is_path = isinstance(file, (str, os.PathLike))
        name = file if self.is_path else getattr(file, "name", None)
        self.name = str(name if isinstance(name, (str, os.PathLike)) else file)  # a temporary file's name is a number
        if self.is_path and not os.path.exists(file):
            raise FileNotFoundError(f"{self.name}: no such file")
        super().__init__(self._measure(), clip_seconds)

    @contextmanager
    def _opened(self):
        av = _import_av()
        if not self.is_path:
            self.file.seek(0)
        try:
            container = av.open(self.file if self.is_path else _ReadOnly(self.file), mode="r")
        except (av.FFmpegError, TypeError) as error:  # TypeError: a file object opened in text mode
            raise ValueError(f"{self.name}: not a readable video ({_reason(error)})") from error
        with container:
            # FFmpeg also reads images and text files as videos
            if container.format.name.endswith("_pipe") or container.format.name in ("image2", "tty"):
                raise ValueError(f"{self.name}: not a video ({container.format.long_name})")
            # The cover art of an audio file is a video stream of one picture
            cover = av.stream.Disposition.attached_pic
            streams = [stream for stream in container.streams.video if not stream.disposition & cover]
            if not streams:
                raise ValueError(f"{self.name}: no video stream")
            yield container, streams[0]

    def _measure(self) -> float:
        """
        Return the seconds from the start of the first frame to the end of the last one.

        This reads the timestamps of all packets without decoding, because the duration in the header may be missing,
        wrong, or that of a longer audio track.
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
                raise ValueError(f"{self.name}: reading failed at {end_of_all:.2f} s ({_reason(error)})") from error
        if end_of_all < promised - MISSING_END_TOLERANCE:
            raise ValueError(f"{self.name}: cut off at {end_of_all:.2f} s of {promised:.2f} s")
        if not stamped:
            raise ValueError(f"{self.name}: frames have no timestamps; put them into a container such as mp4")
        if end <= start:
            raise ValueError(f"{self.name}: no frames")
        return end - start

    def _timed_frames(self):
        av = _import_av()
        time, start = 0.0, None
        try:
            with self._opened() as (container, stream):
                # PyAV's default, one thread per frame, silently drops frames that cannot be decoded
                stream.thread_type = "SLICE"
                for frame in container.decode(stream):
                    start = frame.time if start is None else start
                    time = frame.time - start
                    if frame.is_corrupt:
                        raise ValueError(f"{self.name}: the frame at {time:.2f} s is damaged")
                    yield time, frame
        except av.FFmpegError as error:
            raise ValueError(
                f"{self.name}: decoding failed after {time:.2f} s of {self.duration:.2f} s ({_reason(error)})"
            ) from error
        if start is None:
            raise ValueError(f"{self.name}: no frames that can be decoded")

    def _to_rgb(self, frame):
        # Phones store upright videos sideways, with a rotation in the metadata
        return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _file_of_row(row: Mapping[str, Any]) -> Any:
    """Return the path, or the content as a file, of a row of a `datasets` column of type `Video`."""
    path, content = row.get("path"), row.get("bytes")
    if content is None:
        return path
    if not isinstance(content, (bytes, bytearray, memoryview)):
        raise ValueError(f"`bytes` of a video must be bytes, got {type(content).__name__}: {reprlib.repr(content)}")
    file: Any = io.BytesIO(content)
    file.name = path or f"a video of {len(content)} bytes"  # for messages
    return file


def open_video(
    video: Any, clip_seconds: float, max_download_bytes: int = MAX_DOWNLOAD_BYTES, progress: bool = False
) -> Video:
    """
    Open a video to read one frame per clip.

    Args:
        video: one of
            - a path,
            - an `http://`, `https://` or `file://` URL. A download lasts as long as the returned object,
            - a binary file object (anything with `read` and `seek`),
            - a row of a `datasets` column of type `Video`: a dict of `path` and `bytes`, or the decoder that `datasets`
              makes of it. The decoder is not used: its file is read like any other,
            - `(frames, fps)` with frames (T, H, W, 3) uint8 RGB and fps any real number.
        clip_seconds: length of a clip in seconds.
        max_download_bytes: maximum size of a download.
        progress: show a progress bar of a download.

    Raises:
        FileNotFoundError: if the file does not exist.
        OSError: if a download fails.
        ValueError: if `video` is of another type, if a download is too large or its URL is invalid, if the file is not
            a video, has no video stream or no frames, or is damaged or cut off (raised here or while iterating; the
            message names the file and the second), or if the frames have another shape.
        ImportError: if a file is given and PyAV is not installed.
    """
    source = getattr(video, "_hf_encoded", video)  # `datasets` remembers there what it made a decoder of
    if isinstance(source, Mapping) and {"path", "bytes"} & source.keys():
        source = _file_of_row(source)
    source = fetch(source, max_download_bytes, progress)
    if isinstance(source, tuple) and len(source) == 2:
        return FrameVideo(*source, clip_seconds)
    if isinstance(source, (str, os.PathLike)) or (hasattr(source, "read") and hasattr(source, "seek")):
        return FileVideo(source, clip_seconds)
    raise ValueError(
        "a video must be a path, a URL, a binary file object, a row of a `datasets` video column or (frames, fps), "
        f"got {type(video).__name__}: {reprlib.repr(video)}"
    )
