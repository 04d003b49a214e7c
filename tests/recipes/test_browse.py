"""The search page: its results, and the requests that it answers."""

import io
import json
import shutil
import threading
from http.client import HTTPConnection
from urllib.parse import urlencode

import pytest
import torch
from PIL import Image

from mcl_clip.core.errors import UserError
from mcl_clip.data.decode import FORMATS
from mcl_clip.report.view import RunView
from mcl_clip.tools import browse as module
from mcl_clip.tools.browse import Search, make_server, serve
from tests.recipes.runs import draw


@pytest.fixture(scope="module")
def search(finished):
    return Search(RunView(finished), torch.device("cpu"))


@pytest.fixture(scope="module")
def ask(search):
    """Status, headers and body of a request to a server of the finished run."""
    with make_server(search, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]

        def request(path, query=None, *, method="GET", body=None, host=None, headers=()):
            connection = HTTPConnection("127.0.0.1", port, timeout=30)
            connection.putrequest(method, path + ("?" + urlencode(query) if query else ""), skip_host=True)
            for name, value in {"Host": host or f"127.0.0.1:{port}", **dict(headers)}.items():
                connection.putheader(name, value.replace("PORT", str(port)))
            if body is not None and "Content-Length" not in dict(headers):
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders()
            if body:
                connection.send(body)
            answer = connection.getresponse()
            found = answer.status, dict(answer.headers), answer.read()
            connection.close()
            return found

        yield request
        server.shutdown()


def names(found):
    return [part["model"] for part in json.loads(found)["found"]]


def test_retrieval_sets_come_first_and_training_pairs_last(search):
    assert search.names == ["retrieval", "colours", ""]
    assert search.title("") == "training pairs (200)"


@pytest.mark.parametrize("gallery", [0, 1, 2])
def test_a_text_finds_pictures_in_each_stage_and_in_all(ask, search, gallery):
    status, _, body = ask("/search", {"gallery": gallery, "text": "a red square on the left"})
    assert status == 200
    assert names(body) == ["stage 0", "stage 1", "all stages"]
    for part in json.loads(body)["found"]:
        assert len(part["pictures"]) == 12
        scores = [picture["score"] for picture in part["pictures"]]
        assert scores == sorted(scores, reverse=True)
        words = search.gallery(search.names[gallery]).words
        assert [picture["words"] for picture in part["pictures"]] == [words[p["row"]] for p in part["pictures"]]


def test_the_order_is_that_of_the_evaluation(search):
    """The place of a caption's own picture is the rank that was measured."""
    task = search.view.tasks["retrieval"]
    for stage in (0, 1):
        outcomes = search.view.run.results["retrieval/retrieval"][f"stage-{stage}"].outcomes["image_retrieval"]
        for number in range(0, len(task.data.texts), 7):
            found = search.find("retrieval", task.data.texts[number])[stage]["pictures"]
            rows = [picture["row"] for picture in found]
            own, rank = int(task.data.image_of_text[number]), int(outcomes[number])
            assert rows.index(own) == rank if own in rows else rank >= len(rows)


def test_a_picture_finds_itself_first(ask):
    for part in json.loads(ask("/search", {"gallery": 0, "row": 5})[2])["found"]:
        assert part["pictures"][0]["row"] == 5
        assert part["pictures"][0]["score"] == pytest.approx(1, abs=1e-4)
    image, caption, _ = draw(1005)  # the same picture, sent
    for part in json.loads(ask("/search", {"gallery": 0}, method="POST", body=image)[2])["found"]:
        assert part["pictures"][0]["words"] == caption
        assert part["pictures"][0]["score"] == pytest.approx(1, abs=1e-3)


def test_pictures_are_served_small(ask):
    status, headers, body = ask("/picture", {"gallery": 2, "row": 3})
    assert (status, headers["Content-Type"]) == (200, "image/webp")
    assert max(Image.open(io.BytesIO(body)).size) <= 224


def test_the_page_loads_nothing_from_elsewhere_and_says_so(ask):
    for path in ("/", "/page.js", "/page.css"):
        status, headers, body = ask(path)
        assert status == 200
        assert b"http" not in body
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert b"innerHTML" not in ask("/page.js")[2]


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "localhost.evil.example:PORT", ""])
@pytest.mark.parametrize("address", ["/", "/search?gallery=0&text=a", "/picture?gallery=0&row=1"])
def test_another_host_is_refused(ask, host, address):
    assert ask(address, headers={"Host": host})[0] == 403


def test_the_names_of_this_machine_are_answered(ask):
    assert ask("/", headers={"Host": "localhost:PORT"})[0] == 200


