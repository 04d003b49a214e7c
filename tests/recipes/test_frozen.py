"""Runs with locked towers under trained projections: what the locked parts compute is read from disk."""

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from mcl_clip.config import AugmentConfig, DistillConfig, LockConfig, TowerConfig
from mcl_clip.data.features import part_name, read_part
from mcl_clip.data.storage import load_tensors
from mcl_clip.runs import frozen
from tests.recipes.runs import COLOURS, PLACES, SHAPES, execute, records, with_stages

LOCKED = LockConfig(text_unlocked_groups=0, image_unlocked_groups=0)
STAGE = {"steps": 52, "lock": LOCKED, "augment": AugmentConfig(views=2, scale=(0.5, 0.9))}  # 832 rows of 200


@pytest.fixture
def pair(recipe, tmp_path):
    """The recipe with a timm image tower and a Hugging Face text tower, both with projections."""
    words = ["[UNK]", "[PAD]", "a", "on", "the", *COLOURS, *SHAPES, *PLACES]
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.RobertaConfig(vocab_size=len(words), max_position_embeddings=20, **sizes)
    transformers.RobertaModel(config).save_pretrained(tmp_path / "words")
    tokenizer = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(tmp_path / "words")
    name = str(tmp_path / "words")
    text = {"context_length": 12, "vocab_size": len(words), "hf_model_name": name, "hf_tokenizer_name": name}
    image = {"timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "mlp", "image_size": 32}
    text |= {"hf_proj_type": "mlp"}
    return replace(recipe, tower=TowerConfig(model={"embed_dim": 16, "vision_cfg": image, "text_cfg": text}))


def losses(run, stage=0):
    return [r["loss"] for r in records(run / f"stage-{stage}/train/metrics.jsonl") if "loss" in r]


def counted(monkeypatch):
    """Names of the calls that write outputs, in order."""
    calls = []
    for name in ("write_image_outputs", "write_text_features"):
        function = getattr(frozen, name)
        monkeypatch.setattr(
            frozen, name, lambda *of, f=function, n=name, **options: calls.append(n) or f(*of, **options)
        )
    return calls


def test_outputs_from_disk_train_and_embed_as_the_locked_towers_do(pair, monkeypatch, caplog):
    caplog.set_level("INFO")
    calls = counted(monkeypatch)
    runs = []
    for is_cached in (True, False):
        lock = replace(LOCKED, cached_trunks=is_cached)
        stage = STAGE | {"steps": 26, "lock": lock, "augment": AugmentConfig(views=1)}  # 416 rows of 200
        runs.append(execute(with_stages(replace(pair, run_dir=pair.run_dir / str(is_cached)), stage, stage)))
    assert sorted(calls) == ["write_image_outputs", "write_text_features"]  # in stage 0, for both stages
    assert caplog.text.count("outputs of the locked part of the image tower are read from") == 2
    for stage in (0, 1):
        assert losses(runs[0], stage) == pytest.approx(losses(runs[1], stage), abs=1e-4)
        for number in range(4):
            cached, plain = (read_part(run / f"stage-{stage}/embed" / part_name(number), 50) for run in runs)
            for side in ("image", "text"):
                np.testing.assert_allclose(getattr(cached, side), getattr(plain, side), atol=2e-3)
                np.testing.assert_array_equal(getattr(cached, f"{side}_id"), getattr(plain, f"{side}_id"))
        for name in ("retrieval", "colours"):
            cached, plain = (load_tensors(run / f"stage-{stage}/eval/features-{name}.safetensors") for run in runs)
            for side in ("image", "text"):
                torch.testing.assert_close(cached[side], plain[side], atol=1e-4, rtol=1e-3)
    assert not (runs[0] / frozen.TRUNKS).exists()


def test_runs_with_one_cache_share_outputs_of_the_same_data(pair, tmp_path, monkeypatch):
    calls = counted(monkeypatch)
    recipe = with_stages(pair, STAGE | {"steps": 26, "augment": AugmentConfig(views=1), "keep_best": "retrieval"})
    recipe = replace(
        recipe,
        machine=replace(pair.machine, cache_dir=tmp_path / "cache"),
        eval=replace(pair.eval, every_steps=13),
    )
    features = []
    for lr in ("0.01", "0.02"):
        run = execute(replace(recipe, run_dir=tmp_path / lr), "--stages.0.train.lr", lr)
        features.append(load_tensors(run / "stage-0/eval/features-retrieval.safetensors")["image"])
        stored = sorted((tmp_path / "cache" / frozen.TRUNKS).glob("[!.]*"))
        assert [path.name.rpartition("-")[0] for path in stored] == [
            "images",
            *["set-image"] * 2,
            *["set-text"] * 2,
            "texts",
        ]
    assert sorted(calls) == ["write_image_outputs", "write_text_features"]
    assert not torch.equal(*features)
    shutil.copytree(pair.data.train[0], tmp_path / "shards")  # equal keys and sizes, written at another time
    for path in (tmp_path / "shards").glob("*.tar"):
        os.utime(path, (1, 1))
    execute(replace(recipe, run_dir=tmp_path / "run-2"), "--data.train", str(tmp_path / "shards"))
    assert sorted(calls) == ["write_image_outputs"] * 2 + ["write_text_features"] * 2


def test_a_teacher_takes_the_outputs_of_trunks_that_it_shares(pair, monkeypatch):
    stage = STAGE | {"steps": 26, "augment": AugmentConfig(views=1)}
    distilled, runs = stage | {"distill": DistillConfig(weight=2.0)}, []
    calls = counted(monkeypatch)
    for is_cached in (True, False):
        plain = {"lock": replace(LOCKED, cached_trunks=is_cached)}
        recipe = replace(pair, run_dir=pair.run_dir / str(is_cached))
        runs.append(execute(with_stages(recipe, stage | plain, distilled | plain)))
    assert sorted(calls) == ["write_image_outputs", "write_text_features"]  # in stage 0, for both stages
    taught = [
        [r.get("distillation", 0) for r in records(run / "stage-1/train/metrics.jsonl") if "loss" in r] for run in runs
    ]
    assert taught[0] == pytest.approx(taught[1], abs=1e-4)
    assert losses(runs[0], 1) == pytest.approx(losses(runs[1], 1), abs=1e-4)


@pytest.mark.slow
def test_outputs_of_another_precision_are_computed_anew(pair, monkeypatch):
    calls = counted(monkeypatch)
    stage = STAGE | {"steps": 26, "augment": AugmentConfig(views=1)}
    execute(with_stages(pair, stage, stage | {"precision": "bf16"}))
    assert sorted(calls) == ["write_image_outputs"] * 2 + ["write_text_features"] * 2


@pytest.mark.slow
def test_outputs_are_stored_only_where_that_pays_and_fits(pair, monkeypatch, caplog):
    caplog.set_level("INFO")
    calls = counted(monkeypatch)
    execute(with_stages(replace(pair, run_dir=pair.run_dir / "both"), STAGE | {"steps": 50}, STAGE | {"steps": 50}))
    # Both views in stage 0, in stage 1 the augmented one; the captions once.
    assert sorted(calls) == ["write_image_outputs"] * 3 + ["write_text_features"]
    calls.clear()
    few = STAGE | {"steps": 37}  # 592 rows, and 200 at the end: not each of 400 views twice, but each caption
    execute(with_stages(replace(pair, run_dir=pair.run_dir / "few"), few))
    assert calls == ["write_text_features"]
    calls.clear()
    moving = STAGE | {"augment": AugmentConfig()}
    execute(with_stages(replace(pair, run_dir=pair.run_dir / "moving"), moving))
    assert calls == ["write_text_features"]
    calls.clear()
    monkeypatch.setattr(frozen, "DISK_SHARE", 0.0)
    execute(with_stages(replace(pair, run_dir=pair.run_dir / "full"), STAGE | {"steps": 50}))
    assert not calls
    assert "of the locked part of the image tower would take 0.0 GB, more than" in caplog.text
