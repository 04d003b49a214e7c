"""A finished folder on the Hugging Face Hub, where nothing that its user put there is lost."""

import glob
import json
import logging
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import HfApi, ModelInfo, constants, get_token
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from mcl_clip.core.errors import UserError

MARKER = "<!-- written by mcl_clip: remove this line to keep your own edits -->"
README = "README.md"
MAIN = "main"
MARKS_OF_OURS = {"mcl_clip_config.json", "open_clip_config.json"}
OF_AN_EMPTY_REPOSITORY = {".gitattributes", ".gitignore", README, "LICENSE"}  # as the website makes it
_TOKENIZER = (
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
    r"|(merges|vocab)\.txt|(tokenizer|spiece|sentencepiece\.bpe)\.model"
)
OF_EXPORTS = re.compile(
    rf"stage_\d+/(open_clip_config\.json|(open_clip_model|difference)\.safetensors|{_TOKENIZER})"
    r"|eval/results\.jsonl"
    r"|(modeling_multistage_clip|processing_multistage_clip|multistage|open_clip_io|open_clip_folder|sharing)\.py"
    r"|(open_clip_model|model)\.safetensors"
    rf"|(mcl_clip_config|open_clip_config|config|preprocessor_config|processor_config)\.json|{_TOKENIZER}"
)
CONTINUES = "give the same command again, it continues: files that arrived are not sent again"
WAY_OUT = {
    400: "the Hub does not accept what it was sent; correct what it names",
    401: "the Hub does not accept the token; log in again with `hf auth login`, or set HF_TOKEN to a valid one",
    403: "the token may not write for {owner}; take one with write access, from {endpoint}/settings/tokens, or another "
    "owner",
    404: "the Hub shows no such repository or revision to this token; correct the name, or ask {owner} for access",
    409: "the name is taken by a repository that this token cannot see, or is being worked on; choose another name, "
    "or try again in a minute",
    412: "the repository was changed by someone else during the upload; " + CONTINUES,
    429: "the Hub has had too many requests; wait some minutes, then " + CONTINUES,
}
HTTP_LIBRARIES = {"requests", "urllib3", "httpx", "httpx2", "httpcore", "httpcore2", "hf_xet"}  # of any client
SIGNATURES = re.compile(r"\?[^\s'\")]+")  # the query of an address lets whoever has it upload

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Published:
    """Where a folder is now: the address of the repository, branch or pull request, and the commit there.

    `changed` is False if everything was there before, so that no commit was made.
    """

    url: str
    commit: str
    changed: bool


def check_repo_name(repo: str) -> None:
    """Raise a `UserError` unless `repo` is a name that the Hub takes, with its owner: ORG/NAME."""
    try:
        validate_repo_id(repo)
        well_formed = "/" in repo and repo.isascii()
    except HFValidationError:
        well_formed = False
    if not well_formed:
        raise UserError(
            f"{repo!r} is no name of a repository; give it as ORG/NAME, of letters, digits, '-', '_' and '.', "
            "the name up to 96 long"
        )


def check_target(revision: str, create_pr: bool) -> None:
    """Raise a `UserError` for a pull request against another branch than `main`, which the Hub does not take."""
    if create_pr and revision != MAIN:
        raise UserError(f"a pull request goes to {MAIN}, not to {revision!r}; leave out one of the two")


def is_of_an_export(path: str) -> bool:
    """Whether a file, by its path in the folder, is one that exports write; README.md, which people edit, is not."""
    return OF_EXPORTS.fullmatch(path) is not None


def find_token(api: HfApi | None = None) -> str:
    """The token that requests will carry.

    Raises:
        UserError: if there is no usable one, or the Hub is switched off; no request is made.
    """
    if constants.HF_HUB_OFFLINE:
        raise UserError("the Hub is switched off by HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE; unset it to upload")
    given = api.token if api else None
    token = given if isinstance(given, str) else None if given is False else get_token()
    if not token:
        raise UserError("there is no token for the Hub; log in with `hf auth login`, or set HF_TOKEN")
    if not re.fullmatch(r"[!-~]+", token):
        raise UserError("the token for the Hub holds spaces or special characters; copy it again, alone")
    return token


