"""RISC, satellite images with five captions each: `captions.csv` beside `resized/`.

Layout, as read in users of the published RISCM folder (BilgeKaganOzkan/DI725_FINAL_PROJECT: its loader and its copy of
rows; others' `df["split"] == "train"`, `row[f"caption_{i}"] for i in range(1, 6)`): the columns source (NWPU, RSICD, UCM),
split (train, val, test), image (NWPU_27985.jpg), caption_1 ... caption_5; the pictures, 224 x 224, lie in resized/.
A cell may be empty (some images have fewer captions).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from raycap.data.sources.base import Rejected
from raycap.data.sources.csv_table import csv_header, csv_records
from raycap.data.sources.table import Record, TableSource, parse_record

TABLE = "captions.csv"
COLUMNS = ("source", "split", "image", "caption_1")


class Risc(TableSource):
    """Official splits; the shards' `source` keeps which collection an image came from."""

    layout = f"RISC's {TABLE} (source, split, image, caption_1 ... caption_5) beside resized/"
    places = ("resized", "", "images")

    @staticmethod
    def detect(path: Path) -> bool:
        table = path if path.is_file() else path / TABLE
        return table.suffix == ".csv" and set(COLUMNS) <= set(csv_header(table))

    def table_files(self) -> list[Path]:
        return [self.path if self.path.is_file() else self.root / TABLE]

    def records(self) -> Iterator[Record | Rejected]:
        (file,) = self.table_files()
        columns = sorted((c for c in csv_header(file) if _number(c)), key=_number)

        def parse(cells: dict[str, str], where: str) -> Record | Rejected:
            fields = {
                "image": cells.get("image"),
                "split": cells.get("split"),
                "captions": [cells[c] for c in columns if c in cells],
            }
            record = parse_record(fields, where, image_keys=("image",))
            if isinstance(record, Record):
                record.source = f"{self.title}/{cells['source']}" if cells.get("source") else ""
            return record

        yield from csv_records(file, file.name, parse)


def _number(column: str) -> int:
    """5 for caption_5; 0 for any other column."""
    head, _, tail = column.partition("_")
    return int(tail) if head == "caption" and tail.isdigit() else 0
