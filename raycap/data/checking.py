"""The first part of `prepare`: every item of a source is kept, its image in the spool, or rejected with its reason."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raycap.data.images import CheckedImage, Look, check_image
from raycap.data.sources import Rejected, Source, SourceRow
from raycap.data.text_rules import clean_caption_counted
from raycap.data.units import UNIT_ROWS, CheckWork, Progress, Rate, Spool, Tools, facts_of, parts, run_units
from raycap.files import read_jsonl, write_jsonl

_REPORT_ROWS = 50
_ADDRESS = re.compile(r" <[\w.]+ object at 0x[0-9a-f]+>")
"""What PIL calls a file in memory: another one each time."""


@dataclass(slots=True)
class Row:
    """A row that passed the checks; its image lies in the working folder at `place` (see units.read_place)."""

    source: SourceRow
    captions: list[str]
    place: list[Any]
    width: int
    height: int
    sha256: str
    look: Look


@dataclass(slots=True)
class Checked:
    """What the checks found."""

    rows: list[Row] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    read: int = 0
    beyond_limit: int = 0
    images_changed: Counter[str] = field(default_factory=Counter)
    seen: dict[str, str] = field(default_factory=dict)
    """Where each image id stands."""
    named: Counter[str] = field(default_factory=Counter)
    """Rows kept by the split that the source names."""
    captions_read: int = 0
    captions_changed: Counter[str] = field(default_factory=Counter)
    """Captions by the rule that changed them."""
    duplicates: dict[str, int] = field(default_factory=dict)
    leaks: dict[str, dict[str, int]] = field(default_factory=dict)

    def drop(self, gone: Mapping[int, Rejected]) -> None:
        """Take rows out, each with its reason."""
        self.rejected.extend(gone.values())
        self.rows = [row for i, row in enumerate(self.rows) if i not in gone]


def check_rows(source: Source, limit: int, work: Path, tools: Tools, progress: Progress | None) -> Checked:
    """Every item of the source is kept (its image spooled in `work`) or rejected with its reason, in the source's order.

    With a `limit` no more rows of a split that the source names are looked at.
    """
    found = Checked()
    if limit:  # who wants a few rows shall not wait for all of them to be read: checked as they come
        spool = Spool(work)
        for item in source:
            if isinstance(item, SourceRow) and item.split and found.named[item.split] >= limit:
                found.read += 1
                found.beyond_limit += 1
                continue
            checked = check_image(item.image) if isinstance(item, SourceRow) else None
            place = spool.put(checked.data) if isinstance(checked, CheckedImage) else []
            facts = None if checked is None else facts_of(checked)[0]
            _take(found, item, place, facts)
        spool.close()
        return found
    items = _spooled(source, work, progress)
    places = [place for item, place in items if isinstance(item, SourceRow)]
    units = [
        {"number": f"{n:05d}", "rows": len(part), "places": part} for n, part in enumerate(parts(places, UNIT_ROWS))
    ]
    results = run_units(CheckWork(work, check_image), units, tools.run, progress, "images checked")
    facts = (one for result in results for one in result["found"])
    for item, place in items:
        _take(found, item, place, next(facts) if isinstance(item, SourceRow) else None)
    return found


def _spooled(source: Source, work: Path, progress: Progress | None) -> list[tuple[SourceRow | Rejected, list[Any]]]:
    """The source's items without their images, and where in the spool those lie; read once, and kept for a restart."""
    kept = work / "items.jsonl"
    if not kept.is_file():
        spool, lines = Spool(work), []
        rate = Rate(progress, 0, len(source), "rows read")
        for item in source:
            place = spool.put(item.image) if isinstance(item, SourceRow) else []
            # The bytes are in the spool: held here too, a large set would not fit into memory.
            fields = {f.name: getattr(item, f.name) for f in dataclasses.fields(item) if f.name != "image"}
            lines.append({"kind": type(item).__name__, "place": place, "item": fields})
            if len(lines) % _REPORT_ROWS == 0:
                rate.add(_REPORT_ROWS)
        spool.close()
        write_jsonl(kept, lines)
    return [
        (SourceRow(image=b"", **line["item"]) if line["kind"] == "SourceRow" else Rejected(**line["item"]),
         line["place"])
        for line in read_jsonl(kept)
    ]  # fmt: skip


def _take(found: Checked, item: SourceRow | Rejected, place: list[Any], facts: dict[str, Any] | None) -> None:
    """Keep or reject one item, given what the check of its image found."""
    found.read += 1
    if isinstance(item, SourceRow) and item.image_id in found.seen:
        error = f"image id '{item.image_id}' stands at {found.seen[item.image_id]} already"
        item = Rejected(item.image_id, item.where, "duplicate-id", error)
    if isinstance(item, Rejected):
        found.rejected.append(item)
        return
    captions, dropped = _clean_captions(item, found)
    found.rejected.extend(dropped)
    if not captions:
        error = f"all of its {len(item.captions)} captions are empty"
        found.rejected.append(Rejected(item.image_id, item.where, "no-captions", error))
        return
    if "reason" in facts:
        error = _ADDRESS.sub(" the file", facts["error"])
        error = f"{item.path}: {error}" if item.path else error
        found.rejected.append(Rejected(item.image_id, item.where, facts["reason"], error))
        return
    if facts["changed"]:
        found.images_changed[facts["changed"]] += 1
    found.seen[item.image_id] = item.where
    found.named[item.split] += 1
    light = dataclasses.replace(item, image=b"", captions=[])
    place = facts.get("place") or place
    look = Look(facts["look"]["phash"], bytes.fromhex(facts["look"]["thumbnail"]))
    found.rows.append(Row(light, captions, place, facts["width"], facts["height"], facts["sha256"], look))


def _clean_captions(item: SourceRow, found: Checked) -> tuple[list[str], list[Rejected]]:
    captions, dropped = [], []
    for number, text in enumerate(item.captions):
        caption, changed = clean_caption_counted(text, item.lang)
        found.captions_read += 1
        found.captions_changed.update(changed)
        if caption:
            captions.append(caption)
        else:
            error = f"caption {number} is {text!r}: nothing is left of it"
            dropped.append(Rejected(item.image_id, item.where, "caption-empty", error, what="caption"))
    return captions, dropped
