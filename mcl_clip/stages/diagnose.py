"""Is anything suppressed? What a finished stage says about whether further stages, or more training, can help."""

import math
from collections.abc import Mapping

TOLD_APART = 0.05  # of the loss of guessing: below, a batch holds nothing more to learn
STILL_LEARNING = 0.25
POOR = 0.5


def diagnose(*, loss: float, negatives: float, scores: Mapping[str, float], rows: int, global_batch_size: int) -> str:
    """One sentence on a stage: suppressed, still learning, or neither.

    A stage that tells its batches apart (loss near 0) has no reason to learn what is still poor: that is feature
    suppression, and groups within which the learned features are equal can bring it back. A stage whose loss is still
    high goes on learning by itself, and plain training of equal compute then gains more than further stages do.

    Args:
        loss: mean loss at the end of the stage, in nats.
        negatives: mean negatives of a row.
        scores: the main metric of each evaluation set, from 0 to 1.
        rows: rows of the data.
        global_batch_size: rows of a batch.
    """
    share = loss / math.log(1 + max(1.0, negatives))
    state = f"loss {loss:.3g}, {100 * share:.1f} % of guessing among {negatives:.0f} negatives"
    poor = [name for name, score in scores.items() if score < POOR]
    if share >= STILL_LEARNING:
        return f"still learning ({state}): more steps may gain more than another stage"
    if share < TOLD_APART and poor:
        clusters = max(2, round(rows / global_batch_size))
        named = ", ".join(f"{name} {100 * scores[name]:.0f} %" for name in poor)
        return (
            f"batches are told apart ({state}) while something is poor ({named}): it is suppressed. Another stage can "
            f"bring it back, with about {clusters} clusters (a batch of rows each)"
        )
    return f"nothing is suppressed that the evaluation sets would show ({state})"
