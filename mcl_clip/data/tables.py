"""Read tables of images and captions: CSV and its relatives, JSON, Parquet, and the files of COCO and Flickr.

A row is a dict. The files of known data sets give `image`, `caption` and, where they state it, `split`:

    captions_train2017.json            of COCO: images and annotations
    dataset_coco.json                  Karpathy's splits: images with sentences
    Flickr8k.token.txt                 lines of IMAGE#NUMBER, a tab and a caption
    results.csv, results_20130124.token  of Flickr30k: IMAGE| NUMBER| CAPTION after a header, or as of Flickr8k
    a folder                           of images with KEY.txt or KEY.json beside them, as img2dataset's format `files`
    flickr30k_test_karpathy.txt        of CLIP_benchmark: IMAGE.jpg,CAPTION after a header
"""

import ast
import codecs
import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from mcl_clip.core.errors import UserError, shorten, shorten_list
from mcl_clip.core.files import read_json
from mcl_clip.data.tar import IMAGE_FORMATS

Row = dict[str, Any]
Splits = dict[str, dict[str, list[str]]]  # split -> image -> captions
TEXT, LINES = (".csv", ".tsv", ".txt", ".token"), (".jsonl", ".ndjson")
IMAGES = (*(f".{name}" for name in IMAGE_FORMATS), ".gif", ".bmp", ".avif")
SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
         codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # fmt: skip
FLICKR8K = re.compile(r"([^\t]+)#\d+\t(.*)")
FLICKR30K = re.compile(r"([^|]+?)\s*\|\s*(\d+)\s*[|\s]\s*(.*)")  # one line of the published file lacks the second bar
FLICKR30K_HEADER = "image_name| comment_number| comment"
KARPATHY = re.compile(r"(.+?\.jpg),(.*)")  # captions with commas, not in quotes
LIST = re.compile(r"""\[\s*['"].*['"]\s*,?\s*\]""", re.DOTALL)


def read_rows(table: Path, columns: Sequence[str], *, separator: str = "", encoding: str = "") -> Iterator[Row]:
    """Yield the rows of a table, in order, with at least `columns`.

    Without a `separator`, it is the one that gives the header these columns. A TSV has no quotes: a quotation mark in
    it is part of the text. Without an `encoding`, a byte order mark states it, else it is UTF-8.

    Raises:
        UserError: for an unknown kind of file, a column that is not there, or a row that does not fit the header.
    """
    suffix = table.suffix.lower()
    if table.is_dir():
        yield from _folder_rows(table, columns, encoding or "utf-8-sig")
    elif suffix in TEXT:
        yield from _text_rows(table, columns, {"tab": "\t", "\\t": "\t"}.get(separator, separator), encoding)
    elif suffix in LINES:
        yield from _json_lines(table, columns)
    elif suffix == ".json":
        yield from _json_rows(table, columns)
    elif suffix == ".parquet":
        yield from _parquet_rows(table, columns)
    else:
        known = ", ".join((*TEXT, *LINES, ".json", ".parquet"))
        raise UserError(f"{table} does not end in one of {known}; convert it to one of them")


def group_rows(
    rows: Iterable[Row], *, image_column: str, caption_column: str, split_column: str | None, root: Path
) -> Splits:
    """Group captions by split and image, in the order of their first rows. Without a split column the split is `all`.

    A path with back-slashes that is no file below `root` is one from Windows. A row without a path becomes an image
    that is missing.
    """
    splits: Splits = {}
    lists = 0
    for number, row in enumerate(rows, start=1):
        image, value = row[image_column], row[caption_column]
        if image is None or image == "":
            image = f"row {number}, which has no path"
        if not isinstance(image, str):
            raise UserError(
                f"row {number} has {shorten(repr(image), 60)} in column {image_column!r}; it must be the path of an "
                f"image (for images within Parquet files: from_hf.py FOLDER OUT --builder parquet)"
            )
        refuse_url(image, f"row {number}, column {image_column!r},")
        if ("\\" in image or image != image.strip()) and not (root / image).is_file():
            image = image.strip().replace("\\", "/")
        captions = as_captions(value, f"row {number}, column {caption_column!r},")
        lists += isinstance(value, str) and captions != [value]
        splits.setdefault(str(row[split_column]) if split_column else "all", {}).setdefault(image, []).extend(captions)
    if lists:
        tqdm.write(
            f"{lists:,} cells of column {caption_column!r} are lists of captions; each text in them is a caption"
        )
    return splits


def column_names(table: Path, *, separator: str = "", encoding: str = "") -> list[str]:
    """Return the names of the columns of a table, in order; none if it has no rows.

    Raises:
        UserError: as `read_rows`.
    """
    if table.suffix.lower() == ".parquet" and not table.is_dir():
        try:
            return list(pq.read_schema(table).names)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{table} is not a whole Parquet file ({shorten(error)}); make it anew") from error
    return list(next(read_rows(table, [], separator=separator, encoding=encoding), {}))


