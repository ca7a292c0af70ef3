"""Signs that a video file is damaged or cut off: errors that FFmpeg only logs, and where the file should end."""

import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from threading import RLock
from typing import Any, BinaryIO

# FFmpeg's demuxers that skip what they cannot read and go on, which only the log tells. They log no errors about whole
# files. Others do (mov: a missing chapter track), and so do decoders (a capture that begins between key frames).
SKIPPING_DEMUXERS = ("matroska,webm", "flv", "asf")
# In bytes: the distance between packets of MPEG-TS, which are alone, after a time (M2TS), or before error correction
TS_PACKET, TS_DISTANCES = 188, (188, 192, 204)
# Between the table of programs (PAT) and the first picture of an MPEG-TS file are few packets, of other streams
MAX_TS_START = 50 * max(TS_DISTANCES)
# In pictures: FFmpeg flags the one before the last one before a gap
GAP_DELAY = 2
# MPEG-4 writes that nothing has changed in a few bytes, and its decoder gives no picture for them
MIN_PICTURE_BYTES = 20

# Far more than any decoder holds back, so that a file of pictures that never come out costs no more
MAX_AWAITED = 1000

_log_lock = RLock()


@contextmanager
def logged_errors(logging: Any) -> Iterator[list[tuple[int, str, str]]]:
    """
    Collect the errors that FFmpeg logs in this thread: (level, name of the component, message).

    Args:
        logging: PyAV's module. Its level is global, so only one thread at a time is in here. The level is restored, and
            messages of other threads stay silent if they were.
    """
    with _log_lock:
        level, skips_repeated = logging.get_level(), logging.get_skip_repeated()
        try:
            logging.set_level(logging.ERROR)
            logging.set_skip_repeated(False)
            with logging.Capture(local=False) if level is None else nullcontext(), logging.Capture() as logs:
                yield logs
        finally:
            logging.set_level(level)
            logging.set_skip_repeated(skips_repeated)


def take_error(logs: list[tuple[int, str, str]], demuxer: str) -> str | None:
    """Return the first message that says that the demuxer skipped a part of the file, and empty the list."""
    messages = [message.strip() for _, name, message in logs if name == demuxer and demuxer in SKIPPING_DEMUXERS]
    logs.clear()
    return messages[0] if messages else None


class AwaitedPictures:
    """
    The packets whose pictures have not come out of the decoder. It drops some pictures without an error.

    Attributes:
        times: when they are shown, in ticks, in the order of decoding.
    """

    def __init__(self):
        self.times: list[int] = []
        self._begin: int | None = None  # pictures before the first key frame need earlier ones

    def add(self, packet: Any) -> None:
        """Await the picture of a packet."""
        time = packet.dts if packet.pts is None else packet.pts
        if time is None or packet.size < MIN_PICTURE_BYTES:
            return
        self._begin = time if self._begin is None else self._begin
        if time >= self._begin:
            self.times.append(time)
            del self.times[:-MAX_AWAITED]

    def lost(self, before: int) -> list[int]:
        """Return the times of the pictures that should have come before this one, and do not await them any more."""
        lost = [time for time in self.times if time < before]
        self.times = [time for time in self.times if time > before]
        return lost


class Gaps:
    """The gaps that FFmpeg finds in MPEG-TS, by the counters of its packets: lost packets, or the joins of files."""

    def __init__(self):
        self._gaps: list[tuple[float, int | None]] = []  # seconds, and where in the file the key frame after it is
        self._pictures = 0  # since the latest gap

    def add(self, packet: Any, time: float) -> None:
        """Look at the next packet of the pictures. The ones before it end at `time` in seconds."""
        self._pictures += 1
        if packet.is_corrupt:
            self._gaps.append((time, None))
            self._pictures = 0
        elif packet.is_keyframe and self._gaps and self._pictures == GAP_DELAY:
            self._gaps[-1] = (self._gaps[-1][0], packet.pos)

    def first_loss(self, file: BinaryIO, stream_id: int) -> float | None:
        """Return the seconds of the first gap that is not a join, or `None`. The stream is that of the pictures."""
        for time, place in self._gaps:
            if place is None or not _starts_at(file, place, stream_id):
                return time
        return None


