import hashlib
import itertools
import os
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from mcl_clip.core.distributed import random_words, random_words_between, rank
from mcl_clip.core.errors import UserError
from mcl_clip.data import row_order as order_module
from mcl_clip.data.batch_plan import FILLER, BatchPlan, _batch_order, _packing_order
from mcl_clip.data.decode import TrainTransform
from mcl_clip.data.loader import TrainingLoader
from mcl_clip.data.reader import Reader
from mcl_clip.data.row_order import Source
from tests.faults import nodes

SETTINGS = {"seed": 0, "stage": 1}


def groups_of(sizes, *, seed: int = 0) -> np.ndarray:
    """Rows of groups of these sizes, in mixed order."""
    groups = np.repeat(np.arange(len(sizes)), sizes)
    return groups[np.random.default_rng(seed).permutation(len(groups))]


def make(groups, batch: int, *, rows_per_shard: int = 50, **options) -> BatchPlan:
    groups = np.asarray(groups)
    shard_of = np.arange(len(groups)) // rows_per_shard
    return BatchPlan(shard_of=shard_of, groups=groups, global_batch_size=batch, **{**SETTINGS, **options})


def sizes_like(count: int, rows: int) -> np.ndarray:
    """`count` sizes of at least 2, of all magnitudes, about `rows` together."""
    share = np.random.default_rng(count).pareto(1.5, count) + 0.01
    return np.maximum(2, rows * share / share.sum()).astype(int)


def pieces(rows: np.ndarray, groups: np.ndarray) -> list[Counter]:
    """How many rows of each group each batch holds."""
    return [Counter(groups[batch[batch != FILLER]].tolist()) for batch in rows]


def test_the_example_of_ten_rows():
    """What the docstrings of `row_order` and `batch_plan` show."""
    groups, options = [0, 0, 1, 0, 2, 0, 1, 0, 0, 2], {"rows_per_shard": 5, "seed": 0, "stage": 0}

    def order(**more) -> list[int]:
        return (np.concatenate(list(make(groups, 4, **options, **more)._order(0))) % 16).tolist()

    assert (random_words(10, 0, 0, "order", 0, 0) >> np.uint64(57)).tolist() == [
        1,
        119,
        78,
        123,
        57,
        95,
        55,
        73,
        47,
        96,
    ]
    assert order() == [0, 8, 6, 4, 7, 2, 5, 9, 1, 3]
    assert order(window_shards=1) == [0, 4, 2, 1, 3, 8, 6, 7, 5, 9]
    assert order(run_rows=2) == [0, 1, 7, 8, 5, 9, 3, 6, 2, 4]
    assert make(groups, 4, **options).epoch_rows(0).tolist() == [[1, 3, 4, 9], [2, 6, -1, -1], [0, 5, 7, 8]]


CASES = [
    *((sizes_like(count, 3000), batch) for count in (1, 10, 100, 1000) for batch in (2, 16, 64, 1000)),
    ([5], 8),  # fewer rows than a batch
    ([25], 8),  # N = qB + 1
    ([24], 8),
    ([17, 8], 8),
    ([9, 9, 9, 6], 8),
    ([1], 4),
]