def upload(
    folder: Path,
    repo: str,
    *,
    private: bool = False,
    revision: str = MAIN,
    create_pr: bool = False,
    message: str = "Upload with mcl_clip",
    api: HfApi | None = None,
) -> Published:
    """Make `revision` of the model repository `repo` hold the files of `folder`.

    That is one commit or pull request; more commits for hundreds of files. A repository or branch that does not
    exist is made. What earlier exports left and the folder no longer has is removed; other files stay, and so does
    a README.md without the line `MARKER`. An upload that was interrupted continues: what arrived is not sent again.

    Args:
        folder: the files, as they shall stand in the repository.
        repo: ORG/NAME.
        private: whether a new repository is private; one that exists keeps its visibility.
        revision: the branch; a new one starts at `main`.
        create_pr: whether to open a pull request against `main` instead.
        message: of the commit, or the title of the pull request.
        api: the client, with endpoint and token, if not the usual ones.

    Raises:
        UserError: whatever the Hub refuses, an interrupted connection, a name that holds something else.
    """
    check_repo_name(repo)
    local = _files_in(folder)
    check_target(revision, create_pr)
    api = api or HfApi(library_name="mcl_clip")
    token = find_token(api)
    with _explained(api, repo, token), _bars_hidden(not sys.stderr.isatty()):
        before = _open_repository(api, repo, revision, private)
        stale = sorted(path for path in _files_of(before) - local if is_of_an_export(path))
        keeps_readme = _has_readme_of_the_user(api, repo, before, folder)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            commit_message=message,
            parent_commit=None if create_pr else before.sha,
            ignore_patterns=[README] if keeps_readme else None,
            delete_patterns=[glob.escape(path) for path in stale] or None,
        )
    branch = "" if revision == MAIN else f"/tree/{quote(revision, safe='')}"
    return Published(
        url=commit.pr_url or f"{api.endpoint}/{repo}{branch}", commit=commit.oid, changed=commit.oid != before.sha
    )


def _files_in(folder: Path) -> set[str]:
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if not files:
        raise UserError(f"{folder}: there is no folder with files to upload; export a model first")
    return files


def _open_repository(api: HfApi, repo: str, revision: str, private: bool) -> ModelInfo:
    """What stands at `revision`; repository and branch are made if need be, after all that can be checked is."""
    found = _find(api, repo, None)
    here = _find(api, repo, revision) if found and revision != MAIN else found
    if found:
        _check_content(api, repo, here or found)
        _check_visibility(api, repo, found, private)
    else:
        api.create_repo(repo, private=private or None)  # None: private where the organisation's default is
    if revision != MAIN and not here:
        api.create_branch(repo, branch=revision)
    return here or api.model_info(repo, revision=revision)


def _find(api: HfApi, repo: str, revision: str | None) -> ModelInfo | None:
    try:
        return api.model_info(repo, revision=revision)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return None


def _files_of(info: ModelInfo) -> set[str]:
    return {file.rfilename for file in info.siblings or ()}


def _check_content(api: HfApi, repo: str, info: ModelInfo) -> None:
    files = _files_of(info)
    others = sorted(files - OF_AN_EMPTY_REPOSITORY)
    if others and not files & MARKS_OF_OURS and not ("config.json" in files and _is_clip(api, repo, info)):
        shown = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        raise UserError(
            f"{repo} is taken: it holds files, but no CLIP model ({shown}); nothing was changed, choose another name"
        )


