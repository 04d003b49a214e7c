import math
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from mcl_clip.config import (
    ClusterConfig,
    DataConfig,
    EvalConfig,
    LockConfig,
    MachineConfig,
    RunConfig,
    StageConfig,
    TowerConfig,
    TrainConfig,
)
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import DONE
from mcl_clip.data.index import ShardIndex
from mcl_clip.runs.phase import Phase
from mcl_clip.stages.diagnose import diagnose
from mcl_clip.tools import doctor, estimates
from mcl_clip.tools import doctor_data as data
from mcl_clip.tools import doctor_machine as machine
from mcl_clip.tools.doctor import finding_text
from mcl_clip.tools.doctor_machine import Finding, attempt
from tests.unit.data.tars import pairs, write_tar

MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 2, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 100, "width": 16, "heads": 2, "layers": 1},
}
TOWER = estimates.TowerSize(parameters=1_000_000, trained=600_000, saved_bytes=10_000, pixels=3072, dim=16)
STAGE = StageConfig(
    train=TrainConfig(steps=100, global_batch_size=64, lr=1e-3, warmup_steps=10),
    cluster=ClusterConfig(num_clusters=10, metric="cosine"),
)


def stage(*, cluster=None, **train):
    """STAGE with other settings."""
    return replace(
        STAGE,
        train=replace(STAGE.train, **train),
        cluster=replace(STAGE.cluster, **cluster) if cluster else STAGE.cluster,
    )


def texts(findings, level):
    return [finding.text for finding in findings if finding.level == level]


def only(findings, level):
    (text,) = texts(findings, level)
    return text


def result_of(check):
    """What a check returns, and its findings."""
    findings = []
    while True:
        try:
            findings.append(next(check))
        except StopIteration as end:
            return end.value, findings


# --- findings


def test_a_finding_is_one_plain_line():
    line = finding_text(Finding("warning", "disk", "little is left"))
    assert line == "warning disk       little is left"


def test_on_a_terminal_a_finding_is_broken_and_coloured():
    shown = finding_text(Finding("FAIL", "disk", "word " * 40), columns=60, has_colours=True)
    lines = shown.replace("\033[31m", "").replace("\033[0m", "").splitlines()
    assert shown.startswith("\033[31mFAIL")
    assert len(lines) > 3
    assert max(map(len, lines)) <= 60
    assert all(line.startswith(" " * 19 + "word") for line in lines[1:])


def test_an_attempt_names_what_is_wrong():
    def fail(error):
        raise error

    assert result_of(attempt("x", lambda: 3)) == (3, [])
    assert result_of(attempt("x", lambda: fail(UserError("no")))) == (None, [Finding("FAIL", "x", "no")])
    assert only(attempt("x", lambda: Path("/nowhere/x").read_text()), "FAIL").startswith("/nowhere/x: there is no such")
    assert only(attempt("x", lambda: 1 / 0), "FAIL") == "ZeroDivisionError: division by zero"
    assert len(only(attempt("x", lambda: fail(ValueError("y" * 10_000))), "FAIL")) < 400


# --- packages and devices


@pytest.mark.parametrize(
    ("installed", "sentence"),
    [
        ("", "torch is not installed; pip install 'torch<3,>=2.6'"),
        ("2.5.1", "torch 2.5.1 does not meet torch<3,>=2.6"),
        ("3.0", "torch 3.0 does not meet torch<3,>=2.6"),
    ],
)
def test_packages_outside_their_limits(installed, sentence):
    assert only(machine.check_versions({"torch<3,>=2.6": installed}), "FAIL").startswith(sentence)


@pytest.mark.parametrize("installed", ["2.6", "2.6.0+cu124", "2.10.1", "2.15.0.dev20260101"])
def test_packages_within_their_limits(installed):
    assert not texts(machine.check_versions({"torch<3,>=2.6": installed}), "FAIL")


@pytest.mark.parametrize(("hub", "warns"), [("1.9.0", False), ("2.0", True), ("2.4.0", True)])
def test_a_bad_combination_is_a_warning(hub, warns):
    found = list(machine.check_versions({"huggingface_hub": hub, "open_clip_torch": "3.3.0"}))
    assert bool(texts(found, "warning")) == warns
    if warns:
        assert (
            f"open_clip_torch 3.3.0 with huggingface_hub {hub}: the run is not affected" in texts(found, "warning")[0]
        )


