"""A web server on loopback that misbehaves on request."""

from __future__ import annotations

import re
import socket
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal


@dataclass(frozen=True)
class Reply:
    """One answer: what is sent, how fast, what length is announced, how the connection ends.

    With ``ranges`` a request for the rest of the body gets it, unless its If-Range is not one of
    the reply's own headers. ``cut`` bytes are sent at most, ``step`` bytes (all at once where None)
    every ``pause`` seconds.
    """

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    announce: int | Literal["nothing"] | None = None  # None: the body's true length
    end: Literal["close", "reset", "stall"] = "close"
    ranges: bool = False
    cut: int | None = None
    step: int | None = None
    pause: float = 0.0


class Server:
    """Serves each path's replies in turn, the last one for ever; other paths are 404.

    >>> with Server({"/x.pth": [Reply(status=500), Reply(b"...")]}) as server:
    ...     fetch(Weight(url=server.url("/x.pth")), "x")
    ...     server.requests  # ["/x.pth", "/x.pth"]
    ...     server.ranges  # [None, None]: their Range headers
    """

    def __init__(self, replies: Mapping[str, Reply | Sequence[Reply]]) -> None:
        self._replies = {
            path: [reply] if isinstance(reply, Reply) else list(reply)
            for path, reply in replies.items()
        }
        self._lock = threading.Lock()
        self._over = threading.Event()
        self.requests: list[str] = []
        self.headers: list[Mapping[str, str]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                try:
                    server._answer(self)
                except ConnectionError:  # the client has what it wants, or was killed
                    self.close_connection = True

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self._http.server_port}{path}"

    @property
    def ranges(self) -> list[str | None]:
        """The Range header of each request."""
        return [headers.get("Range") for headers in self.headers]

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._http.shutdown()
        self._http.server_close()

    def _next(self, path: str, headers: Mapping[str, str]) -> Reply:
        with self._lock:
            self.requests.append(path)
            self.headers.append(dict(headers))
            replies = self._replies.get(path, [Reply(b"not found", status=404)])
            return replies.pop(0) if len(replies) > 1 else replies[0]

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        reply = self._next(handler.path, handler.headers)
        status, headers, body = reply.status, dict(reply.headers), reply.body
        wanted = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        condition = handler.headers.get("If-Range")
        if reply.ranges and wanted and condition in (None, *headers.values()):
            first = int(wanted[1])
            if first < len(body):
                status = 206
                headers["Content-Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
                body = body[first:]
            else:
                status, body = 416, b""
                headers["Content-Range"] = f"bytes */{len(reply.body)}"
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        if reply.announce != "nothing":
            length = len(body) if reply.announce is None else reply.announce
            handler.send_header("Content-Length", str(length))
        handler.end_headers()
        body = body[: reply.cut]
        step = reply.step or max(1, len(body))
        for start in range(0, len(body), step):
            handler.wfile.write(body[start : start + step])
            handler.wfile.flush()
            if reply.pause and self._over.wait(reply.pause):
                return
        if reply.end == "stall":
            self._over.wait(60)
        elif reply.end == "reset":
            # A zero linger time makes close() send RST instead of FIN.
            linger = struct.pack("ii", 1, 0)
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            handler.connection.close()
