"""The same picture twice: exactly (a hash of the pixels) and nearly (a perceptual hash, then a thumbnail).

N pictures. Near pairs are searched by multi-index hashing (Norouzi, Punjani, Fleet: "Fast search in Hamming space with
multi-index hashing", 2012): two hashes of 64 bits that differ in at most 6 have one of their four 16-bit pieces in
which they differ in at most 1, so only pictures that agree in such a piece are compared: not N^2 of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from raycap.data.images import THUMBNAIL_PX, Look

NEAR_BITS = 6
"""Bits of 63 in which the hashes of nearly the same picture differ at most."""
NEAR_SHIFT, NEAR_MEAN, NEAR_WORST = 24.0, 8.0, 48.0
"""Levels of 255 by which their thumbnails differ at most: in a colour's mean, and with that taken away on average and
at any place. In pictures of little contrast less: the bounds never exceed the standard deviation of the thumbnail, half
and four times of it, so that plain pictures of other colours are other pictures."""
NEAR_LEAST = 2.0
"""Levels that rounding may cost even there."""
_PIECES, _PIECE_BITS = 4, 16
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Picture:
    """What the search needs of a row."""

    image_id: str
    where: str
    sha256: str
    look: Look
    lang: str = "en"
    split: str = ""
    """As the source names it; empty: not drawn yet."""
    group: str = ""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two rows of the same picture, or nearly; a < b are indices of rows."""

    a: int
    b: int
    kind: str
    """`exact` or `near`."""
    bits: int
    """In which the hashes differ."""


@dataclass
class Duplicates:
    """What `find_duplicates` found."""

    pairs: list[Pair] = field(default_factory=list)
    """Of exact copies each with the first one; of near ones the pairs that chain them together."""
    cluster: list[int] = field(default_factory=list)
    """For each row the first row that it is the same as, nearly, through any number of steps."""
    exact: list[int] = field(default_factory=list)
    """For each row the first row of the same pixels."""

    def between(self, a: int, b: int) -> Pair | None:
        """The pair of rows a and b when they show the same picture, or nearly; None when at most a chain joins them."""
        x, y = sorted((self.exact[a], self.exact[b]))
        if x == y:
            return Pair(min(a, b), max(a, b), "exact", 0)
        bits = self._near.get((x, y))
        return None if bits is None else Pair(min(a, b), max(a, b), "near", bits)

    @cached_property
    def _near(self) -> dict[tuple[int, int], int]:
        return {(p.a, p.b): p.bits for p in self.pairs if p.kind == "near"}

    def counts(self) -> dict[str, int]:
        """Rows that copy an earlier one: `exact` by pixels, `near` besides."""
        exact = sum(first != i for i, first in enumerate(self.exact))
        return {"exact": exact, "near": sum(first != i for i, first in enumerate(self.cluster)) - exact}


def find_duplicates(pictures: Sequence[Picture]) -> Duplicates:
    """Pictures that are the same, or nearly; see `near_pairs` for what that means."""
    first: dict[str, int] = {}
    exact = [first.setdefault(p.sha256, i) for i, p in enumerate(pictures)]
    kept = sorted(first.values())
    looks = [pictures[i].look for i in kept]
    pairs = [Pair(j, i, "exact", 0) for i, j in enumerate(exact) if i != j]
    sets = Joined(len(pictures))
    for pair in pairs:
        sets.join(pair.a, pair.b)
    for a, b, bits in near_pairs(looks):
        pairs.append(Pair(kept[a], kept[b], "near", bits))
        sets.join(kept[a], kept[b])
    return Duplicates(sorted(pairs, key=lambda p: (p.a, p.b)), [sets.root(i) for i in range(len(pictures))], exact)


def near_pairs(looks: Sequence[Look]) -> list[tuple[int, int, int]]:
    """(a, b, bits) of pictures that are nearly the same, a < b, sorted.

    Their hashes differ in at most NEAR_BITS, and their thumbnails as little as said there. That finds a picture saved
    again, resized to a third, a little brighter or darker; not one that is cropped, turned, mirrored or made grey.
    """
    if len(looks) < 2:
        return []
    hashes = np.array([look.phash for look in looks], dtype=np.uint64)
    thumbnails = np.frombuffer(b"".join(look.thumbnail for look in looks), dtype=np.uint8)
    thumbnails = thumbnails.reshape(len(looks), THUMBNAIL_PX * THUMBNAIL_PX, 3)
    found = []
    for a, b in _candidates(hashes):
        alike = _alike(thumbnails, a, b)
        bits = np.bitwise_count(hashes[a] ^ hashes[b])
        found += [(int(i), int(j), int(n)) for i, j, n in zip(a[alike], b[alike], bits[alike])]
    return sorted(set(found))


