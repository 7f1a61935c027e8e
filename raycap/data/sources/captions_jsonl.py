"""A folder with `captions.jsonl`: `{"image": path, "captions": [...], "split": ...}`, a line an image."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from raycap.data.sources.base import Rejected
from raycap.data.sources.columns import checked_columns, renamed
from raycap.data.sources.table import Record, TableSource, parse_record

TABLE = "captions.jsonl"


class CaptionsJsonl(TableSource):
    """Image paths are relative to the folder, or to `images/` in it; lines of one image are joined."""

    layout = f"a folder with {TABLE}"
    uses = frozenset({"columns", "images", "lang"})
    places = ("", "images")

    @staticmethod
    def detect(path: Path) -> bool:
        return (path / TABLE).is_file()

    def table_files(self) -> list[Path]:
        return [self.root / TABLE]

    def records(self) -> Iterator[Record | Rejected]:
        columns = checked_columns(self.settings)
        yield from jsonl_records(self.root / TABLE, TABLE, image_keys=("image",), columns=columns)


def jsonl_records(file: Path, name: str, *, image_keys: tuple[str, ...], folder: str = "", default_split: str = "",
                  columns: Mapping[str, Any]) -> Iterator[Record | Rejected]:  # fmt: skip
    """Records of a JSON-lines file; blank lines are skipped, lines that are no JSON object are rejected.

    Lines end at `\\n` alone: U+2028 and its like may stand inside a JSON string.
    """
    with open(file, "rb") as lines:
        for number, raw in enumerate(lines, start=1):
            where = f"{name}:{number}"
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if not text:
                    continue
                fields = json.loads(text)
            except UnicodeDecodeError as error:
                yield Rejected("", where, "not-utf8", f"byte {error.start} of the line is not UTF-8")
            except (ValueError, RecursionError) as error:
                yield Rejected("", where, "not-json", f"{error}")
            else:
                if isinstance(fields, dict):
                    keys = ("image",) if "image" in columns else image_keys
                    fields = renamed(fields, columns)
                    yield parse_record(fields, where, image_keys=keys, folder=folder, default_split=default_split)
                else:
                    found = type(fields).__name__
                    yield Rejected("", where, "not-an-object", f"the line holds {found}, expected an object")
