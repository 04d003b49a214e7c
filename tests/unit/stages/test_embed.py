import pickle
import time
from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mcl_clip.core.distributed import barrier, rank
from mcl_clip.core.errors import UserError
from mcl_clip.data.batches import BadSample, CaptionedBatch
from mcl_clip.data.features import EmbeddingTable, TextFeatures, part_name
from mcl_clip.data.index import ShardIndex
from mcl_clip.data.loader import content_ids
from mcl_clip.data.scanning import make_table
from mcl_clip.data.shards import Shard
from mcl_clip.stages import embed as embed_module
from mcl_clip.stages.embed import embed_shards, read_losses, write_text_features

SHARD_ROWS, DIM = (7, 0, 4, 1), 5
BAD = {2, 8, 11}  # 11 is all of its shard
CFG = {"mean": (0.4, 0.5, 0.6), "std": (0.3, 0.2, 0.1)}


def make_index() -> ShardIndex:
    firsts = np.cumsum([0, *SHARD_ROWS])
    shards = [
        Shard(f"{n}.tar", 0, "", first_row=int(firsts[n]), rows=rows, skipped={}) for n, rows in enumerate(SHARD_ROWS)
    ]
    names = ("image_offset", "image_size", "image_format", "text_offset", "text_size", "text_format")
    zeros = {name: np.zeros(12, int) for name in (*names, "sample_offset", "sample_size")}
    table = make_table([b"%d" % row for row in range(12)], {**zeros, "shard": np.repeat(range(4), SHARD_ROWS)})
    return ShardIndex(shards, table)


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.image, self.text = nn.Linear(12, DIM), nn.Embedding(100, DIM)
        self.dropout = nn.Dropout(0.5)  # in training
        self.autocast: set[bool] = set()  # whether it was on

    def encode_image(self, images: Tensor) -> Tensor:
        self.autocast.add(torch.is_autocast_enabled("cpu"))
        return self.dropout(self.image(images.flatten(1)))

    def encode_text(self, tokens: Tensor) -> Tensor:
        self.autocast.add(torch.is_autocast_enabled("cpu"))
        return self.dropout(self.text(tokens).sum(1))


def pixels(row: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(row).integers(0, 256, (3, 2, 2), np.uint8))


def tokens(row: int) -> Tensor:
    """One to three captions of three tokens."""
    return torch.from_numpy(np.random.default_rng(row).integers(0, 100, (1 + row % 3, 3)))


class Batches:
    """Makes the decoded batches, and stops the run, as a lost machine would, at some shard."""

    def __init__(self, stop_at: int = 99, delay_s: float = 0.0) -> None:
        self.stop_at, self.delay_s, self.rows, self.starts = stop_at, delay_s, list[int](), list[int]()

    def __call__(self, grid: list[np.ndarray]) -> Iterator[CaptionedBatch]:
        for rows in grid:
            time.sleep(self.delay_s)
            self.starts.append(int(rows[0]))
            if self.stop_at in rows:
                raise KeyboardInterrupt
            self.rows += rows.tolist()
            good = [row for row in rows.tolist() if row not in BAD]
            yield CaptionedBatch(
                rows=torch.tensor(good, dtype=torch.int64),
                images=torch.stack([pixels(row) for row in good]) if good else torch.zeros(0, 3, 1, 1).byte(),
                image_ids=torch.tensor([row * 11 - 60 for row in good], dtype=torch.int64),
                tokens=torch.cat([tokens(row) for row in good]) if good else torch.zeros(0, 1).long(),
                caption_of=torch.tensor([n for n, row in enumerate(good) for _ in tokens(row)], dtype=torch.int64),
                text_ids=torch.tensor([row * 13 for row in good], dtype=torch.int64),
                full_captions=sum(int(tokens(row)[:, -1].ne(0).sum()) for row in good),
                bad=tuple(BadSample(row, "some.tar", "broken_image") for row in rows.tolist() if row in BAD),
            )


def embed(
    out,
    batches: Batches,
    batch_size: int = 3,
    texts: EmbeddingTable | None = None,
    is_stopping=None,
    towers: Towers | None = None,
    precision: str = "fp32",
) -> EmbeddingTable:
    index = make_index()
    embed_shards(
        towers or Towers(),
        index,
        batches=batches,
        preprocess_cfg=CFG,
        dim=DIM,
        out=out,
        device=torch.device("cpu"),
        batch_size=batch_size,
        show_progress=False,
        texts=texts,
        is_stopping=is_stopping,
        precision=precision,
    )
    return EmbeddingTable(out, index)