def test_other_sites_are_refused(ask):
    query = {"gallery": 0, "text": "a"}
    assert ask("/search", query, headers={"Sec-Fetch-Site": "cross-site"})[0] == 403
    assert ask("/picture", {"gallery": 0, "row": 1}, headers={"Sec-Fetch-Site": "same-site"})[0] == 403
    assert ask("/search", query, headers={"Origin": "http://evil.example"})[0] == 403
    assert ask("/search", query, method="POST", body=draw(1)[0], headers={"Origin": "null"})[0] == 403
    assert ask("/search", query, headers={"Sec-Fetch-Site": "same-origin", "Origin": "http://127.0.0.1:PORT"})[0] == 200
    assert ask("/", headers={"Sec-Fetch-Site": "cross-site"})[0] == 200  # a link that leads here


@pytest.mark.parametrize(
    ("address", "query", "sentence"),
    [
        ("/picture", {"gallery": 0, "row": "../../etc/passwd"}, "is not a number"),
        ("/picture", {"gallery": 0, "row": "-1"}, "is not a number"),
        ("/picture", {"gallery": 0, "row": 99999}, "there is no image 99999; retrieval has 32"),
        ("/picture", {"gallery": 7, "row": 0}, "there is no gallery 7; there are 3"),
        ("/search", {"gallery": 0, "row": "1" * 30}, "is not a number"),
        ("/search", {"gallery": 0, "text": "  "}, "type what to look for"),
        ("/search", {"gallery": 0, "text": "x" * 1001}, "a text of 1001 characters is too long; at most 1000"),
    ],
)
def test_what_cannot_be_answered_gets_a_sentence(ask, address, query, sentence):
    status, headers, body = ask(address, query)
    assert (status, headers["Content-Type"]) == (400, "application/json")
    assert sentence in json.loads(body)["error"]


def test_uploads_are_bounded_and_checked(ask, monkeypatch):
    status, _, body = ask("/search", {"gallery": 0}, method="POST", body=b"<svg onload=alert(1)>")
    assert (status, json.loads(body)["error"]) == (
        400,
        f"the file cannot be read as an image (format_svg: not one of {', '.join(FORMATS)})",
    )
    monkeypatch.setattr(module, "MAX_UPLOAD", 1 << 20)
    assert ask("/search", {"gallery": 0}, method="POST", headers={"Content-Length": str((1 << 20) + 1)})[0] == 413
    assert ask("/search", {"gallery": 0}, method="POST", headers={"Content-Length": "-5"})[0] == 413
    assert ask("/page.css", method="POST", body=b"x")[0] == 404


@pytest.mark.parametrize("address", ["/serve.py", "/../serve.py", "/page.html.jinja", "//etc/passwd", "/page/page.js"])
def test_no_other_file_is_served(ask, address):
    assert ask(address)[0] == 404


def test_a_page_that_has_gone_on_is_no_error(search, monkeypatch, capfd):
    def gone(*_):
        raise BrokenPipeError

    handled = threading.Event()
    with make_server(search, 0) as server:
        finish = server.shutdown_request
        monkeypatch.setattr(server, "shutdown_request", lambda request: (finish(request), handled.set()))
        monkeypatch.setattr("socketserver._SocketWriter.write", gone)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        connection = HTTPConnection(*server.server_address, timeout=10)
        connection.request("GET", "/page.css")
        assert handled.wait(10)
        connection.close()
        server.shutdown()
    assert capfd.readouterr().err == ""


def test_it_listens_on_this_machine_alone(search):
    with make_server(search, 0) as server:
        assert server.server_address[0] == "127.0.0.1"


def test_a_port_that_is_taken_and_a_gallery_that_is_not_there(search, finished):
    options = {"gallery": "", "open_browser": False, "device": torch.device("cpu")}
    with make_server(search, 0) as server:
        port = server.server_address[1]
        with pytest.raises(UserError, match=rf"port {port} of 127.0.0.1 cannot be used .* give --port another"):
            serve(finished, port=port, **options)
    with pytest.raises(UserError, match="--gallery nothing cannot be searched; there are retrieval, colours, train"):
        serve(finished, port=0, **options | {"gallery": "nothing"})


def test_a_run_that_goes_on_shows_what_it_has(copy):
    for folder in ("combined", "stage-1"):
        shutil.rmtree(copy / folder)
    found = Search(RunView(copy), torch.device("cpu")).find("retrieval", "a red square")
    assert [part["model"] for part in found] == ["stage 0"]
    shutil.rmtree(copy / "stage-0")
    with pytest.raises(UserError, match="has nothing to search yet"):
        Search(RunView(copy), torch.device("cpu"))
