"""Upload an exported folder to the Hugging Face Hub, without losing anything that its owner put there."""

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

from mcl_clip.core.errors import UserError, shorten

MARKER = "<!-- written by mcl_clip: remove this line to keep your own edits -->"
README = "README.md"
MAIN = "main"
NEW_REPOSITORY_FILES = {".gitattributes", ".gitignore", README, "LICENSE"}  # what the website creates
_TOKENIZER = (
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
    r"|(merges|vocab)\.txt|(tokenizer|spiece|sentencepiece\.bpe)\.model"
)
EXPORT_FILES = re.compile(
    rf"stage_\d+/(open_clip_config\.json|(open_clip_model|difference)\.safetensors|{_TOKENIZER})"
    r"|(stage_\d+/)?((image_model|config)\.json|(model|head)\.safetensors)"
    r"|eval/results\.jsonl"
    r"|(modeling_multistage_clip|processing_multistage_clip|multistage|image_transform|image_model|open_clip_io|open_clip_folder|sharing)\.py"
    r"|(open_clip_model|model)\.safetensors"
    rf"|(mcl_clip_config|open_clip_config|config|preprocessor_config|processor_config)\.json|{_TOKENIZER}"
)
RESUME = "run the same command again to resume; files that have arrived are not sent again"
REMEDIES = {
    400: "the Hub rejects the request; correct what it names",
    401: "the Hub rejects the token; log in again with `hf auth login`, or set HF_TOKEN to a valid one",
    403: "the token has no write access to {owner}; use one that has, from {endpoint}/settings/tokens, or choose "
    "another owner",
    404: "the Hub shows no such repository or revision to this token; correct the name, or ask {owner} for access",
    409: "the name is taken by a repository that this token cannot see, or the repository is being changed; choose "
    "another name, or try again in a minute",
    412: f"someone else changed the repository during the upload; {RESUME}",
    429: f"the Hub has received too many requests; wait a few minutes, then {RESUME}",
}
HTTP_LIBRARIES = {"requests", "urllib3", "httpx", "httpx2", "httpcore", "httpcore2", "hf_xet"}  # of any client version
QUERY_STRINGS = re.compile(r"\?[^\s'\")]+")  # in pre-signed URLs they grant access to whoever reads them

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Published:
    """Where a folder was uploaded: the URL of the repository, branch or pull request, and the commit there."""

    url: str
    commit: str
    changed: bool  # False if everything was there already, so that no commit was made


def check_repo_name(repo: str) -> None:
    """Raise a UserError unless `repo` is a valid repository name with its owner, ORG/NAME."""
    try:
        validate_repo_id(repo)
        is_valid = "/" in repo and repo.isascii()
    except HFValidationError:
        is_valid = False
    if not is_valid:
        raise UserError(
            f"{repo!r} is not a valid repository name; give it as ORG/NAME, of letters, digits, '-', '_' and '.', the "
            f"name at most 96 characters long"
        )


def check_target(revision: str, create_pr: bool) -> None:
    """Raise a UserError for a pull request against a branch other than `main`, which the Hub does not support."""
    if create_pr and revision != MAIN:
        raise UserError(f"a pull request targets {MAIN}, not {revision!r}; leave out one of the two")


def is_export_file(path: str) -> bool:
    """Tell whether exports write a file of this relative path; False for README.md, which people edit."""
    return EXPORT_FILES.fullmatch(path) is not None


def find_token(api: HfApi | None = None) -> str:
    """Return the token that requests will use, without making a request.

    Raises:
        UserError: if there is no usable token, or the Hub is disabled.
    """
    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE disables the Hub; unset it to upload")
    given = api.token if api else None
    token = given if isinstance(given, str) else None if given is False else get_token()
    if not token:
        raise UserError("there is no token for the Hub; log in with `hf auth login`, or set HF_TOKEN")
    if not re.fullmatch(r"[!-~]+", token):
        raise UserError("the token for the Hub has spaces or special characters; copy it again, without them")
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
    """Make `revision` of the model repository `repo` hold the files of `folder`, as one commit or pull request.

    A repository or branch that does not exist is created. Files that earlier exports left and the folder no longer has
    are deleted; other files are kept, and so is a README.md without the line `MARKER`. An interrupted upload resumes:
    files that have arrived are not sent again. Hundreds of files may take more than one commit.

    With `private`, a new repository is private; an existing one keeps its visibility. A new branch starts at `main`.
    With `create_pr`, a pull request against `main` is opened instead, with `message` as its title.

    Raises:
        UserError: if the Hub refuses, the connection fails, or the repository holds something else.
    """
    check_repo_name(repo)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if not files:
        raise UserError(f"{folder} is not a folder with files to upload; export a model first")
    check_target(revision, create_pr)
    api = api or HfApi(library_name="mcl_clip")
    token = find_token(api)
    try:
        with _progress_bars_hidden(not sys.stderr.isatty()):
            before = _open_repository(api, repo, revision, private)
            stale = sorted(path for path in _files_of(before) - files if is_export_file(path))
            commit = api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                revision=revision,
                create_pr=create_pr,
                commit_message=message,
                parent_commit=None if create_pr else before.sha,  # refuses to overwrite a commit made meanwhile
                ignore_patterns=[README] if _keeps_readme(api, repo, before, folder) else None,
                delete_patterns=[glob.escape(path) for path in stale] or None,
            )
    except UserError:
        raise
    except Exception as error:
        if (sentence := _explain(api, repo, token, error)) is None:
            raise
        raise UserError(sentence) from error
    branch = "" if revision == MAIN else f"/tree/{quote(revision, safe='')}"
    return Published(
        url=commit.pr_url or f"{api.endpoint}/{repo}{branch}", commit=commit.oid, changed=commit.oid != before.sha
    )


