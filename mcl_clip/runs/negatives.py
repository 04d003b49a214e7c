"""What a stage has to know of its negatives: wrong captions are looked for before it trains."""

import logging
from contextlib import suppress

import numpy as np
import open_clip
from torch import nn

from mcl_clip.core.distributed import on_main
from mcl_clip.core.errors import UserError
from mcl_clip.data.decode import BadSampleError, decode_negatives
from mcl_clip.data.reader import Reader

logger = logging.getLogger(__name__)

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
            with suppress(
                BadSampleError, ValueError, RecursionError
            ):  # of the captions; counted while the stage trains
                found += len(decode_negatives(raw.text, raw.text_format, json_key=json_key))
        return len(rows), found

    looked_at, found = on_main(count_wrong)
    if not found:
        raise UserError(
            f"--data.negatives-key {json_key}: none of {looked_at} samples looked at has a text or a list of texts at "
            f"this key of its .json member; write them there, or leave the option out"
        ).on_every_process()
    logger.info("wrong captions: %.1f per sample, in %d samples looked at", found / looked_at, looked_at)
