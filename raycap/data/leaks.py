"""The same picture, or nearly, in two splits: what was learnt by heart would be counted as skill."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raycap.data.duplicates import Duplicates, Pair, Picture
from raycap.data.sources.base import SPLITS
from raycap.errors import DataError

_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Leak:
    """Row `row` lies in an earlier split than `other`, which shows the same picture; it is the one to drop."""

    row: int
    other: int
    kind: str
    """`exact`, `near`, or `chain`: nearly the same through other rows between them."""
    bits: int
    splits: str
    """Such as train-test."""


def find_leaks(pictures: Sequence[Picture], found: Duplicates, splits: Sequence[str]) -> list[Leak]:
    """For each row the leak into the latest split (test before val) of any picture that is the same, or nearly.

    Captions in another language are no excuse: the picture is the same.
    """
    members: dict[int, list[int]] = {}
    for i, first in enumerate(found.cluster):
        if not splits[i]:  # left over where `data.splits` counts rows
            continue
        members.setdefault(first, []).append(i)
    leaks = []
    for rows in members.values():
        if len({splits[i] for i in rows}) < 2:
            continue
        for i in rows:
            later = [j for j in rows if SPLITS.index(splits[j]) > SPLITS.index(splits[i])]
            if not later:
                continue
            pairs = {j: found.between(i, j) for j in later}
            j = max(later, key=lambda j: (pairs[j] is not None, _exact(pairs[j]), SPLITS.index(splits[j]), -j))
            pair = pairs[j]
            bits = (pictures[i].look.phash ^ pictures[j].look.phash).bit_count()
            leaks.append(Leak(i, j, pair.kind if pair else "chain", bits, f"{splits[i]}-{splits[j]}"))
    return sorted(leaks, key=lambda leak: leak.row)


def _exact(pair: Pair | None) -> bool:
    return pair is not None and pair.kind == "exact"


def leak_line(leak: Leak, pictures: Sequence[Picture]) -> dict[str, Any]:
    """A leak as a line of leaks.jsonl."""
    a, b = pictures[leak.row], pictures[leak.other]
    return {"kind": leak.kind, "splits": leak.splits, "bits": leak.bits, "image_id": a.image_id, "where": a.where,
            "other_image_id": b.image_id, "other_where": b.where}  # fmt: skip


def leak_counts(leaks: Sequence[Leak]) -> dict[str, dict[str, int]]:
    """Splits -> kind -> rows of the first of the two splits that leak."""
    counts = Counter((leak.splits, leak.kind) for leak in leaks)
    found: dict[str, dict[str, int]] = {}
    for (splits, kind), n in sorted(counts.items()):
        found.setdefault(splits, {})[kind] = n
    return found


def leak_error(leaks: Sequence[Leak], pictures: Sequence[Picture], title: str, listed: str) -> DataError:
    """The error that stops `prepare`: how many leak, the first of them, what to do."""
    shown = []
    for leak in leaks[:_SHOWN]:
        a, b = pictures[leak.row], pictures[leak.other]
        how = "is" if leak.kind == "exact" else "is nearly"
        first, second = leak.splits.split("-")
        shown.append(f"{first} {a.where} '{a.image_id}' {how} {second} {b.where} '{b.image_id}'")
    counts = ", ".join(f"{sum(kinds.values())} {splits}" for splits, kinds in leak_counts(leaks).items())
    return DataError(
        f"{len(leaks)} rows of {title} show the same picture as a row of a later split, or nearly ({counts}): "
        f"{'; '.join(shown)}. All of them: {listed}. data.leaks=drop leaves them out of the earlier split, "
        "data.leaks=allow keeps them."
    )