def test_the_installed_packages_are_found(monkeypatch):
    own = machine.requires("mcl_clip")
    monkeypatch.setattr(machine, "requires", lambda name: [*own, "no-such-package>=1"])
    found = {machine.Requirement(text).name: version for text, version in machine.find_versions().items()}
    assert found["torch"] in (torch.__version__, torch.__version__.split("+")[0])
    assert found["no-such-package"] == ""
    assert found.keys() >= {"fsspec", *machine.SHOWN_PACKAGES}
    assert not any("pytest" in name for name in found)


OLD, NEW = machine.Gpu("V100", 32 * 10**9, False), machine.Gpu("H100", 80 * 10**9, True)


def devices(gpus, **changes):
    options = {"cores": 16, "processes": 1, "workers": 2, "precisions": ["fp32"], "trained": 1000} | changes
    return list(machine.check_devices(gpus, **options))


def test_devices_are_named():
    assert only(devices([NEW, NEW], processes=2), "ok") == "16 processor cores, 2 x H100 (80.0 GB each); 2 processes"
    assert only(devices([], cores=1), "ok") == "1 processor core, no GPU; 1 process"
    assert "32 processes on 4 machines like this" in only(devices([NEW] * 8, processes=32), "ok")


def test_bfloat16_without_support():
    assert "V100 has no native bfloat16" in only(devices([NEW, OLD], precisions=["fp32", "bf16"]), "warning")
    assert not texts(devices([NEW], precisions=["bf16"]), "warning")
    assert not texts(devices([OLD]), "warning")


def test_a_large_tower_without_a_gpu():
    assert "no GPU for 400M parameters" in only(devices([], trained=400_000_000), "warning")
    assert not texts(devices([NEW], trained=400_000_000), "warning")


def test_more_loaders_than_cores():
    assert only(devices([NEW] * 2, processes=2, workers=9), "warning") == (
        "18 loader workers share 16 cores; use --machine.workers 8"
    )
    assert not texts(devices([NEW] * 2, processes=8, workers=8), "warning")  # on four machines of 16 cores


# --- sizes


def test_the_size_of_a_tower_is_that_of_the_real_one():
    size = estimates.measure(MODEL, replace(STAGE.train, lock=LockConfig(text=True)))
    real = open_clip.CLIP(**MODEL)
    assert size.parameters == sum(parameter.numel() for parameter in real.parameters())
    visual = sum(parameter.numel() for parameter in real.visual.parameters())
    assert size.trained == visual + 1  # and the temperature
    assert (size.pixels, size.dim) == (3 * 32 * 32, 16)


