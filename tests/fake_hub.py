"""A Hugging Face Hub on this machine: the few HTTP calls that huggingface_hub's own client makes to push and to load."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_writer"


@dataclass
class Commit:
    sha: str
    title: str
    files: dict[str, bytes]


@dataclass
class FakeHub:
    """Repositories by name, each a list of commits; ``requests`` are method and path of all calls."""

    repositories: dict[str, list[Commit]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    url: str = ""

    def commit(self, name: str, title: str, files: dict[str, bytes]) -> Commit:
        commits = self.repositories[name]
        commits.append(Commit(hashlib.sha1(f"{name}{len(commits)}".encode()).hexdigest(), title, files))
        return commits[-1]

    def find(self, name: str, revision: str) -> Commit | None:
        commits = self.repositories.get(name, [])
        return next((c for c in reversed(commits) if revision in ("main", c.sha)), None)


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def do_GET(self) -> None:
        self._answer_to_read()

    def do_HEAD(self) -> None:
        self._answer_to_read()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self._path()
        if path == "/api/validate-yaml":
            return self._json({"warnings": [], "errors": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        name, action = self._model(path)
        if action[0] == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            return self._json({"files": modes})
        return self._commit(name, [json.loads(line) for line in body.splitlines()])

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization'] or 'user'}/{asked['name']}"
        if name in self.hub.repositories:
            return self._json({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
        self.hub.repositories[name] = []
        self.hub.private[name] = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.commit(name, "initial commit", {".gitattributes": b""})
        return self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        files = dict(self.hub.repositories[name][-1].files)
        for line in lines:
            value = line["value"]
            if line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
        commit = self.hub.commit(name, lines[0]["value"]["summary"], files)
        self._json(
            {"commitUrl": f"{self.hub.url}/{name}/commit/{commit.sha}", "commitOid": commit.sha, "success": True}
        )

    def _answer_to_read(self) -> None:
        path = self._path()
        if "/resolve/" in path:
            name, _, rest = path[1:].partition("/resolve/")
            revision, _, file = rest.partition("/")
        else:
            name, (kind, revision) = self._model(path)
        commit = self.hub.find(name, revision)
        if commit is None:
            known = name in self.hub.repositories
            code = "RevisionNotFound" if known else "RepoNotFound"
            return self._send(b"{}", 404, {"X-Error-Code": code, "X-Error-Message": f"{code}: {name}"})
        if "/resolve/" in path:
            etag = hashlib.sha1(commit.files[file]).hexdigest()
            return self._send(commit.files[file], 200, {"ETag": f'"{etag}"', "X-Repo-Commit": commit.sha})
        if kind == "tree":
            return self._json([self._entry(file, content) for file, content in commit.files.items()])
        return self._json({"id": name, "modelId": name, "sha": commit.sha, "siblings": [], "tags": []})

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _path(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        return path

    def _model(self, path: str) -> tuple[str, list[str]]:
        owner, name, *action = path.removeprefix("/api/models/").split("/")
        return f"{owner}/{name}", action or ["revision", "main"]

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def _send(self, body: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Quiet."""


@contextmanager
def running() -> Iterator[FakeHub]:
    hub = FakeHub()
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