@pytest.mark.parametrize(("sizes", "batch"), CASES)
@pytest.mark.parametrize("epoch", [0, 3])
def test_an_epoch_is_each_row_once_in_as_few_batches_as_possible(sizes, batch, epoch):
    groups = groups_of(sizes)
    rows = make(groups, batch).epoch_rows(epoch)
    assert rows.shape == (-(-len(groups) // batch), batch)
    is_row = rows != FILLER
    np.testing.assert_array_equal(np.sort(rows[is_row]), np.arange(len(groups)))
    with_fillers = np.flatnonzero(~is_row.all(1))
    assert len(with_fillers) <= 1
    for number in with_fillers:
        count = is_row[number].sum()
        assert is_row[number, :count].all()  # they come last
    assert all((np.diff(batch_rows[kept]) > 0).all() for batch_rows, kept in zip(rows, is_row, strict=True))


@pytest.mark.parametrize(("sizes", "batch"), CASES)
def test_groups_fill_whole_batches_and_are_cut_once_at_most(sizes, batch):
    groups, sizes = groups_of(sizes), np.asarray(sizes)
    found = pieces(make(groups, batch).epoch_rows(0), groups)
    for group, size in enumerate(sizes):
        mine = [piece[group] for piece in found if piece[group]]
        assert mine.count(batch) >= size // batch - 1
        assert sum(piece < batch for piece in mine) <= 2 + (batch == 2)
        assert size // batch <= len(mine) <= size // batch + 2


@pytest.mark.parametrize("batch", [16, 64, 250])
@pytest.mark.parametrize("count", [10, 100, 1000])
def test_no_row_is_alone_among_many_groups(count, batch):
    groups = groups_of(sizes_like(count, 3000))
    for epoch in range(5):
        found = pieces(make(groups, batch).epoch_rows(epoch), groups)
        assert not any(1 in piece.values() for piece in found)


def has_order_without_single_rows(sizes, batch: int) -> bool:
    """By trying every order of the groups laid end to end, as dealt and with B more of each single remainder."""
    left = [size % batch + batch * (size % batch == 1 and size > batch and len(sizes) > 1) for size in sizes]
    for order in itertools.permutations([size for size in left if size]):
        ends = np.cumsum(order)
        borders = np.union1d(np.r_[0, ends], np.arange(0, ends[-1], batch))
        if (np.diff(borders) != 1).all():
            return True
    return not any(left)


def test_single_rows_are_avoided_where_some_order_avoids_them():
    draw = np.random.default_rng(0)
    for trial in range(300):
        sizes = draw.integers(2, 20, draw.integers(1, 6))
        batch = int(draw.integers(4, 12))
        groups = groups_of(sizes)
        found = pieces(make(groups, batch, seed=trial).epoch_rows(0), groups)
        if any(1 in piece.values() for piece in found):
            assert not has_order_without_single_rows(sizes.tolist(), batch), (sizes, batch)


@pytest.mark.parametrize(
    ("sizes", "batch", "number", "digest"),
    [
        ([9] * 100 + [1] * 3, 10, 5, "2c1b1f5b1f1183b6"),
        ([3] * 8 + [2] * 33, 4, 0, "70e432b9da37c14e"),
        ([1, 2, 5, 5, 2, 1, 2, 5, 5, 2, 1], 4, 0, "e230ee86daf9a4cb"),
        ([1, 5, 5, 8, 2, 4, 2, 8, 5, 5, 1], 7, 0, "981879cd10c9e17c"),
    ],
)
def test_groups_are_packed_in_the_same_order_in_all_versions(sizes, batch, number, digest):
    """The plan of a run that goes on in another version; these sizes depend on each rule, and on how far it looks."""
    order = _packing_order(np.array(sizes), batch, ("packing", number))
    assert hashlib.blake2b(np.array(order, "<i8").tobytes(), digest_size=8).hexdigest() == digest


@pytest.mark.parametrize(("count", "batch"), [(1, 8), (10, 8), (100, 16)])
def test_the_batches_of_each_group_run_through_the_epoch(count, batch):
    """The k-th of c batches of a group lies within [k/c - G/T, (k+1)/c + G/T] of the epoch: G kinds, T batches."""
    groups = groups_of(sizes_like(count, 4000))
    found = pieces(make(groups, batch).epoch_rows(0), groups)
    kinds = [next(iter(piece)) if len(piece) == 1 and batch in piece.values() else -1 for piece in found]
    slack = len(set(kinds)) / len(kinds)
    for kind in set(kinds):
        places = np.flatnonzero(np.asarray(kinds) == kind) / len(kinds)
        first = np.arange(len(places)) / len(places)
        assert (places >= first - slack).all()
        assert (places <= first + 1 / len(places) + slack).all()


def test_the_plan_knows_nothing_of_processes(pool):
    groups = groups_of(sizes_like(20, 500))
    whole = make(groups, 16).epoch_rows(1)
    for size in (1, 2, 4):
        slices = pool.run(local_rows, size, groups, len(whole))
        np.testing.assert_array_equal(np.concatenate([rows for rows, _ in slices], axis=1), whole)
        assert {digest for _, digest in slices} == {make(groups, 16).digest(1)}


def local_rows(groups: np.ndarray, steps: int) -> tuple[np.ndarray, str]:
    plan = make(groups, 16)
    reader = object.__new__(Reader)  # nothing is read
    loader = TrainingLoader(plan, reader, transform=TrainTransform(size_px=(2, 2)), tokenizer=len)
    return np.stack([rows for _, _, rows in loader._requests(steps, 2 * steps)]), plan.digest(1)


def test_each_draw_is_another():
    groups = groups_of(sizes_like(10, 500))
    plans = [make(groups, 16), make(groups, 16, seed=1), make(groups, 16, stage=2), make(groups, 8)]
    digests = [plan.digest(epoch) for plan in plans for epoch in range(3)]
    assert len(set(digests)) == len(digests)
    assert make(groups, 16).digest(2) == digests[2]


def test_steps_count_through_epochs():
    plan = make(groups_of([30, 20]), 8)
    assert plan.batches_per_epoch == 7
    np.testing.assert_array_equal(plan.batch(15), make(groups_of([30, 20]), 8).epoch_rows(2)[1])
    assert [plan.epoch_of(step) for step in (0, 6, 7, 15)] == [0, 0, 1, 2]


def test_rows_of_negative_groups_are_never_drawn():
    groups = groups_of([30, 20])
    groups[::5] = -1
    rows = make(groups, 8).epoch_rows(0)
    np.testing.assert_array_equal(np.sort(rows[rows != FILLER]), np.flatnonzero(groups >= 0))


def test_a_mixture_draws_by_weight():
    sources = [Source(rows=40, weight=0.5), Source(rows=60, weight=1), Source(rows=20, weight=2)]
    plan = make(groups_of([70, 50]), 8, sources=sources)
    for start in (0, 4):
        rows = np.concatenate([plan.epoch_rows(epoch).ravel() for epoch in range(start, start + 4)])
        counts = np.bincount(rows[rows != FILLER], minlength=120)
        assert counts.tolist() == [2] * 40 + [4] * 60 + [8] * 20
    per_epoch = [np.bincount(rows[rows >= 0].ravel() // 20) for rows in map(plan.epoch_rows, range(4))]
    assert all(counts[:2].sum() == 20 and counts[2:5].sum() == 60 and counts[5] == 40 for counts in per_epoch)


def test_sources_are_mixed_throughout_the_epoch():
    plan = make(np.zeros(900, int), 30, sources=[Source(rows=300), Source(rows=600)])
    shares = (plan.epoch_rows(0) < 300).sum(1)
    assert set(shares) <= {9, 10, 11}


@pytest.mark.parametrize("window_shards", [1, 3])
def test_the_rows_of_a_batch_come_from_few_shards(window_shards):
    one_group = make(np.zeros(2000, int), 20, window_shards=window_shards)
    shards = [len(set(rows // 50)) for rows in one_group.epoch_rows(0)]
    assert max(shards) <= 2 * window_shards
    assert make(np.zeros(2000, int), 20).digest(0) != one_group.digest(0)
    assert max(len(set(rows // 50)) for rows in make(np.zeros(2000, int), 20).epoch_rows(0)) > 10
    order = [set(rows // 50) for rows in one_group.epoch_rows(1)]
    assert order != [set(rows // 50) for rows in one_group.epoch_rows(0)]  # the windows are shuffled anew


def test_windows_are_taken_in_one_order_by_all_groups():
    """At any time few shards are open, whatever the groups: what a bounded cache of shards needs."""
    groups = groups_of([1000, 1000])
    plan = make(groups, 20, window_shards=2)
    rows = plan.epoch_rows(0)
    open_shards = [len(set(rows[start : start + 10].ravel() // 50)) for start in range(len(rows) - 10)]
    assert max(open_shards) <= 10  # of 40; 200 of 2,000 rows fill 4


def test_units_of_neighbours_stay_together():
    groups = np.repeat([0, 1, 0], [403, 300, 297])
    plan = make(groups, 16, rows_per_shard=100, run_rows=4)
    order = np.concatenate(list(plan._order(0))) % 2 ** len(groups).bit_length()
    np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    runs = np.split(order, np.flatnonzero(np.diff(order) != 1) + 1)
    starts = {row for row in range(1000) if row in (0, 403, 703) or row % 100 == 0}
    for run in runs:
        assert len({(row // 100, groups[row]) for row in run}) == 1 or len(run) > 4  # runs may meet by chance
        assert len(run) >= 4 or any(run[-1] + 1 == start for start in {*starts, 1000})
    homogeneous = [len({row // 4 for row in rows}) for rows in plan.epoch_rows(0)]
    assert np.mean(homogeneous) < 8  # of 16 without


def test_a_large_plan_is_the_same_from_its_file(tmp_path, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    groups = groups_of(sizes_like(10, 500))
    stored = make(groups, 16, cache_dir=tmp_path, rows_in_memory=10)
    for epoch in (0, 1, 0):
        assert isinstance(stored.epoch_rows(epoch), np.memmap)
        assert stored.digest(epoch) == make(groups, 16).digest(epoch)
        assert len(list(tmp_path.iterdir())) == 1  # earlier epochs are not kept
    other = make(groups[::-1].copy(), 16, cache_dir=tmp_path, rows_in_memory=10)
    assert other.digest(0) != stored.digest(0)
    assert len(list(tmp_path.iterdir())) == 2  # another run does not write to the same file
    stored.remove_files()
    make(groups, 16, cache_dir=tmp_path).remove_files()  # in memory: no files
    assert other.digest(0) == make(groups[::-1].copy(), 16).digest(0)
    assert len(list(tmp_path.iterdir())) == 1
    assert stored.digest(0) == make(groups, 16).digest(0)


def test_plans_that_differ_in_anything_share_no_file(tmp_path):
    groups, base = groups_of([30, 20]), {"cache_dir": tmp_path, "rows_in_memory": 10}
    plans = [
        make(groups, 16, **base),
        make(groups[::-1].copy(), 16, **base),
        make(groups, 8, **base),
        make(groups, 16, **base, groups_per_batch=2),
        make(groups, 16, **base, rows_per_shard=7),
        *(make(groups, 16, **base | {name: 3}) for name in ("seed", "stage", "window_shards", "run_rows")),
        *(make(groups, 16, **base, sources=[Source(rows=50, weight=weight)]) for weight in (2, 2.001)),
        make(groups, 16, **base, sources=[Source(rows=20), Source(rows=30)]),
    ]
    digests = [plan.digest(0) for plan in plans]
    assert len(list(tmp_path.iterdir())) == len(plans)
    assert [plan.digest(0) for plan in plans] == digests


def computed_epochs(folder) -> int:
    plan = make(groups_of([30, 20]), 16, cache_dir=folder, rows_in_memory=10)
    with patch.dict(os.environ, LOCAL_RANK=str(rank())), patch.object(plan, "_compute", wraps=plan._compute) as compute:
        plan.epoch_rows(0)
    return compute.call_count


def test_one_process_of_a_node_computes_a_stored_plan(pool, tmp_path):
    assert pool.run(computed_epochs, 2, tmp_path) == [1, 0]


def test_an_epoch_that_could_not_be_planned_is_planned_again():
    plan, expected = make(groups_of([30, 20]), 16), make(groups_of([30, 20]), 16).digest(1)
    plan.epoch_rows(0)
    with patch.object(plan, "_compute", side_effect=OSError("no space")), pytest.raises(OSError, match="no space"):
        plan.epoch_rows(1)
    assert plan.digest(1) == expected


def test_numbers_of_groups_may_be_large():
    groups = groups_of(sizes_like(20, 300))
    expected = make(groups, 16).epoch_rows(0)
    np.testing.assert_array_equal(make(groups * 4000, 16).epoch_rows(0), expected)  # up to 76,000


def read_and_remove(folder: Path) -> str:
    plan = nodes.make_plan(cache_dir=folder, rows_in_memory=10)
    with patch.dict(os.environ, LOCAL_RANK=str(rank() % nodes.PROCESSES_OF_NODE)):
        digest = plan.digest(3)
        plan.remove_files()
    return digest


def test_nodes_remove_their_files_when_all_are_done(pool, tmp_path):
    (tmp_path / "other.npy").touch()
    processes = nodes.NODES * nodes.PROCESSES_OF_NODE
    assert pool.run(read_and_remove, processes, tmp_path) == [nodes.make_plan().digest(3)] * processes
    assert [path.name for path in tmp_path.iterdir()] == ["other.npy"]


def test_nodes_that_share_a_folder_have_files_of_their_own(pool, tmp_path):
    epochs = 30
    expected = [nodes.make_plan().digest(epoch) for epoch in range(epochs)]
    processes = nodes.NODES * nodes.PROCESSES_OF_NODE
    assert pool.run(nodes.read_epochs, processes, tmp_path, 0, epochs) == [expected] * processes
    names = sorted(path.name.partition("-node")[2] for path in tmp_path.iterdir())
    assert names == [f"{node}-epoch{epochs - 1}.npy" for node in (0, 2)]


@pytest.mark.slow
def test_nodes_that_are_killed_and_begin_again_have_the_same_epochs(tmp_path):
    assert nodes.run_with_kills(100, 5, tmp_path) == ""


def plain_plan(
    shard_of, groups, batch: int, epoch: int, sources, *, window_shards: int, run_rows: int, groups_per_batch: int
) -> np.ndarray:
    """The plan of an epoch by its definition: everything is sorted at once, and rows are dealt one by one."""
    batch //= groups_per_batch  # parts of batches, which are joined at the end
    orders, first = [], 0
    for source in sources:
        rows = first + np.flatnonzero(groups[first : first + source.rows] >= 0)
        first += source.rows
        if len(rows) and source.weight > 0:
            count = round(len(rows) * source.weight)
            turns = range((epoch + 1) * count // len(rows) + 1)
            passes = [plain_pass(shard_of, groups, rows, len(orders), turn, window_shards, run_rows) for turn in turns]
            orders.append(list(itertools.chain(*passes))[epoch * count : (epoch + 1) * count])
    places = [
        ((place + 0.5) / len(order), number) for number, order in enumerate(orders) for place in range(len(order))
    ]
    streams = [iter(order) for order in orders]
    order = [next(streams[number]) for _, number in sorted(places, key=lambda place: place[0])]

    name = (SETTINGS["seed"], SETTINGS["stage"], epoch)
    queues = {group: [row for row in order if groups[row] == group] for group in sorted({*groups[order].tolist()})}
    left = [len(queue) % batch for queue in queues.values()]
    pairs = zip(left, queues.values(), strict=True)
    left = [rest + batch * (rest == 1 and len(queue) > batch and len(queues) > 1) for rest, queue in pairs]
    whole, kinds = [], []
    for (group, queue), rest in zip(queues.items(), left, strict=True):
        for start in range(0, len(queue) - rest, batch):
            whole.append(queue[start : start + batch])
            kinds.append(group)
    remainders = [queue[len(queue) - rest :] for queue, rest in zip(queues.values(), left, strict=True)]
    packed = list(itertools.chain(*(remainders[number] for number in _packing_order(np.array(left), batch, name))))
    batches = whole + [packed[start : start + batch] for start in range(0, len(packed), batch)]
    turn = _batch_order(np.array(kinds, np.int64), len(batches) - len(whole), name)
    dealt = [[*batches[number], *[FILLER] * (batch - len(batches[number]))] for number in turn]
    dealt += [[FILLER] * batch] * (-len(dealt) % groups_per_batch)
    joined = np.array(dealt).reshape(-1, batch * groups_per_batch).tolist()
    return np.array([[*sorted(row for row in rows if row >= 0), *(row for row in rows if row < 0)] for rows in joined])


def plain_pass(shard_of, groups, rows, source: int, turn: int, window_shards: int, run_rows: int) -> list[int]:
    name = (SETTINGS["seed"], SETTINGS["stage"], "order", source, turn)
    unit, length, units = -1, 0, []
    for before, row in zip([None, *rows[:-1]], rows, strict=True):
        same = before is not None and (shard_of[before], groups[before]) == (shard_of[row], groups[row])
        length = length + 1 if same and length < run_rows else 1
        unit += length == 1
        units.append(unit)
    words = random_words(unit + 1, *name).tolist()
    shards = sorted({*shard_of[rows].tolist()})
    drawn = random_words(len(shards), *name, "shards").tolist()
    place = {shards[number]: place for place, number in enumerate(sorted(range(len(shards)), key=drawn.__getitem__))}
    window = [place[shard] // window_shards if window_shards else 0 for shard in shard_of[rows].tolist()]
    order = sorted(range(len(rows)), key=lambda number: (window[number], words[units[number]]))
    return [int(rows[number]) for number in order]


@pytest.mark.parametrize("case", range(60))
def test_the_plan_is_what_its_definition_says_in_whatever_parts_it_is_made(case, monkeypatch):
    draw = np.random.default_rng(case)
    if case % 4:
        for limit in ("BLOCK_ROWS", "PART_ROWS", "SORTED_ROWS"):
            monkeypatch.setattr(order_module, limit, int(draw.integers(1, 70)))
        monkeypatch.setattr("mcl_clip.data.batch_plan.BLOCK_ROWS", int(draw.integers(1, 70)))
        monkeypatch.setattr(order_module, "MAX_PARTS", int(draw.integers(1, 6)))
    rows, count, runs = int(draw.integers(20, 400)), int(draw.choice([1, 3, 12, 80])), int(draw.integers(1, 6))
    groups = np.repeat(draw.choice(count, rows, p=draw.dirichlet(np.ones(count))), runs)[:rows]
    groups[draw.random(rows) < draw.choice([0, 0.2])] = -1
    groups = groups.astype(draw.choice([np.int16, np.int64]))
    shard_of = draw.permutation(30)[np.sort(draw.integers(0, 30, rows))]
    sizes = np.diff([0, *np.sort(draw.integers(0, rows, int(draw.integers(0, 3)))), rows]).tolist()
    weights = [float(draw.choice([0, 0.4, 1, 2.5])) for _ in sizes]
    weights[-1] = weights[-1] or 1.0
    sources = [Source(rows=size, weight=weight) for size, weight in zip(sizes, weights, strict=True)]
    options = {"window_shards": int(draw.choice([0, 1, 4])), "run_rows": int(draw.choice([1, 1, 3]))}
    batch = int(draw.choice([2, 8, 32, 500]))
    options["groups_per_batch"] = int(draw.choice([1, 1, 2, batch // 2]))
    batch -= batch % options["groups_per_batch"]
    plan = BatchPlan(shard_of=shard_of, groups=groups, global_batch_size=batch, sources=sources, **SETTINGS, **options)
    for epoch in (0, 3):
        expected = plain_plan(shard_of, groups, batch, epoch, sources, **options)
        np.testing.assert_array_equal(plan.epoch_rows(epoch), expected)
        assert plan.batch(epoch * plan.batches_per_epoch).dtype == np.int64


def test_words_can_be_drawn_from_any_place_on():
    whole = random_words(50, "some", 3)
    for start in range(12):
        for stop in (start, start + 1, 17, 50):
            assert random_words_between(start, stop, "some", 3).tolist() == whole[start:stop].tolist()


def test_equal_words_leave_rows_in_order(monkeypatch):
    monkeypatch.setattr(
        order_module, "random_words_between", lambda start, stop, *_: np.arange(start, stop, dtype=np.uint64) % 3 << 62
    )
    monkeypatch.setattr(order_module, "BLOCK_ROWS", 7)
    for limit, parts in [(1000, 1), (5, 3)]:
        monkeypatch.setattr(order_module, "PART_ROWS", limit)
        monkeypatch.setattr(order_module, "SORTED_ROWS", limit)
        order = np.concatenate(list(make(np.zeros(40, int), 8)._order(0)))
        assert order.tolist() == sorted(range(40), key=lambda row: row % 3), parts


@pytest.mark.parametrize("sizes", [[100] * 8, sizes_like(20, 3000), [40]])
def test_batches_are_made_of_parts_of_several_groups(sizes):
    groups = groups_of(sizes)
    rows = make(groups, 32, groups_per_batch=4).epoch_rows(1)
    assert rows.shape == (-(-len(groups) // 32), 32)
    np.testing.assert_array_equal(np.sort(rows[rows != FILLER]), np.arange(len(groups)))
    found = pieces(rows, groups)
    assert not any(1 in piece.values() for piece in found)
    if len(sizes) > 1:
        assert np.mean([len(piece) for piece in found]) > 3
    together = {tuple(sorted(piece)) for piece in found}
    assert len(together) >= min(len(sizes), len(found)) // 2  # other groups in each batch
    assert make(groups, 32, groups_per_batch=4)._name != make(groups, 32)._name  # of their files


def test_words_at_the_borders_of_parts_and_buckets_put_each_row_in_its_place_once(monkeypatch):
    parts = 3
    borders = [2**64 * part // parts for part in range(parts)]
    values = [0, 2**64 - 1, *(border + more for border in borders[1:] for more in (-1, 0, 1))]
    words = np.array(values, np.uint64)[np.arange(1000) * 5 % len(values)]
    monkeypatch.setattr(order_module, "random_words_between", lambda start, stop, *_: words[start:stop])
    monkeypatch.setattr(order_module, "MAX_PARTS", parts)
    monkeypatch.setattr(order_module, "PART_ROWS", 1)
    for sorted_rows in (10_000, 1):  # in one bucket, and in as many as there may be
        monkeypatch.setattr(order_module, "SORTED_ROWS", sorted_rows)
        order = np.concatenate(list(make(np.zeros(1000, int), 8)._order(0)))
        np.testing.assert_array_equal(order, np.argsort(words, kind="stable"))


def test_a_digest_is_of_64_bit_rows_in_one_piece():
    plan = make(groups_of([30, 20]), 8)
    rows = plan.epoch_rows(0).astype("<i8")
    assert plan.digest(0) == hashlib.blake2b(str(rows.shape).encode() + rows.tobytes(), digest_size=16).hexdigest()


@pytest.mark.parametrize("min_negatives", [1, 5])
def test_statistics_are_what_counting_gives(min_negatives):
    groups = groups_of([*sizes_like(30, 600), 1, 1])
    plan = make(groups, 16)
    found, counted = plan.statistics(2, min_negatives=min_negatives), pieces(plan.epoch_rows(2), groups)
    negatives = [size - 1 for piece in counted for size in piece.values() for _ in range(size)]
    assert found.batches == len(counted)
    assert found.rows == len(groups) == len(negatives)
    assert found.fillers == len(counted) * 16 - len(groups)
    pure = sum(sum(piece.values()) for piece in counted if len(piece) == 1)
    assert found.share_homogeneous == pytest.approx(pure / len(groups))
    assert found.mean_negatives == pytest.approx(np.mean(negatives))
    assert found.rows_without_weight == sum(count < min_negatives for count in negatives) > 0


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(UserError, match="there is no row to train on"):
        make(np.full(10, -1), 4)
    with pytest.raises(UserError, match="the sources have 9 rows and the labels 10; index again"):
        make(np.zeros(10, int), 4, sources=[Source(rows=9)])
