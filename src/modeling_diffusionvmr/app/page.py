"""The page that visitors see, and the programming interface."""

import functools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import gradio as gr
from gradio.data_classes import FileData
from gradio.utils import get_upload_folder

from ..checks import check_sentence
from ..download import URL
from ..presentation.page import read_asset, timeline_html
from ..presentation.timeline import timestamp
from .downloads import KINDS, as_rows
from .examples import Example
from .guard import NO_ROOM, folder_bytes
from .limits import Limits
from .public_addresses import fetch_public
from .video_search import Answer, VideoSearch

MAX_SENTENCES = 20
MAX_DOWNLOAD_SECONDS = 300.0  # others wait meanwhile
SEARCHES, DOWNLOADS = "searches", "downloads"  # groups of events that share a limit of concurrency
NO_VIDEO = "Choose a video first: an example, your own file, or the address of one."
NO_SENTENCE = "Describe what you are looking for, one sentence per line."
HELP = (
    "Select a moment to play it. The number after it is its score, from 0 to 1: how sure the model is that the "
    "sentence describes this moment. The curves show the saliency of the video's parts for a sentence: a ranking, not "
    "a probability, with average parts at half the height."
)
CONNECT_PLAYER = """
playMoments(element, () => document.querySelector("#player video"));
"""
UNPLAYABLE = (
    "<p role='alert' hidden>This browser cannot play this video format. You can still search the video, and the clips "
    "that you download play everywhere.</p>"
)
SHOW_UNPLAYABLE = """
for (const name of ["error", "loadedmetadata", "emptied"]) {
  document.addEventListener(name, (event) => {
    if (event.target.matches?.("#player video")) element.querySelector("p").hidden = name !== "error";
  }, true);
}
"""


