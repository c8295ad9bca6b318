"""A real HTTP server over loopback that serves a directory badly: seeded faults in a share of its answers."""

from __future__ import annotations

import random
import re
import socket
import struct
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ALL_FAULTS = (
    "status", "busy", "reset", "reset_before", "stall", "short", "long_length", "short_length",
    "ignore_range", "wrong_range", "flip",
)  # fmt: skip
"""What can go wrong with an answer."""


class FaultyServer(ThreadingHTTPServer):
    """Serves `root`; each answer is faulty with probability `share`, or as `script` says, first things first."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, root: Path, share: float = 0.0, faults: tuple[str, ...] = ALL_FAULTS, seed: int = 0):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.share, self.faults = root, share, faults
        self.script: list[str | None] = []
        self.redirects: dict[str, str] = {}
        self.requests: Counter[str] = Counter()
        self.headers: list[tuple[str, dict[str, str]]] = []
        self.injected: Counter[str] = Counter()
        self.closing = threading.Event()
        self.stalled = threading.Event()
        self._generator, self._lock = random.Random(seed), threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def choose_fault(self, path: str, headers: dict[str, str]) -> str | None:
        with self._lock:
            self.requests[path] += 1
            self.headers.append((path, headers))
            if self.script:
                fault = self.script.pop(0)
            else:
                bad = self._generator.random() < self.share
                fault = self._generator.choice(self.faults) if bad else None
            if fault == "flip" and path.partition("?")[0].endswith("manifest.json"):
                fault = "short"  # nothing but TLS guards the manifest, and this server has none
            self.injected[fault or "none"] += 1
            return fault

    def handle_error(self, request, client_address) -> None:
        """Clients that go away are part of the game."""

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.shutdown()
        self.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FaultyServer

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        fault = self.server.choose_fault(self.path, dict(self.headers))
        if path in self.server.redirects:
            self._answer(302, b"", {"Location": self.server.redirects[path]})
        elif fault in ("status", "busy"):
            self._answer(500 if fault == "status" else 503, b"try again", {"Retry-After": "0"})
        elif not (self.server.root / path.lstrip("/")).is_file():
            self._answer(404, b"no such file", {})
        else:
            self._send(fault, (self.server.root / path.lstrip("/")).read_bytes())

    def _send(self, fault: str | None, content: bytes) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start, status, headers = 0, 200, {}
        if asked and fault != "ignore_range":
            start, status = int(asked[1]), 206
            told = start - 1 if fault == "wrong_range" else start
            headers["Content-Range"] = f"bytes {told}-{len(content) - 1}/{len(content)}"
        body = bytearray(content[start:])
        if fault == "flip":
            body[len(body) // 2] ^= 8
        length = len(body) + {"long_length": 7, "short_length": -7}.get(fault or "", 0)
        if fault in ("reset", "stall", "short", "reset_before"):
            body = body[: 0 if fault == "reset_before" else len(body) // 2]
        self._answer(status, bytes(body), headers, length)
        if fault == "stall":
            self.server.stalled.set()
            self.server.closing.wait(5)
        if fault in ("reset", "reset_before"):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if fault in ("reset", "reset_before", "stall", "short", "long_length", "short_length"):
            self.connection.close()
            self.close_connection = True

    def _answer(self, status: int, body: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, *_) -> None:
        """Quiet."""
