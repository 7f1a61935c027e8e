"""Records of a CSV file with a line of column names."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from raycap.data.sources.base import Rejected
from raycap.data.sources.table import Record

Parse = Callable[[dict[str, str], str], Record | Rejected]
"""(cells by column, without the empty ones; file:line) -> what they make."""


def csv_header(file: Path) -> list[str]:
    """The names on the first line; empty where the file cannot be read as text."""
    try:
        with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
            return [c.strip() for c in next(csv.reader(text), [])]
    except (OSError, csv.Error):
        return []


def csv_records(file: Path, name: str, parse: Parse) -> Iterator[Record | Rejected]:
    """What `parse` makes of each line; a line that is no CSV, or has too many or too few cells, is rejected."""
    csv.field_size_limit(2**24)
    # surrogateescape: a byte that is no UTF-8 spoils its own line, not the file.
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        reader = csv.reader(text, strict=True)
        columns = [c.strip() for c in next(reader, [])]
        while True:
            where = f"{name}:{reader.line_num + 1}"
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
            yield parse({c: v for c, v in zip(columns, cells) if v != ""}, where)


def caption_list(cell: str) -> object:
    """A cell `["a dog", "a brown dog"]` is several captions, any other cell is one."""
    if cell.lstrip().startswith("["):
        try:
            return json.loads(cell)
        except ValueError:
            pass
    return cell