class Page:
    """
    The events of the page, and of the programming interface.

    Args:
        search: searches the videos.
        limits: what visitors may ask for.
    """

    def __init__(self, search: VideoSearch, limits: Limits):
        self.search_video, self.limits = search, limits

    def search(self, video: FileData | None, sentences: list[str], url: str = "") -> list[dict]:
        """
        Find the moments of a video that sentences describe. Give either an uploaded video or the URL of one. Returns
        one dict per sentence: query, moments (start and end in seconds, and score), saliency, clip_seconds.
        """
        downloaded = None
        try:
            downloaded = self.download(url) if url else None
            path = str(downloaded) if downloaded else _path_of(video)
            return as_rows(self._answer(path, sentences.splitlines() if isinstance(sentences, str) else sentences))
        except (ValueError, OSError) as error:
            raise gr.Error(str(error), print_exception=False) from error
        finally:
            if downloaded is not None:  # no page shows it
                shutil.rmtree(downloaded.parent, ignore_errors=True)

    def find(self, path: str | None, text: str | None, progress: Any = gr.Progress()) -> tuple:  # noqa: B008
        """Search for the lines of a text. Return the contents of status, results, asked, and the row of downloads."""
        done, begun = 0.0, time.monotonic()
        progress(0, desc="Reading the video")

        def advance(share: float) -> None:
            nonlocal done
            done += share
            progress(done, desc="Encoding the video")

        try:
            sentences = (text or "").splitlines()
            answer = self._answer(path, [line.strip() for line in sentences if line.strip()], advance)
        except (ValueError, OSError) as error:
            return _alert(str(error)), "", None, gr.update(visible=False)
        seconds = time.monotonic() - begun
        found = any(result["moments"] for result in answer.results)
        return _summary(answer, seconds), _results(answer), (path, answer.queries), gr.update(visible=found)

    def load(self, url: str | None) -> tuple:
        """Download a video. Return the contents of the player and the status."""
        try:
            if not (url or "").strip():
                raise ValueError("Enter the address of a video file, such as https://example.org/video.mp4")
            return str(self.download((url or "").strip())), ""
        except (ValueError, OSError) as error:
            return gr.update(), _alert(str(error))

    def download(self, url: str) -> Path:
        """Download a video from a public address into the upload folder."""
        match = URL.match(url) if isinstance(url, str) else None
        if match is None or match[1].lower() not in ("http", "https"):
            raise ValueError(f"{url}: an address of a video must begin with https:// or http://")
        self._check_room()
        content = fetch_public(url, self.limits.max_upload_bytes, MAX_DOWNLOAD_SECONDS)
        with _new_folder() as folder:
            path = folder / _safe_name(Path(unquote(urlsplit(url).path)).name)
            with path.open("wb") as file:
                shutil.copyfileobj(content, file)
        return path

    def save(self, kind: str, asked: tuple[str, Sequence[str]] | None) -> str | None:
        """Write a file of one of `KINDS` with the moments that the visitor sees. Return its path."""
        if asked is None:
            return None
        ending, write = KINDS[kind]
        video, sentences = Path(asked[0]), asked[1]
        try:
            answer = self._answer(str(video), sentences)
            self._check_room()
            with _new_folder() as folder:
                path = folder / f"{video.stem}{ending}"
                write(answer, video, path)
        except (ValueError, OSError) as error:
            raise gr.Error(str(error), print_exception=False) from error
        return str(path)

    def _check_room(self) -> None:
        """Raise `ValueError` if there is no room for one more file."""
        if folder_bytes(Path(get_upload_folder())) > self.limits.max_folder_bytes:
            raise ValueError(NO_ROOM)

    def _answer(
        self, path: str | None, sentences: Sequence[str], advance: Callable[[float], None] | None = None
    ) -> Answer:
        """Search a video, unless something is missing."""
        if not path:
            raise ValueError(NO_VIDEO)
        if not isinstance(sentences, list):
            raise ValueError(f"`sentences` must be a list, got {type(sentences).__name__}")
        if not sentences:
            raise ValueError(NO_SENTENCE)
        if len(sentences) > MAX_SENTENCES:
            raise ValueError(f"{len(sentences)} sentences: the limit is {MAX_SENTENCES} at once")
        for sentence in sentences:
            check_sentence(sentence)
        # Gradio does not check all forms in which a request can name a file
        if not Path(path).resolve().is_relative_to(Path(get_upload_folder()).resolve()):
            raise ValueError(f"{path}: not an uploaded file")
        try:
            os.utime(path)  # it is in use: keep it for some time from now
        except FileNotFoundError:
            minutes = self.limits.keep_seconds / 60
            raise ValueError(
                f"{Path(path).name}: no longer here, because videos that are not used for {minutes:g} minutes are "
                "deleted. Choose it again."
            ) from None
        return self.search_video(path, sentences, advance)


