"""Search videos for sentences, and encode each video once for all of its searches."""

import contextvars
import hashlib
import io
import math
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..pipeline_diffusionvmr import EncodedVideo, VideoMomentRetrievalPipeline
from ..presentation.page import frame_jpeg
from ..presentation.timeline import NUM_FRAMES
from ..video import FileVideo, FrameSampling

MAX_CACHE_BYTES = 256 * 2**20
CACHE_QUALITY = 95  # of the JPEG of a frame, which a page compresses again


@dataclass(frozen=True)
class Answer:
    """
    What a search found.

    Args:
        queries: the sentences.
        results: one per sentence, as from the pipeline with `return_saliency=True`.
        duration: of the video, in seconds.
        frames: of the timeline, (H, W, 3) uint8 RGB, evenly spaced over the video.
        was_known: whether the video was already encoded.
    """

    queries: Sequence[str]
    results: Sequence[dict[str, Any]]
    duration: float
    frames: Sequence[np.ndarray]
    was_known: bool


@dataclass(frozen=True)
class _Known:
    """A video that was encoded, and the frames of its timeline as JPEG files."""

    encoded: EncodedVideo
    frames: Sequence[bytes]

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self.encoded.features) + sum(map(len, self.frames))


class VideoSearch:
    """
    Searches video files. Several threads can call it at once.

    Args:
        pipeline: finds the moments.
        max_video_seconds: maximum duration of a video.
        num_threads: number of searches at the same time. They run in threads that stay: with a new thread for each,
            memory would grow, since the C library keeps what a thread has freed for that thread.
        max_encoding_seconds: maximum time that decoding and encoding one video may take. Others wait meanwhile.
        max_cache_bytes: maximum size of the encoded videos that are kept, by their content. The ones that were not
            searched for the longest time are dropped.

    Attributes:
        num_encoded: number of videos that were encoded so far.
    """

    def __init__(
        self,
        pipeline: VideoMomentRetrievalPipeline,
        max_video_seconds: float,
        num_threads: int = 1,
        max_encoding_seconds: float = math.inf,
        max_cache_bytes: int = MAX_CACHE_BYTES,
    ):
        self.pipeline, self.max_video_seconds, self.max_cache_bytes = pipeline, max_video_seconds, max_cache_bytes
        if not max_encoding_seconds > 0:
            raise ValueError(f"`max_encoding_seconds` must be above 0, got {max_encoding_seconds}")
        self.max_encoding_seconds = max_encoding_seconds
        self.num_encoded = 0
        self._known: OrderedDict[bytes, Future[_Known]] = OrderedDict()
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="search")
        self._is_closed = False

    def close(self) -> None:
        """End all searches. Otherwise, the process would wait for them before it exits."""
        self._is_closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)

    def __call__(
        self, path: str | os.PathLike, queries: Sequence[str], advance: Callable[[float], None] | None = None
    ) -> Answer:
        """
        Search a video for sentences.

        Args:
            path: the video file.
            queries: sentences.
            advance: called while the video is encoded, with shares of the work that sum to 1. Not called if it was
                encoded before.

        Raises:
            ValueError: if the video or a sentence cannot be used. Messages name the file without its folder.
        """
        context = contextvars.copy_context()  # Gradio's progress bar needs it
        return self._threads.submit(context.run, self._search, path, queries, advance).result()

    def _search(
        self, path: str | os.PathLike, queries: Sequence[str], advance: Callable[[float], None] | None
    ) -> Answer:
        try:
            known, was_known = self._encode_once(path, advance)
            results = self.pipeline(known.encoded, list(queries), return_saliency=True)
        except (OSError, ValueError) as error:
            raise ValueError(str(error).replace(str(path), os.path.basename(path))) from error
        frames = [np.asarray(Image.open(io.BytesIO(frame))) for frame in known.frames]
        return Answer(queries, results, known.encoded.duration, frames, was_known)

    def _encode_once(self, path: str | os.PathLike, advance: Callable[[float], None] | None) -> tuple[_Known, bool]:
        """Return a video from the cache, and whether it was there. Another thread may still be encoding it."""
        with open(path, "rb") as file:
            key = hashlib.file_digest(file, "sha256").digest()
        with self._lock:
            future = self._known.get(key)
            if is_new := future is None:
                future = self._known[key] = Future()
            self._known.move_to_end(key)
        if is_new:
            try:
                future.set_result(self._encode(path, advance))
            except BaseException as error:
                with self._lock:
                    del self._known[key]
                future.set_exception(error)
            self._drop_oldest()
            return future.result(), False
        try:
            return future.result(), True
        except Exception:  # it names the file of another visitor, or only ended their search
            return self._encode_once(path, advance)

    def _encode(self, path: str | os.PathLike, advance: Callable[[float], None] | None) -> _Known:
        deadline = time.monotonic() + self.max_encoding_seconds

        def check_going_on() -> None:
            if self._is_closed:
                raise ValueError(f"{path}: not searched, because the server is stopping")
            if time.monotonic() > deadline:
                limit = f"{self.max_encoding_seconds:g} s (`max_encoding_seconds`)"
                raise ValueError(f"{path}: reading it takes too long; the limit is {limit}")

        def advance_while_going_on(share: float) -> None:
            check_going_on()
            if advance is not None:
                advance(share)

        video = _TimelineVideo(path, self.pipeline.backbones.clip_seconds, self.max_video_seconds, check_going_on)
        self.num_encoded += 1
        return _Known(self.pipeline.encode(video, advance=advance_while_going_on), video.frames)

    def _drop_oldest(self) -> None:
        """Drop the videos that do not fit into the cache. Those that are still being encoded stay."""
        with self._lock:
            total = 0
            for key, future in reversed(list(self._known.items())):
                if future.done():
                    total += future.result().num_bytes
                    if total > self.max_cache_bytes:
                        del self._known[key]


class _TimelineVideo(FileVideo):
    """
    A video file that keeps the frames of its timeline while its clips are read, so that it is decoded only once.

    Args:
        check: called for each decoded frame, since a clip can consist of any number of them. It can raise an error.
    """

    def __init__(
        self, file: str | os.PathLike, clip_seconds: float, max_video_seconds: float, check: Callable[[], None]
    ):
        super().__init__(file, clip_seconds, max_video_seconds)
        self._check = check

    def _decoded(self):
        for frame in super()._decoded():
            self._check()
            yield frame

    def clips(self, samplings):
        wanted = (np.arange(NUM_FRAMES) + 0.5) * self.num_clips // NUM_FRAMES
        self.frames: list[bytes] = []
        clip = 0
        for which, frames in super().clips([*samplings, FrameSampling(1 / self.exact_clip_seconds)]):
            if which < len(samplings):
                yield which, frames
                continue
            if repeats := np.count_nonzero(wanted == clip):  # more than one if there are fewer clips than frames
                self.frames += [frame_jpeg(frames[0], CACHE_QUALITY)] * repeats
            clip += 1
