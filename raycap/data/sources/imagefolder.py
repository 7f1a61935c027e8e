"""The `datasets` imagefolder convention: images beside `metadata.csv` or `metadata.jsonl` with a `file_name` column.

The table stands in the folder itself, or in a subfolder a split (`train/metadata.csv`, `test/metadata.csv`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from raycap.data.sources.base import Rejected, canonical_split, split_folder_names
from raycap.data.sources.captions_jsonl import jsonl_records
from raycap.data.sources.columns import checked_columns, renamed, require_columns
from raycap.data.sources.csv_table import caption_list, csv_header, csv_records
from raycap.data.sources.table import Record, TableSource, parse_record

TABLES = ("metadata.csv", "metadata.jsonl")
IMAGE_KEYS = ("file_name", "image")


class ImageFolder(TableSource):
    """One row a file; several rows of one file are joined."""

    layout = "an image folder with metadata.csv or metadata.jsonl (file_name, and caption, captions or text)"
    uses = frozenset({"columns", "images", "lang"})

    @staticmethod
    def detect(path: Path) -> bool:
        return bool(_tables(path))

    def table_files(self) -> list[Path]:
        return _tables(self.root)

    def records(self) -> Iterator[Record | Rejected]:
        columns = checked_columns(self.settings)
        for file in self.table_files():
            folder = file.parent.relative_to(self.root).as_posix()
            folder = "" if folder == "." else folder
            name = file.relative_to(self.root).as_posix()
            split = canonical_split(folder) or ""
            if file.suffix != ".csv":
                yield from jsonl_records(
                    file, name, image_keys=IMAGE_KEYS, folder=folder, default_split=split, columns=columns
                )
                continue
            require_columns(str(file), csv_header(file), columns)
            keys = ("image",) if "image" in columns else IMAGE_KEYS

            def parse(cells, where, folder=folder, split=split, keys=keys):
                fields = renamed(cells, columns)
                if isinstance(fields.get("captions"), str):
                    fields["captions"] = caption_list(fields["captions"])
                return parse_record(fields, where, image_keys=keys, folder=folder, default_split=split)

            yield from csv_records(file, name, parse)


def _tables(root: Path) -> list[Path]:
    places = [root, *(root / name for name in split_folder_names())]
    return [place / table for place in places for table in TABLES if (place / table).is_file()]
