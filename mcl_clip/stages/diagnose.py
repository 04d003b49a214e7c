"""Diagnose a finished stage: whether another stage, or more training, can help."""

import math
from collections.abc import Mapping

SOLVED_SHARE = 0.05  # of the loss of guessing: below it, a batch has nothing more to teach
LEARNING_SHARE = 0.25
POOR_SCORE = 0.5


def diagnose(*, loss: float, negatives: float, scores: Mapping[str, float], rows: int, global_batch_size: int) -> str:
    """Describe a stage in one sentence: features are suppressed, it is still learning, or neither.

    A stage that solves its batches (loss near 0) has no incentive to learn what still scores poorly: that is feature
    suppression, and batches within which the learned features are equal can recover it. A stage whose loss is still
    high keeps learning, and plain training of equal compute then gains more than further stages.

    Args:
        loss: mean loss at the end of the stage, in nats.
        negatives: mean number of negatives of a row.
        scores: the main metric of each evaluation set, from 0 to 1.
        rows: number of rows of the data.
        global_batch_size: rows of a batch.
    """
    share = loss / math.log(1 + max(1.0, negatives))
    state = f"loss {loss:.3g}, {100 * share:.1f} % of guessing among {negatives:.0f} negatives"
    poor = [name for name, score in scores.items() if score < POOR_SCORE]
    if share >= LEARNING_SHARE:
        return f"still learning ({state}): more steps may gain more than another stage"
    if share < SOLVED_SHARE and poor:
        clusters = max(2, round(rows / global_batch_size))
        named = ", ".join(f"{name} {100 * scores[name]:.0f} %" for name in poor)
        return (
            f"the batches are solved ({state}) while evaluation sets are poor ({named}): features are suppressed. "
            f"Another stage can recover them, with about {clusters} clusters (a batch of rows each)"
        )
    return f"the evaluation sets show no suppressed features ({state})"