def _open_repository(api: HfApi, repo: str, revision: str, private: bool) -> ModelInfo:
    """Return the state of `revision`; create repository and branch if needed, after all checks have passed."""
    repository = branch = None
    with suppress(RepositoryNotFoundError, RevisionNotFoundError):
        repository = api.model_info(repo)
        branch = api.model_info(repo, revision=revision) if revision != MAIN else repository
    if repository:
        _check_content(api, repo, branch or repository)
        if private and not repository.private:
            raise UserError(
                f"{repo} is public, but --private asks for a private repository; nothing was changed, make it private "
                f"on {api.endpoint}/{repo}/settings or leave out --private"
            )
        if repository.private and not private:
            logger.info("%s is private, and stays private", repo)
    else:
        api.create_repo(repo, private=private or None)  # None: the default of the organization
    if revision != MAIN and not branch:
        api.create_branch(repo, branch=revision)
    return branch or api.model_info(repo, revision=revision)


def _check_content(api: HfApi, repo: str, info: ModelInfo) -> None:
    """Raise a UserError if a repository has files, but no CLIP model of ours, of open_clip or of transformers."""
    files = _files_of(info)
    others = sorted(files - NEW_REPOSITORY_FILES)
    if not others or files & {"mcl_clip_config.json", "open_clip_config.json"}:
        return
    if "config.json" in files:
        with suppress(ValueError):
            config = json.loads(_download_text(api, repo, info, "config.json"))
            if isinstance(config, dict) and "clip" in str(config.get("model_type")):
                return
    shown = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
    raise UserError(
        f"{repo} is taken: it holds files, but no CLIP model ({shown}); nothing was changed, choose another name"
    )


def _keeps_readme(api: HfApi, repo: str, info: ModelInfo, folder: Path) -> bool:
    """Tell whether the repository's README.md was edited by its owner, so that the folder's must not replace it."""
    if README not in _files_of(info) or not (folder / README).is_file():
        return False
    text = _download_text(api, repo, info, README)
    if not text.strip() or MARKER in text or text == (folder / README).read_text(encoding="utf-8", errors="replace"):
        return False
    logger.warning("README.md of %s was edited and is kept; add the line %s to have it replaced", repo, MARKER)
    return True


def _files_of(info: ModelInfo) -> set[str]:
    return {file.rfilename for file in info.siblings or ()}


def _download_text(api: HfApi, repo: str, info: ModelInfo, name: str) -> str:
    with tempfile.TemporaryDirectory() as cache, _progress_bars_hidden(True):
        path = Path(api.hf_hub_download(repo, name, revision=info.sha, cache_dir=cache))
        return path.read_text(encoding="utf-8", errors="replace")


@contextmanager
def _progress_bars_hidden(hidden: bool) -> Iterator[None]:
    """Hide the progress bars of the client, unless an environment variable controls them."""
    hides = hidden and constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not are_progress_bars_disabled()
    if hides:
        disable_progress_bars()
    try:
        yield
    finally:
        if hides:
            enable_progress_bars()


def _explain(api: HfApi, repo: str, token: str, error: Exception) -> str | None:
    """Say in a sentence what the Hub answered, or else what the network did; None for an error of neither.

    The sentence never shows the token.
    """

    def one_line(text: str) -> str:
        return shorten(text.replace(token, "***"), 300)

    chain: list[BaseException] = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    for cause in chain:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(cause, PermissionError) and type(cause).__module__.startswith("hf_xet"):
            status = 403  # the Xet store has errors of its own
        if status is None:
            continue
        if status == 400 and README in str(error):
            remedy = "the Hub rejects the metadata at the top of README.md; correct it"
        elif status >= 500:
            remedy = f"the Hub has an internal error ({status}); wait a few minutes, then {RESUME}"
        else:
            default = f"the Hub rejects the upload ({status}); see {{endpoint}}/{repo}, then {RESUME}"
            remedy = REMEDIES.get(status, default).format(owner=repo.split("/")[0], endpoint=api.endpoint)
        answer = one_line(getattr(cause, "server_message", None) or "")
        return f"{repo}: {remedy}" + (f" (the Hub says: {answer})" if answer else "")
    for cause in chain:
        is_network_error = isinstance(cause, ConnectionError | TimeoutError | LocalEntryNotFoundError)
        if is_network_error or type(cause).__module__.partition(".")[0] in HTTP_LIBRARIES:
            reason = one_line(QUERY_STRINGS.sub("", str(cause)) or type(cause).__name__)
            return f"{repo}: the connection to {api.endpoint} failed ({reason}); {RESUME}"
    return None
