"""The recipe of `mcl-clip finetune`: towers by name, settings that fit the size of the data, and a file that has both.

The settings start from what is usual when CLIP is fine-tuned with its own loss (FLYP, arXiv 2212.00638): AdamW with
rate 1e-5 and weight decay 0.1, cosine decay after warm-up. Small data gets fewer trained layers and smaller batches.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import open_clip

from mcl_clip.config import (
    AugmentConfig,
    DataConfig,
    EvalConfig,
    LockConfig,
    MachineConfig,
    RunConfig,
    StageConfig,
    TowerConfig,
    TrainConfig,
)
from mcl_clip.core.errors import UserError
from mcl_clip.model.clip import HUB, LOCAL
from mcl_clip.model.from_transformers import is_transformers_folder
from mcl_clip.model.open_clip_io import OPEN_CLIP_CONFIG_NAME
from mcl_clip.model.pair import PUBLISHED, TEXT, TIMM, split_image
from mcl_clip.model.resolve import split_architecture
from mcl_clip.tools.finetune_data import TEST, TRAIN, VALIDATION, PreparedData

FEW = 2000  # pictures, below which whole towers memorize them
EPOCHS = ((5_000, 10), (50_000, 6), (500_000, 3), (10**12, 1))  # up to so many pictures, epochs
BATCH = (16, 256)  # smallest and largest
BATCHES_PER_EPOCH = 16  # at least, as long as the batch allows it
RATE, DECAY = 1e-5, 0.1
HEADS_RATE = 1e-3  # of the heads of a pair of towers
LAYER_DECAY = 0.85  # factor on the rate from one block to the one below
UNLOCKED_GROUPS = 3  # of the image tower with few pictures: the last blocks and the projection
WARMUP_SHARE = 0.1
EVALUATIONS = 5  # within the stage
HELD_OUT_SHARE = 0.05  # of the training pictures, to fit the logit scale
BLOCK = re.compile(r"^(.*\.(?:resblocks|blocks|layers|layer))\.(\d+)\.")
BELOW_BLOCKS = (
    r"(^|\.)(conv1|class_embedding|positional_embedding|token_embedding|patch_embed|pos_embed|cls_token|ln_pre)\b"
)
INDENT = "    "


class Default(NamedTuple):
    """A setting that was chosen, as a sentence shows it, and why."""

    setting: str
    reason: str


def find_towers(name: str) -> TowerConfig:
    """Return the towers that a user names: ARCHITECTURE/TAG of open_clip, hf-hub:ORG/NAME, a folder, or a pair.

    A pair of towers is timm:NAME=FILE+hf:FOLDER.

    Raises:
        UserError: if there is no such model, or its weights are not named.
    """
    if name.startswith(TIMM):
        return _find_pair(name)
    folder = Path(name.removeprefix(LOCAL))
    if folder.is_dir():
        if not (folder / OPEN_CLIP_CONFIG_NAME).is_file() and not is_transformers_folder(folder):
            of_run = folder / "train" / "model"  # RUN/stage-K
            if not (of_run / OPEN_CLIP_CONFIG_NAME).is_file():
                raise UserError(
                    f"{folder} holds no model to fine-tune: it has no {OPEN_CLIP_CONFIG_NAME}; name a folder of "
                    f"open_clip or a CLIPModel, RUN/stage-K, ARCHITECTURE/TAG of open_clip or hf-hub:ORG/NAME"
                )
            folder = of_run
        return TowerConfig(architecture=f"{LOCAL}{folder.resolve()}")
    if name.startswith(HUB):
        return TowerConfig(architecture=name)
    others = (
        "name a model as ARCHITECTURE/TAG such as ViT-B-32/laion2b_s34b_b79k, hf-hub:ORG/NAME, or a folder of open_clip"
    )
    architecture, tag = split_architecture(name, others)
    tags = open_clip.list_pretrained_tags_by_model(architecture.replace("/", "-"))
    if tag not in tags:
        raise UserError(f"{architecture} has no weights {tag!r}; its tags are {', '.join(tags) or 'none'}")
    return TowerConfig(architecture=architecture.replace("/", "-"), pretrained=tag)


def _find_pair(name: str) -> TowerConfig:
    image, plus, text = name.partition(f"+{TEXT}")
    if not plus:
        raise UserError(f"{name} is an image tower alone; write timm:NAME=FILE+hf:FOLDER, with a text tower beside it")
    architecture, weights = split_image(image)
    file = "" if weights == PUBLISHED else f"={Path(weights).resolve()}"
    source = Path(text).resolve() if Path(text).is_dir() else text
    return TowerConfig(image=f"{TIMM}{architecture}{file}", text=f"{TEXT}{source}")


def default_recipe(
    run_dir: Path,
    tower: TowerConfig,
    data: PreparedData,
    *,
    given: TrainConfig | None = None,
    trained: Iterable[str] = (),
) -> tuple[RunConfig, list[Default]]:
    """Return a recipe of one stage that fits the data, and why.

    Args:
        run_dir: folder of the run.
        tower: the model that training starts from.
        data: the prepared data.
        given: the training settings of an earlier call, with the user's changes: what depends on them follows.
        trained: names of the parameters that train, for their learning rates.
    """
    pictures = data.pictures[TRAIN]
    held_out = max(2, min(1024, int(HELD_OUT_SHARE * pictures)))
    usual_batch = BATCH[0]
    while 2 * usual_batch <= min(BATCH[1], pictures // BATCHES_PER_EPOCH):
        usual_batch *= 2
    batch = given.global_batch_size if given else usual_batch
    epochs = next(epochs for limit, epochs in EPOCHS if pictures <= limit)
    usual_steps, steps = (epochs * -(-(pictures - held_out) // rows) for rows in (usual_batch, batch))
    if given and given.steps != usual_steps:
        steps = given.steps
    every = max(1, -(-steps // EVALUATIONS))
    rates = layer_rates(trained)
    train = TrainConfig(
        steps=steps, global_batch_size=batch, lr=RATE, warmup_steps=round(WARMUP_SHARE * steps), weight_decay=DECAY,
        lr_multipliers=rates, max_grad_norm=1.0, keep_best=VALIDATION, augment=AugmentConfig(scale=(0.8, 1.0)),
        lock=LockConfig(image_unlocked_groups=UNLOCKED_GROUPS if pictures < FEW else None),
    )  # fmt: skip
    if tower.image:
        lock = LockConfig(image_unlocked_groups=0, text_unlocked_groups=0)
        train = replace(train, lr=HEADS_RATE, augment=AugmentConfig(views=1), lock=lock)
    config = RunConfig(
        run_dir=run_dir,
        tower=tower,
        data=DataConfig(train=(str(data.folder / TRAIN),), holdout_rows=held_out),
        stages=(StageConfig(train=train),),
        eval=EvalConfig(
            retrieval=tuple(f"{name}={data.folder / name}" for name in (VALIDATION, TEST)), every_steps=every
        ),
        machine=MachineConfig(log_steps=max(1, min(10, steps // 20)), save_steps=every),
    )
    rate_reason = "usual for the loss of CLIP from pretrained weights, with a tenth of warm-up"
    if tower.image:
        rate_reason = "for projection heads, which start from random weights"
        locked, why = "both trunks locked, images not augmented", "what the trunks compute is then needed only once"
    elif pictures < FEW:
        locked = f"all but the last {UNLOCKED_GROUPS} layer groups of the image tower locked"
        why = f"fewer than {FEW:,} pictures would be memorized by whole towers"
    else:
        locked, why = "nothing locked", f"{FEW:,} pictures or more can train whole towers"
    defaults = [
        Default(f"{usual_steps:,} steps", f"{epochs} epochs, which is usual for {pictures:,} pictures"),
        Default(
            f"batches of {usual_batch}",
            f"from {BATCH[0]} to {BATCH[1]}, with {BATCHES_PER_EPOCH} batches or more in an epoch where that allows it",
        ),
        Default(f"rate {train.lr:g}", rate_reason),
        Default(locked, why),
        Default(
            "the weights that are best on the validation set", f"of {EVALUATIONS} evaluations and those at the start"
        ),
    ]
    if rates:
        text = f"rate times {LAYER_DECAY:g} from block to block downwards"
        defaults.append(Default(text, "lower blocks have more general features"))
    return config, defaults


def layer_rates(trained: Iterable[str]) -> dict[str, float]:
    """Return multipliers of the learning rate by pattern: `LAYER_DECAY` from each block to the one below it.

    Blocks are recognized by their number in the names of parameters; embeddings count as the block below the first.
    """
    trained = list(trained)
    blocks = {(match[1], int(match[2])) for match in map(BLOCK.match, trained) if match}
    if not blocks:
        return {}
    depth = {stack: max(block for name, block in blocks if name == stack) for stack, _ in blocks}
    rates = {
        rf"^{re.escape(stack)}\.{block}\.": round(LAYER_DECAY ** (depth[stack] - block), 4)
        for stack, block in sorted(blocks)
        if block < depth[stack]
    }
    if any(map(re.compile(BELOW_BLOCKS).search, trained)):
        rates = {BELOW_BLOCKS: round(LAYER_DECAY ** (max(depth.values()) + 1), 4), **rates}
    return rates


def recipe_text(config: RunConfig, *, command: str, defaults: Iterable[Default]) -> str:
    """Return a recipe file for `config`, in whose folder the run is; it sets what differs from the defaults."""
    reasons = "\n".join(f"- {default.setting}: {default.reason}" for default in defaults)
    source = source_of(config, str(config.run_dir.resolve()))
    return (
        f'"""Fine-tuning, as `mcl-clip finetune` has set it up.\n\n    {_in_docstring(command)}\n\n'
        f"`python recipe.py` continues the run in this folder, `python recipe.py --run-dir FOLDER` repeats it in\n"
        f"another one; every setting can be overridden there (--help).\n\n"
        f'What was chosen for the data, before options of the command line:\n\n{_in_docstring(reasons)}\n"""\n\n'
        f"from pathlib import Path\n\nimport mcl_clip as mcl\n\nHERE = Path(__file__).resolve().parent\n\n"
        f'RECIPE = {source}\n\nif __name__ == "__main__":\n    mcl.main(RECIPE)\n'
    )


