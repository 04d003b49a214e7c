import hashlib
import io
import json
import math
import socket
import tarfile

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mcl_clip.core.errors import UserError
from mcl_clip.eval import retrieval
from mcl_clip.eval.embed import Encoder, _batches_of_rank, _gather_rows
from mcl_clip.eval.retrieval import RetrievalSet, RetrievalTask, recall_metrics
from tests.unit.eval.sets import record_of

CAPTIONS = [5, 5, 7, 1, 0, 5, 6, 5, 5, 2, 5]


def random_features(captions, dim=16, seed=0, agreement=0.4):
    generator = torch.Generator().manual_seed(seed)
    image_of_text = np.repeat(np.arange(len(captions)), captions)
    images = torch.randn(len(captions), dim, generator=generator)
    texts = agreement * images[image_of_text] + torch.randn(len(image_of_text), dim, generator=generator)
    return images, texts, image_of_text


def reference(images, texts, image_of_text, k):
    """CLIP_benchmark's definition on the full matrix."""
    scores = F.normalize(texts) @ F.normalize(images).T
    positive = torch.zeros(scores.shape)
    positive[torch.arange(len(texts)), torch.from_numpy(image_of_text)] = 1
    image_recall = positive.gather(1, scores.topk(k, dim=1).indices).sum(dim=1)
    text_recall = positive.T.gather(1, scores.T.topk(k, dim=1).indices).sum(dim=1)
    return {
        f"image_retrieval_recall@{k}": (image_recall > 0).float().mean().item(),
        f"text_retrieval_recall@{k}": (text_recall > 0).float().mean().item(),
    }


@pytest.mark.parametrize("captions", [[5] * 60, CAPTIONS * 6, [1] * 40], ids=["five", "uneven", "one"])
def test_recalls_are_those_of_clip_benchmark(captions):
    features = random_features(captions)
    metrics, _ = recall_metrics(*features, ks=(1, 3, 10))
    for k in (1, 3, 10):
        expected = reference(*features, k)
        assert 0 < min(expected.values()) < 1
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(value, abs=1e-6)
        assert metrics[f"mean_recall@{k}"] == pytest.approx(sum(expected.values()) / 2, abs=1e-6)


def test_median_rank_and_ranks_are_those_of_a_sort():
    images, texts, image_of_text = random_features(CAPTIONS * 3)
    metrics, ranks = recall_metrics(images, texts, image_of_text)
    scores = F.normalize(texts) @ F.normalize(images).T
    order = scores.argsort(dim=1, descending=True)
    expected = (order == torch.from_numpy(image_of_text)[:, None]).nonzero()[:, 1]
    assert ranks["image_retrieval"].tolist() == expected.tolist()
    assert ranks["image_retrieval"].dtype == np.int32
    assert metrics["image_retrieval_median_rank"] == np.floor(np.median(expected.numpy())) + 1
    assert metrics["image_retrieval_mean_reciprocal_rank"] == pytest.approx((1 / (1 + expected)).mean().item())
    for image, row in enumerate(scores.T):
        right = torch.from_numpy(image_of_text) == image
        wrong_ahead = (row[~right] > row[right].max()).sum() if right.any() else len(texts)
        assert ranks["text_retrieval"][image] == wrong_ahead


@pytest.mark.parametrize("captions", [[5] * 60, CAPTIONS * 6, [1] * 40], ids=["five", "uneven", "one"])
def test_outcomes_are_what_metrics_are_the_mean_of(captions):
    images, texts, image_of_text = random_features(captions)
    metrics, outcomes = recall_metrics(images, texts, image_of_text)
    means = {name for name in metrics if not name.endswith("median_rank")}
    assert len(means) == 11
    assert set(outcomes) & set(metrics) == means
    for name in means:
        assert outcomes[name].dtype == (np.float32 if "mean" in name else bool)
        assert outcomes[name].mean(dtype=np.float64) == pytest.approx(metrics[name], rel=1e-6)
        by_caption = name.startswith("image_retrieval")
        assert outcomes[name].shape == ((len(texts) if by_caption else len(images)),)
        assert (f"unit:{name}" in outcomes) == by_caption
        if by_caption:
            assert outcomes[f"unit:{name}"].dtype == np.int32
            assert outcomes[f"unit:{name}"].tolist() == image_of_text.tolist()
    assert (outcomes["image_retrieval_recall@5"] == (outcomes["image_retrieval"] < 5)).all()
    ofs = [outcomes["image_retrieval_recall@1"][image_of_text == image].sum() for image in range(len(images))]
    expected = (outcomes["text_retrieval_recall@1"] + np.array(ofs) * len(images) / len(texts)) / 2
    assert outcomes["mean_recall@1"] == pytest.approx(expected)


