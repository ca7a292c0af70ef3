"""A web page in one file: the video, and a timeline of the moments that plays them."""

import base64
import io
import mimetypes
import os
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import numpy as np
from PIL import Image

from ..data.files import atomic_write
from .timeline import curve_points, tick_label, tick_times, timestamp

MAX_EMBEDDED_BYTES = 50_000_000
FRAME_WIDTH, JPEG_QUALITY = 160, 80  # of a frame of the timeline
MAX_TICKS = 6  # as many as fit on a phone
# Browsers refuse the official types of these files, although they often can play them
MEDIA_TYPES = {".mov": "video/mp4", ".m4v": "video/mp4", ".mkv": "video/webm"}
FILE_CAVEAT = (
    "It is too large to be part of this page, so it only plays while both files keep their places: if you move or send "
    "this page, do the same with the video."
)
URL_CAVEAT = "It is too large to be part of this page, so it only plays while that address can be reached."
CURVE_HEIGHT = 100  # in units of the drawing


def save_page(
    path: str | os.PathLike,
    video: Any,
    queries: Sequence[str],
    results: Sequence[Mapping[str, Any]],
    duration: float,
    frames: Sequence[np.ndarray],
    url: str | None = None,
) -> None:
    """
    Write a web page that shows moments and plays them, atomically. It loads nothing from elsewhere, except a video of
    more than `MAX_EMBEDDED_BYTES`, to which it links.

    Args:
        path: the file to write.
        video: the path of the video, or a binary file object of a download.
        queries: sentences.
        results: one per query, from the pipeline with `return_saliency=True`.
        duration: length of the video in seconds.
        frames: arrays (H, W, 3) uint8 RGB, evenly spaced over the video.
        url: where a download comes from.
    """
    name = _visible(os.path.basename(unquote(urlsplit(url).path) if url else video))
    content, link = _content(video), ""
    if content is not None:
        source = _data_url(content, _media_type(name))
    else:
        target = url or _relative_url(Path(video), Path(path))
        source = escape(target)
        caveat = URL_CAVEAT if url else FILE_CAVEAT
        link = f'<p class="note">The video: <a href="{source}">{escape(name)}</a>. {caveat}</p>'
    page = Template(read_asset("page.html")).substitute(
        title=escape(name),
        source=source,
        link=link,
        timeline=timeline_html(queries, results, duration, frames),
        timeline_style=read_asset("timeline.css"),
        player=read_asset("player.js"),
    )
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def read_asset(name: str) -> str:
    """Return the text of a file beside this module."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def timeline_html(
    queries: Sequence[str], results: Sequence[Mapping[str, Any]], duration: float, frames: Sequence[np.ndarray]
) -> str:
    """
    Return a timeline as HTML: a row of frames, and for each sentence its saliency and its moments. Moments are buttons
    with `data-start` and `data-end` in seconds. See `save_page` for the arguments. `timeline.css` is its style, and
    `player.js` plays the moments; see `read_asset`.
    """
    pictures = "".join(f'<img alt="" src="{_data_url(frame_jpeg(frame), "image/jpeg")}">' for frame in frames)
    lanes = "\n".join(_lane(query, result, duration) for query, result in zip(queries, results))
    return (
        f'<div id="timeline" data-duration="{duration:.3f}">\n<div class="frames" aria-hidden="true">{pictures}</div>\n'
        f"{_ticks(duration)}\n{lanes}\n</div>"
    )


def _ticks(duration: float) -> str:
    times = tick_times(duration, MAX_TICKS)
    spans = []
    for time in times:
        share = 100 * time / duration
        place = ' class="first"' if time == 0 else ' class="last"' if share > 95 else ""
        spans.append(f'<span{place} style="left:{min(share, 100):.3f}%">{tick_label(time, times)}</span>')
    return f'<div class="ticks" aria-hidden="true">{"".join(spans)}</div>'


def _lane(query: str, result: Mapping[str, Any], duration: float) -> str:
    """Return the section of a sentence: its curve, its moments as bars, and the same moments as a list of buttons."""
    buttons = [_buttons(moment, duration) for moment in result["moments"]]
    bars = "".join(bar for bar, _ in buttons)
    items = "".join(f"<li>{item}</li>" for _, item in buttons)
    found = f"<ol>{items}</ol>" if items else "<p>No moment found.</p>"
    return (
        f"<section>\n<h2>{escape(_visible(query))}</h2>\n"
        f'<div class="lane">{_curve(result, duration)}<div class="bars">{bars}</div>'
        f'<div class="now"></div></div>\n{found}\n</section>'
    )


def _buttons(moment: Mapping[str, float], duration: float) -> tuple[str, str]:
    """Return the two buttons of a moment: its bar on the timeline, and its entry in the list."""
    start, end = (min(max(moment[side], 0), duration) for side in ("start", "end"))
    times = f'data-start="{start:.3f}" data-end="{end:.3f}"'
    interval = f"{timestamp(start)} – {timestamp(end)}"
    score = f"{moment['score']:.2f}"
    # The style sheet sets a minimum width of 6px, with which a bar must not reach beyond the end
    left, width = 100 * start / duration, 100 * (end - start) / duration
    place = f"left:min({left:.4f}%, 100% - 6px);width:{width:.4f}%"
    title = f'title="{interval}, score {score}"'
    # Not reachable by keyboard, nor read aloud: the list has the same buttons
    bar = f'<button type="button" tabindex="-1" aria-hidden="true" {times} {title} style="{place}"></button>'
    label = f"Play {interval}, score {score}"
    return bar, f'<button type="button" {times} aria-label="{label}">▶ {interval} <small>{score}</small></button>'


def _curve(result: Mapping[str, Any], duration: float) -> str:
    points = " ".join(
        f"{1000 * time / duration:.1f},{CURVE_HEIGHT * (0.98 - 0.96 * value):.1f}"
        for time, value in zip(*curve_points(result))
    )
    return (
        f'<svg viewBox="0 0 1000 {CURVE_HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="Saliency over time: a ranking, not a probability"><path d="M {points}"/></svg>'
    )


def _content(video: Any) -> bytes | None:
    """Return the content of a video, or `None` if it is too large to be embedded."""
    if isinstance(video, (str, os.PathLike)):
        with open(video, "rb") as file:
            return _content(file)
    video.seek(0, os.SEEK_END)
    size = video.seek(0, os.SEEK_CUR)
    video.seek(0)
    return video.read() if size <= MAX_EMBEDDED_BYTES else None


def _relative_url(video: Path, page: Path) -> str:
    """Return the address of a video as seen from the folder of a page."""
    try:
        relative = os.path.relpath(video.absolute(), page.absolute().parent)
    except ValueError:  # another drive of Windows
        return video.absolute().as_uri()
    # `./`, because the part of a name before a colon would be a protocol
    return "./" + quote(relative.replace(os.sep, "/").encode(errors="surrogateescape"))


def _media_type(name: str) -> str:
    extension = os.path.splitext(name)[1].lower()
    return MEDIA_TYPES.get(extension) or mimetypes.guess_type(f"a{extension}")[0] or "video/mp4"


def _data_url(content: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def frame_jpeg(frame: np.ndarray, quality: int = JPEG_QUALITY) -> bytes:
    """Return a frame of the timeline (H, W, 3), uint8 RGB, as a JPEG picture of at most `FRAME_WIDTH` pixels."""
    picture = Image.fromarray(frame)
    picture.thumbnail((FRAME_WIDTH, FRAME_WIDTH))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return file.getvalue()


def _visible(text: str) -> str:
    """Replace lone surrogates, which file names may contain but UTF-8 cannot."""
    return text.encode(errors="replace").decode()
