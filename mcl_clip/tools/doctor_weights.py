"""Checks of the model config, and of the pretrained weights and tokenizer that a run starts from."""

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import huggingface_hub
import open_clip

from mcl_clip.core.errors import UserError
from mcl_clip.core.files import read_json
from mcl_clip.data.shards import redacted
from mcl_clip.model.clip import create_clip
from mcl_clip.model.open_clip_io import OPEN_CLIP_CONFIG_NAME, WEIGHT_SUFFIXES, check_model_cfg
from mcl_clip.tools.findings import Finding, as_bytes, attempt

TIMEOUT_S = 10.0


def find_model_cfg(
    *, architecture: str, model: Mapping[str, Any], preprocess: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return the model config of open_clip; None for a model on the Hub whose config is not cached.

    Raises:
        UserError: if there is no such model, or its config is refused.
    """
    if architecture.startswith("hf-hub:"):
        path = huggingface_hub.try_to_load_from_cache(architecture.removeprefix("hf-hub:"), OPEN_CLIP_CONFIG_NAME)
        if not isinstance(path, str):
            return None
        cfg = _read_model_cfg(architecture, Path(path))
    elif architecture.startswith("local-dir:"):
        folder = Path(architecture.removeprefix("local-dir:"))
        if not (folder / OPEN_CLIP_CONFIG_NAME).is_file():
            raise UserError(f"{folder} is not an open_clip folder: it has no {OPEN_CLIP_CONFIG_NAME}")
        cfg = _read_model_cfg(architecture, folder / OPEN_CLIP_CONFIG_NAME)
    elif architecture:
        name = architecture.replace("/", "-")
        if name not in open_clip.list_models():
            create_clip(architecture=name)  # raises with similar names
        cfg = open_clip.get_model_config(name)
    else:
        cfg = dict(model)
    if "size" in preprocess:
        cfg = {**cfg, "vision_cfg": {**cfg["vision_cfg"], "image_size": preprocess["size"]}}
    return dict(cfg)


def _read_model_cfg(architecture: str, path: Path) -> dict[str, Any]:
    try:
        config = read_json(path)
        cfg: Any = config.get("model_cfg") if isinstance(config, dict) else None
        check_model_cfg(cfg)  # refuses anything that is not a dictionary, too
    except ValueError as error:
        raise UserError(f"{architecture} is not loaded: {error}; correct it, or use another model") from error
    return dict(cfg)


def is_measurable(cfg: Mapping[str, Any]) -> bool:
    """Return whether the configs of all parts of a model are on this machine."""
    name = cfg["text_cfg"].get("hf_model_name")
    return not name or isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str)


def check_weights(architecture: str, pretrained: str, *, model: Mapping[str, Any] | None = None) -> Iterator[Finding]:
    """Check whether pretrained weights are on this machine or can be downloaded; nothing is downloaded.

    Args:
        architecture: as in `create_clip`.
        pretrained: as in `create_clip`.
        model: model config of open_clip, if `architecture` is empty.
    """
    if architecture.startswith("hf-hub:"):
        repository = architecture.removeprefix("hf-hub:")
        yield _check_hub(repository, _weight_names(""), f"the weights of {architecture}")
    elif architecture.startswith("local-dir:"):
        folder = Path(architecture.removeprefix("local-dir:"))
        if not folder.is_dir() or not any(path.suffix in WEIGHT_SUFFIXES for path in folder.iterdir()):
            yield Finding("FAIL", "weights", f"{folder} has no weights; save the model again")
        else:
            yield Finding("ok", "weights", f"in {folder}")
    elif Path(pretrained).is_file():
        yield Finding("ok", "weights", f"{pretrained}, {as_bytes(Path(pretrained).stat().st_size)}")
    elif pretrained:
        cfg = open_clip.get_pretrained_cfg(architecture.replace("/", "-"), pretrained)
        what = f"the weights {pretrained} of {architecture}"
        if not cfg:
            create = partial(create_clip, architecture=architecture, model_cfg=model or None, pretrained=pretrained)
            yield from attempt("weights", create)[1]  # fails with the list of known tags
        elif cfg.get("hf_hub"):
            repository, name = os.path.split(cfg["hf_hub"])
            yield _check_hub(repository, _weight_names(name), what)
        else:
            cached = Path("~/.cache/clip").expanduser() / os.path.basename(cfg["url"])
            yield Finding("ok", "weights", f"{cached}") if cached.is_file() else _check_url(cfg["url"], what)


def check_tokenizer(text_cfg: Mapping[str, Any]) -> Iterator[Finding]:
    """Check whether the Hub tokenizer of a text encoder, if it has one, is cached or can be downloaded."""
    if name := text_cfg.get("hf_tokenizer_name"):
        yield _check_hub(name, ("tokenizer.json", "tokenizer_config.json"), f"the tokenizer {name}")


def _weight_names(name: str) -> tuple[str, ...]:
    """List the files that open_clip tries, safetensors first."""
    name = name or "open_clip_pytorch_model.bin"
    safe = {"open_clip_pytorch_model.bin": "open_clip_model.safetensors"}.get(name, f"{Path(name).stem}.safetensors")
    return (safe, name)


def _check_hub(repository: str, names: Sequence[str], what: str) -> Finding:
    for name in names:
        if isinstance(huggingface_hub.try_to_load_from_cache(repository, name), str):
            return Finding("ok", "weights", f"{what}: in the cache of the Hub")
    reason = ""
    for name in names:
        try:
            url = huggingface_hub.hf_hub_url(repository, name)
            size = huggingface_hub.get_hf_file_metadata(url, timeout=TIMEOUT_S).size or 0
            return Finding("ok", "weights", f"{what}: to be downloaded from the Hub, {as_bytes(size)}")
        except Exception as error:  # the type depends on the HTTP library of the installed version
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return _unavailable(what, f"the Hub ({reason})")


def _check_url(url: str, what: str) -> Finding:
    try:
        with urlopen(Request(url, method="HEAD"), timeout=TIMEOUT_S) as answer:
            size = int(answer.headers.get("Content-Length") or 0)
    except (OSError, ValueError) as error:
        return _unavailable(what, f"{redacted(url)} ({error})")
    return Finding("ok", "weights", f"{what}: to be downloaded, {as_bytes(size)}")


def _unavailable(what: str, source: str) -> Finding:
    return Finding(
        "FAIL",
        "weights",
        f"{what} are not on this machine and cannot be downloaded from {source}; download them where there is a "
        f"network, and give the file as --tower.pretrained or the folder as --tower.architecture local-dir:FOLDER",
    )