@pytest.mark.parametrize("chunk", [1, 7, 64, 10_000])
def test_chunk_size_changes_nothing_even_among_equal_items(chunk):
    images, texts, image_of_text = random_features(CAPTIONS * 20, dim=33)
    images[50:90] = images[10:50]
    texts[200:300] = texts[100:200]
    expected = recall_metrics(images, texts, image_of_text, chunk=100)
    got = recall_metrics(images, texts, image_of_text, chunk=chunk)
    assert got[0] == expected[0]
    assert all((got[1][side] == expected[1][side]).all() for side in expected[1])


@pytest.mark.parametrize("constant", ["images", "texts", "both", "zeros"])
@pytest.mark.parametrize("chunk", [1, 7, 256])  # in float32 the products of equal rows differ at some sizes
def test_a_model_that_says_nothing_finds_nothing(constant, chunk):
    images, texts, image_of_text = random_features([5] * 203, dim=67)
    if constant in ("images", "both"):
        images[:] = images[0].clone()
    if constant in ("texts", "both"):
        texts[:] = texts[0].clone()
    if constant == "zeros":
        images[:], texts[:] = 0, 0
    metrics, _ = recall_metrics(images, texts, image_of_text, chunk=chunk)
    recalls = {name: value for name, value in metrics.items() if "recall@" in name}
    assert len(recalls) == 9
    if constant in ("both", "zeros"):
        assert set(recalls.values()) == {0.0}
    assert recalls["image_retrieval_recall@1" if constant != "texts" else "text_retrieval_recall@1"] == 0.0
    assert max(value for name, value in recalls.items() if name.endswith("@1")) <= 1 / 203


@pytest.mark.parametrize("k", [1, 5, 10])
def test_a_random_model_is_at_chance(k):
    count = 400
    metrics, _ = recall_metrics(*random_features([5] * count, dim=64, agreement=0), ks=(k,))
    missed = math.comb(5 * count - 5, k) / math.comb(5 * count, k)
    for name, chance in {"image_retrieval": k / count, "text_retrieval": 1 - missed}.items():
        assert abs(metrics[f"{name}_recall@{k}"] - chance) < 4 * math.sqrt(chance * (1 - chance) / count), name


def test_one_equal_negative_costs_one_rank():
    images, texts = torch.eye(4), torch.eye(4)
    assert recall_metrics(images, texts, np.arange(4))[0]["mean_recall@1"] == 1
    texts[1] = texts[0]
    metrics, ranks = recall_metrics(images, texts, np.arange(4), ks=(1, 2))
    assert ranks["text_retrieval"].tolist() == [1, 3, 0, 0]
    assert ranks["image_retrieval"].tolist() == [0, 3, 0, 0]
    assert metrics["text_retrieval_recall@2"] == 0.75


def test_image_without_captions_is_a_miss_that_counts():
    metrics, ranks = recall_metrics(torch.eye(4), torch.eye(4)[:3], np.arange(3), ks=(1, 100))
    assert metrics["text_retrieval_recall@1"] == metrics["text_retrieval_recall@100"] == 0.75
    assert metrics["image_retrieval_recall@100"] == 1
    assert ranks["text_retrieval"].tolist() == [0, 0, 0, 3]


