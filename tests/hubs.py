"""A hub on loopback: as much of the protocol as huggingface_hub needs to fetch files."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".bin", ".pth")  # kept apart from git, under the name of their sha256


def large(body: bytes) -> str:
    """Where a large file is, to which its address leads."""
    return f"large/{hashlib.sha256(body).hexdigest()}"


class Hub:
    """Serves repositories, each with one commit, which has several names.

    >>> with Hub({"someone/name": {"config.json": b"{}"}}) as hub:
    ...     os.environ["HF_ENDPOINT"] = hub.url  # before huggingface_hub is imported
    ...     hub.requests  # ["HEAD someone/name/resolve/main/config.json", ...]

    Attributes:
        answers: repository -> (status, the hub's code of the error), in place of its files.
        sends: `large` of a file -> bodies that are sent in turn in place of the file's.
    """

    def __init__(self, repos: Mapping[str, Mapping[str, bytes]]) -> None:
        self.repos = {name: dict(files) for name, files in repos.items()}
        self._large = {
            large(body): body
            for files in self.repos.values()
            for name, body in files.items()
            if name.endswith(LARGE)
        }
        self.answers: dict[str, tuple[int, str]] = {}
        self.sends: dict[str, list[bytes]] = {}
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub._answer(self)

            def do_GET(self) -> None:
                hub._answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> Hub:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def weights(self) -> list[str]:
        """The requests so far for files that hold weights, or for news of them."""
        return [r for r in self.requests if r.endswith(LARGE) or r.startswith("GET large/")]

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = handler.path.lstrip("/")
        self.requests.append(f"{handler.command} {path}")
        repo, _, rest = path.partition("/resolve/")
        revision, _, name = rest.partition("/")
        revision = unquote(revision)
        if path in self._large:
            sends = self.sends.get(path)
            return self._send(handler, 200, {}, sends.pop(0) if sends else self._large[path])
        if repo in self.answers:
            status, code = self.answers[repo]
            return self._send(handler, status, {"X-Error-Code": code})
        if repo not in self.repos:
            return self._send(handler, 401, {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", "v1", "refs/pr/1", COMMIT):
            return self._send(handler, 404, {"X-Error-Code": "RevisionNotFound"})
        headers = {"X-Repo-Commit": COMMIT}
        if name not in self.repos[repo]:
            return self._send(handler, 404, {**headers, "X-Error-Code": "EntryNotFound"})
        body = self.repos[repo][name]
        if name.endswith(LARGE):
            headers["X-Linked-Etag"] = f'"{hashlib.sha256(body).hexdigest()}"'
            headers["X-Linked-Size"] = str(len(body))
            # Another host than the hub's: to its own huggingface_hub would go before it downloads.
            headers["Location"] = f"http://localhost:{self._http.server_port}/{large(body)}"
            return self._send(handler, 302, headers)
        headers["ETag"] = f'"{hashlib.sha1(b"blob %d" % len(body) + bytes(1) + body).hexdigest()}"'
        self._send(handler, 200, headers, body)

    def _send(
        self,
        handler: BaseHTTPRequestHandler,
        status: int,
        headers: dict[str, str],
        body: bytes = b"",
    ) -> None:
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(body)
