"""Videos from URLs, with a web server on the loopback."""

import errno
import gc
import io
import os
import pickle
import socket
import tempfile
from urllib.error import HTTPError
from urllib.request import Request

import numpy as np
import pytest

from modeling_diffusionvmr import download
from modeling_diffusionvmr.download import fetch
from modeling_diffusionvmr.video import open_video
from test_video import write_video

NAME = "a.mp4"


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> bytes:
    """A video of 4 s."""
    path = tmp_path_factory.mktemp("video") / NAME
    return write_video(path, np.arange(40) / 10, noise=True, movflags="faststart").read_bytes()


@pytest.fixture
def server(video_server, content):
    video_server.files[NAME] = content
    return video_server


@pytest.fixture
def temporary_files(tmp_path, monkeypatch) -> list:
    """The temporary files that a test creates. At its end, none of them may be left."""
    folder, created, create = tmp_path / "temporary", [], tempfile.TemporaryFile
    folder.mkdir()

    def recording():
        created.append(create(dir=folder))
        return created[-1]

    monkeypatch.setattr(download.tempfile, "TemporaryFile", recording)
    yield created
    if not all(file.closed for file in created):
        gc.collect()  # slow, and only needed for objects in a cycle
    assert all(file.closed for file in created)
    assert not list(folder.iterdir())


def frames(video) -> list[bytes]:
    return [frame.tobytes() for frame in open_video(video, 2.0)]


# Downloads


@pytest.mark.parametrize("way", ["plain", "unsized", "chunked"])
def test_content_is_downloaded(server, content, temporary_files, way):
    url = server.url(f"{way}/{NAME}")
    downloaded = fetch(url)
    assert downloaded.name == url
    assert downloaded.read() == content
    assert len(temporary_files) == 1


def test_video_from_a_url(server, content, temporary_files):
    url = server.url(f"plain/{NAME}")
    video = open_video(url, 2.0)
    assert video.name == url
    expected = frames(io.BytesIO(content))
    assert len(expected) == 2
    for _ in range(2):  # it can be iterated again
        assert [frame.tobytes() for frame in video] == expected
    assert len(server.requested) == len(temporary_files) == 1
    assert not temporary_files[0].closed
    del video
    assert temporary_files[0].closed


def test_pickled(server, content, temporary_files):
    copied = pickle.loads(pickle.dumps(fetch(server.url(f"plain/{NAME}"))))
    assert (copied.read(), copied.name) == (content, server.url(f"plain/{NAME}"))
    assert len(temporary_files) == 2


def test_unusual_urls(server, content):
    expected = frames(io.BytesIO(content))
    server.files["%C3%A9%20b.mp4"] = content
    for path in ("plain/\u00e9 b.mp4", "plain/%C3%A9%20b.mp4#t=1"):
        assert frames(server.url(path)) == expected
    assert frames(server.url(f"plain/{NAME}").replace("http", "HTTP")) == expected


def test_not_a_video(server, temporary_files):
    server.files[NAME] = b"<html>no video</html>" * 100
    url = server.url(f"plain/{NAME}")
    with pytest.raises(ValueError, match=f"^{url}: not a readable video"):
        open_video(url, 2.0)
    server.files[NAME] = b""
    with pytest.raises(ValueError, match=f"^{url}: not a readable video"):
        open_video(url, 2.0)


def test_progress(server, content, capsys):
    fetch(server.url(f"plain/{NAME}"))
    assert capsys.readouterr().err == ""
    fetch(server.url(f"plain/{NAME}"), progress=True)
    assert "downloading: 100%" in capsys.readouterr().err
    fetch(server.url(f"unsized/{NAME}"), progress=True)
    assert "downloading: " in capsys.readouterr().err


# The size limit


@pytest.mark.parametrize("way", ["plain", "unsized", "chunked"])
def test_size_limit(server, content, temporary_files, way):
    url = server.url(f"{way}/{NAME}")
    fetch(url, max_bytes=len(content))
    limit = len(content) - 1
    with pytest.raises(ValueError, match=f"^{url}: .* than `max_download_bytes`, which is {limit}$"):
        fetch(url, max_bytes=limit)
    # What states its size is not even downloaded
    assert len(temporary_files) == (1 if way == "plain" else 2)


def test_download_stops_at_the_limit(server, temporary_files):
    """A server that sends without an end must not fill the disk."""
    with pytest.raises(ValueError, match="larger than `max_download_bytes`, which is 5000$"):
        fetch(server.url(f"endless/{NAME}"), max_bytes=5000)


@pytest.mark.parametrize("size", [0, -1, 2.5, "5", True, None])
def test_invalid_size_limit(server, size):
    with pytest.raises(ValueError, match="^`max_download_bytes` must be"):
        fetch(server.url(f"plain/{NAME}"), max_bytes=size)
    assert not server.requested


# Failures


