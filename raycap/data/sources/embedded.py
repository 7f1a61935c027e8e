"""Rows of a table with a column of images: parquet files and `datasets` share this."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from raycap.data.sources.base import Rejected, SourceRow
from raycap.data.sources.columns import CAPTION_KEYS, IMAGE_KEYS, OURS, Told, renamed, short, told
from raycap.data.sources.table import outside_error


def wanted_columns(have: Iterable[str], columns: Mapping[str, Any]) -> list[str]:
    """Those of a table's columns that are read: others may be large."""
    theirs = {n for value in columns.values() for n in (value if isinstance(value, list) else [value])}
    usual = {*IMAGE_KEYS, *CAPTION_KEYS, *OURS, "id"}
    return [name for name in have if name in theirs or name in usual]


def embedded_row(fields: Mapping[str, Any], where: str, *, columns: Mapping[str, Any], row_id: str, split: str, lang: str,
                 title: str, roots: list[Path]) -> SourceRow | Rejected:  # fmt: skip
    """The row that `fields` make; its image is bytes, {"bytes", "path"} (the `datasets.Image` layout), or a path below
    one of `roots`. `row_id` names it where no image_id does; `split` and `lang` are for rows that state none."""
    fields = renamed(fields, columns)
    image_id = next((str(fields[key]) for key in ("image_id", "id") if fields.get(key) not in (None, "")), row_id)
    said = told(fields, where, image_id)
    if not isinstance(said, Told):
        return said
    image = next((fields[key] for key in IMAGE_KEYS if fields.get(key) is not None), None)
    data, path = _parts(image)
    if data is None and path:
        found = _read(path, roots)
        if isinstance(found, str):
            return Rejected(image_id, where, "image-missing", found)
        data = found
    if data is None:
        state = "missing" if image is None else f"{short(image)}, expected bytes, a path, or a struct of the two"
        return Rejected(image_id, where, "image-not-named", f"'image' is {state}")
    shown = PurePosixPath(path.replace("\\", "/")).name if path else ""
    return SourceRow(
        image_id=image_id,
        image=data,
        captions=said.captions,
        split=said.split or split,
        group=said.group,
        lang=said.lang or lang,
        source=title,
        path=shown,
        where=where,
    )


def first_captions(fields: Mapping[str, Any], columns: Mapping[str, Any]) -> list[str]:
    """The captions of a row, for judging its language; none where it has none."""
    said = told(renamed(fields, columns) | {"split": None}, "", "")
    return said.captions if isinstance(said, Told) else []


def _parts(image: Any) -> tuple[bytes | None, str]:
    if isinstance(image, (bytes, bytearray, memoryview)):
        return bytes(image), ""
    if isinstance(image, Mapping):
        data, path = image.get("bytes"), image.get("path")
        return (bytes(data) if data is not None else None), path if isinstance(path, str) else ""
    return None, image if isinstance(image, str) else ""


def _read(path: str, roots: list[Path]) -> bytes | str:
    """The bytes of a file below one of `roots`, or why there are none. A whole path is followed where it leads into one
    of them: `datasets` writes such paths, and a table from elsewhere must not have this machine's files read."""
    given = PurePath(path)
    if given.is_absolute() and ".." not in given.parts:
        path = next(
            (given.relative_to(root.absolute()).as_posix() for root in roots if given.is_relative_to(root.absolute())),
            path,
        )
    if (outside := outside_error(path)) is not None:
        return f"{outside}, or name the folder it lies in as data.images" if given.is_absolute() else outside
    for root in roots:
        try:
            return (root / path).read_bytes()
        except (OSError, ValueError):
            continue
    return f"no file {path}" + (f" in {', '.join(r.name for r in roots)}" if roots else "")
