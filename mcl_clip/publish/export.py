"""A run as a folder that others can load, checked by loading it back before it is called done."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import Tensor, nn

from mcl_clip.core.distributed import random_words
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import atomic_dir, read_jsonl, read_run_config
from mcl_clip.model.clip import ClipBundle, create_clip, load_clip
from mcl_clip.model.multistage import MultistageCLIP, normalized
from mcl_clip.model.open_clip_io import write_open_clip_folder
from mcl_clip.model.resolve import find_models
from mcl_clip.publish.card import About, card
from mcl_clip.publish.hub import MAIN, MARKER, is_of_an_export
from mcl_clip.publish.weights import mix_weights

MULTISTAGE, OPEN_CLIP, TRANSFORMERS = "multistage", "open_clip", "transformers"
LARGEST_DIFFERENCE = 1e-5  # of unit features
LARGEST_OF_RESIZING = 1e-2  # where transformers resizes pictures by itself, some pixels differ by steps of 255
RESIZED = "transformers, pictures that it resizes"
CHECK_SIZES = ((48, 36), (36, 64), (80, 80), (33, 50))  # of the pictures of the check
CHECK_TEXTS = ("a photo of a dog", "two red circles on a green table", "rain", "A man sings; nobody listens!")
Features = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Export:
    """What of a run is written, and how.

    Attributes:
        stage: one stage alone; None for all.
        average: the mean of the weights of all stages, in place of a stage.
        wise_ft: share of the stage, or of the mean, in an interpolation with the base (WiSE-FT); None for none.
        base: name of that base, see `find_models`; by default the pretrained weights that the run started from.
        as_transformers: a single stage as a CLIPModel of transformers, in place of an open_clip folder.
        compact: write what the stages share once; plain open_clip then loads the first stage alone.
        about: what only a person can know.
    """

    stage: int | None = None
    average: bool = False
    wise_ft: float | None = None
    base: str = ""
    as_transformers: bool = False
    compact: bool = False
    about: About = field(default_factory=About)

    @property
    def is_multistage(self) -> bool:
        """Whether all stages are written, as one model of several stages."""
        return self.stage is None and not self.average

    @property
    def form(self) -> str:
        """What the folder is made for."""
        return MULTISTAGE if self.is_multistage else TRANSFORMERS if self.as_transformers else OPEN_CLIP


EVERYTHING = Export()


def export_run(run: Path, folder: Path, export: Export, *, repo: str = "", revision: str = MAIN) -> dict[str, float]:
    """Write a run into `folder`, all at once, in place of an earlier export, and load it back in every way it is for.

    Args:
        run: the run directory; it must be finished, or have trained the stage that is asked for.
        folder: where to.
        export: what.
        repo: name on the Hub, for the examples in the model card.
        revision: branch there.

    Returns:
        The largest difference of unit features between the model and the one loaded back, for each way of loading.

    Raises:
        UserError: if that cannot be had, `folder` holds something else, or what is loaded back is not the same.
    """
    folder = folder.resolve()  # a link stays one, and `.` gets a name
    stages: list[dict[str, Any]] = read_run_config(run)["stages"]
    _check_choice(run, stages, export)
    _check_folder(folder)
    with atomic_dir(folder) as temporary:
        if export.is_multistage:
            differences = _write_multistage(run, temporary, export)
        else:
            differences = _write_single(_single(run, stages, export), temporary, export)
        if records := _results(run, len(stages), export):
            path = temporary / "eval" / "results.jsonl"
            path.parent.mkdir()
            path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        weights = _weights_text(stages, export)
        branch = "" if revision == MAIN else revision
        text = card(
            run,
            form=export.form,
            repo=repo,
            revision=branch,
            stage=export.stage,
            weights=weights,
            about=export.about,
        )
        (temporary / "README.md").write_text(text, encoding="utf-8")
        for way, difference in differences.items():
            if not difference <= (limit := LARGEST_OF_RESIZING if way == RESIZED else LARGEST_DIFFERENCE):
                raise UserError(
                    f"features of the model loaded back from {folder} by {way} differ by {difference:.1e}, more than "
                    f"{limit:g}, so it is not kept; a package or mcl_clip is at fault, please report it"
                )
    return differences


def _check_choice(run: Path, stages: Sequence[Mapping[str, Any]], export: Export) -> None:
    """Nothing, for an export that can be made."""
    if export.stage is not None and not 0 <= export.stage < len(stages):
        raise UserError(f"--stage {export.stage} is not one of the stages of {run}, 0 to {len(stages) - 1}")
    if export.stage is not None and export.average:
        raise UserError(f"--average takes all stages, and --stage {export.stage} one; leave one of them out")
    if export.is_multistage and (export.as_transformers or export.wise_ft is not None):
        option = "--as-transformers" if export.as_transformers else "--wise-ft"
        raise UserError(f"{option} is for one model, and the run has {len(stages)} stages; add --stage K or --average")
    if export.wise_ft is not None and not 0 <= export.wise_ft <= 1:
        raise UserError(f"--wise-ft {export.wise_ft} is not a share of the stage between 0 and 1")
    if export.base and export.wise_ft is None:
        raise UserError(
            f"--base {export.base} has no meaning without --wise-ft; give the share of the stage, as in 0.5"
        )
    if export.compact and not export.is_multistage:
        raise UserError("--compact is for what several stages share; leave it out for a single model")
    is_from_start = export.wise_ft is not None and not export.base
    mixed = "--average" if export.average else f"--wise-ft {export.wise_ft}" if is_from_start else ""
    used = range(1, len(stages) if export.stage is None else export.stage + 1)
    if mixed and (fresh := [s for s in used if stages[s].get("start") == "scratch"]):
        raise UserError(
            f"{mixed} is for stages that were fine-tuned from one another, and stage {fresh[0]} of {run} starts "
            f"from new random weights; export it as a multistage model, or one stage by --stage K"
        )


def _check_folder(folder: Path) -> None:
    """Nothing, for a folder that is new, empty or an earlier export."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    readme = folder / "README.md"
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()} - {readme.name}
    others = sorted(name for name in files if not is_of_an_export(name))
    if others or not readme.is_file() or MARKER not in readme.read_text(encoding="utf-8", errors="replace"):
        what = f", such as {others[0]}" if others else ""
        raise UserError(f"{folder} holds files that are not an exported model{what}; name a new or empty folder")


