"""
Read one frame per clip from a video.

Time 0 is the start of the container, as a player counts. The frames are those of FFmpeg's filter
`fps=1/clip_seconds:start_time=0`, with which the released CLIP features were made (HERO_Video_Feature_Extractor runs
`fps=1/clip_len`). It rounds every timestamp to a number of clips, so the frame of clip i is the last one before its
center (i + 0.5) * clip_seconds, and there are round(duration / clip_seconds) clips (0.5 is rounded up). The first frame
also fills the clips before it.
"""

import importlib
import io
import math
import os
import re
import reprlib
import struct
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from fractions import Fraction
from itertools import compress
from typing import Any

import numpy as np

from .checks import check_positive
from .download import MAX_DOWNLOAD_BYTES, fetch

# In pixels. Larger frames are reduced to this short side before they are kept: 32 frames of 8K are 3.2 GB. Image
# processors of CLIP reduce the short side to 224 or 336 with an antialiasing filter, so what is lost they would drop
# too, but features differ a little. Frames of 1080p or less stay as they are.
MAX_SHORT_SIDE = 1080
MAX_SECONDS, MAX_CLIPS = 24 * 60 * 60, 1_000_000
# FFmpeg's demuxers that read a single file and open no other one: no playlists (HLS, DASH, concat), no SDP, no images
DEMUXERS = (
    "apng,asf,av1,avi,dv,flv,gif,gxf,h264,hevc,ivf,live_flv,m4v,matroska,mjpeg,mov,mpeg,mpegts,mpegvideo,mxf,nsv,nut,obu,"
    "ogg,rm,swf,wtv,yuv4mpegpipe"
)
# PyAV sets this flag of FFmpeg (AVFMT_FLAG_GENPTS). It invents wrong times for B-frames in AVI.
GENERATE_PTS = 1
# In seconds: a file that ends earlier than its header says was cut off, but headers are rounded and the streams of a
# file end at slightly different times
MISSING_END_TOLERANCE = Fraction(1, 2)
# In seconds, as in FFmpeg's command (`-dts_delta_threshold`): larger jumps are another clock, not a pause
MAX_STEP_FORWARD, MAX_STEP_BACK = 10, Fraction(1, 10)


def _import_av():
    # Imported on demand: features and decoded frames do not need it
    try:
        importlib.import_module("av.filter")
        return importlib.import_module("av")
    except ImportError as error:
        raise ImportError("PyAV is required to read video files: `pip install av`") from error


class Video:
    """
    A video as one frame per clip, created by `open_video`.

    Iterating yields `num_clips` frames (H, W, 3) uint8 RGB. A video can be iterated more than once.

    Raises:
        ValueError: if it lasts longer than `MAX_SECONDS`, or has more than `MAX_CLIPS` clips.

    Attributes:
        duration: in seconds, from the start of the container to the end of the last frame.
        clip_seconds: length of a clip in seconds.
        num_clips: duration / clip_seconds, rounded, at least 1.
    """

    def __init__(self, end: Fraction, clip_seconds: float):
        check_positive(clip_seconds, "`clip_seconds`")
        self.clip_seconds = clip_seconds
        # Exact, since times often lie between two clips: 0.1 is 1/10
        self._end, self._clip = end, max(Fraction(clip_seconds).limit_denominator(10**6), Fraction(1, 10**6))
        self.duration = float(end)
        self.num_clips = max(1, math.floor(self._end / self._clip + Fraction(1, 2)))
        # Work must not be sized by what a file claims: two pictures can be years apart
        name = getattr(self, "name", "the video")
        if end > MAX_SECONDS:
            raise ValueError(f"{name}: lasts {self.duration:.0f} s; the limit is {MAX_SECONDS} s")
        if self.num_clips > MAX_CLIPS:
            raise ValueError(f"{name}: {self.num_clips} clips of {clip_seconds:g} s; the limit is {MAX_CLIPS}")

    def __iter__(self) -> Iterator[np.ndarray]:
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
        self._frame_seconds = 1 / max(Fraction(float(fps)).limit_denominator(10**6), Fraction(1, 10**6))
        super().__init__(len(self.frames) * self._frame_seconds, clip_seconds)

    def __iter__(self):
        for clip in range(self.num_clips):
            center = (clip + Fraction(1, 2)) * self._clip
            last_before = math.ceil(center / self._frame_seconds) - 1
            yield self.frames[min(last_before, len(self.frames) - 1)]


