"""The names that a set gives to what raycap reads, and what fields under those names say of an image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from raycap.config import DataSettings
from raycap.data.sources.base import SPLITS, Rejected, canonical_split
from raycap.errors import ConfigError, DataError, did_you_mean

IMAGE_KEYS = ("image", "file_name")
CAPTION_KEYS = ("captions", "caption", "text")
OURS = ("image", "captions", "split", "image_id", "group", "lang")


@dataclass(frozen=True, slots=True)
class Told:
    """What a row says beside its image."""

    captions: list[str]
    split: str
    group: str
    lang: str
    """Empty where the row does not say."""


def checked_columns(settings: DataSettings) -> dict[str, str | list[str]]:
    """`data.columns`, checked.

    Raises:
        ConfigError: a key that raycap has no use for, or a value that names no column.
    """
    for ours, theirs in settings.columns.items():
        if ours not in OURS:
            raise ConfigError(f"data.columns: '{ours}' is nothing that raycap reads; {did_you_mean(str(ours), OURS)}")
        names = theirs if isinstance(theirs, list) and ours == "captions" else [theirs]
        if not names or not all(isinstance(name, str) and name for name in names):
            raise ConfigError(
                f"data.columns: {ours}={theirs!r}; name one column"
                + (", or a list of them" if ours == "captions" else "")
            )
    return dict(settings.columns)


def require_columns(place: str, have: Iterable[str], columns: Mapping[str, Any]) -> None:
    """Raise a DataError where a table has no column for images or captions, or not those of `data.columns`."""
    have = [str(name) for name in have]
    for ours, theirs in columns.items():
        for name in theirs if isinstance(theirs, list) else [theirs]:
            if name not in have:
                raise DataError(f"{place} has no column '{name}' (data.columns: {ours}); {did_you_mean(name, have)}")
    for ours, usual in (("image", IMAGE_KEYS), ("captions", CAPTION_KEYS)):
        if ours not in columns and not set(usual) & set(have):
            raise DataError(
                f"{place} has the columns {', '.join(have) or '(none)'}; a column {' or '.join(usual)} is needed. "
                f"Name it: data.columns={{{ours}: ...}}"
            )


def renamed(fields: Mapping[str, Any], columns: Mapping[str, Any]) -> dict[str, Any]:
    """The fields under raycap's names. A mapped name hides what else would have been read for it."""
    if not columns:
        return dict(fields)
    found = dict(fields)
    for ours, theirs in columns.items():
        usual = IMAGE_KEYS if ours == "image" else CAPTION_KEYS if ours == "captions" else (ours,)
        for name in usual:
            found.pop(name, None)
        if isinstance(theirs, list):
            found[ours] = [c for name in theirs for c in _several(fields.get(name))]
        elif fields.get(theirs) is not None:
            found[ours] = fields[theirs]
    return found


def told(fields: Mapping[str, Any], where: str, image_id: str) -> Told | Rejected:
    """Captions, split, group and language that `fields` (under raycap's names) state, or why they cannot be used."""
    captions = next((fields[key] for key in CAPTION_KEYS if fields.get(key) is not None), None)
    if isinstance(captions, str):
        captions = [captions]
    if captions is None or captions == []:
        return Rejected(image_id, where, "no-captions", f"'captions' is {'missing' if captions is None else 'empty'}")
    if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
        error = f"'captions' is {short(captions)}, expected a list of texts"
        return Rejected(image_id, where, "captions-not-text", error)
    split = canonical_split(fields.get("split"))
    if split is None:
        error = f"'split' is {short(fields['split'])}, expected {', '.join(SPLITS)}, or no such key to have one drawn"
        return Rejected(image_id, where, "split-unknown", error)
    return Told(list(captions), split, text(fields.get("group")), text(fields.get("lang")))


def text(value: Any) -> str:
    return "" if value is None else str(value)


def short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _several(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
