import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mcl_clip.core.errors import UserError
from mcl_clip.eval.pairs import PairSet, PairTask


@pytest.fixture(scope="module")
def pairs(load_program):
    return load_program("pairs")


def score(folder, wrong=()):
    """Metrics of made features with which all items are right but those of these ids."""
    data = PairSet.open(folder)
    images = torch.eye(len(data.source))
    texts = torch.zeros(len(data.texts), len(images))
    for item in data.items:
        for number, text in enumerate(item.texts):
            if number < len(item.images):
                sign = -1 if item.id in wrong else 1
                texts[text, item.images[number]] = sign
    return PairTask("set", data).score(images, texts)[0]


def lines(folder):
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]


def write_mmvp(root, picture, *, folder="MLLM_VLM Images", count=270, type_of=None, folder_of=lambda kind: kind):
    """The published layout: Questions.csv and a folder of images a type."""
    from_program = ("Orientation and Direction", "Presence of Specific Features", "State and Condition",
                    "Quantity and Count", "Positional and Relational Context", "Color and Appearance",
                    "Structural Characteristics", "Texts", "Viewpoint and Perspective")  # fmt: skip
    rows = ["Question ID,Type,Statement"]
    for number in range(1, count + 1):
        kind = (type_of or (lambda number: from_program[(number - 1) // 30]))(number)
        rows.append(f'{number},{kind},"a thing, numbered {number}"')
        place = root / folder / folder_of(kind)
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.jpg").write_bytes(picture(number, size=(4 + number % 9, 4)))
    (root / "Questions.csv").write_text("\n".join(rows) + "\n")


@pytest.mark.parametrize("folder", ["MLLM_VLM Images", "MLLM_VLM_Images", "MMVP_VLM_Images", "images"])
def test_mmvp_in_all_layouts(pairs, tmp_path, picture, capsys, folder):
    short = (lambda kind: kind.split()[0]) if folder == "MMVP_VLM_Images" else (lambda kind: kind)
    write_mmvp(tmp_path / "mmvp", picture, folder=folder, folder_of=short)
    pairs.mmvp(tmp_path / "mmvp", tmp_path / "out")
    assert "warning" not in capsys.readouterr().out
    data = PairSet.open(tmp_path / "out")
    assert (data.rule, data.average, len(data.items), len(data.source)) == ("pair_t2i", "groups", 135, 270)
    assert list(data.group_sizes.values()) == [15] * 9
    assert data.texts[:2] == ("a photo of a thing, numbered 1", "a photo of a thing, numbered 2")
    assert [path.stem for path in data.source.paths] == [str(number) for number in range(1, 271)]
    metrics = score(tmp_path / "out", wrong=("1-2", "3-4", "31-32", "269-270"))
    assert metrics["accuracy"] == pytest.approx((13 / 15 + 14 / 15 + 14 / 15 + 6) / 9)
    assert metrics["accuracy/Orientation and Direction"] == pytest.approx(13 / 15)
    assert metrics["micro_accuracy"] == pytest.approx(131 / 135)


def test_mmvp_goes_by_type_and_says_where_the_place_differs(pairs, tmp_path, picture, capsys):
    write_mmvp(tmp_path / "mmvp", picture, type_of=lambda n: "Texts" if n in (1, 2) else "Quantity and Count", count=8)
    pairs.mmvp(tmp_path / "mmvp", tmp_path / "out")
    out = capsys.readouterr().out
    assert "warning: 4 pairs; the published set has 135" in out
    assert "warning: 4 of 4 pairs have another Type than their place gives" in out
    assert [item["group"] for item in lines(tmp_path / "out")] == ["Texts"] + ["Quantity and Count"] * 3


def test_mmvp_types_within_a_pair(pairs, tmp_path, picture, capsys):
    write_mmvp(
        tmp_path / "mmvp", picture, type_of=lambda n: "Texts" if n == 2 else "Orientation and Direction", count=4
    )
    pairs.mmvp(tmp_path / "mmvp", tmp_path / "out")
    assert "questions 1 and 2 are of types 'Orientation and Direction' and 'Texts'" in capsys.readouterr().out
    assert lines(tmp_path / "out")[0]["images"] == ["Orientation and Direction/1.jpg", "Texts/2.jpg"]
    assert lines(tmp_path / "out")[0]["group"] == "Orientation and Direction"


def test_mmvp_rows_may_stand_in_any_order(pairs, tmp_path, picture):
    write_mmvp(tmp_path / "mmvp", picture, count=8)
    table = tmp_path / "mmvp/Questions.csv"
    header, *rows = table.read_text().splitlines()
    table.write_text("\ufeff" + "\r\n".join([header, *reversed(rows)]) + "\r\n")
    pairs.mmvp(tmp_path / "mmvp", tmp_path / "out")
    assert [item["id"] for item in lines(tmp_path / "out")] == ["1-2", "3-4", "5-6", "7-8"]


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (lambda root: (root / "MLLM_VLM Images").rename(root / "other"), "has no folder of images; it must be named"),
        (lambda root: (root / "Questions.csv").unlink(), "Questions.csv is missing"),
        (lambda root: rewrite(root, "Type", "Kind"), "has no column 'Type'; its columns are Question ID, Kind"),
        (lambda root: rewrite(root, '\n4,Orientation and Direction,"a thing, numbered 4"', ""), "does not hold pairs"),
        (lambda root: rewrite(root, "\n4,", "\n6,"), "does not hold pairs"),
        (lambda root: rewrite(root, "\n3,", "\nthree,"), "line 4 has no number, type or statement"),
        (lambda root: rewrite(root, "numbered 4\"", "numbered 4"), "is not a UTF-8 table"),
        (lambda root: next(root.rglob("3.jpg")).unlink(), "has 0 pictures for question 3; it must have Orient.*/3.jpg"),
    ],
)  # fmt: skip
def test_mmvp_that_is_not_whole(pairs, tmp_path, picture, break_it, sentence):
    write_mmvp(tmp_path / "mmvp", picture, count=4)
    break_it(tmp_path / "mmvp")
    with pytest.raises(UserError, match=sentence):
        pairs.mmvp(tmp_path / "mmvp", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def rewrite(root, before, after):
    path = root / "Questions.csv"
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))


