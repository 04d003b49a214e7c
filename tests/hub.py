"""A stand-in for the Hugging Face Hub on this computer: what its client asks for to upload and download, in memory."""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub.utils
import pytest
from huggingface_hub import HfApi, constants, file_download
from huggingface_hub.utils import _http

TOKEN = "hf_local"
LARGE = {".safetensors", ".bin", ".npz", ".gz"}
GIT_ATTRIBUTES = b"".join(b"*%s filter=lfs diff=lfs merge=lfs -text\n" % suffix.encode() for suffix in sorted(LARGE))
NOT_FOUND = {"RepoNotFound": "Repository", "RevisionNotFound": "Revision", "EntryNotFound": "Entry"}

Files = dict[str, bytes]


@dataclass
class Refusal(Exception):  # noqa: N818
    """An answer other than success."""

    status: int
    message: str
    code: str = ""
    body: dict[str, Any] = field(default_factory=dict)


@dataclass
class Answer:
    """What a call gets: JSON, or a file with its headers."""

    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)


def not_found(code: str) -> Refusal:
    return Refusal(404, f"{NOT_FOUND[code]} not found", code)


def online(monkeypatch: pytest.MonkeyPatch, endpoint: str | None = None, *, xet: bool = False) -> None:
    """Let the client of this process talk to a stand-in: not offline, no waiting between attempts.

    `endpoint` becomes the usual one, as HF_ENDPOINT makes it; before 1.0 the client knows no other after a commit.
    With `xet`, it uploads as it does to the Hub, if hf_xet is installed; the stand-in must then have no large files.
    """
    if endpoint is not None:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for module in (constants, file_download):
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(_http, "time", SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None}))
    forget_connections()


def forget_connections() -> None:
    """Close the connections that the client keeps for later calls."""
    versions = ("close_session", "reset_sessions")
    next(getattr(huggingface_hub.utils, name) for name in versions if hasattr(huggingface_hub.utils, name))()