def test_score_is_the_cosine_unless_asked_otherwise():
    images, texts, image_of_text = random_features([2] * 30)
    lengths = torch.rand(30, 1, generator=torch.Generator().manual_seed(2)) * 9 + 1
    plain = recall_metrics(images, texts, image_of_text)
    assert recall_metrics(images * lengths, texts, image_of_text)[0] == plain[0]
    by_product = recall_metrics(images * lengths, texts, image_of_text, normalize=False)
    assert by_product[0] != plain[0]
    unit = F.normalize(images), F.normalize(texts)
    assert recall_metrics(*unit, image_of_text, normalize=False)[0] == plain[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(value):
    images, texts, image_of_text = random_features([2] * 5)
    texts[3, 2] = value
    with pytest.raises(UserError, match="1 of 10 text features are not finite"):
        recall_metrics(images, texts, image_of_text)


def test_features_that_do_not_fit_together_are_refused():
    images, texts, image_of_text = random_features([2] * 5)
    with pytest.raises(UserError, match="5 images, 9 texts and 10 pairs"):
        recall_metrics(images, texts[:9], image_of_text)
    with pytest.raises(UserError, match="images 0 to 3, not to 4"):
        recall_metrics(images[:4], texts, image_of_text)


def near_duplicates(noise, dim=64, count=400):
    """Return nine kinds of images and captions, whose members differ by `noise`, maybe below float32 precision."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(9, dim, generator=generator)[torch.randint(9, (count,), generator=generator)]
    image_of_text = torch.randint(count - 1, (3 * count,), generator=generator)  # the last has none
    texts = images[image_of_text] + torch.randn(9, dim, generator=generator)[image_of_text % 9]
    images = images + noise * torch.randn(images.shape, generator=generator)
    return images, texts + noise * torch.randn(texts.shape, generator=generator), image_of_text.numpy()


def ranks_by_whole_matrix(images, texts, image_of_text):
    """Count negatives not below the best positive, from products in float64 rounded to float32."""
    scores = (texts.double() @ images.double().T).float()
    right = torch.zeros(scores.shape, dtype=torch.bool)
    right[torch.arange(len(texts)), torch.from_numpy(image_of_text)] = True
    best = scores.masked_fill(~right, -torch.inf)
    return {
        "image_retrieval": ((scores >= best.amax(dim=1, keepdim=True)) & ~right).sum(dim=1).tolist(),
        "text_retrieval": ((scores >= best.amax(dim=0)) & ~right).sum(dim=0).tolist(),
    }


def ranks_of(*features, **options):
    _, outcomes = recall_metrics(*features, **options)
    return {side: outcomes[side].tolist() for side in ("image_retrieval", "text_retrieval")}


@pytest.mark.parametrize("dense_share", [-1, retrieval.DENSE_SHARE, 1], ids=["dense", "default", "pairs"])
@pytest.mark.parametrize("noise", [0, 1e-7, 1e-6, 1e-4, 1])
@pytest.mark.parametrize("normalize", [True, False])
def test_ranks_are_exact_among_items_that_float32_cannot_distinguish(noise, dense_share, normalize, monkeypatch):
    monkeypatch.setattr(retrieval, "DENSE_SHARE", dense_share)
    monkeypatch.setattr(retrieval, "IMAGE_BLOCK", 150)
    monkeypatch.setattr(retrieval, "ROWS_AT_ONCE", 70)
    images, texts, image_of_text = near_duplicates(noise)
    if normalize:
        expected = ranks_by_whole_matrix(F.normalize(images), F.normalize(texts), image_of_text)
    else:
        images = images * torch.linspace(1, 9, len(images))[:, None]
        expected = ranks_by_whole_matrix(images, texts, image_of_text)
    assert ranks_of(images, texts, image_of_text, normalize=normalize, chunk=90) == expected


def test_ranks_do_not_depend_on_threads():
    features = near_duplicates(1e-6, dim=300)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(ranks_of(*features))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]


def test_ranks_do_not_depend_on_autocast():
    features = near_duplicates(1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        found = ranks_of(*features)
    assert found == ranks_of(*features)


@pytest.mark.parametrize("setting", ["high", "medium", "by backend"])
def test_ranks_are_exact_where_products_of_float32_are_not(setting, monkeypatch):
    features = random_features(CAPTIONS * 5)
    expected = ranks_of(*features)

    def precision():
        if setting == "by backend":
            raise RuntimeError("set by backend")
        return setting

    monkeypatch.setattr(torch, "get_float32_matmul_precision", precision)
    monkeypatch.setattr(torch, "mm", lambda queries, gallery, out: out.zero_())
    assert ranks_of(*features) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("normalize", [True, False])
def test_features_may_be_of_any_float(dtype, normalize):
    images, texts, image_of_text = random_features(CAPTIONS * 9, dim=40)
    images, texts = images.to(dtype), texts.to(dtype)
    prepare = (lambda features: F.normalize(features.float())) if normalize else (lambda features: features)
    expected = ranks_by_whole_matrix(prepare(images), prepare(texts), image_of_text)
    assert ranks_of(images, texts, image_of_text, normalize=normalize) == expected


@pytest.mark.parametrize("factor", [2.0**-120, 2.0**120])
def test_no_inner_product_overflows(factor):
    images, texts, image_of_text = random_features(CAPTIONS * 5)
    expected = ranks_of(images, texts, image_of_text, normalize=False)
    assert ranks_of(images * factor, texts * factor, image_of_text, normalize=False) == expected


class LargestTensor(TorchDispatchMode):
    """Record the size of the largest tensor that an operation returns, except views of `inputs`."""

    def __init__(self, *inputs):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return found


@pytest.mark.parametrize("size", [300, 600])
def test_neither_scores_nor_features_are_copied_whole(size, monkeypatch):
    monkeypatch.setattr(retrieval, "IMAGE_BLOCK", 50)
    monkeypatch.setattr(retrieval, "ROWS_AT_ONCE", 50)
    images, texts, image_of_text = random_features([5] * size, dim=256)
    with LargestTensor(images, texts) as largest:
        recall_metrics(images, texts, image_of_text, chunk=50)
    assert 0 < largest.bytes <= 50 * 256 * 8


def image_bytes(number, kind):
    buffer = io.BytesIO()
    color = (number * 20 % 256, number * 7 % 256, 100)
    Image.new("RGB", (20, 16), color).save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return buffer.getvalue()


PNG = image_bytes(1, "PNG")


def write_tar(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in samples:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_set(folder, shards=2, captions=CAPTIONS, counter=True):
    """Like CLIP_benchmark's export; the captions of image i are 'i.0', 'i.1' ... with a blank line among them."""
    formats = [("webp", "WEBP"), ("png", "PNG"), ("jpg", "JPEG"), ("jpeg", "JPEG")]
    for shard, rows in enumerate(np.array_split(np.arange(len(captions)), shards)):
        samples = []
        for row in rows:
            suffix, kind = formats[row % 4]
            text = "\n \n".join(f"{row}.{number}" for number in range(captions[row])) + "\n"
            samples += [(f"s{row:07d}.{suffix}", image_bytes(row, kind)), (f"s{row:07d}.txt", text.encode())]
        write_tar(folder / f"{shard}.tar", samples)
    if counter:
        (folder / "nshards.txt").write_text(str(shards))


def keys_of(data):
    return [data.source.reader.index.key(row) for row in range(len(data.captions))]


@pytest.mark.parametrize("shards", [1, 2, 11])
def test_set_is_read_in_the_order_of_the_shards(shards, tmp_path):
    write_set(tmp_path / "test", shards)
    found = RetrievalSet.open(tmp_path)
    assert keys_of(found) == [f"s{row:07d}" for row in range(len(CAPTIONS))]
    assert [len(captions) for captions in found.captions] == CAPTIONS
    assert found.texts[:6] == ["0.0", "0.1", "0.2", "0.3", "0.4", "1.0"]
    assert found.image_of_text.tolist() == [row for row, count in enumerate(CAPTIONS) for _ in range(count)]


def test_set_may_be_a_folder_of_tar_files(tmp_path):
    write_set(tmp_path / "test", 11)
    write_set(tmp_path / "flat", 11, counter=False)
    nested, flat = RetrievalSet.open(tmp_path), RetrievalSet.open(tmp_path / "flat")
    assert (keys_of(flat), flat.texts, flat.sha256) == (keys_of(nested), nested.texts, nested.sha256)


def test_digest_tells_captions_apart(tmp_path):
    for name, captions in (("a", [2, 1]), ("b", [1, 2]), ("c", [2, 1])):
        write_set(tmp_path / name / "test", 1, captions)
    digests = [RetrievalSet.open(tmp_path / name).sha256 for name in "abc"]
    assert digests[0] == digests[2] != digests[1]
    assert len(digests[0]) == len(hashlib.sha256().hexdigest())


def test_broken_layouts_are_explained(tmp_path):
    with pytest.raises(UserError, match="neither a folder 'test' nor tar files"):
        RetrievalSet.open(tmp_path)
    write_set(tmp_path / "test", 2)
    (tmp_path / "test/1.tar").rename(tmp_path / "test/3.tar")
    with pytest.raises(UserError, match=r"says 2 tar files, but 1\.tar is not in"):
        RetrievalSet.open(tmp_path)
    (tmp_path / "test/nshards.txt").write_text("two\n")
    with pytest.raises(UserError, match="holds 'two'; it must hold the number"):
        RetrievalSet.open(tmp_path)
    (tmp_path / "test/nshards.txt").unlink()
    with pytest.raises(UserError, match=r"nshards\.txt is missing"):
        RetrievalSet.open(tmp_path)


def test_set_without_captions_is_refused(tmp_path):
    write_set(tmp_path / "test", 1, [0, 0, 0])
    with pytest.raises(UserError, match=r"the 3 samples in .* have no captions"):
        RetrievalSet.open(tmp_path)


def test_incomplete_samples_are_refused(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.png", PNG), ("a.txt", b"a"), ("b.png", PNG)])
    with pytest.raises(UserError, match=r"cannot be used .1 x missing_text"):
        RetrievalSet.open(tmp_path)


class ColorModel(nn.Module):
    """A model of the mean color of an image and the number in a text, both doubled in training mode."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.frozen = nn.Dropout(0.5).eval()

    def encode_image(self, image):
        return self.weight * image.mean(dim=(2, 3)) * (2 if self.training else 1)

    def encode_text(self, text):
        return self.weight * text.float() * (2 if self.training else 1)


def transform(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def tokenizer(texts):
    return torch.tensor([[int(text.split(".")[0]), int(text.split(".")[1]), 1] for text in texts])


def embed(root, model, **options):
    arguments = {"batch_size": 4, "device": torch.device("cpu"), **options}
    return Encoder(model=model, image_transform=transform, tokenizer=tokenizer, **arguments).embed(
        RetrievalSet.open(root)
    )


def test_features_are_those_of_each_sample(tmp_path):
    write_set(tmp_path / "test")
    model = ColorModel().train()
    model.frozen.eval()
    features = embed(tmp_path, model)
    for row in range(len(CAPTIONS)):
        expected = torch.tensor([row * 20 % 256, row * 7 % 256, 100]).float()
        torch.testing.assert_close(features["image"][row], expected, rtol=0, atol=3.0)  # JPEG
    texts = [(row, number, 1) for row, count in enumerate(CAPTIONS) for number in range(count)]
    assert features["text"].tolist() == [list(map(float, text)) for text in texts]
    data = RetrievalSet.open(tmp_path)
    assert data.image_of_text.tolist() == [row for row, _, _ in texts]
    assert keys_of(data)[3] == "s0000003"
    assert (features["image"].dtype, features["text"].dtype) == (torch.float32, torch.float32)
    assert (model.training, model.frozen.training) == (True, False)


def test_any_object_with_two_encoders_is_a_model(tmp_path):
    write_set(tmp_path / "test")

    class Encoders:
        encode_image = staticmethod(lambda image: image.mean(dim=(2, 3)).double())
        encode_text = staticmethod(lambda text: text.half())

    expected = embed(tmp_path, ColorModel())
    features = embed(tmp_path, Encoders())
    assert torch.equal(features["image"], expected["image"])
    assert torch.equal(features["text"], expected["text"])


@pytest.mark.parametrize("options", [{"num_workers": 2}, {"num_workers": 1, "batch_size": 100}, {"batch_size": 1}])
def test_workers_and_batches_change_nothing(options, tmp_path):
    write_set(tmp_path / "test")
    state = torch.random.get_rng_state()
    expected, features = embed(tmp_path, ColorModel()), embed(tmp_path, ColorModel(), **options)
    assert torch.equal(features["image"], expected["image"])
    assert torch.equal(features["text"], expected["text"])
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_cannot_be_decoded_stops_the_evaluation(num_workers, tmp_path):
    samples = [("a.png", PNG), ("a.txt", b"1.0"), ("bad.png", PNG[:60]), ("bad.txt", b"2.0")]
    write_tar(tmp_path / "0.tar", samples)
    model = ColorModel().train()
    with pytest.raises(
        UserError, match=r"^sample bad in .*0\.tar cannot be decoded .broken_image.; write the set again$"
    ):
        embed(tmp_path, model, num_workers=num_workers)
    assert model.training


def test_captions_that_cannot_be_decoded_are_named(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.png", PNG), ("a.txt", b"\xff\xfe")])
    with pytest.raises(UserError, match=r"^sample a in .*0\.tar cannot be decoded .not_utf8.; write the set again$"):
        RetrievalSet.open(tmp_path)


@pytest.mark.parametrize("size", [0, 1, 7, 64, 65])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_processes_share_the_same_batches(size, world_size):
    alone = [batch.tolist() for batch in _batches_of_rank(size, 8, 0, 1)]
    parts = [_batches_of_rank(size, 8, rank, world_size) for rank in range(world_size)]
    assert [batch.tolist() for part in parts for batch in part] == alone
    assert [row for batch in alone for row in batch] == list(range(size))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_each_sample_must_be_there_once():
    parts, batches = list(torch.arange(8.0).view(4, 2).split(3)), [np.arange(3), np.arange(3, 4)]
    gathered = _gather_rows(parts, batches, torch.device("cpu"))
    assert torch.equal(gathered, torch.cat(parts))
    for other in (parts[:1], parts * 2, []):
        with pytest.raises(RuntimeError, match=f"{sum(map(len, other))} of 4 images or texts were embedded"):
            _gather_rows(other, batches, torch.device("cpu"))


def _embed_as(rank, world_size, port, root):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    features = embed(root, ColorModel())
    torch.save((features["image"], features["text"]), root / f"{rank}.pt")
    with pytest.raises(UserError, match=r"^sample bad in .* cannot be decoded"):
        embed(root / "broken", ColorModel())
    dist.destroy_process_group()


@pytest.mark.slow
def test_several_processes_give_the_features_of_one(tmp_path):
    write_set(tmp_path / "test")
    good = [(f"{row}.{suffix}", data) for row in range(9) for suffix, data in (("png", PNG), ("txt", b"1.0"))]
    write_tar(tmp_path / "broken/0.tar", [*good, ("bad.png", PNG[:60]), ("bad.txt", b"2.0")])
    expected = embed(tmp_path, ColorModel())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_embed_as, args=(4, port, tmp_path), nprocs=4)
    for rank in range(4):
        image, text = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(image, expected["image"])
        assert torch.equal(text, expected["text"])


def test_record_is_json_and_says_what_was_measured(tmp_path):
    write_set(tmp_path / "test")
    found = RetrievalSet.open(tmp_path)
    metrics, _ = recall_metrics(*random_features(CAPTIONS))
    task = RetrievalTask("wds/flickr30k", found)
    record = record_of(task, metrics, model="ViT-B-32", pretrained="stage-2", stage=2, seconds=1.23456)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    clip_benchmark = {"dataset", "model", "pretrained", "task", "metrics", "language"}
    assert clip_benchmark <= record.keys()
    assert record["key"] == "retrieval/flickr30k"
    assert record["metrics"]["main_metric"] == metrics["mean_recall@1"]
    assert (record["n_images"], record["n_texts"]) == (len(CAPTIONS), sum(CAPTIONS))
    assert record["captions_per_image"] == {"0": 1, "1": 1, "2": 1, "5": 6, "6": 1, "7": 1}
    assert record["data_sha256"] == found.sha256
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]