@pytest.fixture
def coco(tmp_path, picture):
    folder = tmp_path / "val2017"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number:012d}.jpg").write_bytes(picture(number))
    return folder


def write_sugarcrepe(root, tasks, keys=("0", "1", "5", "9")):
    root.mkdir()
    for task in tasks:
        rows = {
            key: {
                "filename": f"{number:012d}.jpg",
                "caption": f"{task} {key} as it is",
                "negative_caption": f"{task} {key} as it is not",
            }
            for number, key in enumerate(keys)
        }
        (root / f"{task}.json").write_text(json.dumps(rows))


def test_sugarcrepe(pairs, tmp_path, coco, capsys):
    write_sugarcrepe(tmp_path / "data", pairs.SUGARCREPE_TASKS)
    pairs.sugarcrepe(tmp_path / "data", tmp_path / "out", images=coco)
    assert "warning" not in capsys.readouterr().out
    data = PairSet.open(tmp_path / "out")
    assert (data.rule, len(data.items), len(data.source), len(data.texts)) == ("text_choice", 28, 4, 56)
    assert data.group_sizes == dict.fromkeys(pairs.SUGARCREPE_TASKS, 4)
    assert [item.id for item in data.items[:4]] == ["add_att/0", "add_att/1", "add_att/5", "add_att/9"]
    assert data.texts[:2] == ("add_att 0 as it is", "add_att 0 as it is not")
    metrics = score(tmp_path / "out", wrong=("add_att/5", "swap_obj/0", "swap_obj/1"))
    assert metrics["accuracy"] == pytest.approx(25 / 28)
    assert (metrics["accuracy/add_att"], metrics["accuracy/swap_obj"]) == (0.75, 0.5)


def test_sugarcrepe_in_part(pairs, tmp_path, coco, capsys):
    write_sugarcrepe(tmp_path / "data", ["swap_att"])
    pairs.sugarcrepe(tmp_path / "data", tmp_path / "out", images=coco)
    assert (
        "warning: add_att, add_obj, replace_att, replace_obj, replace_rel, swap_obj are not" in capsys.readouterr().out
    )
    with pytest.raises(UserError, match=r"has none of add_att.json, .*; name their folder"):
        pairs.sugarcrepe(coco, tmp_path / "other", images=coco)


