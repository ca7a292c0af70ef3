"""FFmpeg's filters: frames at a constant rate, and pictures as a player shows them."""

from collections.abc import Iterator
from fractions import Fraction
from itertools import compress
from typing import Any

import numpy as np

from .video_file import import_av

# In pixels. Larger frames are reduced to this short side to save memory: 32 frames of 8K are 3.2 GB. Features change
# little, because image processors of CLIP reduce the short side to 224 or 336 anyway, with an antialiasing filter.
MAX_SHORT_SIDE = 1080


class FrameRateFilter:
    """
    FFmpeg's filter `fps=rate:start_time=0`.

    Args:
        rate: frames per second.
    """

    def __init__(self, rate: Fraction | int):
        self._options = f"fps={rate.numerator}/{rate.denominator}:start_time=0"
        self._graph: Any = None

    def push(self, frame: Any) -> Iterator[Any]:
        """Yield the frames that follow from one more `av.VideoFrame`, or from the end of the video if it is `None`."""
        if self._graph is None:
            self._graph = _filter_graph(frame, ("fps", self._options))
        yield from _filtered(self._graph, frame)


class ToRGB:
    """
    Converts an `av.VideoFrame` to a picture (H, W, 3) uint8 RGB as a player shows it: upright, with square pixels and
    the right colors.

    Args:
        pixel_aspect: width of a pixel divided by its height.
        crop: scale the short side to this number of pixels and crop the middle. `None`: only reduce large pictures.
    """

    def __init__(self, pixel_aspect: Fraction | float, crop: int | None = None):
        self._pixel_aspect, self._crop = pixel_aspect, crop
        self._graph: Any = None
        self._graph_of: Any = None

    def __call__(self, frame: Any) -> np.ndarray:
        upright = _upright(frame)
        kind = (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range, upright)
        if kind != self._graph_of:
            self._graph_of = kind
            self._graph = _filter_graph(
                frame,
                ("scale", f"{self._size(frame)}:flags=bicubic"),
                ("setsar", "1"),
                *upright,
                ("format", "rgb24"),
            )
        (scaled,) = _filtered(self._graph, frame)
        picture = scaled.to_ndarray()
        if self._crop is None:
            return picture
        top, left = ((side - self._crop) // 2 for side in picture.shape[:2])
        return np.ascontiguousarray(picture[top : top + self._crop, left : left + self._crop])

    def _size(self, frame: Any) -> str:
        """Return the size of the scaled picture, before it is turned upright."""
        width, height = max(1, round(frame.width * self._pixel_aspect)), frame.height
        # The long side has a limit too: a damaged header can claim any shape of a pixel
        longest, short_side = 16 * MAX_SHORT_SIDE, min(width, height)
        if self._crop is None:
            scale = min(1, MAX_SHORT_SIDE / short_side, longest / max(width, height))
            return f"{max(1, round(width * scale))}:{max(1, round(height * scale))}"
        # Rounded down, as in HERO_Video_Feature_Extractor
        return ":".join(str(min(side * self._crop // short_side, longest)) for side in (width, height))


def _filter_graph(frame: Any, *filters: tuple[str, str]) -> Any:
    """Return FFmpeg's filters, each a name and its options, for frames like this one."""
    graph = import_av().filter.Graph()
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


def _upright(frame: Any) -> tuple[tuple[str, str], ...]:
    """Return the filters that apply a frame's display matrix, one of eight. Phones store upright videos sideways."""
    if "DISPLAYMATRIX" not in frame.side_data:
        return ()
    # Column x and row y of the picture are shown at (a x + c y, b x + d y)
    a, b, _, c, d = np.frombuffer(frame.side_data["DISPLAYMATRIX"], np.int32)[:5].tolist()
    transposed = abs(b) > abs(a)
    to_right, to_bottom = (c, b) if transposed else (a, d)
    filters = [("transpose", "cclock_flip"), ("hflip", ""), ("vflip", "")]
    return tuple(compress(filters, (transposed, to_right < 0, to_bottom < 0)))