class _ReadOnly:
    """The methods of a binary file that PyAV needs. Others mislead it: the `mode` of a temporary file is "w+b"."""

    def __init__(self, file: Any, name: str):
        self.read = file.read
        self.seek = file.seek
        self.name = name  # its extension helps to recognize the format

    def tell(self) -> int:
        return self.seek(0, os.SEEK_CUR)


class FileVideo(Video):
    """A video file. Opening it reads timestamps only. Iterating decodes, with a few frames in memory."""

    def __init__(self, file: Any, clip_seconds: float):
        self.file = file
        self.is_path = isinstance(file, (str, os.PathLike))
        name = file if self.is_path else getattr(file, "name", None)
        self.name = str(name if isinstance(name, (str, os.PathLike)) else file)  # a temporary file's name is a number
        if self.is_path and not os.path.exists(file):
            raise FileNotFoundError(f"{self.name}: no such file")
        if self.is_path and not os.path.isfile(file):  # a pipe would wait for its other end
            raise ValueError(f"{self.name}: not a readable video (not a regular file)")
        super().__init__(self._measure(), clip_seconds)

    def __iter__(self):
        clip = 0
        try:
            for clip, frame in enumerate(self._frames_of_clips()):
                if clip < self.num_clips:  # decode to the end, since the last frames can be damaged
                    yield self._to_rgb(frame)
        except (_import_av().FFmpegError, OverflowError) as error:
            time = clip * self.clip_seconds
            raise ValueError(f"{self.name}: FFmpeg's filters failed at {time:.2f} s ({_reason(error)})") from error

    def _frames_of_clips(self) -> Iterator[Any]:
        graph = None
        for frame in self._decoded():
            if graph is None:
                rate = f"{self._clip.denominator}/{self._clip.numerator}"
                graph = _filter_graph(frame, ("fps", f"fps={rate}:start_time=0"))
            # The filter ends where its last frame ends. It gives no frame at all for less than half a clip.
            frame.duration = math.ceil(max(self._end, self._clip / 2) / frame.time_base) - frame.pts
            yield from _filtered(graph, frame)
        if graph is None:
            raise ValueError(f"{self.name}: no frames that can be decoded")
        yield from _filtered(graph, None)

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        """Open the container and choose the stream of the pictures: FFmpeg's best one, which is not a cover."""
        av = _import_av()
        with ExitStack() as stack:
            try:
                file = stack.enter_context(open(self.file, "rb")) if self.is_path else self.file
                file.seek(0)
                # A file object, not a path: a name can contain a colon, which FFmpeg takes for the end of a protocol
                container = av.open(
                    _ReadOnly(file, self.name),
                    mode="r",
                    metadata_errors="replace",
                    container_options={"format_whitelist": DEMUXERS, "protocol_whitelist": "none"},
                )
            except av.ArgumentError as error:  # FFmpeg's answer to formats that are not on the list
                raise ValueError(f"{self.name}: not a readable video (not in a supported video format)") from error
            except (OSError, av.FFmpegError, TypeError) as error:  # TypeError: a file object opened in text mode
                raise ValueError(f"{self.name}: not a readable video ({_reason(error)})") from error
            stack.enter_context(container)
            container.flags &= ~GENERATE_PTS
            # The cover art of an audio file is a video stream of one picture
            cover = av.stream.Disposition.attached_pic
            streams = [stream for stream in container.streams.video if not stream.disposition & cover]
            if not streams:
                raise ValueError(f"{self.name}: no video stream")
            best = container.streams.best("video")
            stream = best if best in streams else streams[0]
            if stream.codec_context is None:
                raise ValueError(f"{self.name}: FFmpeg has no decoder for its pictures")
            yield container, stream

    def _packets(self, container: Any, stream: Any) -> Iterator[Any]:
        """
        Yield all packets, with timestamps from the container's start.

        Formats whose clock may restart (MPEG-TS, MPEG-PS, Ogg) are often joined or wrap around. As in FFmpeg's command,
        a jump of the pictures' clock is removed. In other formats it is a long frame.
        """
        av = _import_av()
        shift, expected, packet = -Fraction(container.start_time or 0, av.time_base), None, None
        try:
            for packet in container.demux():
                if packet.stream is stream and packet.dts is not None and _can_restart(container):
                    decoded = packet.dts * packet.time_base
                    if expected is not None and not -MAX_STEP_BACK <= decoded - expected <= MAX_STEP_FORWARD:
                        shift += expected - decoded
                    expected = decoded + (packet.duration or 0) * packet.time_base
                shift_in_ticks = round(shift / packet.time_base)
                packet.pts = None if packet.pts is None else packet.pts + shift_in_ticks
                packet.dts = None if packet.dts is None else packet.dts + shift_in_ticks
                yield packet
        except (av.FFmpegError, OverflowError) as error:  # OverflowError: a damaged timestamp
            time = float((packet.dts or 0) * packet.time_base) if packet else 0.0
            raise ValueError(f"{self.name}: reading failed at {time:.2f} s ({_reason(error)})") from error

    def _measure(self) -> Fraction:
        """
        Return the seconds from the start of the container to the end of the last picture.

        This reads the timestamps of all packets without decoding, because the duration in the header may be missing,
        wrong, or that of a longer audio track.
        """
        av = _import_av()
        start, end, end_of_all = math.inf, Fraction(0), Fraction(0)
        with self._opened() as (container, stream):
            self._pixel_aspect = stream.sample_aspect_ratio or 1
            frame_seconds = 1 / stream.average_rate if stream.average_rate else 0
            for packet in self._packets(container, stream):
                is_picture = packet.stream is stream
                if is_picture and packet.is_corrupt:
                    raise ValueError(f"{self.name}: damaged or cut off at {float(end):.2f} s")
                stamp = packet.pts if packet.pts is not None else packet.dts
                if is_picture and packet.size and stamp is None:
                    raise ValueError(f"{self.name}: frames have no timestamps; put them into a container such as mp4")
                if not packet.size or packet.is_discard or stamp is None:
                    continue
                packet_start = stamp * packet.time_base
                packet_end = packet_start + (packet.duration or 0) * packet.time_base
                end_of_all = max(end_of_all, packet_end)
                if is_picture:
                    start = min(start, packet_start)
                    end = max(end, packet_end if packet.duration else packet_start + frame_seconds)
            # Headers count from 0
            promised = Fraction((container.duration or 0) - (container.start_time or 0), av.time_base)
            if end_of_all < promised - MISSING_END_TOLERANCE and not _can_restart(container):  # those have no header
                if self._is_cut_off(container.size):
                    raise ValueError(f"{self.name}: cut off at {float(end_of_all):.2f} s of {float(promised):.2f} s")
                end = promised  # the last picture stays
        if end <= start:
            raise ValueError(f"{self.name}: no frames")
        return end

    def _decoded(self) -> Iterator[Any]:
        """Decode the pictures. Their timestamps count from the container's start."""
        av = _import_av()
        time, following, has_begun = 0.0, 0, False
        with self._opened() as (container, stream):
            # PyAV's default, one thread per frame, silently drops frames that cannot be decoded
            stream.thread_type = "SLICE"
            for packet in self._packets(container, stream):
                if packet.stream is not stream:
                    continue
                has_begun |= packet.is_keyframe
                try:
                    frames = packet.decode()
                except av.FFmpegError as error:
                    if not has_begun:  # a capture often begins between key frames
                        continue
                    raise ValueError(
                        f"{self.name}: decoding failed after {time:.2f} s of {self.duration:.2f} s ({_reason(error)})"
                    ) from error
                for frame in frames:
                    # B-frames in AVI have the time of decoding only, and the last of them none
                    frame.pts = next(stamp for stamp in (frame.pts, frame.dts, following) if stamp is not None)
                    following, time = frame.pts + frame.duration, frame.time
                    if frame.is_corrupt and has_begun:
                        raise ValueError(f"{self.name}: the frame at {time:.2f} s is damaged")
                    yield frame

    def _to_rgb(self, frame: Any) -> np.ndarray:
        """Return a picture as a player shows it: upright, with square pixels, in its colors. Reduce a large one."""
        width, height = max(1, round(frame.width * self._pixel_aspect)), frame.height
        # The long side too: a damaged header can claim any shape of a pixel
        scale = min(1, MAX_SHORT_SIDE / min(width, height), 16 * MAX_SHORT_SIDE / max(width, height))
        size = f"{max(1, round(width * scale))}:{max(1, round(height * scale))}"
        graph = _filter_graph(
            frame, ("scale", size + ":flags=bicubic"), ("setsar", "1"), *_upright(frame), ("format", "rgb24")
        )
        (picture,) = (*_filtered(graph, frame), *_filtered(graph, None))
        return picture.to_ndarray()

    def _is_cut_off(self, size: int) -> bool:
        """Return whether a file is shorter than its header says, or does not say."""
        with open(self.file, "rb") if self.is_path else nullcontext(self.file) as file:
            file.seek(0)
            stated = _stated_bytes(file.read(4096))
        return stated is None or not size >= stated  # it can be NaN


