"""Describe how a run was trained, as tables: its models, data, stages and hardware."""

import re
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

from mcl_clip.results.record import RunRecord, StageRecord
from mcl_clip.results.text import NOT_MEASURED, NOT_STATED, SIDE_NAMES, format_bytes, format_duration, public_name, safe

SHARPNESS = {"blur": "sharpness (blur)", "solarize": "inversion (solarized views)"}
NEGATIVES = {
    "labels": "the same clusters",
    "none": "all pairs",
    "random": "random groups",
    "others": "all other clusters",
}
LOSSES = {"clip": "InfoNCE", "siglip": "sigmoid", "simclr": "InfoNCE between views (NT-Xent)"}


def stage_rows(run: RunRecord) -> list[list[str]]:
    """Return the training of all stages, a column for each; rows that are empty for all stages are left out."""
    columns = [_stage_column(run, number, stage) for number, stage in enumerate(run.stages)]
    rows = [
        [_titled(run, text) for text in (name, *(column[name] or "-" for column in columns))] for name in columns[0]
    ]
    titles = ["", *(f"stage {number}" for number in range(len(columns)))]
    return [titles, *(row for row in rows if set(row[1:]) != {"-"})]


def _titled(run: RunRecord, text: str) -> str:
    """Return the title or a cell of a table, with images in place of pairs in a run without captions."""
    return text.replace("pair", "image") if run.images_only else text


