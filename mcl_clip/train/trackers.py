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
from dataclasses import dataclass
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
STATE = "state.json"
Table = Sequence[Sequence[str]]
Picture = UInt8[np.ndarray, "height width 3"]

_NOT_FOR_MLFLOW = re.compile(r"[^\w\-. :/]")  # recall@1
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StageResults:
    """Final metrics, tables and images of a stage; see `Trackers.log_stage`."""

    values: Mapping[str, float]
    step: int
    tables: Mapping[str, Table]
    pictures: Mapping[str, Picture]
    page: Path | None


def check_trackers(names: Sequence[str]) -> None:
    """Check that trackers are installed.

    Raises:
        UserError: naming the package to install.
    """
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
        """Store the settings; `start` opens the trackers.

        Args:
            names: of `tensorboard`, `wandb`, `trackio`, `mlflow`.
            run_dir: the run directory; local files of trackers go to its folder `trackers`.
            project: project or experiment name of the trackers.
            config: the resolved recipe, without secrets.
        """
        self._open: dict[str, GeneralTracker] = {}
        self._names, self._run_dir, self._project = tuple(names), run_dir or Path(), project
        self._config = dict(_flat(config or {}))
        self._state: dict[str, Any] = {}

    def start(self) -> None:
        """Open the trackers, or resume their runs."""
        if not self._names:
            return
        path = self._run_dir / FOLDER / STATE
        self._state = read_json(path) if path.exists() else {"id": uuid.uuid4().hex[:12], "step": -1}
        for name in self._names:
            self._try(name, partial(self._start, name))

    def _start(self, name: str) -> None:
        tracker = OPENERS[name](self._run_dir / FOLDER, self._run_dir.resolve().name, self._project, self._state)
        tracker.start()
        self._open[name] = tracker
        if name == "mlflow":
            self._state["mlflow"] = tracker.tracker.info.run_id
        if name not in self._state.setdefault("configured", []):
            _store_config(tracker, self._config)
            self._state["configured"].append(name)
        self._save()

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Log metrics of a training step, counted over all stages, unless they were logged before a restart."""
        if self._open and step > self._state["step"]:
            self._each(lambda tracker: tracker.log(_finite(values), step=step))
            self._state["step"] = step
            self._save()

    def log_stage(
        self,
        values: Mapping[str, float],
        *,
        step: int,
        tables: Mapping[str, Table],
        pictures: Mapping[str, Picture],
        page: Path | None = None,
    ) -> None:
        """Log final metrics, tables and images of a stage.

        Args:
            values: metrics of the evaluation.
            step: training step, counted over all stages.
            tables: rows by table name, header first.
            pictures: images by name.
            page: the HTML report, for trackers that store files.
        """
        results = StageResults(values=_finite(values), step=step, tables=tables, pictures=pictures, page=page)
        for name in list(self._open):
            self._try(name, partial(SHOW[name], self._open[name], results))

    def finish(self) -> None:
        """Close all open trackers."""
        self._each(lambda tracker: tracker.finish())
        self._open.clear()

    def __bool__(self) -> bool:
        return bool(self._open)

    def _each(self, action: Callable[[GeneralTracker], object]) -> None:
        for name in list(self._open):
            self._try(name, partial(action, self._open[name]))

    def _try(self, name: str, action: Callable[[], object]) -> None:
        """Run `action`; on an error close the tracker and continue without it."""
        try:
            action()
        except Exception as error:  # network, server, full disk: none may stop the run
            if (broken := self._open.pop(name, None)) is not None:
                with suppress(Exception):
                    broken.finish()
            logger.warning("%s: %s: %s; the run continues without it", name, type(error).__name__, error)

    def _save(self) -> None:
        write_json(self._run_dir / FOLDER / STATE, self._state)


def _tensorboard(folder: Path, run_name: str, project: str, state: Mapping[str, Any]) -> GeneralTracker:  # noqa: ARG001
    return TensorBoardTracker(run_name, logging_dir=str(folder / "tensorboard"))


def _wandb(folder: Path, run_name: str, project: str, state: Mapping[str, Any]) -> GeneralTracker:
    return WandBTracker(project, name=run_name, id=state["id"], resume="allow", dir=str(folder))


def _trackio(folder: Path, run_name: str, project: str, state: Mapping[str, Any]) -> GeneralTracker:  # noqa: ARG001
    return TrackioTracker(project, name=f"{run_name}-{state['id']}", resume="allow", embed=False)


def _mlflow(folder: Path, run_name: str, project: str, state: Mapping[str, Any]) -> GeneralTracker:
    import mlflow

    if not os.environ.get("MLFLOW_TRACKING_URI"):
        mlflow.set_tracking_uri(f"sqlite:///{(folder / 'mlflow.db').resolve()}")
    location = None if os.environ.get("MLFLOW_TRACKING_URI") else (folder / "mlflow").resolve().as_uri()
    return MLflowTracker(project, logging_dir=location, run_id=state.get("mlflow"), run_name=run_name)


OPENERS: Mapping[str, Callable[[Path, str, str, Mapping[str, Any]], GeneralTracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
    "mlflow": _mlflow,
}


def _store_config(tracker: GeneralTracker, config: Mapping[str, Any]) -> None:
    if isinstance(tracker, TensorBoardTracker):  # its hparams would add a second run to the list
        tracker.writer.add_text("config", "\n".join(f"    {name}: {value}" for name, value in config.items()))
    else:
        tracker.store_init_configuration(dict(config))


def _to_tensorboard(tracker: GeneralTracker, results: StageResults) -> None:
    tracker.log(dict(results.values), step=results.step)
    for title, rows in results.tables.items():
        tracker.writer.add_text(title, _markdown(rows), global_step=results.step)
    for title, picture in results.pictures.items():
        tracker.writer.add_image(title, picture, global_step=results.step, dataformats="HWC")
    tracker.writer.flush()


def _to_wandb(tracker: GeneralTracker, results: StageResults) -> None:
    import wandb

    tables = {title: wandb.Table(columns=list(rows[0]), data=list(rows[1:])) for title, rows in results.tables.items()}
    pictures = {title: wandb.Image(picture) for title, picture in results.pictures.items()}
    page = {"report": wandb.Html(str(results.page), inject=False)} if results.page else {}
    tracker.log({**results.values, **tables, **pictures, **page}, step=results.step)


def _to_trackio(tracker: GeneralTracker, results: StageResults) -> None:
    import pandas
    import trackio

    frames = {title: pandas.DataFrame(rows[1:], columns=rows[0]) for title, rows in results.tables.items()}
    tables = {title: trackio.Table(dataframe=frame) for title, frame in frames.items()}
    pictures = {title: trackio.Image(picture) for title, picture in results.pictures.items()}
    tracker.log({**results.values, **tables, **pictures}, step=results.step)


def _to_mlflow(tracker: GeneralTracker, results: StageResults) -> None:
    import mlflow

    tracker.log({_NOT_FOR_MLFLOW.sub("_", name): value for name, value in results.values.items()}, step=results.step)
    for title, rows in results.tables.items():
        columns = {column or "model": [row[number] for row in rows[1:]] for number, column in enumerate(rows[0])}
        mlflow.log_table(columns, artifact_file=f"{_file_name(title)}-step-{results.step}.json")
    for title, picture in results.pictures.items():
        mlflow.log_image(picture, artifact_file=f"{_file_name(title)}-step-{results.step}.png")
    if results.page:
        mlflow.log_artifact(str(results.page))


SHOW: Mapping[str, Callable[[GeneralTracker, StageResults], None]] = {
    "tensorboard": _to_tensorboard,
    "wandb": _to_wandb,
    "trackio": _to_trackio,
    "mlflow": _to_mlflow,
}


def _markdown(rows: Table) -> str:
    marks = ["---"] * len(rows[0])
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (rows[0], marks, *rows[1:])
    )


def _file_name(title: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in title)


def _finite(values: Mapping[str, float]) -> dict[str, float]:
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
