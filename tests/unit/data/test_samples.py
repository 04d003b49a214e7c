"""Which members of shards of other people make a pair, what is left out, and which captions come of them."""

import json

import numpy as np
import pytest

from mcl_clip.core.errors import UserError
from mcl_clip.data.decode import decode_captions
from mcl_clip.data.index import OLD_RULE, RULE, ShardIndex
from mcl_clip.data.reader import Reader
from mcl_clip.data.samples import SampleRule
from mcl_clip.data.writing import Pair, write_pairs
from tests.unit.data.tars import pairs, picture, write_tar

ALT = {"caption": "alt text", "re_caption": "a better text"}


def build(path, **rule):
    return ShardIndex.build([str(path)], rule=SampleRule(**rule))


def captions(index, **options):
    """All captions by key."""
    key, rows = index.rule.caption_key, Reader(index, **options).read(np.arange(len(index)))
    return {index.key(raw.row): decode_captions(raw.text, raw.text_format, json_key=key) for raw in rows}


def sample(key, image="jpg", **texts):
    """Members as img2dataset writes them: the image, then texts by extension."""
    members = {
        image: b"1",
        **{name: text if isinstance(text, bytes) else text.encode() for name, text in texts.items()},
    }
    return [(f"{key}.{name}", data) for name, data in members.items()]


def test_a_given_key_reads_the_json_where_there_is_a_txt_too(tmp_path):
    path = write_tar(tmp_path / "a.tar", [*sample("a", json=json.dumps(ALT), txt="alt text"), *sample("b", txt="only")])
    assert captions(build(path)) == {"a": ["alt text"], "b": ["only"]}
    index = build(path, texts=("json", "txt"), caption_key="re_caption")
    assert captions(index) == {"a": ["a better text"], "b": ["only"]}
    assert index.text_counts() == "1 .txt, 1 .json (key 're_caption')"


def test_samples_without_a_caption_are_no_rows(tmp_path):
    texts = {
        "empty": {"txt": ""}, "blank": {"txt": " \n\t"}, "null": {"json": '{"caption": null}'},
        "list": {"json": '{"caption": []}'}, "blanks": {"json": '{"caption": ["", " "]}'},
        "both": {"json": '{"caption": null}', "txt": ""}, "other": {"json": '{"alt": "x", "url": "y"}'},
    }  # fmt: skip
    good = sample("good", json='{"caption": null}', txt="a cat")
    path = write_tar(tmp_path / "a.tar", [m for key, each in texts.items() for m in sample(key, **each)] + good)
    index = build(path)
    assert captions(index) == {"good": ["a cat"]}
    assert index.skipped_by_reason() == {"empty_caption": 6, "no_caption_key": 1}
    assert index.describe_skipped() == (
        "6 empty_caption (empty.jpg, empty.txt), 1 no_caption_key (other.jpg, other.json: no 'caption' among the keys "
        "'alt', 'url')"
    )
    index.save(tmp_path / "i.arrow")
    assert ShardIndex.load(tmp_path / "i.arrow").describe_skipped() == index.describe_skipped()
    unchecked = build(path, needs_caption=False)
    assert (len(unchecked), unchecked.skipped_by_reason()) == (7, {"empty_member": 1})


def test_damage_of_a_text_is_left_to_the_decoder(tmp_path):
    path = write_tar(tmp_path / "a.tar", [*sample("a", txt=b"\xff\xfe"), *sample("b", json="{"), *pairs(1)])
    assert len(build(path)) == 3


def test_a_key_that_is_nowhere(tmp_path):
    path = write_tar(tmp_path / "a.tar", sample("a", json=json.dumps(ALT), txt="alt text"))
    with pytest.raises(UserError, match=r"1 no_caption_key \(a.*no 'no_such_key' among the keys 'caption', 're_cap"):
        build(path, texts=("json", "txt"), caption_key="no_such_key")


def test_a_line_end_in_shards_of_others_does_not_end_a_caption(tmp_path):
    text = "Red dress\r\n\nsize M, new with tags \n"
    path = write_tar(tmp_path / "a.tar", [*sample("a", txt=text), *sample("b", txt="one line\n")])
    index = build(path)
    assert captions(index) == {"a": ["Red dress size M, new with tags"], "b": ["one line"]}
    assert index.text_counts() == "2 .txt; 1 .txt of several lines, each one caption"
    assert captions(index, captions_by_line=True)["a"] == ["Red dress", "size M, new with tags"]


def test_lines_in_our_own_shards_are_captions(tmp_path):
    write_pairs([Pair(key="a", image=picture(), captions=["one", "two"])], tmp_path / "own")
    copy = tmp_path / "copy.tar"
    copy.write_bytes((tmp_path / "own" / "000000.tar").read_bytes())  # without its index
    index = build(copy)
    assert captions(index) == {"a": ["one", "two"]}
    assert index.text_counts() == "1 .txt"


