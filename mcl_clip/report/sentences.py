"""A stage in words: what it tells apart, what it no longer does, and how sure that is."""

from collections.abc import Iterator, Mapping

from mcl_clip.results.record import COMBINED, Result, RunRecord, compare

READ_OUTS = ("linear_acc1", "acc1")
KNOWN, UNKNOWN = 0.8, 0.3  # of the way from chance to all right
UNRELATED, ALIKE = 0.2, 0.6  # of the way from unrelated clusterings to equal ones
NAMES = 4


def skill(result: Result, metric: str) -> float | None:
    """Where a share of right answers lies between guessing (0) and all right (1); none if it was not measured."""
    value, classes = result.value(metric), result.record.get("n_classes") or 0
    if value is None or classes < 2:
        return None
    return (value - 1 / classes) / (1 - 1 / classes)


def stage_sentences(run: RunRecord, stage: int) -> list[str]:
    """What a stage has learned, by its results and its clusters; empty before it is measured."""
    of_stage = {key: found[f"stage-{stage}"] for key, found in run.results.items() if f"stage-{stage}" in found}
    if stage == 0:
        sentences = [*_known(of_stage), *_retrieval(of_stage)]
    else:
        before = {
            key: found[f"stage-{stage - 1}"] for key, found in run.results.items() if f"stage-{stage - 1}" in found
        }
        sentences = [*_changes(of_stage, before, stage - 1), *_retrieval(of_stage)]
    return [*sentences, *_clusters(run, stage)]


def combined_sentences(run: RunRecord) -> list[str]:
    """What the stages are together, beside the best single one; empty before that is measured."""
    gains: dict[str, list[str]] = {"better": [], "worse": [], "": []}
    for found in run.results.values():
        stages = [result for label, result in found.items() if label != COMBINED]
        if COMBINED not in found or len(stages) < 2:
            continue
        ours = found[COMBINED]
        metric = _metric(ours)
        best = max(stages, key=lambda result: result.value(metric) or 0.0)
        gains[_verdict(ours, best, metric)].append(
            f"{_name(ours)} ({percent(ours, metric)} after {percent(best, metric)})"
        )
    texts = {
        "better": "Together they are better than the best stage alone at {}.",
        "worse": "Together they are worse than the best stage alone at {}.",
        "": "There is no clear difference to the best stage alone at {}.",
    }
    return [texts[verdict].format(_listed(names)) for verdict, names in gains.items() if names]


def percent(result: Result, metric: str) -> str:
    """A share, in percent."""
    value = result.value(metric)
    return "-" if value is None else f"{100 * value:.1f} %"


def _known(results: Mapping[str, Result]) -> Iterator[str]:
    """What a first stage tells apart, by the linear read-out where there is one."""
    skills = {key: found for key, result in results.items() if (found := skill(result, _metric(result))) is not None}
    grades: dict[str, list[str]] = {"apart": [], "apart in part": [], "hardly apart": []}
    for key, found in skills.items():
        grade = "apart" if found >= KNOWN else "hardly apart" if found <= UNKNOWN else "apart in part"
        grades[grade].append(_told(results[key]))
    if told := [f"{_listed(names)} {grade}" for grade, names in grades.items() if names]:
        yield f"It tells {', '.join(told)}."


def _changes(results: Mapping[str, Result], before: Mapping[str, Result], earlier: int) -> Iterator[str]:
    """What a later stage tells apart better, and worse, than the one before; only differences that are clear."""
    better: list[str] = []
    lost: list[str] = []
    worse: list[str] = []
    for key, result in results.items():
        metric = _metric(result)
        old = before.get(key)
        now = skill(result, metric)
        if old is None or now is None:
            continue
        then = skill(old, metric)
        told = f"{_name(result)} ({percent(result, metric)} after {percent(old, metric)})"
        verdict = _verdict(result, old, metric)
        if verdict == "better":
            better.append(told)
        elif verdict == "worse":
            (lost if then is not None and now <= UNKNOWN < KNOWN / 2 <= then else worse).append(told)
    if better:
        yield f"It separates {_listed(better)}, better than stage {earlier}."
    if lost:
        yield f"It no longer tells {_listed(lost)} apart: what is equal inside a group cannot help."
    if worse:
        yield f"It tells {_listed(worse)} less well apart."
    if (
        results
        and before
        and not (better or lost or worse)
        and any(skill(r, _metric(r)) is not None for r in results.values())
    ):
        yield f"No clear difference to stage {earlier} in what it tells apart."


def _retrieval(results: Mapping[str, Result]) -> Iterator[str]:
    for result in results.values():
        if result.main_metric != "mean_recall@1":
            continue
        tenth = [result.value(f"{side}_retrieval_recall@10") for side in ("image", "text")]
        among = (
            f"; {100 * sum(v for v in tenth if v is not None) / 2:.1f} % among the first ten"
            if None not in tenth
            else ""
        )
        first = percent(result, result.main_metric)
        yield f"On {_name(result)} the right partner comes first for {first} of queries{among}."


def _clusters(run: RunRecord, stage: int) -> Iterator[str]:
    """How much the clusters of a stage say about those of the stage before."""
    for (first, side), (found, unrelated) in run.agreement.items():
        if first != stage - 1:
            continue
        share = (found - unrelated) / max(1e-9, 1 - unrelated)
        how = "have little to do with" if share < UNRELATED else "are much like" if share > ALIKE else "partly follow"
        what = {"image": "pictures", "text": "texts"}[side]
        numbers = f"agreement {found:.2f}; {unrelated:.2f} if unrelated"
        yield f"Its clusters of {what} {how} those of stage {first} ({numbers})."


def _metric(result: Result) -> str:
    """The measure of what a stage tells apart: the read-out where there is one, which does not hang on words."""
    return next((metric for metric in READ_OUTS if result.value(metric) is not None), result.main_metric)


def _verdict(ours: Result, other: Result, metric: str) -> str:
    paired = compare(ours, other, metric)
    if paired is None or paired.low <= 0 <= paired.high:
        return ""
    return "better" if paired.low > 0 else "worse"


def _name(result: Result) -> str:
    name: str = result.record["dataset"]
    return name


def _told(result: Result) -> str:
    return f"{_name(result)} ({percent(result, _metric(result))})"


def _listed(names: list[str]) -> str:
    more = len(names) - NAMES
    shown = names if more <= 0 else [*names[:NAMES], f"{more} more sets"]
    return ", ".join(shown[:-1]) + " and " + shown[-1] if len(shown) > 1 else shown[0]