def _in_docstring(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"""', '\\"\\"\\"')


def source_of(value: Any, here: str, depth: int = 0) -> str:
    """Return Python source of a configuration; paths below the folder `here` are written by `HERE`."""
    inner = INDENT * (depth + 1)
    if is_dataclass(value):
        items = [f"{name}={source_of(item, here, depth + 1)}" for name, item in _changed(value)]
        name = f"mcl.{type(value).__name__}"
        return _call(name, "(", items, ")", inner)
    if isinstance(value, Path):
        return "HERE" if str(value.resolve()) == here else f"Path({source_of(str(value), here)})"
    if isinstance(value, str):
        head, found, tail = value.partition(here)
        is_below = found and tail[:1] in ("", "/") and not re.search(r"[{}]", head + tail)
        return f"f{head + '{HERE}' + tail!r}" if is_below else repr(value)
    if isinstance(value, Mapping):
        items = [f"{key!r}: {source_of(item, here, depth + 1)}" for key, item in value.items()]
        return _call("", "{", items, "}", inner)
    if isinstance(value, tuple | list):
        items = [source_of(item, here, depth + 1) for item in value]
        opening, closing = ("[", "]") if isinstance(value, list) else ("(", ")")
        return _call("", opening, [*items, ""] if len(items) == 1 else items, closing, inner)
    return repr(value)


def _changed(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield the fields of a section that differ from their defaults."""
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(field.default_factory, type):  # of a dictionary or tuple
            default: Any = field.default_factory()
        else:
            default = field.default
        if value != default:
            yield field.name, value


def _call(name: str, opening: str, items: list[str], closing: str, inner: str) -> str:
    """Return a call or a display on one line, or with a line for each item where that is long."""
    line = f"{name}{opening}{', '.join(items).rstrip()}{closing}"
    if len(line) + len(inner) <= 100 and "\n" not in line:
        return line
    body = "".join(f"{inner}{item},\n" for item in items if item)
    return f"{name}{opening}\n{body}{inner[: -len(INDENT)]}{closing}"
