"""Cut moments out of a video, as files that play everywhere: H.264 and AAC in mp4."""

import gc
import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..data.files import atomic_write
from ..video_file import VideoFile, import_av, reason
from ..video_filters import ToRGB

TICKS = 90_000  # per second, of the pictures
SAMPLE_RATE, LAYOUT, SAMPLE_FORMAT = 48_000, "stereo", "fltp"  # of the sound
# Pictures per second that the encoder is told: if the file does not state them, and the lowest number
DEFAULT_RATE, SLOWEST_RATE = 25, Fraction(1, 100)
SHORTEST = Fraction(1, 25)  # in seconds: a moment can have a length of 0
QUALITY = {"preset": "veryfast", "crf": "20"}
# Without B-frames, times of decoding and of display are the same, and a file needs no edit list to begin at 0
NO_B_FRAMES = {"bf": "0"}
BT709, LIMITED_RANGE = 1, 1  # FFmpeg's numbers
LONG_PICTURE = 1  # in seconds, see `cut_moments`
INTERLEAVING = 10  # in seconds: how far apart in a file pictures and sound of the same time can be
SOUND_TOLERANCE = SAMPLE_RATE // 20  # in samples: smaller gaps are rounded timestamps
MAX_NAME_BYTES = 60  # of the sentence in the name of a file


def cut_moments(
    video: Any, queries: Sequence[str], results: Sequence[Mapping[str, Any]], folder: Path, progress: bool = False
) -> list[Path]:
    """
    Write each moment as a video file. Files of the same names are replaced. The video is decoded once.

    The pictures are those that appear between start and end of the moment. If none does, or none within the first
    second, as in a recording of slides, the file begins with the picture that is on the screen at the start. A file
    lasts at least 1/25 s. Pictures are upright, with square pixels, and reduced to 1080p.

    Args:
        video: a path or a binary file object.
        queries: sentences.
        results: one per query, from the pipeline with `return_saliency=True`.
        folder: where to write the files. It is created.
        progress: show a progress bar.

    Returns:
        The path of each file, in the order of `results`. See `file_name`.

    Raises:
        FileNotFoundError, ValueError: if the video is missing, not readable or damaged.
    """
    file = VideoFile(video)
    to_rgb = ToRGB(file.pixel_aspect)
    cuts = [
        _MomentFile(folder / file_name(number, rank, query, moment), moment, file, to_rgb)
        for number, (query, result) in enumerate(zip(queries, results), start=1)
        for rank, moment in enumerate(result["moments"], start=1)
    ]
    if cuts:
        try:
            _write_all(file, cuts, progress)
        except (import_av().FFmpegError, OverflowError) as error:
            if isinstance(error, OSError):  # such as a full disk
                raise
            raise ValueError(f"{file.name}: FFmpeg cannot cut it ({reason(error)})") from error
    return [cut.path for cut in cuts]


def file_name(number: int, rank: int, query: str, moment: Mapping[str, float]) -> str:
    """
    Return a name that is valid on every file system, such as `01-02_a-red-circle_0032.0-0041.5.mp4`: the number of the
    sentence, the rank of the moment, the sentence, start and end in seconds.
    """
    # Letters, marks (which many scripts need to write vowels) and digits of all languages
    text = unicodedata.normalize("NFC", query).lower()
    words = "".join(char if unicodedata.category(char)[0] in "LMN" else " " for char in text).split()
    slug = "-".join(words).encode()[:MAX_NAME_BYTES].decode(errors="ignore").strip("-")
    return f"{number:02d}-{rank:02d}_{slug}_{moment['start']:06.1f}-{moment['end']:06.1f}.mp4"


def _write_all(file: VideoFile, cuts: Sequence["_MomentFile"], progress: bool) -> None:
    """Decode the video up to the end of the last moment, and write all moments on the way."""
    seconds = round(max(cut.end for cut in cuts))
    with ExitStack() as stack, tqdm(desc="cutting", total=seconds, unit="s", disable=not progress) as bar:
        cutter = _Cutter([stack.enter_context(cut) for cut in cuts], file.has_sound)
        for frame in file.decoded(file.has_sound):
            cutter.add(frame)
            bar.update(min(int(cutter.picture_time), seconds) - bar.n)
            if cutter.is_done:
                break
        cutter.finish()
        bar.update(seconds - bar.n)


