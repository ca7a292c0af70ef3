"""
Read the pictures of a video file, with timestamps in seconds from the start of the container, as a player counts them.
"""

import importlib
import math
import os
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from fractions import Fraction
from typing import Any

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


def import_av():
    """Return PyAV. It is imported on demand: features and decoded frames do not need it."""
    try:
        importlib.import_module("av.filter")
        return importlib.import_module("av")
    except ImportError as error:
        raise ImportError("PyAV is required to read video files: `pip install av`") from error


class _ReadOnly:
    """The methods of a binary file that PyAV needs. Others mislead it: the `mode` of a temporary file is "w+b"."""

    def __init__(self, file: Any, name: str):
        self.read = file.read
        self.seek = file.seek
        self.name = name  # its extension helps to recognize the format

    def tell(self) -> int:
        return self.seek(0, os.SEEK_CUR)


class VideoFile:
    """
    A video file. Opening it reads timestamps only.

    Args:
        file: a path or a binary file object.

    Raises:
        FileNotFoundError, ValueError: see `open_video`.

    Attributes:
        name: for messages.
        end: seconds from the start of the container to the end of the last picture.
        fps: average number of pictures per second.
        pixel_aspect: width of a pixel divided by its height.
        has_sound: whether there is a sound track that FFmpeg can decode.
    """

    def __init__(self, file: Any):
        self.file = file
        self.is_path = isinstance(file, (str, os.PathLike))
        name = file if self.is_path else getattr(file, "name", None)
        self.name = str(name if isinstance(name, (str, os.PathLike)) else file)  # a temporary file's name is a number
        if self.is_path and not os.path.exists(file):
            raise FileNotFoundError(f"{self.name}: no such file")
        if self.is_path and not os.path.isfile(file):  # a pipe would wait for its other end
            raise ValueError(f"{self.name}: not a readable video (not a regular file)")
        self.end = self._measure()

    def decoded(self, with_sound: bool = False) -> Iterator[Any]:
        """
        Decode the pictures and, with `with_sound`, also the sound (`av.AudioFrame`), in the order of the file.
        Timestamps count from the container's start. Sound that cannot be decoded is skipped with a warning.
        """
        av = import_av()
        time, following, has_begun, is_empty = 0.0, 0, False, True
        with self._opened() as (container, stream):
            # PyAV's default, one thread per frame, silently drops frames that cannot be decoded
            stream.thread_type = "SLICE"
            sound = _sound_track(container) if with_sound else None
            for packet in self._packets(container, stream):
                if packet.stream is sound:
                    yield from self._decoded_sound(packet)
                if packet.stream is not stream:
                    continue
                has_begun |= packet.is_keyframe
                try:
                    frames = packet.decode()
                except av.FFmpegError as error:
                    if not has_begun:  # a capture often begins between key frames
                        continue
                    raise ValueError(
                        f"{self.name}: decoding failed after {time:.2f} s of {float(self.end):.2f} s ({reason(error)})"
                    ) from error
                for frame in frames:
                    # B-frames in AVI have the time of decoding only, and the last of them none
                    frame.pts = next(stamp for stamp in (frame.pts, frame.dts, following) if stamp is not None)
                    following, time, is_empty = frame.pts + frame.duration, frame.time, False
                    if frame.is_corrupt and has_begun:
                        raise ValueError(f"{self.name}: the frame at {time:.2f} s is damaged")
                    yield frame
        if is_empty:
            raise ValueError(f"{self.name}: no frames that can be decoded")

    def _decoded_sound(self, packet: Any) -> list[Any]:
        try:
            return [frame for frame in packet.decode() if frame.pts is not None]
        except import_av().FFmpegError as error:
            warnings.warn(f"{self.name}: parts of its sound cannot be decoded ({reason(error)})", stacklevel=2)
            return []

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        """Open the container and choose the stream of the pictures: FFmpeg's best one, which is not a cover."""
        av = import_av()
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
                raise ValueError(f"{self.name}: not a readable video ({reason(error)})") from error
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
        av = import_av()
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
            raise ValueError(f"{self.name}: reading failed at {time:.2f} s ({reason(error)})") from error

    def _measure(self) -> Fraction:
        """
        Return the seconds from the start of the container to the end of the last picture.

        This reads the timestamps of all packets without decoding, because the duration in the header may be missing,
        wrong, or that of a longer audio track.
        """
        av = import_av()
        start, end, end_of_all = math.inf, Fraction(0), Fraction(0)
        with self._opened() as (container, stream):
            self.pixel_aspect = stream.sample_aspect_ratio or Fraction(1)
            frame_seconds = 1 / stream.average_rate if stream.average_rate else 0
            self.fps = float(stream.average_rate or 0)
            self.has_sound = _sound_track(container) is not None
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

    def _is_cut_off(self, size: int) -> bool:
        """Return whether a file is shorter than its header says, or does not say."""
        with open(self.file, "rb") if self.is_path else nullcontext(self.file) as file:
            file.seek(0)
            stated = _stated_bytes(file.read(4096))
        return stated is None or not size >= stated  # it can be NaN


def _sound_track(container: Any) -> Any:
    """Return FFmpeg's best audio stream, or `None` if there is none that can be decoded."""
    best = container.streams.best("audio")
    return None if best is None or best.codec_context is None else best


def _can_restart(container: Any) -> bool:
    """Return whether timestamps may jump in the middle of a file of this format."""
    return bool(container.format.flags & import_av().format.Flags.ts_discont.value)


def _stated_bytes(head: bytes) -> float | None:
    """Return the size of a Matroska or FLV file according to its first bytes, `None` for other formats."""
    if segment := re.match(rb"\x1a\x45\xdf\xa3.*?\x18\x53\x80\x67([^\0])", head, re.DOTALL):
        # An EBML number: the leading zeros of its first byte are the number of bytes that follow
        first, length = segment.start(1), 9 - segment[1][0].bit_length()
        return first + length + int.from_bytes(head[first : first + length]) - (1 << 7 * length)
    if metadata := re.match(rb"FLV.*?filesize\0(.{8})", head, re.DOTALL):
        return struct.unpack(">d", metadata[1])[0]
    return None


def reason(error: Exception) -> str:
    """Return what FFmpeg or the operating system says, without numbers and paths."""
    return getattr(error, "strerror", None) or str(error)