def _starts_at(file: BinaryIO, place: int, stream_id: int) -> bool:
    """Return whether an MPEG-TS file starts with the picture at this place: the counters before it restart at 0."""
    first = max(0, place - MAX_TS_START)
    file.seek(first)
    content = file.read(place - first + max(TS_DISTANCES))
    table = content.rfind(b"G@\0", 0, place - first)  # of packets that begin a unit, the one of stream 0
    packet = content[content.find(b"G" + (0x4000 | stream_id).to_bytes(2), place - first) :]
    return table >= 0 and len(packet) > 3 and content[table + 3] & 15 == packet[3] & 15 == 0


def stated_bytes(head: bytes) -> float | None:
    """Return the size of a Matroska, FLV or ASF file according to its first bytes, `None` if they do not say it."""
    if segment := re.match(rb"\x1a\x45\xdf\xa3.*?\x18\x53\x80\x67([^\0])", head, re.DOTALL):
        # An EBML number: the leading zeros of its first byte are the number of bytes that follow
        first, length = segment.start(1), 9 - segment[1][0].bit_length()
        value, unknown = int.from_bytes(head[first : first + length]) - (1 << 7 * length), (1 << 7 * length) - 1
        return None if value == unknown else first + length + value
    if metadata := re.match(rb"FLV.*?filesize\0(.{8})", head, re.DOTALL):
        return struct.unpack(">d", metadata[1])[0]
    # The object "file properties": its name, its size, the file's name
    if properties := re.match(rb"0&\xb2u.*?\xa1\xdc\xab\x8cG\xa9\xcf\x11.{8}.{8}.{16}(.{8})", head, re.DOTALL):
        return struct.unpack("<Q", properties[1])[0]
    return None


def is_incomplete(file: BinaryIO, demuxer: str) -> bool:
    """
    Return whether an MPEG-TS, fragmented MP4 or GIF file ends in the middle of a packet, box or block.

    It can go on with zeros: recorders reserve space.
    """
    if "mp4" in demuxer:
        return _ends_inside_box(file)
    if demuxer == "mpegts":
        return _ends_inside_packet(file)
    file.seek(0)
    return demuxer == "gif" and _ends_inside_block(file.read())


def _end_without_zeros(file: BinaryIO) -> int:
    """Return the number of bytes before the zeros at the end of a file."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - (1 << 20))
        file.seek(start)
        if content := file.read(end - start).rstrip(b"\0"):
            return start + len(content)
        end = start
    return 0


def _ends_inside_packet(file: BinaryIO) -> bool:
    """Return whether the last packet of an MPEG-TS file is incomplete. The file can begin inside of a packet."""
    file.seek(0)
    head = file.read(10 * max(TS_DISTANCES))
    size, end = file.seek(0, os.SEEK_END), _end_without_zeros(file)
    for distance in TS_DISTANCES:
        for first in range(distance):
            if all(byte == 0x47 for byte in head[first::distance]) and len(head) > 3 * distance:
                last = first + (end - 1 - first) // distance * distance
                return size < last + TS_PACKET
    return False


def _ends_inside_box(file: BinaryIO) -> bool:
    """
    Return whether a box of a fragmented MP4 file is larger than what is left of the file, or no box.

    FFmpeg takes that for the end. Files without fragments have an index, which must lead to each picture.
    """
    place, has_fragments = 0, False
    size_of_file, end = file.seek(0, os.SEEK_END), _end_without_zeros(file)
    while place < end:
        file.seek(place)
        head = file.read(16).ljust(16, b"\0")
        size, kind, large_size = struct.unpack(">I4sQ", head)
        has_fragments |= kind == b"moof"
        if size == 0 and kind == b"mdat":  # to the end
            return False
        size = large_size if size == 1 else size
        if size < 8:
            return has_fragments
        place += size
    return has_fragments and place > size_of_file


def _ends_inside_block(gif: bytes) -> bool:
    """Return whether the blocks of a GIF file lead to anything but its end. FFmpeg takes the rest as one picture."""

    def color_table(flags: int) -> int:
        return 3 << (flags & 7) + 1 if flags & 128 else 0

    try:
        place = 13 + color_table(gif[10])
        while place < len(gif) and (kind := gif[place : place + 1]) != b";":
            if kind == b"!":  # an extension
                place += 2
            elif kind == b",":  # a picture
                place += 11 + color_table(gif[place + 9])
            else:
                return True
            while length := gif[place]:
                place += 1 + length
            place += 1
    except IndexError:
        return True
    return False
