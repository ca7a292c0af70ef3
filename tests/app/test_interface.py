"""The programming interface: `gradio_client`, and plain HTTP as docs/how_to/try_it_in_a_browser.md shows it."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import gradio as gr
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from modeling_diffusionvmr.app import public_addresses
from modeling_diffusionvmr.app.downloads import KINDS, as_rows
from modeling_diffusionvmr.app.guard import NO_ROOM
from modeling_diffusionvmr.app.limits import Limits
from modeling_diffusionvmr.app.page import NO_SENTENCE, NO_VIDEO, Page
from modeling_diffusionvmr.app.server import running

FILE_PART = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.mp4"\r\n\r\n'  # its beginning
GUIDE = Path(__file__).resolve().parents[2] / "docs" / "how_to" / "try_it_in_a_browser.md"


@pytest.fixture(scope="module")
def client(app) -> Client:
    return Client(app.url, verbose=False)


def call(app, data) -> str:
    """The last event of a call over HTTP."""
    request = Request(f"{app.url}gradio_api/call/search", json.dumps({"data": data}).encode())
    request.add_header("Content-Type", "application/json")
    event = json.load(urlopen(request, timeout=30))["event_id"]
    return urlopen(f"{app.url}gradio_api/call/search/{event}", timeout=30).read().decode()


def status_of(url) -> int:
    try:
        return urlopen(url, timeout=30).status
    except HTTPError as error:
        return error.code


def file(path) -> dict:
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}}


def test_client(client, app, rendered, retrieve):
    rows = client.predict(handle_file(rendered.path), [rendered.sentence, rendered.absent], api_name="/search")
    expected = retrieve(str(rendered.path), [rendered.sentence, rendered.absent], return_saliency=True)
    assert rows == [{"query": rendered.sentence, **expected[0]}, {"query": rendered.absent, **expected[1]}]


@pytest.mark.parametrize("language", ["python", "sh"])
def test_what_the_guide_shows(app, rendered, tmp_path, language):
    """The lines run as they are, apart from the address, the file and the sentence."""
    (lines,) = re.findall(rf"```{language}\n(.*?search.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(lines.strip().splitlines()) <= 5
    lines = lines.replace("http://127.0.0.1:7860/", app.url).replace("a red circle", rendered.sentence)
    os.symlink(rendered.path, tmp_path / "video.mp4")
    command = [sys.executable, "-c", lines] if language == "python" else ["sh", "-ec", lines]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    start = float(re.search(r"start['\"]: ([\d.]+)", result.stdout)[1])
    assert start == pytest.approx(rendered.window[0], abs=1)


def test_url(app, client, rendered, video_server, monkeypatch):
    """The video is downloaded, and deleted after the search."""
    monkeypatch.setattr(public_addresses, "is_public", lambda address: address == "127.0.0.1")
    video_server.files["downloaded.mp4"] = rendered.path.read_bytes()
    (row,) = client.predict(None, [rendered.sentence], video_server.url("plain/downloaded.mp4"), api_name="/search")
    assert row["moments"][0]["start"] == pytest.approx(rendered.window[0], abs=1)
    assert len(video_server.requested) == 1 and not list(app.folder.glob("*/downloaded.mp4"))
    with pytest.raises(AppError, match=r"larger than `max_download_bytes`|are more than `max_download_bytes`"):
        client.predict(None, ["a"], video_server.url("claim/downloaded.mp4?size=30000000"), api_name="/search")


def test_errors_name_no_folder_of_the_server(client, rendered, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(rendered.path.read_bytes()[:3000])
    with pytest.raises(AppError, match=r"^broken\.mp4: "):
        client.predict(handle_file(broken), ["a red circle"], api_name="/search")


@pytest.mark.parametrize(
    "sentences, message",
    [
        ([], NO_SENTENCE),
        (["  "], "a query must be a string that is not blank"),
        (["a"] * 21, "21 sentences: the limit is 20 at once"),
        ({"a": 1}, "`sentences` must be a list, got dict"),
    ],
)
def test_sentences_that_are_refused(app, sentences, message):
    assert message in json.loads(call(app, [file(app.examples[0].path), sentences, ""]).split("data: ")[-1])["error"]


def test_no_video(app):
    assert NO_VIDEO in call(app, [None, ["a red circle"], ""])


def test_video_that_was_deleted(app):
    said = call(app, [file(app.folder / "gone.mp4"), ["a red circle"], ""])
    assert "gone.mp4: no longer here, because videos that are not used for 60 minutes are deleted" in said


def test_videos_in_use_stay(app):
    """The time until they are deleted begins anew with each search."""
    os.utime(app.examples[0].path, (0, 0))
    call(app, [file(app.examples[0].path), ["a red circle"], ""])
    assert time.time() - os.stat(app.examples[0].path).st_mtime < 60


# What must not be read or fetched


@pytest.mark.parametrize("form", [file, lambda path: {"path": path}, lambda path: path, lambda path: {"path": [path]}])
@pytest.mark.parametrize("name", ["/etc/passwd", "{}/../other.mp4", "{}/link.mp4"])
def test_no_file_outside_the_folder_is_read(app, rendered, form, name):
    link = app.folder / "link.mp4"
    if not link.is_symlink():
        link.symlink_to(rendered.path)
    said = call(app, [form(name.format(app.folder)), ["a red circle"], ""])
    assert said.startswith("event: error") and "not a readable video" not in said


@pytest.mark.parametrize(
    "path",
    [
        *("file=/etc/passwd", "file/etc/passwd", "file=%2fetc%2fpasswd", "file=relative", "file={}/../../etc/passwd"),
        *("file=http://127.0.0.1/", "file=https://example.org/", "proxy=http://127.0.0.1/", "runs", "vibe-code"),
        *("stream/a/0/0/playlist-file", "deep_link", "file=%00"),
    ],
)
def test_routes_that_are_not_needed_are_closed(app, path):
    assert status_of(f"{app.url}gradio_api/{path.format(app.folder)}") == 404


@pytest.mark.parametrize("path", ["static/../../routes.py", "assets/%2e%2e/index.html", "monitoring", "login"])
def test_other_paths_are_closed(app, path):
    assert status_of(f"{app.url}{path}") == 404


def test_files_of_the_folder_are_open(app):
    assert status_of(f"{app.url}gradio_api/file={app.examples[0].path}") == 200


@pytest.mark.parametrize("form", [file, lambda url: {"path": url, "url": url, "meta": {"_type": "gradio.FileData"}}])
def test_gradio_fetches_no_url(app, video_server, form):
    said = call(app, [form(video_server.url("plain/video.mp4")), ["a red circle"], ""])
    assert "pass an address as `url`" in said and video_server.requested == []


@pytest.mark.parametrize("url", ["{}", "file:///etc/passwd", "/etc/passwd", "ftp://example.org/a", 5, ["a"]])
def test_urls_that_are_refused(app, video_server, url):
    url = url.format(video_server.url("plain/video.mp4")) if isinstance(url, str) else url
    assert call(app, [None, ["a red circle"], url]).startswith("event: error")
    assert video_server.requested == []


@pytest.mark.parametrize("path, size", [("queue/join", 2**20 + 1), ("upload", 30 * 2**20)])
def test_requests_that_are_too_large(app, path, size):
    """They are refused by what they announce."""
    request = Request(f"{app.url}gradio_api/{path}", b"", {"Content-Length": str(size)})
    assert status_of(request) == 413


def test_requests_that_do_not_announce_their_size(app):
    """They are cut off at the limit."""
    sent = []

    def endless():
        for _ in range(1000):
            sent.append(2**16)
            yield bytes(2**16)

    with pytest.raises((HTTPError, OSError)):
        urlopen(Request(f"{app.url}gradio_api/queue/join", endless(), {"Content-Type": "application/json"}))
    assert sum(sent) < 20 * 2**20


def test_only_files_are_uploaded(app):
    """Gradio would keep other fields of a form in memory."""
    form = b'--b\r\nContent-Disposition: form-data; name="files"\r\n\r\n' + bytes(2**20) + b"\r\n--b--\r\n"
    request = Request(f"{app.url}gradio_api/upload", form, {"Content-Type": "multipart/form-data; boundary=b"})
    assert status_of(request) == 400


def test_uploads_end_when_the_folder_gets_full(app, monkeypatch):
    """Many can begin before it is."""
    sizes = iter([0, 2**40])
    monkeypatch.setattr("modeling_diffusionvmr.app.guard.folder_bytes", lambda folder: next(sizes))
    monkeypatch.setattr("modeling_diffusionvmr.app.guard.BYTES_BETWEEN_CHECKS", 2**20)
    form = FILE_PART + bytes(2 * 2**20) + b"\r\n--b--\r\n"
    request = Request(f"{app.url}gradio_api/upload", form, {"Content-Type": "multipart/form-data; boundary=b"})
    with pytest.raises((HTTPError, OSError)):
        urlopen(request, timeout=30)


def test_no_download_while_the_folder_is_full(app, rendered, monkeypatch):
    page = Page(app.search, Limits())
    copy = shutil.copy(rendered.path, app.folder)
    path = Path(page.save("JSON", (copy, [rendered.sentence])))
    assert json.loads(path.read_text())[0]["query"] == rendered.sentence
    monkeypatch.setattr("modeling_diffusionvmr.app.page.folder_bytes", lambda folder: 2**40)
    with pytest.raises(gr.Error, match="There is no room"):
        page.save("JSON", (copy, [rendered.sentence]))


def test_web_page_of_a_large_video(app, rendered, monkeypatch):
    """It links to a video in its own folder, not in a folder of the server."""
    monkeypatch.setattr("modeling_diffusionvmr.presentation.page.MAX_EMBEDDED_BYTES", 10)
    folder = app.folder / "large"
    folder.mkdir(exist_ok=True)
    copy = shutil.copy(rendered.path, folder / "film.mp4")
    page = Path(Page(app.search, Limits()).save("web page", (str(copy), [rendered.sentence])))
    assert page.name == "film_moments.html" and 'src="./film.mp4"' in page.read_text(encoding="utf-8")
    assert list(folder.iterdir()) == [copy]


def test_what_fails_is_deleted(app, rendered, monkeypatch):
    def fail(answer, video, path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setitem(KINDS, "JSON", ("_moments.json", fail))
    copy, before = shutil.copy(rendered.path, app.folder), set(app.folder.iterdir())
    with pytest.raises(gr.Error, match="No space left"):
        Page(app.search, Limits()).save("JSON", (copy, [rendered.sentence]))
    assert set(app.folder.iterdir()) == before


def test_no_more_videos_while_the_folder_is_full(app, monkeypatch):
    for module in ("guard", "page"):
        monkeypatch.setattr(f"modeling_diffusionvmr.app.{module}.folder_bytes", lambda folder: 2**40)
    assert status_of(Request(f"{app.url}gradio_api/upload", b"a")) == 507
    assert NO_ROOM in call(app, [None, ["a red circle"], "https://example.org/video.mp4"])


# Load


def test_many_requests(app, client, rendered):
    """None is lost, and each client gets its answers in the order of its questions."""
    sentences = [rendered.sentence, rendered.absent, *app.examples[0].sentences]
    expected = {sentence: as_rows(app.search(rendered.path, [sentence]))[0] for sentence in sentences}
    encoded = app.search.num_encoded

    def ask(first: int) -> list[str]:
        asked = [sentences[(first + i) % len(sentences)] for i in range(3)]
        jobs = [client.submit(handle_file(rendered.path), [sentence], api_name="/search") for sentence in asked]
        return [(sentence, job.result(timeout=60)) for sentence, job in zip(asked, jobs)]

    with ThreadPoolExecutor(4) as executor:
        answers = [pair for pairs in executor.map(ask, range(4)) for pair in pairs]
    assert len(answers) == 12 and all(rows == [expected[sentence]] for sentence, rows in answers)
    assert app.search.num_encoded == encoded


def test_uploads_are_deleted(retrieve, rendered):
    """When they were not used for some time, or not completed, and with the server. Examples stay until then."""
    before = os.environ.get("GRADIO_TEMP_DIR")
    with running(retrieve, limits=Limits(keep_seconds=1), num_examples=1) as app:
        Client(app.url, verbose=False).predict(handle_file(rendered.path), ["a red circle"], api_name="/search")
        deadline = time.monotonic() + 60
        with socket.create_connection(("127.0.0.1", urlsplit(app.url).port)) as interrupted:
            interrupted.sendall(
                b"POST /gradio_api/upload HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n"
                b"Content-Type: multipart/form-data; boundary=b\r\n\r\n" + FILE_PART + bytes(100_000)
            )
            while len(files := [path for path in app.folder.rglob("*") if path.is_file()]) < 3:
                assert time.monotonic() < deadline, files
                time.sleep(0.1)
        while len(files) > 1:
            assert time.monotonic() < deadline, files
            time.sleep(0.1)
            files = [path for path in app.folder.rglob("*") if path.is_file()]
        assert files == [app.examples[0].path]
    assert not app.folder.exists()
    assert os.environ["GRADIO_TEMP_DIR"] == before
