"""Shards of a run are indexed by all of its processes."""

from pathlib import Path

from mcl_clip.config import DataConfig, RunConfig, StageConfig, TowerConfig, TrainConfig
from mcl_clip.data import scanning
from mcl_clip.runs.context import load_index
from tests.unit.data.tars import pairs, write_tar


def index_of_run(folder: Path) -> tuple[str, list[str]]:
    """The digest of the index, and the shards that this process has scanned."""
    scanned, scan = [], scanning.scan_shard
    scanning.scan_shard = lambda url, *a, **k: scanned.append(Path(url).name) or scan(url, *a, **k)
    config = RunConfig(
        run_dir=folder / "run",
        data=DataConfig(train=(str(folder / "shards"),)),
        tower=TowerConfig(architecture="ViT-B-32"),
        stages=(StageConfig(train=TrainConfig(steps=1, global_batch_size=8, lr=1.0)),),
    )
    try:
        return load_index(config)[0].digest, sorted(scanned)
    finally:
        scanning.scan_shard = scan


def test_every_process_scans_shards_of_its_own(pool, tmp_path):
    for number in range(5):
        write_tar(tmp_path / f"shards/{number}.tar", pairs(3, prefix=f"s{number}"))
    together = pool.run(index_of_run, 2, tmp_path)
    assert [scanned for _, scanned in together] == [["0.tar", "2.tar", "4.tar"], ["1.tar", "3.tar"]]
    assert [path.name for path in (tmp_path / "run/index").iterdir()] == ["index.arrow"]
    assert pool.run(index_of_run, 2, tmp_path) == [(together[0][0], [])] * 2  # it is current
    (tmp_path / "run/index/index.arrow").unlink()
    assert {digest for digest, _ in (*together, *pool.run(index_of_run, 1, tmp_path))} == {together[0][0]}
