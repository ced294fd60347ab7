"""A Hugging Face Hub on loopback: as much of its protocol as downloads, uploads and their failures need.

Small files are served from git, as their SHA-1 says; weights from large file storage, by a redirect and with a SHA-256.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

TOKEN = "hf_loopback"


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repository:
    """Files by commit, and the commit that each branch points to."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], branch: str = "main", message: str = "") -> str:
        """Add files to a branch; returns the new commit."""
        known = self.commits.get(self.branches.get(branch, self.branches.get("main", "")), {})
        sha = hashlib.sha1(f"{len(self.commits)} {branch}".encode()).hexdigest()
        self.commits[sha] = {**known, **files}
        self.branches[branch] = sha
        self.messages.append(message)
        return sha


class HubServer(ThreadingHTTPServer):
    """The Hub; `with HubServer() as hub` serves until the block ends.

    `faults` maps a pattern, found in "METHOD /path", to functions that answer in the Hub's place, one for each request; where
    a function returns True the Hub answers as usual.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.storage_url = f"http://localhost:{self.server_port}/storage"  # another host, as the real one has
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: dict[str, list[Callable[[Handler], bool | None]]] = {}

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # a client that went away
            super().handle()

    def do_HEAD(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = f"{self.command} {self.path}"
        self.server.requests.append(request)
        for pattern, answers in self.server.faults.items():
            if re.search(pattern, request) and answers and not answers.pop(0)(self):
                return
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        for method, pattern, handle in ROUTES:
            found = re.fullmatch(pattern, url.path)
            if found and self.command in method:
                handle(self, *found.groups())
                return
        self.answer(404)

    do_GET = do_POST = do_PUT = do_HEAD

    def answer(self, status: int, data: bytes = b"", length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def answer_json(self, value: object, status: int = 200) -> None:
        self.answer(status, json.dumps(value).encode(), Content_Type="application/json")

    def send_data(self, data: bytes, **headers: str) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            return self.answer(200, data, **headers)
        first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        part = data[first : last + 1]
        return self.answer(206, part, Content_Range=f"bytes {first}-{first + len(part) - 1}/{len(data)}", **headers)

    def repository(self, name: str) -> Repository | None:
        """The repository if it is there for this token; else the answer has been given."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        found = self.server.repositories.get(name)
        if token not in ("", TOKEN):
            self.answer(401, X_Error_Message="Invalid credentials in Authorization header")
        elif not token and self.command == "POST":
            self.answer(401, X_Error_Message="Unauthorized")
        elif found is None or (found.private and not token):
            self.answer(404 if token else 401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        elif found.gated:
            self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="Access to this repository is restricted")
        else:
            return found
        return None

    def resolve(self, name: str, revision: str, path: str) -> None:
        repository = self.repository(name)
        if repository is None:
            return
        commit = repository.branches.get(revision.replace("%2F", "/"), revision)
        if commit not in repository.commits:
            self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
        elif path not in repository.commits[commit]:
            self.answer(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found", X_Repo_Commit=commit)
        elif path.endswith(".safetensors"):
            data = repository.commits[commit][path]
            oid = hashlib.sha256(data).hexdigest()
            self.server.objects[oid] = data
            linked = {"X_Linked_Etag": f'"{oid}"', "X_Linked_Size": str(len(data))}
            self.answer(302, Location=f"{self.server.storage_url}/{oid}", X_Repo_Commit=commit, **linked)
        else:
            data = repository.commits[commit][path]
            self.send_data(data, ETag=f'"{git_hash(data)}"', X_Repo_Commit=commit)

    def storage(self, oid: str) -> None:
        if self.command == "PUT":
            intact = hashlib.sha256(self.body).hexdigest() == oid
            self.server.objects[oid] = self.body
            self.answer(200 if intact else 400)
        else:
            self.send_data(self.server.objects[oid], ETag=f'"{oid}"')

    def create(self) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted['organization']}/{wanted['name']}"
        answer = {"url": f"{self.server.url}/{name}", "name": name}
        if not self.headers.get("Authorization"):
            self.answer_json({"error": "Unauthorized"}, 401)
        elif name in self.server.repositories:
            self.answer_json({"error": "You already created this model repo", **answer}, 409)
        else:
            private = wanted.get("private") or wanted.get("visibility") == "private"
            made = self.server.repositories[name] = Repository(private=bool(private))
            made.commit({".gitattributes": b"*.safetensors filter=lfs"})
            self.answer_json(answer)

    def preupload(self, name: str, revision: str) -> None:
        if self.repository(name) is not None:
            files = [file["path"] for file in json.loads(self.body)["files"]]
            modes = [
                {"path": path, "uploadMode": "lfs" if path.endswith(".safetensors") else "regular", "shouldIgnore": False}
                for path in files
            ]
            self.answer_json({"files": modes})

    def batch(self, name: str) -> None:
        objects = json.loads(self.body)["objects"]
        actions = [{**it, "actions": {"upload": {"href": f"{self.server.storage_url}/{it['oid']}"}}} for it in objects]
        self.answer_json({"transfer": "basic", "objects": actions})

    def commit(self, name: str, revision: str) -> None:
        repository = self.repository(name)
        if repository is None:
            return
        files, message = {}, ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self.server.objects[value["oid"]]
        proposed = self.query.get("create_pr") == ["1"]
        sha = repository.commit(files, "refs/pr/1" if proposed else revision, message)
        page = f"{self.server.url}/{name}"
        answer = {"commitUrl": f"{page}/commit/{sha}", "commitOid": sha, "hookOutput": "", "success": True}
        self.answer_json({**answer, **({"pullRequestUrl": f"{page}/discussions/1"} if proposed else {})})

    def info(self, name: str, revision: str | None) -> None:
        repository = self.repository(name)
        if repository is not None:
            sha = repository.branches.get(revision or "main", revision)
            self.answer_json({"_id": "1", "id": name, "sha": sha, "private": repository.private, "siblings": []})

    def validate(self) -> None:
        self.answer_json({"errors": [], "warnings": []})