def test_pictures_that_are_missing_are_counted(pairs, tmp_path, coco):
    write_sugarcrepe(tmp_path / "data", ["swap_att"])
    (coco / "000000000002.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of 4 pictures are not in .*val2017, the first is 000000000002.jpg"):
        pairs.sugarcrepe(tmp_path / "data", tmp_path / "out", images=coco)
    with pytest.raises(UserError, match=r"nowhere is not a folder; name the one that holds the pictures"):
        pairs.sugarcrepe(tmp_path / "data", tmp_path / "out", images=tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


def winoground_rows(count=5):
    return [
        {
            "id": number,
            "image_0": f"ex_{number}_img_0",
            "image_1": f"ex_{number}_img_1",
            "caption_0": f"{number} before one",
            "caption_1": f"one before {number}",
            "tag": "Adjective-Size",
            "secondary_tag": "",
            "num_main_preds": 1,
            "collapsed_tag": ("Object", "Relation")[number % 2],
        }
        for number in range(count)
    ]


@pytest.mark.parametrize("inside", ["", "data"])
@pytest.mark.parametrize("ending", ["", ".png"])
def test_winoground_as_examples_and_images(pairs, tmp_path, picture, inside, ending):
    root = tmp_path / "winoground" / inside
    (root / "images").mkdir(parents=True)
    rows = winoground_rows()
    for row in rows:
        for name in ("image_0", "image_1"):
            (root / f"images/{row[name]}.png").write_bytes(picture(row["id"], kind="PNG"))
            row[name] += ending
    (root / "examples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs.winoground(tmp_path / "winoground", tmp_path / "out")
    data = PairSet.open(tmp_path / "out")
    assert (data.rule, data.group_sizes) == ("winoground", {"Object": 3, "Relation": 2})
    assert data.texts[:2] == ("0 before one", "one before 0")
    metrics = score(tmp_path / "out", wrong=("1", "4"))
    assert metrics["accuracy"] == metrics["group_score"] == 0.6
    assert (metrics["accuracy/Object"], metrics["accuracy/Relation"]) == (pytest.approx(2 / 3), 0.5)


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def test_winoground_as_parquet(pairs, tmp_path, picture):
    rows = winoground_rows()
    for row in rows:
        for k, kind in enumerate(("PNG", "JPEG")):
            row[f"image_{k}"] = {"bytes": picture(10 * row["id"] + k, kind=kind), "path": None}
    write_parquet(tmp_path / "winoground/data/test-00000-of-00002.parquet", rows[:3])
    write_parquet(tmp_path / "winoground/data/test-00001-of-00002.parquet", rows[3:])
    pairs.winoground(tmp_path / "winoground", tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "moved")  # its pictures go with it
    data = PairSet.open(tmp_path / "moved")
    assert [path.name for path in data.source.paths[2:4]] == ["ex_1_img_0.png", "ex_1_img_1.jpg"]
    assert data.source.paths[3].read_bytes() == picture(11, kind="JPEG")
    assert score(tmp_path / "moved", wrong=("0",))["accuracy"] == 0.8


def test_winoground_that_is_not_whole(pairs, tmp_path, picture):
    with pytest.raises(UserError, match=r"has neither test-\*.parquet nor examples.jsonl"):
        pairs.winoground(tmp_path, tmp_path / "out")
    root = tmp_path / "rows"
    (root / "images").mkdir(parents=True)
    rows = winoground_rows(2)
    (root / "examples.jsonl").write_text(json.dumps({**rows[0], "caption_1": None}))
    with pytest.raises(UserError, match=r"examples.jsonl, line 1: caption_1 is None; restore the file"):
        pairs.winoground(root, tmp_path / "out")
    (root / "examples.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"examples.jsonl, line 1 is not JSON"):
        pairs.winoground(root, tmp_path / "out")
    table = tmp_path / "table/test-0.parquet"
    for row in rows:
        row["image_0"] = row["image_1"] = {"bytes": b"no picture", "path": None}
    write_parquet(table, rows)
    with pytest.raises(UserError, match="ex_0_img_0 is not an image file that can be decoded"):
        pairs.winoground(tmp_path / "table", tmp_path / "out")
    table.write_bytes(table.read_bytes()[:90])
    with pytest.raises(UserError, match="is not a whole Parquet file"):
        pairs.winoground(tmp_path / "table", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def write_aro(root, picture, part, groups):
    (root / "images").mkdir(parents=True)
    rows = []
    for number, group in enumerate(groups):
        name = f"{number % 7}.jpg"
        (root / "images" / name).write_bytes(picture(number % 7, size=(40, 30)))
        rows.append(
            {
                "image_path": name,
                "bbox_x": number % 5,
                "bbox_y": 3,
                "bbox_w": 10 + number,
                "bbox_h": 12,
                "true_caption": f"the first {group} the second, {number}",
                "false_caption": f"the second {group} the first, {number}",
                **({"relation_name": group} if part == "relation" else {"attributes": group.split("_")}),
            }
        )
    (root / f"visual_genome_{part}.json").write_text(json.dumps(rows))


def test_aro_relations_are_cut_and_averaged_by_relation(pairs, tmp_path, picture):
    write_aro(tmp_path / "aro", picture, "relation", ["on", "on", "on", "on", "behind", "next to", "next to"])
    pairs.aro(tmp_path / "aro", tmp_path / "out", part="relation")
    data = PairSet.open(tmp_path / "out")
    assert (data.average, data.min_group_size, data.group_sizes) == ("groups", 1, {"on": 4, "behind": 1, "next to": 2})
    assert data.source.boxes[2] == (2, 3, 12, 12)
    assert data.texts[:2] == ("the first on the second, 0", "the second on the first, 0")
    metrics = score(tmp_path / "out", wrong=("0", "5"))
    assert metrics["accuracy"] == pytest.approx((0.75 + 1 + 0.5) / 3)
    assert metrics["micro_accuracy"] == pytest.approx(5 / 7)


def test_aro_relations_can_be_left_out(pairs, tmp_path, picture, capsys):
    write_aro(tmp_path / "aro", picture, "relation", ["on", "next to", "behind", "on"])
    (tmp_path / "symmetric.txt").write_text("next to\nbeside\n")
    pairs.aro(tmp_path / "aro", tmp_path / "out", part="relation", leave_out=tmp_path / "symmetric.txt")
    assert PairSet.open(tmp_path / "out").group_sizes == {"on": 2, "behind": 1}
    assert "warning: 1 of the groups to leave out are not in the set, the first is 'beside'" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"gone.txt is missing"):
        pairs.aro(tmp_path / "aro", tmp_path / "other", part="relation", leave_out=tmp_path / "gone.txt")


def test_aro_attributes_need_25_items_a_group(pairs, tmp_path, picture):
    groups = ["red_large"] * 25 + ["old_wet"] * 24 + ["dry_tall"] * 30
    write_aro(tmp_path / "aro", picture, "attribution", groups)
    pairs.aro(tmp_path / "aro", tmp_path / "out", part="attribution")
    assert PairSet.open(tmp_path / "out").group_sizes == {"red_large": 25, "dry_tall": 30}
    wrong = [str(number) for number in (*range(10), *range(25, 49), *range(49, 55))]
    metrics = score(tmp_path / "out", wrong=wrong)
    assert metrics["accuracy"] == pytest.approx((15 / 25 + 24 / 30) / 2)
    assert "accuracy/old_wet" not in metrics


def test_aro_that_is_not_whole(pairs, tmp_path, picture):
    write_aro(tmp_path / "aro", picture, "relation", ["on"])
    path = tmp_path / "aro/visual_genome_relation.json"
    with pytest.raises(UserError, match=r"visual_genome_attribution.json is missing"):
        pairs.aro(tmp_path / "aro", tmp_path / "out", part="attribution")
    (row,) = json.loads(path.read_text())
    for content, sentence in [
        ([{**row, "bbox_w": "wide"}], r"relation.json, entry 0: bbox_w is 'wide'; restore the file"),
        ([{name: row[name] for name in row if name != "relation_name"}], "entry 0: relation_name is None"),
        ([3], "entry 0: image_path is None"),
        ([], "is neither a list nor an object with entries"),
    ]:
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=sentence):
            pairs.aro(tmp_path / "aro", tmp_path / "out", part="relation")
    assert not (tmp_path / "out").exists()


THINGS = (("mug", "beer-bottle"), ("bowl", "remote"))


def write_whatsup(root, picture, relations=("left_of", "right_of", "on", "under")):
    (root / "pictures").mkdir(parents=True)
    rows = []
    for one, other in THINGS:
        for number, relation in enumerate(relations):
            name = f"{one}_{relation}_{other}.jpeg"
            (root / "pictures" / name).write_bytes(picture(number))
            options = [f"A {one} {relations[(number + k) % 4]} a {other}" for k in range(4)]
            rows.append({"image_path": f"data/of/the/authors/{name}", "caption_options": options})
    (root / "controlled.json").write_text(json.dumps(rows))


@pytest.mark.parametrize(
    "relations", [("left_of", "right_of", "on", "under"), ("left_of", "right_of", "in-front_of", "behind")]
)
def test_whatsup_counts_pictures_pairs_and_sets(pairs, tmp_path, picture, capsys, relations):
    write_whatsup(tmp_path / "up", picture, relations)
    pairs.whatsup(tmp_path / "up/controlled.json", tmp_path / "out", images=tmp_path / "up/pictures")
    assert "warning" not in capsys.readouterr().out
    data = PairSet.open(tmp_path / "out")
    assert data.group_sizes == {relation.removesuffix("_of"): 2 for relation in relations}
    assert [len(item.texts) for item in data.items] == [4] * 8
    assert [data.texts[item.texts[0]] for item in data.items[:2]] == [
        f"A mug {relations[0]} a beer-bottle", f"A mug {relations[1]} a beer-bottle"
    ]  # fmt: skip
    metrics = choose(tmp_path / "out", wrong=("1",))
    assert metrics["accuracy"] == 7 / 8
    assert (metrics["pair_accuracy"], metrics["set_accuracy"]) == (0.75, 0.5)
    metrics = choose(tmp_path / "out", wrong=("0", "1", "4"))
    assert (metrics["pair_accuracy"], metrics["set_accuracy"]) == (0.5, 0)


def choose(folder, wrong):
    """Metrics of a model that sees which text belongs to a picture, but in these."""
    data = PairSet.open(folder)
    texts = torch.eye(len(data.texts))
    images = torch.stack([texts[item.texts[item.id in wrong]] for item in data.items])
    return PairTask("set", data).score(images, texts)[0]


def test_whatsup_sets_that_are_not_complete(pairs, tmp_path, picture, capsys):
    write_whatsup(tmp_path / "up", picture)
    path = tmp_path / "up/controlled.json"
    path.write_text(json.dumps(json.loads(path.read_text())[1:]))
    pairs.whatsup(path, tmp_path / "out", images=tmp_path / "up/pictures")
    out = capsys.readouterr().out
    assert "warning: 1 of 4 pairs have not 2 pictures, as mug_beer-bottle left-right" in out
    assert "warning: 1 of 2 sets have not 4 pictures, as mug_beer-bottle" in out


def test_whatsup_of_coco_and_visual_genome(pairs, tmp_path, coco, picture):
    (coco / "2345.jpg").write_bytes(picture(5))
    rows = [
        [2, "A photo of a dog on the left", "A photo of a dog on the right"],
        [3, "A photo of a dog to the right of a cat", "A photo of a dog to the left of a cat"],
        [2345, "A photo of a cup in front of a jar", "A photo of a cup behind a jar"],
        [2345, "A photo of a cup on top of a jar", "A photo of a cup under a jar"],
    ]
    (tmp_path / "coco_qa_two_obj.json").write_text(json.dumps(rows))
    pairs.whatsup(tmp_path / "coco_qa_two_obj.json", tmp_path / "out", images=coco)
    data = PairSet.open(tmp_path / "out")
    assert [item.group for item in data.items] == ["left", "right", "front", "top"]
    assert [path.name for path in data.source.paths] == ["000000000002.jpg", "000000000003.jpg", "2345.jpg"]
    assert not any(item.together for item in data.items)


def test_whatsup_that_is_not_whole(pairs, tmp_path, coco):
    path = tmp_path / "x.json"
    for content, sentence in [
        ([[1, "right"]], r"x.json, entry 0: neither an object nor \[image, right caption, wrong caption\]"),
        ([{"image_path": "a.jpeg", "caption_options": []}], "entry 0 has no captions"),
        ([{"image_path": "a.jpeg"}], "entry 0: caption_options is None"),
        ([[1, "right", 5]], "line 1: the text 5 is empty or not a string"),
    ]:
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=sentence):
            pairs.whatsup(path, tmp_path / "out", images=coco)
    path.write_text("[")
    with pytest.raises(UserError, match=r"x.json is not valid JSON"):
        pairs.whatsup(path, tmp_path / "out", images=coco)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_empty_is_refused_first(pairs, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("kept")
    nowhere = tmp_path / "nowhere"
    for run in (
        lambda out: pairs.mmvp(nowhere, out),
        lambda out: pairs.sugarcrepe(nowhere, out, images=nowhere),
        lambda out: pairs.winoground(nowhere, out),
        lambda out: pairs.aro(nowhere, out, part="relation"),
        lambda out: pairs.whatsup(nowhere, out, images=nowhere),
    ):
        with pytest.raises(UserError, match="is not empty"):
            run(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_the_same_source_gives_the_same_bytes(pairs, tmp_path, coco):
    write_sugarcrepe(tmp_path / "data", ["swap_att"])
    for name in ("a", "b"):
        pairs.sugarcrepe(tmp_path / "data", tmp_path / name, images=coco)
    for file in ("pairs.json", "pairs.jsonl"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert json.loads((tmp_path / "a/pairs.json").read_text())["images"] == str(coco)
