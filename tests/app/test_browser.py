"""What a visitor sees and does, in headless Chromium against the real server."""

import json
import re
import threading
import zipfile
from collections import OrderedDict

import pytest

from modeling_diffusionvmr.app import public_addresses
from modeling_diffusionvmr.app.page import NO_SENTENCE, NO_VIDEO
from test_video import write_video

VIDEO = "document.querySelector('#player video')"
# The lowest contrast of text with its background, by the place of the text
CONTRAST = """() => {
  const parse = (color) => { const n = color.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const light = (c) => { const s = c / 255; return s <= .04045 ? s / 12.92 : ((s + .055) / 1.055) ** 2.4; };
  const luminance = ([r, g, b]) => .2126 * light(r) + .7152 * light(g) + .0722 * light(b);
  const background = (e) => {
    for (; e; e = e.parentElement) {
      const color = parse(getComputedStyle(e).backgroundColor);
      if (color[3] === 1) return color;
    }
    return [255, 255, 255, 1];
  };
  const found = {};
  const walker = document.createTreeWalker(document.querySelector(".gradio-container"), NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !e.checkVisibility({visibilityProperty: true, opacityProperty: true}))
      continue;
    if (e.closest("footer, script, style, svg, #player .controls")) continue;
    const [a, b] = [luminance(parse(getComputedStyle(e).color)), luminance(background(e))];
    found[walker.currentNode.data.trim().slice(0, 30)] = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  }
  return found;
}"""
NAMELESS = """() => [...document.querySelectorAll("button, input, textarea, [role=button]")].filter((e) =>
  e.checkVisibility() && !e.closest("footer") &&
  !(e.ariaLabel || e.innerText?.trim() || e.labels?.[0]?.innerText.trim() || e.title || e.ariaHidden)
).map((e) => e.outerHTML.slice(0, 200))"""


def upload(page, path):
    page.set_input_files("#player input[type=file]", str(path))
    page.wait_for_selector("#player video")


def ask(page, *sentences):
    page.fill("#sentences textarea", "\n".join(sentences))
    page.click("#find")


def status(page, role="status") -> str:
    page.wait_for_selector(f"#status [role={role}]")
    return page.inner_text("#status")


def moments(page) -> list[tuple[float, float]]:
    buttons = page.locator("#timeline li button")
    return [tuple(float(button.get_attribute(f"data-{side}")) for side in ("start", "end")) for button in buttons.all()]


def test_from_upload_to_playing(visit, rendered, app):
    """Upload, ask, see the right moment, and play it. A second question does not encode the video again."""
    page = visit()
    upload(page, rendered.path)
    encoded = app.search.num_encoded
    ask(page, rendered.sentence)
    assert "1 moment found." in status(page)
    ((start, end),) = moments(page)
    assert start == pytest.approx(rendered.window[0], abs=1) and end == pytest.approx(rendered.window[1], abs=1)
    assert app.search.num_encoded == encoded + 1
    assert page.locator("#timeline .frames img").count() == 12
    assert page.inner_text("#results tbody th") == rendered.sentence

    page.click("#timeline li button")
    page.wait_for_function(f"{VIDEO}.currentTime >= {start}")
    assert page.evaluate(f"{VIDEO}.paused") is False
    assert page.evaluate(f"{VIDEO}.currentTime") < end
    page.wait_for_function("document.querySelector('#timeline .now').style.left !== ''")

    page.evaluate(f"{VIDEO}.pause()")
    page.fill("#sentences textarea", "")
    ask(page, rendered.absent, rendered.sentence)
    page.wait_for_function("document.querySelectorAll('#timeline section').length === 2")
    assert f"Nothing in the video seems to match “{rendered.absent}”." in status(page)
    assert "the video was already encoded" in status(page)
    assert app.search.num_encoded == encoded + 1
    assert page.inner_text("#timeline section p") == "No moment found."


def test_keyboard(visit, rendered):
    """Search from the text, and play a moment, without a mouse."""
    page = visit()
    upload(page, rendered.path)
    page.focus("#sentences textarea")
    page.keyboard.type(rendered.sentence)
    page.keyboard.press("Shift+Enter")
    status(page)
    page.focus("#timeline li button")
    page.keyboard.press("Enter")
    page.wait_for_function(f"{VIDEO}.currentTime >= {moments(page)[0][0]}")


def test_downloads(visit, rendered):
    page = visit()
    upload(page, rendered.path)
    ask(page, rendered.sentence)
    status(page)
    files = {}
    for kind in ("JSON", "clips (zip)", "web page"):
        with page.expect_download() as download:
            page.get_by_role("button", name=f"Download {kind}").click()
        files[kind] = download.value
    ((start, end),) = moments(page)
    (row,) = json.loads(files["JSON"].path().read_text())
    assert row["query"] == rendered.sentence and row["moments"][0]["start"] == pytest.approx(start, abs=1e-3)
    with zipfile.ZipFile(files["clips (zip)"].path()) as archive:
        (name,) = archive.namelist()
    assert name.startswith("01-01_") and name.endswith(f"{start:06.1f}-{end:06.1f}.mp4")
    assert files["web page"].suggested_filename == f"{rendered.path.stem}_moments.html"
    assert "data:video/mp4;base64," in files["web page"].path().read_text()


def test_example(visit, app):
    page = visit()
    page.get_by_role("button", name=app.examples[1].title).click()
    page.wait_for_selector("#player video")
    assert page.input_value("#sentences textarea").splitlines() == list(app.examples[1].sentences)
    page.click("#find")
    status(page)
    # The results leave with their video
    page.get_by_role("button", name=app.examples[0].title).click()
    page.wait_for_selector("#timeline", state="detached")
    assert not page.get_by_role("button", name="Download JSON").is_visible()


