"""Which split a row goes to when its source names none, and which rows a bootstrap must draw together."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

from raycap.data.sources.base import SPLITS
from raycap.data.text_rules import caption_key
from raycap.errors import DataError


def are_counts(splits: Sequence[float]) -> bool:
    """Whether `data.splits` holds numbers of rows (560, 70, 70), not shares that sum to 1."""
    return max(splits) > 1


def draw_splits(groups: Sequence[str], shares: Sequence[float], seed: int) -> dict[str, str]:
    """A split for each group, so that the rows (one entry of `groups` each) come near `shares` of train, val, test.

    Groups are taken in the order of a seeded hash of their name: neither the rows' order nor Python's hash plays a
    part. Each goes to val or test, whichever lacks more rows and has room for all of it, else to train. A split that
    got none, though its share is not 0, takes train's smallest group, as long as train keeps one.

    Where `shares` are counts, test takes the first groups that fit, then val, then train; the rest gets "".

    Raises:
        DataError: fewer rows than the counts ask for.
    """
    sizes = Counter(groups)
    order = sorted(sizes, key=lambda g: hashlib.sha256(f"{seed}\0{g}".encode()).digest())
    if are_counts(shares):
        return _draw_counts(order, sizes, [int(n) for n in shares], len(groups))
    wanted = {split: shares[SPLITS.index(split)] for split in ("test", "val")}
    room = {split: max(round(share * len(groups)), 1) for split, share in wanted.items() if share > 0}
    drawn: dict[str, str] = {}
    for group in order:
        split = max(room, key=lambda s: room[s], default="train")
        if split != "train" and sizes[group] <= room[split]:
            room[split] -= sizes[group]
            drawn[group] = split
        else:
            drawn[group] = "train"
    for split in room:
        rest = [group for group in order if drawn[group] == "train"]
        if split not in drawn.values() and len(rest) > 1:
            drawn[min(rest, key=lambda g: sizes[g])] = split
    return drawn


def _draw_counts(order: Sequence[str], sizes: Mapping[str, int], counts: Sequence[int], rows: int) -> dict[str, str]:
    if sum(counts) > rows:
        raise DataError(
            f"data.splits={list(counts)} asks for {sum(counts)} rows, and {rows} rows name no split: ask for fewer, or give "
            "shares that sum to 1"
        )
    room = dict(zip(SPLITS, counts))
    drawn = {}
    for group in order:
        drawn[group] = next((s for s in ("test", "val", "train") if sizes[group] <= room[s]), "")
        if drawn[group]:
            room[drawn[group]] -= sizes[group]
    return drawn


def assign_splits(rows: Sequence[tuple[str, str, str]], shares: Sequence[float], seed: int) -> list[str]:
    """The split of each row given as (image_id, group, split): the source's own where it names one.

    A row without one follows its group, if another row of the group has a split, else the seed draws for the group.
    "" is a row beyond the counts of `shares`.
    """
    own = {group: split for _, group, split in reversed(rows) if group and split}
    free = [group or f"\0{image_id}" for image_id, group, split in rows if not split and group not in own]
    drawn = draw_splits(free, shares, seed) if free else {}
    return [split or own.get(group) or drawn[group or f"\0{image_id}"] for image_id, group, split in rows]


def fill_missing(groups: Sequence[tuple[str, str]], splits: Sequence[str], shares: Sequence[float],
                 seed: int) -> list[str]:  # fmt: skip
    """`splits` with a test where there was none, drawn from val (or train, where there is no val), and a val from train.

    Rows are given as (image_id, group) and move by whole groups; how many is told by the ratio of the two in `shares`.
    """
    found = list(splits)
    for missing, giver in (("val", "train"), ("test", "val")):
        share, rest = shares[SPLITS.index(missing)], shares[SPLITS.index(giver)]
        if missing == "val" and "test" not in splits:
            share += shares[SPLITS.index("test")]  # val hands a part of what it gets on to test
        if missing in found or giver not in found or not share + rest:
            continue
        part = share / (share + rest)
        names = {i: groups[i][1] or f"\0{groups[i][0]}" for i, split in enumerate(found) if split == giver}
        drawn = draw_splits(list(names.values()), (1 - part, 0.0, part), seed)
        for i, name in names.items():
            found[i] = missing if drawn[name] == "test" else giver
    return found


def resampling_groups(rows: Sequence[tuple[str, str, Sequence[str]]], splits: Sequence[str]) -> list[str]:
    """The `group` of each row given as (image_id, source group, captions).

    Inside a split, rows of one source group belong together, and so do rows whose sets of captions say the same: a
    bootstrap that drew them one by one would count one observation several times. Splits are not touched: rows of
    different splits share a group only where the source itself says so. A row on its own is named after its image.
    """
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[tuple[str, ...], int] = {}
    for i, (_, group, captions) in enumerate(rows):
        same_captions = ("captions", splits[i], *sorted(caption_key(c) for c in captions))
        for key in ([("group", splits[i], group)] if group else []) + [same_captions]:
            a, b = root(first.setdefault(key, i)), root(i)
            parent[max(a, b)] = min(a, b)  # the earliest row names the group
    names: Mapping[int, str] = {i: rows[i][1] or rows[i][0] for i in range(len(rows)) if root(i) == i}
    return [names[root(i)] for i in range(len(rows))]