def test_what_is_kept_for_backward_is_nearly_what_torch_keeps():
    size, model = estimates.measure(MODEL, STAGE.train), open_clip.CLIP(**MODEL)
    own, kept = {parameter.data_ptr() for parameter in model.parameters()}, {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    counts = []
    for samples in (2, 34):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = model(torch.zeros(samples, 3, 32, 32), torch.zeros(samples, 12, dtype=torch.int64))
        counts.append(sum(kept.values()))
        del out
    assert size.saved_bytes == pytest.approx((counts[1] - counts[0]) / 32, rel=0.3)
    assert estimates.measure(MODEL, replace(STAGE.train, lock=LockConfig(text=True))).saved_bytes < size.saved_bytes


def decay_lines(*stages, **options):
    swin = {"timm_model_name": "swin_tiny_patch4_window7_224", "timm_pool": "", "timm_proj": "linear"}
    sizes = estimates.measure_stages(stages, {**MODEL, "vision_cfg": swin}, **options)
    return texts(doctor.describe_decay(stages, sizes), "ok")


def test_what_the_weight_decay_spares_is_listed():
    locked, tables = stage(lock=LockConfig(text=True)), "attn.relative_position_bias_table (12)"
    (text,) = decay_lines(STAGE)
    assert re.fullmatch(
        rf"0\.2 on \d+ of \d+ parameters, not on gains and biases, positional_embedding, .*{re.escape(tables)}", text
    )
    assert decay_lines(STAGE, STAGE) == [text]
    assert decay_lines(STAGE, locked)[0] == f"stage 0: {text}"
    assert "positional_embedding" not in decay_lines(STAGE, locked)[1]
    assert tables not in decay_lines(STAGE, decays_unlisted=True)[0]
    assert not decay_lines(stage(weight_decay=0.0))
    assert decay_lines(stage(weight_decays={"token": 0.1})) == [f"{text}; then token"]


def test_a_tower_that_cannot_be_made():
    with pytest.raises(UserError, match=r"open_clip cannot build this model .*depth"):
        estimates.measure({**MODEL, "vision_cfg": {"depth": 3}}, STAGE.train)


def test_memory():
    parts = estimates.estimate_memory(STAGE.train, TOWER, 2)
    assert parts == {
        "weights, gradients and Adam": 4 * (1_000_000 + 4 * 600_000),
        "activations": 32 * 10_000,
        "loss": 32 * 64 * estimates.BYTES_PER_LOGIT,
    }
    assert estimates.estimate_memory(STAGE.train, TOWER, 1)["weights, gradients and Adam"] == 4 * (
        1_000_000 + 3 * 600_000
    )
    small = replace(STAGE.train, precision="bf16", grad_cache_rows=8, loss_chunk_rows=16, average_decay=0.9)
    assert estimates.estimate_memory(small, TOWER, 1) == {
        "weights, gradients and Adam": 4 * (2_000_000 + 3 * 600_000),
        "activations": 8 * 10_000 // 2,
        "loss": 16 * 64 * estimates.BYTES_PER_LOGIT,
    }
    assert estimates.estimate_memory(replace(STAGE.train, steps=0), TOWER, 1) == {}
    assert estimates.estimate_memory(STAGE.train, None, 1) == {}


def check_memory(stages, sizes, *, memory, free=10**12, shared=math.inf):
    """Findings with 8 batches in the loaders."""
    options, gpus = MachineConfig(workers=2, prefetch_batches=4), [machine.Gpu("x", memory, True)]
    return machine.check_memory(stages, sizes, options, gpus, processes=1, free=free, shared=shared)


def test_memory_without_a_gpu():
    found = machine.check_memory([STAGE], [TOWER], MachineConfig(), [], processes=2, free=2 * 10**9, shared=math.inf)
    assert "of 1.0 GB of free memory per process" in only(found, "ok")


@pytest.mark.parametrize(
    ("memory", "level", "sentence"),
    [
        (10**9, "ok", "stage 0 takes about 12.0 MB of 1.0 GB of GPU memory per process (rough): weights"),
        (
            11_500_000,
            "warning",
            "it may not fit: use smaller batches, more processes, bf16, or --stages.K.train.grad-checkpointing",
        ),
        (10**6, "FAIL", "the model alone does not fit, use a smaller one"),
    ],
)
def test_memory_against_a_device(memory, level, sentence):
    assert sentence in only(check_memory([STAGE, stage(steps=0)], [TOWER, TOWER], memory=memory), level)


def test_memory_of_batches_that_wait():
    found = check_memory([STAGE], [TOWER], memory=10**12, free=3 * 10**6)
    assert "prefetched batches take up to 1.6 MB of 3.0 MB; use fewer --machine.workers" in only(found, "warning")


def test_shared_memory_of_batches_that_wait():
    found = check_memory([STAGE], [TOWER], memory=10**12, shared=1_500_000)
    assert only(found, "FAIL") == (
        "prefetched batches take up to 1.6 MB of 1.5 MB of /dev/shm; enlarge it (docker run --shm-size, or --ipc "
        "host) or use fewer --machine.workers or --machine.prefetch-batches"
    )


def test_memory_of_an_unknown_tower():
    assert "the size of the model is unknown" in only(check_memory([STAGE], [None], memory=1, free=1), "warning")


def test_free_memory_is_that_of_this_machine():
    assert 2**26 < machine.free_memory() < 2**46


def test_disk_needs():
    clusters = {"on": "product", "text_clusters": 5, "metric": "shared"}
    product = stage(steps=0, average_decay=0.9, cluster=clusters)
    found = estimates.estimate_disk([STAGE, product], [TOWER, TOWER], rows=1000, keep_checkpoints=2)
    model, adam = 4_000_000, 8 * 600_000
    assert found == {
        "index": 75 * 1000,
        "stage-0/train": model + 3 * (model + adam),
        "stage-0/embed": 1000 * (2 * 2 * 16 + 2 * 4 + 2 * 8 + 1),
        "stage-0/cluster": 1000 * 4,
        "stage-0/labels": 8000,
        "stage-1/train": model,
        "stage-1/embed": 1000 * (2 * 2 * 16 + 2 * 4 + 2 * 8 + 1),
        "stage-1/cluster": 1000 * (2 * 4 + 2 * 16),
        "stage-1/labels": 8000,
        "combined": 2 * model,
    }
    averaged = estimates.estimate_disk([stage(average_decay=0.9)], [TOWER], rows=0, keep_checkpoints=1)
    assert averaged["stage-0/train"] == model + 2 * (2 * model + adam)
    large = estimates.estimate_disk([STAGE], [TOWER], rows=60_000_000, keep_checkpoints=1)
    assert large["index"] == 60_000_000 * (75 + 8)
    cached = stage(lock=LockConfig(text=True))
    seen_twice = STAGE.train.steps * STAGE.train.global_batch_size // 2
    for rows, more in ((seen_twice, seen_twice * (4 * 16 + 16)), (seen_twice + 1, 0)):
        options = {"rows": rows, "keep_checkpoints": 1}
        plain, with_texts = (estimates.estimate_disk([each], [TOWER], **options) for each in (STAGE, cached))
        assert with_texts["stage-0/train"] - plain["stage-0/train"] == more


@pytest.mark.parametrize(
    ("free", "level", "sentence"),
    [
        (
            10**9,
            "ok",
            "needs about 350.0 MB more (checkpoints and models 300.0 MB, embeddings 50.0 MB), 1.0 GB are free",
        ),
        (4 * 10**8, "warning", "400.0 MB are free: little is left; free some space"),
        (3 * 10**8, "FAIL", "300.0 MB are free; free some space, keep fewer --machine.keep-checkpoints"),
    ],
)
def test_disk_space(tmp_path, monkeypatch, free, level, sentence):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    needed = {"stage-0/train": 3 * 10**8, "stage-0/embed": 5 * 10**7}
    assert sentence in only(machine.check_disk(tmp_path / "new/run", needed), level)


def test_what_is_there_already_is_not_needed_again(tmp_path):
    folder = tmp_path / "stage-0/train/model"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(1000))
    assert "needs about 1.0 kB more" in only(machine.check_disk(tmp_path, {"stage-0/train": 2000}), "ok")
    assert "needs no more" in only(machine.check_disk(tmp_path, {"stage-0/train": 500}), "ok")
    (tmp_path / "stage-0/train" / DONE).write_text("{}")
    assert "needs no more" in only(machine.check_disk(tmp_path, {"stage-0/train": 2000}), "ok")


