"""Resolve a model name: a run, one of its stages, an exported folder, or a model of open_clip or the Hub."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from torch import Tensor, nn

from mcl_clip.core.errors import UserError
from mcl_clip.core.files import read_run_config
from mcl_clip.model.clip import HUB, LOCAL, ClipBundle, create_clip, load_clip, refuse_texts
from mcl_clip.model.fast_paths import use_fast_paths
from mcl_clip.model.from_transformers import is_transformers_folder
from mcl_clip.model.image_model import is_image_folder
from mcl_clip.model.multistage import CONFIG_NAME, MultistageCLIP, read_config
from mcl_clip.model.open_clip_io import OPEN_CLIP_CONFIG_NAME, OPEN_CLIP_WEIGHTS_NAME

SINGLE_STAGE = re.compile(r"stage-(\d+)")
TOKENIZER_FILES = ("*.json", "*.txt", "*.model")
STAGE_FILES = tuple(f"stage_*/{pattern}" for pattern in (*TOKENIZER_FILES, "*.safetensors"))
Loaded = MultistageCLIP | ClipBundle


def load(
    name: str | Path, *, device: str | torch.device = "cpu"
) -> tuple[nn.Module, Callable[[Any], Tensor], Callable[..., Tensor]]:
    """Load a model in float32 and eval mode, with its image transform and tokenizer, as open_clip does.

    Args:
        name: a run directory (its combined model), `RUN/stage-K`, an exported folder, `hf-hub:ORG/NAME[@REVISION]`,
            `local-dir:FOLDER`, or `ARCHITECTURE/TAG` of open_clip such as `ViT-B-32/laion2b_s34b_b79k`.
        device: device of the model.

    Returns:
        The model, with `encode_image(images, normalize=False)` and `encode_text(tokens, normalize=False)`; the
        transform from a PIL image to a float tensor [3, height, width]; the tokenizer from a list of texts to tokens.

    Raises:
        UserError: if there is no such model, or it cannot be loaded.
    """
    loaded = find_models(str(name))[0].load()
    model = loaded if isinstance(loaded, MultistageCLIP) else loaded.model
    return model.to(device).eval(), loaded.image_transform, loaded.tokenizer


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model to evaluate that is not loaded yet."""

    model: str  # in the columns of CLIP_benchmark, like `pretrained`
    pretrained: str
    label: str  # file name that is unique in a folder of results
    load: Callable[[], Loaded]
    stage: int = 0  # number of the last stage in it


def _candidate(model: str, pretrained: str, load: Callable[[], Loaded], label: str = "", stage: int = 0) -> Candidate:
    """Create a candidate; its label is `pretrained`, or `label`, without characters that have a meaning in paths."""
    label = re.sub(r"[^\w.-]+", "-", label or pretrained).strip("-.")
    return Candidate(model=model, pretrained=pretrained, label=label, load=load, stage=stage)


def find_models(name: str, *, each: bool = False) -> list[Candidate]:
    """Find the models that `name` refers to, without loading them.

    Args:
        name: as in `load`.
        each: for a run, also return each of its stages.

    Raises:
        UserError: if there is no such model, or the run has not trained it yet.
    """
    folder = Path(name)
    if (folder / "config.json").is_file() and any(folder.glob("stage-*")):
        combined, num_stages = folder / "combined" / "model", len(read_run_config(folder)["stages"])
        stages = [_stage_of_run(folder, stage) for stage in range(num_stages)] if each else []
        if not (combined / CONFIG_NAME).is_file():
            raise UserError(
                f"{folder} has no combined model yet; finish the run, or name one of its stages as {folder}/stage-0"
            )
        run_name = folder.resolve().name
        return [*stages, _multistage(combined, _architecture_of(folder), f"{run_name}/combined", label=run_name)]
    if each:
        raise UserError(f"--each measures all stages of a run, and {name} is not a run directory; leave it out")
    if SINGLE_STAGE.fullmatch(folder.name) and (folder.parent / "config.json").is_file():
        return [_stage_of_run(folder.parent, int(folder.name.removeprefix("stage-")))]
    if (folder / CONFIG_NAME).is_file():
        return [_multistage(folder, "multistage model", folder.resolve().name)]
    if (folder / OPEN_CLIP_CONFIG_NAME).is_file() or is_transformers_folder(folder) or is_image_folder(folder):
        kind = "image model" if is_image_folder(folder) else "open_clip model"
        return [_candidate(kind, folder.resolve().name, partial(load_clip, folder))]
    if folder.is_dir():
        raise UserError(
            f"{folder} holds no model: it is not a run directory (config.json and stage-K), and has no {CONFIG_NAME} "
            f"or {OPEN_CLIP_CONFIG_NAME}"
        )
    if name.startswith(HUB):
        return [_on_the_hub(name)]
    if name.startswith(LOCAL):
        return [_candidate(name, name.removeprefix(LOCAL), partial(create_clip, architecture=name))]
    return [_known_to_open_clip(name)]


