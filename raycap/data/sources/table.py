"""Sources that are text beside image files: lines become records, records of one image become one row.

Text is read as a whole (a caption set is small), images one at a time. A line that cannot be used is a Rejected with
file and line; it never stops the reading.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from raycap.config import DataSettings
from raycap.data.sources.base import Rejected, SourceRow, images_folder, language_of, source_root
from raycap.data.sources.columns import Told, short, told
from raycap.errors import DataError

_JUDGED_CAPTIONS = 1000
"""Captions of a file that its language is judged by."""
_CHUNK_BYTES = 1 << 20


@dataclass(slots=True)
class Record:
    """What one line says, before its image is looked for."""

    image: str
    captions: list[str]
    where: str
    image_id: str
    split: str = ""
    group: str = ""
    lang: str = ""
    """Empty: the language is judged from the captions of its file."""
    folder: str = ""
    """Subfolder that `image` is relative to, inside the set."""
    source: str = ""
    """A part of the set with a name of its own; empty takes the set's."""


class TableSource(ABC):
    """Base of the table-like sources: a subclass yields records, this finds the images and merges captions."""

    layout = ""
    uses: frozenset[str] = frozenset({"images", "lang"})
    places: tuple[str, ...] = ("",)
    """Folders that images may lie in, relative to the set's folder or to data.images."""

    def __init__(self, settings: DataSettings, seed: int):
        self.settings = settings
        self.path = Path(settings.source).expanduser()
        self.root = source_root(settings)
        self.title = self.path.resolve().stem if self.path.is_file() else self.path.resolve().name
        images = images_folder(settings)
        self._bases = [*([images] if images else []), self.root]

    @abstractmethod
    def table_files(self) -> list[Path]:
        """The text files that hold the captions."""

    @abstractmethod
    def records(self) -> Iterator[Record | Rejected]:
        """The lines of the text files, in order."""

    @cached_property
    def licence(self) -> str:
        return find_licence(self.root)

    @cached_property
    def _entries(self) -> list[Record | Rejected]:
        """Lines in order, those of one image joined into the first of them."""
        entries: list[Record | Rejected] = []
        by_id: dict[str, Record] = {}
        read = list(self._read())
        self._name_languages(read)
        for entry in read:
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

    def _name_languages(self, entries: list[Record | Rejected]) -> None:
        unnamed = [e for e in entries if isinstance(e, Record) and not e.lang]
        lang = self.settings.lang or language_of(c for e in islice(unnamed, _JUDGED_CAPTIONS) for c in e.captions)
        for entry in unnamed:
            entry.lang = lang

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
                stat = found[0].stat()
                digest.update(f"{entry.image_id}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def _read(self) -> Iterator[Record | Rejected]:
        try:
            yield from self.records()
        except OSError as error:
            raise DataError(f"cannot read {error.filename or self.root}: {error.strerror}") from error

    def _candidates(self, record: Record) -> list[str]:
        return [PurePosixPath(record.folder, place, record.image).as_posix() for place in self.places]

    def _find(self, record: Record) -> tuple[Path, str] | None:
        """(file, its path relative to the images' or the set's folder)."""
        for base in self._bases:
            for candidate in self._candidates(record):
                path = base / candidate
                try:
                    if path.is_file():
                        return path, candidate
                except OSError:  # a name too long, or a folder that may not be read: not found, and said so
                    continue
        return None

    def _row(self, record: Record) -> SourceRow | Rejected:
        found = self._find(record)
        if found is None:
            tried = " nor ".join(self._candidates(record))
            places = " nor in ".join(dict.fromkeys([self.title, *(str(b) for b in self._bases[:-1])]))
            return Rejected(record.image_id, record.where, "image-missing", f"no file {tried} in {places}")
        path, shown = found
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
            source=record.source or self.title,
            path=shown,
            where=record.where,
        )


def parse_record(fields: Mapping[str, Any], where: str, *, image_keys: tuple[str, ...], folder: str = "",
                 default_split: str = "") -> Record | Rejected:  # fmt: skip
    """The record that a line's fields (under raycap's names) make, or why they make none.

    Captions stand in `captions` (a list, or one string), `caption` or `text`. `split`, `group`, `lang` and `image_id`
    (or `id`) are optional.
    """
    if _has_surrogates(fields):
        return Rejected("", where, "not-utf8", "the line is not UTF-8 text")
    image = next((fields[key] for key in image_keys if fields.get(key) is not None), None)
    image_id = next((str(fields[key]) for key in ("image_id", "id") if fields.get(key) not in (None, "")), "")
    if not isinstance(image, str) or not image.strip():
        found = "missing" if image is None else f"{short(image)}, expected a path"
        error = f"'{image_keys[0]}' is {found}; the line has {_names(fields)}"
        return Rejected(image_id, where, "image-not-named", error)
    image = image.strip().replace("\\", "/")
    image_id = image_id or PurePosixPath(folder, image).as_posix()
    if (outside := outside_error(image)) is not None:
        return Rejected(image_id, where, "image-outside", outside)
    said = told(fields, where, image_id)
    if not isinstance(said, Told):
        return said
    return Record(
        image=image,
        captions=said.captions,
        where=where,
        image_id=image_id,
        split=said.split or default_split,
        group=said.group,
        lang=said.lang,
        folder=folder,
    )


def outside_error(image: str) -> str | None:
    """Why a path may not be followed, or None: it has to stay in the set's folder."""
    parts = PurePosixPath(image)
    if parts.is_absolute() or ".." in parts.parts:
        return f"{image} does not lie in the set's folder; give a path relative to it"
    return None


def read_json_object(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        DataError: it is not JSON (naming line and column), or holds something else.
    """
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{file} holds {type(found).__name__}, expected a JSON object")
    return found


def json_mentions(file: Path, keys: tuple[str, ...]) -> bool:
    """Whether all of `keys` stand, in quotes, in a JSON file; the file is scanned, not parsed, as it may be large."""
    wanted = {f'"{key}"'.encode() for key in keys}
    longest = max(map(len, wanted))
    tail = b""
    try:
        with open(file, "rb") as raw:
            while wanted and (chunk := raw.read(_CHUNK_BYTES)):
                block = tail + chunk
                wanted = {w for w in wanted if w not in block}
                tail = block[-longest:]
    except OSError:
        return False
    return not wanted


def json_files(path: Path, keys: tuple[str, ...], folders: tuple[str, ...] = ("",)) -> list[Path]:
    """JSON files at `path` (itself a file, or a folder with them in `folders`) that mention `keys`, by name."""
    if path.is_file():
        files = [path] if path.suffix == ".json" else []
    else:
        files = [f for folder in folders for f in sorted((path / folder).glob("*.json")) if f.is_file()]
    return [f for f in files if json_mentions(f, keys)]


def image_places(root: Path) -> tuple[str, ...]:
    """ "" and the folders directly in `root`, by name: where image files may lie."""
    if not root.is_dir():
        return ("",)
    with os.scandir(root) as entries:
        return ("", *sorted(e.name for e in entries if e.is_dir() and not e.name.startswith(".")))


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


def _names(fields: Mapping[str, Any]) -> str:
    return ", ".join(sorted(str(k) for k in fields)) or "no keys"
