"""The server of the page: on this machine alone, by the standard library.

    GET  /                              the page
    GET  /search?gallery=G&text=...     what each stage finds for a text, as JSON
    GET  /search?gallery=G&row=N        for picture N of gallery G
    POST /search?gallery=G              for a picture, the body of the request
    GET  /picture?gallery=G&row=N       picture N of gallery G, small, as WebP

It answers `{"found": [{"model": "stage 0", "pictures": [{"row", "score", "words"}, ...]}, ...]}`, or
`{"error": "..."}`. Requests that name another host, as after DNS rebinding, or that come from another site are refused.
Clients name pictures by number, never by path.
"""

import io
import json
import logging
import threading
import webbrowser
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache, partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mcl_clip.core.errors import UserError
from mcl_clip.report.thumbnails import TRAINING
from mcl_clip.report.view import RunView
from mcl_clip.tools.browse_search import Search

HOST = "127.0.0.1"
HOST_NAMES = ("127.0.0.1", "localhost")
PICTURE_PX = 224
MAX_TEXT = 1_000
MAX_UPLOAD = 32 << 20
SECONDS_TO_WAIT = 30.0
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
FILES = {"/page.js": "text/javascript", "/page.css": "text/css"}
_FOLDER = Path(__file__).parent / "browse_page"

logger = logging.getLogger(__name__)


def serve(
    run: Path, *, port: int = 7860, gallery: str = "", open_browser: bool = False, device: torch.device | None = None
) -> None:
    """Serve the page until Ctrl-C.

    Args:
        run: the run directory.
        port: of 127.0.0.1; 0 takes a free one.
        gallery: the evaluation set that is shown first, or `train`.
        open_browser: show the page in the browser of this machine.
        device: where queries are encoded; the CPU by default.

    Raises:
        UserError: if there is nothing to search, no such gallery, or the port is taken.
    """
    search = Search(RunView(run), device or torch.device("cpu"))
    wanted = TRAINING if gallery == "train" else gallery
    if gallery and wanted not in search.names:
        known = ", ".join(name or "train" for name in search.names)
        raise UserError(f"--gallery {gallery} cannot be searched; there are {known}")
    names = sorted(search.names, key=lambda name: bool(gallery) and name != wanted)
    try:
        server = make_server(search, names, port)
    except OSError as error:
        raise UserError(
            f"port {port} of {HOST} cannot be used ({error.strerror}); give --port another, or 0 for a free one"
        ) from error
    url = f"http://{HOST}:{server.server_address[1]}/"
    print(f"{url}  (Ctrl-C ends it)", flush=True)
    if open_browser:
        webbrowser.open(url)
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def make_server(search: Search, names: list[str], port: int) -> ThreadingHTTPServer:
    """A server that is bound, and not started; galleries are numbered as in `names`."""
    server = ThreadingHTTPServer((HOST, port), partial(_Handler, _Answers(search, names)))
    server.daemon_threads = True
    return server


class _Answers:
    """What is answered to whom; one query at a time goes through the towers."""

    def __init__(self, search: Search, names: list[str]) -> None:
        self._search, self._names, self._lock = search, names, threading.Lock()

    def page(self) -> bytes:
        environment = Environment(loader=FileSystemLoader(_FOLDER), undefined=StrictUndefined, autoescape=True)
        return (
            environment.get_template("page.html.jinja")
            .render(
                name=self._search.view.name,
                galleries=[self._search.title(name) for name in self._names],
                missing=self._search.view.missing,
            )
            .encode()
        )

    def found(self, query: Mapping[str, str], body: bytes | None) -> bytes:
        name = self._gallery(query)
        if body is not None:
            action: Callable[[], list[dict[str, Any]]] = partial(self._search.by_picture, name, body)
        elif "row" in query:
            action = partial(self._search.by_row, name, _number(query["row"]))
        else:
            action = partial(self._search.by_text, name, _text(query.get("text", "")))
        with self._lock:
            return json.dumps({"found": action()}).encode()

    @lru_cache(maxsize=2_000)  # noqa: B019 - as long as the server
    def picture(self, gallery: str, row: str) -> bytes:
        with self._lock:
            image = self._search.picture(self._gallery({"gallery": gallery}), _number(row))
        image.thumbnail((PICTURE_PX, PICTURE_PX))
        file = io.BytesIO()
        image.save(file, "WEBP", quality=80)
        return file.getvalue()

    def _gallery(self, query: Mapping[str, str]) -> str:
        number = _number(query.get("gallery", "0"))
        if number >= len(self._names):
            raise UserError(f"there is no gallery {number}; there are {len(self._names)}")
        return self._names[number]


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise UserError(f"{text[:20]!r} is not a number")
    return int(text)


