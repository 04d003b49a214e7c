"""A web server on this machine that knows ranges and fails on demand."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class RangeServer:
    """What the server does, and what it was asked for: (method, path, range or '')."""

    folder: Path
    url: str = ""
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    failures: int = 0  # so many requests are answered with `failure_status`
    failure_status: int = 503
    cut_bodies: int = 0  # so many bodies stop half-way
    short_bodies: int = 0  # so many bodies are shorter than asked for, and say so
    ignores_ranges: bool = False
    refuses_head: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def ranges(self) -> list[str]:
        return [asked for method, _, asked in self.requests if method == "GET" and asked]

    def take(self, name: str) -> bool:
        with self.lock:
            left = getattr(self, name)
            setattr(self, name, max(0, left - 1))
        return left > 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(has_body=False)

    def do_GET(self) -> None:
        self.answer(has_body=True)

    def answer(self, *, has_body: bool) -> None:
        state: RangeServer = self.server.state
        asked = self.headers.get("Range", "")
        with state.lock:
            state.requests.append((self.command, self.path, asked))
        path = state.folder / self.path.partition("?")[0].lstrip("/")
        if status := self.refusal(state, path, has_body):
            self.respond(status, {}, b"", 0)
            return
        size = path.stat().st_size
        headers = {"ETag": f'"{path.stat().st_mtime_ns}"'}
        match = None if state.ignores_ranges else re.fullmatch(r"bytes=(\d+)-(\d+)", asked)
        start, end = (int(match[1]), int(match[2]) + 1) if match else (0, size)
        if match:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(end - start)
        if has_body and state.take("short_bodies"):
            data = data[:-100]
        is_cut = has_body and state.take("cut_bodies")
        self.respond(206 if match else 200, headers, data, len(data) // (2 if is_cut else 1) if has_body else 0)
        self.close_connection |= is_cut

    def refusal(self, state: RangeServer, path: Path, has_body: bool) -> int:
        if state.take("failures"):
            return state.failure_status
        if not path.is_file():
            return 404
        return 403 if state.refuses_head and not has_body else 0

    def respond(self, status: int, headers: dict[str, str], body: bytes, sent: int) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:sent])


@contextmanager
def serve(folder: Path) -> Iterator[RangeServer]:
    state = RangeServer(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.state = True, state
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
