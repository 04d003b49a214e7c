"""Passes over the rows of an index, which a stop interrupts between two pieces and the next launch continues."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mcl_clip.core.distributed import barrier
from mcl_clip.data.decode import evaluation_transform
from mcl_clip.data.features import EmbeddingTable
from mcl_clip.data.index import ShardIndex
from mcl_clip.data.loader import captioned_batches
from mcl_clip.model.clip import ClipBundle
from mcl_clip.runs.context import RunContext
from mcl_clip.stages.embed import embed_shards


def embedding_pass(
    run: RunContext, index: ShardIndex, write: Callable[..., None], *, out: Path, options: Mapping[str, Any]
) -> None:
    """Write something of all rows of an index to `out`; raise PlannedStop if the run was asked to stop.

    `write` is `embed_shards` or a function like it, with its other arguments bound; `options` are those of
    `captioned_batches`. A collective call that continues from what `out` holds.
    """
    reader = run.reader(index)
    with run.interrupt.deferred():  # a stop waits for the end of a piece of a shard, which is what can be resumed
        write(
            index=index,
            batches=lambda rows: run.interrupt.waiting_for(captioned_batches(reader, rows, **options)),
            out=out,
            batch_size=run.config.eval.batch_size,
            show_progress=run.config.machine.progress,
            is_stopping=run.interrupt.noticed,
        )
    barrier()
    run.interrupt.check()


def embed_rows(
    run: RunContext,
    clip: ClipBundle,
    out: Path,
    *,
    precision: str,
    options: Mapping[str, Any],
    texts: EmbeddingTable | None = None,
) -> None:
    """Write the features of all rows under a model, see `embedding_pass`; `texts` are as for `embed_shards`."""
    transform = evaluation_transform(clip.preprocess_cfg, legacy=run.config.behavior == "0.6")
    write = partial(
        embed_shards, clip.model, preprocess_cfg=clip.preprocess_cfg, dim=clip.model_cfg["embed_dim"],
        device=run.accelerator.device, precision=precision, texts=texts, has_texts=clip.has_texts,
    )  # fmt: skip
    embedding_pass(run, run.index, write, out=out, options={"transform": transform, **options})
