"""Check that vectors as wide as one stage rank like the combined features, and measure how much smaller their index is.

    python benchmarks/one_vector.py runs/photos shards/photos/test

The model's stages must share a text tower (`--stages.1.train.lock.text`). Embeds a retrieval set both ways and ranks
all images for every caption, with the towers in float64, then in float32. Prints a JSON line for each: captions whose
whole ranking is equal, whose first image is equal, and, to compare, whose first image is equal when vectors are
compared by cosine; the largest difference of scores; bytes of an index of the images in float16.
"""

import json
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from mcl_clip.core.errors import UserError, run_program
from mcl_clip.eval.retrieval import RetrievalSet
from mcl_clip.model.multistage import VECTOR, MultistageCLIP
from mcl_clip.model.resolve import find_models

BATCH = 64


def compare(model: str, data: Path, /, *, combine: str = "concat") -> None:
    """Rank both ways.

    Args:
        model: a multistage model, see `mcl-clip eval`.
        data: a retrieval set.
        combine: the combination that the vectors are to rank as.
    """
    loaded = find_models(model)[0].load()
    if not isinstance(loaded, MultistageCLIP) or not loaded.shared_text_tower:
        raise UserError(f"{model} does not have several stages with one text tower")
    loaded.eval().combine = combine
    found = RetrievalSet.open(data)
    for dtype in (torch.float64, torch.float32):
        image, vector, text, unit = _embed(loaded.to(dtype), found, dtype)
        factor = len(loaded.stages) ** 0.5 if combine == "concat" else 1
        scores, other = text @ image.T, unit @ vector.T / factor
        first = scores.argmax(dim=1)
        record = {
            "towers": str(dtype).removeprefix("torch."),
            "combine": combine,
            "stages": len(loaded.stages),
            "images": len(image),
            "captions": len(text),
            "equal_rankings": int((other.argsort(dim=1) == scores.argsort(dim=1)).all(dim=1).sum()),
            "equal_first": int((other.argmax(dim=1) == first).sum()),
            "equal_first_by_cosine": int(((unit @ F.normalize(vector, dim=1).T).argmax(dim=1) == first).sum()),
            "largest_difference": float((scores - other).abs().max()),
            "index_bytes": 2 * image.numel(),
            "index_bytes_vector": 2 * vector.numel(),
        }
        print(json.dumps(record), flush=True)


@torch.inference_mode()
def _embed(model: MultistageCLIP, data: RetrievalSet, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Embed a set: unit features and joined vectors of images, unit features of texts, by all stages and by one."""
    images, texts = data.source, data.texts
    rows = [np.arange(start, min(start + BATCH, len(images))) for start in range(0, len(images), BATCH)]
    parts: list[list[Tensor]] = [[], [], [], []]
    for batch in tqdm(rows, desc="images", disable=None):
        pixels = torch.stack([model.image_transform(picture) for picture in images.images(batch)]).to(dtype)
        parts[0].append(model.encode_image(pixels, normalize=True))
        parts[1].append(model.encode_image(pixels, combine=VECTOR))
    for start in tqdm(range(0, len(texts), BATCH), desc="texts", disable=None):
        tokens = model.tokenizer(texts[start : start + BATCH])
        parts[2].append(model.encode_text(tokens, normalize=True))
        parts[3].append(model.encode_text(tokens, combine=VECTOR))
    return tuple(torch.cat(part) for part in parts)


if __name__ == "__main__":
    run_program(lambda: tyro.cli(compare))
