"""Audit a model: which words it sees, by which shortcuts it tells pairs apart, what its clusters follow.

OUT/audit.html   the page          OUT/audit.json   all figures          OUT/swaps/   the swaps, as a set of pairs
"""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from mcl_clip.core.distributed import peak_memory
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import write_json
from mcl_clip.core.stats import bootstrap_interval, normalized_mutual_information
from mcl_clip.data.writing import clean_key, image_extension, new_folder, refuse_non_empty
from mcl_clip.eval.embed import Encoder, check_finite
from mcl_clip.eval.shortcuts import ToEmbed, find_shortcuts
from mcl_clip.eval.swaps import Swap, SwapWords, make_swaps, write_swaps
from mcl_clip.model.multistage import MultistageCLIP
from mcl_clip.model.resolve import Loaded
from mcl_clip.report.audit import write_audit_page
from mcl_clip.report.clusters import keywords
from mcl_clip.results.audit import ALL_KINDS, AUDIT, FOLDER, FORMAT, PAGE, give_verdict
from mcl_clip.stages.kmeans import spherical_kmeans
from mcl_clip.tools.audit_data import AuditData, AuditOptions, SampledImages

SHORTCUT_PAIRS = 256  # whose captions and pictures are edited
SWAPS_PER_KIND = 1000
MOST_CLUSTERS, ROWS_PER_CLUSTER = 10, 16
BATCH_ROWS = 256  # of the batch that the verdict recommends clusters for
TEMPERATURES = np.geomspace(0.01, 300, 60)
SIDES = ("image", "text")

logger = logging.getLogger(__name__)


class Embedded(NamedTuple):
    """Unit features of pictures, of their captions and of wrong captions."""

    image: Float[Tensor, "pictures dim"]
    caption: Float[Tensor, "captions dim"]
    wrong: Float[Tensor, "swaps dim"]
    picture_of: Int[np.ndarray, " captions"]


def audit_folder(model: str, label: str) -> Path:
    """Return the folder of an audit: within a run or its stage, or below audits/ for other models."""
    folder = Path(model)
    is_run = any((one / "config.json").is_file() and any(one.glob("stage-*")) for one in (folder, folder.parent))
    return folder / FOLDER if is_run and folder.is_dir() else Path("audits") / label


