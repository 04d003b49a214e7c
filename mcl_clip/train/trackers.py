"""Experiment trackers beside `metrics.jsonl`: TensorBoard, Weights & Biases, trackio and MLflow, through Accelerate.

After a restart the same run of a tracker is resumed and no step is logged twice. A tracker that fails is closed with
one warning and never stops the training.
"""

import logging
import math
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from jaxtyping import UInt8

from mcl_clip.core.errors import UserError
from mcl_clip.core.files import read_json, write_json

FOLDER = "trackers"
Values = Mapping[str, float]
Tables = Mapping[str, Sequence[Sequence[str]]]
Images = Mapping[str, UInt8[np.ndarray, "height width 3"]]

_NOT_FOR_MLFLOW = re.compile(r"[^\w\-. :/]")  # recall@1
logger = logging.getLogger(__name__)


def check_trackers(names: Sequence[str]) -> None:
    """Check that trackers are installed; raise UserError that names the package to install."""
    for name in names:
        if find_spec(name) is None:
            raise UserError(
                f"--machine.trackers {name}: the package {name} is not installed; pip install 'mcl_clip[{name}]', or "
                f"leave it out"
            ).on_every_process()


class Trackers:
    """The trackers of a run, on the main process. Without names it does nothing."""

    def __init__(
        self,
        names: Sequence[str] = (),
        *,
        run_dir: Path | None = None,
        project: str = "mcl_clip",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Store the settings, with a `config` without secrets; `start` opens the trackers.

        Local files of trackers go to the folder `trackers` of the run directory.
        """
        self._names, self._run_dir, self._project = tuple(names), run_dir or Path(), project
        self._config = dict(_flat(config or {}))
        self._state_path = self._run_dir / FOLDER / "state.json"
        self._state: dict[str, Any] = {}
        self._open: dict[str, GeneralTracker] = {}

    def start(self) -> None:
        """Open the trackers, or resume their runs."""
        if self._names:
            new = {"id": uuid.uuid4().hex[:12], "step": -1}
            self._state = read_json(self._state_path) if self._state_path.exists() else new
        for name in self._names:
            self._try(name, partial(self._start, name))

    def _start(self, name: str) -> None:
        tracker = _create(name, self._run_dir, self._project, self._state)
        tracker.start()
        self._open[name] = tracker
        if name == "mlflow":
            self._state["mlflow"] = tracker.tracker.info.run_id
        if name not in self._state.setdefault("configured", []):
            if isinstance(tracker, TensorBoardTracker):  # its hparams would add a second run to the list
                text = "\n".join(f"    {option}: {value}" for option, value in self._config.items())
                tracker.writer.add_text("config", text)
            else:
                tracker.store_init_configuration(dict(self._config))
            self._state["configured"].append(name)
        write_json(self._state_path, self._state)

    def log(self, values: Values, *, step: int) -> None:
        """Log metrics of a training step, counted over all stages, unless they were logged before a restart."""
        if self._open and step > self._state["step"]:
            self._each(lambda tracker: tracker.log(_finite(values), step=step))
            self._state["step"] = step
            write_json(self._state_path, self._state)

    def log_stage(self, values: Values, *, step: int, tables: Tables, images: Images, page: Path | None = None) -> None:
        """Log final metrics, tables (header first) and images of a stage, and the HTML report where files are stored.

        `step` is counted over all stages.
        """
        self._each(lambda tracker: SHOW[tracker.name](tracker, _finite(values), step, tables, images, page))

    def finish(self) -> None:
        """Close all open trackers."""
        self._each(lambda tracker: tracker.finish())
        self._open.clear()

    def __bool__(self) -> bool:
        return bool(self._open)

    def _each(self, action: Callable[[GeneralTracker], object]) -> None:
        for name, tracker in list(self._open.items()):
            self._try(name, partial(action, tracker))

    def _try(self, name: str, action: Callable[[], object]) -> None:
        """Run `action`; on an error close the tracker and continue without it."""
        try:
            action()
        except Exception as error:  # network, server, full disk: none may stop the run
            if (broken := self._open.pop(name, None)) is not None:
                with suppress(Exception):
                    broken.finish()
            logger.warning("%s: %s: %s; the run continues without it", name, type(error).__name__, error)


def _create(name: str, run_dir: Path, project: str, state: Mapping[str, Any]) -> GeneralTracker:
    folder, run_name = run_dir / FOLDER, run_dir.resolve().name
    if name == "tensorboard":
        return TensorBoardTracker(run_name, logging_dir=str(folder / "tensorboard"))
    if name == "wandb":
        return WandBTracker(project, name=run_name, id=state["id"], resume="allow", dir=str(folder))
    if name == "trackio":
        return TrackioTracker(project, name=f"{run_name}-{state['id']}", resume="allow", embed=False)
    import mlflow

    location = None
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        mlflow.set_tracking_uri(f"sqlite:///{(folder / 'mlflow.db').resolve()}")
        location = (folder / "mlflow").resolve().as_uri()
    return MLflowTracker(project, logging_dir=location, run_id=state.get("mlflow"), run_name=run_name)


def _to_tensorboard(tracker: Any, values: Values, step: int, tables: Tables, images: Images, _: Path | None) -> None:
    tracker.log(values, step=step)
    for title, (header, *rows) in tables.items():
        lines = [[cell.replace("|", "\\|") for cell in row] for row in (header, ["---"] * len(header), *rows)]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        tracker.writer.add_text(title, text, global_step=step)
    for title, image in images.items():
        tracker.writer.add_image(title, image, global_step=step, dataformats="HWC")
    tracker.writer.flush()


def _to_wandb(tracker: Any, values: Values, step: int, tables: Tables, images: Images, page: Path | None) -> None:
    import wandb

    shown = {title: wandb.Table(columns=list(rows[0]), data=list(rows[1:])) for title, rows in tables.items()}
    shown |= {title: wandb.Image(image) for title, image in images.items()}
    shown |= {"report": wandb.Html(str(page), inject=False)} if page else {}
    tracker.log({**values, **shown}, step=step)


def _to_trackio(tracker: Any, values: Values, step: int, tables: Tables, images: Images, _: Path | None) -> None:
    import pandas
    import trackio

    frames = {title: pandas.DataFrame(rows[1:], columns=rows[0]) for title, rows in tables.items()}
    shown = {title: trackio.Table(dataframe=frame) for title, frame in frames.items()}
    shown |= {title: trackio.Image(image) for title, image in images.items()}
    tracker.log({**values, **shown}, step=step)


def _to_mlflow(tracker: Any, values: Values, step: int, tables: Tables, images: Images, page: Path | None) -> None:
    import mlflow

    def file_name(title: str) -> str:
        return f"{''.join(c if c.isalnum() else '-' for c in title)}-step-{step}"

    tracker.log({_NOT_FOR_MLFLOW.sub("_", name): value for name, value in values.items()}, step=step)
    for title, (header, *rows) in tables.items():
        columns = {column or "model": [row[number] for row in rows] for number, column in enumerate(header)}
        mlflow.log_table(columns, artifact_file=f"{file_name(title)}.json")
    for title, image in images.items():
        mlflow.log_image(image, artifact_file=f"{file_name(title)}.png")
    if page:
        mlflow.log_artifact(str(page))


SHOW = {"tensorboard": _to_tensorboard, "wandb": _to_wandb, "trackio": _to_trackio, "mlflow": _to_mlflow}


def _finite(values: Values) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested settings with dotted names; lists of plain values become text."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        for number, item in enumerate(value):
            yield from _flat(item, f"{name}.{number}")
    else:
        yield name, value if isinstance(value, bool | int | float | str) else str(value)