def _stage_column(run: RunRecord, number: int, stage: StageRecord) -> dict[str, str]:
    """Return the cells of a stage by row title; those of training are empty where nothing is trained."""
    train, groups = stage.train_settings, stage.groups
    planned = int(train.get("steps", 0))
    column = {
        "starts from": _start(run, number),
        "steps": f"{planned:,}" if planned else "0 (not trained)",
        "weights kept": _kept(stage.best, planned),
        **dict.fromkeys(("global batch, pairs", "pairs seen", "learning rate", "loss", "distilled", "decoded"), ""),
        **dict.fromkeys(("final loss", "precision"), ""),
        "made invariant to": ", ".join(invariances(train.get("augment", {}))) if train.get("loss") == "simclr" else "",
        "frozen": _frozen(train),
        **dict.fromkeys(("negatives from", "groups", "pairs in merged groups", "negatives per pair"), ""),
        "clusters after it": _clusters(stage.settings.get("cluster", {})),
        "pairs that could not be decoded": f"{len(stage.bad_rows):,}" if stage.steps else "",
        "training time": format_duration(stage.steps[-1]["seconds"]) if stage.steps else "",
    }
    if planned:
        if stage.state("train") != "done":
            done = int(stage.steps[-1]["step"]) if stage.steps else 0
            column["steps"] = f"{done:,} of {planned:,}, not finished"
        warmup = f", {train['warmup_steps']:,} warm-up steps" if train.get("warmup_steps") else ""
        distill, decode = train.get("distill", {}), train.get("decode", {})
        epsilon, decay = train.get("ifm_epsilon"), train.get("average_decay")
        column |= {
            "global batch, pairs": f"{train.get('global_batch_size', 0):,}",
            "learning rate": f"{train.get('lr', 0):g}, {safe(train.get('schedule', ''))}{warmup}",
            "loss": LOSSES.get(train.get("loss", ""), safe(train.get("loss", "")))
            + (f", temperature {train['temperature']:g}" if train.get("loss") == "simclr" else "")
            + (f" with implicit feature modification, epsilon {epsilon:g}" if epsilon else "")
            + (f", weights averaged with decay {decay:g}" if decay else ""),
            "distilled": f"weight {distill['weight']:g}, temperature {distill['temperature']:g}"
            if distill.get("weight")
            else "",
            "decoded": f"sentence features, weight {decode['weight']:g}" if decode.get("weight") else "",
            "precision": safe(train.get("precision", "")),
            "negatives from": _negatives(train) if number else "",
        }
    if stage.steps:
        last_tenth = stage.steps[-max(1, len(stage.steps) // 10) :]
        column |= {
            "pairs seen": f"{int(stage.steps[-1]['samples_seen']):,}",
            "final loss": f"{fmean(record['loss'] for record in last_tenth):.3f}",
            "negatives per pair": f"{fmean(record['negatives_per_row'] for record in last_tenth):.0f}",
        }
    if groups:
        median = f", median {groups['median']:,.0f} pairs" if "median" in groups else ""
        column["groups"] = f"{groups['num_groups']:,}{median}" if groups.get("num_groups", 0) > 1 else "1"
        column["pairs in merged groups"] = f"{groups['rows_relaxed']:,}"
    return column


def _negatives(train: Mapping[str, Any]) -> str:
    """Describe which rows are contrasted with each other."""
    share = train.get("own_group_share", 1)
    rest = f" for {100 * share:.0f} % of the loss, all pairs for the rest" if share < 1 else ""
    return f"{NEGATIVES.get(train.get('groups', ''), '')}{rest}"


def _start(run: RunRecord, number: int) -> str:
    """Name the weights that a stage started from."""
    pretrained = pretrained_text(run.config.get("tower", {}))
    start = run.stages[number].settings.get("start", "previous")
    if number and start == "previous":
        return f"stage {number - 1}"
    if number and start == "base" and not pretrained:
        return "stage 0"
    return pretrained or "random weights"


def invariances(augment: Mapping[str, Any]) -> list[str]:
    """Name what the views of a stage vary by its augmentation, hence what a contrastive loss between them removes."""
    (low, _), jitter = augment.get("scale", (1, 1)), augment.get("jitter", (0, 0, 0, 0))
    names = [f"size and position (crops from {100 * low:.0f} % of the area)"] if low < 1 else []
    names += ["left and right (flips)"] if augment.get("horizontal_flip") else []
    if augment.get("jitter_probability"):
        named = zip(("brightness", "contrast", "saturation", "hue"), jitter, strict=True)
        names += [name for name, strength in named if strength]
    names += ["color (gray views)"] if augment.get("grayscale") else []
    return names + [title for name, title in SHARPNESS.items() if augment.get(name)]


def pretrained_text(tower: Mapping[str, Any]) -> str:
    """Name the weights that a run started from; empty for random ones."""
    architecture, weights = str(tower.get("architecture", "")), str(tower.get("pretrained", ""))
    if tower.get("image"):
        if not tower.get("text"):
            name, _, file = str(tower["image"]).partition("=")
            return "" if file == "random" else f"{public_name(name.partition(':')[2])}, with a random projection head"
        names = (str(tower["image"]).partition("=")[0], str(tower.get("text", "")))
        image, text = (public_name(name.partition(":")[2]) for name in names)
        return f"{image} and {text}, joined by random projection heads"
    kind, _, name = architecture.partition(":")
    if kind in ("hf-hub", "local-dir"):
        return f"{public_name(name)}{' (a local folder)' if kind == 'local-dir' else ''}"
    return f"{public_name(architecture or 'a model')}, weights {public_name(weights)}" if weights else ""


def _kept(best: Mapping[str, Any], planned: int) -> str:
    """Say which weights a stage kept as the best by its evaluations, and where it stopped early."""
    if not best:
        return ""
    stopped = f"; stopped at {best['last_step']:,}" if best["last_step"] < planned else ""
    return f"step {best['step']:,}, {safe(best['metric'])} {best['value']:.4g}{stopped}"


def _frozen(train: Mapping[str, Any]) -> str:
    lock, lora = train.get("lock") or {}, train.get("lora") or {}
    patterns, parts = lock.get("patterns") or (), ["text tower"] if lock.get("text") else []
    for side in ("text", "image"):
        if (groups := lock.get(f"{side}_unlocked_groups")) is not None:
            parts.append(f"{side} tower except its last {groups} layer groups")
    if lora.get("rank"):
        towers = "both towers" if lora["towers"] == "both" else f"{lora['towers']} tower"
        parts.append(f"{towers} except for LoRA of rank {lora['rank']}")
    return "; ".join([*parts, *(f"names that match {safe(pattern)}" for pattern in patterns)])


def _clusters(settings: Mapping[str, Any]) -> str:
    number, side = settings.get("num_clusters"), settings.get("on", "")
    if number is None:
        return ""
    metric = f"{safe(settings['metric'])} metric" if "metric" in settings else "cosine"
    metric += ", of stage 0" if settings.get("features") == "base" else ""
    if side == "product":
        return f"{number:,} of images, {settings.get('text_clusters') or number:,} of texts, {metric}"
    return f"{number:,} of {SIDE_NAMES.get(side, 'images')}, {metric}"


def clip_text(model_cfg: Mapping[str, Any]) -> str:
    """Describe the image and text tower of a model, or the image tower alone."""
    vision, text = model_cfg.get("vision_cfg", {}), model_cfg.get("text_cfg", {})
    layers, text_layers = vision.get("layers", 12), int(text.get("layers", 12))
    if timm := vision.get("timm_model_name"):
        image_tower = safe(timm)
    elif isinstance(layers, list):
        image_tower = f"ResNet of {'+'.join(str(int(number)) for number in layers)} blocks"
    else:
        blocks = f"{int(layers)} block{'s' if int(layers) > 1 else ''}"
        image_tower = f"ViT of {blocks}, patches of {int(vision.get('patch_size', 16))} px"
    if "width" in vision and not timm:
        image_tower += f", width {int(vision['width'])}"
    if not text:
        stem = ", stem for small images" if vision.get("stem") == "cifar" else ""
        widths = (vision.get("model_args") or {}).get("channels")
        narrow = f", widths {'-'.join(str(int(width)) for width in widths)}" if widths else ""
        return f"image tower: {image_tower}{narrow}{stem}; no text tower"
    blocks = f"{text_layers} block{'s' if text_layers > 1 else ''}"
    hf_name, width = text.get("hf_model_name"), int(text.get("width", 512))
    text_tower = public_name(hf_name) if hf_name else f"transformer of {blocks}, width {width}"
    return f"image tower: {image_tower}; text tower: {text_tower}"


def data_rows(run: RunRecord) -> list[list[str]]:
    """Return counts of the training data, below an empty title row; only that before it is indexed."""
    if run.index is None:
        return [["", ""]]
    skipped = ", ".join(f"{safe(reason)} {count:,}" for reason, count in run.index.skipped_by_reason().items())
    shards = run.index.shards
    rows = [
        ["", ""],
        ["pairs", f"{len(run.index):,}"],
        ["captions", safe(run.index.text_counts())],
        ["held out, to fit the temperature", f"{run.held_out_rows:,}" if run.held_out_rows else NOT_STATED],
        ["shards", f"{len(shards):,}, {format_bytes(sum(shard.size for shard in shards))}"],
        ["digest of keys and sizes", safe(run.index.digest)],
        ["samples that are not pairs, skipped", skipped or "none"],
    ]
    if run.images_only:
        return [[_titled(run, title), text] for title, text in rows if not title.startswith(("captions", "held out"))]
    return rows


def machine_rows(run: RunRecord) -> list[list[str]]:
    """Return the hardware, software and time of a run, below an empty title row."""
    starts, rows = run.launches, [["", ""]]
    if starts:
        names = dict.fromkeys(name for start in starts for name in start.get("versions", {}))
        versions = [f"{safe(name)} {_all(start.get('versions', {}).get(name) for start in starts)}" for name in names]
        # Runs of earlier versions did not record the name of the device, but `cuda:0`.
        devices = (start.get("device_name") or str(start.get("device", "")).partition(":")[0] for start in starts)
        days = sorted({day[0] for start in starts if (day := re.match(r"\d{4}-\d\d-\d\d", str(start.get("time"))))})
        rows += [
            ["processes", _all(start.get("processes") for start in starts)],
            ["device", _all(devices)],
            ["threads per process", _all(start.get("threads") for start in starts)],
            ["software", ", ".join([f"Python {_all(start.get('python') for start in starts)}", *versions])],
            ["started", f"{len(starts)} times" if len(starts) > 1 else "once"],
            ["dates", " to ".join(dict.fromkeys((days[0], days[-1]))) if days else NOT_STATED],
        ]
    seconds = run.training_seconds
    return [
        *rows,
        ["training time, all stages", NOT_MEASURED if seconds is None else format_duration(seconds)],
        ["seed", f"{run.config.get('seed', 0)}"],
        ["time of embedding, clustering and evaluation", NOT_MEASURED],
        ["energy, emissions", NOT_MEASURED],
    ]


def _all(values: Iterable[Any]) -> str:
    """Join the different values, in order."""
    return " and ".join(dict.fromkeys(safe(value) for value in values if value not in (None, ""))) or NOT_STATED
