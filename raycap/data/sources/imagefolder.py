"""The `datasets` imagefolder convention: images beside `metadata.csv` or `metadata.jsonl` with a `file_name` column.

The table stands in the folder itself, or in a subfolder a split (`train/metadata.csv`, `test/metadata.csv`).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from raycap.config import DataSettings
from raycap.data.sources.base import Rejected, canonical_split, split_folder_names
from raycap.data.sources.captions_jsonl import jsonl_records
from raycap.data.sources.table import Record, TableSource, parse_record
from raycap.errors import DataError

TABLES = ("metadata.csv", "metadata.jsonl")
IMAGE_KEYS = ("file_name", "image")
CAPTION_KEYS = ("captions", "caption", "text")


class ImageFolder(TableSource):
    """One row a file; several rows of one file are joined."""

    layout = "an image folder with metadata.csv or metadata.jsonl (file_name, and caption, captions or text)"

    def __init__(self, settings: DataSettings, seed: int):
        super().__init__(Path(settings.source).expanduser())

    @staticmethod
    def detect(path: Path) -> bool:
        return bool(_tables(path))

    def table_files(self) -> list[Path]:
        return _tables(self.root)

    def records(self) -> Iterator[Record | Rejected]:
        for file in self.table_files():
            folder = file.parent.relative_to(self.root).as_posix()
            folder = "" if folder == "." else folder
            name = file.relative_to(self.root).as_posix()
            split = canonical_split(folder) or ""
            read = _csv_records if file.suffix == ".csv" else jsonl_records
            yield from read(file, name, image_keys=IMAGE_KEYS, folder=folder, default_split=split)


def _tables(root: Path) -> list[Path]:
    places = [root, *(root / name for name in split_folder_names())]
    return [place / table for place in places for table in TABLES if (place / table).is_file()]


def _csv_records(file: Path, name: str, *, image_keys: tuple[str, ...], folder: str,
                 default_split: str) -> Iterator[Record | Rejected]:  # fmt: skip
    csv.field_size_limit(2**24)
    # surrogateescape: a byte that is no UTF-8 spoils its own line, not the file.
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        reader = csv.reader(text, strict=True)
        columns = [c.strip() for c in next(reader, [])]
        for keys in (image_keys, CAPTION_KEYS):
            if not set(keys) & set(columns):
                raise DataError(f"{file}: the first line names {', '.join(columns) or 'no columns'}; "
                                f"a column {' or '.join(keys)} is needed")  # fmt: skip
        while True:
            line = reader.line_num + 1
            where = f"{name}:{line}"
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Rejected("", where, "not-csv", str(error))
                continue
            if not cells:
                continue
            if len(cells) != len(columns):
                hint = "; quote a caption that holds a comma" if len(cells) > len(columns) else ""
                yield Rejected("", where, "not-csv", f"{len(cells)} cells under {len(columns)} columns{hint}")
                continue
            fields = {c: v for c, v in zip(columns, cells) if v != ""}
            if "captions" in fields:
                fields["captions"] = _caption_list(fields["captions"])
            yield parse_record(fields, where, image_keys=image_keys, folder=folder, default_split=default_split)


def _caption_list(cell: str) -> object:
    """A cell `["a dog", "a brown dog"]` is several captions, any other cell is one."""
    if cell.lstrip().startswith("["):
        try:
            return json.loads(cell)
        except ValueError:
            pass
    return cell
