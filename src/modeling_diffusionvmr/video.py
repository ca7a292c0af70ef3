"""
Read the frames of each clip of a video.

Time 0 is the start of the container, as a player counts. The frames are those of FFmpeg's filter
`fps=1/clip_seconds:start_time=0`, with which the released CLIP features were made (HERO_Video_Feature_Extractor runs
`fps=1/clip_len`). It rounds every timestamp to a number of clips, so the frame of clip i is the last one before its
center (i + 0.5) * clip_seconds, and there are round(duration / clip_seconds) clips (0.5 is rounded up). The first frame
also fills the clips before it. Backbones that read several frames per clip get those of a higher rate.
"""

import io
import math
import os
import reprlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, pairwise
from numbers import Rational
from typing import Any

import numpy as np

from .checks import check_positive, check_whole
from .download import MAX_DOWNLOAD_BYTES, fetch
from .video_file import VideoFile, import_av, reason
from .video_filters import FrameRateFilter, ToRGB

MAX_VIDEO_SECONDS, MAX_CLIPS = 24 * 60 * 60, 1_000_000

Frames = tuple[np.ndarray, ...]
"""The frames of one clip, each (H, W, 3) uint8 RGB. They are read-only."""


@dataclass(frozen=True)
class FrameSampling:
    """
    Which frames of each clip a backbone reads, and at which size.

    Args:
        rate: frames per second, a whole number or a `Fraction`. FFmpeg's filter `fps=rate:start_time=0` takes them.
        indices: which of these frames a clip consists of, counted from the clip's first frame, in ascending order.
            They can repeat, and reach beyond the clip.
        crop: scale the short side to this number of pixels (bicubic) and crop the middle. `None`: leave frames as they
            are, except that those above 1080p are reduced to it.

    Raises:
        ValueError: if a value is invalid. The message names it.
    """

    rate: Fraction | int
    indices: Sequence[int] = (0,)
    crop: int | None = None

    def __post_init__(self):
        if not isinstance(self.rate, Rational) or self.rate <= 0:
            raise ValueError(f"`rate` must be a whole number or a Fraction above 0, got {self.rate!r}")
        if not len(self.indices):
            raise ValueError("`indices` must contain at least one frame")
        for index in self.indices:
            check_whole(index, "each of `indices`", 0)
        if any(after < before for before, after in pairwise(self.indices)):
            raise ValueError(f"`indices` must be in ascending order, got {[*self.indices]}")
        if self.crop is not None:
            check_whole(self.crop, "`crop`", 1)

    def frames_of_clip(self, clip: int, clip_seconds: Fraction) -> list[int]:
        """Return the numbers of the frames of a clip, counted from the start of the video."""
        first = math.floor(clip * clip_seconds * self.rate + Fraction(1, 2))
        return [first + index for index in self.indices]


class Video:
    """
    A video as clips, created by `open_video`.

    Iterating yields the frame (H, W, 3) uint8 RGB of each clip. A video can be iterated more than once.

    Raises:
        ValueError: if it lasts longer than `max_video_seconds`, or has more than `MAX_CLIPS` clips.

    Attributes:
        name: for messages.
        duration: in seconds, from the start of the container to the end of the last frame.
        fps: average number of frames per second.
        clip_seconds: length of a clip in seconds.
        num_clips: duration / clip_seconds, rounded, at least 1.
        exact_duration, exact_clip_seconds: as fractions, since times often lie between two clips. 0.1 is 1/10.
    """

    def __init__(self, name: str, duration: Fraction, fps: float, clip_seconds: float, max_video_seconds: float):
        check_positive(clip_seconds, "`clip_seconds`")
        check_positive(max_video_seconds, "`max_video_seconds`")
        self.name, self.duration, self.fps, self.clip_seconds = name, float(duration), fps, clip_seconds
        self.exact_duration = duration
        self.exact_clip_seconds = max(Fraction(clip_seconds).limit_denominator(10**6), Fraction(1, 10**6))
        self.num_clips = max(1, math.floor(duration / self.exact_clip_seconds + Fraction(1, 2)))
        # Timestamps can claim any duration: two pictures can be years apart. Limit the work that follows from them
        if duration > max_video_seconds:
            raise ValueError(
                f"{name}: lasts {self.duration:.0f} s; the limit is {max_video_seconds:g} s (`max_video_seconds`)"
            )
        if self.num_clips > MAX_CLIPS:
            raise ValueError(f"{name}: {self.num_clips} clips of {clip_seconds:g} s; the limit is {MAX_CLIPS}")

    def clips(self, samplings: Sequence[FrameSampling]) -> Iterator[tuple[int, Frames]]:
        """
        Yield the frames of each clip for several samplings in one pass, each with the index of its sampling.

        Each sampling has `num_clips` clips, in the order of time. The last frame of the video is repeated to complete
        the last clip. A repeated frame is the same array.

        Raises:
            ValueError: if the video is damaged. The message names the video and the second.
        """
        raise NotImplementedError

    def __iter__(self) -> Iterator[np.ndarray]:
        for _, (frame,) in self.clips([FrameSampling(1 / self.exact_clip_seconds)]):
            yield frame