def _is_clip(api: HfApi, repo: str, info: ModelInfo) -> bool:
    """Whether config.json is of a CLIP model of transformers."""
    with suppress(ValueError):
        config = json.loads(_read(api, repo, info, "config.json"))
        return isinstance(config, dict) and "clip" in str(config.get("model_type"))
    return False


def _check_visibility(api: HfApi, repo: str, info: ModelInfo, private: bool) -> None:
    if private and not info.private:
        raise UserError(
            f"{repo} is public, but --private asks for a private repository; nothing was changed, make it private on "
            f"{api.endpoint}/{repo}/settings or leave out --private"
        )
    if info.private and not private:
        logger.info("%s is private, and stays so", repo)


def _has_readme_of_the_user(api: HfApi, repo: str, info: ModelInfo, folder: Path) -> bool:
    """Whether the repository's README.md is to stay: it was edited, and the folder would replace it."""
    if README not in _files_of(info) or not (folder / README).is_file():
        return False
    there = _read(api, repo, info, README)
    if not there.strip() or MARKER in there or there == _text_of(folder / README):
        return False
    logger.warning("README.md of %s is kept, as it was edited; with the line %s it would be replaced", repo, MARKER)
    return True


def _read(api: HfApi, repo: str, info: ModelInfo, name: str) -> str:
    with tempfile.TemporaryDirectory() as cache, _bars_hidden(True):
        path = api.hf_hub_download(repo, name, revision=info.sha, cache_dir=cache)
        return _text_of(Path(path))


def _text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


@contextmanager
def _bars_hidden(hidden: bool) -> Iterator[None]:
    """Without the progress bars of the client, unless the environment has decided on them."""
    hides = hidden and constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not are_progress_bars_disabled()
    if hides:
        disable_progress_bars()
    try:
        yield
    finally:
        if hides:
            enable_progress_bars()


@contextmanager
def _explained(api: HfApi, repo: str, token: str) -> Iterator[None]:
    """What the Hub or the network refuses, as a `UserError` of one sentence that never shows the token."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        sentence = _explain(api, repo, token, error)
        if sentence is None:
            raise
        raise UserError(sentence) from error


def _explain(api: HfApi, repo: str, token: str, error: Exception) -> str | None:
    chain = list(_causes(error))
    for cause in chain:
        if (status := _status_of(cause)) is not None:
            said = _one_line(getattr(cause, "server_message", None) or "", token)
            return f"{repo}: {_way_out(api, repo, status, error)}" + (f" (the Hub says: {said})" if said else "")
    for cause in chain:
        if _is_of_the_network(cause):
            reason = _one_line(SIGNATURES.sub("", str(cause)) or type(cause).__name__, token)
            return f"{repo}: the connection to {api.endpoint} failed ({reason}); {CONTINUES}"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status_of(error: BaseException) -> int | None:
    """What the Hub answered, if it did; its store Xet says no in its own way."""
    if isinstance(error, PermissionError) and _library_of(error) == "hf_xet":
        return 403
    status: int | None = getattr(getattr(error, "response", None), "status_code", None)
    return status


def _way_out(api: HfApi, repo: str, status: int, error: Exception) -> str:
    if status == 400 and README in str(error):
        return "the Hub does not accept the head of README.md; correct it"
    if status >= 500:
        return f"the Hub has a fault of its own ({status}); wait some minutes, then {CONTINUES}"
    text = WAY_OUT.get(status, f"the Hub refuses the upload ({status}); see {{endpoint}}/{repo}, then {CONTINUES}")
    return text.format(owner=repo.split("/")[0], endpoint=api.endpoint)


def _is_of_the_network(error: BaseException) -> bool:
    told = (ConnectionError, TimeoutError, LocalEntryNotFoundError)
    return isinstance(error, told) or _library_of(error) in HTTP_LIBRARIES


def _library_of(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


def _one_line(text: str, token: str) -> str:
    line = " ".join(text.replace(token, "***").split())
    return line if len(line) <= 300 else line[:300] + " ..."