def _can_restart(container: Any) -> bool:
    """Return whether timestamps may jump in the middle of a file of this format."""
    return bool(container.format.flags & _import_av().format.Flags.ts_discont.value)


def _stated_bytes(head: bytes) -> float | None:
    """Return the size of a Matroska or FLV file according to its first bytes, `None` for other formats."""
    if segment := re.match(rb"\x1a\x45\xdf\xa3.*?\x18\x53\x80\x67([^\0])", head, re.DOTALL):
        # An EBML number: the leading zeros of its first byte are the number of bytes that follow
        first, length = segment.start(1), 9 - segment[1][0].bit_length()
        return first + length + int.from_bytes(head[first : first + length]) - (1 << 7 * length)
    if metadata := re.match(rb"FLV.*?filesize\0(.{8})", head, re.DOTALL):
        return struct.unpack(">d", metadata[1])[0]
    return None


def _filter_graph(frame: Any, *filters: tuple[str, str]) -> Any:
    """Return FFmpeg's filters, each a name and its options, for frames like this one."""
    graph = _import_av().filter.Graph()
    graph.threads = 1
    source = graph.add(
        "buffer",
        f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base={frame.time_base}"
        f":colorspace={frame.colorspace}:range={frame.color_range}",
    )
    chain = [graph.add(name, options) for name, options in filters]
    graph.link_nodes(source, *chain, graph.add("buffersink")).configure()
    return graph


def _filtered(graph: Any, frame: Any) -> Iterator[Any]:
    """Push a frame, or `None` after the last one, and yield what comes out."""
    graph.push(frame)
    while True:
        try:
            yield graph.vpull()
        except (BlockingIOError, EOFError):  # it needs more frames, or has ended
            return


def _upright(frame: Any) -> list[tuple[str, str]]:
    """Return the filters that apply a frame's display matrix, one of eight. Phones store upright videos sideways."""
    if "DISPLAYMATRIX" not in frame.side_data:
        return []
    # Column x and row y of the picture are shown at (a x + c y, b x + d y)
    a, b, _, c, d = np.frombuffer(frame.side_data["DISPLAYMATRIX"], np.int32)[:5].tolist()
    transposed = abs(b) > abs(a)
    to_right, to_bottom = (c, b) if transposed else (a, d)
    filters = [("transpose", "cclock_flip"), ("hflip", ""), ("vflip", "")]
    return [*compress(filters, (transposed, to_right < 0, to_bottom < 0))]


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
            a video but, for example, a playlist, has no video stream or no frames, or is damaged or cut off (raised
            here or while iterating; the message names the file and the second), or if the frames have another shape.
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
