"""What a score depends on, in one line: two scores are set side by side only where their signatures agree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from raycap import __version__
from raycap.files import sha256_json

_ORDER = ("variant", "model", "clip", "tok", "cut", "df", "len", "beta", "refs", "lang", "n")


def signature(name: str, **parts: object) -> str:
    """`name|key:value|...|v:version`; the keys in one order, so that equal signatures are equal texts."""
    ordered = sorted(parts, key=_ORDER.index)
    return "|".join([name, *(f"{key}:{parts[key]}" for key in ordered), f"v:{__version__}"])


def reference_hash(references: Mapping[Any, Sequence[str]]) -> str:
    """Eight digits that change with any reference, and not with the order of the images."""
    return sha256_json({str(image): list(captions) for image, captions in references.items()})[:8]


def references_per_image(references: Iterable[Sequence[str]]) -> str:
    """How many references an image has: 5, or 4-6 where images differ."""
    counts = [len(captions) for captions in references]
    low, high = min(counts, default=0), max(counts, default=0)
    return str(low) if low == high else f"{low}-{high}"
