import base64
import json
import queue
import re
import shutil
import subprocess
import threading
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

from modeling_diffusionvmr.presentation import page as page_module
from modeling_diffusionvmr.presentation.page import save_page
from test_video import write_video

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUERIES = ["a red circle", "a purple star"]
MOMENTS = [{"start": 2.0, "end": 3.5, "score": 0.936}, {"start": 7.04, "end": 10.0, "score": 0.9}]
RESULTS = [
    {"moments": MOMENTS, "saliency": [-1.0, 3.0, 0.5, -2.0, 1.0], "clip_seconds": 2.0},
    {"moments": [], "saliency": [-9.0] * 5, "clip_seconds": 2.0},
]
FRAMES = [np.full((240, 320, 3), 60 * index, np.uint8) for index in range(4)]


class Elements(HTMLParser):
    """The elements of a page, each (name, attributes, text directly inside). Fails if one is not closed."""

    VOID = {"meta", "img", "br"}

    def __init__(self, page: str):
        super().__init__()
        self.elements: list[tuple[str, dict, list[str]]] = []
        self.stack: list[tuple[str, dict, list[str]]] = []
        self.feed(page)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        element = (tag, dict(attrs), [])
        self.elements.append(element)
        if tag not in self.VOID:
            self.stack.append(element)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        assert self.stack.pop()[0] == tag

    def handle_data(self, data):
        if self.stack:
            self.stack[-1][2].append(data)

    def of(self, name: str) -> list[tuple[dict, str]]:
        """The attributes and the text of all elements of a name."""
        return [(attributes, "".join(text).strip()) for tag, attributes, text in self.elements if tag == name]


@pytest.fixture
def video(tmp_path):
    return write_video(tmp_path / "a.mp4", np.arange(100) / 10)


def saved(path, video, queries=QUERIES, results=RESULTS, **options) -> Elements:
    save_page(path, video, queries, results, 10.0, FRAMES, **options)
    return Elements(path.read_text(encoding="utf-8"))


def test_page(tmp_path, video):
    page = saved(tmp_path / "out.html", video)
    ((attributes, _),) = page.of("video")
    kind, content = attributes["src"].split(",")
    assert kind == "data:video/mp4;base64" and base64.b64decode(content) == video.read_bytes()
    assert [text for _, text in page.of("h2")] == QUERIES
    buttons = [attributes for attributes, _ in page.of("button")]
    assert all(attributes["type"] == "button" for attributes in buttons)
    spoken = [attributes for attributes in buttons if "aria-hidden" not in attributes]
    assert [attributes["aria-label"] for attributes in spoken] == [
        "Play 00:02.0 – 00:03.5, score 0.94",
        "Play 00:07.0 – 00:10.0, score 0.90",
    ]
    assert [(float(attributes["data-start"]), float(attributes["data-end"])) for attributes in spoken] == [
        (2, 3.5),
        (7.04, 10),
    ]
    bars = [attributes for attributes in buttons if "aria-hidden" in attributes]
    assert [attributes["data-start"] for attributes in bars] == [attributes["data-start"] for attributes in spoken]
    assert all(attributes["tabindex"] == "-1" for attributes in bars)
    assert re.findall(r"left:min\((.*?)%.*?width:(.*?)%", bars[0]["style"]) == [("20.0000", "15.0000")]
    assert [text for _, text in page.of("p")].count("No moment found.") == 1
    assert len(page.of("img")) == 4 and len(page.of("svg")) == 2
    text = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert "a ranking, not a\nprobability" in text and "prefers-color-scheme: dark" in text