def build(page: Page, examples: Sequence[Example], introduction: str) -> gr.Blocks:
    """
    Lay out the page.

    Args:
        page: its events.
        examples: videos to choose from.
        introduction: Markdown below the title.
    """
    limits = page.limits
    with gr.Blocks(title="Find moments in a video", analytics_enabled=False) as blocks:
        gr.Markdown(f"# Find moments in a video\n{introduction}", elem_id="introduction")
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=300):
                player = gr.Video(label="Video", sources=["upload"], elem_id="player", buttons=[], height=420)
                gr.HTML(UNPLAYABLE, elem_id="unplayable", js_on_load=SHOW_UNPLAYABLE)
                if examples:
                    gr.Markdown("Examples:")
                with gr.Row():
                    chosen = [gr.Button(example.title, size="md", min_width=160) for example in examples]
                with gr.Accordion("Use a video from the web", open=False):
                    url = gr.Textbox(label="Address of a video file", placeholder="https://example.org/video.mp4")
                    load = gr.Button("Load", size="md")
            with gr.Column(scale=2, min_width=300):
                text = gr.Textbox(
                    label="What are you looking for?",
                    info="One sentence per line. Shift+Enter searches.",
                    placeholder="a red circle\na blue star next to a green ring",
                    lines=4,
                    max_lines=10,
                    elem_id="sentences",
                )
                find = gr.Button("Find moments", variant="primary", elem_id="find")
                status = gr.HTML(elem_id="status", min_height=60)
        results = gr.HTML(
            elem_id="results",
            js_on_load=read_asset("player.js") + CONNECT_PLAYER,
            apply_default_css=False,
            show_label=False,
        )
        asked = gr.State(time_to_live=limits.keep_seconds)  # the path and the sentences that the results belong to
        with gr.Row(visible=False, elem_id="downloads") as downloads:
            buttons = {kind: gr.Button(f"Download {kind}", size="md") for kind in KINDS}
            file = gr.DownloadButton("File", visible="hidden", elem_id="file")

        searching: dict[str, Any] = {"concurrency_id": SEARCHES, "concurrency_limit": limits.concurrency}
        private: dict[str, Any] = {"api_visibility": "private"}
        gr.on(
            [find.click, text.submit],
            page.find,
            [player, text],
            [status, results, asked, downloads],
            show_progress_on=status,
            trigger_mode="once",
            **searching,
            **private,
        )
        # Results belong to one video
        player.change(
            lambda: ("", "", None, gr.update(visible=False)),
            outputs=[status, results, asked, downloads],
            queue=False,
            show_progress="hidden",
            **private,
        )
        for button, example in zip(chosen, examples):
            content = str(example.path), "\n".join(example.sentences)
            button.click(functools.partial(tuple, content), outputs=[player, text], queue=False, **private)
        gr.on(
            [load.click, url.submit],
            page.load,
            url,
            [player, status],
            show_progress_on=status,
            concurrency_id=DOWNLOADS,
            concurrency_limit=2,
            **private,
        )
        for kind, button in buttons.items():
            button.click(
                functools.partial(page.save, kind),
                asked,
                file,
                show_progress_on=status,
                **searching,
                **private,
            ).success(None, js="() => document.querySelector('#file').click()", **private)
        gr.api(page.search, api_name="search", **searching)
    return blocks


def _summary(answer: Answer, seconds: float) -> str:
    """Return what was found, in words."""
    number = sum(len(result["moments"]) for result in answer.results)
    absent = [f"“{query}”" for query, result in zip(answer.queries, answer.results) if not result["moments"]]
    parts = [f"{number} moment{'s' * (number > 1)} found."] if number else []
    if absent:
        parts.append(escape(f"Nothing in the video seems to match {', '.join(absent)}."))
    if not number:
        parts.append("Try other words: short sentences about what can be seen work best.")
    known = "the video was already encoded" if answer.was_known else "including encoding the video"
    return f"<p role='status'>{' '.join(parts)} <small>{seconds:.1f} s, {known}.</small></p>"


def _results(answer: Answer) -> str:
    """Return timeline and table of the moments."""
    timeline = timeline_html(answer.queries, answer.results, answer.duration, answer.frames)
    rows = "".join(
        f"<tr><th scope='row'>{escape(query)}</th><td>{timestamp(moment['start'])}</td>"
        f"<td>{timestamp(moment['end'])}</td><td>{moment['score']:.3f}</td></tr>"
        for query, result in zip(answer.queries, answer.results)
        for moment in result["moments"]
    )
    columns = "".join(f"<th scope='col'>{name}</th>" for name in ("Sentence", "Start", "End", "Score"))
    table = f"<table><caption>Moments</caption><thead><tr>{columns}</tr></thead><tbody>{rows}</tbody></table>"
    return f"{timeline}<p class='note'>{HELP}</p>{table if rows else ''}"


def _alert(text: str) -> str:
    return f"<p role='alert'>{escape(text)}</p>"


def _path_of(video: Any) -> str | None:
    """Return the path of a file of the programming interface, as Gradio's clients send it."""
    if video is None:
        return None
    if not isinstance(video, dict) or not isinstance(video.get("path"), str):
        raise ValueError("`video` must be an uploaded file")
    return video["path"]


@contextmanager
def _new_folder() -> Iterator[Path]:
    """A new folder for one file. An error deletes it."""
    folder = Path(tempfile.mkdtemp(dir=get_upload_folder()))
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _safe_name(name: str) -> str:
    """Return a name without characters that file systems or Gradio refuse."""
    kept = "".join(char for char in name if char.isalnum() or char in "._- ")[-80:].lstrip(". ")
    return kept or "video"
