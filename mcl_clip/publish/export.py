"""Export a run as a folder that others can load, verified by loading it back before it is kept."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from mcl_clip.config import TowerConfig
from mcl_clip.core.distributed import random_words
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import append_jsonl, atomic_dir, read_jsonl, read_run_config
from mcl_clip.model.clip import ClipBundle, load_clip
from mcl_clip.model.image_model import TIMM_CONFIG_NAME, write_image_folder
from mcl_clip.model.mix import mix_weights
from mcl_clip.model.multistage import MultistageCLIP, normalized
from mcl_clip.model.open_clip_io import write_open_clip_folder
from mcl_clip.model.resolve import find_models
from mcl_clip.model.tower import create_tower
from mcl_clip.publish.card import About, card
from mcl_clip.publish.hub import MAIN, MARKER, is_export_file
from mcl_clip.results.record import COMBINED, read_run

TRANSFORMERS_RESIZED = "transformers, resizing images itself"
MAX_DIFFERENCE = 1e-5  # of unit features
MAX_DIFFERENCE_RESIZED = 1e-2  # pixels that transformers resizes by itself differ by a few steps of 255
CHECK_SIZES = ((48, 36), (36, 64), (80, 80), (33, 50))  # width, height
CHECK_TEXTS = ("a photo of a dog", "two red circles on a green table", "rain", "A man sings; nobody listens!")
Features = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Export:
    """What to export of a run, and in which form."""

    stage: int | None = None  # export this stage alone; None for all stages
    average: bool = False  # export the mean of the weights of all stages as a single model
    wise_ft: float | None = None  # share of the stage, or of the mean, in an interpolation with the base (WiSE-FT)
    base: str = ""  # name of that base model; by default the pretrained weights that the run started from
    as_transformers: bool = False  # write a single model as a CLIPModel of transformers, not as an open_clip folder
    compact: bool = False  # write weights that stages share once; plain open_clip then loads the first stage only
    about: About = field(default_factory=About)  # what the run cannot tell, for the model card
    is_final: bool = False  # the final model of the run is a single one with averaged weights

    @property
    def is_multistage(self) -> bool:
        """Whether all stages are exported, as one multistage model."""
        return self.stage is None and not self.average and not self.is_final

    @property
    def form(self) -> str:
        """The library that the folder is made for."""
        return "multistage" if self.is_multistage else "transformers" if self.as_transformers else "open_clip"


EVERYTHING = Export()


def export_run(run: Path, folder: Path, export: Export, *, repo: str = "", revision: str = MAIN) -> dict[str, float]:
    """Export a run to `folder` atomically, replacing an earlier export, and verify it with each supported library.

    The run must be finished, or have trained the stage to export. The examples in the model card name `repo`, a
    repository on the Hub, and the branch `revision` there. Returns the largest difference of unit features between
    the model and the one loaded back, by library.

    Raises:
        UserError: if the options do not fit the run, `folder` holds something else, or the features differ.
    """
    folder = folder.resolve()  # a symlink is kept, and `.` gets a name
    stages: list[dict[str, Any]] = read_run_config(run)["stages"]
    export = replace(export, is_final=export.is_multistage and bool(read_run(run).averaged))
    _check_options(run, stages, export)
    _check_folder(folder)
    with atomic_dir(folder) as temporary:
        if export.is_multistage:
            differences = _write_multistage(run, temporary, export)
        else:
            differences = _write_single(_single_model(run, stages, export), temporary, export)
        if not export.average and export.wise_ft is None:  # the run evaluated no such models
            folders = [*(run / f"stage-{s}" / "eval" for s in range(len(stages))), run / COMBINED]
            for record in (record for folder in folders for record in read_jsonl(folder / "results.jsonl")):
                label = COMBINED if export.is_final else f"stage-{export.stage}"
                if export.is_multistage or record.get("label") == label:
                    (temporary / "eval").mkdir(exist_ok=True)
                    append_jsonl(temporary / "eval" / "results.jsonl", {**record, "outcomes": None})  # not exported
        text = card(
            run,
            form=export.form,
            repo=repo,
            revision="" if revision == MAIN else revision,
            stage=export.stage,
            weights=_weights_text(stages, export),
            is_final=export.is_final and export.wise_ft is None,
            about=export.about,
        )
        (temporary / "README.md").write_text(text, encoding="utf-8")
        for library, difference in differences.items():
            limit = MAX_DIFFERENCE_RESIZED if library == TRANSFORMERS_RESIZED else MAX_DIFFERENCE
            if not difference <= limit:  # also true for NaN
                raise UserError(
                    f"the export to {folder} was discarded: loaded back with {library}, its features differ by "
                    f"{difference:.1e}, more than {limit:g}; please report this bug of mcl_clip or of a package it uses"
                )
    return differences


def _check_options(run: Path, stages: Sequence[Mapping[str, Any]], export: Export) -> None:
    """Raise a UserError for options that contradict each other or do not fit the run."""
    stage, wise_ft = export.stage, export.wise_ft
    if stage is not None and not 0 <= stage < len(stages):
        raise UserError(f"--stage {stage} is not one of the stages of {run}, 0 to {len(stages) - 1}")
    if stage is not None and export.average:
        raise UserError(f"--average uses all stages, and --stage {stage} only one; leave one of them out")
    if export.is_multistage and (export.as_transformers or wise_ft is not None):
        option = "--as-transformers" if export.as_transformers else "--wise-ft"
        raise UserError(f"{option} is for one model, and the run has {len(stages)} stages; add --stage K or --average")
    if wise_ft is not None and not 0 <= wise_ft <= 1:
        raise UserError(f"--wise-ft {wise_ft} must be between 0 and 1, the share of the stage")
    if export.base and wise_ft is None:
        raise UserError(f"--base {export.base} has no effect without --wise-ft; add it with a share, such as 0.5")
    if export.compact and not export.is_multistage:
        raise UserError("--compact writes weights that several stages share once; leave it out for a single model")
    if not export.average and (wise_ft is None or export.base):
        return
    # Averages make sense only between models that were fine-tuned from the same weights.
    used = range(1, len(stages) if stage is None else stage + 1)
    if fresh := [s for s in used if stages[s].get("start") == "scratch"]:
        option = "--average" if export.average else f"--wise-ft {wise_ft}"
        raise UserError(
            f"{option} is for stages that were fine-tuned from one another, and stage {fresh[0]} of {run} starts "
            f"from new random weights; export a multistage model, or one stage with --stage K"
        )


def _check_folder(folder: Path) -> None:
    """Raise a UserError unless a folder is new, empty or an earlier export."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    readme = folder / "README.md"
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()} - {readme.name}
    others = sorted(name for name in files if not is_export_file(name))
    if others or not readme.is_file() or MARKER not in readme.read_text(encoding="utf-8", errors="replace"):
        example = f", such as {others[0]}" if others else ""
        raise UserError(f"{folder} holds files that are not an exported model{example}; name a new or empty folder")


