"""An audit from the command to its files, on a small random model, and its parts on made features."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mcl_clip.data.writing import Pair, write_pairs, write_retrieval_set
from mcl_clip.eval.pairs import PairSet, PairTask
from mcl_clip.eval.swaps import Swap
from mcl_clip.tools.audit import Embedded, audit_folder, failing_swaps, find_clusters, loss_share, score_swaps
from mcl_clip.tools.audit_data import AuditOptions, open_audit_data
from mcl_clip.tools.doctor import audit_verdicts
from mcl_clip.tools.finetune import advice
from tests.commands import run_command
from tests.recipes.test_report import HOSTILE, Page, check
from tests.unit.eval.sets import make_multistage, noise_png, write_classification, write_image_folder, write_tower
from tests.unit.eval.sets import write_pairs as write_pair_set

COLORS = ("red", "blue", "green", "pink")


def samples(count, caption=lambda number: f"a {COLORS[number % 4]} ball on grass {number}"):
    return [
        Pair(
            key=f"k{number:03d}", image=noise_png(number), captions=[caption(number)],
            attributes={"color": COLORS[number % 4], "number": number, "caption": "none"},
        )
        for number in range(count)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("audit")
    write_tower(root / "tower", 0)
    make_multistage().save(root / "multistage")
    write_pairs(samples(40), root / "shards")
    write_retrieval_set(samples(40, lambda number: f"a {COLORS[number % 4]} {HOSTILE}"), root / "hostile")
    write_pairs(samples(31), root / "few")
    write_classification(root / "birds", np.arange(28) % 7)
    write_image_folder(root / "animals", {"owl": 4, "bee": 3})
    write_pair_set(root / "pairs")
    return root


@pytest.fixture
def here(originals, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for path in originals.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def audit(monkeypatch, capsys, *arguments, model="tower"):
    arguments = [*arguments, "--workers", 0, "--device", "cpu"]
    return run_command(monkeypatch, capsys, "audit", model, *arguments)


@pytest.mark.parametrize("model", ["tower", "multistage"])
def test_a_random_model_is_at_chance(here, monkeypatch, capsys, model):
    code, out, err = audit(monkeypatch, capsys, "--data", "shards", "--out", "made/audit", model=model)
    assert code == 0, err
    assert f"{model} is still learning: " in out
    assert "in made/audit" in out
    record = json.loads((here / "made/audit/audit.json").read_text())
    assert (record["pictures"], record["captions"], record["edited_pairs"]) == (40, 40, 40)
    low, high = record["swaps"]["all"]["accuracy"][1:]
    assert low < 0.5 < high
    assert record["loss_share"] > 0.8
    assert set(record["clusters"]["image"]["nmi"]) == {"color"}  # a number for each picture is no attribute
    assert record["seconds"] > 0
    page = Page((here / "made/audit/audit.html").read_text())
    check(page)
    assert "which kinds of words" not in page.text
    assert [attributes["id"] for name, attributes in page.elements if name == "section"] == [
        "verdict", "swaps", "shortcuts", "groups"
    ]  # fmt: skip
    task = PairTask("swaps", PairSet.open(here / "made/audit/swaps"))
    assert len(task.data.items) == record["swaps"]["all"]["n"]


def test_the_same_seed_finds_the_same(here, monkeypatch, capsys):
    records = []
    for out in ("one", "two"):
        assert audit(monkeypatch, capsys, "--data", "shards", "--out", out, "--batch-size", 7)[0] == 0
        record = json.loads((here / out / "audit.json").read_text())
        records.append({name: value for name, value in record.items() if name not in ("seconds", "peak_memory_mb")})
    assert records[0] == records[1]
    assert (here / "one/swaps/pairs.jsonl").read_bytes() == (here / "two/swaps/pairs.jsonl").read_bytes()


def test_captions_are_escaped_and_images_can_be_left_out(here, monkeypatch, capsys):
    assert audit(monkeypatch, capsys, "--data", "hostile", "--out", "one")[0] == 0
    page = Page((here / "one/audit.html").read_text())
    check(page)
    assert any(name == "img" for name, _ in page.elements)
    assert audit(monkeypatch, capsys, "--data", "hostile", "--out", "two", "--no-images")[0] == 0
    page = Page((here / "two/audit.html").read_text())
    check(page)
    assert not any(name == "img" for name, _ in page.elements)
    assert not (here / "two/swaps").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "birds"), "birds is a set of another kind (classification); an audit takes pictures with captions"),
        (("--data", "animals"), "animals is a set of another kind (image folder)"),
        (("--data", "pairs"), "pairs is a set of another kind (pairs)"),
        (
            ("--data", "few"),
            "few has 31 pictures with captions that can be read, of 31 looked at; an audit takes at least 32",
        ),
        (("--data", "nothing"), "nothing"),
        (("--data", "shards", "--pictures", "31"), "--pictures"),
        (("--data", "shards", "--words", "words.json"), "has a word of the kinds fruit"),
        (("--data", "shards", "--words", "none.json"), "none.json: there is no such file"),
        (("--data", "shards", "--out", "full"), "the output folder full is not empty"),
    ],
)
def test_what_cannot_be_audited_is_said_in_a_sentence(here, monkeypatch, capsys, arguments, message):
    (here / "words.json").write_text('{"fruit": [["apple", "pear"]]}')
    (here / "full").mkdir()
    (here / "full/file").write_text("")
    before = sorted(path.name for path in here.iterdir())
    code, _, err = audit(monkeypatch, capsys, "--out", "new", *arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert sorted(path.name for path in here.iterdir()) == before


def test_captions_without_words_of_the_list_have_no_swaps(here, monkeypatch, capsys):
    write_pairs(samples(32, lambda number: f"thing {number}"), here / "things")
    assert audit(monkeypatch, capsys, "--data", "things", "--out", "new")[0] == 0
    assert json.loads((here / "new/audit.json").read_text())["swaps"] == {}
    assert "swaps" not in [a.get("id") for _, a in Page((here / "new/audit.html").read_text()).elements]


def test_the_folder_is_that_of_the_run(tmp_path, monkeypatch):
    run = tmp_path / "run"
    (run / "stage-1").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    assert audit_folder(str(run), "run") == run / "audit"
    assert audit_folder(str(run / "stage-1"), "stage") == run / "stage-1" / "audit"
    assert str(audit_folder("ViT-B-32/openai", "ViT-B-32-openai")) == "audits/ViT-B-32-openai"


def test_status_and_fine_tuning_go_by_the_audit(tmp_path, originals, monkeypatch):
    for name in ("audit", "stage-0/audit"):
        (tmp_path / name).mkdir(parents=True)
        verdict = {"kind": "suppressed", "text": f"suppressed in {name}", "advice": "do"}
        (tmp_path / name / "audit.json").write_text(json.dumps({"format": 1, "verdict": verdict}))
    assert audit_verdicts(tmp_path) == [
        "audit of all stages: suppressed in audit", "audit of stage 0: suppressed in stage-0/audit"
    ]  # fmt: skip
    shutil.copytree(originals / "tower", tmp_path / "stage-0/train/model")
    (tmp_path / "config.json").write_text(json.dumps({"stages": [{"train": {"steps": 5}}], "tower": {}}))
    assert advice(tmp_path).startswith("next, stages: suppressed in audit: python")


def made_features(seed=0):
    """Two pictures for each of four captions, whose features are those of the captions."""
    captions = [[f"a {color} ball", f"the {color} ball"] for color in COLORS for _ in range(2)]
    flat = torch.eye(4, dtype=torch.float64)[torch.arange(16) // 4]
    image = torch.eye(4, dtype=torch.float64)[torch.arange(8) // 2]
    return captions, image, flat


def test_swaps_are_scored_against_the_mean_of_all_pictures():
    captions, image, flat = made_features()
    swaps = [
        Swap(0, "color", "a red ball", "a blue ball", "red", "blue"),
        Swap(2, "color", "a blue ball", "a red ball", "blue", "red"),
    ]
    seen = Embedded(image, flat, torch.stack([flat[4], flat[0]]), np.repeat(np.arange(8), 2))
    figures, margins = score_swaps(seen, captions, swaps, ["color", "number"])
    assert list(figures) == ["color", "all"]
    assert figures["color"]["accuracy"] == figures["color"]["sight"] == [1, 1, 1]
    assert figures["color"]["blind"] == 0  # a tie of the means
    assert failing_swaps(swaps, margins) == []

    # A model that prefers blue whatever it sees: half is right, and all of that is the prior.
    blue = F.normalize(torch.tensor([[0.0, 1, 0, 0]], dtype=torch.float64))
    prior = Embedded(blue.repeat(8, 1), flat, seen.wrong, seen.picture_of)
    figures, margins = score_swaps(prior, captions, swaps, ["color"])
    assert figures["all"]["accuracy"][0] == figures["all"]["blind"] == 0.5
    assert figures["all"]["sight"][0] == 0
    assert failing_swaps(swaps, margins) == swaps


def test_the_loss_is_a_share_of_guessing_and_equal_captions_are_no_negatives():
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(64, 8, generator=generator))
    text = F.normalize(torch.randn(64, 8, generator=generator))
    captions = [str(number) for number in range(64)]
    assert loss_share(image, image, captions) < 0.01
    assert 0.95 < loss_share(image, text, captions) <= 1.001
    doubled, names = image[:32].repeat(2, 1), captions[:32] * 2
    assert (
        loss_share(doubled, doubled, names)
        < 0.01
        < math.log(2) / math.log(64)
        <= loss_share(doubled, doubled, captions)
    )


def test_clusters_have_their_words_and_agree_with_attributes():
    captions, image, flat = made_features()
    captions, image, flat = captions * 8, image.repeat(8, 1), flat.repeat(8, 1)
    color = [of_picture[0].split()[1] for of_picture in captions]
    size = ["big" if number < 32 else "small" for number in range(64)]
    embedded = Embedded(image, flat, flat[:0], np.repeat(np.arange(64), 2))
    found = find_clusters(embedded, captions, {"color": color, "size": size})
    for side in ("image", "text"):
        assert found[side]["nmi"] == pytest.approx({"color": 1, "size": 0}, abs=1e-6)
        assert {cluster["words"][0]["word"].split()[0] for cluster in found[side]["clusters"]} <= {*COLORS, "a", "the"}
        for cluster in found[side]["clusters"]:
            assert len({color[row] for row in cluster["pictures"]}) == 1


def test_a_sample_is_drawn_and_bad_pictures_are_left_out(tmp_path):
    broken = [*samples(60)]
    write_pairs(broken, tmp_path / "shards")
    data = open_audit_data([str(tmp_path / "shards")], AuditOptions(pictures=40, seed=1))
    assert (len(data.captions), data.total, len(set(data.keys))) == (40, 60, 40)
    assert data.keys != open_audit_data([str(tmp_path / "shards")], AuditOptions(pictures=40, seed=2)).keys
    assert data.captions[0] == [f"a {COLORS[int(data.keys[0][1:]) % 4]} ball on grass {int(data.keys[0][1:])}"]
    assert data.attributes["color"] == [COLORS[int(key[1:]) % 4] for key in data.keys]
