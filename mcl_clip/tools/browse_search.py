"""What the page searches: pictures with their features under each stage, and the towers for a query."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from PIL import Image
from torch import Tensor

from mcl_clip.core.errors import UserError
from mcl_clip.data.decode import BadSampleError, decode_image
from mcl_clip.eval.classification import ClassificationTask
from mcl_clip.eval.embed import ImageSource
from mcl_clip.eval.retrieval import RetrievalTask
from mcl_clip.eval.task import Task
from mcl_clip.model.clip import ClipBundle, load_clip
from mcl_clip.model.multistage import combine_features, normalized
from mcl_clip.report.thumbnails import TRAINING, image_source
from mcl_clip.report.view import RunView

FOUND = 12
ALL = "all stages"


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Pictures to search in.

    Attributes:
        name: of an evaluation set; empty for the training pairs.
        title: what a person reads.
        stages: numbers of the stages whose features there are.
        images: their un-normalised features, in the order of `stages`.
        words: what stands with each picture.
        source: where the pictures are; none for the training pairs, which the run's reader has.
    """

    name: str
    title: str
    stages: tuple[int, ...]
    images: tuple[Float32[Tensor, "pictures _dim"], ...]
    words: tuple[str, ...]
    source: ImageSource | None


class Search:
    """The galleries of a run, and what is found in them."""

    def __init__(self, view: RunView, device: torch.device) -> None:
        """Find out what can be searched; towers and features follow when they are asked for.

        Raises:
            UserError: if nothing of the run can be searched yet.
        """
        self.view, self._device = view, device
        self.names = [name for name, task in view.tasks.items() if self._is_searchable(name, task)]
        self.names.sort(key=lambda name: not isinstance(view.tasks[name], RetrievalTask))
        if view.stages_with("embed") and view.reader is not None:
            self.names.append(TRAINING)
        if not self.names:
            raise UserError(
                f"{view.folder} has nothing to search yet: a stage must be embedded or evaluated, and its pictures "
                f"must be where they were. {' '.join(view.missing)}".strip()
            )

    def _is_searchable(self, name: str, task: Task) -> bool:
        return image_source(task) is not None and bool(self.view.set_features(0, name))

    def title(self, name: str) -> str:
        """What a person reads for a gallery."""
        if name != TRAINING:
            return name
        rows, total = len(self.view.sample.rows), self.view.sample.total
        return f"training pairs ({rows:,} of {total:,})" if rows < total else f"training pairs ({total:,})"

    @lru_cache(maxsize=4)  # noqa: B019 - a search lives as long as the server
    def gallery(self, name: str) -> Gallery:
        """The features and words of a gallery."""
        if name == TRAINING:
            stages = tuple(self.view.stages_with("embed"))
            images = tuple(torch.from_numpy(self.view.features(s, "image")) for s in stages)
            words = tuple(texts[0] if texts else "" for texts in self.view.sample.captions)
            return Gallery(name=name, title=self.title(name), stages=stages, images=images, words=words, source=None)
        task = self.view.tasks[name]
        stages = tuple(s for s in self.view.stages_with("eval") if self.view.set_features(s, name))
        return Gallery(
            name=name,
            title=self.title(name),
            stages=stages,
            images=tuple(self.view.set_features(s, name)["image"] for s in stages),
            words=tuple(_words_of(task)),
            source=image_source(task),
        )

    def by_text(self, name: str, text: str) -> list[dict[str, Any]]:
        """The pictures that each stage finds for a text."""
        gallery = self.gallery(name)
        return self._find(gallery, [self._encode(s, text=text) for s in gallery.stages])

    def by_picture(self, name: str, data: bytes) -> list[dict[str, Any]]:
        """The pictures that each stage finds for the bytes of a picture.

        Raises:
            UserError: if they are no picture.
        """
        try:
            image = decode_image(data)
        except BadSampleError as error:
            raise UserError(f"this is no JPEG, PNG or WebP that can be read ({error.reason})") from error
        gallery = self.gallery(name)
        return self._find(gallery, [self._encode(s, image=image) for s in gallery.stages])

    def by_row(self, name: str, row: int) -> list[dict[str, Any]]:
        """The pictures that each stage finds for one of the gallery."""
        gallery = self.gallery(name)
        self._check_row(gallery, row)
        return self._find(gallery, [images[row] for images in gallery.images])

    def picture(self, name: str, row: int) -> Image.Image:
        """A picture of a gallery, by its number."""
        gallery = self.gallery(name)
        self._check_row(gallery, row)
        if gallery.source is not None:
            return next(iter(gallery.source.images(np.array([row]))))
        if self.view.reader is None:
            raise UserError("the shards of the run are gone")
        (sample,) = self.view.reader.read(self.view.sample.rows[[row]])
        try:
            return decode_image(sample.image)
        except BadSampleError as error:
            raise UserError(f"picture {row} cannot be decoded ({error.reason})") from error

    @staticmethod
    def _check_row(gallery: Gallery, row: int) -> None:
        if not 0 <= row < len(gallery.words):
            raise UserError(f"there is no picture {row}; {gallery.title} has {len(gallery.words)}")

    def _find(self, gallery: Gallery, queries: Sequence[Float32[Tensor, " _dim"]]) -> list[dict[str, Any]]:
        """The nearest pictures by cosine, for each stage and, of several, for all of them together."""
        sides = {
            f"stage {s}": (images, query)
            for s, images, query in zip(gallery.stages, gallery.images, queries, strict=True)
        }
        if len(gallery.stages) > 1:
            sides[ALL] = (self._combined(gallery.name), combine_features(list(queries), self.view.combine))
        found = []
        for model, (images, query) in sides.items():
            scores = normalized(images) @ normalized(query)
            best = torch.argsort(scores, descending=True, stable=True)[:FOUND].tolist()
            pictures = [
                {"row": row, "score": round(float(scores[row]), 4), "words": gallery.words[row]} for row in best
            ]
            found.append({"model": model, "pictures": pictures})
        return found

    @lru_cache(maxsize=4)  # noqa: B019
    def _combined(self, name: str) -> Float32[Tensor, "pictures dims"]:
        return combine_features(list(self.gallery(name).images), self.view.combine)

    @torch.inference_mode()
    def _encode(self, stage: int, *, text: str = "", image: Image.Image | None = None) -> Float32[Tensor, " dim"]:
        """Un-normalised features of a query under a stage."""
        tower = self._towers[stage]
        if image is not None:
            pixels = tower.image_transform(image)[None].to(self._device)
            return tower.model.encode_image(pixels)[0].float().cpu()  # type: ignore[operator, no-any-return]
        tokens = tower.tokenizer([text]).to(self._device)
        return tower.model.encode_text(tokens)[0].float().cpu()  # type: ignore[operator, no-any-return]

    @cached_property
    def _towers(self) -> dict[int, ClipBundle]:
        towers = {}
        for s in self.view.stages_with("train"):
            towers[s] = load_clip(self.view.folder / f"stage-{s}" / "train" / "model")
            towers[s].model.to(self._device).eval()
        return towers


def _words_of(task: Task) -> list[str]:
    """What stands with each picture of a set: its first caption, or its class."""
    if isinstance(task, RetrievalTask):
        return [captions[0] if captions else "" for captions in task.data.captions]
    if isinstance(task, ClassificationTask):
        return [task.data.classnames[label] for label in task.data.labels.tolist()]
    source = image_source(task)
    return [""] * (len(source) if source is not None else 0)
