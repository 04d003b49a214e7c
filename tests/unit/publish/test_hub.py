import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.utils import are_progress_bars_disabled

from mcl_clip.core.errors import UserError
from mcl_clip.publish.hub import MARKER, Published, check_repo_name, find_token, upload
from tests.hub import TOKEN, Hub, Refusal, online

REPO = "org/model"
CARD = f"---\nlicense: mit\n---\n{MARKER}\n# A model\n"
FILES = {
    "README.md": CARD.encode(),
    "mcl_clip_config.json": b'{"stages": ["stage_0", "stage_1"]}',
    "stage_0/open_clip_config.json": b"{}",
    "stage_0/open_clip_model.safetensors": b"zero" * 300,
    "stage_1/open_clip_config.json": b"{}",
    "stage_1/open_clip_model.safetensors": b"one" * 300,
    "eval/results.jsonl": b'{"n": 1}\n',
    "modeling_mcl_clip.py": b"1\n",
}


@pytest.fixture(autouse=True)
def client(monkeypatch, tmp_path):
    """A client that is online, with no token but the one given to it."""
    online(monkeypatch)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))


@pytest.fixture(params=["regular", "lfs"])
def hub(request, monkeypatch):
    """Once with small files and the settings for hf_xet, once with large files and without it."""
    is_regular = request.param == "regular"
    with Hub(force_regular=is_regular) as hub:
        online(monkeypatch, hub.endpoint, xet=is_regular)
        yield hub


@pytest.fixture
def lfs_hub(monkeypatch):
    with Hub() as hub:
        online(monkeypatch, hub.endpoint)
        yield hub


@pytest.fixture
def folder(tmp_path):
    for name, content in FILES.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "folder"


def ours(hub, revision="main", repo=REPO):
    """Return the files of the repository, without the one that the Hub creates."""
    return {path: content for path, content in hub.repos[repo][revision].items() if path != ".gitattributes"}


def push(hub, folder, **options):
    return upload(folder, REPO, api=hub.api(), **options)


def refusal(hub, folder, **options):
    """Return the error message of a refused upload: one line, and never the token."""
    with pytest.raises(UserError) as caught:
        push(hub, folder, **options)
    message = str(caught.value)
    assert TOKEN not in message
    assert "\n" not in message
    assert len(message) < 700
    return message


# ---- what arrives ----


def test_a_new_repository_holds_the_folder(hub, folder):
    published = push(hub, folder)
    assert published == Published(url=f"{hub.endpoint}/{REPO}", commit=hub.sha(REPO), changed=True)
    assert ours(hub) == FILES
    assert hub.private == set()
    assert hub.commits == [(REPO, "main", "Upload with mcl_clip")]


def test_what_was_uploaded_comes_back(hub, folder, tmp_path):
    published = push(hub, folder, private=True)
    back = snapshot_download(
        REPO, revision=published.commit, endpoint=hub.endpoint, token=TOKEN, cache_dir=tmp_path / "cache",
        local_dir=tmp_path / "back",
    )  # fmt: skip
    assert back == str(tmp_path / "back")
    assert {name: (tmp_path / "back" / name).read_bytes() for name in FILES} == FILES


def test_another_process_downloads_by_the_environment(lfs_hub, folder, tmp_path):
    push(lfs_hub, folder, private=True)
    code = f"from huggingface_hub import snapshot_download; print(snapshot_download({REPO!r}))"
    environment = {**os.environ, **lfs_hub.environment(tmp_path / "home")}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    back = Path(found.stdout.strip())
    assert back.is_relative_to(tmp_path / "home")
    assert {name: (back / name).read_bytes() for name in FILES} == FILES


def test_what_the_hub_says_of_itself(hub, folder):
    push(hub, folder, revision="v1")
    push(hub, folder, create_pr=True)
    assert hub.api().whoami()["name"] == "local"
    refs = hub.api().list_repo_refs(REPO, include_pull_requests=True)
    assert {branch.name: branch.target_commit for branch in refs.branches} == {
        name: hub.sha(REPO, name) for name in ("main", "v1")
    }
    assert [pull.ref for pull in refs.pull_requests] == ["refs/pr/1"]
    assert set(hub.api().list_repo_files(REPO, revision="refs/pr/1")) == FILES.keys() | {".gitattributes"}


def test_large_files_travel_apart(lfs_hub, folder):
    push(lfs_hub, folder)
    assert lfs_hub.uploaded_objects == 2
    assert lfs_hub.uploaded_bytes == sum(map(len, FILES.values()))
    assert lfs_hub.calls["PUT put_object"] == 2