def audit_model(
    loaded: Loaded,
    data: AuditData,
    out: Path,
    options: AuditOptions,
    *,
    name: str,
    device: torch.device,
    batch_size: int = 64,
    num_workers: int = 0,
    precision: str = "fp32",
) -> dict[str, Any]:
    """Audit a model and write OUT; return the record of audit.json.

    Raises:
        UserError: if OUT is not empty, `options.words` are in no caption, or features are not finite.
    """
    refuse_non_empty(out)
    started = time.perf_counter()
    words = SwapWords.read(options.words)
    swaps = _swaps(data, words, options)
    model = loaded if isinstance(loaded, MultistageCLIP) else loaded.model
    encoder = Encoder(
        model=model.to(device).eval(),
        image_transform=loaded.image_transform,
        tokenizer=loaded.tokenizer,
        device=device,
        batch_size=batch_size,
        num_workers=num_workers,
        precision=precision,
    )
    embedded = _embed(encoder, data, swaps)
    figures, margins = score_swaps(embedded, data.captions, swaps, list(words.others))
    pairs = min(SHORTCUT_PAIRS, len(data.captions))
    first = np.searchsorted(embedded.picture_of, np.arange(pairs))
    features = {"image": embedded.image[:pairs], "text": embedded.caption[first]}
    captions = [data.captions[row][0] for row in range(pairs)]
    shortcuts = find_shortcuts(
        encoder,
        SampledImages(data.source.reader, data.source.rows[:pairs]),
        captions,
        features,
        {"image": embedded.image.mean(0), "text": embedded.caption.mean(0)},
        words,
        white_and_black=_white_and_black(loaded.preprocess_cfg),
        seed=options.seed,
    )
    share = loss_share(features["image"], features["text"], captions)
    verdict = give_verdict(shortcuts, loss_share=share, swaps=figures, clusters=max(2, round(data.total / BATCH_ROWS)))
    record = {
        "format": FORMAT,
        "model": name,
        "data": data.name,
        "data_digest": data.digest,
        "pictures": len(data.captions),
        "captions": len(embedded.caption),
        "edited_pairs": pairs,
        "seed": options.seed,
        "dtype": precision,
        "verdict": verdict._asdict(),
        "loss_share": share,
        "swaps": figures,
        "shortcuts": asdict(shortcuts),
        "clusters": find_clusters(embedded, data.captions, data.attributes),
    }
    record |= {"seconds": round(time.perf_counter() - started, 1), "peak_memory_mb": peak_memory() // 10**6}
    with new_folder(out) as folder:
        if swaps and options.images:
            _write_swaps(folder / "swaps", data, swaps)
        write_json(folder / AUDIT, record)
        write_audit_page(
            folder / PAGE,
            record,
            data.source,
            data.captions,
            failing_swaps(swaps, margins),
            images=options.images,
        )
    return record


def _swaps(data: AuditData, words: SwapWords, options: AuditOptions) -> list[Swap]:
    """Make the swaps; none where the captions have no words of the package's list."""
    try:
        return make_swaps(data.captions, words, keys=data.keys, seed=options.seed, most_per_kind=SWAPS_PER_KIND)
    except UserError as error:
        if options.words:
            raise
        logger.warning("no swaps: %s", error)
        return []


def _embed(encoder: Encoder, data: AuditData, swaps: Sequence[Swap]) -> Embedded:
    captions = [caption for of_picture in data.captions for caption in of_picture]
    texts = [*captions, *(swap.wrong for swap in swaps)]
    features = encoder.embed(ToEmbed(source=data.source, texts=texts))
    check_finite(features["image"], features["text"])
    image, text = (F.normalize(features[side].double()) for side in SIDES)
    picture_of = np.repeat(np.arange(len(data.captions)), [len(of_picture) for of_picture in data.captions])
    return Embedded(image, text[: len(captions)], text[len(captions) :], picture_of)


def score_swaps(
    embedded: Embedded, captions: Sequence[Sequence[str]], swaps: Sequence[Swap], kinds: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], Float[Tensor, " swaps"]]:
    """Score swaps by kind, and all together; return the figures and the margin of each swap without the prior.

    The margin of a swap is the cosine of the picture with the caption minus that with the swap. Blind is the mean of
    this margin over all pictures, which is what the words alone are worth; taken out, only what the picture adds is
    left. Ties count as wrong.
    """
    if not swaps:
        return {}, torch.zeros(0)
    row_of: dict[tuple[int, str], int] = {}
    flat = [caption for of_picture in captions for caption in of_picture]
    for row, (picture, caption) in enumerate(zip(embedded.picture_of.tolist(), flat, strict=True)):
        row_of.setdefault((picture, caption), row)
    right = torch.tensor([row_of[swap.picture, swap.caption] for swap in swaps])
    pictures = np.array([swap.picture for swap in swaps])
    difference = embedded.caption[right] - embedded.wrong
    margin = (embedded.image[torch.from_numpy(pictures)] * difference).sum(1).float()
    blind = (embedded.image.mean(0) * difference).sum(1).float()
    of_kind = np.array([swap.kind for swap in swaps])
    figures = {}
    for kind in (*(kind for kind in kinds if kind in of_kind), ALL_KINDS):
        chosen: Bool[np.ndarray, " swaps"] = np.ones(len(swaps), bool) if kind == ALL_KINDS else of_kind == kind
        is_right, sees = ((one.numpy()[chosen] > 0) for one in (margin, margin - blind))
        figures[kind] = {
            "n": int(chosen.sum()),
            "pictures": len(np.unique(pictures[chosen])),
            "accuracy": _with_interval(is_right, pictures[chosen]),
            "blind": float((blind.numpy()[chosen] > 0).mean()),
            "sight": _with_interval(sees, pictures[chosen]),
        }
    return figures, margin - blind


def _with_interval(values: Bool[np.ndarray, " swaps"], pictures: Int[np.ndarray, " swaps"]) -> list[float]:
    return [float(values.mean()), *bootstrap_interval(values, pictures, resamples=2000)]