def _write_multistage(run: Path, folder: Path, export: Export) -> dict[str, float]:
    from mcl_clip.publish.hf_clip import transformers_features, write_transformers_files  # takes a second to import

    model = find_models(str(run))[0].load()
    if not isinstance(model, MultistageCLIP):
        raise TypeError(f"the combined model of {run} is a {type(model).__name__}")
    model.save(folder, compact=export.compact)
    write_transformers_files(folder, model)
    expected = _features(model, model)
    by_stage = [_features(stage, model) for stage in model.stages]
    plain = range(1 if export.compact else len(model.stages))
    again = MultistageCLIP.load(folder)
    return {
        "mcl_clip": _difference(_features(again, again), expected),
        "open_clip": max(_difference(_by_open_clip(folder / f"stage_{s}"), by_stage[s]) for s in plain),
        "transformers": _difference(transformers_features(folder, _pictures(), CHECK_TEXTS), expected),
    }


def _write_single(tower: ClipBundle, folder: Path, export: Export) -> dict[str, float]:
    from mcl_clip.publish.hf_clip import transformers_features, write_clip_model  # takes a second to import

    if export.as_transformers:
        write_clip_model(folder, tower)
        size = tower.preprocess_cfg["size"]
        fitting = _pictures([(size, size) if isinstance(size, int) else tuple(size)[::-1]] * len(CHECK_SIZES))
        return {
            way: _difference(
                transformers_features(folder, pictures, CHECK_TEXTS), _features(tower.model, tower, pictures)
            )
            for way, pictures in (("transformers", fitting), (RESIZED, _pictures()))
        }
    expected = _features(tower.model, tower)
    write_open_clip_folder(
        folder, tower.model, model_cfg=tower.model_cfg, preprocess_cfg=tower.preprocess_cfg, tokenizer=tower.tokenizer
    )
    again = load_clip(folder)
    return {
        "mcl_clip": _difference(_features(again.model, again), expected),
        "open_clip": _difference(_by_open_clip(folder), expected),
    }


