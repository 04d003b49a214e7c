"""Serve a page that searches the images of a run, on this machine only.

    GET  /                              the page
    GET  /search?gallery=G&text=...     what each stage finds for a text, as JSON
    GET  /search?gallery=G&row=N        the same for image N of gallery G
    POST /search?gallery=G              the same for an uploaded image, the body of the request
    GET  /picture?gallery=G&row=N       thumbnail of image N of gallery G, as WebP

Searches answer `{"found": [{"model": "stage 0", "pictures": [{"row", "score", "words"}, ...]}, ...]}`, or
`{"error": "..."}`. Requests for another host name, as after DNS rebinding, and requests from other sites are refused.
Clients name images by number, never by path.
"""

import io
import json
import logging
import threading
import webbrowser
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch
from jaxtyping import Float32
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from torch import Tensor

from mcl_clip.core.errors import UserError, shorten
from mcl_clip.data.decode import BadSampleError, decode_image
from mcl_clip.eval.classification import ClassificationTask
from mcl_clip.eval.retrieval import RetrievalTask
from mcl_clip.model.clip import ClipBundle, load_clip
from mcl_clip.model.multistage import normalized
from mcl_clip.report.thumbnails import TRAINING, task_images, training_images
from mcl_clip.report.view import RunView

NUM_RESULTS = 12
HOST = "127.0.0.1"
HOST_NAMES = ("127.0.0.1", "localhost")
THUMBNAIL_PX = 224
MAX_TEXT = 1_000
MAX_UPLOAD = 32 << 20
TIMEOUT_S = 30.0
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
FILES = {"/page.js": "text/javascript; charset=utf-8", "/page.css": "text/css; charset=utf-8"}
FOREIGN = "only requests from this page are answered"
_FOLDER = Path(__file__).parent / "browse_page"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Images to search."""

    stages: Sequence[int]  # those with features of these images
    images: Mapping[str, Float32[Tensor, "images _dim"]]  # un-normalized, of each stage and of all if there are several
    words: Sequence[str]  # caption or class of each image


class Search:
    """Galleries of a run, searched by cosine similarity under each stage; `lock` is for one query at a time."""

    def __init__(self, view: RunView, device: torch.device) -> None:
        """List the galleries; encoders and features are loaded on first use.

        Raises:
            UserError: if nothing of the run can be searched yet.
        """
        self.view, self._device, self.lock = view, device, threading.Lock()
        self._loaders = {name: task_images(task) for name, task in view.tasks.items() if view.set_features(0, name)}
        self.names = sorted(self._loaders, key=lambda name: not isinstance(view.tasks[name], RetrievalTask))
        if view.stages_with("embed") and view.reader is not None:
            self._loaders[TRAINING] = training_images(view.reader)
            self.names.append(TRAINING)
        if not self.names:
            raise UserError(
                f"{view.folder} has nothing to search yet: a stage must be embedded or evaluated, and its images must "
                f"still be in their original location. {' '.join(view.missing)}".strip()
            )

    def title(self, name: str) -> str:
        """Return the title of a gallery."""
        if name != TRAINING:
            return name
        rows, total = len(self.view.sample.rows), self.view.sample.total
        return f"training pairs ({rows:,} of {total:,})" if rows < total else f"training pairs ({total:,})"

    @lru_cache(maxsize=4)  # noqa: B019 - a search lives as long as the server
    def gallery(self, name: str) -> Gallery:
        """Load the features and words of a gallery."""
        view, task = self.view, self.view.tasks.get(name)
        if name == TRAINING:
            stages = view.stages_with("embed")
            images = [torch.from_numpy(view.features(s, "image")) for s in stages]
        else:
            stages = [s for s in view.stages_with("eval") if view.set_features(s, name)]
            images = [view.set_features(s, name)["image"] for s in stages]
        words = [""] * len(images[0])
        if isinstance(task, ClassificationTask):
            words = [task.data.classnames[label] for label in task.data.labels.tolist()]
        elif isinstance(task, RetrievalTask) or name == TRAINING:
            captions = task.data.captions if isinstance(task, RetrievalTask) else view.sample.captions
            words = [texts[0] if texts else "" for texts in captions]
        by_model = {f"stage {s}": features for s, features in zip(stages, images, strict=True)}
        if len(stages) > 1:
            by_model["all stages"] = view.combine(images)
        return Gallery(stages=stages, images=by_model, words=words)

    def find(self, name: str, query: str | bytes | int) -> list[dict[str, Any]]:
        """Find the images closest to a text, to an encoded image, or to one of the gallery by its row, for each stage.

        Raises:
            UserError: if an image cannot be decoded, or there is no such row.
        """
        gallery = self.gallery(name)
        if isinstance(query, int):
            self._check(name, query)
            return self._nearest(gallery, [gallery.images[f"stage {s}"][query] for s in gallery.stages])
        if isinstance(query, str):
            return self._nearest(gallery, [self._encode(s, text=query) for s in gallery.stages])
        try:
            image = decode_image(query)
        except BadSampleError as error:
            raise UserError(f"the file cannot be read as an image ({error})") from error
        return self._nearest(gallery, [self._encode(s, image=image) for s in gallery.stages])

    @lru_cache(maxsize=2_000)  # noqa: B019
    def thumbnail(self, name: str, row: int) -> bytes:
        """Return a small copy of an image of a gallery, as WebP.

        Raises:
            UserError: if there is no such image, or it cannot be decoded.
        """
        with self.lock:
            self._check(name, row)
            number = int(self.view.sample.rows[row]) if name == TRAINING else row
            image = next(self._loaders[name]([number]))
        if image is None:
            raise UserError(f"image {row} of {self.title(name)} cannot be decoded")
        image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
        file = io.BytesIO()
        image.save(file, "WEBP", quality=80)
        return file.getvalue()

    def _check(self, name: str, row: int) -> None:
        if not 0 <= row < (size := len(self.gallery(name).words)):
            raise UserError(f"there is no image {row}; {self.title(name)} has {size}")

    def _nearest(self, gallery: Gallery, queries: list[Float32[Tensor, " _dim"]]) -> list[dict[str, Any]]:
        """Rank the images by cosine similarity to a query of each stage, and to the combination of several stages."""
        found = []
        if len(queries) > 1:
            queries = [*queries, self.view.combine(queries)]
        for (model, images), query in zip(gallery.images.items(), queries, strict=True):
            scores = normalized(images) @ normalized(query)
            best = torch.argsort(scores, descending=True, stable=True)[:NUM_RESULTS].tolist()
            pictures = [{"row": n, "score": round(float(scores[n]), 4), "words": gallery.words[n]} for n in best]
            found.append({"model": model, "pictures": pictures})
        return found

    @torch.inference_mode()
    def _encode(self, stage: int, *, text: str = "", image: Image.Image | None = None) -> Float32[Tensor, " dim"]:
        """Encode a query by a stage; return un-normalized features."""
        clip = self._clips[stage]
        if image is not None:
            pixels = clip.image_transform(image)[None].to(self._device)
            return clip.model.encode_image(pixels)[0].float().cpu()  # type: ignore[operator, no-any-return]
        tokens = clip.tokenizer([text]).to(self._device)
        return clip.model.encode_text(tokens)[0].float().cpu()  # type: ignore[operator, no-any-return]

    @cached_property
    def _clips(self) -> dict[int, ClipBundle]:
        clips = {s: load_clip(self.view.folder / f"stage-{s}/train/model") for s in self.view.stages_with("train")}
        for clip in clips.values():
            clip.model.to(self._device).eval()
        return clips


def serve(run: Path, *, port: int, gallery: str, open_browser: bool, device: torch.device) -> None:
    """Serve the page until Ctrl-C, on `port` of 127.0.0.1 (0 for a free one), with `gallery` shown first.

    `device` encodes the queries.

    Raises:
        UserError: if there is nothing to search, no such gallery, or the port is in use.
    """
    search = Search(RunView(run), device)
    wanted = TRAINING if gallery == "train" else gallery
    if gallery and wanted not in search.names:
        known = ", ".join(name or "train" for name in search.names)
        raise UserError(f"--gallery {gallery} cannot be searched; there are {known}")
    search.names.sort(key=lambda name: bool(gallery) and name != wanted)
    try:
        server = make_server(search, port)
    except OSError as error:
        raise UserError(
            f"port {port} of {HOST} cannot be used ({error.strerror}); give --port another, or 0 for a free one"
        ) from error
    url = f"http://{HOST}:{server.server_address[1]}/"
    print(f"{url}  (press Ctrl-C to stop)", flush=True)
    if open_browser:
        webbrowser.open(url)
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def make_server(search: Search, port: int) -> ThreadingHTTPServer:
    """Create a server that is bound but not started; galleries are numbered as in `search.names`."""
    server = ThreadingHTTPServer((HOST, port), partial(_Handler, search))
    server.daemon_threads = True
    return server


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise UserError(f"{shorten(repr(text), 20)} is not a number")
    return int(text)


class _Handler(BaseHTTPRequestHandler):
    """Handler of one request."""

    server_version, sys_version = "mcl_clip", ""
    timeout = TIMEOUT_S

    def __init__(self, search: Search, *arguments: Any) -> None:
        self._search = search
        super().__init__(*arguments)

    def do_GET(self) -> None:
        """Answer a request for the page, its files, a search or a thumbnail."""
        self._answer(None)

    def do_POST(self) -> None:
        """Answer a search by an uploaded image."""
        length = self.headers.get("Content-Length", "")
        if not self._is_from_here():
            self._refuse(HTTPStatus.FORBIDDEN, FOREIGN)
        elif not length.isdigit() or int(length) > MAX_UPLOAD:
            self.close_connection = True
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"an image may have at most {MAX_UPLOAD >> 20} MiB")
        else:
            self._answer(self.rfile.read(int(length)))

    def _answer(self, body: bytes | None) -> None:
        url = urlsplit(self.path)
        if not self._is_from_here():
            self._refuse(HTTPStatus.FORBIDDEN, FOREIGN)
            return
        try:
            query = {name: values[-1] for name, values in parse_qs(url.query, max_num_fields=8).items()}
            if url.path == "/search":
                self._send(HTTPStatus.OK, "application/json", json.dumps({"found": self._find(query, body)}).encode())
            elif body is not None:
                self._refuse(HTTPStatus.NOT_FOUND, "there is nothing at this address")
            elif url.path == "/picture":
                thumbnail = self._search.thumbnail(self._gallery(query), _number(query.get("row", "")))
                self._send(HTTPStatus.OK, "image/webp", thumbnail, cache="private, max-age=3600")
            elif url.path == "/":
                environment = Environment(loader=FileSystemLoader(_FOLDER), undefined=StrictUndefined, autoescape=True)
                titles, view = [self._search.title(name) for name in self._search.names], self._search.view
                template = environment.get_template("page.html.jinja")
                page = template.render(name=view.name, galleries=titles, missing=view.missing)
                self._send(HTTPStatus.OK, "text/html; charset=utf-8", page.encode())
            elif url.path in FILES:
                self._send(HTTPStatus.OK, FILES[url.path], (_FOLDER / url.path.removeprefix("/")).read_bytes())
            else:
                self._refuse(HTTPStatus.NOT_FOUND, "there is nothing at this address")
        except UserError as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
        except (OSError, ValueError) as error:  # such as a shard that was deleted
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {error}")

    def _find(self, query: Mapping[str, str], body: bytes | None) -> list[dict[str, Any]]:
        """Search a gallery by an uploaded image, an image of the gallery, or a text."""
        name, text = self._gallery(query), query.get("text", "").strip()
        wanted = body if body is not None else _number(query["row"]) if "row" in query else text
        if wanted == "":
            raise UserError("type what to look for")
        if len(text) > MAX_TEXT:
            raise UserError(f"a text of {len(text)} characters is too long; at most {MAX_TEXT} are accepted")
        with self._search.lock:
            return self._search.find(name, wanted)

    def _gallery(self, query: Mapping[str, str]) -> str:
        number, names = _number(query.get("gallery", "0")), self._search.names
        if number >= len(names):
            raise UserError(f"there is no gallery {number}; there are {len(names)}")
        return names[number]

    def _is_from_here(self) -> bool:
        """Return whether the request names this server, and comes from its own page or from no page at all."""
        port = self.server.server_address[1]  # type: ignore[index]
        hosts = {f"{name}:{port}" for name in HOST_NAMES}
        site, origin = self.headers.get("Sec-Fetch-Site", "none"), self.headers.get("Origin")
        is_own = origin is None or origin in {f"http://{host}" for host in hosts}
        is_page = urlsplit(self.path).path == "/"  # other sites may link to the page itself
        return self.headers.get("Host") in hosts and is_own and (site in ("same-origin", "none") or is_page)

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        self._send(status, "application/json", json.dumps({"error": message}).encode())

    def _send(self, status: HTTPStatus, content_type: str, body: bytes, *, cache: str = "no-store") -> None:
        headers = {"Content-Type": content_type, "Cache-Control": cache, "Content-Length": str(len(body)), **HEADERS}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        with suppress(ConnectionError):  # the browser has canceled the request
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log requests at debug level."""
        logger.debug(format, *arguments)
