"""Fine-grained evaluation sets in one form: MMVP-VLM, SugarCrepe, Winoground, ARO and What'sUp.

    python data_prep/pairs.py mmvp MMVP_VLM sets/mmvp
    python data_prep/pairs.py sugarcrepe sugar-crepe/data sets/sugarcrepe --images coco/val2017
    python data_prep/pairs.py winoground winoground sets/winoground
    python data_prep/pairs.py aro ARO sets/aro-relation --part relation
    python data_prep/pairs.py whatsup controlled_images_dataset.json sets/whatsup-a --images controlled_images

Each reads a set as its authors publish it and writes OUT/pairs.json and OUT/pairs.jsonl, which
mcl_clip/eval/pairs.py describes. Images stay where they are and are referenced by their absolute folder; only those
inside a Parquet file are written, to OUT/images.
"""

import csv
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from tqdm import tqdm

from mcl_clip.core.errors import UserError, run_program
from mcl_clip.core.files import read_json
from mcl_clip.data.tables import check_columns
from mcl_clip.data.writing import image_extension, new_folder, refuse_non_empty
from mcl_clip.eval.pairs import PairSet, json_lines, write_pair_set

MMVP_PATTERNS = (
    "Orientation and Direction", "Presence of Specific Features", "State and Condition", "Quantity and Count",
    "Positional and Relational Context", "Color and Appearance", "Structural Characteristics", "Texts",
    "Viewpoint and Perspective",
)  # fmt: skip
MMVP_FOLDERS = ("MLLM_VLM Images", "MLLM_VLM_Images", "MMVP_VLM_Images", "images")
MMVP_PAIRS_A_PATTERN = 15
MMVP_PROMPT = "a photo of "
SUGARCREPE_TASKS = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
ARO_MIN_GROUP_SIZE = {"relation": 1, "attribution": 25}  # as the authors average: rarer pairs are left out
WHATSUP_OPPOSITES = {
    "left": "left-right", "right": "left-right", "on": "on-under", "under": "on-under",
    "in-front": "front-behind", "behind": "front-behind",
}  # fmt: skip
WHATSUP_RELATIONS = ("left of", "right of", "front of", "behind", "above", "below", "top of")

Item = dict[str, Any]
Root = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ROOT")]
Out = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]


def mmvp(root: Root, out: Out) -> None:
    """Convert MMVP-VLM: two images and two statements per item, by nine visual patterns.

    The pattern of a pair is what the column Type says; where the order of the rows, which the authors' program goes by,
    says something else, a warning counts it. `accuracy` is the mean of the patterns.

    Args:
        root: Folder with Questions.csv and the folder of images.
        out: Folder to make; must be empty or not exist.

    Raises:
        UserError: for files that are missing or not as published, or a folder that is not empty.
    """
    refuse_non_empty(out)
    images = next((root / name for name in MMVP_FOLDERS if (root / name).is_dir()), None)
    if images is None:
        raise UserError(f"{root} has no folder of images; it must be named one of {', '.join(MMVP_FOLDERS)}")
    rows = sorted(_read_questions(root / "Questions.csv"))
    numbers = [number for number, _, _ in rows]
    if len(rows) % 2 or any(odd % 2 != 1 or even != odd + 1 for odd, even in zip(*[iter(numbers)] * 2, strict=True)):
        raise UserError(
            f"{root / 'Questions.csv'} does not hold pairs of questions (1, 2), (3, 4) ...; restore the file"
        )
    pictures = defaultdict(list)
    for path in sorted(images.rglob("*")):
        if path.suffix.lower() in (".jpg", ".jpeg", ".png"):
            pictures[path.stem].append(path)
    items = list(_mmvp_items(rows, images, pictures))
    expected = [name for name in MMVP_PATTERNS for _ in range(MMVP_PAIRS_A_PATTERN)]
    if len(items) != len(expected):
        print(f"warning: {len(items)} pairs; the published set has {len(expected)}")
    different = sum(item["group"] != pattern for item, pattern in zip(items, expected, strict=False))
    if different:
        print(f"warning: {different} of {len(items)} pairs have another Type than their place gives; Type is used")
    _write(out, items, name="mmvp-vlm", rule="pair_t2i", images=images, source="MMVP-VLM", average="groups")