def test_a_run_directory_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("x")
    assert f"{tmp_path / 'file'} is a file" in only(machine.check_disk(tmp_path / "file/run", {}), "FAIL")


# --- steps and groups


def test_steps_and_epochs():
    found = list(doctor.check_steps([STAGE, stage(steps=0)], rows=1000))
    assert only(found, "ok") == "100 steps in 2 stages: 100 of 64 rows (6.25 epochs)"
    assert len(found) == 1
    many = stage(steps=20_000)
    assert "20,000 of 64 rows (1,250 epochs)" in only(doctor.check_steps([many], rows=1000), "ok")
    assert only(doctor.check_steps([STAGE], rows=None), "ok") == "100 steps in 1 stage: 100 of 64 rows"


def test_steps_that_go_badly():
    found = list(doctor.check_steps([STAGE, stage(warmup_steps=100)], rows=50))
    large, slow = texts(found, "warning")
    assert large.startswith("--stages.0.train.global-batch-size 64 is more than the 50 rows of an epoch")
    assert large.endswith("(also stage 1)")
    assert slow.startswith("--stages.1.train.warmup-steps 100 of 100 steps")


def test_expected_rows_of_a_label():
    product = stage(cluster={"on": "product", "num_clusters": 2, "text_clusters": 5})
    assert estimates.rows_per_label([STAGE, product, STAGE], 6000) == [6000, 600, 60]


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (10, "stage 1 has 1 rows per label: rows with fewer than 1 negatives get no weight"),
        (300, "stage 1 has 30 rows per label: most are merged, into groups of at least 32 rows"),
        (630, "stage 1 has 63 rows per label: a batch of 64 holds several groups, with about 62 negatives per row"),
    ],
)
def test_groups_that_are_too_small(rows, sentence):
    assert only(doctor.check_groups([STAGE, STAGE], rows), "warning").startswith(sentence)


