"""The tower's settings, and the weights that a run starts from."""

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
from mcl_clip.tools.doctor.findings import Finding, as_bytes, attempt

TIMEOUT_S = 10.0  # for the Hub


def tower_config(
    *, architecture: str, model: Mapping[str, Any], preprocess: Mapping[str, Any]
) -> dict[str, Any] | None:
    """open_clip's settings of a tower; none for one on the Hub whose settings are not on this machine.

    Raises:
        UserError: if there is no such tower.
    """
    if architecture.startswith("hf-hub:"):
        found = huggingface_hub.try_to_load_from_cache(architecture.removeprefix("hf-hub:"), OPEN_CLIP_CONFIG_NAME)
        if not isinstance(found, str):
            return None
        cfg = _checked(architecture, Path(found))
    elif architecture.startswith("local-dir:"):
        folder = Path(architecture.removeprefix("local-dir:"))
        if not (folder / OPEN_CLIP_CONFIG_NAME).is_file():
            raise UserError(f"{folder} is not an open_clip folder: it has no {OPEN_CLIP_CONFIG_NAME}")
        cfg = _checked(architecture, folder / OPEN_CLIP_CONFIG_NAME)
    elif architecture:
        name = architecture.replace("/", "-")
        if name not in open_clip.list_models():
            create_clip(architecture=name)  # which says what is near
        cfg = open_clip.get_model_config(name)
    else:
        cfg = dict(model)
    if "size" in preprocess:
        cfg = {**cfg, "vision_cfg": {**cfg["vision_cfg"], "image_size": preprocess["size"]}}
    return dict(cfg)


def _checked(architecture: str, path: Path) -> dict[str, Any]:
    """The settings in a config of open_clip, of which nobody could be harmed."""
    try:
        config = read_json(path)
        cfg: Any = config.get("model_cfg") if isinstance(config, dict) else None
        check_model_cfg(cfg)  # is a dictionary, above all
    except ValueError as error:
        raise UserError(f"{architecture} is not loaded: {error}; correct it, or use another model") from error
    return dict(cfg)


def check_weights(architecture: str, pretrained: str, *, model: Mapping[str, Any] | None = None) -> Iterator[Finding]:
    """Whether the weights that a run starts from are here, or can be fetched. Nothing is fetched.

    Args:
        architecture: as in `create_tower`.
        pretrained: as in `create_tower`.
        model: open_clip's settings, where there is no `architecture`.
    """
    if architecture.startswith("hf-hub:"):
        yield _hub_finding(architecture.removeprefix("hf-hub:"), _weight_names(""), f"the weights of {architecture}")
    elif architecture.startswith("local-dir:"):
        folder = Path(architecture.removeprefix("local-dir:"))
        if not folder.is_dir() or not any(path.suffix in WEIGHT_SUFFIXES for path in folder.iterdir()):
            yield Finding("FAIL", "weights", f"{folder} has no weights; save the model again")
        else:
            yield Finding("ok", "weights", f"in {folder}")
    elif Path(pretrained).is_file():
        yield Finding("ok", "weights", f"{pretrained}, {as_bytes(Path(pretrained).stat().st_size)}")
    elif pretrained:
        yield from _check_tag(architecture, pretrained, model)


def _check_tag(architecture: str, pretrained: str, model: Mapping[str, Any] | None) -> Iterator[Finding]:
    cfg = open_clip.get_pretrained_cfg(architecture.replace("/", "-"), pretrained)
    what = f"the weights {pretrained} of {architecture}"
    if not cfg:
        make = partial(create_clip, architecture=architecture, model_cfg=model or None, pretrained=pretrained)
        yield from attempt("weights", make)[1]  # refused, with the tags that there are
    elif cfg.get("hf_hub"):
        repository, name = os.path.split(cfg["hf_hub"])
        yield _hub_finding(repository, _weight_names(name), what)
    else:
        cached = Path("~/.cache/clip").expanduser() / os.path.basename(cfg["url"])
        yield Finding("ok", "weights", f"{cached}") if cached.is_file() else _url_finding(cfg["url"], what)


def is_measurable(cfg: Mapping[str, Any]) -> bool:
    """Whether the settings of all parts of a tower are on this machine."""
    name = cfg["text_cfg"].get("hf_model_name")
    return not name or isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str)


def check_tokenizer(text_cfg: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether a tokenizer of the Hub, if the tower has one, is here or can be fetched."""
    if name := text_cfg.get("hf_tokenizer_name"):
        yield _hub_finding(name, ("tokenizer.json", "tokenizer_config.json"), f"the tokenizer {name}")


def _weight_names(name: str) -> tuple[str, ...]:
    """The files that open_clip tries, first the safe ones."""
    name = name or "open_clip_pytorch_model.bin"
    safe = {"open_clip_pytorch_model.bin": "open_clip_model.safetensors"}.get(name, f"{Path(name).stem}.safetensors")
    return (safe, name)


def _hub_finding(repository: str, names: Sequence[str], what: str) -> Finding:
    for name in names:
        if isinstance(huggingface_hub.try_to_load_from_cache(repository, name), str):
            return Finding("ok", "weights", f"{what}: in the cache of the Hub")
    reason = ""
    for name in names:
        try:
            found = huggingface_hub.get_hf_file_metadata(
                huggingface_hub.hf_hub_url(repository, name), timeout=TIMEOUT_S
            )
            return Finding("ok", "weights", f"{what}: to be fetched from the Hub, {as_bytes(found.size or 0)}")
        except Exception as error:  # of whichever HTTP library the installed version uses
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return Finding("FAIL", "weights", _not_here(what, f"the Hub ({reason})"))


def _url_finding(url: str, what: str) -> Finding:
    try:
        with urlopen(Request(url, method="HEAD"), timeout=TIMEOUT_S) as answer:
            size = int(answer.headers.get("Content-Length") or 0)
    except (OSError, ValueError) as error:
        return Finding("FAIL", "weights", _not_here(what, f"{redacted(url)} ({error})"))
    return Finding("ok", "weights", f"{what}: to be fetched, {as_bytes(size)}")


def _not_here(what: str, where: str) -> str:
    return (
        f"{what} are not on this machine and cannot be had from {where}; fetch them where there is a network, and give "
        f"the file as --tower.pretrained or the folder as --tower.architecture local-dir:FOLDER"
    )
