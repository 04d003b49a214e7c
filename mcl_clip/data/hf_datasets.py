"""Read data sets of the `datasets` library: on the Hub, in a local folder, or saved with `save_to_disk`."""

import glob
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import datasets
import fsspec

from mcl_clip.core.errors import UserError, shorten, shorten_list
from mcl_clip.data.tables import as_captions, check_columns, refuse_url
from mcl_clip.data.writing import Pair

Builder = Literal["auto", "disk", "imagefolder", "parquet", "json"]


def open_splits(
    source: str, builder: Builder = "auto", config: str | None = None, revision: str | None = None, *,
    streaming: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Open the splits of a data set by name, streamed unless it is saved on disk; one without splits is `train`.

    Raises:
        UserError: if there is no such data set, or `datasets` cannot read it.
    """
    folder = Path(source)
    if builder == "auto" and any((folder / name).exists() for name in ("dataset_dict.json", "state.json")):
        builder = "disk"  # what save_to_disk leaves
    if builder != "auto" and not folder.is_dir():
        raise UserError(f"--builder {builder} needs a local folder; {source} is none")
    if builder != "disk" and folder.is_dir() and glob.has_magic(str(folder.resolve())):
        raise UserError(
            f"the path of {source} has one of the characters * ? [, and `datasets` takes it for a pattern, which "
            f"matches other folders; rename the folder"
        )
    try:
        if builder == "disk":
            found = datasets.load_from_disk(source)
        elif builder == "auto":
            found = datasets.load_dataset(source, name=config, revision=revision, streaming=streaming)
        else:
            found = datasets.load_dataset(builder, data_dir=source, streaming=streaming)
    except Exception as error:  # of any library that reads files for `datasets`
        if re.search("[Dd]ataset scripts|trust_remote_code", str(error)):
            raise UserError(
                f"{source} is read by a program of its own, which `datasets` no longer runs; add --revision "
                f"refs/convert/parquet for the copy that the Hub makes, or give the folder of its files"
            ) from error
        raise UserError(f"{source} cannot be opened: {_reason(error)}") from error
    return dict(found) if isinstance(found, dict) else {"train": found}


def read_pairs(
    splits: dict[str, Any], *, image_column: str, caption_column: str, root: Path, wanted: tuple[str, str] | None = None
) -> Iterator[Pair]:
    """Yield the rows of splits, keyed by their number, with the image files as they are stored.

    `wanted` is a column and its value, for some of the rows only.

    Raises:
        UserError: for a column that is not there or holds something else, or if no row has the value.
    """
    number, values = 0, dict[str, None]()
    columns = [image_column, caption_column, *(wanted[:1] if wanted else ())]
    for name, dataset in splits.items():
        for row in _rows(dataset, columns, name):
            where = f"row {number} of split {name}"
            if wanted:
                values.setdefault(str(row[wanted[0]]))
            if not wanted or str(row[wanted[0]]) == wanted[1]:
                image = image_bytes(row[image_column], root, f"{where}, column {image_column!r},")
                captions = as_captions(row[caption_column], f"{where}, column {caption_column!r},")
                path = row[image_column].get("path") if isinstance(row[image_column], dict) else row[image_column]
                source = f"{where}, {path}" if isinstance(path, str) else where
                yield Pair(key=f"{number:08d}", image=image, captions=captions, source=source)
            number += 1
    if wanted and wanted[1] not in values:
        raise UserError(f"no row has {wanted[1]!r} in column {wanted[0]!r}; it has {shorten_list(values)}")


def _rows(dataset: Any, columns: list[str], name: str) -> Iterator[dict[str, Any]]:
    """Yield rows without decoding their images; what goes wrong within `datasets` on the way is a UserError."""
    number = 0
    try:
        check_columns(f"split {name}", columns, dataset.column_names or list(next(iter(dataset.take(1)), {})))
        for row in undecoded(dataset.select_columns(list(dict.fromkeys(columns))), columns[0]):
            yield row
            number += 1
    except UserError:
        raise
    except Exception as error:  # as in `open_splits`; files are read while iterating
        raise UserError(
            f"split {name} cannot be read beyond row {number}: {_reason(error)}; download the data set again, or take "
            f"the rows before it with --max-samples {max(number, 1)}"
        ) from error


def undecoded(dataset: Any, column: str) -> Any:
    """Return a data set whose images in a column, or in its lists, are files and not decoded."""

    def plain(feature: Any) -> Any:
        if isinstance(feature, datasets.Image):
            return datasets.Image(decode=False)
        return type(feature)(plain(feature.feature)) if hasattr(feature, "feature") else feature

    feature = (dataset.features or {}).get(column)
    return dataset if feature is None or plain(feature) == feature else dataset.cast_column(column, plain(feature))


def _reason(error: Exception) -> str:
    cause = error.__cause__ or error  # `datasets` wraps the cause in "An error occurred"
    return f"{type(cause).__name__}: {shorten(cause, 300)}"


def image_bytes(value: Any, root: Path, where: str) -> bytes:
    """Read the file of an image: bytes, a path, or a struct of both as `datasets` stores it; empty if there is none.

    Relative paths start from `root`. A list of one image is that image.
    """
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict) and {"bytes", "path"} & value.keys():
        value = value.get("bytes") or value.get("path")
    if value is None or isinstance(value, bytes):
        return value or b""
    if not isinstance(value, str):
        has = f"a list of {len(value)} values" if isinstance(value, list) else shorten(repr(value), 60)
        raise UserError(f"{where} has {has}; it must be an image, the bytes of an image file, or a path")
    refuse_url(value, where)
    if value.startswith(("hf://", "zip://")):  # as the image folder builder writes them
        with fsspec.open(value, "rb") as file:
            return bytes(file.read())
    return (root / value).read_bytes() if (root / value).is_file() else b""
