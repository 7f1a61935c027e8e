"""Which split a row goes to when its source names none, and which rows a bootstrap must draw together."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

from raycap.data.clean import caption_key
from raycap.data.sources.base import SPLITS


def draw_splits(groups: Sequence[str], shares: Sequence[float], seed: int) -> dict[str, str]:
    """A split for each group, so that the rows (one entry of `groups` each) come near `shares` of train, val, test.

    Groups are taken in the order of a seeded hash of their name: neither the rows' order nor Python's hash plays a
    part. Each goes to val or test, whichever lacks more rows and has room for all of it, else to train. A split that
    got none, though its share is not 0, takes train's smallest group, as long as train keeps one.
    """
    sizes = Counter(groups)
    order = sorted(sizes, key=lambda g: hashlib.sha256(f"{seed}\0{g}".encode()).digest())
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


def assign_splits(rows: Sequence[tuple[str, str, str]], shares: Sequence[float], seed: int) -> list[str]:
    """The split of each row given as (image_id, group, split): the source's own where it names one.

    A row without one follows its group, if another row of the group has a split, else the seed draws for the group.
    """
    own = {group: split for _, group, split in reversed(rows) if group and split}
    free = [group or f"\0{image_id}" for image_id, group, split in rows if not split and group not in own]
    drawn = draw_splits(free, shares, seed) if free else {}
    return [split or own.get(group) or drawn[group or f"\0{image_id}"] for image_id, group, split in rows]


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
