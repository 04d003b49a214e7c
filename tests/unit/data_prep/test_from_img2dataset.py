import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mcl_clip.core.errors import UserError
from mcl_clip.data.index import ShardIndex
from mcl_clip.data.writing import Pair, write_pairs


@pytest.fixture(scope="module")
def program(load_program):
    return load_program("from_img2dataset")


@pytest.fixture
def shards(tmp_path, picture):
    """Two shards of 3 and 2 samples, as img2dataset leaves them."""
    pairs = [Pair(key=f"{n:09d}", image=picture(n), captions=[f"c{n}"], attributes={"url": "x"}) for n in range(5)]
    write_pairs(pairs, tmp_path / "shards", samples_per_shard=3)
    (tmp_path / "shards" / "index.arrow").unlink()
    return tmp_path / "shards"


def write_statistics(shards, stem, count, successes, **errors):
    record = {"count": count, "successes": successes, "failed_to_download": count - successes, "failed_to_resize": 0}
    record |= {"duration": 1.5, "status_dict": {"success": successes, **errors}}
    (shards / f"{stem}_stats.json").write_text(json.dumps(record))


def table_of(text: str) -> dict[str, str]:
    return {name.strip(): value for name, _, value in (line.partition("  ") for line in text.splitlines())} | {
        line.split("  ")[0].strip(): line.split("  ")[-1].strip() for line in text.splitlines()
    }


def test_an_index_is_written_and_the_table_adds_up(program, shards, capsys):
    write_statistics(shards, "000000", 4, 3, timeout=1)
    write_statistics(shards, "000001", 6, 2, timeout=3, gone=1)
    program.index_img2dataset((str(shards),))
    lines = table_of(capsys.readouterr().out)
    assert len(ShardIndex.load(shards / "index.arrow")) == 5
    assert (lines["shards"], lines["rows"]) == ("2", "5")
    assert lines["rows with a key of an earlier row"] == "0"
    assert (lines["addresses tried"], lines["downloaded"]) == ("10", "5 (50.0 %)")
    assert lines["failed_to_download"] == "5 (50.0 %)"
    assert "failed_to_resize" not in lines
    assert (lines["error: timeout"], lines["error: gone"]) == ("4", "1")
    assert not any(name.startswith("shards with another") for name in lines)


def test_parquet_statistics_stand_in_for_json(program, shards, capsys):
    status = ["success"] * 3 + ["failed_to_download"] * 2
    messages = [None] * 3 + ["timeout", "gone"]
    pq.write_table(pa.table({"status": status, "error_message": messages}), shards / "000000.parquet")
    program.index_img2dataset((str(shards),))
    lines = table_of(capsys.readouterr().out)
    assert lines["img2dataset statistics"] == "of 1 shards"
    assert (lines["downloaded"], lines["failed_to_download"]) == ("3 (60.0 %)", "2 (40.0 %)")
    assert lines["error: timeout"] == "1"


def test_shards_that_lost_samples_are_named(program, shards):
    write_statistics(shards, "000000", 4, 4)
    write_statistics(shards, "000001", 2, 2)
    found = program.read_downloads(ShardIndex.build([str(path) for path in sorted(shards.glob("*.tar"))]))
    assert found.short == ["000000.tar (3 of 4)"]


def test_keys_repeated_in_other_shards_are_counted(program, shards, capsys):
    shutil.copy(shards / "000000.tar", shards / "000002.tar")
    program.index_img2dataset((str(shards),))
    assert "rows with a key of an earlier row  3 (e.g. 000000000)" in capsys.readouterr().out


def test_shards_without_statistics_are_indexed_all_the_same(program, shards, capsys):
    program.index_img2dataset((f"{shards}/{{000000..000001}}.tar",))
    assert "none found" in capsys.readouterr().out
    assert (shards / "index.arrow").exists()


def test_damaged_statistics_are_named(program, shards):
    index = ShardIndex.build([str(shards / "000000.tar")])
    for content, message in (
        ("{", "is not valid JSON"),
        ("[]", "statistics of img2dataset"),
        ("{}", "'failed_to_download'"),
    ):
        (shards / "000000_stats.json").write_text(content)
        with pytest.raises(UserError, match=message):
            program.read_downloads(index)
    (shards / "000000_stats.json").unlink()
    (shards / "000000.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="is not a whole Parquet file"):
        program.read_downloads(index)


def test_no_shards_is_an_error(program, tmp_path):
    with pytest.raises(UserError, match="the shard list"):
        program.index_img2dataset(())


def test_the_format_of_files_is_named(program, tmp_path, picture):
    (tmp_path / "files/00000").mkdir(parents=True)
    (tmp_path / "files/00000/000000000.jpg").write_bytes(picture(1))
    with pytest.raises(UserError, match=r"has images but no tar files, .* from_table.py .*files OUT"):
        program.index_img2dataset((str(tmp_path / "files"),))
