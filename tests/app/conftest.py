"""The real server, with the embedded model, and a browser. Both start once for all tests."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest
from transformers import pipeline

from modeling_diffusionvmr import DEFAULT_MODEL
from modeling_diffusionvmr.app.limits import Limits
from modeling_diffusionvmr.app.server import App, running
from modeling_diffusionvmr.synthetic.rendered_world import plan_video, write_video

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LIMITS = Limits(max_video_seconds=160, max_upload_bytes=20 * 2**20)


@dataclass(frozen=True)
class Rendered:
    """A rendered video, a sentence that is true in one window, and one that is true nowhere."""

    path: Path
    sentence: str
    window: tuple[float, float]
    absent: str


@pytest.fixture(scope="session")
def retrieve():
    return pipeline("video-moment-retrieval", model=DEFAULT_MODEL)


@pytest.fixture(scope="session")
def app(retrieve) -> Iterator[App]:
    with running(retrieve, limits=LIMITS) as app:
        yield app


@pytest.fixture(scope="session")
def rendered(retrieve, tmp_path_factory) -> Rendered:
    """A video for which the model is right within 1 s."""
    folder = tmp_path_factory.mktemp("rendered")
    for seed in count(99_000_000):
        assert seed < 99_000_030, "the model is hardly ever right within 1 s"
        plan = plan_video(seed)
        if plan.duration > 60:
            continue
        path = folder / f"video_{seed}.mp4"
        write_video(plan, path)
        absent = "a white moon next to a black heart"
        *found, nothing = retrieve(str(path), [*(query.text for query in plan.queries), absent])
        for query, moments in zip(plan.queries, found):
            if len(query.windows) == len(moments) == 1 and not nothing:
                (window,), (moment,) = query.windows, moments
                if abs(moment["start"] - window[0]) < 1 and abs(moment["end"] - window[1]) < 1:
                    return Rendered(path, query.text, window, absent)


@pytest.fixture(scope="session")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, app):
    """Return a function that opens the page for a new visitor. Requests to other places fail the test."""
    contexts, elsewhere = [], []

    def visit(**options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("request", lambda request: elsewhere.append(request.url))
        page.goto(app.url)
        page.wait_for_selector("#find")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert [url for url in elsewhere if not url.startswith((app.url, "data:", "blob:"))] == []