def _read_questions(path: Path) -> Iterator[tuple[int, str, str]]:
    _need(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.DictReader(file, strict=True)
            check_columns(str(path), ("Question ID", "Type", "Statement"), lines.fieldnames or ())
            for row in lines:
                number, kind, statement = (row[name] or "" for name in ("Question ID", "Type", "Statement"))
                if not number.strip().isdecimal() or not kind.strip() or not statement.strip():
                    raise UserError(f"{path}, line {lines.line_num} has no number, type or statement; restore the file")
                yield int(number), kind.strip(), statement
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a UTF-8 table ({error}); restore the file") from error


def _mmvp_items(
    rows: Sequence[tuple[int, str, str]], images: Path, pictures: Mapping[str, Sequence[Path]]
) -> Iterator[Item]:
    for (number, kind, statement), (other, other_kind, other_statement) in zip(rows[::2], rows[1::2], strict=True):
        if kind != other_kind:
            print(
                f"warning: questions {number} and {other} are of types {kind!r} and {other_kind!r}; the first is used"
            )
        yield {
            "id": f"{number}-{other}",
            "group": kind,
            "images": [_mmvp_image(images, pictures, *one) for one in ((number, kind), (other, other_kind))],
            "texts": [MMVP_PROMPT + one for one in (statement, other_statement)],
            "match": [[0, 0], [1, 1]],
        }


def _mmvp_image(images: Path, pictures: Mapping[str, Sequence[Path]], number: int, kind: str) -> str:
    """Return the path of a question's image below `images`: in the folder of its type, or one with a shorter name."""
    found = pictures.get(str(number), [])
    chosen = [path for path in found if path.parent.name == kind] or found
    if len(chosen) != 1:
        raise UserError(f"{images} has {len(found)} pictures for question {number}; it must have {kind}/{number}.jpg")
    return str(chosen[0].relative_to(images))


def sugarcrepe(root: Root, out: Out, *, images: Path) -> None:
    """Convert SugarCrepe: an image, its caption and a false caption per item, in seven groups; `accuracy` is over all.

    Args:
        root: Folder with add_att.json, replace_obj.json and so on.
        out: Folder to make; must be empty or not exist.
        images: Folder of COCO's val2017 pictures.

    Raises:
        UserError: for files that are missing or not as published, or a folder that is not empty.
    """
    refuse_non_empty(out)
    there = [name for name in SUGARCREPE_TASKS if (root / f"{name}.json").is_file()]
    if not there:
        raise UserError(
            f"{root} has none of {', '.join(f'{name}.json' for name in SUGARCREPE_TASKS)}; name their folder"
        )
    if len(there) < len(SUGARCREPE_TASKS):
        missing = [name for name in SUGARCREPE_TASKS if name not in there]
        print(f"warning: {', '.join(missing)} are not in {root} and left out")
    items = [
        _choice(f"{task}/{key}", task, filename, (caption, negative))
        for task in there
        for key, row, where in _rows(root / f"{task}.json")
        for filename, caption, negative in [_fields(row, ("filename", "caption", "negative_caption"), where)]
    ]
    _write(out, items, name="sugarcrepe", rule="text_choice", images=images, source="SugarCrepe")


def winoground(root: Root, out: Out) -> None:
    """Convert Winoground: two images and two captions of the same words per item, by collapsed_tag.

    `accuracy` is the group score.

    Args:
        root: Folder with test-*.parquet, or with examples.jsonl and the unpacked folder `images`; here or in `data`.
        out: Folder to make; must be empty or not exist.

    Raises:
        UserError: for files that are missing or not as published, or a folder that is not empty.
    """
    refuse_non_empty(out)
    settings: dict[str, Any] = {"name": "winoground", "rule": "winoground", "source": "Winoground"}
    for folder in (root, root / "data"):
        if tables := sorted(folder.glob("test-*.parquet")):
            _write(out, partial(_winoground_items, _parquet_rows(tables)), images=None, **settings)
            return
        if (folder / "examples.jsonl").is_file():
            items = _winoground_items(json_lines(folder / "examples.jsonl"), folder / "images")
            _write(out, items, images=folder / "images", **settings)
            return
    raise UserError(f"{root} has neither test-*.parquet nor examples.jsonl, in it or in 'data'; name the folder of one")


def _winoground_items(rows: Iterable[tuple[Any, str]], images: Path) -> Iterator[Item]:
    names = ("id", "image_0", "image_1", "caption_0", "caption_1", "collapsed_tag")
    for row, where in rows:
        number, *pictures, caption, other, tag = _fields(row, names, where, kinds=(int, str, dict))
        yield {
            "id": str(number),
            "group": tag,
            "images": [_winoground_image(value, images, f"ex_{number}_img_{k}") for k, value in enumerate(pictures)],
            "texts": [caption, other],
            "match": [[0, 0], [1, 1]],
        }


def _winoground_image(value: Any, images: Path, name: str) -> str:
    """Return the name of an image in `images`; one given as bytes is written there first."""
    if isinstance(value, dict):
        data = value.get("bytes") or b""
        ending = image_extension(data)
        if not ending:
            raise UserError(f"{name} is not an image file that can be decoded; download the Parquet file again")
        (images / f"{name}.{ending}").write_bytes(data)
        return f"{name}.{ending}"
    return value if Path(value).suffix else f"{value}.png"


def _parquet_rows(tables: Sequence[Path]) -> Iterator[tuple[Item, str]]:
    for table in tables:
        try:
            file = pq.ParquetFile(pa.OSFile(os.fsencode(table)))
            with tqdm(total=file.metadata.num_rows, desc=f"reading {table.name}", unit="row", disable=None) as bar:
                for batch in file.iter_batches(batch_size=16):
                    for row in batch.to_pylist():
                        yield row, str(table)
                        bar.update()
        except pa.ArrowInvalid as error:
            raise UserError(f"{table} is not a whole Parquet file ({error}); download it again") from error


def aro(root: Root, out: Out, *, part: Literal["relation", "attribution"], leave_out: Path | None = None) -> None:
    """Convert ARO: a crop of an image, a true and a false caption per item, by relation or by pair of attributes.

    `accuracy` is the mean of the groups. As with the authors, pairs of attributes with fewer than 25 items stay out of
    it. They also leave out symmetric relations, a list in their notebook; --leave-out takes such a list.

    Args:
        root: Folder with visual_genome_relation.json or visual_genome_attribution.json, and the folder `images`.
        out: Folder to make; must be empty or not exist.
        part: Which of the two.
        leave_out: File with groups to leave out, one a line: relations as they are called in the set, or two attributes
            joined by '_'.

    Raises:
        UserError: for files that are missing or not as published, or a folder that is not empty.
    """
    refuse_non_empty(out)
    path = root / f"visual_genome_{part}.json"
    items = [_aro_item(*row) for row in _rows(path)]
    if leave_out is not None:
        _need(leave_out)
        names = {line.strip() for line in leave_out.read_text(encoding="utf-8").splitlines() if line.strip()}
        if unknown := sorted(names - {item["group"] for item in items}):
            print(f"warning: {len(unknown)} of the groups to leave out are not in the set, the first is {unknown[0]!r}")
        items = [item for item in items if item["group"] not in names]
    _write(
        out,
        items,
        name=f"aro-{part}",
        rule="text_choice",
        images=root / "images",
        source=f"ARO, Visual Genome {part}",
        average="groups",
        min_group_size=ARO_MIN_GROUP_SIZE[part],
    )


def _aro_item(key: str, row: Any, where: str) -> Item:
    image, true, false = _fields(row, ("image_path", "true_caption", "false_caption"), where)
    x, y, width, height = _fields(row, [f"bbox_{side}" for side in "xywh"], where, kinds=(int, float))
    if "attributes" in row:
        (attributes,) = _fields(row, ("attributes",), where, kinds=(list,))
        group = "_".join(map(str, attributes))
    else:
        (group,) = _fields(row, ("relation_name",), where)
    left, top = round(x), round(y)
    item = _choice(key, group, image, (true, false))
    return {**item, "images": [{"path": image, "box": [left, top, round(x + width) - left, round(y + height) - top]}]}


def whatsup(
    annotations: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="JSON")], out: Out, *, images: Path
) -> None:
    """Convert What'sUp: an image and captions that differ in a preposition per item, by that preposition.

    `accuracy` is over all items. Of the controlled sets, `pair_accuracy` counts pairs of opposite prepositions and
    `set_accuracy` all four pictures of the same two things, right only where all of them are.

    Args:
        annotations: controlled_images_dataset.json, controlled_clevr_dataset.json, or a coco_qa or vg_qa file.
        out: Folder to make; must be empty or not exist.
        images: Folder of the pictures: controlled_images, controlled_clevr, val2017 or vg_images.

    Raises:
        UserError: for files that are missing or not as published, or a folder that is not empty.
    """
    refuse_non_empty(out)
    items = [_whatsup_item(*row, images) for row in _rows(annotations)]
    for kind, size in (("pair", 2), ("set", 4)):
        counts = Counter(item["together"][kind] for item in items if "together" in item)
        if incomplete := [name for name, count in counts.items() if count != size]:
            print(f"warning: {len(incomplete)} of {len(counts)} {kind}s have not {size} pictures, as {incomplete[0]}")
    _write(out, items, name=f"whatsup-{annotations.stem}", rule="text_choice", images=images, source="What'sUp")


