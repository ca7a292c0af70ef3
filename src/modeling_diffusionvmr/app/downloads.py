"""What a visitor can download: the moments as JSON, as video files, and as a web page."""

import json
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from ..presentation.cut import cut_moments
from ..presentation.page import save_page
from .video_search import Answer


def as_rows(answer: Answer) -> list[dict]:
    """Return one dict per sentence, as `diffusionvmr retrieve --json` prints them."""
    return [{"query": query, **result} for query, result in zip(answer.queries, answer.results)]


def save_json(answer: Answer, video: Path, path: Path) -> None:
    """Write the moments and the saliency as JSON."""
    path.write_text(json.dumps(as_rows(answer), ensure_ascii=False, indent=1), encoding="utf-8")


def save_clips(answer: Answer, video: Path, path: Path) -> None:
    """Write a zip file with a video file per moment."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, zipfile.ZipFile(path, "w") as archive:
        for file in cut_moments(str(video), answer.queries, answer.results, Path(folder)):
            archive.write(file, file.name)  # video does not get smaller by compression


def save_web_page(answer: Answer, video: Path, path: Path) -> None:
    """Write a web page that plays the moments. If the video is too large to be part of it, keep both in one folder."""
    beside = video.with_name(f"{path.parent.name}.html")  # where the link to the video is only its name
    save_page(beside, str(video), answer.queries, answer.results, answer.duration, answer.frames)
    beside.replace(path)


# By the label of its button: what the name of a file adds to the name of the video, and what writes the file
KINDS: dict[str, tuple[str, Callable[[Answer, Path, Path], None]]] = {
    "JSON": ("_moments.json", save_json),
    "clips (zip)": ("_moments.zip", save_clips),
    "web page": ("_moments.html", save_web_page),
}