def as_captions(value: Any, where: str) -> list[str]:
    """Return the captions in a cell: a text, a text that is a list in JSON or Python, or nested lists of them.

    A struct with `raw`, as in Karpathy's splits, is its caption. Null is an empty caption.

    Raises:
        UserError: for anything else; `where` names the row and column.
    """
    if value is None:
        return [""]
    if isinstance(value, Mapping) and isinstance(value.get("raw"), str):
        return [value["raw"]]
    if isinstance(value, list | tuple):
        return [caption for one in value for caption in as_captions(one, where)]
    if not isinstance(value, str):
        has = f"a struct of {shorten_list(value)}" if isinstance(value, Mapping) else shorten(repr(value), 60)
        raise UserError(f"{where} has {has}; a caption must be text or a list of texts")
    if not LIST.fullmatch(text := value.strip()):
        return [value]
    for parse in (json.loads, ast.literal_eval):
        try:
            found = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        # Python joins neighboring texts: a printed NumPy array, which has no commas, would become a single one.
        is_array = parse is ast.literal_eval and re.search(r"""(['"])\s+\1""", text) and repr(found) != text
        if isinstance(found, list) and all(isinstance(one, str) for one in found) and not is_array:
            return found
    raise UserError(f'{where} has {shorten(value, 60)}, which is not a list in JSON; write one, as ["one", "two"]')


def _folder_rows(folder: Path, columns: Sequence[str], encoding: str) -> Iterator[Row]:
    """Yield the images of a folder with the text beside them: KEY.txt, or `caption` in KEY.json."""
    check_columns(f"{folder}, a folder of images,", columns, ("image", "caption"))
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in IMAGES or path.name.startswith("."):
            continue
        caption, text = None, path.with_suffix(".txt")
        if text.is_file():
            try:
                caption = text.read_text(encoding=encoding)
            except (LookupError, UnicodeError) as error:
                raise _wrong_encoding(text, encoding, error) from error
        elif path.with_suffix(".json").is_file() and isinstance(found := read_json(path.with_suffix(".json")), dict):
            caption = found.get("caption")
        yield {"image": path.relative_to(folder).as_posix(), "caption": caption}


def _text_rows(table: Path, columns: Sequence[str], separator: str, encoding: str) -> Iterator[Row]:
    with table.open("rb") as file:
        head = file.read(4096)
    encoding = encoding or next((name for mark, name in MARKS.items() if head.startswith(mark)), "utf-8")
    try:
        if b"\0" in head and encoding.lower().replace("_", "-") in ("utf-8", "utf-8-sig"):
            raise UnicodeDecodeError(encoding, head, head.index(0), head.index(0) + 1, "null character")
        with table.open(encoding=encoding, newline="") as file:
            first = file.readline().strip()
            file.seek(0)
            is_karpathy = table.suffix == ".txt" and first == "image,caption" and '"' not in head.decode("latin-1")
            if FLICKR8K.fullmatch(first) or first == FLICKR30K_HEADER or is_karpathy:
                yield from _flickr_rows(table, file, columns)
            else:
                yield from _csv_rows(table, file, columns, separator)
    except (LookupError, UnicodeError) as error:
        raise _wrong_encoding(table, encoding, error) from error


def _wrong_encoding(table: Path, encoding: str, error: LookupError | UnicodeError) -> UserError:
    """Return an error that shows the text around a byte that is wrong, in the encoding that it probably has."""
    if isinstance(error, LookupError):
        return UserError(f"--encoding {encoding} is not known ({error}); give one such as utf-8, utf-16 or cp1252")
    if not isinstance(error, UnicodeDecodeError):
        return UserError(f"{table} is not text in {encoding} ({error}); save it as UTF-8, or give its --encoding")
    data, start = error.object, error.start
    if b"\0" in data[:4096]:
        guess, around = f"utf-16-{'be' if data[0] == 0 else 'le'}", data[:40]
    else:
        guess, around = "cp1252", data[max(start - 20, 0) : start + 20]
    shown = shorten(around.decode(guess, "replace"), 40)
    return UserError(
        f"{table} is not text in {encoding.upper()} ({error.reason}, byte 0x{data[start]:02x}); it may be {guess}, in "
        f"which there is {shown!r}: if that reads well, add --encoding {guess}, else save the table as UTF-8"
    )


def _flickr_rows(table: Path, file: IO[str], columns: Sequence[str]) -> Iterator[Row]:
    check_columns(f"{table}", columns, ("image", "caption", "image_name", "comment"))
    for number, line in enumerate(map(str.strip, file), start=1):
        if not line or (number == 1 and line in (FLICKR30K_HEADER, "image,caption")):
            continue
        if match := FLICKR8K.fullmatch(line) or FLICKR30K.fullmatch(line) or KARPATHY.fullmatch(line):
            image, caption = match[1], match[match.lastindex or 2]
            yield {"image": image, "caption": caption, "image_name": image, "comment": caption}
        else:
            raise UserError(
                f"{table}, line {number} is not of the form of the others: {shorten(line)}; correct or delete it"
            )


