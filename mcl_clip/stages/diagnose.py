"""Diagnose a finished stage: whether another stage, or more training, can help."""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

SOLVED_SHARE = 0.05  # of the loss of guessing: below it, a batch has nothing more to teach
LEARNING_SHARE = 0.25
POOR_SCORE = 0.5


class Diagnosis(NamedTuple):
    """What a stage shows, and the sentence that says so."""

    kind: Literal["learning", "suppressed", "neither"]
    text: str


def diagnose(
    *, loss: float, negatives: float, scores: Mapping[str, float], rows: int, global_batch_size: int
) -> Diagnosis:
    """Diagnose whether features are suppressed, the stage is still learning, or neither.

    A stage that solves its batches (loss near 0) has no incentive to learn what still scores poorly: that is feature
    suppression, and batches within which the learned features are equal can recover it. A stage whose loss is still
    high keeps learning, and plain training of equal compute then gains more than further stages.

    `loss` is the mean at the end of the stage, in nats, `negatives` the mean number for a row; `scores` are the main
    metrics of the evaluation sets, from 0 to 1.
    """
    share = loss / math.log(1 + max(1.0, negatives))
    state = f"loss {loss:.3g}, {100 * share:.1f} % of guessing among {negatives:.0f} negatives"
    poor = [f"{name} {100 * score:.0f} %" for name, score in scores.items() if score < POOR_SCORE]
    if share >= LEARNING_SHARE:
        return Diagnosis("learning", f"still learning ({state}): more steps may gain more than another stage")
    if share < SOLVED_SHARE and poor:
        clusters = max(2, round(rows / global_batch_size))
        return Diagnosis(
            "suppressed",
            f"the batches are solved ({state}) while evaluation sets are poor ({', '.join(poor)}): features are "
            f"suppressed. Another stage can recover them, with about {clusters} clusters (a batch of rows each)",
        )
    return Diagnosis("neither", f"the evaluation sets show no suppressed features ({state})")
