"""A web server on the loopback that serves files well and badly."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


class _Handler(BaseHTTPRequestHandler):
    """
    The path chooses the way to answer, and the query string the details: `/plain/NAME`, `/unsized/NAME`,
    `/chunked/NAME`, `/cut/NAME?at=BYTES`, `/cut_chunk/NAME?at=BYTES`, `/claim/NAME?size=BYTES`,
    `/endless/NAME`, `/redirect?to=URL`, `/loop`, `/garbage` and `/silent`. Anything else is not found.
    """

    server: "VideoServer"

    def do_GET(self):
        url = urlsplit(self.path)
        way, _, name = url.path[1:].partition("/")
        options = {key: values[0] for key, values in parse_qs(url.query).items()}
        self.server.requested.append(self.path)
        self.close_connection = True
        if way == "redirect":
            self._head(302, Location=options["to"])
        elif way == "loop":
            self._head(302, Location=self.path)
        elif way == "garbage":
            self.wfile.write(b"this is not HTTP\r\n\r\n")
        elif way == "silent":
            self.server.stopped.wait()
        elif name not in self.server.files or not hasattr(self, f"_{way}"):
            self.send_error(404)
        else:
            getattr(self, f"_{way}")(self.server.files[name], **options)

    def _head(self, status, **headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()

    def _plain(self, content):
        self._claim(content, len(content))

    def _claim(self, content, size):
        self._head(200, Content_Length=size)
        self.wfile.write(content)

    def _cut(self, content, at):
        self._claim(content[: int(at)], len(content))

    def _unsized(self, content):
        self._head(200)
        self.wfile.write(content)

    def _endless(self, content):
        self._head(200)
        while not self.server.stopped.is_set():
            self.wfile.write(content)

    def _chunked(self, content, end=b"0\r\n\r\n"):
        self.protocol_version = "HTTP/1.1"
        self._head(200, Transfer_Encoding="chunked")
        for start in range(0, len(content), 5000):
            part = content[start : start + 5000]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        self.wfile.write(end)

    def _cut_chunk(self, content, at):
        self._chunked(content[: int(at)], end=b"1000\r\ncut")

    def log_message(self, *arguments):
        pass


class VideoServer(ThreadingHTTPServer):
    """
    Serves `files`, by name, until the context ends.

    Attributes:
        files: content of each file.
        requested: paths of the requests so far.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.requested: list[str] = []
        self.stopped = threading.Event()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"

    def handle_error(self, request, client_address):
        pass  # the client hung up, as it does for files that are too large

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *arguments):
        self.stopped.set()
        self.shutdown()
        self.server_close()