def _csv_rows(table: Path, file: IO[str], columns: Sequence[str], separator: str) -> Iterator[Row]:
    quoting: dict[str, Any] = {"quoting": csv.QUOTE_NONE} if table.suffix.lower() == ".tsv" else {"strict": True}
    separators = [separator] if separator else ["\t"] if "quoting" in quoting else [*SEPARATORS]
    if len(separators[0]) != 1:
        raise UserError(f"--separator {separator!r} is not a single character; give one such as ';', or tab")
    lines: Any = None
    try:
        headers = {}
        for delimiter in separators:
            file.seek(0)
            headers[delimiter] = next(csv.reader(file, **{**quoting, "delimiter": delimiter, "strict": False}), [])
        fitting = (one for one, names in headers.items() if {*columns} <= {name.strip() for name in names})
        delimiter = next(fitting, max(headers, key=lambda one: len(headers[one])))
        raw = headers[delimiter]
        if raw:
            refuse_url(raw[0], f"{table}, line 1,")
        header = [name.strip() for name in raw]
        check_columns(f"{table}, separated by {SEPARATORS.get(delimiter, repr(delimiter))},", columns, header)
        if twice := [name for name in columns if header.count(name) > 1]:
            raise UserError(f"{table} has {header.count(twice[0])} columns {twice[0]!r}; rename all but one")
        has_blanks = any(name[:1] == " " for name in raw[1:])  # "image, caption": the values have blanks too
        file.seek(0)
        lines = csv.reader(file, delimiter=delimiter, skipinitialspace=has_blanks, **quoting)
        next(lines)
        for fields in lines:
            if not fields:
                continue
            if len(fields) != len(header):
                raise UserError(
                    f"{table}, line {lines.line_num}: {len(fields)} fields, the header has {len(header)}; put fields "
                    f"that hold the separator in quotes (CSV), or use JSON lines"
                )
            yield dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise UserError(
            f"{table}, line {lines.line_num if lines else 1}: {error}; close quotation marks and double those within "
            f"quotes, or use JSON lines"
        ) from error


def _json_lines(table: Path, columns: Sequence[str]) -> Iterator[Row]:
    with table.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{table}, line {number} is not JSON ({error}); correct or delete it") from error
            if not isinstance(row, dict):
                raise UserError(f"{table}, line {number} is not a JSON object; write one object per line")
            check_columns(f"{table}, line {number},", columns, list(row))
            yield row


def _json_rows(table: Path, columns: Sequence[str]) -> Iterator[Row]:
    try:
        found = json.loads(table.read_bytes())
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise UserError(f"{table} is not JSON ({error}); correct it, or download it again") from error
        found = None  # lines of JSON
    except (ValueError, RecursionError) as error:
        raise UserError(f"{table} is not JSON ({shorten(error)}); correct it, or download it again") from error
    if found is None:
        rows = _json_lines(table, columns)
    elif isinstance(found, list):
        rows = iter(found)
    elif isinstance(found, dict) and isinstance(images := found.get("images"), list):
        rows = _coco_rows(table, images, found["annotations"]) if "annotations" in found else map(_karpathy_row, images)
    else:
        raise UserError(f"{table} is neither a list of objects nor the captions of COCO; convert it to JSON lines")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{table}, entry {number} is not a JSON object; write one object per row")
        check_columns(f"{table}, entry {number},", columns, list(row))
        yield row


def _coco_rows(table: Path, images: list[Any], annotations: list[Any]) -> Iterator[Row]:
    try:
        names = {image["id"]: image["file_name"] for image in images}
        for one in annotations:
            if "caption" not in one:
                raise UserError(f"{table} has annotations without captions; take the file of captions, captions_*.json")
            yield {**one, "image": names[one["image_id"]], "file_name": names[one["image_id"]]}
    except (LookupError, TypeError) as error:
        raise UserError(f"{table} is not the captions of COCO ({error!r}); download it again") from error


def _karpathy_row(image: Any) -> Any:
    if not isinstance(image, dict) or "filename" not in image or "sentences" not in image:
        return image  # the check of columns names what is there
    path = f"{image['filepath']}/{image['filename']}" if image.get("filepath") else image["filename"]
    return {**image, "image": path, "caption": image["sentences"]}


def _parquet_rows(table: Path, columns: Sequence[str]) -> Iterator[Row]:
    try:
        file = pq.ParquetFile(pa.OSFile(os.fsencode(table)))  # a str would have to be UTF-8
        check_columns(str(table), columns, file.schema_arrow.names)
        for batch in file.iter_batches(columns=list(dict.fromkeys(columns)), batch_size=1024):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{table} is not a whole Parquet file ({shorten(error)}); make it anew") from error


def refuse_url(image: str, where: str) -> None:
    """Raise a UserError if an image is given by its URL."""
    if re.match("https?://", image):
        raise UserError(
            f"{where} has the URL {shorten(image)}; download the images with img2dataset, as docs/data.md shows, and "
            f"give the shards to from_img2dataset.py"
        )


def check_columns(where: str, columns: Sequence[str], there: Sequence[str]) -> None:
    """Raise a UserError for a column that is not there."""
    for column in columns:
        if column not in there:
            raise UserError(f"{where} has no column {column!r}; its columns are {shorten_list(there, 20)}")