def test_groups_that_are_too_small_for_their_part_of_a_batch():
    parts = stage(global_batch_size=128, groups_per_batch=2, min_group_size=8)
    assert [finding.level for finding in doctor.check_groups([STAGE, parts], 640)] == ["ok"]
    sentence = "stage 1 has 63 rows per label: a batch of 128 holds more than 2 groups"
    assert only(doctor.check_groups([STAGE, parts], 630), "warning").startswith(sentence)


def test_groups_of_a_batch_are_enough():
    found = list(doctor.check_groups([STAGE, STAGE], 640))
    assert [finding.level for finding in found] == ["ok"]
    assert found[0].text.endswith("stage 1 64")


def test_groups_do_not_matter_without_them():
    assert not list(doctor.check_groups([STAGE, stage(groups="none"), stage(steps=0)], 640))


def test_clusters_that_cannot_be():
    many = stage(cluster={"on": "product", "num_clusters": 3, "text_clusters": 500})
    assert "--stages.1.cluster.num-clusters 500 is more than the 400 rows" in only(
        doctor.check_groups([STAGE, many], 400), "FAIL"
    )
    huge = stage(groups="none", cluster={"on": "product", "num_clusters": 10**6})
    assert "over 2^63 labels" in only(doctor.check_groups([huge, huge], 10**12), "FAIL")


# --- shards


@pytest.fixture
def shards(tmp_path):
    """Twelve shards of ten pairs."""
    for number in range(12):
        write_tar(tmp_path / f"shards/{number:02}.tar", pairs(10, prefix=f"s{number}_"))
    return tmp_path / "shards"


def look(*specs, run_dir="/nowhere", **settings):
    shards = DataConfig(train=tuple(map(str, specs)), **settings)
    return result_of(data.inspect_shards(config(data=shards, run_dir=Path(run_dir))))


def test_shards_without_an_index_are_estimated_from_the_first(shards):
    rows, found = look(shards / "{00..02}.tar", shards / "{03..11}.tar")
    assert (rows.per_list, rows.total, rows.is_whole) == ((30, 90), 120, False)
    assert len(rows.index) == 10 * data.SHARDS_WITHOUT_INDEX
    assert "12 shards, about 120 rows: 8 shards were inspected, the others have no index" in only(found, "warning")


def test_a_stored_index_is_used_where_shards_are_as_it_says(shards):
    ShardIndex.build([str(path) for path in sorted(shards.glob("*.tar"))]).write_beside()
    rows, found = look(shards)
    assert rows.is_whole
    assert only(found, "ok") == "12 shards, 120 rows (from a stored index); captions: 120 .txt"
    write_tar(shards / "03.tar", pairs(7, prefix="new"))
    rows, found = look(shards)
    assert rows.total == 117
    assert only(found, "ok") == "12 shards, 117 rows (1 of them indexed now, in memory); captions: 117 .txt"


def test_the_index_of_the_run_counts_first(shards, tmp_path):
    made = ShardIndex.build([str(path) for path in sorted(shards.glob("*.tar"))])
    made.save(tmp_path / "run/index/index.arrow")
    rows, found = look(shards, run_dir=tmp_path / "run")
    assert (rows.is_whole, rows.index.digest) == (True, made.digest)
    assert "from a stored index" in only(found, "ok")
    (shards / "00.tar").touch()
    assert not look(shards, run_dir=tmp_path / "run")[0].is_whole


def test_samples_that_are_not_pairs(tmp_path):
    write_tar(tmp_path / "x.tar", [*pairs(5), ("alone.jpg", b"x")])
    _, found = look(tmp_path / "x.tar", max_bad_fraction=0.2)
    assert only(found, "warning") == "samples that are not pairs are left out: 1 missing_text (alone.jpg)"
    assert only(look(tmp_path / "x.tar")[1], "FAIL").startswith(
        "1 of 6 samples of the shards are left out, more than --data.max-bad-fraction 0.01 allows: 1 missing_text"
    )