def test_video_from_the_web(visit, rendered, app, video_server, monkeypatch):
    page = visit()
    page.get_by_role("button", name="Use a video from the web").click()
    address = page.get_by_label("Address of a video file")
    address.fill(video_server.url("plain/film.mp4"))
    page.get_by_role("button", name="Load", exact=True).click()
    assert status(page, "alert").endswith("cannot be reached (127.0.0.1 is not a public address)")
    monkeypatch.setattr(public_addresses, "is_public", lambda address: True)
    video_server.files["film.mp4"] = rendered.path.read_bytes()
    address.press("Enter")
    page.wait_for_selector("#player video")
    ask(page, rendered.sentence)
    page.wait_for_selector("#timeline")
    assert "1 moment found." in status(page)


def test_what_is_missing_is_said(visit, rendered):
    page = visit()
    ask(page, "a red circle")
    assert status(page, "alert") == NO_VIDEO
    upload(page, rendered.path)
    ask(page, " ")
    page.wait_for_function(f"document.querySelector('#status').innerText === {json.dumps(NO_SENTENCE)}")


def test_broken_file(visit, rendered, tmp_path):
    """The message is the library's, without folders of the server. The next video works."""
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(rendered.path.read_bytes()[:3000])
    page = visit()
    page.set_input_files("#player input[type=file]", str(broken))
    page.wait_for_selector("#unplayable p", state="visible")
    ask(page, "a red circle")
    assert status(page, "alert").startswith("broken.mp4: ")
    page.get_by_label("Clear", exact=True).click()
    upload(page, rendered.path)
    page.wait_for_selector("#unplayable p", state="hidden")
    ask(page, rendered.sentence)
    assert "1 moment found." in status(page)


def test_video_that_lasts_too_long(visit, tmp_path):
    page = visit()
    upload(page, write_video(tmp_path / "long.mp4", range(170), rate=1))
    ask(page, "a red circle")
    assert status(page, "alert") == "long.mp4: lasts 170 s; the limit is 160 s (`max_video_seconds`)"


def test_file_that_is_too_large(visit, tmp_path):
    path = tmp_path / "large.mp4"
    with path.open("wb") as file:
        file.truncate(20 * 2**20 + 1)
    page = visit()
    page.set_input_files("#player input[type=file]", str(path))
    page.wait_for_function("/exceed the maximum allowed size of 20/.test(document.body.innerText)")


def test_video_that_browsers_cannot_play(visit, tmp_path):
    """It is searched all the same, and not converted."""
    page = visit()
    page.set_input_files(
        "#player input[type=file]", str(write_video(tmp_path / "old.avi", [i / 10 for i in range(40)], codec="mpeg4"))
    )
    page.wait_for_selector("#unplayable p", state="visible")
    ask(page, "a white moon")
    status(page)


def test_phone(visit, rendered):
    """No horizontal scrolling, and a chosen moment brings the video back into sight."""
    page = visit(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    upload(page, rendered.path)
    ask(page, rendered.sentence, rendered.absent)
    status(page)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.locator("#timeline li button").tap()
    page.wait_for_function(f"{VIDEO}.currentTime >= {moments(page)[0][0]}")
    assert page.evaluate(f"{VIDEO}.getBoundingClientRect().bottom") > 100


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_names_and_contrast(visit, app, scheme):
    page = visit(color_scheme=scheme)
    page.get_by_role("button", name=app.examples[0].title).click()
    page.wait_for_selector("#player video")
    page.click("#find")
    status(page)
    assert page.evaluate(NAMELESS) == []
    contrast = page.evaluate(CONTRAST)
    assert len(contrast) > 20
    assert {text: ratio for text, ratio in contrast.items() if ratio < 4.5} == {}
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 150) == (scheme == "dark")


def test_progress(visit, rendered, app, monkeypatch):
    """How much of the video is encoded is shown while it is encoded."""
    encode, go_on = app.search.pipeline.encode, threading.Event()

    def slowly(video, advance):
        advance(0.4)
        assert go_on.wait(20)
        return encode(video)

    monkeypatch.setattr(app.search.pipeline, "encode", slowly)
    monkeypatch.setattr(app.search, "_known", OrderedDict())
    page = visit()
    upload(page, rendered.path)
    ask(page, rendered.sentence)
    page.wait_for_function("/Encoding the video.*40(.0)?%/.test(document.querySelector('#status').innerText)")
    go_on.set()
    assert "1 moment found." in status(page)


def test_two_visitors(visit, rendered, app, monkeypatch):
    """The second one waits in a queue and sees the position. Each gets an own answer."""
    begun, go_on = threading.Event(), threading.Event()
    postprocess = app.search.pipeline.postprocess

    def slowly(*arguments, **options):
        begun.set()
        assert go_on.wait(20)
        return postprocess(*arguments, **options)

    monkeypatch.setattr(app.search.pipeline, "postprocess", slowly)
    first, second = visit(), visit()
    for page in (first, second):
        upload(page, rendered.path)
    ask(first, rendered.sentence)
    assert begun.wait(20)
    ask(second, rendered.absent)
    second.wait_for_function("/queue: 1\\/1/.test(document.querySelector('#status').innerText)")
    go_on.set()
    assert "1 moment found." in status(first)
    assert "Nothing in the video" in status(second)
    assert second.locator("#timeline li button").count() == 0
