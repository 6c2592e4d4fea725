"""As much of the Hugging Face Hub as huggingface_hub needs, on a loopback address."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_right"


@dataclass
class Repository:
    """Branches and commits; a commit is all its files."""

    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    titles: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], title: str = "") -> str:
        sha = hashlib.sha1(f"{branch}{len(self.commits)}{title}".encode()).hexdigest()
        before = self.commits.get(self.branches.get(branch, ""), {})
        self.commits[sha], self.branches[branch] = {**before, **files}, sha
        self.titles.append(title)
        return sha

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        sha = self.branches.get(revision, revision)
        return (sha, self.commits[sha]) if sha in self.commits else None


class Hub(ThreadingHTTPServer):
    """The server; as a context manager it runs."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, name: str, files: dict[str, bytes], *, private: bool = False, gated: bool = False) -> str:
        return self.repositories.setdefault(name, Repository(private, gated)).commit("main", files)

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        path, self.query = url.path, parse_qs(url.query)
        self.server.requests.append(f"{self.command} {unquote(path)}")
        for pattern, act in _ROUTES.items():
            if hit := re.fullmatch(pattern, path):
                act(self, *map(unquote, hit.groups()))
                return
        self._json({}, 404)

    def _json(self, data: Any, status: int = 200, **headers: str) -> None:
        self._send(json.dumps(data).encode(), status, **headers)

    def _send(self, data: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _repository(self, name: str) -> Repository | None:
        """The repository, if the request may see it; if not, the refusal is sent."""
        found = self.server.repositories.get(name)
        right = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if found is None or (found.private and not right):
            self._json({"error": "Repository not found"}, 401, X_Error_Code="RepoNotFound")
            return None
        if found.gated and not right:
            self._json({"error": "gated"}, 403, X_Error_Code="GatedRepo")
            return None
        return found

    def resolve(self, name: str, revision: str, file: str) -> None:
        repository = self._repository(name)
        if repository is None:
            return
        found = repository.files(revision)
        if found is None:
            self._json({}, 404, X_Error_Code="RevisionNotFound")
        elif file not in found[1]:
            self._json({}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=found[0])
        else:
            data = found[1][file]
            self._send(data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=found[0])

    def info(self, name: str, revision: str = "main") -> None:
        repository = self._repository(name)
        if repository is not None:
            sha = repository.branches.get(revision, "0" * 40)
            self._json(
                {"id": name, "modelId": name, "private": repository.private, "sha": sha, "siblings": []}
            )

    def create(self) -> None:
        asked = json.loads(self.body)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._json({"error": "Invalid username or password."}, 401)
            return
        name = f"{asked['organization'] or 'me'}/{asked['name']}"
        there = name in self.server.repositories
        private = asked.get("visibility") == "private" or asked.get("private") is True
        if not there:
            self.server.add(name, {}, private=private)
        self._json({"url": f"{self.server.url}/{name}", "name": name}, 409 if there else 200)

    def validate(self) -> None:
        self._json({"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        files = json.loads(self.body)["files"]
        self._json(
            {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        )

    def commit(self, name: str, revision: str) -> None:
        repository = self._repository(name)
        if repository is None:
            return
        lines = [json.loads(line) for line in self.body.splitlines() if line]
        title = next(line["value"]["summary"] for line in lines if line["key"] == "header")
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        request = "create_pr" in self.query
        sha = repository.commit("refs/pr/1" if request else revision, files, title)
        url = f"{self.server.url}/{name}"
        self._json(
            {
                "success": True,
                "commitOid": sha,
                "commitUrl": f"{url}/commit/{sha}",
                "hookOutput": "",
                "pullRequestUrl": f"{url}/discussions/1" if request else None,
            }
        )

    def branch(self, name: str, branch: str) -> None:
        repository = self._repository(name)
        if repository is not None:
            there = branch in repository.branches
            if not there:
                repository.branches[branch] = repository.branches["main"]
            self._json({}, 409 if there else 200)


_ROUTES: dict[str, Any] = {
    r"/api/repos/create": _Handler.create,
    r"/api/validate-yaml": _Handler.validate,
    r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)": _Handler.preupload,
    r"/api/models/([^/]+/[^/]+)/commit/([^/]+)": _Handler.commit,
    r"/api/models/([^/]+/[^/]+)/branch/([^/]+)": _Handler.branch,
    r"/api/models/([^/]+/[^/]+)/revision/([^/]+)": _Handler.info,
    r"/api/models/([^/]+/[^/]+)": _Handler.info,
    r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)": _Handler.resolve,
}