def failing_swaps(swaps: Sequence[Swap], margins: Float[Tensor, " swaps"]) -> list[Swap]:
    """Return the swaps that a model prefers to their captions with the prior taken out, the clearest first."""
    order = np.argsort(margins.numpy(), kind="stable")
    return [swaps[number] for number in order.tolist() if margins[number] <= 0]


def loss_share(image: Float[Tensor, "pairs dim"], text: Float[Tensor, "pairs dim"], captions: Sequence[str]) -> float:
    """Compute the contrastive loss of one batch at its best temperature, as a share of that of guessing.

    The temperature of training fits other pairs; pairs of equal captions are no negatives of each other.
    """
    numbers = torch.from_numpy(np.unique(captions, return_inverse=True)[1])
    scores = image @ text.T
    is_equal = (numbers[:, None] == numbers[None]) & ~torch.eye(len(captions), dtype=torch.bool)
    scores = scores.masked_fill(is_equal, -torch.inf)
    target = torch.arange(len(captions))
    losses = [
        float(F.cross_entropy(scores * scale, target) + F.cross_entropy(scores.T * scale, target)) / 2
        for scale in TEMPERATURES
    ]
    return min(losses) / math.log(len(captions))


def _white_and_black(preprocess_cfg: Mapping[str, Any]) -> Float[Tensor, "2 3"]:
    mean, std = (np.broadcast_to(np.asarray(preprocess_cfg[name], np.float32), 3) for name in ("mean", "std"))
    return torch.from_numpy(np.stack([(1 - mean) / std, -mean / std]))


def find_clusters(
    embedded: Embedded, captions: Sequence[Sequence[str]], attributes: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Any]]:
    """Cluster pictures by the features of each side; return words of each cluster and agreement with attributes."""
    count = max(2, min(MOST_CLUSTERS, len(captions) // ROWS_PER_CLUSTER))
    owner = torch.from_numpy(embedded.picture_of)
    text = torch.zeros_like(embedded.image).index_add_(0, owner, embedded.caption)
    found = {}
    for side, features in zip(SIDES, (embedded.image, text), strict=True):
        rows = F.normalize(features).half().numpy()
        try:
            clustering = spherical_kmeans(
                lambda start, stop, rows=rows: rows[start:stop],  # type: ignore[misc]
                num_rows=len(rows), num_clusters=count, name=("audit", side), num_starts=4,
            )  # fmt: skip
        except UserError as error:  # fewer distinct features than clusters
            logger.warning("no clusters of %s features: %s", side, error)
            continue
        assignments = clustering.assignments
        words, sizes = keywords(captions, assignments), np.bincount(assignments, minlength=count)
        found[side] = {
            "clusters": [
                {
                    "size": int(sizes[number]),
                    "words": [asdict(keyword) for keyword in words.get(number, ())],
                    "pictures": _central(rows, clustering.centroids, assignments, number),
                }
                for number in np.argsort(-sizes, kind="stable").tolist()
                if sizes[number]
            ],
            "nmi": {
                name: normalized_mutual_information(assignments, np.array(values))
                for name, values in attributes.items()
            },
        }
    return found


def _central(rows: np.ndarray, centroids: np.ndarray, assignments: np.ndarray, number: int, most: int = 6) -> list[int]:
    """Return the pictures of a cluster that are nearest to its centroid."""
    members = np.flatnonzero(assignments == number)
    similarity = rows[members].astype(np.float32) @ centroids[number]
    nearest: list[int] = members[np.argsort(-similarity, kind="stable")[:most]].tolist()
    return nearest


def _write_swaps(folder: Path, data: AuditData, swaps: Sequence[Swap]) -> None:
    """Write the swaps as a set of pairs, with copies of their pictures."""
    images = folder / "images"
    images.mkdir(parents=True)
    paths = [""] * len(data.captions)
    for picture in sorted({swap.picture for swap in swaps}):
        (file,) = data.source.files(np.array([picture]))
        paths[picture] = f"{clean_key(data.source.key(picture))}.{image_extension(file) or 'jpg'}"
        (images / paths[picture]).write_bytes(file)
    write_swaps(folder, swaps, paths, images="images", name="swaps")