def test_stated_size_is_wrong(server, content, temporary_files):
    url = server.url(f"claim/{NAME}?size={len(content) + 10}")
    with pytest.raises(OSError, match=f"the download was cut off at {len(content)} of {len(content) + 10} bytes"):
        fetch(url)
    # HTTP ends the file at the stated size, which makes it a damaged video
    with pytest.raises(ValueError, match="size=5000: .*cut off"):
        frames(server.url(f"claim/{NAME}?size=5000"))
    with pytest.raises(ValueError, match="which is 1073741824"):
        fetch(server.url(f"claim/{NAME}?size={2**40}"))
    # Sizes that make no sense are as good as none
    for size in ("-5", "many"):
        assert fetch(server.url(f"claim/{NAME}?size={size}")).read() == content


def test_cut_off(server, content, temporary_files):
    with pytest.raises(OSError, match=f"at=5000: the download was cut off at 5000 of {len(content)} bytes"):
        fetch(server.url(f"cut/{NAME}?at=5000"))
    with pytest.raises(OSError, match="at=5000: the download was cut off at "):
        fetch(server.url(f"cut_chunk/{NAME}?at=5000"))
    assert len(temporary_files) == 2


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("plain/absent.mp4", r"the server answered 404 \(Not Found\)"),
        ("garbage", r"cannot be reached \(this is not HTTP\)"),
        ("redirect?to=file:///etc/passwd", "the server answered 302 .*'file:///etc/passwd' is not allowed"),
        ("redirect?to=ftp://127.0.0.1/a.mp4", "the server answered 302 .*ftp://127.0.0.1/a.mp4 is not allowed"),
        ("redirect?to=data:video/mp4,abc", "the server answered 302 .*data:video/mp4,abc' is not allowed"),
    ],
)
def test_bad_answers(server, temporary_files, path, message):
    with pytest.raises(OSError, match=message) as caught:
        fetch(server.url(path))
    assert str(caught.value).startswith(f"{server.url(path)}: ") and "\n" not in str(caught.value)
    assert not temporary_files


def test_redirects(server, content):
    assert frames(server.url(f"redirect?to={server.url('plain/' + NAME)}")) == frames(io.BytesIO(content))
    assert frames(server.url(f"redirect?to=/plain/{NAME}")) == frames(io.BytesIO(content))
    with pytest.raises(OSError, match=r"loop: the server answered 302 \(.* infinite loop"):
        fetch(server.url("loop"))
    assert len(server.requested) < 30


def test_no_redirect_from_https_to_http():
    handler, arguments = download._RedirectHandler(), (io.BytesIO(), 302, "Found", {})
    for url in ("http://example.org/b.mp4", "ftp://example.org/b.mp4"):
        with pytest.raises(HTTPError, match="is not allowed"):
            handler.redirect_request(Request("https://example.org/a.mp4"), *arguments, url)
    for scheme in ("http", "https"):
        url = "https://example.org/b.mp4"
        assert handler.redirect_request(Request(f"{scheme}://example.org/a.mp4"), *arguments, url).full_url == url


def test_unreachable_server(server, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    for url in (f"http://127.0.0.1:{port}/{NAME}", f"http://nowhere.invalid/{NAME}", "http:///a.mp4"):
        with pytest.raises(OSError, match=f"^{url}: cannot be reached"):
            fetch(url)
    monkeypatch.setattr(download, "TIMEOUT", 0.1)
    with pytest.raises(OSError, match=r"silent: cannot be reached \(timed out\)"):
        fetch(server.url("silent"))


@pytest.mark.parametrize(
    "url", ["http://[::1/a.mp4", "http://127.0.0.1:99999/a.mp4", "https://127.0.0.1:x/a.mp4", "file://[/a.mp4"]
)
def test_invalid_urls(url):
    with pytest.raises(ValueError, match="not a valid URL") as caught:
        fetch(url)
    assert str(caught.value).startswith(f"{url}: ")


def test_full_disk(server, temporary_files, monkeypatch):
    class Full(io.BytesIO):
        def write(self, content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(download.tempfile, "TemporaryFile", Full)
    with pytest.raises(OSError, match=rf"{NAME}: cannot be saved in {tempfile.gettempdir()} \(No space left on device"):
        fetch(server.url(f"plain/{NAME}"))


# Files, and what is no URL


def test_file_urls(tmp_path, content):
    path = tmp_path / "50% \u00e9 #1?.mp4"
    path.write_bytes(content)
    assert fetch(path.as_uri()) == str(path)
    assert frames(path.as_uri()) == frames(path)
    assert fetch(path.as_uri().replace("file://", "FILE://localhost")) == str(path)
    with pytest.raises(FileNotFoundError, match=r"a b\.mp4: no such file"):
        open_video((tmp_path / "a b.mp4").as_uri(), 2.0)
    for url in ("file://videos/a.mp4", "file://"):
        with pytest.raises(ValueError, match=f"^{url}: a file URL must be file:///"):
            fetch(url)


@pytest.mark.parametrize("url", ["ftp://example.org/a.mp4", "s3://bucket/a.mp4", "hf://datasets/user/name/a.mp4"])
def test_other_schemes(url):
    with pytest.raises(ValueError, match=f"^{url}: URLs of type {url.split(':')[0]} are not supported; expected http"):
        fetch(url)


@pytest.mark.parametrize("value", ["a.mp4", "/a:b//c.mp4", r"C:\a.mp4", "C://a.mp4", "", 5, None, io.BytesIO()])
def test_anything_else_stays_as_it_is(value):
    assert fetch(value) is value