@torch.no_grad()
def expected(row: int) -> dict[str, np.ndarray]:
    """Un-normalised image feature; unit text feature and mean norm over the captions."""
    mean, std = (torch.tensor(CFG[name]).view(3, 1, 1) for name in ("mean", "std"))
    towers = Towers().eval()
    image = towers.encode_image((pixels(row)[None] / 255 - mean) / std)[0].double().numpy()
    captions = towers.encode_text(tokens(row)).double().numpy()
    norms = np.linalg.norm(captions, axis=1, keepdims=True)
    text = (captions / norms).mean(0)
    return {"image": image, "text": text / np.linalg.norm(text) * norms.mean()}


def assert_features(table: EmbeddingTable) -> None:
    for side in ("image", "text"):
        values, norms = table.rows(0, 12, side), table.rows(0, 12, f"{side}_norm")
        for row in range(12):
            whole = expected(row)[side] * (row not in BAD)
            assert norms[row] == pytest.approx(np.linalg.norm(whole), rel=1e-5)
            np.testing.assert_allclose(values[row], whole / max(np.linalg.norm(whole), 1e-9), atol=1e-3)


def test_features_are_those_of_the_towers_with_captions_averaged(tmp_path):
    table = embed(tmp_path, Batches())
    assert_features(table)
    assert table.rows(0, 12, "image").dtype == np.float16
    assert table.rows(0, 12, "ok").tolist() == [row not in BAD for row in range(12)]
    parts = [table.part(shard) for shard in (0, 2, 3)]
    ids = np.concatenate([part.image_id for part in parts]), np.concatenate([part.text_id for part in parts])
    assert ids[0].tolist() == [(row * 11 - 60) * (row not in BAD) for row in range(12)]
    assert ids[1].tolist() == [row * 13 * (row not in BAD) for row in range(12)]
    bad, full = read_losses(tmp_path, make_index())
    assert [tuple(sample) for sample in bad] == [(row, "some.tar", "broken_image") for row in sorted(BAD)]
    whole = [caption for row in range(12) if row not in BAD for caption in tokens(row).tolist()]
    assert 0 < full == sum(caption[-1] != 0 for caption in whole)


def test_the_table_reads_any_rows(tmp_path):
    table = embed(tmp_path, Batches())
    assert len(table) == 12
    values, norms = table.rows(0, 12, "text"), table.rows(0, 12, "text_norm")
    for start in range(12):
        for stop in range(start + 1, 13):
            np.testing.assert_array_equal(table.rows(start, stop, "text"), values[start:stop])
            np.testing.assert_array_equal(table.rows(start, stop, "text_norm"), norms[start:stop])
            assert len(table.rows(start, stop, "ok")) == stop - start
    whole = values.astype(np.float32) * norms[:, None]
    for rows in ([3], [11, 0, 7, 7, 2, 10, 0], list(range(11, -1, -1))):
        np.testing.assert_array_equal(table.take(np.array(rows), "text"), whole[rows])


def test_finished_shards_are_not_embedded_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        embed(tmp_path, Batches(stop_at=9))
    assert [path.name for path in tmp_path.iterdir()] == [part_name(0)]
    before = (tmp_path / part_name(0)).stat().st_mtime_ns
    batches = Batches()
    assert_features(embed(tmp_path, batches))
    assert batches.rows == list(range(7, 12))
    assert (tmp_path / part_name(0)).stat().st_mtime_ns == before


class BatchesInStep(Batches):
    """Makes no batch before every process has claimed a piece."""

    def __call__(self, grid: list[np.ndarray]) -> Iterator[CaptionedBatch]:
        for number, batch in enumerate(super().__call__(grid)):
            if number == 0:
                barrier()
            yield batch


def embedded_rows(out) -> list[int]:
    batches = BatchesInStep()
    embed(out, batches)
    return batches.rows


def test_processes_share_the_shards(tmp_path, pool):
    rows = pool.run(embedded_rows, 2, tmp_path)
    assert sorted(rows[0] + rows[1]) == list(range(12))
    assert all(rows)
    assert_features(EmbeddingTable(tmp_path, make_index()))


def embed_in_pieces(out, stop_after: int = 99, texts: bool = False) -> list[int]:
    """Embed pieces of at most 3 rows, at most `stop_after` of them in this process, and return the rows."""
    left, batches = [stop_after], Batches()

    def is_stopping() -> bool:
        left[0] -= 1
        return left[0] <= 0

    with patch.object(embed_module, "PIECE_ROWS", 3):
        if texts:
            write_texts(out, batches, is_stopping)
        else:
            embed(out, batches, is_stopping=is_stopping)
    return batches.rows