class FrameVideo(Video):
    """A video given as decoded frames."""

    def __init__(self, frames: np.ndarray, fps: float, clip_seconds: float, max_video_seconds: float):
        self.frames = np.asarray(frames)
        if self.frames.ndim != 4 or self.frames.shape[-1] != 3 or self.frames.dtype != np.uint8:
            raise ValueError(f"frames must be (T, H, W, 3) uint8, got {self.frames.shape} {self.frames.dtype}")
        if not self.frames.size:
            raise ValueError(f"frames must contain at least one frame and one pixel, got {self.frames.shape}")
        check_positive(fps, "fps")
        self._frame_seconds = 1 / max(Fraction(float(fps)).limit_denominator(10**6), Fraction(1, 10**6))
        duration = len(self.frames) * self._frame_seconds
        super().__init__("the video", duration, float(fps), clip_seconds, max_video_seconds)

    def clips(self, samplings):
        pictures: list[dict[int, np.ndarray]] = [{} for _ in samplings]  # of the latest clip, by index
        for clip in range(self.num_clips):
            for which, sampling in enumerate(samplings):
                numbers = sampling.frames_of_clip(clip, self.exact_clip_seconds)
                indices = [self._index(number, sampling.rate) for number in numbers]
                known = pictures[which]
                pictures[which] = {
                    index: known[index] if index in known else self._picture(index, sampling.crop) for index in indices
                }
                yield which, tuple(pictures[which][index] for index in indices)

    def _index(self, number: int, rate: Fraction) -> int:
        """Return the frame that FFmpeg's filter takes: the last one before (number + 0.5) / rate."""
        last_before = math.ceil((number + Fraction(1, 2)) / rate / self._frame_seconds) - 1
        return min(last_before, len(self.frames) - 1)

    def _picture(self, index: int, crop: int | None) -> np.ndarray:
        if crop is None:
            return _read_only(self.frames[index])
        frame = import_av().VideoFrame.from_ndarray(np.ascontiguousarray(self.frames[index]), format="rgb24")
        frame.time_base = Fraction(1)  # FFmpeg's filters need one
        return _read_only(ToRGB(pixel_aspect=1, crop=crop)(frame))


class FileVideo(Video):
    """A video file. Opening it reads timestamps only. Iterating decodes, with a few frames in memory."""

    def __init__(self, file: Any, clip_seconds: float, max_video_seconds: float):
        self.file = VideoFile(file)
        super().__init__(self.file.name, self.file.end, self.file.fps, clip_seconds, max_video_seconds)

    def _decoded(self) -> Iterator[Any]:
        """Yield the decoded frames."""
        return self.file.decoded()

    def clips(self, samplings):
        readers = [_ClipReader(sampling, self) for sampling in samplings]
        time = 0.0
        try:
            for frame in chain(self._decoded(), [None]):  # all of them, since the last ones can be damaged
                if frame is not None:
                    time = frame.time
                    # The filter ends where its last frame ends. It gives no frame at all for less than half a clip.
                    end = max(self.exact_duration, self.exact_clip_seconds / 2)
                    frame.duration = math.ceil(end / frame.time_base) - frame.pts
                for which, reader in enumerate(readers):
                    for clip in reader.push(frame):
                        yield which, clip
        except (import_av().FFmpegError, OverflowError) as error:
            raise ValueError(f"{self.name}: FFmpeg's filters failed at {time:.2f} s ({reason(error)})") from error


