"""What a stage has to know of its negatives: wrong captions, and features by which similar rows are excluded."""

import logging
from contextlib import suppress
from pathlib import Path

import numpy as np
import open_clip
from jaxtyping import Float16, Integer
from torch import nn

from mcl_clip.core.distributed import on_main
from mcl_clip.core.errors import UserError
from mcl_clip.data.decode import BadSampleError, decode_negatives
from mcl_clip.data.features import EmbeddingTable
from mcl_clip.data.reader import Reader
from mcl_clip.data.storage import save_array
from mcl_clip.model.clip import ClipBundle
from mcl_clip.runs.context import RunContext
from mcl_clip.runs.embedding import embed_rows
from mcl_clip.stages.kmeans import all_chunks

logger = logging.getLogger(__name__)

BASE = "base"  # folder of the features under the pretrained model, removed at the end of the stage
ENCODERS = (open_clip.CLIP, open_clip.CustomTextCLIP)  # towers that run on their own; CoCa needs tokens and images
NEGATIVES_SAMPLE_ROWS = 256  # looked at for wrong captions


def check_negatives(model: nn.Module, reader: Reader, json_key: str) -> None:
    """Raise UserError if no sample that is looked at has wrong captions, or the model takes a caption for each image.

    A collective call.
    """
    if not isinstance(model, ENCODERS):
        raise UserError(
            f"--data.negatives-key {json_key} needs towers that embed images and texts on their own, which "
            f"{type(model).__name__} does not; leave it out, or use another architecture"
        ).on_every_process()

    def count_wrong() -> tuple[int, int]:
        rows = np.unique(np.linspace(0, len(reader.index) - 1, NEGATIVES_SAMPLE_ROWS).astype(np.int64))
        found = 0
        for raw in reader.read(rows):
            # Bad samples are counted while the stage trains.
            with suppress(BadSampleError, ValueError, RecursionError):
                found += len(decode_negatives(raw.text, raw.text_format, json_key=json_key))
        return len(rows), found

    looked_at, found = on_main(count_wrong)
    if not found:
        raise UserError(
            f"--data.negatives-key {json_key}: none of {looked_at} samples looked at has a text or a list of texts at "
            f"this key of its .json member; write them there, or leave the option out"
        ).on_every_process()
    logger.info("wrong captions: %.1f per sample, in %d samples looked at", found / looked_at, looked_at)


def similarity_path(run: RunContext, stage: int) -> Path:
    """Return the file of the features that `mask_similar` compares, which exists while the stage trains."""
    return run.config.run_dir / "index" / f"similarity-stage-{stage}.npy"


def write_similarity_features(
    run: RunContext, stage: int, clip: ClipBundle, row_map: Integer[np.ndarray, "rows"] | None
) -> None:
    """Write the unit features of all rows that `mask_similar` compares, if it is on; in the order of `row_map`.

    They are those of the stage before or, in stage 0, of `clip`, which embeds all rows first. A collective call.
    """
    settings, path = run.config.stages[stage].train, similarity_path(run, stage)
    if not settings.mask_similar or on_main(path.exists):
        return
    if stage:
        table = run.embeddings(stage - 1)
    else:
        folder = run.folder(0, "train") / BASE
        clip.model.to(run.accelerator.device)
        embed_rows(run, clip, folder, precision=settings.precision, options=run.batch_options(clip))
        table = EmbeddingTable(folder, run.index)

    def write() -> None:
        chunks = all_chunks(len(table))
        dim = table.rows(*chunks[0], settings.similar_by).shape[1]
        save_array(
            path,
            np.float16,
            (len(table), dim),
            (table.rows(start, stop, settings.similar_by) for start, stop in chunks),
        )
        if row_map is not None:
            stored = np.load(path, mmap_mode="r", allow_pickle=False)
            save_array(path, np.float16, stored.shape, (stored[row_map[start:stop]] for start, stop in chunks))

    on_main(write)


def read_similarity_features(run: RunContext, stage: int, rows: int) -> Float16[np.ndarray, "rows dim"] | None:
    """Map the features that `write_similarity_features` wrote, once for all processes of a node; None without them.

    Raises:
        UserError: if the file is damaged or of other rows.
    """
    if not run.config.stages[stage].train.mask_similar:
        return None
    path = similarity_path(run, stage)
    try:
        features: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        if features.dtype != np.float16 or features.ndim != 2 or len(features) != rows:
            raise ValueError(f"its dtype is {features.dtype} and its shape {features.shape}")
    except Exception as error:  # damaged headers fail in many ways
        raise UserError(
            f"{path} does not hold the features of {rows} rows ({error}); delete it and run the recipe again"
        ) from error
    return features