def _candidates(hashes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of pairs a < b whose hashes differ in at most NEAR_BITS; a pair may come more than once."""
    values, owner = np.unique(hashes, return_inverse=True)
    members = np.argsort(owner, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(values)))])
    # Pictures of one hash: each against all later ones. Flat pictures aside, these are few.
    for group in np.nonzero(np.diff(starts) > 1)[0]:
        rows = np.sort(members[starts[group] : starts[group + 1]])
        for k in range(len(rows) - 1):
            yield np.full(len(rows) - 1 - k, rows[k]), rows[k + 1 :]
    for x, y in _value_pairs(values):
        a, b = _between(x, y, starts, members)
        yield np.minimum(a, b), np.maximum(a, b)


def _value_pairs(values: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of index pairs x < y of different hashes within NEAR_BITS."""
    flips = np.array([0, *(1 << bit for bit in range(_PIECE_BITS))], dtype=np.uint64)
    for piece in range(_PIECES):
        keys = (values >> np.uint64(piece * _PIECE_BITS)) & np.uint64((1 << _PIECE_BITS) - 1)
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        for flip in flips:
            low = np.searchsorted(ordered, keys ^ flip, "left")
            count = np.searchsorted(ordered, keys ^ flip, "right") - low
            ends = np.cumsum(count)
            at = 0
            while at < len(values):
                done = ends[at - 1] if at else 0
                stop = max(at + 1, int(np.searchsorted(ends, done + _BLOCK, "right")))
                n = count[at:stop]
                x = np.repeat(np.arange(at, stop), n)
                within = np.arange(len(x)) - np.repeat(ends[at:stop] - n - done, n)
                y = order[np.repeat(low[at:stop], n) + within]
                near = x < y
                x, y = x[near], y[near]
                near = np.bitwise_count(values[x] ^ values[y]) <= NEAR_BITS
                if near.any():
                    yield x[near], y[near]
                at = stop


def _between(x: np.ndarray, y: np.ndarray, starts: np.ndarray, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of a picture with hash x and one with hash y."""
    size_x, size_y = starts[x + 1] - starts[x], starts[y + 1] - starts[y]
    if (size_x * size_y).max(initial=1) == 1:
        return members[starts[x]], members[starts[y]]
    n = size_x * size_y
    within = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
    height = np.repeat(size_y, n)
    return members[np.repeat(starts[x], n) + within // height], members[np.repeat(starts[y], n) + within % height]


def _alike(thumbnails: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether the thumbnails of each pair differ little enough."""
    alike = np.empty(len(a), dtype=bool)
    used = np.unique(np.concatenate([a, b]))
    deviation = np.zeros(len(thumbnails))
    deviation[used] = [thumbnails[i].std(axis=0).mean() for i in used]
    for start in range(0, len(a), 4096):
        piece = slice(start, start + 4096)
        difference = thumbnails[a[piece]].astype(np.int16) - thumbnails[b[piece]]
        shift = difference.mean(axis=1, keepdims=True)
        rest = np.abs(difference - shift)
        contrast = np.minimum(deviation[a[piece]], deviation[b[piece]])
        alike[piece] = (
            (np.abs(shift).max(axis=(1, 2)) <= np.clip(contrast, NEAR_LEAST, NEAR_SHIFT))
            & (rest.mean(axis=(1, 2)) <= np.clip(contrast / 2, NEAR_LEAST, NEAR_MEAN))
            & (rest.max(axis=(1, 2)) <= np.clip(contrast * 4, NEAR_LEAST, NEAR_WORST))
        )
    return alike


class Joined:
    """Disjoint sets of 0 .. n-1, each named by its smallest member."""

    def __init__(self, n: int):
        self._parent = list(range(n))

    def root(self, i: int) -> int:
        while self._parent[i] != i:
            self._parent[i] = self._parent[self._parent[i]]
            i = self._parent[i]
        return i

    def join(self, i: int, j: int) -> None:
        a, b = self.root(i), self.root(j)
        self._parent[max(a, b)] = min(a, b)


def rows_to_drop(pictures: Sequence[Picture], found: Duplicates, mode: str) -> dict[int, Pair]:
    """Row -> the pair for which it is left out, under `data.duplicates` = keep, exact or near.

    A copy goes when an earlier row of the same language that stays is in the same split (or neither names one). Those of
    official val and test splits stay: scores on these splits are compared with published ones. Rows of one picture in
    two languages are no copies of each other.
    """
    if mode == "keep":
        return {}
    dropped: dict[int, Pair] = {}
    of: dict[int, list[int]] = {}
    for i, first in enumerate(found.cluster):
        for j in of.setdefault(first, []) if pictures[i].split in ("", "train") else ():
            pair = found.between(j, i)
            alike = pair and (pair.kind == "exact" or mode == "near")
            if alike and (pictures[j].lang, pictures[j].split) == (pictures[i].lang, pictures[i].split):
                dropped[i] = pair
                break
        else:
            of.setdefault(first, []).append(i)
    return dropped


def merged_groups(pictures: Sequence[Picture], found: Duplicates) -> list[str]:
    """The group of each row, with rows of the same picture, nearly, in one: so that splits are drawn for all of them.

    A group is named as the source names it (the first of several), else after the first row's image.
    """
    sets = Joined(len(pictures))
    sizes = Counter(found.cluster)
    first: dict[Any, int] = {}
    for i, picture in enumerate(pictures):
        sets.join(found.cluster[i], i)
        if picture.group:
            sets.join(first.setdefault(picture.group, i), i)
    names: dict[int, str] = {}
    for i, picture in enumerate(pictures):
        root = sets.root(i)
        if picture.group:
            names.setdefault(root, picture.group)
    for i in range(len(pictures)):
        if sizes[found.cluster[i]] > 1:
            names.setdefault(sets.root(i), pictures[sets.root(i)].image_id)
    return [names.get(sets.root(i), "") for i in range(len(pictures))]
