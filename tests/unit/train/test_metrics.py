from types import SimpleNamespace

import pytest
import torch

from mcl_clip.core.distributed import rank
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import read_jsonl
from mcl_clip.train import metrics
from mcl_clip.train.metrics import BadSamples, Meter, Spans, StepLog


def test_a_rewound_log_goes_on_after_its_step(tmp_path):
    log = StepLog(tmp_path / "metrics.jsonl")
    assert log.rewind(0) == []
    for step in (10, 20, 30):
        log.add({"step": step, "loss": step / 8, "shard": "a\u2028b"})
    with log.path.open("a") as file:
        file.write('{"step": 40, "lo')  # the process was killed
    kept = StepLog(log.path).rewind(20)
    assert [record["step"] for record in kept] == [10, 20]
    log.add({"step": 25, "loss": 1.0})
    assert [record["step"] for record in read_jsonl(log.path)] == [10, 20, 25]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_log_whose_records_all_come_after_the_step_is_empty(tmp_path):
    """Nothing was saved when the job ended."""
    log = StepLog(tmp_path / "metrics.jsonl")
    log.add({"step": 10, "loss": 1.0})
    assert log.rewind(0) == []
    assert log.path.read_text() == ""


def rows(groups=(0,), losses=(1.0,), weights=(1.0,)) -> dict[str, torch.Tensor]:
    return dict(
        zip(("row_groups", "row_losses", "row_weights"), map(torch.tensor, (groups, losses, weights)), strict=True)
    )


def test_a_meter_sums_until_it_is_read(monkeypatch):
    clock = iter((100.0, 101.0, 105.0, 107.0, 108.0))  # at the start, then twice for each reading
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    meter, many = Meter(("loss", "rows"), torch.device("cpu")), 2**24 + 1  # not a number of float32
    for step in range(3):
        meter.add({"loss": torch.tensor(0.5, requires_grad=True) * step, "rows": torch.tensor(many)} | rows())
    assert meter.take() == ({"loss": 1.5, "rows": 3.0 * many}, {}, 3, 1.0)
    assert meter.take() == ({"loss": 0.0, "rows": 0.0}, {}, 0, 2.0)


def bad(*rows: int, shard: str = "a.tar", reason: str = "broken_image") -> list[tuple[int, str, str]]:
    return [(row, shard, reason) for row in rows]


def test_bad_samples_are_counted_once_and_written_down(tmp_path):
    samples = BadSamples(tmp_path / "bad.jsonl", max_fraction=0.1, rows=1000)
    samples.add(bad(5, 3))
    samples.add(bad(8, reason="not_utf8"))
    samples.flush(10, 100)
    samples.add(bad(3, 9))
    samples.flush(20, 200)
    assert samples.count == 4
    assert samples.by_reason() == {"broken_image": 3, "not_utf8": 1}
    assert [(record["step"], record["row"]) for record in read_jsonl(tmp_path / "bad.jsonl")] == [
        (10, 3), (10, 5), (10, 8), (20, 9),
    ]  # fmt: skip


def test_a_restart_takes_back_what_came_after_its_checkpoint(tmp_path):
    path = tmp_path / "bad.jsonl"
    samples = BadSamples(path, max_fraction=0.1, rows=1000)
    for step, row in ((10, 3), (20, 4), (30, 5)):
        samples.add(bad(row))
        samples.flush(step, 100)
    again = BadSamples(path, max_fraction=0.1, rows=1000, step=20)
    assert again.count == 2
    again.add(bad(4, 5))
    again.flush(30, 100)
    assert [record["row"] for record in read_jsonl(path)] == [3, 4, 5]


@pytest.mark.parametrize(
    ("rows", "seen", "allowed"),
    [
        (1000, 10, 10),  # a small set is judged as a whole
        (50_000, 200, 100),  # a large one by 10,000 rows at first
        (50_000, 30_000, 300),  # then by what was seen
        (50_000, 900_000, 500),  # in many epochs
    ],
)
def test_too_many_bad_samples_stop_the_run(tmp_path, rows, seen, allowed):
    samples = BadSamples(tmp_path / "bad.jsonl", max_fraction=0.01, rows=rows)
    samples.add(bad(*range(allowed - 2), shard="first.tar"))
    samples.add(bad(allowed, allowed + 1, shard="second.tar", reason="not_utf8"))
    samples.flush(1, seen)
    samples.add(bad(allowed + 2, shard="second.tar"))
    with pytest.raises(UserError) as caught:
        samples.flush(2, seen)
    assert str(caught.value) == (
        f"{allowed + 1} of about {min(seen, rows)} samples could not be decoded {{'broken_image': {allowed - 1}, "
        f"'not_utf8': 2}}, more than --data.max-bad-fraction 0.01 allows; most in first.tar ({allowed - 2}), "
        f"second.tar (3). Fix or remove these shards, or raise the limit"
    )
    assert caught.value.everywhere