def test_nothing_is_sent_when_nothing_changed(hub, folder):
    first = push(hub, folder)
    sent, commits = hub.uploaded_bytes, list(hub.commits)
    assert push(hub, folder) == Published(url=first.url, commit=first.commit, changed=False)
    assert (hub.uploaded_bytes, hub.commits) == (sent, commits)
    assert hub.calls["POST create"] == 1
    assert hub.calls["POST commit"] == 1


def test_a_changed_file_makes_a_commit_of_its_own(hub, folder):
    first = push(hub, folder)
    objects = hub.uploaded_objects
    (folder / "stage_1/open_clip_model.safetensors").write_bytes(b"new" * 10)
    second = push(hub, folder, message="Second")
    assert second.changed
    assert second.commit == hub.sha(REPO) != first.commit
    assert hub.commits[-1] == (REPO, "main", "Second")
    assert ours(hub) == FILES | {"stage_1/open_clip_model.safetensors": b"new" * 10}
    assert hub.uploaded_objects - objects == (0 if hub.force_regular else 1)


def test_a_new_revision_starts_a_branch_and_leaves_main_alone(hub, folder):
    main = push(hub, folder)
    (folder / "eval/results.jsonl").write_bytes(b"other")
    published = push(hub, folder, revision="v2")
    assert published == Published(url=f"{hub.endpoint}/{REPO}/tree/v2", commit=hub.sha(REPO, "v2"), changed=True)
    assert hub.sha(REPO) == main.commit
    assert ours(hub) == FILES
    assert ours(hub, "v2")["eval/results.jsonl"] == b"other"
    again = push(hub, folder, revision="v2")
    assert (again.changed, again.commit) == (False, published.commit)
    assert hub.calls["POST branch"] == 1


def test_a_revision_of_a_new_repository_leaves_main_empty(hub, folder):
    push(hub, folder, revision="v1")
    assert ours(hub) == {}
    assert ours(hub, "v1") == FILES
    push(hub, folder)
    assert ours(hub) == FILES


def test_a_pull_request_leaves_main_alone(hub, folder):
    main = push(hub, folder)
    (folder / "mcl_clip_config.json").write_bytes(b"{}")
    published = push(hub, folder, create_pr=True, message="Please")
    assert published.url == f"{hub.endpoint}/{REPO}/discussions/1"
    assert published.commit == hub.sha(REPO, "refs/pr/1")
    assert published.changed
    assert hub.sha(REPO) == main.commit
    assert ours(hub, "refs/pr/1") == FILES | {"mcl_clip_config.json": b"{}"}


def test_no_pull_request_without_a_change(hub, folder):
    main = push(hub, folder)
    published = push(hub, folder, create_pr=True)
    assert published == Published(url=main.url, commit=main.commit, changed=False)
    assert hub.repos[REPO].keys() == {"main"}


def test_a_pull_request_goes_to_main_only(lfs_hub, folder):
    assert "leave out one of the two" in refusal(lfs_hub, folder, create_pr=True, revision="v2")
    assert not lfs_hub.calls


# ---- what is in the repository already ----


def test_leftovers_of_exports_go_and_files_of_the_user_stay(hub, folder):
    push(hub, folder)
    users = {
        "banner.png": b"png",
        "eval/curve.png": b"png",
        "stage_1/look.jpg": b"jpg",
        "notes/idea.py": b"idea",
        "notes/extra.safetensors": b"tensors",
        "data.json": b"{}",
        "stage_x/a.json": b"{}",
        "config.json.bak": b"{}",
        "LICENSE": b"mine",
        "handler.py": b"mine",
        "adapter.safetensors": b"mine",
        "eval/notes.md": b"mine",
        "stage_2/notes.txt": b"mine",
    }
    leftovers = {
        "stage_2/open_clip_model.safetensors": b"two",
        "stage_10/tokenizer.json": b"{}",
        "eval/results.jsonl": b"",
        "model.safetensors": b"old",
        "sharing.py": b"old",
        "tokenizer_config.json": b"{}",
    }
    hub.add(REPO, users | leftovers)
    assert push(hub, folder).changed
    assert ours(hub) == FILES | users
    assert not push(hub, folder).changed


def test_leftovers_alone_make_a_commit(hub, folder):
    push(hub, folder)
    before = hub.add(REPO, {"stage_2/open_clip_config.json": b"{}"})
    published = push(hub, folder)
    assert published.changed
    assert published.commit != before
    assert ours(hub) == FILES


