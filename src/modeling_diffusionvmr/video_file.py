"""
Read the pictures of a video file, with timestamps in seconds from the start of the container, as a player counts them.
"""

import importlib
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from fractions import Fraction
from typing import Any

from .video_damage import AwaitedPictures, Gaps, is_incomplete, logged_errors, stated_bytes, take_error

# FFmpeg's demuxers that read a single file and open no other one: no playlists (HLS, DASH, concat), no SDP, no images
DEMUXERS = (
    "apng,asf,av1,avi,dv,flv,gif,gxf,h264,hevc,ivf,live_flv,m4v,matroska,mjpeg,mov,mpeg,mpegts,mpegvideo,mxf,nsv,nut,obu,"
    "ogg,rm,swf,wtv,yuv4mpegpipe"
)
# PyAV sets this flag of FFmpeg (AVFMT_FLAG_GENPTS). It invents wrong times for B-frames in AVI.
GENERATE_PTS = 1
# Each keeps decoded frames in memory, 50 MB for one of 8K
MAX_THREADS = 4
# In seconds: a file that ends earlier than its header says was cut off, but headers are rounded and the streams of a
# file end at slightly different times
END_TOLERANCE = Fraction(1, 2)
# In seconds, as in FFmpeg's command (`-dts_delta_threshold`): larger jumps are another clock, not a pause
MAX_STEP_FORWARD, MAX_STEP_BACK = 10, Fraction(1, 10)
# Frames per second. FFmpeg says 60000 of DV, whose clock ticks that often.
MAX_RATE = 1000
# AVI written to a pipe promises at least this many frames
UNKNOWN_NUMBER = 1 << 30


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
        if self.is_path and not os.path.getsize(file):
            raise ValueError(f"{self.name}: not a readable video (the file is empty)")
        self.end = self._measure()

    def decoded(self, with_sound: bool = False) -> Iterator[Any]:
        """
        Decode the pictures and, with `with_sound`, also the sound (`av.AudioFrame`), about in the order of the file.
        Timestamps count from the container's start. Sound that cannot be decoded is skipped with a warning.
        """
        awaited = AwaitedPictures()
        yield from self._decoded("FRAME", awaited, with_sound)
        if awaited.times:  # threads that decode one frame each drop errors in the last frames
            for _ in self._decoded("SLICE", AwaitedPictures()):
                pass

    def _decoded(self, thread_type: str, awaited: AwaitedPictures, with_sound: bool = False) -> Iterator[Any]:
        av = import_av()
        time, has_begun, is_empty = 0.0, False, True
        following: Any = None
        with self._opened() as (container, stream), ExitStack() as stack:
            stream.thread_type = thread_type
            stream.codec_context.thread_count = min(MAX_THREADS, 1 + (os.cpu_count() or 1))
            # Wait for the threads. They would wait for PyAV to log an error while it waits for them.
            stack.callback(stream.codec_context.flush_buffers)
            sound = _sound_track(container) if with_sound else None
            for packet in self._packets(container, stream):
                if packet.stream is sound:
                    yield from self._decoded_sound(packet)
                if packet.stream is not stream:
                    continue
                has_begun |= packet.is_keyframe
                if has_begun and not packet.is_discard:
                    awaited.add(packet)
                try:
                    frames = packet.decode()
                except av.FFmpegError as error:
                    if not has_begun and _can_restart(container):  # captures often begin between key frames
                        continue
                    raise ValueError(
                        f"{self.name}: decoding failed after {time:.2f} s of {float(self.end):.2f} s ({reason(error)})"
                    ) from error
                for frame in frames:
                    # In AVI, B-frames only have a time of decoding, and the last ones have none
                    frame.pts = next((pts for pts in (frame.pts, frame.dts, following) if pts is not None), None)
                    if frame.pts is None:  # before time 0 in Matroska
                        continue
                    following, time, is_empty = frame.pts + frame.duration, frame.time, False
                    if frame.is_corrupt and has_begun:
                        raise ValueError(f"{self.name}: the frame at {time:.2f} s is damaged")
                    self._check_lost(awaited.lost(before=frame.pts), stream)
                    yield frame
            if is_empty:
                raise ValueError(f"{self.name}: no frames that can be decoded")
            awaited.lost(before=following - 1)  # shown with the last picture: its second field
            self._check_lost(awaited.times, stream)

    def _check_lost(self, lost: list[int], stream: Any) -> None:
        """Raise ValueError if the decoder dropped pictures for more than a moment. Others are hidden or repeated."""
        start, end = (float(time(lost, default=0) * stream.time_base) for time in (min, max))
        if end - start > END_TOLERANCE:
            raise ValueError(f"{self.name}: the frames from {start:.2f} s to {end:.2f} s cannot be decoded")

    def _decoded_sound(self, packet: Any) -> list[Any]:
        try:
            return [frame for frame in packet.decode() if frame.pts is not None]
        except import_av().FFmpegError as error:
            warnings.warn(f"{self.name}: parts of its sound cannot be decoded ({reason(error)})", stacklevel=2)
            return []

    def _bytes(self) -> Any:
        """Return a context manager of the file. A file object stays open."""
        return open(self.file, "rb") if self.is_path else nullcontext(self.file)

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        """Open the container and choose the stream of the pictures: FFmpeg's best one, which is not a cover."""
        av = import_av()
        with ExitStack() as stack:
            try:
                file = stack.enter_context(self._bytes())
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
        shift, packet = -Fraction(container.start_time or 0, av.time_base), None
        latest: Any = None
        expected: Any = None
        try:
            for packet in _demuxed(container):
                if packet.stream is stream and packet.dts is not None and _can_restart(container):
                    decoded = packet.dts * packet.time_base
                    if latest is not None and not latest - MAX_STEP_BACK <= decoded <= expected + MAX_STEP_FORWARD:
                        shift += expected - decoded
                    latest, expected = decoded, decoded + (packet.duration or 0) * packet.time_base
                shift_in_ticks = round(shift / packet.time_base)
                packet.pts = None if packet.pts is None else packet.pts + shift_in_ticks
                packet.dts = None if packet.dts is None else packet.dts + shift_in_ticks
                yield packet
        except IndexError:  # PyAV's, after the last packet, if a stream appeared in the middle: sound that begins late
            return
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
        start, end, end_of_all, skipped = math.inf, Fraction(0), Fraction(0), ""
        pictures, without_time, gaps = 0, 0, Gaps()
        with logged_errors(av.logging) as logs, self._opened() as (container, stream):
            self.pixel_aspect = stream.sample_aspect_ratio or Fraction(1)
            # `None` in Ogg and NUT
            average = stream.average_rate if stream.average_rate and stream.average_rate <= MAX_RATE else None
            rate = average or stream.guessed_rate
            frame_seconds = 1 / rate if rate else 0
            self.has_sound = _sound_track(container) is not None
            for packet in self._packets(container, stream):
                is_picture = packet.stream is stream
                if (message := take_error(logs, container.format.name)) and not skipped:
                    skipped = f"after {float(end):.2f} s ({message})"
                if is_picture:
                    gaps.add(packet, float(end))
                stamp = packet.pts if packet.pts is not None else packet.dts
                without_time += is_picture and packet.size > 0 and stamp is None
                if not packet.size or packet.is_discard or stamp is None:
                    continue
                packet_start = stamp * packet.time_base
                packet_end = packet_start + (packet.duration or 0) * packet.time_base
                end_of_all = max(end_of_all, packet_end)
                if is_picture:
                    pictures += 1
                    start = min(start, packet_start)
                    end = max(end, packet_end if packet.duration else packet_start + frame_seconds)
            if without_time and not pictures:
                raise ValueError(f"{self.name}: frames have no timestamps; put them into a container such as mp4")
            self._check_gaps(gaps, container, stream)
            end = self._checked_end(container, stream, end, end_of_all)
        if skipped:  # if the file is cut off, that was said above
            raise ValueError(f"{self.name}: damaged {skipped}")
        if end <= start:
            raise ValueError(f"{self.name}: no frames")
        self.fps = float(average or pictures / (end - start))
        return end

    def _check_gaps(self, gaps: Gaps, container: Any, stream: Any) -> None:
        """Raise ValueError if packets are missing in the middle of a file."""
        with self._bytes() as file:
            time = gaps.first_loss(file, stream.id)
        if time is not None:
            joined = ". If it was joined from others, convert it first: `ffmpeg -i joined.ts -c copy whole.mp4`"
            advice = joined if _can_restart(container) else ""
            raise ValueError(f"{self.name}: damaged or cut off at {time:.2f} s{advice}")

    def _checked_end(self, container: Any, stream: Any, end: Fraction, end_of_all: Fraction) -> Fraction:
        """Return the end of the last picture, given that of its packet and that of all packets."""
        demuxer = container.format.name
        # Headers count from 0
        promised = Fraction((container.duration or 0) - (container.start_time or 0), import_av().time_base)
        if demuxer == "avi":  # FFmpeg shortens the duration of damaged files, but also gives the header's
            promised = (stream.frames if stream.frames < UNKNOWN_NUMBER else 0) * stream.time_base
            if promised and end > promised + END_TOLERANCE:
                raise ValueError(f"{self.name}: damaged: {float(end):.2f} s of pictures, not {float(promised):.2f} s")
        is_short = end_of_all < promised - END_TOLERANCE and not _can_restart(container)  # those have no header
        with self._bytes() as file:
            file.seek(0)
            stated = stated_bytes(file.read(4096))
            lacks_bytes = is_short if stated is None else not container.size >= stated  # it can be NaN
            is_cut_off = lacks_bytes and (is_short or not promised)  # more bytes than needed may be stated
            if is_cut_off or is_incomplete(file, demuxer):
                of = f" of {float(promised):.2f} s" if is_short else ""
                raise ValueError(f"{self.name}: cut off at {float(end_of_all):.2f} s{of}")
        return promised if is_short else end  # the last picture stays


def _demuxed(container: Any) -> Iterator[Any]:
    """Yield all packets. FFmpeg stops after 64 KB without a packet of MPEG-TS, and goes on when it is asked again."""
    for _ in range(container.size >> 16):
        try:
            yield from container.demux()
            return
        except import_av().BlockingIOError:
            continue
    yield from container.demux()


def _sound_track(container: Any) -> Any:
    """Return FFmpeg's best audio stream, or `None` if there is none that can be decoded."""
    best = container.streams.best("audio")
    return None if best is None or best.codec_context is None else best


def _can_restart(container: Any) -> bool:
    """Return whether timestamps may jump in the middle of a file of this format."""
    return bool(container.format.flags & import_av().format.Flags.ts_discont.value)


def reason(error: Exception) -> str:
    """Return what FFmpeg or the operating system says, without numbers and paths."""
    return getattr(error, "strerror", None) or str(error)