def test_page_loads_nothing_from_elsewhere(tmp_path, video):
    page = saved(tmp_path / "out.html", video)
    for tag, attributes, _ in page.elements:
        for name in ("src", "href", "srcset", "poster", "data", "action"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
    text = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert "http:" not in text and "https:" not in text and "@import" not in text and "url(" not in text


@pytest.mark.parametrize(
    "text",
    [
        "</script><script>alert(1)</script>",
        "</title></h1></h2><img src=x>",
        "\" onclick=\"alert(1)' x='",
        "<!-- & &amp; ]]>",
        "$title ${source} $",
        "\udcff",
    ],
)
def test_text_from_outside_is_escaped(tmp_path, video, text):
    name = text.replace("/", "⁄") + ".mp4"
    other = video.rename(tmp_path / name)
    plain = saved(tmp_path / "plain.html", shutil.copy(other, video))
    page = saved(tmp_path / "out.html", other, queries=[text, "b"])
    expected = text.replace("\udcff", "?")
    assert page.of("h2")[0][1] == expected
    assert page.of("title")[0][1] == page.of("h1")[0][1] == f"Moments in {name}".replace("\udcff", "?")

    def structure(elements: Elements):
        return [(tag, sorted(attributes)) for tag, attributes, _ in elements.elements]

    assert structure(page) == structure(plain)
    assert [text for _, text in page.of("script")] == [text for _, text in plain.of("script")]


def test_large_videos_are_linked(tmp_path, video, monkeypatch):
    monkeypatch.setattr(page_module, "MAX_EMBEDDED_BYTES", video.stat().st_size - 1)
    (tmp_path / "videos").mkdir()
    other = video.rename(tmp_path / "videos" / "a: 100%'s \"#1?.mp4")
    (tmp_path / "pages").mkdir()
    page = saved(tmp_path / "pages" / "out.html", other)
    source = "./../videos/a%3A%20100%25%27s%20%22%231%3F.mp4"
    assert page.of("video")[0][0]["src"] == page.of("a")[0][0]["href"] == source
    assert "if you move or send this page, do the same" in (tmp_path / "pages" / "out.html").read_text("utf-8")
    assert (tmp_path / "pages" / "out.html").stat().st_size < 100_000


def test_downloads(tmp_path, video, monkeypatch):
    url = 'http://example.org/a/my%20video.webm?x=1&y="#z'
    with open(video, "rb") as file:
        page = saved(tmp_path / "out.html", file, url=url)
        assert page.of("h1")[0][1] == "Moments in my video.webm"
        assert page.of("video")[0][0]["src"].startswith("data:video/webm;base64,")
        monkeypatch.setattr(page_module, "MAX_EMBEDDED_BYTES", 10)
        page = saved(tmp_path / "out.html", file, url=url)
    assert page.of("video")[0][0]["src"] == page.of("a")[0][0]["href"] == url
    assert "while that address can be reached" in (tmp_path / "out.html").read_text("utf-8")


def test_two_hours(tmp_path, video):
    moments = [{"start": 7198.0, "end": 7200.0, "score": 0.9}, {"start": 3000.0, "end": 3004.0, "score": 0.8}]
    result = {"moments": moments, "saliency": [0.0] * 3600, "clip_seconds": 2.0}
    save_page(tmp_path / "out.html", video, ["a"], [result], 7200.0, FRAMES)
    text = (tmp_path / "out.html").read_text("utf-8")
    page = Elements(text)
    ticks = [text for attributes, text in page.of("span")]
    assert ticks == ["00:00", "30:00", "1:00:00", "1:30:00", "2:00:00"]
    assert page.of("path")[0][0]["d"].count(",") == 1000
    assert "1:59:58.0 – 2:00:00.0" in text
    assert "min-width: 6px" in text and "left:min(99.9722%, 100% - 6px)" in text


# What a visitor does, as a script. It is added to a copy of the page and reports to a server of the test.
VISIT = """
<script>
const report = {errors: []};
addEventListener("error", event => report.errors.push(String(event.message || event.target)), true);
const until = (target, name) => new Promise(done => target.addEventListener(name, done, {once: true}));
(async () => {
  video.muted = true;
  const complaint = document.querySelector("#unplayable");
  // `video.error` may be set before its event arrives
  if (video.readyState < 1 && complaint.hidden) {
    await Promise.race([until(video, "loadedmetadata"), until(video, "error")]);
  }
  report.complains = !complaint.hidden;
  report.width = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  report.bar = document.querySelector(".bars button").getBoundingClientRect().width;
  if (!video.error) {
    const button = document.querySelector("li button");
    const sought = until(video, "seeked"), stopped = until(video, "pause");
    button.focus();
    button.click();
    await sought;
    report.start = video.currentTime;
    await stopped;
    report.end = video.currentTime;
    report.now = parseFloat(document.querySelector(".now").style.left);
  }
})().catch(error => report.errors.push(String(error))).finally(() =>
  fetch("SERVER", {method: "POST", mode: "no-cors", body: JSON.stringify(report)}));
</script>
"""


def visited(path, width=360) -> dict:
    """Open a page in Chromium, let the visitor act, and return the report."""
    reports: queue.Queue = queue.Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            reports.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    script = VISIT.replace("SERVER", f"http://127.0.0.1:{server.server_port}/")
    copy = path.with_name("visited.html")
    copy.write_text(path.read_text("utf-8").replace("</body>", script + "</body>"), "utf-8")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required"]
    flags += [f"--window-size={width},800", f"--user-data-dir={path.parent / 'profile'}", "--mute-audio"]
    browser = subprocess.Popen([CHROMIUM, *flags, copy.as_uri()], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        return reports.get(timeout=90)
    finally:
        browser.terminate()
        browser.wait(timeout=30)
        server.shutdown()
        server.server_close()


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("embedded", [True, False])
def test_a_click_plays_a_moment(tmp_path, video, monkeypatch, embedded):
    if not embedded:
        monkeypatch.setattr(page_module, "MAX_EMBEDDED_BYTES", 10)
    saved(tmp_path / "out.html", video)
    report = visited(tmp_path / "out.html")
    assert report["errors"] == [] and not report["complains"]
    assert report["start"] == pytest.approx(2.0, abs=0.1)
    assert report["end"] == pytest.approx(3.5, abs=0.3)
    assert report["now"] == pytest.approx(35, abs=3)
    assert report["width"] == 0 and report["bar"] >= 6  # nothing to scroll sideways on a phone


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_video_that_browsers_cannot_play(tmp_path):
    saved(tmp_path / "out.html", write_video(tmp_path / "a.avi", np.arange(100) / 10, codec="mpeg4"))
    report = visited(tmp_path / "out.html")
    assert report["complains"]