def test_no_shards():
    rows, found = look()
    assert rows is None
    assert "--data.train names no shards" in only(found, "FAIL")


def test_remote_shards_that_do_not_answer(monkeypatch):
    asked = []

    def stat(url, patience):
        asked.append(url)
        if url.endswith(("/00.tar", "/99.tar")):
            return 1, ""
        raise UserError(f"{url} does not exist")

    monkeypatch.setattr(data, "stat", stat)
    monkeypatch.setattr(data.ShardIndex, "build", lambda *a, **k: pytest.fail("shards are known to be missing"))
    rows, found = look("https://example.org/{00..99}.tar")
    assert rows is None
    assert len(asked) == data.REMOTE_SHARDS_TRIED
    assert {"https://example.org/00.tar", "https://example.org/99.tar"} <= set(asked)
    assert len(texts(found, "FAIL")) == 3


def test_rows_of_an_epoch(shards):
    rows = data.RowCounts(index=ShardIndex.build([str(shards / "00.tar")]), per_list=(100, 300), is_whole=True)
    assert rows.per_epoch((), 1000) == 400 - 20
    assert rows.per_epoch((0.5, 2), 10) == 50 + 600 - 10


def test_a_sample_says_only_so_much_about_bad_samples():
    bad = Counter(broken_image=3, empty_caption=1)
    few = data.judge_bad_samples(bad, 256, 0.01, is_all=False)
    assert few.level == "warning"
    assert few.text.startswith("4 of 256 samples cannot be decoded: 3 broken_image, 1 empty_caption; they are counted")
    assert data.judge_bad_samples(bad, 256, 0.01, is_all=True).level == "FAIL"
    assert data.judge_bad_samples(Counter(broken_image=30), 256, 0.01, is_all=False).level == "FAIL"


# --- evaluation sets and weights


def config(**settings):
    return RunConfig(**{"run_dir": Path("/nowhere"), "tower": TowerConfig(model=MODEL), "stages": (STAGE,), **settings})


def test_every_set_that_cannot_be_opened_is_named(monkeypatch):
    def open_tasks(config):
        for name in config.eval.sets:
            if name != "good":
                raise UserError(name)

    monkeypatch.setattr(data, "open_tasks", open_tasks)
    tasks, found = result_of(data.open_sets(config(eval=EvalConfig(sets=("first", "good", "third")))))
    assert tasks is None
    assert texts(found, "FAIL") == ["first", "third"]


def test_sets_that_can_be_opened_one_by_one_alone(monkeypatch):
    def open_tasks(config):
        if len(config.eval.sets) > 1:
            raise UserError("same name")

    monkeypatch.setattr(data, "open_tasks", open_tasks)
    assert texts(data.open_sets(config(eval=EvalConfig(sets=("a/x", "b/x")))), "FAIL") == ["same name"]


def test_no_sets():
    assert "no evaluation set" in only(data.open_sets(config()), "warning")


@pytest.fixture
def hub(monkeypatch):
    """A Hub with nothing in the cache and some files on the server; tests fill both."""
    state = SimpleNamespace(cached=set(), served={}, asked=[])

    def metadata(url, token, timeout):
        state.asked.append(url)
        if url not in state.served:
            raise ConnectionError("no route")
        return SimpleNamespace(size=state.served[url])

    monkeypatch.setattr(
        data.huggingface_hub,
        "try_to_load_from_cache",
        lambda repository, name: f"/cache/{name}" if (repository, name) in state.cached else None,
    )
    monkeypatch.setattr(data.huggingface_hub, "hf_hub_url", lambda repository, name: f"{repository}/{name}")
    monkeypatch.setattr(data.huggingface_hub, "get_hf_file_metadata", metadata)
    return state


def check_weights(architecture, pretrained="", **options):
    return data.check_weights(TowerConfig(architecture=architecture, pretrained=pretrained, **options), MODEL)


REPOSITORY = "timm/vit_large_patch14_clip_224.openai"


