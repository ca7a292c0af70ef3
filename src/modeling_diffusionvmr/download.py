"""Read videos from URLs: `http://` and `https://` are downloaded, `file://` is a local path."""

import http.client
import re
import string
import tempfile
import weakref
from collections.abc import Sequence
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit
from urllib.request import BaseHandler, HTTPRedirectHandler, Request, build_opener, url2pathname

from tqdm.auto import tqdm

from .checks import check_whole
from .messages import one_line

MAX_DOWNLOAD_BYTES = 2**30
CHUNK_BYTES = 2**20
TIMEOUT = 30.0  # in seconds, for each answer of the server, not for the whole download
# At least two letters: `C://` is a drive of Windows
URL = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)


class Download:
    """A downloaded file, in a temporary file without a name. It is deleted together with this object."""

    def __init__(self, file: IO[bytes], url: str):
        self.name = url
        self.read = file.read
        self.seek = file.seek
        weakref.finalize(self, file.close)

    def __reduce__(self):
        # Worker processes of a data loader (`num_workers`) pickle what they download
        self.seek(0)
        return _from_content, (self.read(), self.name)


def _from_content(content: bytes, url: str) -> Download:
    file = tempfile.TemporaryFile()
    download = Download(file, url)
    _write(file, content, url)
    file.seek(0)
    return download


class _RedirectHandler(HTTPRedirectHandler):
    """Follow redirects to http and https only, and never from https to http."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        allowed = ("https",) if req.type == "https" else ("http", "https")
        if urlsplit(newurl).scheme.lower() not in allowed:
            raise HTTPError(req.full_url, code, f"redirection to {newurl} is not allowed", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetch(
    video: Any, max_bytes: int = MAX_DOWNLOAD_BYTES, progress: bool = False, handlers: Sequence[BaseHandler] = ()
) -> Any:
    """
    Turn a URL into something that can be read here. Return everything else as it is.

    Args:
        video: a string that begins with `http://`, `https://` or `file://`, or anything else.
        max_bytes: maximum size of a download.
        progress: show a progress bar of the download.
        handlers: of `urllib`, to connect in another way.

    Returns:
        A `Download` for http and https, a path for file, `video` itself for anything else.

    Raises:
        ValueError: if the URL is invalid, has another scheme, or if its file is larger than `max_bytes`.
        OSError: if the server cannot be reached or answers with an error (404, ...), if it redirects to another
            scheme, or if the download is cut off. All messages begin with the URL.
    """
    match = URL.match(video) if isinstance(video, str) else None
    if match is None:
        return video
    try:
        host, path = urlsplit(video)[1:3]
        urlsplit(video).port  # noqa: B018  checks it
    except ValueError as error:
        raise ValueError(f"{video}: not a valid URL ({error})") from error
    scheme = match[1].lower()
    if scheme in ("http", "https"):
        return _download(video, max_bytes, progress, handlers)
    if scheme != "file":
        raise ValueError(f"{video}: URLs of type {scheme} are not supported; expected http, https or file")
    if host not in ("", "localhost") or not path:
        raise ValueError(f"{video}: a file URL must be file:/// and the whole path of a file on this computer")
    return url2pathname(path)


def _download(url: str, max_bytes: int, progress: bool, handlers: Sequence[BaseHandler]) -> Download:
    check_whole(max_bytes, "`max_download_bytes`", 1)
    with _open(url, handlers) as response:
        size = response.length  # as the server states it; `None` if it does not
        if size is not None and size > max_bytes:
            raise ValueError(f"{url}: {size} bytes are more than `max_download_bytes`, which is {max_bytes}")
        file = tempfile.TemporaryFile()
        download = Download(file, url)
        received = 0
        with tqdm(desc="downloading", total=size, unit="B", unit_scale=True, disable=not progress) as bar:
            while chunk := _read(response, url, received):
                received += len(chunk)
                if received > max_bytes:
                    raise ValueError(f"{url}: larger than `max_download_bytes`, which is {max_bytes}")
                _write(file, chunk, url)
                bar.update(len(chunk))
    if size is not None and received < size:
        raise OSError(f"{url}: the download was cut off at {received} of {size} bytes")
    file.seek(0)
    return download


def _open(url: str, handlers: Sequence[BaseHandler]) -> http.client.HTTPResponse:
    try:
        # Like a browser, encode spaces and other characters that a URL cannot contain. Some servers refuse the default
        # user agent.
        request = Request(quote(url, safe=string.punctuation), headers={"User-Agent": "modeling_diffusionvmr"})
        return build_opener(_RedirectHandler, *handlers).open(request, timeout=TIMEOUT)
    except HTTPError as error:
        with error:
            raise OSError(f"{url}: the server answered {error.code} ({one_line(error.reason)})") from error
    except (ValueError, http.client.InvalidURL) as error:
        raise ValueError(f"{url}: not a valid URL ({one_line(error)})") from error
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, URLError) else error
        raise OSError(f"{url}: cannot be reached ({one_line(reason)})") from error


def _read(response: http.client.HTTPResponse, url: str, received: int) -> bytes:
    try:
        return response.read(CHUNK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"{url}: the download was cut off at {received} bytes ({one_line(error)})") from error


def _write(file: IO[bytes], chunk: bytes, url: str) -> None:
    try:
        file.write(chunk)
        file.flush()
    except OSError as error:
        folder = tempfile.gettempdir()
        raise OSError(f"{url}: cannot be saved in {folder} ({one_line(error.strerror)})") from error