def _whatsup_item(key: str, row: Any, where: str, images: Path) -> Item:
    if isinstance(row, dict):
        (image,) = _fields(row, ("image_path",), where)
        (captions,) = _fields(row, ("caption_options",), where, kinds=(list,))
        image = os.path.basename(image)  # the folders before it are those of the authors' machine
    elif isinstance(row, list) and len(row) == 3:
        names = [f"{str(row[0]).zfill(12)}.jpg", f"{row[0]}.jpg"]  # of COCO and of Visual Genome
        image, captions = next((name for name in names if (images / name).is_file()), names[0]), row[1:]
    else:
        raise UserError(f"{where}: neither an object nor [image, right caption, wrong caption]")
    if not captions or not isinstance(captions[0], str):
        raise UserError(f"{where} has no captions; restore the file")
    words = Path(image).stem.split("_")
    if len(words) < 3 or words[1] not in WHATSUP_OPPOSITES:
        return _choice(key, _preposition(captions[0]), image, captions)
    things = f"{words[0]}_{words[-1]}"
    together = {"pair": f"{things} {WHATSUP_OPPOSITES[words[1]]}", "set": things}
    return {**_choice(key, words[1], image, captions), "together": together}


def _preposition(caption: str) -> str:
    found = next((phrase for phrase in WHATSUP_RELATIONS if phrase in caption), None)
    return found.split()[0] if found else caption.split()[-1].rstrip(".")


