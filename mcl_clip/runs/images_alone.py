"""What a run of images alone, without captions, cannot do, and what its views make the model invariant to."""

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict

from mcl_clip.config import RunConfig, StageConfig
from mcl_clip.core.errors import UserError
from mcl_clip.eval.task import Task
from mcl_clip.results.training import invariances

logger = logging.getLogger(__name__)

COLOR_WORD = re.compile(r"colou?rs?|red|green|blue|yellow|orange|purple|pink|brown|cyan|magenta|gr[ae]y|black|white")
HUES = ("saturation", "hue", "color (gray views)")  # invariances that take colors away


def check_images_alone(config: RunConfig) -> None:
    """Raise UserError for settings that need captions in a run without them, or the other way round."""
    for s, stage in enumerate(config.stages):
        loss = stage.train.loss
        if (loss == "simclr") != config.tower.images_only and stage.train.steps:
            way_out = (
                "use simclr, or add --tower.text"
                if config.tower.images_only
                else "leave out --tower.text, or use clip or siglip for pairs"
            )
            raise UserError(
                f"--stages.{s}.train.loss {loss} is for {'images alone' if loss == 'simclr' else 'pairs'}, and the "
                f"model is {config.tower.name}, {'without' if config.tower.images_only else 'with'} a text tower; "
                f"{way_out}"
            ).on_every_process()
    if config.tower.images_only and (problem := next(_problems(config), "")):
        raise UserError(
            f"{problem}, and {config.tower.name} without --tower.text learns from images alone"
        ).on_every_process()


def _problems(config: RunConfig) -> Iterator[str]:
    """Name the settings that need captions or a text tower, each with a way out."""
    data = config.data
    for option, value in (("caption-key", data.caption_key), ("negatives-key", data.negatives_key),
                          ("text-member", data.text_member)):  # fmt: skip
        if value:
            yield f"--data.{option} {value} reads captions (leave it out)"
    if config.combine not in ("mean_cosine", "concat"):
        yield f"--combine {config.combine} is fitted to captions of held-out rows (use mean_cosine or concat)"
    for s, stage in enumerate(config.stages):
        yield from (f"--stages.{s}.{problem}" for problem in _stage_problems(stage))


def _stage_problems(stage: StageConfig) -> Iterator[str]:
    train, cluster = stage.train, stage.cluster
    if cluster.on != "image":
        yield f"cluster.on {cluster.on} clusters captions (use image)"
    if cluster.metric != "cosine":
        yield f"cluster.metric {cluster.metric} weighs what images and captions share (use cosine)"
    if train.lock.text or train.lock.text_unlocked_groups is not None:
        yield "train.lock.text freezes a text tower (leave it out)"
    if train.distill.weight:
        yield f"train.distill.weight {train.distill.weight:g} distills similarities with captions (use 0)"
    if train.decode.weight:
        yield f"train.decode.weight {train.decode.weight:g} decodes sentence features of captions (use 0)"
    if train.lora.rank:
        yield f"train.lora.rank {train.lora.rank} is for towers of open_clip (use 0)"
    if train.mask_similar and train.similar_by == "text":
        yield "train.similar-by text compares captions (use image)"
    if train.augment.views:
        yield f"train.augment.views {train.augment.views} fixes the views, of which each epoch draws new ones (use 0)"


def report_invariances(config: RunConfig, tasks: Mapping[str, Task]) -> None:
    """Log what the views of each stage vary, and warn of sets of colors where they vary those."""
    if not config.tower.images_only:
        return
    for s, stage in enumerate(config.stages):
        varied = invariances(asdict(stage.train.augment))
        logger.info("stage %d: views vary %s; the model becomes invariant to it", s, ", ".join(varied) or "nothing")
        taken = [name for name in varied if name in HUES]
        for name, task in tasks.items() if taken else ():
            classes = getattr(task.data, "classnames", ())
            named = sum(bool(COLOR_WORD.fullmatch(each.lower())) for each in classes)
            if COLOR_WORD.search(name.lower()) or named > len(classes) / 2:
                logger.warning(
                    "stage %d: views vary %s, to which the model becomes invariant, and the set %s is of colors; leave "
                    "out --stages.%d.train.augment.grayscale and the last two of jitter if it should tell them apart",
                    *(s, " and ".join(taken), name, s),
                )