NAME = r"/([\w.-]+/[\w.-]+)"
ROUTES = (
    (("HEAD", "GET"), NAME + r"/resolve/([^/]+)/(.+)", Handler.resolve),
    (("GET", "PUT"), r"/storage/(\w+)", Handler.storage),
    (("POST",), r"/api/repos/create", Handler.create),
    (("GET",), r"/api/models" + NAME + r"(?:/revision/([^/]+))?", Handler.info),
    (("POST",), r"/api/models" + NAME + r"/preupload/([^/]+)", Handler.preupload),
    (("POST",), NAME + r"\.git/info/lfs/objects/batch", Handler.batch),
    (("POST",), r"/api/models" + NAME + r"/commit/([^/]+)", Handler.commit),
    (("POST",), r"/api/validate-yaml", Handler.validate),
)


# --- faults: what a server does instead of answering


def status(code: int, **headers: str) -> Callable[[Handler], None]:
    return lambda handler: handler.answer(code, **headers)


def altered(handler: Handler) -> None:
    """The right length, another content."""
    data = bytearray(handler.server.objects[handler.path.rpartition("/")[2]])
    data[-1] ^= 255
    handler.answer(200, bytes(data))


def truncated(handler: Handler) -> None:
    """Half of the file, as if it were all."""
    data = handler.server.objects[handler.path.rpartition("/")[2]]
    handler.answer(200, data[: len(data) // 2])


def gone(handler: Handler) -> None:
    """Half of the file, then no server any more."""
    data = handler.server.objects[handler.path.rpartition("/")[2]]
    handler.close_connection = True
    handler.answer(200, data[: len(data) // 2], length=len(data))
    handler.server.socket.close()