def test_an_edited_readme_is_kept(hub, folder, caplog):
    push(hub, folder)
    hub.add(REPO, {"README.md": b"# My own words\n"})
    (folder / "eval/results.jsonl").write_bytes(b"new")
    with caplog.at_level(logging.INFO, "mcl_clip"):
        push(hub, folder)
    assert ours(hub) == FILES | {"README.md": b"# My own words\n", "eval/results.jsonl": b"new"}
    assert [record.message for record in caplog.records if "README.md" in record.message] == [
        f"README.md of {REPO} was edited and is kept; add the line {MARKER} to have it replaced"
    ]


@pytest.mark.parametrize("there", [CARD.replace("A model", "An older card"), "", " \n"])
def test_a_readme_of_ours_is_replaced(hub, folder, there, caplog):
    push(hub, folder)
    hub.add(REPO, {"README.md": there.encode()})
    push(hub, folder)
    assert ours(hub) == FILES
    assert "is kept" not in caplog.text


def test_an_edited_readme_that_is_the_same_everywhere_is_no_news(hub, folder, caplog):
    (folder / "README.md").write_text("mine")
    push(hub, folder)
    assert not push(hub, folder).changed
    assert "is kept" not in caplog.text


def test_readmes_of_stages_go_up_though_the_one_on_top_is_kept(hub, folder):
    hub.add(REPO, {"README.md": b"mine"})
    (folder / "stage_0/README.md").write_bytes(b"of the stage")
    push(hub, folder)
    assert ours(hub)["README.md"] == b"mine"
    assert ours(hub)["stage_0/README.md"] == b"of the stage"


def test_the_readme_of_the_revision_counts(hub, folder):
    hub.add(REPO, {"README.md": b"mine"})
    push(hub, folder, revision="v1")
    assert ours(hub, "v1")["README.md"] == b"mine"
    hub.add(REPO, {"README.md": CARD.encode() + b"old"}, revision="v1")
    push(hub, folder, revision="v1")
    assert ours(hub, "v1")["README.md"] == CARD.encode()


@pytest.mark.parametrize(
    "files",
    [
        {"data.parquet": b"rows"},
        {"config.json": b'{"model_type": "bert"}'},
        {"config.json": b"not json"},
        {"stage_0/open_clip_config.json": b"{}"},
    ],
)
def test_a_name_that_holds_something_else_is_taken(hub, folder, files):
    before = hub.add(REPO, files)
    message = refusal(hub, folder)
    assert message.startswith(f"{REPO} is taken: it holds files, but no CLIP model ({next(iter(files))});")
    assert "choose another name" in message
    assert hub.sha(REPO) == before
    assert not {"POST create", "POST branch", "POST preupload"} & hub.calls.keys()


def test_the_files_of_the_revision_say_whose_it_is(hub, folder):
    push(hub, folder)
    before = hub.add(REPO, {"data.parquet": b"rows"}, revision="data")
    assert "is taken" in refusal(hub, folder, revision="data")
    assert hub.sha(REPO, "data") == before
    hub.add("org/mixed", {"data.parquet": b"rows"})
    hub.add("org/mixed", {"mcl_clip_config.json": b"{}"}, revision="model")
    assert upload(folder, "org/mixed", revision="model", api=hub.api()).changed
    assert ours(hub, "model", repo="org/mixed") == FILES


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"README.md": CARD.encode(), "LICENSE": b"mit"},
        {"mcl_clip_config.json": b"{}", "own.txt": b""},
        {"open_clip_config.json": b"{}"},
        {"config.json": b'{"model_type": "clip"}', "own.txt": b""},
    ],
)
def test_a_name_that_holds_a_model_or_nothing_is_ours(hub, folder, files):
    hub.add(REPO, files)
    push(hub, folder)
    assert FILES.items() <= ours(hub).items()


def test_a_new_repository_is_private_on_request(hub, folder):
    push(hub, folder, private=True)
    assert hub.private == {REPO}
    assert not push(hub, folder, private=True).changed


def test_an_organisation_may_want_new_repositories_private(hub, folder):
    hub.private_by_default = True
    push(hub, folder)
    assert hub.private == {REPO}


def test_a_public_repository_gets_no_private_weights(hub, folder):
    before = hub.add(REPO, {"mcl_clip_config.json": b"{}"})
    message = refusal(hub, folder, private=True)
    assert f"make it private on {hub.endpoint}/{REPO}/settings or leave out --private" in message
    assert hub.sha(REPO) == before
    assert hub.uploaded_bytes == 0