def _stage_of_run(run: Path, stage: int) -> Candidate:
    folder = run / f"stage-{stage}" / "train" / "model"
    if not (folder / OPEN_CLIP_CONFIG_NAME).is_file() and not is_image_folder(folder):
        trained = sorted(path.parts[-4] for path in run.glob(f"stage-*/train/model/{OPEN_CLIP_CONFIG_NAME}"))
        raise UserError(f"{run} has no trained stage-{stage} yet; it has {', '.join(trained) or 'none'}")
    weights = f"{run.resolve().name}/stage-{stage}"
    return _candidate(_architecture_of(run), weights, partial(load_clip, folder), stage=stage)


def _architecture_of(run: Path) -> str:
    architecture: str = read_run_config(run).get("tower", {}).get("architecture") or "model given in the recipe"
    return architecture


def _multistage(folder: Path, model: str, pretrained: str, *, label: str = "") -> Candidate:
    try:
        num_stages = len(read_config(folder)["stages"])
    except ValueError as error:
        raise UserError(f"the multistage model in {folder} cannot be loaded: {error}; export it again") from error
    return _candidate(model, pretrained, partial(_load_multistage, folder), label=label, stage=num_stages - 1)


def _load_multistage(folder: Path) -> MultistageCLIP:
    try:
        model = MultistageCLIP.load(folder)
        if not model.has_texts:
            model.tokenizer = refuse_texts
            return model
        for stage in model.stages:
            use_fast_paths(stage)
        return model
    except Exception as error:  # damaged weights and configs raise errors of many types
        raise UserError(f"the multistage model in {folder} cannot be loaded: {error}; export it again") from error


def split_architecture(name: str, others: str) -> tuple[str, str]:
    """Split ARCHITECTURE/TAG into architecture and tag of open_clip.

    Raises:
        UserError: if there is no such architecture, or no tag; `others` says what else may be named.
    """
    architecture, _, tag = name.rpartition("/")
    known = open_clip.list_models()
    if name.replace("/", "-") in known:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name.replace("/", "-"))) or "none"
        raise UserError(f"{name} names an architecture without weights; write {name}/TAG, with one of its tags: {tags}")
    if architecture.replace("/", "-") not in known:
        raise UserError(
            f"there is no folder {name}, and open_clip has no architecture {architecture or name!r}; {others}"
        )
    return architecture, tag


def _known_to_open_clip(name: str) -> Candidate:
    others = (
        "name a run directory, an exported folder, ARCHITECTURE/TAG such as ViT-B-32/laion2b_s34b_b79k, "
        "hf-hub:ORG/NAME or local-dir:FOLDER"
    )
    architecture, tag = split_architecture(name, others)
    load = partial(create_clip, architecture=architecture, pretrained=tag)
    return _candidate(architecture.replace("/", "-"), tag, load, label=name)


def _on_the_hub(name: str) -> Candidate:
    """Return the candidate for a repository of the Hub with a multistage model or a model of open_clip."""
    weights = name.removeprefix(HUB)
    repo, _, revision = weights.partition("@")
    try:
        try:
            hf_hub_download(repo, CONFIG_NAME, revision=revision or None)
            files = [CONFIG_NAME, *STAGE_FILES]
        except EntryNotFoundError:  # also if the file is not in the cache and there is no network
            if not revision:  # open_clip downloads the default revision itself, but no other
                return _candidate(name, weights, partial(create_clip, architecture=name))
            files = [OPEN_CLIP_CONFIG_NAME, OPEN_CLIP_WEIGHTS_NAME, *TOKENIZER_FILES]
        folder = Path(snapshot_download(repo, revision=revision or None, allow_patterns=files))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"{name} cannot be loaded from the Hub: {reason}; check the name and the network, and log in with "
            f"`hf auth login` if it is private"
        ) from error
    if CONFIG_NAME in files:
        return _multistage(folder, name, weights)
    return _candidate(name, weights, partial(load_clip, folder))