def _single(run: Path, stages: Sequence[Mapping[str, Any]], export: Export) -> ClipBundle:
    """One stage, the mean of all, or a way from the base to one of these."""
    chosen = range(len(stages)) if export.stage is None else [export.stage]
    towers = [_tower(find_models(f"{run}/stage-{s}")[0].load()) for s in chosen]
    tower = mix_weights(towers, [1 / len(towers)] * len(towers))
    if export.wise_ft is None:
        return tower
    return mix_weights([_base(run, export), tower], [1 - export.wise_ft, export.wise_ft])


def _base(run: Path, export: Export) -> ClipBundle:
    if export.base:
        return _tower(find_models(export.base)[0].load())
    tower = read_run_config(run)["tower"]
    if not tower.get("pretrained") and not tower["architecture"].startswith(("local-dir:", "hf-hub:")):
        raise UserError(
            f"--wise-ft interpolates with the weights that the run started from, and {run} started from random ones; "
            f"name others by --base, such as {run}/stage-0"
        )
    return create_clip(
        architecture=tower["architecture"],
        model_cfg=tower.get("model") or None,
        pretrained=tower.get("pretrained", ""),
        preprocess=tower.get("preprocess", {}),
    )


def _tower(loaded: MultistageCLIP | ClipBundle) -> ClipBundle:
    if isinstance(loaded, MultistageCLIP):
        raise UserError(
            "--base must be a single model, and it names one of several stages; name a stage as RUN/stage-K"
        )
    return loaded


def _weights_text(stages: Sequence[object], export: Export) -> str:
    """How the weights were made if they are not those of a stage."""
    last = len(stages) - 1
    mean = f"the mean of the weights of stages 0 to {last}" if export.average else ""
    if export.wise_ft is None:
        return mean
    base = f"the weights of {Path(export.base).name}" if export.base else "the weights that the run started from"
    tuned = mean or f"those of stage {export.stage}"
    return f"{1 - export.wise_ft:g} of {base} and {export.wise_ft:g} of {tuned} (WiSE-FT)"


def _results(run: Path, num_stages: int, export: Export) -> list[dict[str, object]]:
    """What was measured of the exported model and, for a multistage one, of its stages; without files left behind."""
    if export.average or export.wise_ft is not None:
        return []
    folders = [*(run / f"stage-{s}" / "eval" for s in range(num_stages)), run / "combined"]
    found = [record for folder in folders for record in read_jsonl(folder / "results.jsonl")]
    wanted = None if export.stage is None else f"stage-{export.stage}"
    return [{**record, "outcomes": None} for record in found if wanted in (None, record.get("label"))]


def _by_open_clip(folder: Path) -> Features:
    """Features of a folder as plain open_clip computes them."""
    name = f"local-dir:{folder}"
    with torch.random.fork_rng(devices=[]):
        model, _, transform = open_clip.create_model_and_transforms(name, require_pretrained=True, weights_only=True)
    return _embed(model.eval(), transform, open_clip.get_tokenizer(name))


def _features(
    model: nn.Module, source: MultistageCLIP | ClipBundle, pictures: Sequence[Image.Image] | None = None
) -> Features:
    return _embed(model.eval(), source.image_transform, source.tokenizer, pictures)


@torch.inference_mode()
def _embed(
    model: nn.Module,
    transform: Callable[[Image.Image], Tensor],
    tokenizer: Callable[..., Tensor],
    pictures: Sequence[Image.Image] | None = None,
) -> Features:
    encode_image, encode_text = model.encode_image, model.encode_text
    images = torch.stack([transform(picture) for picture in pictures or _pictures()])
    return encode_image(images), encode_text(tokenizer(list(CHECK_TEXTS)))  # type: ignore[operator]


def _difference(features: Features, expected: Features) -> float:
    """The largest difference of a coordinate, after normalisation."""
    pairs = zip(features, expected, strict=True)
    return max(float((normalized(one) - normalized(other)).abs().max()) for one, other in pairs)


def _pictures(sizes: Sequence[tuple[int, int]] = CHECK_SIZES) -> list[Image.Image]:
    """Coloured noise, smooth enough to survive resizing, of the given widths and heights."""
    pictures = []
    for number, size in enumerate(sizes):
        words = random_words(8 * 8 * 3, "pictures of the export check", number)
        noise = Image.fromarray((words % 256).astype(np.uint8).reshape(8, 8, 3))
        pictures.append(noise.resize(size, Image.Resampling.BICUBIC))
    return pictures