def test_weights_in_the_cache(hub):
    hub.cached = {(REPOSITORY, "open_clip_model.safetensors")}
    found = check_weights("ViT-L-14", "openai")
    assert only(found, "ok") == "the weights openai of ViT-L-14: in the cache of the Hub"
    assert not hub.asked


def test_weights_on_the_hub(hub):
    hub.served = {f"{REPOSITORY}/open_clip_pytorch_model.bin": 1_710_000_000}
    assert "to be downloaded from the Hub, 1.7 GB" in only(check_weights("ViT-L-14", "openai"), "ok")
    assert len(hub.asked) == 2  # the safe file first


def test_weights_out_of_reach(hub):
    text = only(check_weights("ViT-L-14", "openai"), "FAIL")
    assert ": not on this machine, and cannot be downloaded from the Hub (ConnectionError: no route)" in text
    assert "give the file as --tower.pretrained" in text
    assert "FAIL" in [finding.level for finding in check_weights("hf-hub:a/b", "")]


def test_weights_on_this_machine(tmp_path, hub):
    save_file(open_clip.CLIP(**MODEL).state_dict(), tmp_path / "w.safetensors")
    assert only(check_weights("", str(tmp_path / "w.safetensors"), model=MODEL), "ok").endswith(" kB")
    assert only(check_weights(f"local-dir:{tmp_path}", ""), "ok") == f"in {tmp_path}"
    assert "has no weights" in only(check_weights("local-dir:/nowhere", ""), "FAIL")
    assert not list(check_weights("ViT-B-32", ""))
    assert "neither a file nor a tag of the model in the recipe" in only(check_weights("", "x.pt", model=MODEL), "FAIL")
    assert "'openay' is neither a file nor a tag of ViT-B-32" in only(check_weights("ViT-B-32", "openay"), "FAIL")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("w.pt", b"no weights", "w.pt holds more than tensors"),
        ("w.safetensors", b"no weights", "the weights in .*w.safetensors do not fit this model: "),
        ("w.txt", b"x", "w.txt is not one of .safetensors, "),
        ("w.safetensors", None, "the weights in .*w.safetensors do not fit this model: .*visual"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, name, content, sentence):
    if content is None:
        save_file({"logit_scale": torch.zeros(())}, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    found = only(check_weights("", str(tmp_path / name), model=MODEL), "FAIL")
    assert re.search(sentence, found)
    assert len(found) < 1000


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"loss": "siglip"}, "--stages.K.train.loss siglip needs a tower with a bias"),
        ({"lr_multipliers": {"nothing": 0.1}}, "--stages.K.train.lr-multipliers"),
        ({"lock": LockConfig(patterns=("nothing",))}, "nothing"),
    ],
)
def test_training_that_the_model_refuses(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        estimates.measure_stages([stage(steps=0), stage(**changes)], MODEL)


def text_tower(text_cfg):
    return data.check_text_tower(text_cfg, loads_weights=True)


def test_tokenizers_of_the_hub(hub):
    assert not list(text_tower(MODEL["text_cfg"]))
    assert "the tokenizer org/words: not on" in only(text_tower({"hf_tokenizer_name": "org/words"}), "FAIL")
    hub.cached = {("org/words", "tokenizer_config.json")}
    assert only(text_tower({"hf_tokenizer_name": "org/words"}), "ok").endswith("in the cache of the Hub")


def test_settings_of_a_tower(hub, tmp_path):
    def config(**settings):
        return data.find_model_cfg(TowerConfig(**settings))

    assert config(architecture="ViT-B-32")["embed_dim"] == 512
    assert config(model=MODEL, preprocess={"size": 48})["vision_cfg"]["image_size"] == 48
    assert MODEL["vision_cfg"]["image_size"] == 32
    assert config(architecture="hf-hub:a/b") == {}
    with pytest.raises(UserError, match=r"open_clip has no architecture 'ViT-B-33' \(close: "):
        config(architecture="ViT-B-33")
    with pytest.raises(UserError, match="/nowhere is not an open_clip folder"):
        config(architecture="local-dir:/nowhere")
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {"embed_dim": 16}}')
    with pytest.raises(UserError, match=f"local-dir:{tmp_path} is not loaded: "):
        config(architecture=f"local-dir:{tmp_path}")


