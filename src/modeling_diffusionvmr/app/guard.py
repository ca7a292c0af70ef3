"""Narrow Gradio's server to what the page and its clients need."""

import os
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
from gradio import processing_utils
from gradio.route_utils import GradioMultiPartParser, MultiPartException

API = "/gradio_api/"
FILE = f"{API}file="
UPLOAD = f"{API}upload"
# What the page and the clients of the programming interface ask for. Other routes are not needed: among them are some
# that fetch URLs, run FFmpeg on uploads, or show what others did.
ROUTES = {
    *("/", "/config", "/favicon.ico", "/manifest.json", "/robots.txt", "/theme.css"),
    *(f"{API}{name}" for name in ("app_id", "cancel", "heartbeat", "info", "openapi.json", "reset", "run/predict")),
    *(f"{API}{name}" for name in ("queue/data", "queue/join", "startup-events", "theme.css")),
    *(UPLOAD, f"{API}upload_progress"),
}
FOLDERS = ("/assets/", "/static/", "/svelte/", f"{API}call/", f"{API}heartbeat/")
MAX_REQUEST_BYTES = 2**20  # of everything but uploads
NO_ROOM = "There is no room for more files at the moment. Try again later."
BYTES_BETWEEN_CHECKS = 2**24  # of an upload: how often to look whether the folder is full


class Guard:
    """
    ASGI middleware that answers only requests for `ROUTES`, `FOLDERS` and files of one folder, and limits their size.

    Args:
        app: the application behind it.
        folder: the folder of uploads.
        max_upload_bytes: maximum size of an upload.
        max_folder_bytes: refuse uploads while the folder is larger, also in the middle of an upload.
    """

    def __init__(self, app: Any, folder: str | os.PathLike, max_upload_bytes: int, max_folder_bytes: int):
        self.app, self.folder = app, Path(folder).resolve()
        self.max_upload_bytes, self.max_folder_bytes = max_upload_bytes, max_folder_bytes

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
        elif scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif refusal is None:
            await self.app(scope, self._limited(receive, scope["path"]), send)
        else:
            status, text = refusal
            headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": text.encode()})

    def _refusal(self, scope: dict[str, Any]) -> tuple[int, str] | None:
        """Return status and text of the answer to a request that is refused, else `None`."""
        path = scope["path"]
        if not self._is_needed(path):
            return 404, "Not found"
        size = dict(scope["headers"]).get(b"content-length", b"0")
        limit = self._limit(path)
        if not size.isdigit() or int(size) > limit:
            return 413, f"Too large: at most {limit / 2**20:g} MiB are accepted"
        if path == UPLOAD and self._is_full():
            return 507, NO_ROOM
        return None

    def _limit(self, path: str) -> int:
        """Return the maximum size of the body of a request."""
        return MAX_REQUEST_BYTES + (self.max_upload_bytes if path == UPLOAD else 0)

    def _is_full(self) -> bool:
        return folder_bytes(self.folder) > self.max_folder_bytes

    def _is_needed(self, path: str) -> bool:
        if "\0" in path:
            return False
        if path.startswith(FILE):
            return Path(path.removeprefix(FILE)).resolve().is_relative_to(self.folder)
        return path in ROUTES or (path.startswith(FOLDERS) and ".." not in path)

    def _limited(self, receive: Any, path: str) -> Any:
        """
        Return a `receive` that hangs up on bodies beyond the limit, which do not have to announce their size, and on
        uploads when the folder is full: many can begin before it is.
        """
        limit, received, next_check = self._limit(path), 0, BYTES_BETWEEN_CHECKS

        async def limited() -> Any:
            nonlocal received, next_check
            message = await receive()
            received += len(message.get("body", b""))
            is_too_much = received > limit
            if path == UPLOAD and received > next_check:
                next_check = received + BYTES_BETWEEN_CHECKS
                is_too_much |= self._is_full()
            return {"type": "http.disconnect"} if is_too_much else message

        return limited


def folder_bytes(folder: Path) -> int:
    """Return the size of all files in a folder. Some may vanish at the same time."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
    return total


class _NoFetch(httpx.AsyncBaseTransport):
    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        raise gr.Error(f"{request.url}: pass an address as `url`; `video` is for uploaded files", print_exception=False)


def _only_files(self: GradioMultiPartParser, data: bytes, start: int, end: int) -> None:
    if self._current_part.file is None:
        raise MultiPartException("Only files can be uploaded")
    _on_part_data(self, data, start, end)


_on_part_data = GradioMultiPartParser.on_part_data


def restrict_gradio() -> None:
    """
    Keep Gradio from three things that it does with files of visitors, in this process.

    It downloads files that a request names by URL. It would hold them in memory, however large they are, and would
    trust some names without looking at their addresses. And it converts videos that browsers cannot play with FFmpeg,
    which opens every file and URL that a playlist names. And it collects the fields of a form in memory, and copies all
    of a field for each part that arrives.
    """
    processing_utils.async_transport = _NoFetch()  # type: ignore[assignment]
    processing_utils.ffmpeg_installed = lambda: False
    GradioMultiPartParser.on_part_data = _only_files  # type: ignore[method-assign]