def _text(text: str) -> str:
    if not text.strip():
        raise UserError("type what to look for")
    if len(text) > MAX_TEXT:
        raise UserError(f"a text of {len(text)} characters is too long; at most {MAX_TEXT} are searched for")
    return text.strip()


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    server_version, sys_version = "mcl_clip", ""
    timeout = SECONDS_TO_WAIT

    def __init__(self, answers: _Answers, *arguments: Any) -> None:
        self._answers = answers
        super().__init__(*arguments)

    def do_GET(self) -> None:
        """Answer a request for the page, its files, a search or a picture."""
        self._answer(None)

    def do_POST(self) -> None:
        """Answer a search by an uploaded picture."""
        length = self.headers.get("Content-Length", "")
        if not self._is_from_here():
            self._refuse(HTTPStatus.FORBIDDEN, "this page answers to itself alone")
        elif not length.isdigit() or int(length) > MAX_UPLOAD:
            self.close_connection = True
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a picture may have {MAX_UPLOAD >> 20} MiB at most")
        else:
            self._answer(self.rfile.read(int(length)))

    def _answer(self, body: bytes | None) -> None:
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query, max_num_fields=8).items()}
        if not self._is_from_here():
            self._refuse(HTTPStatus.FORBIDDEN, "this page answers to itself alone")
            return
        try:
            if url.path == "/search":
                self._send(HTTPStatus.OK, "application/json", self._answers.found(query, body))
            elif body is not None:
                self._refuse(HTTPStatus.NOT_FOUND, "there is nothing here")
            elif url.path == "/picture":
                picture = self._answers.picture(query.get("gallery", ""), query.get("row", ""))
                self._send(HTTPStatus.OK, "image/webp", picture, {"Cache-Control": "private, max-age=3600"})
            elif url.path == "/":
                self._send(HTTPStatus.OK, "text/html; charset=utf-8", self._answers.page())
            elif url.path in FILES:
                kind = f"{FILES[url.path]}; charset=utf-8"
                self._send(HTTPStatus.OK, kind, (_FOLDER / url.path.removeprefix("/")).read_bytes())
            else:
                self._refuse(HTTPStatus.NOT_FOUND, "there is nothing here")
        except UserError as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
        except (OSError, ValueError) as error:  # a shard that went away; too many fields
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {error}")

    def _is_from_here(self) -> bool:
        """Whether the request names this server, and comes from its own page or from no page at all."""
        port = self.server.server_address[1]  # type: ignore[index]
        hosts = {f"{name}:{port}" for name in HOST_NAMES}
        site, origin = self.headers.get("Sec-Fetch-Site", "none"), self.headers.get("Origin")
        is_own = origin is None or origin in {f"http://{host}" for host in hosts}
        is_page = urlsplit(self.path).path == "/"  # a link on another page may lead to the page itself
        return self.headers.get("Host") in hosts and is_own and (site in ("same-origin", "none") or is_page)

    def _refuse(self, status: HTTPStatus, sentence: str) -> None:
        self._send(status, "application/json", json.dumps({"error": sentence}).encode())

    def _send(self, status: HTTPStatus, kind: str, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        given = {"Content-Type": kind, "Cache-Control": "no-store", **HEADERS, **(headers or {})}
        self.send_response(status)
        for name, value in {**given, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        with suppress(ConnectionError):  # the page asks for something else by now
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Requests are told to those who ask for debugging alone."""
        logger.debug(format, *arguments)