@pytest.mark.parametrize("texts", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_processes_share_the_pieces_of_a_shard_and_join_them_to_the_same_part(tmp_path, pool, size, texts):
    write_texts(tmp_path / "one", Batches()) if texts else embed(tmp_path / "one", Batches())
    first = pool.run(embed_in_pieces, size, tmp_path / "some", 1, texts)  # as after a request to stop
    names = sorted(path.name for path in (tmp_path / "some").iterdir())
    assert len(names) == size
    assert all(".rows-" in name for name in names[:2])
    rest = pool.run(embed_in_pieces, size, tmp_path / "some", 99, texts)
    assert sorted(row for rows in (*first, *rest) for row in rows) == list(range(12))  # nothing twice
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "some" / path.name).read_bytes()
    assert {path.name for path in (tmp_path / "some").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_towers_run_in_the_precision_of_the_stage(tmp_path, precision):
    towers = Towers()
    embed(tmp_path, Batches(), towers=towers, precision=precision)
    assert towers.autocast == {precision == "bf16"}


@pytest.mark.parametrize("piece_rows", [1, 3, 4, 5, 7])
@pytest.mark.parametrize("batch_size", [3, 4])
def test_batches_are_on_a_grid_from_the_start_of_each_shard(tmp_path, batch_size, piece_rows):
    batches, again = Batches(), Batches()
    with patch.object(embed_module, "PIECE_ROWS", piece_rows):
        table = embed(tmp_path, batches, batch_size)
        embed(tmp_path, again, batch_size)
    assert batches.starts == [*range(0, 7, batch_size), *range(7, 11, batch_size), 11]
    assert again.starts == []  # all parts are whole
    assert sorted(path.name for path in tmp_path.iterdir()) == [part_name(shard) for shard in (0, 2, 3)]
    assert_features(table)


def embed_one_late(out, sees_nothing: bool) -> list[int]:
    """Embed pieces; process 1 is late, or sees nothing to do, as on a file system whose listings lag."""
    batches = Batches(delay_s=0.3 * rank())
    missing = embed_module._Pieces.missing
    lagging = (lambda _: []) if sees_nothing and rank() == 1 else missing
    with patch.object(embed_module, "PIECE_ROWS", 3), patch.object(embed_module._Pieces, "missing", lagging):
        embed(out, batches)
    return batches.rows


@pytest.mark.parametrize("sees_nothing", [False, True])
def test_processes_wait_for_all_pieces_and_agree_on_what_is_missing(tmp_path, pool, sees_nothing):
    rows = pool.run(embed_one_late, 2, tmp_path, sees_nothing)
    assert sorted(rows[0] + rows[1]) == list(range(12))
    assert sorted(path.name for path in tmp_path.iterdir()) == [part_name(shard) for shard in (0, 2, 3)]


class SlowBatches(BatchesInStep):
    """Makes the first batch of process 0 when all other pieces are on disk."""

    def __init__(self, out) -> None:
        super().__init__()
        self.out = out

    def __call__(self, grid: list[np.ndarray]) -> Iterator[CaptionedBatch]:
        for number, batch in enumerate(super().__call__(grid)):
            deadline = time.monotonic() + 30
            while number == rank() == 0 and len([*self.out.glob("[!.]*")]) < 11 and time.monotonic() < deadline:
                time.sleep(0.01)
            yield batch


class LostBatches(BatchesInStep):
    """Ends the process, as a lost machine would, when it asks for its third batch."""

    def __call__(self, grid: list[np.ndarray]) -> Iterator[CaptionedBatch]:
        for number, batch in enumerate(super().__call__(grid)):
            if number == 2:
                raise KeyboardInterrupt
            yield batch


def embed_rows_one_by_one(out, kind: str) -> list[int]:
    """Embed 12 pieces of one row, and return the rows of this process."""
    batches = {"slow": SlowBatches, "lost": LostBatches, "": Batches}[kind](*[out] * (kind == "slow"))
    with patch.object(embed_module, "PIECE_ROWS", 1):
        embed(out, batches, batch_size=1)
    return batches.rows


def files_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("size", [2, 4])
def test_pieces_of_a_slow_process_are_embedded_by_the_others(tmp_path, pool, size):
    embed(tmp_path / "one", Batches(), batch_size=1)
    slow, *others = pool.run(embed_rows_one_by_one, size, tmp_path / "some", "slow")
    assert slow == [0]
    assert sorted(row for rows in others for row in rows) == list(range(1, 12))
    assert files_of(tmp_path / "some") == files_of(tmp_path / "one")


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_lost_job_continues_with_the_pieces_that_are_missing(tmp_path, pool, size):
    embed(tmp_path / "one", Batches(), batch_size=1)
    with pytest.raises(RuntimeError, match="KeyboardInterrupt"):
        pool.run(embed_rows_one_by_one, size, tmp_path / "some", "lost")
    assert len(list((tmp_path / "some").glob("*.rows-*"))) == 2 * size
    rest = pool.run(embed_rows_one_by_one, size, tmp_path / "some", "")
    assert len([row for rows in rest for row in rows]) == 12 - 2 * size
    assert files_of(tmp_path / "some") == files_of(tmp_path / "one")


class OtherTexts(Batches):
    """The same pictures with other captions, which nobody should look at."""

    def __call__(self, grid: list[np.ndarray]) -> Iterator[CaptionedBatch]:
        for batch in super().__call__(grid):
            yield replace(batch, tokens=batch.tokens[:, :0], text_ids=batch.text_ids * 0, full_captions=0)


def test_text_features_are_taken_over(tmp_path):
    before = embed(tmp_path / "before", Batches())
    table = embed(tmp_path / "after", OtherTexts(), texts=before)
    assert_features(table)
    for shard in (0, 2, 3):
        for name in ("text", "text_norm", "text_id"):
            np.testing.assert_array_equal(getattr(table.part(shard), name), getattr(before.part(shard), name))
    full_after, full_before = (read_losses(tmp_path / name, make_index())[1] for name in ("after", "before"))
    assert full_after == full_before > 0


def write_texts(out, batches: Batches, is_stopping=None) -> TextFeatures:
    index, towers = make_index(), Towers().eval()
    options = {"batch_size": 3, "show_progress": False, "is_stopping": is_stopping}
    encode = lambda tokens: F.normalize(towers.encode_text(tokens), dim=1)  # noqa: E731
    write_text_features(encode, index, batches=batches, dim=DIM, out=out, **options)
    return TextFeatures(out, index, DIM)


@torch.no_grad()
def test_text_features_of_each_caption_are_read_from_disk(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_texts(tmp_path, Batches(stop_at=9))
    batches = Batches()
    texts = pickle.loads(pickle.dumps(write_texts(tmp_path, batches)))  # as it crosses to a worker
    assert batches.rows == list(range(7, 12))
    wanted = [(row, n) for row in range(12) if row not in BAD for n in range(len(tokens(row)))][::-1]
    features, ids = texts.take(*zip(*wanted, strict=True))
    captions = torch.stack([tokens(row)[n] for row, n in wanted])
    torch.testing.assert_close(features, F.normalize(Towers().eval().encode_text(captions), dim=1))
    assert torch.equal(ids, content_ids(captions))
    assert texts.take([], [])[0].shape == (0, DIM)
    for row, caption in [(0, 1), (2, 0), (11, 0)]:
        with pytest.raises(UserError, match=f"row {row} has no caption {caption}"):
            texts.take([row], [caption])


def written_rows(out) -> list[int]:
    batches = Batches()
    write_texts(out, batches)
    return batches.rows


def test_processes_share_the_text_features(tmp_path, pool):
    rows = pool.run(written_rows, 2, tmp_path / "two")
    assert sorted(rows[0] + rows[1]) == list(range(12))
    assert all(rows)
    write_texts(tmp_path / "one", Batches())
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_damaged_text_features_are_named(tmp_path):
    write_texts(tmp_path, Batches())
    names = sorted(path.name for path in tmp_path.iterdir())
    (tmp_path / names[1]).write_bytes((tmp_path / names[0]).read_bytes())
    (tmp_path / names[2]).write_bytes(b"nothing")
    for row, shard in ((7, 2), (11, 3)):
        with pytest.raises(UserError, match=rf"texts-00000{shard}.safetensors does not hold the features of its"):
            TextFeatures(tmp_path, make_index(), DIM).take([row], [0])


def test_missing_and_foreign_parts_are_named(tmp_path):
    embed(tmp_path, Batches())
    (tmp_path / part_name(2)).write_bytes((tmp_path / part_name(3)).read_bytes())
    table = EmbeddingTable(tmp_path, make_index())
    with pytest.raises(UserError, match=r"part-000002.safetensors has 1 rows and the index 4; delete it"):
        table.rows(6, 8, "image")
    (tmp_path / part_name(2)).unlink()
    with pytest.raises(UserError, match=r"part-000002.safetensors is missing; run the recipe again"):
        table.take(np.array([8]), "image")