def test_bad_samples_are_sent_to_the_other_processes_once(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(metrics, "gather_objects", lambda value: sent.append(list(value)) or [value])
    samples = BadSamples(tmp_path / "bad.jsonl", max_fraction=0.1, rows=1000)
    for row in (3, 4):
        samples.add(bad(row))
        samples.flush(row, 100)
    assert sent == [bad(3), bad(4)]


def found_by_processes(path) -> tuple[int, float, float]:
    samples = BadSamples(path, max_fraction=0.1, rows=1000)
    samples.add(bad(rank(), 100))
    samples.flush(1, 10)
    meter = Meter(("rows",), torch.device("cpu"), num_groups=2)
    # Group 0 has the rows of all processes, with losses of 0 to 3; group 1 is on process 3 alone.
    weights = (1.0, float(rank() == 3))
    meter.add({"rows": torch.tensor(rank() + 1)} | rows((0, 1), (float(rank()), 9.5), weights))
    sums, spread, *_ = meter.take()
    return samples.count, sums["rows"], spread["p50"]


def test_processes_share_counts(tmp_path, pool):
    assert pool.run(found_by_processes, 4, tmp_path / "bad.jsonl") == [(5, 10.0, (1.5 + 9.5) / 2)] * 4
    assert sorted(record["row"] for record in read_jsonl(tmp_path / "bad.jsonl")) == [0, 1, 2, 3, 100]


def counted_with_another_view(path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        if rank() == 1:
            patch.setattr(metrics, "read_jsonl", lambda path: [])
        return BadSamples(path, max_fraction=0.1, rows=1000, step=10).count


def test_all_processes_resume_the_records_that_the_main_process_sees(tmp_path, pool):
    samples = BadSamples(tmp_path / "bad.jsonl", max_fraction=0.1, rows=1000)
    samples.add(bad(3, 4))
    samples.flush(10, 100)
    assert pool.run(counted_with_another_view, 2, tmp_path / "bad.jsonl") == [2, 2]


def test_the_spread_of_the_loss_is_over_groups():
    meter = Meter(("row_sum",), torch.device("cpu"), num_groups=4)
    losses, weights = (1.0, 3.0, 5.0001, 7.0, 99.0, 99.0), (1.0, 1.0, 1.0, 1.0, 0.0, 0.0)
    meter.add({"row_sum": torch.tensor(6)} | rows((0, 0, 1, 2, -1, 2), losses, weights))
    # of the means 2, 5.0001 and 7
    assert meter.take()[1] == pytest.approx({"p10": 2.60002, "p50": 5.0001, "p90": 6.60002}, abs=1e-6)
    assert meter.take()[1] == {}  # nothing since then


class Clock(Spans):
    """Spans whose time is moved by hand."""

    time = 0.0

    def now(self, *, wait=True):
        return self.time


def test_every_moment_is_charged_to_one_span():
    spans = Clock()

    def spend(seconds):
        spans.time += seconds

    with spans("loss"):
        spend(100)
    assert spans.take() == {"other": 0, "loss": 100}
    spend(1)
    with spans("backward"):
        spend(2)
        with spans("forward"):
            spend(4)
        spend(8)
        spans.switch("exchange")
        spend(16)
    spend(32)
    assert spans.take() == {"other": 33, "backward": 10, "forward": 4, "exchange": 16}
    assert spans.history == []  # kept in profiling mode alone


def test_a_span_ends_with_an_error_too():
    spans = Clock(torch.device("cpu"))
    with pytest.raises(ZeroDivisionError), spans("loss"):
        spans.time += 1 / 0
    spans.time += 1
    assert spans.take()["other"] == 1
    assert spans.history == [("other", 0), ("loss", 0), ("other", 1)]


def test_a_span_is_marked_for_the_profiler_of_torch():
    with torch.autograd.profiler.profile() as profile, Spans()("exchange of features"):
        torch.ones(1)
    assert "exchange of features" in {event.key for event in profile.key_averages()}


def test_only_the_borders_of_a_profile_wait_for_the_gpu(monkeypatch):
    waited = []
    stream = SimpleNamespace(synchronize=lambda: waited.append("."))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    for device, expected in ((torch.device("cuda"), [3, 3]), (torch.device("cpu"), [0, 0]), (None, [0, 0])):
        spans = Spans(device)
        waited.clear()
        with spans("loss"):
            spans.switch("exchange")
        found = [len(waited)]
        spans.switch("device", wait=False)
        spans.now(wait=False)
        assert [*found, len(waited)] == expected, device