def _write_multistage(run: Path, folder: Path, export: Export) -> dict[str, float]:
    model = find_models(str(run))[0].load()
    if not isinstance(model, MultistageCLIP):
        raise TypeError(f"the combined model of {run} is a {type(model).__name__}")
    model.save(folder, compact=export.compact)
    if not model.has_texts:
        return _check_images_alone(folder, model)
    from mcl_clip.publish.hf_clip import transformers_features, write_transformers_files  # imports for a second

    write_transformers_files(folder, model)
    inputs, loaded = (model.image_transform, model.tokenizer), MultistageCLIP.load(folder)
    expected = _features(model, *inputs)
    stage_differences = [
        _difference(_open_clip_features(folder / f"stage_{s}"), _features(stage, *inputs))
        for s, stage in enumerate(model.stages)
        if s == 0 or not export.compact  # plain open_clip does not load the other stages of a compact export
    ]
    return {
        "mcl_clip": _difference(_features(loaded, loaded.image_transform, loaded.tokenizer), expected),
        "open_clip": max(stage_differences),
        "transformers": _difference(transformers_features(folder, _check_images(), CHECK_TEXTS), expected),
    }


def _write_single(clip: ClipBundle, folder: Path, export: Export) -> dict[str, float]:
    from mcl_clip.publish.hf_clip import transformers_features, write_clip_model  # imports for a second

    if not clip.has_texts:
        return _write_image_model(clip, folder, export)
    inputs = clip.image_transform, clip.tokenizer
    if export.as_transformers:
        write_clip_model(folder, clip)
        size = clip.preprocess_cfg["size"]
        width_height = (size, size) if isinstance(size, int) else tuple(size)[::-1]
        images = {
            "transformers": _check_images([width_height] * len(CHECK_SIZES)),  # nothing to resize
            TRANSFORMERS_RESIZED: _check_images(),
        }
        return {
            library: _difference(
                transformers_features(folder, batch, CHECK_TEXTS), _features(clip.model, *inputs, batch)
            )
            for library, batch in images.items()
        }
    expected = _features(clip.model, *inputs)
    write_open_clip_folder(
        folder, clip.model, model_cfg=clip.model_cfg, preprocess_cfg=clip.preprocess_cfg, tokenizer=clip.tokenizer
    )
    loaded = load_clip(folder)
    return {
        "mcl_clip": _difference(_features(loaded.model, loaded.image_transform, loaded.tokenizer), expected),
        "open_clip": _difference(_open_clip_features(folder), expected),
    }


def _check_images_alone(folder: Path, model: MultistageCLIP) -> dict[str, float]:
    """Load a multistage model without a text tower back, and compare its image features."""
    loaded = MultistageCLIP.load(folder)
    return {"mcl_clip": _image_difference(loaded, loaded.image_transform, model, model.image_transform)}


