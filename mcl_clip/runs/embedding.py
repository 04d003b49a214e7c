"""The embedding pass over all rows of a run, which a stop interrupts between two pieces."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mcl_clip.core.distributed import barrier
from mcl_clip.data.decode import evaluation_transform
from mcl_clip.data.features import EmbeddingTable
from mcl_clip.data.loader import captioned_batches
from mcl_clip.model.clip import ClipBundle
from mcl_clip.runs.context import RunContext
from mcl_clip.stages.embed import embed_shards


def embed_rows(
    run: RunContext,
    clip: ClipBundle,
    out: Path,
    *,
    precision: str,
    options: Mapping[str, Any],
    texts: EmbeddingTable | None = None,
) -> None:
    """Write the features of all rows under a model; raise PlannedStop if the run was asked to stop.

    `options` are those of `captioned_batches`, and `texts` as for `embed_shards`. A collective call that continues from
    what `out` holds.
    """
    config, reader = run.config, run.reader(run.index)
    transform = evaluation_transform(clip.preprocess_cfg, legacy=config.behavior == "0.6")
    with run.interrupt.deferred():  # a stop waits for the end of a piece of a shard, which is what can be resumed
        embed_shards(
            clip.model,
            run.index,
            batches=lambda rows: run.interrupt.waiting_for(
                captioned_batches(reader, rows, transform=transform, **options)
            ),
            preprocess_cfg=clip.preprocess_cfg,
            dim=clip.model_cfg["embed_dim"],
            out=out,
            device=run.accelerator.device,
            batch_size=config.eval.batch_size,
            precision=precision,
            show_progress=config.machine.progress,
            is_stopping=run.interrupt.noticed,
            texts=texts,
        )
    barrier()
    run.interrupt.check()