def test_sizes_of_stages(hub):
    stages = [stage(steps=0, lock=LockConfig(text=True)), stage(lock=LockConfig(text=True))]
    free, locked = estimates.measure_stages(stages, MODEL)
    assert locked.trained < free.trained == free.parameters
    assert estimates.measure_stages(stages, {}) == [None, None]
    assert estimates.measure_stages(stages, {"text_cfg": {"hf_model_name": "org/words"}}) == [None, None]


# --- a run that exists


def phase(folder, value, **options):
    return Phase(name="stage-0/train", folder=folder / "train", settings={"lr": value}, run=lambda: None, **options)


def test_phases_that_match(tmp_path):
    done = phase(tmp_path, 1.0)
    done.begin()
    done.mark_done()
    todo = Phase(name="next", folder=tmp_path / "next", settings={}, run=lambda: None)
    assert only(doctor.check_phases(lambda: [done, todo]), "ok") == (
        "the recipe matches: 1 of 2 phases are done and are kept"
    )


@pytest.mark.parametrize("is_done", [True, False])
def test_phases_of_another_recipe(tmp_path, is_done):
    before = phase(tmp_path, 1.0)
    before.begin()
    if is_done:
        before.mark_done()
    listed = sorted(tmp_path.rglob("*"))
    found = list(doctor.check_phases(lambda: [phase(tmp_path, 2.0)] * 2))
    state = "finished but" if is_done else "unfinished and"
    assert f"is {state} does not match this recipe: lr was 1.0 and is now 2.0" in only(found, "FAIL")
    assert not texts(found, "ok")
    assert sorted(tmp_path.rglob("*")) == listed


def test_phases_that_cannot_be_planned():
    def plan():
        raise UserError("no row map")

    assert only(doctor.check_phases(plan), "FAIL") == "no row map"


def test_a_lock(tmp_path):
    assert not list(doctor.check_lock(tmp_path))
    (tmp_path / "lock").write_text('{"host": "node7", "pid": 12, "process": "1"}')
    assert "is locked by process 12 on node7; the run is refused while that job lives" in only(
        doctor.check_lock(tmp_path), "warning"
    )


def test_waiting_for_data():
    late = [{"step": n, "data_wait_share": 0.05 if n < 90 else 0.5} for n in range(100)]
    assert "stage 1 spent 50 % of its time waiting for data" in only(doctor.check_data_wait(1, late), "warning")
    assert not list(doctor.check_data_wait(1, late[:90]))
    assert not list(doctor.check_data_wait(1, [{"step": 1}]))


def suppression(loss, *, score=0.1, clusters=10, next_start="previous", tower=None):
    said = diagnose(loss=loss, negatives=63, scores={"shape": score}, rows=16_384, global_batch_size=64)
    first = stage(cluster={"num_clusters": clusters})
    recipe = config(
        stages=(first, replace(STAGE, start=next_start)) if next_start else (first,),
        tower=tower or TowerConfig(model=MODEL),
    )
    finding = doctor.check_suppression(recipe, 0, said, 16_384)
    assert said.text in finding.text
    return finding


def test_a_suppressed_stage_asks_for_clusters_of_a_batch_and_a_fresh_start():
    finding = suppression(0.01)
    assert finding.level == "warning"
    assert "--stages.0.cluster.num-clusters up to 256 (groups of one batch" in finding.text
    assert finding.text.endswith("--stages.1.start scratch; the recipe has 10 clusters and starts from previous")
    assert suppression(0.01, clusters=200, next_start="scratch").level == "ok"
    assert suppression(0.01, clusters=200).level == "warning"
    pretrained = suppression(0.01, clusters=256, next_start="base", tower=TowerConfig(architecture="hf-hub:a/b"))
    assert pretrained.level == "ok"
    assert "--stages.1.start base" in pretrained.text


def test_a_stage_that_still_learns_goes_on():
    assert suppression(3.0).level == "ok"
    finding = suppression(3.0, next_start="scratch")
    assert finding.level == "warning"
    assert "more steps, or --stages.1.start previous, which continues training" in finding.text
    assert suppression(3.0, next_start=None).level == "ok"


def test_a_stage_in_which_nothing_is_suppressed():
    finding = suppression(0.01, score=0.9)
    assert (finding.level, finding.topic) == ("ok", "learned")
    assert "Recommended" not in finding.text