class _ClipReader:
    """Gathers the frames of each clip for one sampling, while a file is decoded."""

    def __init__(self, sampling: FrameSampling, video: FileVideo):
        self._filter = FrameRateFilter(sampling.rate)
        self._to_rgb = ToRGB(video.file.pixel_aspect, sampling.crop)
        self._clips = (sampling.frames_of_clip(clip, video.exact_clip_seconds) for clip in range(video.num_clips))
        self._next = next(self._clips)  # the wanted frames of the next clip
        self._begun: deque[tuple[list[int], list[np.ndarray]]] = deque()  # wanted and found frames; clips may overlap
        self._number = 0  # of the next frame that the filter gives
        self._latest: Any = None
        self._converted: Any = None  # the latest frame that was needed
        self._picture = np.empty(0)  # the same frame as RGB

    def push(self, frame: Any) -> Iterator[Frames]:
        """Yield the clips that one more frame completes, or with `None`, after the last frame, those that are left."""
        for taken in self._filter.push(frame):
            self._latest = taken
            yield from self._complete(self._number)
            self._number += 1
        if frame is None:
            yield from self._complete(math.inf)

    def _complete(self, last: float) -> Iterator[Frames]:
        """Add the latest frame wherever a frame up to the number `last` is wanted."""
        while self._next and self._next[0] <= last:
            self._begun.append((self._next, []))
            self._next = next(self._clips, [])
        for wanted, found in self._begun:
            while len(found) < len(wanted) and wanted[len(found)] <= last:
                found.append(self._latest_picture())
        while self._begun and len(self._begun[0][1]) == len(self._begun[0][0]):
            yield tuple(self._begun.popleft()[1])

    def _latest_picture(self) -> np.ndarray:
        # The filter repeats a frame without copying it. The old frame is kept, so its memory is not used for another
        # one: frames at the same address are the same.
        if self._converted is None or _address(self._converted) != _address(self._latest):
            self._converted, self._picture = self._latest, _read_only(self._to_rgb(self._latest))
        return self._picture


def _address(frame: Any) -> int:
    return frame.planes[0].buffer_ptr


def _read_only(frame: np.ndarray) -> np.ndarray:
    """Return a view of a frame that nobody can change, since several clips and backbones may share it."""
    view = frame.view()
    view.flags.writeable = False
    return view


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
    video: Any,
    clip_seconds: float,
    max_download_bytes: int = MAX_DOWNLOAD_BYTES,
    max_video_seconds: float = MAX_VIDEO_SECONDS,
    progress: bool = False,
) -> Video:
    """
    Open a video to read its clips.

    Args:
        video: one of
            - a path,
            - an `http://`, `https://` or `file://` URL. A download lasts as long as the returned object,
            - a binary file object (anything with `read` and `seek`),
            - a row of a `datasets` column of type `Video`: a dict of `path` and `bytes`, or the decoder that `datasets`
              makes from it, whose file is read like any other,
            - `(frames, fps)` with frames (T, H, W, 3) uint8 RGB and fps any real number.
        clip_seconds: length of a clip in seconds.
        max_download_bytes: maximum size of a download.
        max_video_seconds: maximum duration. It bounds the work for a file that claims to last for years.
        progress: show a progress bar of a download.

    Raises:
        FileNotFoundError: if the file does not exist.
        OSError: if a download fails.
        ValueError: if `video` is of another type, if a download is too large or its URL is invalid, if the file is not
            a video but, for example, a playlist, has no video stream or no frames, or is damaged or cut off (raised
            here or while iterating; the message names the file and the second), if the frames have another shape, or if
            the video lasts longer than `max_video_seconds`.
        ImportError: if a file is given and PyAV is not installed.
    """
    source = getattr(video, "_hf_encoded", video)  # the row from which `datasets` made a decoder
    if isinstance(source, Mapping) and {"path", "bytes"} & source.keys():
        source = _file_of_row(source)
    source = fetch(source, max_download_bytes, progress)
    if isinstance(source, tuple) and len(source) == 2:
        return FrameVideo(*source, clip_seconds, max_video_seconds)
    if isinstance(source, (str, os.PathLike)) or (hasattr(source, "read") and hasattr(source, "seek")):
        return FileVideo(source, clip_seconds, max_video_seconds)
    raise ValueError(
        "a video must be a path, a URL, a binary file object, a row of a `datasets` video column or (frames, fps), "
        f"got {type(video).__name__}: {reprlib.repr(video)}"
    )