@pytest.mark.parametrize(
    ("rule", "members", "keys"),
    [
        ({"images": ("img",), "texts": ("cap",)}, sample("a", image="img", cap="x", txt="y"), ["a"]),
        ({"texts": ("caption",)}, sample("a", caption="x"), ["a"]),
        ({"images": ("jpg",)}, sample("Photo v1.5 (07)", txt="x"), ["Photo v1.5 (07)"]),
        ({"images": ("left.jpg",)}, [("a.left.jpg", b"1"), ("a.right.jpg", b"2"), ("a.txt", b"x")], ["a"]),
        ({"images": ("jpg",)}, [("a.jpg", b"1"), ("a.mask.png", b"2"), ("a.cls", b"3"), ("a.txt", b"x")], ["a"]),
        ({"texts": ("meta.json",)}, sample("v1.0/a.b", **{"meta.json": '{"caption": "x"}'}), ["v1.0/a.b"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_members_with_other_names(tmp_path, rule, members, keys):
    path = write_tar(tmp_path / "a.tar", members)
    index = build(path, has_dotted_keys=True, **rule)
    assert captions(index) == {key: ["x"] for key in keys}
    assert Reader(index).read(np.array([0]))[0].image == b"1"
    if rule != {"images": ("jpg",)} or "Photo" in keys[0]:
        with pytest.raises(UserError, match=r"by --data\.image-member and --data\.text-member"):
            build(path)


def test_members_that_are_there_are_named(tmp_path):
    path = write_tar(tmp_path / "a.tar", [*sample("0", image="img", cap="x"), *sample("Photo v1.5 (07)", txt="x")])
    with pytest.raises(UserError) as caught:
        build(path)
    assert "1 missing_image (0.img, 0.cap), 1 dotted_name (Photo v1.5 (07).jpg, Photo v1.5 (07).txt)" in str(
        caught.value
    )


def test_many_dotted_names_are_counted_one_by_one(tmp_path):
    members = [m for n in range(20) for m in sample(f"Photo v1.{n}", txt="x")]
    index = build(write_tar(tmp_path / "a.tar", [*members, *pairs(1)]))
    assert index.skipped_by_reason() == {"dotted_name": 20}


def test_the_samples_before_the_damage_are_used_if_asked_for(tmp_path):
    whole = write_tar(tmp_path / "a.tar", pairs(20, image_bytes=700))
    cut = tmp_path / "b.tar"
    cut.write_bytes(whole.read_bytes()[:20_900])
    with pytest.raises(UserError, match=r"b\.tar is damaged at byte \d+ of 20900: the file is truncated"):
        ShardIndex.build([str(whole), str(cut)])
    index = ShardIndex.build([str(whole), str(cut)], rule=SampleRule(skip_damaged=True))
    kept = index.shards[1].rows
    assert 0 < kept < 9
    assert captions(index)["k0000"] == ["caption of k0000"]
    assert len(Reader(index).read(np.arange(len(index)))) == 20 + kept
    assert index.skipped_by_reason() == {"damaged_shard": 20 - kept}  # as many as the other shard has more
    assert "b.tar is damaged at byte" in index.describe_skipped()
    for other in (b"version https://git-lfs.github.com/spec/v1\n", b"\x1f\x8b"):
        cut.write_bytes(other)
        with pytest.raises(UserError, match=r"is a pointer of Git LFS|is compressed"):
            build(cut, skip_damaged=True)


def test_an_index_of_another_rule_is_not_reused(tmp_path):
    path = write_tar(tmp_path / "a.tar", [*sample("a", json=json.dumps(ALT), txt="alt text"), *sample("b", txt="")])
    build(path, needs_caption=False).write_beside()
    assert len(build(path)) == 1
    build(path).write_beside()
    index = build(path, texts=("json", "txt"), caption_key="re_caption")
    assert captions(index)["a"] == ["a better text"]


def test_a_caption_before_its_image_is_read_where_it_lies(tmp_path):
    members = [m for n in range(30) for m in ((f"{n:02}.txt", f"text {n}".encode()), (f"{n:02}.webp", bytes(20_000)))]
    index = build(write_tar(tmp_path / "a.tar", members))
    assert captions(index) == {f"{n:02}": [f"text {n}"] for n in range(30)}


@pytest.mark.parametrize("image", ["png", "webp", "gif", "bmp", "avif"])
def test_images_of_every_format_that_is_decoded_are_found(tmp_path, image):
    path = write_tar(tmp_path / "a.tar", sample("a", image=image, txt="x"))
    assert Reader(build(path)).read(np.array([0]))[0].image == b"1"
    if image in ("gif", "bmp", "avif"):
        with pytest.raises(UserError, match=rf"1 missing_image \(a\.{image}, a\.txt\)"):
            ShardIndex.build([str(path)], rule=OLD_RULE)


def test_the_default_rule_is_that_of_fresh_runs():
    assert SampleRule() == RULE
    assert RULE.needs_caption