def _write_image_model(clip: ClipBundle, folder: Path, export: Export) -> dict[str, float]:
    """Write a model without a text tower, whose trunk timm and transformers load as well, if the stem is theirs."""
    if export.as_transformers:
        raise UserError(
            "--as-transformers writes a CLIPModel, and this model has no text tower; leave it out: the AutoModel of "
            "transformers loads the export as it is, unless the stem is that for small images"
        )
    write_image_folder(folder, clip.model, model_cfg=clip.model_cfg, preprocess_cfg=clip.preprocess_cfg)
    loaded, expected = load_clip(folder), (clip.model, clip.image_transform)
    differences = {"mcl_clip": _image_difference(loaded.model, loaded.image_transform, *expected)}
    if (folder / TIMM_CONFIG_NAME).is_file():
        trunk = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
        differences["timm"] = _image_difference(trunk, clip.image_transform, *expected)
    return differences


@torch.inference_mode()
def _image_difference(
    model: Any, transform: Callable[[Image.Image], Tensor], other: Any, other_transform: Callable[[Image.Image], Tensor]
) -> float:
    """Return the largest difference of a coordinate of the normalized features of the check images."""
    features = [
        getattr(each.eval(), "encode_image", each)(torch.stack([own(image) for image in _check_images()]))
        for each, own in ((model, transform), (other, other_transform))
    ]
    return float((normalized(features[0]) - normalized(features[1])).abs().max())


def _single_model(run: Path, stages: Sequence[Mapping[str, Any]], export: Export) -> ClipBundle:
    """Load one stage or the mean of all, interpolated with the base if asked for."""
    if export.is_final:
        clip = load_clip(run / COMBINED / "model" / "stage_0")
    else:
        used = range(len(stages)) if export.stage is None else [export.stage]
        clips = [_load_single(f"{run}/stage-{s}") for s in used]
        clip = mix_weights(clips, [1 / len(clips)] * len(clips))
    if export.wise_ft is None:
        return clip
    if export.base:
        base = _load_single(export.base)
    else:
        settings = read_run_config(run)["tower"]
        tower = TowerConfig(**settings | {"image_size": tuple(settings.get("image_size", ()))})
        if not tower.is_pretrained:
            raise UserError(
                f"--wise-ft interpolates with the weights that the run started from, and {run} started from random "
                f"ones; name others by --base, such as {run}/stage-0"
            )
        base = create_tower(tower)
    return mix_weights([base, clip], [1 - export.wise_ft, export.wise_ft])


def _load_single(name: str) -> ClipBundle:
    loaded = find_models(name)[0].load()
    if isinstance(loaded, MultistageCLIP):
        raise UserError(f"--base must be a single model, and {name} has several stages; name one as RUN/stage-K")
    return loaded


def _weights_text(stages: Sequence[object], export: Export) -> str:
    """Describe for the card how averaged or interpolated weights were made; empty for those of a stage."""
    mean = f"the mean of the weights of stages 0 to {len(stages) - 1}" if export.average else ""
    if export.wise_ft is None:
        return mean
    base = f"the weights of {Path(export.base).name}" if export.base else "the weights that the run started from"
    tuned = mean or ("the final model" if export.is_final else f"those of stage {export.stage}")
    return f"{1 - export.wise_ft:g} of {base} and {export.wise_ft:g} of {tuned} (WiSE-FT)"


def _open_clip_features(folder: Path) -> Features:
    """Compute the check features as plain open_clip does from a folder."""
    name = f"local-dir:{folder}"
    with torch.random.fork_rng(devices=[]):  # open_clip initializes weights with the global generator
        model, _, transform = open_clip.create_model_and_transforms(name, require_pretrained=True, weights_only=True)
    return _features(model, transform, open_clip.get_tokenizer(name))


@torch.inference_mode()
def _features(
    model: nn.Module,
    transform: Callable[[Image.Image], Tensor],
    tokenizer: Callable[..., Tensor],
    images: Sequence[Image.Image] | None = None,
) -> Features:
    """Compute un-normalized features of the check texts, and of `images` or the check images."""
    model.eval()
    encode_image, encode_text = model.encode_image, model.encode_text
    pixels = torch.stack([transform(image) for image in images or _check_images()])
    return encode_image(pixels), encode_text(tokenizer(list(CHECK_TEXTS)))  # type: ignore[operator]


def _difference(features: Features, expected: Features) -> float:
    """Return the largest difference of a coordinate of the normalized features."""
    pairs = zip(features, expected, strict=True)
    return max(float((normalized(one) - normalized(other)).abs().max()) for one, other in pairs)


def _check_images(sizes: Sequence[tuple[int, int]] = CHECK_SIZES) -> list[Image.Image]:
    """Generate color noise of the given widths and heights, smooth enough to survive resizing."""
    images = []
    for number, size in enumerate(sizes):
        words = random_words(8 * 8 * 3, "pictures of the export check", number)
        noise = Image.fromarray((words % 256).astype(np.uint8).reshape(8, 8, 3))
        images.append(noise.resize(size, Image.Resampling.BICUBIC))
    return images
