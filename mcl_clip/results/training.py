"""How a run was made, as tables: its towers, its data, its stages, its machine."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mcl_clip.results.record import RunRecord, Stage
from mcl_clip.results.text import NOT_MEASURED, NOT_STATED, duration, public_name, safe, size, table

NEGATIVES = {"labels": "the same clusters", "none": "everywhere", "random": "random groups"}


def stage_table(run: RunRecord) -> str:
    """How each stage was trained: a column a stage, without lines that say nothing."""
    return table(stage_rows(run))


def stage_rows(run: RunRecord) -> list[list[str]]:
    """The rows of `stage_table`, the title row first."""
    columns = [_stage_column(run, number, stage) for number, stage in enumerate(run.stages)]
    names = [name for name in columns[0] if any(column[name] for column in columns)]
    rows = [[name, *(column[name] or "-" for column in columns)] for name in names]
    return [["", *(f"stage {number}" for number in range(len(columns)))], *rows]


def _stage_column(run: RunRecord, number: int, stage: Stage) -> dict[str, str]:
    train = stage.settings.get("train", {})
    return {
        "starts from": start_text(run, number),
        **_steps(stage, train),
        "learning rate": _learning_rate(train) if train.get("steps") else "",
        "loss": _loss(train) if train.get("steps") else "",
        "loss at the end": f"{_mean(stage, 'loss'):.3f}" if stage.steps else "",
        "precision": safe(train.get("precision", "")) if train.get("steps") else "",
        "locked": locked_text(train.get("lock", {})),
        "negatives from": NEGATIVES.get(train.get("groups", ""), "") if number and train.get("steps") else "",
        **_groups(stage),
        "clusters found after it": _clusters(stage.settings.get("cluster", {})),
        "pairs that could not be decoded": f"{stage.bad_samples:,}" if stage.steps else "",
        "training time": duration(stage.steps[-1]["seconds"]) if stage.steps else "",
    }


def _steps(stage: Stage, train: Mapping[str, Any]) -> dict[str, str]:
    planned = int(train.get("steps", 0))
    done = int(stage.steps[-1]["step"]) if stage.steps else 0
    steps = f"{planned:,}" if stage.is_trained or not planned else f"{done:,} of {planned:,}, not finished"
    return {
        "steps": steps if planned else "0 (untouched)",
        "global batch, pairs": f"{train.get('global_batch_size', 0):,}" if planned else "",
        "pairs seen": f"{int(stage.steps[-1]['samples_seen']):,}" if stage.steps else "",
    }


def _learning_rate(train: Mapping[str, Any]) -> str:
    warmup = f", {train['warmup_steps']:,} steps of warm-up" if train.get("warmup_steps") else ""
    return f"{train.get('lr', 0):g}, {safe(train.get('schedule', ''))}{warmup}"


def _loss(train: Mapping[str, Any]) -> str:
    name = {"clip": "InfoNCE", "siglip": "sigmoid"}.get(train.get("loss", ""), safe(train.get("loss", "")))
    epsilon, decay = train.get("ifm_epsilon"), train.get("average_decay")
    name += f" with implicit feature modification, epsilon {epsilon:g}" if epsilon else ""
    return name + (f", weights averaged with decay {decay:g}" if decay else "")


def _mean(stage: Stage, name: str) -> float:
    last = stage.steps[-max(1, len(stage.steps) // 10) :]
    return float(sum(record[name] for record in last) / len(last))


def _groups(stage: Stage) -> dict[str, str]:
    groups = stage.groups
    median = f", median {groups['median']:,.0f} pairs" if "median" in groups else ""
    return {
        "groups": f"{groups['num_groups']:,}{median}" if groups.get("num_groups", 0) > 1 else "1" if groups else "",
        "pairs in merged groups": f"{groups['rows_relaxed']:,}" if groups else "",
        "negatives of a pair": f"{_mean(stage, 'negatives_per_row'):.0f}" if stage.steps else "",
    }


def _clusters(settings: Mapping[str, Any]) -> str:
    number, on = settings.get("num_clusters"), settings.get("on", "")
    if number is None:
        return ""
    metric = f"{safe(settings['metric'])} metric" if "metric" in settings else "cosine"
    if on == "product":
        return f"{number:,} of pictures, {settings.get('text_clusters') or number:,} of texts, {metric}"
    return f"{number:,} of {'texts' if on == 'text' else 'pictures'}, {metric}"


def start_text(run: RunRecord, number: int) -> str:
    """What a stage started from."""
    tower, start = run.config.get("tower", {}), run.stages[number].settings.get("start", "previous")
    pretrained = pretrained_text(tower)
    if number and start == "previous":
        return f"stage {number - 1}"
    if number and start == "base" and not pretrained:
        return "stage 0"
    return pretrained or "random weights"


def pretrained_text(tower: Mapping[str, Any]) -> str:
    """The weights that a run started from; empty if it started from none."""
    architecture, weights = str(tower.get("architecture", "")), str(tower.get("pretrained", ""))
    kind, _, name = architecture.partition(":")
    if kind in ("hf-hub", "local-dir"):
        return f"{public_name(name)}{' (a local folder)' if kind == 'local-dir' else ''}"
    return f"{public_name(architecture or 'a model')}, weights {public_name(weights)}" if weights else ""


def locked_text(lock: Mapping[str, Any]) -> str:
    """Which parameters of a stage did not train."""
    groups, patterns = lock.get("image_unlocked_groups"), lock.get("patterns") or ()
    parts = ["text tower"] if lock.get("text") else []
    parts += [f"image tower but for its last {groups} groups"] if groups is not None else []
    return "; ".join([*parts, *(f"names with {safe(pattern)}" for pattern in patterns)])


def tower_text(model_cfg: Mapping[str, Any]) -> str:
    """The shape of a pair of towers."""
    vision, text = model_cfg.get("vision_cfg", {}), model_cfg.get("text_cfg", {})
    if timm := vision.get("timm_model_name"):
        image = safe(timm)
    elif isinstance(vision.get("layers"), list):
        image = f"ResNet of {'+'.join(str(int(blocks)) for blocks in vision['layers'])} blocks"
    else:
        image = f"ViT of {_blocks(vision)}, patches of {int(vision.get('patch_size', 16))} px"
    width = f", width {int(vision['width'])}" if "width" in vision and "timm_model_name" not in vision else ""
    if named := text.get("hf_model_name"):
        words = public_name(named)
    else:
        words = f"transformer of {_blocks(text)}, width {int(text.get('width', 512))}"
    return f"picture tower: {image}{width}; text tower: {words}"


def _blocks(settings: Mapping[str, Any]) -> str:
    number = int(settings.get("layers", 12))
    return f"{number} block{'s' if number > 1 else ''}"


def input_text(model_cfg: Mapping[str, Any]) -> str:
    """What a pair of towers takes."""
    vision, text = model_cfg.get("vision_cfg", {}), model_cfg.get("text_cfg", {})
    pixels, tokens = vision.get("image_size", 224), text.get("context_length", 77)
    return f"pictures of {safe(pixels)} px and texts of up to {safe(tokens)} tokens"


def held_out(run: RunRecord) -> int:
    """Pairs that never trained."""
    counts = [stage.groups["held_out_rows"] for stage in run.stages if stage.groups]
    return int(counts[0] if counts else run.combination.get("held_out_rows", 0))


def data_table(run: RunRecord, *, datasets: Sequence[str], license: str) -> str:
    """What it was trained on."""
    data, kept = run.data, held_out(run)
    rows = [["", ""]]
    if data is not None:
        skipped = ", ".join(f"{safe(reason)} {count:,}" for reason, count in data.skipped.items())
        rows += [
            ["pairs", f"{data.rows:,}"],
            ["of them held out, to fit the temperature", f"{kept:,}" if kept else NOT_STATED],
            ["shards", f"{data.shards:,}, {size(data.size)}"],
            ["digest of keys and sizes", f"`{data.digest}`"],
            ["samples that are no pairs, left out", skipped or "none"],
        ]
    weights = run.config.get("data", {}).get("weights")
    rows += (
        [["lists of shards are drawn", ", ".join(f"{weight:g}" for weight in weights) + " times"]] if weights else []
    )
    rows += [
        ["data sets on the Hub", ", ".join(map(public_name, datasets)) or NOT_STATED],
        ["licence of the data", "see the data sets" if datasets else NOT_STATED],
        ["licence of the model", safe(license) or NOT_STATED],
    ]
    return table(rows, words=2)


def machine_table(run: RunRecord) -> str:
    """Where, with what and for how long."""
    return table(machine_rows(run), words=2)


def machine_rows(run: RunRecord) -> list[list[str]]:
    """The rows of `machine_table`, the title row first."""
    starts = run.launches
    rows = [["", ""]]
    if starts:
        versions = {name: None for start in starts for name in start.get("versions", {})}
        parts = [f"{safe(name)} {_each(start.get('versions', {}).get(name) for start in starts)}" for name in versions]
        days = sorted({day[0] for start in starts if (day := re.match(r"\d{4}-\d\d-\d\d", str(start.get("time"))))})
        rows += [
            ["processes", _each(start.get("processes") for start in starts)],
            ["device", _each(_device(start) for start in starts)],
            ["threads of a process", _each(start.get("threads") for start in starts)],
            ["software", ", ".join([f"Python {_each(start.get('python') for start in starts)}", *parts])],
            ["started", f"{len(starts)} times" if len(starts) > 1 else "once"],
            ["days", " to ".join(dict.fromkeys((days[0], days[-1]))) if days else NOT_STATED],
        ]
    seconds = [stage.steps[-1]["seconds"] for stage in run.stages if stage.steps]
    rows.append(["time of training, all stages", duration(sum(seconds)) if seconds else NOT_MEASURED])
    rows.append(["seed", f"{run.config.get('seed', 0)}"])
    rows.append(["time of embedding, clustering and evaluation", NOT_MEASURED])
    rows.append(["energy, emissions", NOT_MEASURED])
    return rows


def _device(start: Mapping[str, Any]) -> str:
    """The name of the device of a start, or its kind where runs do not record a name."""
    return str(start.get("device_name") or str(start.get("device", "")).partition(":")[0])


def _each(values: Iterable[Any]) -> str:
    """All different values, in order."""
    return " and ".join(dict.fromkeys(safe(value) for value in values if value not in (None, ""))) or NOT_STATED