class Hub:
    """The stand-in, from `with Hub() as hub` on: `hub.endpoint` is its address, `hub.repos` what it holds.

    Files of the suffixes `LARGE` travel as LFS objects; with `force_regular`, all travel within the commit.

    Attributes:
        repos: files by repository, revision and path; `add` changes them as a user would on the website.
        private: the repositories that only the token sees.
        private_by_default: what a new repository is if the client does not say, as an organisation may want it.
        commits: repository, revision and message of each commit, in order.
        calls: how often each call was made, as "POST commit".
        uploaded_objects: LFS objects that arrived, and `uploaded_bytes`: of them and of files within commits.
        refuse_token: 401 for whatever comes with a token; the answer repeats the token, which nobody should see.
        forbid: 403 for whatever would change something.
        card_errors: what is wrong with each README.md.
        before_commit: called once, before the next commit is looked at.
    """

    def __init__(self, *, force_regular: bool = False, token: str = TOKEN) -> None:
        self.force_regular = force_regular
        self.token = token
        self.repos: dict[str, dict[str, Files]] = {}
        self.private: set[str] = set()
        self.private_by_default = False
        self.commits: list[tuple[str, str, str]] = []
        self.calls: Counter[str] = Counter()
        self.uploaded_objects = 0
        self.uploaded_bytes = 0
        self.refuse_token = False
        self.forbid = False
        self.card_errors: list[str] = []
        self.before_commit: Callable[[], object] | None = None
        self._heads: dict[str, dict[str, str]] = {}
        self._trees: dict[tuple[str, str], Files] = {}
        self._objects: Files = {}
        self._uploads_before_drop = self._drops = 0
        self._lock = threading.RLock()

    def __enter__(self) -> "Hub":
        handler = type("BoundHandler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        forget_connections()

    def api(self, token: str | bool | None = TOKEN) -> HfApi:
        """The client of a user of this stand-in."""
        return HfApi(endpoint=self.endpoint, token=token)

    def environment(self, home: Any) -> dict[str, str]:
        """Variables with which another process uses this stand-in; `home` holds its caches."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def add(self, repo: str, files: Files, *, revision: str = "main", message: str = "by hand") -> str:
        """Add files as the owner of the repository could on the website; gives the sha of the commit."""
        with self._lock:
            self._make(repo)
            return self._commit(repo, revision, {**self.repos[repo].get(revision, {}), **files}, message)

    def sha(self, repo: str, revision: str = "main") -> str:
        return self._heads[repo][revision]

    def drop_after(self, uploads: int, *, times: int = 1) -> None:
        """After so many LFS objects from now on, close the connection in the middle of the next ones, `times` times.

        The client tries each object up to six times by itself: one lost connection goes unnoticed.
        """
        with self._lock:
            self._uploads_before_drop, self._drops = uploads, times

    # ---- what the calls do ----

    def _make(self, repo: str) -> None:
        if repo not in self.repos:
            self.repos[repo], self._heads[repo] = {}, {}
            self._commit(repo, "main", {".gitattributes": GIT_ATTRIBUTES}, "initial commit")
            self.commits.pop()

    def _commit(self, repo: str, revision: str, files: Files, message: str) -> str:
        self.commits.append((repo, revision, message))
        sha = hashlib.sha1(f"{repo} {revision} {len(self._trees)}".encode()).hexdigest()
        self._trees[repo, sha] = self.repos[repo][revision] = files
        self._heads[repo][revision] = sha
        return sha

    def _is_large(self, path: str) -> bool:
        return not self.force_regular and PurePosixPath(path).suffix in LARGE

    def _head(self, repo: str, revision: str, may_read: bool = True) -> str:
        """The sha that a branch, a pull request or a sha stands for."""
        if repo not in self.repos or (repo in self.private and not may_read):
            raise not_found("RepoNotFound")
        if (repo, revision) in self._trees:
            return revision
        if revision not in self._heads[repo]:
            raise not_found("RevisionNotFound")
        return self._heads[repo][revision]

    def whoami(self, call: "Call") -> Answer:
        call.need_token()
        return Answer({"type": "user", "name": "local", "orgs": [{"name": "org"}], "auth": {"type": "access_token"}})

    def create(self, call: "Call") -> Answer:
        call.need_right_to_write()
        repo = f"{call.json['organization'] or 'local'}/{call.json['name']}"
        url = f"{self.endpoint}/{repo}"
        if repo in self.repos:
            raise Refusal(409, "You already created this model repo", body={"url": url})
        self._make(repo)
        asked = {"visibility": "private" if call.json["private"] else "public"} if "private" in call.json else {}
        default = "private" if self.private_by_default else "public"
        if {"visibility": default, **call.json, **asked}["visibility"] == "private":
            self.private.add(repo)
        return Answer({"url": url, "name": repo})

    def validate(self, call: "Call") -> Answer:
        errors = [{"message": message} for message in self.card_errors]
        if errors:
            raise Refusal(400, "", body={"errors": errors, "warnings": []})
        return Answer({"errors": [], "warnings": []})

    def preupload(self, call: "Call", repo: str, revision: str) -> Answer:
        call.need_right_to_write()
        there = self._trees[repo, self._head(repo, revision)]
        files = []
        for file in call.json["files"]:
            path = file["path"]
            known = {"oid": self._oid(path, there[path])} if path in there else {}
            mode = "lfs" if self._is_large(path) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
        return Answer({"files": files, "commitOid": self._head(repo, revision)})

    def lfs_batch(self, call: "Call", repo: str) -> Answer:
        call.need_right_to_write()
        objects = []
        for wanted in call.json["objects"]:
            upload = {
                "upload": {"href": f"{self.endpoint}/lfs/{wanted['oid']}", "header": {}},
                "verify": {"href": f"{self.endpoint}/lfs/verify"},
            }
            objects.append(wanted if wanted["oid"] in self._objects else {**wanted, "actions": upload})
        return Answer({"transfer": "basic", "objects": objects})

    def put_object(self, call: "Call", oid: str) -> Answer:
        if self._loses_connection():
            call.lose_connection()
        content = call.body
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, "the content has another hash")
        with self._lock:
            self._objects[oid] = content
            self.uploaded_objects += 1
            self.uploaded_bytes += len(content)
        return Answer({})

    def _loses_connection(self) -> bool:
        with self._lock:
            if not self._drops:
                return False
            if self._uploads_before_drop:
                self._uploads_before_drop -= 1
                return False
            self._drops -= 1
            return True

    def verify(self, call: "Call") -> Answer:
        call.need_token()
        if len(self._objects.get(call.json["oid"], b"")) != call.json["size"]:
            raise Refusal(404, "no such object")
        return Answer({})

    def commit(self, call: "Call", repo: str, revision: str) -> Answer:
        call.need_right_to_write()
        if (interrupt := self.before_commit) is not None:
            self.before_commit = None
            interrupt()
        lines = [json.loads(line) for line in call.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        head = self._head(repo, revision)
        opens = "create_pr" in call.query
        if revision not in self._heads[repo]:
            raise Refusal(400, f"{revision} is no branch")
        if header.get("parentCommit", head) != head:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(self._trees[repo, head])
        for line in lines:
            self._change(files, line["key"], line["value"])
        target = self._new_pull_request(repo) if opens else revision
        sha = self._commit(repo, target, files, header["summary"])
        url = {"pullRequestUrl": f"{self.endpoint}/{repo}/discussions/{target.rpartition('/')[2]}"} if opens else {}
        return Answer({"success": True, "commitOid": sha, "commitUrl": f"{self.endpoint}/{repo}/commit/{sha}", **url})

    def _change(self, files: Files, kind: str, value: dict[str, Any]) -> None:
        path = value.get("path", "")
        if kind == "file":
            files[path] = base64.b64decode(value["content"])
            self.uploaded_bytes += len(files[path])
        elif kind == "lfsFile":
            if value["oid"] not in self._objects:
                raise Refusal(400, f"the LFS object of {path} was not uploaded")
            files[path] = self._objects[value["oid"]]
        elif kind == "deletedFile" and files.pop(path, None) is None:
            raise not_found("EntryNotFound")

    def _new_pull_request(self, repo: str) -> str:
        return f"refs/pr/{1 + sum(name.startswith('refs/pr/') for name in self._heads[repo])}"

    def discuss(self, call: "Call", repo: str) -> Answer:
        """Open a pull request without a commit."""
        call.need_right_to_write()
        head = self._head(repo, "main")
        reference = self._new_pull_request(repo)
        self.repos[repo][reference], self._heads[repo][reference] = self._trees[repo, head], head
        return Answer({"num": int(reference.rpartition("/")[2])})

    def discussion(self, call: "Call", repo: str, number: str) -> Answer:
        details = {
            "title": "",
            "num": int(number),
            "author": {"name": "local"},
            "createdAt": "2026-01-01T00:00:00.000Z",
        }
        changes = {"changes": {"base": "refs/heads/main"}, "filesWithConflicts": [], "diff": ""}
        kind = {"status": "draft", "repo": {"name": repo, "type": "model"}, "isPullRequest": True, "events": []}
        return Answer({**details, **changes, **kind})

    def branch(self, call: "Call", repo: str, name: str) -> Answer:
        call.need_right_to_write()
        head = self._head(repo, call.json.get("startingPoint", "main"))
        if name in self._heads[repo]:
            raise Refusal(409, f"Reference already exists: refs/heads/{name}")
        if not re.fullmatch(r"[\w.-]+", name):
            raise Refusal(400, f"Invalid reference for a branch: {name}")
        self.repos[repo][name], self._heads[repo][name] = self._trees[repo, head], head
        return Answer({})

    def info(self, call: "Call", repo: str, revision: str = "main") -> Answer:
        head = self._head(repo, revision, call.has_token)
        siblings = [{"rfilename": path} for path in sorted(self._trees[repo, head])]
        rest = {"tags": [], "downloads": 0, "likes": 0, "disabled": False, "gated": False}
        return Answer(
            {"id": repo, "modelId": repo, "sha": head, "private": repo in self.private, "siblings": siblings, **rest}
        )

    def tree(self, call: "Call", repo: str, revision: str, folder: str = "") -> Answer:
        files = self._trees[repo, self._head(repo, revision, call.has_token)]
        entries = []
        for path, content in sorted(files.items()):
            if path.startswith(f"{folder}/") or not folder:
                lfs = {"lfs": {"oid": self._oid(path, content), "size": len(content), "pointerSize": 130}}
                entry = {"type": "file", "oid": git_hash(content), "size": len(content), "path": path}
                entries.append(entry | (lfs if self._is_large(path) else {}))
        return Answer(entries)

    def refs(self, call: "Call", repo: str) -> Answer:
        self._head(repo, "main", call.has_token)
        branches, pulls = [], []
        for name, sha in self._heads[repo].items():
            is_pull = name.startswith("refs/pr/")
            ref = name if is_pull else f"refs/heads/{name}"
            (pulls if is_pull else branches).append({"name": name, "ref": ref, "targetCommit": sha})
        return Answer({"branches": branches, "tags": [], "converts": [], "pullRequests": pulls})

    def resolve(self, call: "Call", repo: str, revision: str, path: str) -> Answer:
        head = self._head(repo, revision, call.has_token)
        content = self._trees[repo, head].get(path)
        if content is None:
            raise not_found("EntryNotFound")
        oid = self._oid(path, content)
        large = {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(content))} if self._is_large(path) else {}
        return Answer(content, {"X-Repo-Commit": head, "ETag": f'"{oid}"', **large})

    def _oid(self, path: str, content: bytes) -> str:
        return hashlib.sha256(content).hexdigest() if self._is_large(path) else git_hash(content)


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


REPO = r"([^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("GET", r"/api/whoami-v2", Hub.whoami),
    ("POST", r"/api/repos/create", Hub.create),
    ("POST", r"/api/validate-yaml", Hub.validate),
    ("POST", rf"/api/models/{REPO}/preupload/([^/]+)", Hub.preupload),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Hub.lfs_batch),
    ("POST", r"/lfs/verify", Hub.verify),
    ("PUT", r"/lfs/(\w+)", Hub.put_object),
    ("POST", rf"/api/models/{REPO}/commit/([^/]+)", Hub.commit),
    ("POST", rf"/api/models/{REPO}/branch/([^/]+)", Hub.branch),
    ("POST", rf"/api/models/{REPO}/discussions", Hub.discuss),
    ("GET", rf"/api/models/{REPO}/discussions/(\d+)", Hub.discussion),
    ("GET", rf"/api/models/{REPO}/refs", Hub.refs),
    ("GET", rf"/api/models/{REPO}/revision/([^/]+)", Hub.info),
    ("GET", rf"/api/models/{REPO}/tree/([^/]+)(?:/(.+))?", Hub.tree),
    ("GET", rf"/api/models/{REPO}", Hub.info),
    ("HEAD", rf"/{REPO}/resolve/([^/]+)/(.+)", Hub.resolve),
    ("GET", rf"/{REPO}/resolve/([^/]+)/(.+)", Hub.resolve),
]


class Call:
    """One request, as the functions of `Hub` see it."""

    def __init__(self, hub: Hub, handler: "_Handler") -> None:
        self.hub = hub
        self.handler = handler
        self.query = parse_qs(urlsplit(handler.path).query)
        self.authorization = handler.headers.get("Authorization", "")
        self.length = int(handler.headers.get("Content-Length", 0))
        self._body: bytes | None = None

    @property
    def body(self) -> bytes:
        if self._body is None:
            chunked = self.handler.headers.get("Transfer-Encoding", "").lower() == "chunked"
            self._body = self._read_chunks() if chunked else self.handler.rfile.read(self.length)
        return self._body

    def _read_chunks(self) -> bytes:
        chunks = []
        while size := int(self.handler.rfile.readline(), 16):
            chunks.append(self.handler.rfile.read(size))
            self.handler.rfile.readline()
        self.handler.rfile.readline()
        return b"".join(chunks)

    @property
    def json(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.body or b"{}")
        return value

    @property
    def has_token(self) -> bool:
        return self.authorization == f"Bearer {self.hub.token}"

    def need_token(self) -> None:
        if not self.has_token:
            raise self.refused()

    def refused(self) -> Refusal:
        said = {"error": f"Invalid username or password: {self.authorization}"}
        return Refusal(401, "Invalid credentials in Authorization header", body=said)

    def need_right_to_write(self) -> None:
        self.need_token()
        if self.hub.forbid:
            raise Refusal(403, 'You don\'t have the rights to create a model under the namespace "org"')

    def lose_connection(self) -> None:
        self.handler.rfile.read(self.length // 2)
        self.handler.connection.shutdown(socket.SHUT_RDWR)
        raise ConnectionAbortedError


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet an answer: else the kernel waits for the client in between

    def answer(self) -> None:
        call = Call(self.hub, self)
        try:
            answer = self._find_answer(call)
        except Refusal as refusal:
            _ = call.body
            headers = {"X-Error-Code": refusal.code} if refusal.code else {}
            headers |= {"X-Error-Message": refusal.message} if refusal.message else {}
            self._send(refusal.status, {"error": refusal.message, **refusal.body}, headers)
        except ConnectionAbortedError:
            self.close_connection = True
        else:
            _ = call.body
            self._send(200, answer.body, answer.headers)

    def _find_answer(self, call: Call) -> Answer:
        path = urlsplit(self.path).path
        for method, pattern, function in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and method == self.command:
                with self.hub._lock:
                    self.hub.calls[f"{method} {function.__name__}"] += 1
                if self.hub.refuse_token and call.authorization:
                    raise call.refused()
                if function is Hub.put_object:  # several at once, as its body is slow to come
                    return function(self.hub, call, *found.groups())
                with self.hub._lock:
                    return function(self.hub, call, *(unquote(part) for part in found.groups() if part is not None))
        raise Refusal(404, f"the stand-in does not know {self.command} {path}")

    def _send(self, status: int, body: Any, headers: dict[str, str]) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/octet-stream" if body is content else "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Say nothing."""
