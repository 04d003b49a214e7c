"""Progress of a run: phases that are done, the last step of each stage, and what finished stages suggest."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mcl_clip.core.errors import UserError
from mcl_clip.core.files import read_run_config
from mcl_clip.data.index import ShardIndex
from mcl_clip.report.page import REPORT
from mcl_clip.results.record import PHASES, phase_state, read_run
from mcl_clip.runs.eval_phase import diagnosis

COLOURS = {"done": "\033[32m", "partial": "\033[33m", "missing": "\033[2m"}


def status_lines(run: Path, *, has_colours: bool = False) -> list[str]:
    """List the state of the phases of each stage with its last step, of the combined model and of publishing."""
    record, lines = read_run(run), []

    def state(folder: Path) -> str:
        word = phase_state(folder)
        return f"{COLOURS[word]}{word}\033[0m" if has_colours else word

    for number, stage in enumerate(record.stages):
        states = ", ".join(f"{phase} {state(stage.folder / phase)}" for phase in PHASES)
        steps = stage.train_settings.get("steps")
        last = f" (step {stage.steps[-1].get('step')} of {steps})" if stage.steps else ""
        lines.append(f"stage {number}: {states}{last}")
    lines.append(f"combined: {state(run / 'combined')}")
    publish = record.config.get("publish")
    if isinstance(publish, dict) and publish.get("repo"):
        lines.append(f"publish to {publish['repo']}: {state(run / 'publish')}")
    if (run / REPORT).exists():
        lines.append(f"report: {run / REPORT}")
    return lines


def diagnoses(run: Path) -> list[str]:
    """List one line per evaluated stage on whether a further stage, or more training, can help."""
    stages = read_run_config(run)["stages"]
    index = run / "index" / "index.arrow"
    rows = len(ShardIndex.load(index)) if index.exists() else 0
    texts = [diagnose_stage(run, number, stage.get("train", {}), rows) for number, stage in enumerate(stages)]
    return [f"stage {number}: {text}" for number, text in enumerate(texts) if text]


def diagnose_stage(run: Path, stage: int, settings: Mapping[str, Any], rows: int) -> str:
    """Diagnose one stage; return an empty string before it is evaluated.

    Args:
        run: the run directory.
        stage: number of the stage.
        settings: its training settings, as in config.json.
        rows: rows of the training data; 0 if unknown.

    Raises:
        UserError: if its metrics or results are damaged.
    """
    if not rows or phase_state(run / f"stage-{stage}" / "eval") != "done":
        return ""
    try:
        return diagnosis(run, stage, settings=settings, rows=rows)
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"metrics or results in {run / f'stage-{stage}'} are damaged ({type(error).__name__}: {error}); restore "
            f"them, or delete their folders and run the recipe again"
        ) from error