def test_a_private_repository_stays_private(hub, folder, caplog):
    push(hub, folder, private=True)
    with caplog.at_level(logging.INFO, "mcl_clip"):
        push(hub, folder, private=False)
    assert hub.private == {REPO}
    assert f"{REPO} is private, and stays private" in caplog.text


# ---- what the Hub refuses ----


def test_without_a_token_nothing_is_asked(hub, folder):
    for token in (None, False):
        with pytest.raises(UserError, match=r"no token for the Hub; log in with `hf auth login`, or set HF_TOKEN"):
            upload(folder, REPO, api=hub.api(token))
    assert not hub.calls


def test_the_token_of_the_environment_is_used(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    upload(folder, REPO, api=hub.api(None))
    assert ours(hub) == FILES


def test_a_token_that_no_request_can_carry_is_refused_before_any(hub, folder):
    with pytest.raises(UserError, match="has spaces or special characters; copy it again") as caught:
        upload(folder, REPO, api=hub.api("hf_secret…"))
    assert "hf_secret" not in str(caught.value)
    assert not hub.calls


def test_a_refused_token(hub, folder):
    hub.refuse_token = True
    assert "log in again with `hf auth login`, or set HF_TOKEN" in refusal(hub, folder)


def test_a_token_without_the_right_to_write(hub, folder):
    hub.forbid = True
    message = refusal(hub, folder)
    assert f"the token has no write access to org; use one that has, from {hub.endpoint}/settings/tokens" in message
    assert "You don't have the rights to create a model" in message
    assert REPO not in hub.repos
    hub.add(REPO, {"mcl_clip_config.json": b"{}"})
    assert "the token has no write access to org" in refusal(hub, folder)


def test_a_name_that_the_token_cannot_see(hub, folder):
    hub.add(REPO, FILES)
    hub.private.add(REPO)
    hub.token = "hf_owner"
    with pytest.raises(UserError, match="rejects the token"):
        push(hub, folder)
    hub._head = hide(hub._head)
    with pytest.raises(UserError, match="taken by a repository that this token cannot see"):
        upload(folder, REPO, api=hub.api("hf_owner"))


def hide(head):
    return lambda repo, revision, may_read=True: head(repo, revision, may_read=False)


def test_a_repository_that_goes_away_meanwhile(lfs_hub, folder):
    lfs_hub.before_commit = lambda: lfs_hub.repos.pop(REPO)
    assert "no such repository or revision to this token; correct the name" in refusal(lfs_hub, folder)


def test_someone_else_commits_meanwhile(hub, folder):
    push(hub, folder)
    (folder / "stage_0/open_clip_model.safetensors").write_bytes(b"new" * 100)
    hub.before_commit = lambda: hub.add(REPO, {"README.md": b"theirs"})
    assert "someone else changed the repository during the upload; run the same command again" in refusal(hub, folder)
    assert ours(hub) == FILES | {"README.md": b"theirs"}
    objects = hub.uploaded_objects
    push(hub, folder)
    assert ours(hub)["README.md"] == b"theirs"
    assert ours(hub)["stage_0/open_clip_model.safetensors"] == b"new" * 100
    assert hub.uploaded_objects == objects


def test_a_model_card_that_the_hub_does_not_take(hub, folder):
    hub.card_errors = ['"license" must be one of [mit]', "and " + "so on, " * 500]
    message = refusal(hub, folder)
    assert message.startswith(f"{REPO}: the Hub rejects the metadata at the top of README.md; correct it")
    assert '"license" must be one of [mit]' in message
    assert hub.uploaded_bytes == 0


def test_a_branch_that_the_hub_does_not_take(hub, folder):
    message = refusal(hub, folder, revision="a b")
    assert "correct what it names (the Hub says: Invalid reference for a branch: a b)" in message


def test_a_commit_is_no_branch(hub, folder):
    published = push(hub, folder)
    (folder / "eval/results.jsonl").write_bytes(b"new")
    assert f"{published.commit} is no branch" in refusal(hub, folder, revision=published.commit)


def test_a_hub_that_fails(hub, folder):
    def fail(*_, **__):
        raise Refusal(503, "We are down for maintenance")

    hub._head = fail
    message = refusal(hub, folder)
    assert "the Hub has an internal error (503); wait a few minutes, then run the same command again" in message
    assert "(the Hub says: We are down for maintenance)" in message


def test_offline(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refusal(hub, folder) == "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE disables the Hub; unset it to upload"
    assert not hub.calls
    with pytest.raises(UserError, match="TRANSFORMERS_OFFLINE disables the Hub"):
        find_token(hub.api())


def test_a_token_is_found_without_a_request(hub, monkeypatch):
    assert find_token(hub.api()) == TOKEN
    with pytest.raises(UserError, match="there is no token"):
        find_token()
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert find_token() == "hf_other"
    with pytest.raises(UserError, match="there is no token"):
        find_token(hub.api(False))
    assert not hub.calls


# ---- what the network loses ----


def test_one_lost_connection_goes_unnoticed(lfs_hub, folder):
    lfs_hub.drop_after(1)
    assert push(lfs_hub, folder).changed
    assert ours(lfs_hub) == FILES
    assert lfs_hub.calls["PUT put_object"] == 3


def test_an_interrupted_upload_continues_without_sending_again(lfs_hub, folder):
    lfs_hub.drop_after(1, times=100)
    message = refusal(lfs_hub, folder)
    assert f"the connection to {lfs_hub.endpoint} failed" in message
    assert "run the same command again to resume; files that have arrived are not sent again" in message
    assert ours(lfs_hub) == {}
    assert lfs_hub.uploaded_objects == 1
    lfs_hub.drop_after(0, times=0)
    assert push(lfs_hub, folder).changed
    assert ours(lfs_hub) == FILES
    assert lfs_hub.uploaded_objects == 2
    assert lfs_hub.uploaded_bytes == sum(map(len, FILES.values()))


def test_no_hub_at_all(folder):
    with Hub() as hub:
        pass
    message = refusal(hub, folder)
    assert message.startswith(f"{REPO}: the connection to {hub.endpoint} failed (")


def test_a_lost_store_shows_no_signed_address(hub, folder, monkeypatch):
    def lose(*_, **__):
        raise ConnectionError("Network error: no answer from https://store/xorbs/1?X-Signature=secret (after 5 tries)")

    monkeypatch.setattr(HfApi, "upload_folder", lose)
    message = refusal(hub, folder)
    assert "failed (Network error: no answer from https://store/xorbs/1 (after 5 tries)); run the same" in message


def test_a_store_that_refuses(hub, folder, monkeypatch):
    hf_xet = pytest.importorskip("hf_xet")
    error = getattr(hf_xet, "XetAuthenticationError", None)
    if error is None:
        pytest.skip("hf_xet has no error of its own")

    def refuse(*_, **__):
        raise error("Authentication error: expired")

    monkeypatch.setattr(HfApi, "upload_folder", refuse)
    assert "the token has no write access to org; use one that has" in refusal(hub, folder)


def test_faults_of_the_code_pass(hub, folder, monkeypatch):
    def fail(*_, **__):
        raise KeyError("name")

    monkeypatch.setattr(HfApi, "upload_folder", fail)
    with pytest.raises(KeyError, match="name"):
        push(hub, folder)


# ---- names, folders, noise ----


@pytest.mark.parametrize("name", ["org/model", "me/ViT-B-32.mcl_2", "a/" + "b" * 96])
def test_names_of_repositories(name):
    check_repo_name(name)


@pytest.mark.parametrize(
    "name", ["", "model", "org/", "/model", "a/b/c", "org/a--b", "org/a..b", "org/a.git", "org/.a", "org/a b", "org/ü",
             "https://huggingface.co/org/model", "a/" + "b" * 97]
)  # fmt: skip
def test_names_that_the_hub_does_not_take(name, lfs_hub, folder):
    with pytest.raises(UserError, match="is not a valid repository name; give it as ORG/NAME"):
        check_repo_name(name)
    with pytest.raises(UserError, match="is not a valid repository name"):
        upload(folder, name, api=lfs_hub.api())
    assert not lfs_hub.calls


def test_an_empty_or_missing_folder(lfs_hub, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing"):
        assert "export a model first" in refusal(lfs_hub, tmp_path / name)
    assert not lfs_hub.calls


def test_no_progress_bars_without_a_terminal(lfs_hub, folder, capfd, caplog):
    push(lfs_hub, folder)
    (folder / "mcl_clip_config.json").write_bytes(b"{}")
    with caplog.at_level(logging.DEBUG):
        push(lfs_hub, folder)
    output = "".join(capfd.readouterr())
    assert "%" not in output
    assert "it/s" not in output
    assert TOKEN not in output
    assert TOKEN not in caplog.text
    assert not are_progress_bars_disabled()


def test_the_usual_client_is_made_when_none_is_given(lfs_hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert upload(folder, REPO).url == f"{lfs_hub.endpoint}/{REPO}"
    assert ours(lfs_hub) == FILES
