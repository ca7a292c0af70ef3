"""
A small stand-in for the Hub, on the loopback: what `huggingface_hub` needs to create, upload, list and download.

Repositories are in memory. Uploads of large files follow the LFS protocol, in one part; start clients with
HF_HUB_DISABLE_XET=1.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKENS = {"hf_token_of_user": "user", "hf_token_of_other": "other"}
REPOSITORY = r"(?P<id>[\w.-]+/[\w.-]+)"
API = rf"/api/(?P<type>models|datasets)/{REPOSITORY}"
FILE = rf"/(?P<type>datasets/)?{REPOSITORY}"


@dataclass
class Repository:
    """Commits by digest, each the whole tree `{path: content}`, and branches by name."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)  # titles of the commits

    def commit(self, branch: str, title: str, tree: dict[str, bytes]) -> str:
        names = "".join(f"{path} {digest(content)}" for path, content in sorted(tree.items()))
        commit = hashlib.sha1(f"{len(self.commits)} {names}".encode()).hexdigest()
        self.commits[commit] = tree
        self.branches[branch] = commit
        self.log.append(title)
        return commit

    def files(self, branch: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[branch]]


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".parquet"))


class Refused(Exception):
    """An answer with an error: status and code."""


class HubServer(ThreadingHTTPServer):
    """
    Attributes:
        repositories: by ("models" or "datasets", id).
        requests: method and path of each request.
        cut_off: the number of large files after which uploads hang. `is_cut_off` is set when that happens.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.uploaded: dict[str, bytes] = {}  # large files by digest
        self.requests: list[str] = []
        self.cut_off: int | None = None
        self.is_cut_off = threading.Event()

    def model(self, identifier: str) -> Repository:
        return self.repositories["models", identifier]


@contextmanager
def running_hub():
    server = HubServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    """Answers requests. Each method named in `ROUTES` gets the groups of its pattern."""

    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *arguments):
        pass

    def handle_request(self):
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            self.body = self._read_chunks()
        try:
            for methods, pattern, name in ROUTES:
                found = re.fullmatch(pattern, path)
                if found and self.command in methods.split():
                    return getattr(self, name)(**found.groupdict())
            raise Refused(404, "NotFound")
        except Refused as error:
            status, code = error.args
            self.answer(status, json.dumps({"error": code}).encode(), {"X-Error-Code": code})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def _read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, content):
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    @property
    def user(self) -> str | None:
        return TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def repository(self, kind: str | None, identifier: str, write: bool = False) -> Repository:
        found = self.server.repositories.get(((kind or "models").rstrip("/"), identifier))
        is_owner = self.user == identifier.split("/")[0]
        if found is None or (found.private and not is_owner):
            raise Refused(404 if self.user else 401, "RepoNotFound")
        if write and not is_owner:
            raise Refused(403, "Forbidden")
        return found

    def revision(self, repository: Repository, revision: str) -> str:
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            raise Refused(404, "RevisionNotFound")
        return commit

    # Routes

    def whoami(self):
        if self.user is None:
            raise Refused(401, "Unauthorized")
        self.answer_json({"name": self.user, "type": "user", "orgs": []})

    def create(self):
        asked = json.loads(self.body)
        if self.user is None:
            raise Refused(401, "Unauthorized")
        if asked.get("organization", self.user) not in (self.user, None):
            raise Refused(403, "Forbidden")
        identifier = f"{self.user}/{asked['name']}"
        kind = f"{asked.get('type', 'model')}s"
        prefix = "" if kind == "models" else f"{kind}/"
        answer = {"url": f"{self.server.url}/{prefix}{identifier}", "name": identifier}
        if (kind, identifier) in self.server.repositories:
            return self.answer(409, json.dumps(answer).encode())
        repository = Repository(asked.get("visibility") == "private" or asked.get("private", False))
        repository.commit("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.server.repositories[kind, identifier] = repository
        self.answer_json(answer)

    def validate(self):
        self.answer_json({"errors": [], "warnings": []})

    def branch(self, type, id, branch):
        repository = self.repository(type, id, write=True)
        if branch in repository.branches:
            raise Refused(409, "Conflict")
        repository.branches[branch] = repository.branches["main"]
        self.answer_json({})

    def preupload(self, type, id, revision):
        self.repository(type, id, write=True)
        files = json.loads(self.body)["files"]
        modes = [(file["path"], "lfs" if is_large(file["path"]) else "regular") for file in files]
        self.answer_json({"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes]})

    def lfs_batch(self, type, id):
        self.repository(type, id, write=True)
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in self.server.uploaded:
                item["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}"}}
        self.answer_json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid):
        if self.server.cut_off is not None:
            self.server.cut_off -= 1
            if self.server.cut_off < 0:
                self.server.is_cut_off.set()
                threading.Event().wait(120)
                return
        if digest(self.body) != oid:
            raise Refused(400, "BadRequest")
        self.server.uploaded[oid] = self.body
        self.answer(200)

    def commit(self, type, id, revision):
        repository = self.repository(type, id, write=True)
        self.revision(repository, revision)
        tree, title = dict(repository.files(revision)), ""
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                title = value["summary"]
            elif key == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                tree[value["path"]] = self.server.uploaded[value["oid"]]
            elif key == "deletedFile":
                del tree[value["path"]]
            elif key == "deletedFolder":
                tree = {path: content for path, content in tree.items() if not path.startswith(value["path"])}
        commit = repository.commit(revision, title, tree)
        self.answer_json({"commitUrl": f"{self.server.url}/{id}/commit/{commit}", "commitOid": commit, "success": True})

    def info(self, type, id, revision="main"):
        repository = self.repository(type, id)
        commit = self.revision(repository, revision)
        siblings = [{"rfilename": path} for path in repository.commits[commit]]
        self.answer_json({"id": id, "sha": commit, "private": repository.private, "siblings": siblings, "tags": []})

    def tree(self, type, id, revision, folder=None):
        repository = self.repository(type, id)
        entries = []
        for path, content in repository.commits[self.revision(repository, revision)].items():
            if folder and not path.startswith(f"{folder}/"):
                continue
            entry = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            if is_large(path):
                entry["lfs"] = {"oid": digest(content), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        if folder and not entries:
            raise Refused(404, "EntryNotFound")
        self.answer_json(entries)

    def resolve(self, type, id, revision, path):
        repository = self.repository(type, id)
        commit = self.revision(repository, revision)
        content = repository.commits[commit].get(path)
        headers = {"X-Repo-Commit": commit}
        if content is None:
            return self.answer(404, b"", {**headers, "X-Error-Code": "EntryNotFound"})
        headers |= {"ETag": f'"{digest(content)}"', "X-Linked-Size": str(len(content)), "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self.answer(200, content, headers)
        first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self.answer(206, content[first : last + 1], headers)


ROUTES = [
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate"),
    ("POST", f"{API}/branch/(?P<branch>.+)", "branch"),
    ("POST", f"{API}/preupload/(?P<revision>.+)", "preupload"),
    ("POST", f"{API}/commit/(?P<revision>.+)", "commit"),
    ("GET", API, "info"),
    ("GET", f"{API}/revision/(?P<revision>.+)", "info"),
    ("GET", f"{API}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", "tree"),
    ("POST", rf"{FILE}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", "lfs_upload"),
    ("GET HEAD", f"{FILE}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]
"""Methods, pattern of the path, and the function of `Handler` that answers."""
