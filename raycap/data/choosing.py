"""The middle part of `prepare`: copies and leaks, splits, the limit: which of the checked rows stay, and where."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from raycap.config import Config
from raycap.data.checking import Checked, Row
from raycap.data.duplicates import Picture, find_duplicates, merged_groups, rows_to_drop
from raycap.data.leaks import find_leaks, leak_counts, leak_error, leak_line
from raycap.data.sources import SPLITS, Rejected, Source
from raycap.data.splits import are_counts, assign_splits, fill_missing, resampling_groups
from raycap.errors import ConfigError, DataError
from raycap.files import write_jsonl

LEAKS = "leaks.jsonl"


def _pictures(rows: list[Row]) -> list[Picture]:
    return [Picture(r.source.image_id, r.source.where, r.sha256, r.look, r.source.lang, r.source.split, r.source.group)
            for r in rows]  # fmt: skip


def drop_duplicates(config: Config, checked: Checked) -> None:
    """Leave copies out as `data.duplicates` says; rows of one picture that stay are put into one group."""
    pictures = _pictures(checked.rows)
    found = find_duplicates(pictures)
    checked.duplicates = found.counts()
    for row, group in zip(checked.rows, merged_groups(pictures, found), strict=True):
        row.source = replace(row.source, group=group)
    gone = {}
    for i, pair in rows_to_drop(pictures, found, config.data.duplicates).items():
        kept, copy = checked.rows[pair.a], checked.rows[i]
        # What was said of the copy was said of the picture.
        new = [c for c in copy.captions if c not in kept.captions]
        kept.captions.extend(new)
        same = "the same pixels" if pair.kind == "exact" else f"nearly the same picture ({pair.bits} bits apart)"
        error = f"{same} as '{kept.source.image_id}' at {kept.source.where}, which got {len(new)} of its captions"
        gone[i] = Rejected(copy.source.image_id, copy.source.where, f"image-duplicate-{pair.kind}", error)
    checked.drop(gone)


def choose_splits(config: Config, source: Source, checked: Checked) -> list[str]:
    """The split of every row.

    Raises:
        DataError: nothing is left, or a split has no rows.
    """
    if not checked.rows:
        reasons = Counter(r.reason for r in checked.rejected if r.what == "row")
        first = next((f"; the first: {r.where}: {r.error}" for r in checked.rejected), "")
        counted = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common()) or "it has no rows"
        raise DataError(f"nothing is left of {source.title}: {checked.read} rows read ({counted}){first}")
    shares, seed = config.data.splits, config.run.seed
    named = {r.source.split for r in checked.rows}
    if are_counts(shares) and "" not in named:
        raise ConfigError(f"data.splits={list(shares)} has no effect on {source.title}: every row names its split")
    splits = assign_splits([(r.source.image_id, r.source.group, r.source.split) for r in checked.rows], shares, seed)
    if config.data.missing_splits == "draw":
        if set(SPLITS) <= named:
            raise ConfigError(f"data.missing_splits=draw has no effect on {source.title}: no split is missing")
        splits = fill_missing([(r.source.image_id, r.source.group) for r in checked.rows], splits, shares, seed)
    counts = Counter(splits)
    for split in SPLITS:
        if not counts[split]:
            have = ", ".join(f"{s} {counts[s]}" for s in SPLITS)
            drawn = sum(not r.source.split for r in checked.rows)
            if drawn:
                shares = list(config.data.splits)
                remedy = f"{drawn} rows were drawn by data.splits={shares}, whole groups at a time: give more rows"
            else:
                remedy = (
                    f"every row names its split: name '{split}' too, or none, to have them drawn by data.splits; "
                    "data.missing_splits=draw takes it from another split"
                )
            raise DataError(f"split '{split}' of {source.title} has no rows ({have}); {remedy}")
    return splits


def settle_leaks(config: Config, source: Source, checked: Checked, splits: list[str], out: Path) -> list[str]:
    """Find pictures that stand in two splits; the splits of the rows that stay.

    Raises:
        DataError: there are some, and `data.leaks` is fail; or without them a split would have no rows.
    """
    pictures = _pictures(checked.rows)
    leaks = find_leaks(pictures, find_duplicates(pictures), splits)
    if not leaks:
        return splits
    checked.leaks = leak_counts(leaks)
    write_jsonl(out / LEAKS, [leak_line(leak, pictures) for leak in leaks])
    if config.data.leaks == "fail":
        raise leak_error(leaks, pictures, source.title, str(out / LEAKS))
    if config.data.leaks == "allow":
        return splits
    gone = {}
    for leak in leaks:
        row, other = pictures[leak.row], pictures[leak.other]
        error = f"{leak.kind} leak {leak.splits}: the picture of '{other.image_id}' at {other.where}"
        gone[leak.row] = Rejected(row.image_id, row.where, "image-leak", error)
    left = [split for i, split in enumerate(splits) if i not in gone]
    for split in set(splits) - set(left):
        raise DataError(f"data.leaks=drop leaves no row in split '{split}' of {source.title}; see {out / LEAKS}")
    checked.drop(gone)
    return left


def limited(checked: Checked, splits: list[str], limit: int) -> list[int]:
    """Indices of the rows to write: the first `limit` of each split (0: all), and none beyond data.splits' counts."""
    taken: Counter[str] = Counter()
    kept = []
    for i, split in enumerate(splits):
        if not split or (limit and taken[split] >= limit):
            checked.beyond_limit += 1
        else:
            taken[split] += 1
            kept.append(i)
    return kept


def groups_of(rows: list[Row], splits: list[str]) -> list[str]:
    return resampling_groups([(r.source.image_id, r.source.group, r.captions) for r in rows], splits)
