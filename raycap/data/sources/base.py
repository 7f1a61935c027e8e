"""What every source of images hands on, and the parts that the sources share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from raycap.config import DataSettings
from raycap.errors import ConfigError

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

    layout: str
    """What `detect` looks for, in words."""
    uses: frozenset[str]
    """Those of OPTIONAL that have an effect on this source."""
    title: str
    licence: str

    def __iter__(self) -> Iterator[SourceRow | Rejected]: ...

    def __len__(self) -> int:
        """Items that iterating yields, for progress."""

    def fingerprint(self) -> str:
        """A hash that changes when the content does, without reading every image."""


OPTIONAL = ("columns", "images", "lang", "report")
"""Settings of `data` that only some sources heed; a source names its own in `uses`."""


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


def split_in_name(stem: str) -> str:
    """The split that a file's name states (`train-00000-of-00001`, `captions_val2014`), or ""."""
    word = ""
    for letter in f"{stem.lower()} ":
        if letter.isalpha():
            word += letter
            continue
        if word and (split := canonical_split(word)):
            return split
        word = ""
    return ""


def is_kana(text: str) -> bool:
    """Whether hiragana or katakana stand in the text: it is Japanese then, which Chinese characters alone do not say."""
    return any("\u3041" <= c <= "\u30fa" or "\uff66" <= c <= "\uff9d" for c in text)


def language_of(captions: Iterable[str]) -> str:
    """`ja` where most captions hold kana, else `en`."""
    found = [is_kana(caption) for caption in captions]
    return "ja" if found and 2 * sum(found) > len(found) else "en"


def source_root(settings: DataSettings) -> Path:
    """The folder of the set: `data.source` itself, or where that file lies."""
    path = Path(settings.source).expanduser()
    return path.parent if path.is_file() else path


def images_folder(settings: DataSettings) -> Path | None:
    """`data.images`, checked.

    Raises:
        ConfigError: there is no such folder.
    """
    if not settings.images:
        return None
    folder = Path(settings.images).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"data.images={settings.images} is not a folder; give the folder that holds the image files")
    return folder
