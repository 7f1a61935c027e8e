"""What every source of images hands on, and the parts that the table-like sources share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

SPLITS = ("train", "val", "test")

_SPLIT_NAMES = {
    "train": ("train", "training", "restval"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One image with its captions, as the source states them: not yet checked, not yet cleaned."""

    image_id: str
    """Unique in the source."""
    image: bytes
    """The encoded file (PNG, JPEG, ...), not pixels."""
    captions: list[str]
    split: str = ""
    """train, val or test; empty when the source names none, and then the seed draws one."""
    group: str = ""
    """Rows of one group (a scene, a study) are never torn apart; empty: the row stands alone."""
    lang: str = "en"
    source: str = ""
    """Name of the set, for the shards' `source` column."""
    path: str = ""
    """Where the image lay, relative to the set's folder."""
    where: str = ""
    """file:line, for messages."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row (or one caption of it) that is left out, and why."""

    image_id: str
    where: str
    """file:line, or the file."""
    reason: str
    """The class of the fault, as counted in the manifest, such as `image-missing`."""
    error: str = ""
    """The fault itself, in words."""
    what: str = "row"
    """`row`, or `caption` where the row itself is kept."""


class Source(Protocol):
    """One set of images, opened; iterating reads it from the start, in the same order each time."""

    title: str
    licence: str

    def __iter__(self) -> Iterator[SourceRow | Rejected]: ...

    def __len__(self) -> int:
        """Items that iterating yields, for progress."""

    def fingerprint(self) -> str:
        """A hash that changes when the content does, without reading every image."""


def canonical_split(name: object) -> str | None:
    """`train`, `val` or `test` for the usual spellings, "" for a missing one, None for any other."""
    if name is None:
        return ""
    text = str(name).strip().lower()
    if not text:
        return ""
    return next((split for split, names in _SPLIT_NAMES.items() if text in names), None)


def split_folder_names() -> tuple[str, ...]:
    """Spellings of the three splits, as folders are named after them."""
    return tuple(name for names in _SPLIT_NAMES.values() for name in names)
