"""What a score depends on, in one line: two scores are set side by side only where their signatures agree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from raycap import __version__
from raycap.errors import DataError
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


def parse(text: str) -> dict[str, str]:
    """The parts of a signature by name; the metric is `metric`."""
    name, *parts = text.split("|")
    return {"metric": name, **dict(part.partition(":")[::2] for part in parts)}


def differences(one: str, other: str, *, ignore: Iterable[str] = ()) -> dict[str, tuple[str, str]]:
    """Part -> (its value in one, in the other), of all parts in which two signatures differ."""
    a, b = parse(one), parse(other)
    return {
        key: (a.get(key, ""), b.get(key, ""))
        for key in dict.fromkeys([*a, *b])
        if a.get(key) != b.get(key) and key not in set(ignore)
    }


def require_same(
    one: str, other: str, names: tuple[str, str] = ("one", "the other"), *, ignore: Iterable[str] = ()
) -> None:
    """Raise a DataError that names what differs, unless two scores were computed alike."""
    found = differences(one, other, ignore=ignore)
    if found:
        said = ", ".join(f"{key} {a or 'none'} against {b or 'none'}" for key, (a, b) in found.items())
        raise DataError(
            f"the scores of {names[0]} and {names[1]} cannot be set side by side: {said}. Score both with the same settings."
        )