class _Cutter:
    """Passes the frames of a video on to the moments that they can belong to, and finishes those that are over."""

    def __init__(self, cuts: Sequence["_MomentFile"], has_sound: bool):
        self._waiting = sorted(cuts, key=lambda cut: -cut.start)  # the next one is last
        self._active: list[_MomentFile] = []
        self._has_sound, self._resample = has_sound, _Resampler()
        self._on_screen: Any = None  # the latest picture
        self.picture_time, self._sound_time = Fraction(0), Fraction(0)  # of the latest frames, in seconds

    @property
    def is_done(self) -> bool:
        """Whether all moments are finished."""
        return not self._active and not self._waiting

    def add(self, frame: Any) -> None:
        """Pass a frame on."""
        time = frame.pts * frame.time_base
        while self._waiting and self._waiting[-1].start - INTERLEAVING <= time:
            self._active.append(self._waiting.pop())
        if isinstance(frame, import_av().AudioFrame):
            self._add_sound(frame, time)
        else:
            self._add_picture(frame, time)
        for cut in self._active:
            if self._is_over(cut):
                cut.finish(self._on_screen)
        self._active = [cut for cut in self._active if not cut.is_finished]

    def finish(self) -> None:
        """Finish the moments that are left at the end of the video."""
        for cut in self._active + self._waiting:
            cut.finish(self._on_screen)

    def _add_sound(self, frame: Any, time: Fraction) -> None:
        self._sound_time = time
        for samples, start in self._resample(frame):
            for cut in self._active:
                cut.add_sound(samples, start)

    def _add_picture(self, frame: Any, time: Fraction) -> None:
        for cut in self._active:
            cut.add_picture(frame, self._on_screen)
        self._on_screen, self.picture_time = frame, time

    def _is_over(self, cut: "_MomentFile") -> bool:
        sound_may_follow = self._has_sound and self._sound_time < cut.end
        return self.picture_time >= cut.end + (INTERLEAVING if sound_may_follow else 0)


