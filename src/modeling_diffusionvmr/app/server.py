"""Run the page."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware

from .. import DEFAULT_MODEL
from ..pipeline_diffusionvmr import VideoMomentRetrievalPipeline
from ..presentation.page import read_asset
from .cleanup import cleaning
from .examples import Example, render_examples
from .guard import Guard, restrict_gradio
from .limits import Limits
from .page import Page, build
from .video_search import VideoSearch

INTRODUCTION = "Choose a video, describe what you are looking for, and play the moments that match."
EMBEDDED_NOTE = (
    "This model only knows simple drawings: circles, squares, triangles, stars, crosses, hearts, rings, diamonds, "
    "moons and arrows in ten colors. Begin with an example."
)


@dataclass(frozen=True)
class App:
    """
    The running page.

    Args:
        url: its address.
        folder: of uploads, examples and downloads. It is deleted with all its files when the app ends.
        search: searches the videos.
        examples: on the page.
    """

    url: str
    folder: Path
    search: VideoSearch
    examples: Sequence[Example] = field(default_factory=list)


@contextmanager
def running(
    pipeline: VideoMomentRetrievalPipeline,
    host: str = "127.0.0.1",
    port: int | None = None,
    limits: Limits = Limits(),  # noqa: B008  it is frozen
    num_examples: int = 3,
) -> Iterator[App]:
    """
    Run the page in threads, until the context ends.

    Args:
        pipeline: finds the moments.
        host: address to listen at. The default is reachable from this computer only.
        port: default: the first free one from 7860.
        limits: what visitors may ask for.
        num_examples: number of videos to render.

    Raises:
        OSError: if the port is in use.
    """
    with tempfile.TemporaryDirectory(prefix="diffusionvmr_app_", ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        before = os.environ.get("GRADIO_TEMP_DIR")
        os.environ["GRADIO_TEMP_DIR"] = str(folder)
        restrict_gradio()
        examples = render_examples(folder, num_examples)
        search = VideoSearch(
            pipeline,
            limits.max_video_seconds,
            num_threads=limits.concurrency,
            max_encoding_seconds=limits.max_encoding_seconds,
        )
        is_embedded = pipeline.model.name_or_path == DEFAULT_MODEL
        blocks = build(
            Page(search, limits), examples, " ".join([INTRODUCTION, *([EMBEDDED_NOTE] if is_embedded else [])])
        )
        blocks.queue(max_size=limits.max_waiting)
        guard = Middleware(
            Guard,
            folder=folder,
            max_upload_bytes=limits.max_upload_bytes,
            max_folder_bytes=limits.max_folder_bytes,
        )
        try:
            _, url, _ = blocks.launch(
                server_name=host,
                server_port=port,
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                inbrowser=False,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                run_history=False,
                enable_monitoring=False,
                footer_links=["api"],
                max_file_size=limits.max_upload_bytes,
                state_session_capacity=1000,
                app_kwargs={"middleware": [guard]},
                theme=_theme(),
                css=read_asset("timeline.css") + resources.files(__package__).joinpath("style.css").read_text("utf-8"),
            )
            with cleaning(folder, [example.path for example in examples], limits.keep_seconds):
                yield App(url, folder, search, examples)
        finally:
            search.close()
            blocks.close(verbose=False)
            if before is None:
                del os.environ["GRADIO_TEMP_DIR"]
            else:
                os.environ["GRADIO_TEMP_DIR"] = before


def _theme() -> gr.themes.Base:
    """Return Gradio's theme with fonts of the visitor's computer, and with more contrast (at least 4.5 to 1)."""
    theme = gr.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    colors = {"body_text_color_subdued": ("600", "400"), "input_placeholder_color": ("500", "400")}
    colors |= {"block_info_text_color": ("600", "400"), "block_label_text_color": ("700", "300")}
    colors |= {"block_title_text_color": ("800", "200")}
    changes: dict[str, str] = {}
    for name, (light, dark) in colors.items():
        changes |= {name: f"*neutral_{light}", f"{name}_dark": f"*neutral_{dark}"}
    for name in ("button_primary_background_fill", "button_primary_border_color"):
        changes |= {name: "*primary_700", f"{name}_dark": "*primary_700"}
    changes |= {f"button_primary_background_fill_hover{mode}": "*primary_800" for mode in ("", "_dark")}
    return theme.set(**changes)
