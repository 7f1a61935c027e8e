"""Sources that are a text table beside image files: lines become records, records of one image become one row.

Text is read as a whole (a caption set is small), images one at a time. A line that cannot be used is a Rejected with
file and line; it never stops the reading.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from raycap.data.sources.base import SPLITS, Rejected, SourceRow, canonical_split
from raycap.errors import DataError


@dataclass(slots=True)
class Record:
    """What one line says, before its image is looked for."""

    image: str
    captions: list[str]
    where: str
    image_id: str
    split: str = ""
    group: str = ""
    lang: str = "en"
    folder: str = ""
    """Subfolder that `image` is relative to, inside the set."""


class TableSource:
    """Base of the table-like sources: a subclass yields records, this finds the images and merges captions."""

    layout = ""

    def __init__(self, root: Path, lookup: tuple[str, ...] = ("",)):
        self.root = root
        self.title = root.resolve().name
        self._lookup = lookup

    def table_files(self) -> list[Path]:
        """The text files that hold the captions."""
        raise NotImplementedError

    def records(self) -> Iterator[Record | Rejected]:
        """The lines of the text files, in order."""
        raise NotImplementedError

    @cached_property
    def licence(self) -> str:
        return find_licence(self.root)

    @cached_property
    def _entries(self) -> list[Record | Rejected]:
        """Lines in order, those of one image joined into the first of them."""
        entries: list[Record | Rejected] = []
        by_id: dict[str, Record] = {}
        for entry in self._read():
            if isinstance(entry, Rejected):
                entries.append(entry)
                continue
            first = by_id.get(entry.image_id)
            if first is None:
                by_id[entry.image_id] = entry
                entries.append(entry)
            elif (conflict := _conflict(first, entry)) is not None:
                entries.append(Rejected(entry.image_id, entry.where, "image-conflict", conflict))
            else:
                first.captions.extend(entry.captions)
        return entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[SourceRow | Rejected]:
        for entry in self._entries:
            yield entry if isinstance(entry, Rejected) else self._row(entry)

    def fingerprint(self) -> str:
        """Hash of the tables' bytes and of each named image's size and time of change.

        Images are not read: hashing 45,000 of them would cost as much as preparing them.
        """
        digest = hashlib.sha256()
        for file in self.table_files():
            digest.update(f"{file.relative_to(self.root).as_posix()}\0".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        for entry in self._entries:
            if isinstance(entry, Record) and (found := self._find(entry)) is not None:
                stat = found.stat()
                digest.update(f"{entry.image_id}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def _read(self) -> Iterator[Record | Rejected]:
        try:
            yield from self.records()
        except OSError as error:
            raise DataError(f"cannot read {error.filename or self.root}: {error.strerror}") from error

    def _candidates(self, record: Record) -> list[str]:
        return [PurePosixPath(record.folder, place, record.image).as_posix() for place in self._lookup]

    def _find(self, record: Record) -> Path | None:
        for candidate in self._candidates(record):
            path = self.root / candidate
            try:
                if path.is_file():
                    return path
            except OSError:  # a name too long, or a folder that may not be read: not found, and said so
                continue
        return None

    def _row(self, record: Record) -> SourceRow | Rejected:
        path = self._find(record)
        if path is None:
            tried = " nor ".join(self._candidates(record))
            return Rejected(record.image_id, record.where, "image-missing", f"no file {tried} in {self.title}")
        try:
            image = path.read_bytes()
        except OSError as error:
            return Rejected(record.image_id, record.where, "image-unreadable", f"{record.image}: {error.strerror}")
        return SourceRow(
            image_id=record.image_id,
            image=image,
            captions=list(record.captions),
            split=record.split,
            group=record.group,
            lang=record.lang,
            source=self.title,
            path=path.relative_to(self.root).as_posix(),
            where=record.where,
        )


def parse_record(fields: Mapping[str, Any], where: str, *, image_keys: tuple[str, ...], folder: str = "",
                 default_split: str = "") -> Record | Rejected:  # fmt: skip
    """The record that a line's fields make, or why they make none.

    Captions stand in `captions` (a list, or one string), `caption` or `text`. `split`, `group`, `lang` and `image_id`
    (or `id`) are optional.
    """
    if _has_surrogates(fields):
        return Rejected("", where, "not-utf8", "the line is not UTF-8 text")
    image = next((fields[key] for key in image_keys if fields.get(key) is not None), None)
    image_id = next((str(fields[key]) for key in ("image_id", "id") if fields.get(key) not in (None, "")), "")
    if not isinstance(image, str) or not image.strip():
        found = "missing" if image is None else f"{_short(image)}, expected a path"
        return Rejected(
            image_id, where, "image-not-named", f"'{image_keys[0]}' is {found}; the line has {_names(fields)}"
        )
    image = image.strip().replace("\\", "/")
    image_id = image_id or PurePosixPath(folder, image).as_posix()
    parts = PurePosixPath(image)
    if parts.is_absolute() or ".." in parts.parts:
        error = f"{image} does not lie in the set's folder; give a path relative to it"
        return Rejected(image_id, where, "image-outside", error)
    captions = next((fields[key] for key in ("captions", "caption", "text") if fields.get(key) is not None), None)
    if isinstance(captions, str):
        captions = [captions]
    if captions is None or captions == []:
        return Rejected(image_id, where, "no-captions", f"'captions' is {'missing' if captions is None else 'empty'}")
    if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
        error = f"'captions' is {_short(captions)}, expected a list of texts"
        return Rejected(image_id, where, "captions-not-text", error)
    split = canonical_split(fields.get("split"))
    if split is None:
        error = f"'split' is {_short(fields['split'])}, expected {', '.join(SPLITS)}, or no such key to have one drawn"
        return Rejected(image_id, where, "split-unknown", error)
    return Record(
        image=image,
        captions=captions,
        where=where,
        image_id=image_id,
        split=split or default_split,
        group=_text(fields.get("group")),
        lang=_text(fields.get("lang")) or "en",
        folder=folder,
    )


def find_licence(folder: Path) -> str:
    """What the set's own files state: its card's `license`, the first line of its licence file, or `not stated`."""
    card = folder / "README.md"
    if card.is_file():
        lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
        if lines and lines[0].strip() == "---":
            for line in lines[1:]:
                if line.strip() == "---":
                    break
                key, _, value = line.partition(":")
                if key.strip() in ("license", "licence") and value.strip():
                    return value.strip()
    for file in sorted(
        p for p in folder.iterdir() if p.stem.upper() in ("LICENSE", "LICENCE", "COPYING") and p.is_file()
    ):
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        if stated := next((line.strip() for line in lines if line.strip()), ""):
            return stated
    return "not stated"


def _conflict(first: Record, second: Record) -> str | None:
    for name in ("image", "folder", "split", "group", "lang"):
        a, b = getattr(first, name), getattr(second, name)
        if a != b:
            return f"'{name}' is {b!r} here and {a!r} on {first.where}, for the same image"
    return None


def _has_surrogates(value: Any) -> bool:
    if isinstance(value, str):
        return any("\ud800" <= c <= "\udfff" for c in value)
    if isinstance(value, Mapping):
        return any(_has_surrogates(v) for v in value.values())
    return isinstance(value, list) and any(_has_surrogates(v) for v in value)


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _names(fields: Mapping[str, Any]) -> str:
    return ", ".join(sorted(str(k) for k in fields)) or "no keys"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