def _choice(key: str, group: str, image: str, captions: Sequence[str]) -> Item:
    """Build an item with one image, whose matching text is the first."""
    return {"id": key, "group": group, "images": [image], "texts": list(captions), "match": [[0, 0]]}


def _write(
    out: Path,
    items: Callable[[Path], Iterable[Item]] | Iterable[Item],
    *,
    name: str,
    rule: str,
    images: Path | None,
    source: str,
    average: str = "items",
    min_group_size: int = 1,
) -> None:
    """Write the two files, read them back as an evaluation would, and print their sizes.

    Without a folder of `images`, `items` is a function that writes the images to the folder that it is given.
    """
    if images is not None and not images.is_dir():
        raise UserError(f"{images} is not a folder; name the one that holds the pictures")
    with new_folder(out) as folder:
        root = images or folder / "images"
        root.mkdir(exist_ok=True)
        rows = list(items(root) if callable(items) else items)
        names = dict.fromkeys(one["path"] if isinstance(one, dict) else one for row in rows for one in row["images"])
        looked_for = tqdm(names, desc="looking for pictures", unit="file", disable=None)
        if missing := [one for one in looked_for if not (root / one).is_file()]:
            raise UserError(f"{len(missing)} of {len(names)} pictures are not in {root}, the first is {missing[0]}")
        write_pair_set(
            folder, rows, name=name, rule=rule, images=str(images.resolve()) if images else "images", source=source,
            average=average, min_group_size=min_group_size,
        )  # fmt: skip
        data = PairSet.open(folder)
    groups = ", ".join(f"{name} {count}" for name, count in list(data.group_sizes.items())[:10])
    more = f" and {len(data.group_sizes) - 10} more" if len(data.group_sizes) > 10 else ""
    print(f"{out}: {len(data.items)} items, {len(data.source)} images, {len(data.texts)} texts ({groups}{more})")


def _need(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path} is missing; name the folder, or file, as it was published")


def _rows(path: Path) -> Iterator[tuple[str, Any, str]]:
    """Yield keys of a JSON object, or positions in a list, with their values and a description of the position."""
    _need(path)
    found = read_json(path)
    if not isinstance(found, dict | list) or not found:
        raise UserError(f"{path} is neither a list nor an object with entries; restore the file")
    rows = found.items() if isinstance(found, dict) else enumerate(found)
    for key, row in tqdm(rows, total=len(found), desc=f"reading {path.name}", unit="item", disable=None):
        yield str(key), row, f"{path}, entry {key}"


def _fields(row: Any, names: Iterable[str], where: str, *, kinds: tuple[type, ...] = (str,)) -> list[Any]:
    """Return the values of a row under `names`."""
    found = [(name, row.get(name) if isinstance(row, dict) else None) for name in names]
    if wrong := [f"{name} is {value!r:.80}" for name, value in found if not isinstance(value, kinds)]:
        raise UserError(f"{where}: {wrong[0]}; restore the file as it was published")
    return [value for _, value in found]


if __name__ == "__main__":
    commands: dict[str, Callable[..., None]] = {
        "mmvp": mmvp, "sugarcrepe": sugarcrepe, "winoground": winoground, "aro": aro, "whatsup": whatsup
    }  # fmt: skip
    run_program(lambda: tyro.extras.subcommand_cli_from_dict(commands, description=__doc__))