class _MomentFile:
    """
    A file to which one moment is written. It is a context manager, in which an error removes the unfinished file.

    Attributes:
        path: the file.
        start, end: in seconds.
        is_finished: whether the file is written.
    """

    def __init__(self, path: Path, moment: Mapping[str, float], file: VideoFile, to_rgb: ToRGB):
        self.path, self._to_rgb, self._has_sound = path, to_rgb, file.has_sound
        self._rate = max(Fraction(file.fps or DEFAULT_RATE).limit_denominator(100_000), SLOWEST_RATE)
        # 1.1 means 11/10, the start of a picture at 10 per second. The float is a bit later and would miss it.
        self.start, end = (Fraction(moment[side]).limit_denominator(10**6) for side in ("start", "end"))
        self.end = max(end, self.start + SHORTEST)
        self.is_finished = False
        self._stack = ExitStack()
        self._container: Any = None  # opened with the first picture, like its two streams
        self._pictures: Any = None
        self._sound: Any = None
        self._picture: Any = None  # the latest one. How long it is shown depends on the next one
        self._durations: dict[int, int] = {}  # of the pictures in the encoder, by start, in ticks
        self._early_sound: list[tuple[np.ndarray, Fraction]] = []  # what came before the size of the pictures is known
        self._num_samples = 0  # written

    def __enter__(self) -> "_MomentFile":
        return self

    def __exit__(self, *error) -> None:
        self._stack.__exit__(*error)

    def add_picture(self, frame: Any, on_screen: Any) -> None:
        """Add a picture if it is in the moment. `on_screen` is the one before, `None` if there is none."""
        time = frame.pts * frame.time_base
        if time < self.start:
            return
        begins_late = time >= self.end or time - self.start > LONG_PICTURE
        if self._picture is None and on_screen is not None and begins_late:
            self._show(on_screen, self.start)
        if time < self.end:
            self._show(frame, time)

    def add_sound(self, samples: np.ndarray, time: Fraction) -> None:
        """Add the part of samples (2, n) that is in the moment. Gaps are filled with silence."""
        gap = round((time - self.start) * SAMPLE_RATE) - self._num_samples
        left = round((self.end - self.start) * SAMPLE_RATE) - self._num_samples
        if gap + samples.shape[1] <= 0 or gap >= left:
            return
        if self._container is None:
            self._early_sound.append((samples, time))
            return
        if abs(gap) > SOUND_TOLERANCE or self._num_samples == 0:
            silence = np.zeros((len(samples), max(0, gap)), samples.dtype)
            samples = np.hstack([silence, samples[:, max(0, -gap) :]])
        self._write_sound(samples[:, :left])

    def finish(self, on_screen: Any) -> None:
        """Write what is left and close the file. `on_screen` is shown if the moment has no picture yet."""
        if self._picture is None:
            self._show(on_screen, self.start)
        self._write_picture(until=round((self.end - self.start) * TICKS))
        self._mux_pictures(self._pictures.encode())
        if self._has_sound:  # as long as the pictures
            left = max(0, round((self.end - self.start) * SAMPLE_RATE) - self._num_samples)
            self._write_sound(np.zeros((2, left), np.float32))
            self._container.mux(self._sound.encode())
        self._stack.close()
        # An encoder takes 60 MB at 720p. PyAV's objects refer to each other, so only the garbage collector frees it.
        self._container = self._pictures = self._sound = self._picture = None
        gc.collect()
        self.is_finished = True

    def _show(self, frame: Any, time: Fraction) -> None:
        """Show a picture from a time on, in seconds. The first one is shown from the start of the file."""
        av = import_av()
        pixels = self._to_rgb(frame)
        height, width = pixels.shape[:2]
        if height % 2 or width % 2:  # half the color resolution needs even sizes
            pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self._container is None:
            self._open(*pixels.shape[:2])
        picture = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
            self._pictures.width,
            self._pictures.height,
            "yuv420p",
            dst_colorspace=av.video.reformatter.Colorspace.ITU709,
            dst_color_range=av.video.reformatter.ColorRange.MPEG,
        )
        picture.time_base, picture.pts = Fraction(1, TICKS), 0
        if self._picture is not None:
            picture.pts = max(round((time - self.start) * TICKS), self._picture.pts + 1)
            self._write_picture(until=picture.pts)
        self._picture = picture

    def _write_picture(self, until: int) -> None:
        """Write the latest picture, which is shown until a time in ticks."""
        self._durations[self._picture.pts] = until - self._picture.pts
        self._mux_pictures(self._pictures.encode(self._picture))

    def _mux_pictures(self, packets: Sequence[Any]) -> None:
        for packet in packets:
            packet.duration = self._durations.pop(packet.pts)  # the encoder assumes a constant rate
            self._container.mux(packet)

    def _write_sound(self, samples: np.ndarray) -> None:
        if not samples.size:
            return
        sound = import_av().AudioFrame.from_ndarray(np.ascontiguousarray(samples), format=SAMPLE_FORMAT, layout=LAYOUT)
        sound.sample_rate, sound.time_base, sound.pts = SAMPLE_RATE, Fraction(1, SAMPLE_RATE), self._num_samples
        self._num_samples += samples.shape[1]
        self._container.mux(self._sound.encode(sound))

    def _open(self, height: int, width: int) -> None:
        """Open the file and write the sound that came before the first picture."""
        # `file:`, because a name can contain a colon, which FFmpeg takes for the end of a protocol
        path = f"file:{self._stack.enter_context(atomic_write(self.path))}"
        self._container = self._stack.enter_context(
            import_av().open(path, "w", format="mp4", options={"movflags": "+faststart"})
        )
        self._pictures = self._container.add_stream("libx264", rate=self._rate, options={**QUALITY, **NO_B_FRAMES})
        self._pictures.height, self._pictures.width, self._pictures.pix_fmt = height, width, "yuv420p"
        context = self._pictures.codec_context
        context.time_base = Fraction(1, TICKS)
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED_RANGE
        if self._has_sound:
            self._sound = self._container.add_stream("aac", rate=SAMPLE_RATE, layout=LAYOUT)
        early, self._early_sound = self._early_sound, []
        for samples, time in early:
            self.add_sound(samples, time)


class _Resampler:
    """Converts audio frames to samples (2, n) float32 in [-1, 1] at `SAMPLE_RATE`, with their time in seconds."""

    def __init__(self) -> None:
        self._resampler: Any = None
        self._kind: Any = None

    def __call__(self, frame: Any) -> list[tuple[np.ndarray, Fraction]]:
        kind = (frame.format.name, frame.layout.name, frame.sample_rate, frame.time_base)
        if kind != self._kind:  # it may change within a file
            self._kind = kind
            self._resampler = import_av().AudioResampler(SAMPLE_FORMAT, LAYOUT, SAMPLE_RATE)
        return [(part.to_ndarray(), part.pts * part.time_base) for part in self._resampler.resample(frame)]
