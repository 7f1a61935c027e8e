"""`prepare`: from a source to a folder of parquet shards. Reading them back is `parquet.py`'s, offered here too.

Two passes. The first reads, cleans and decodes each row once and spools the images to disk; only then are all groups
known, and splits can be drawn. The second writes the shards. The same input gives the same bytes: nothing depends on
time, place or the order of a dict; pyarrow's version, on which the bytes of a parquet file depend, is recorded.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from raycap.config import Config, DataSettings
from raycap.data import duplicates, images
from raycap.data.duplicates import Picture, find_duplicates, merged_groups, rows_to_drop
from raycap.data.images import BadImage, Look, check_image
from raycap.data.leaks import find_leaks, leak_counts, leak_error, leak_line
from raycap.data.lock import FileLock
from raycap.data.parquet import (
    MANIFEST,
    REJECTED,
    ROW_GROUP_ROWS,
    SCHEMA_VERSION,
    Shards,
    is_shards_folder,
    open_shards,
    schema,
)
from raycap.data.sources import SPLITS, Rejected, Source, SourceRow, detect, open_source
from raycap.data.splits import are_counts, assign_splits, fill_missing, resampling_groups
from raycap.data.text_rules import RULES, clean_caption_counted
from raycap.errors import ConfigError, DataError, RunError
from raycap.files import sha256_file, sha256_json, write_json, write_jsonl
from raycap.storage import is_url, without_secret

__all__ = ["Manifest", "Progress", "Shards", "is_shards_folder", "open_shards", "prepare", "prepare_if_needed"]

Manifest = dict[str, Any]
Progress = Callable[[int, int | None, str], None]
"""Called as progress(done, total, message)."""

_LOCK = ".lock"
_SPOOL = ".spool"
_LEAKS = "leaks.jsonl"
_REPORT_ROWS = 50


@dataclass(slots=True)
class _Row:
    """A row that passed the checks; its image lies in the spool at [start, start + size)."""

    source: SourceRow
    captions: list[str]
    start: int
    size: int
    width: int
    height: int
    sha256: str
    look: Look


@dataclass(slots=True)
class _Checked:
    """What the first pass found."""

    rows: list[_Row] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    read: int = 0
    beyond_limit: int = 0
    images_changed: Counter[str] = field(default_factory=Counter)
    captions_read: int = 0
    captions_changed: Counter[str] = field(default_factory=Counter)
    """Captions by the rule that changed them."""
    duplicates: dict[str, int] = field(default_factory=dict)
    leaks: dict[str, dict[str, int]] = field(default_factory=dict)

    def drop(self, gone: Mapping[int, Rejected]) -> None:
        """Take rows out, each with its reason."""
        self.rejected.extend(gone.values())
        self.rows = [row for i, row in enumerate(self.rows) if i not in gone]


def prepare(config: Config, out: Path | str, progress: Progress | None = None) -> Manifest:
    """Write `config.data.source` as shards into `out`, and return the manifest, which is written last.

    An unfinished folder is done anew; so is a finished one, once the source could be opened.

    Raises:
        DataError: the source cannot be read, nothing of it is left, or a split would have no rows.
        RunError: `out` cannot be written, or holds files that are not shards.
    """
    out = Path(out)
    if is_url(config.data.source) or is_shards_folder(Path(config.data.source).expanduser()):
        raise DataError(f"data.source={without_secret(config.data.source)} is prepared already; use it as it is")
    source = open_source(config.data, config.run.seed)
    _check_empty(out)
    with FileLock(out / _LOCK):
        return _prepare(config, source, out, progress)


def prepare_if_needed(config: Config, progress: Progress | None = None) -> Path | str:
    """The shards of `config.data.source`: itself when it is a shards folder (a path, or a url of one that `prepare`
    wrote), else prepared once under the cache.

    The cache's folder is named by settings and content, so that a changed source is prepared again.
    """
    if is_url(config.data.source):
        _check_limit(config, found := open_shards(config.data.source))
        return found.folder
    given = Path(config.data.source).expanduser()
    if is_shards_folder(given) or (given / REJECTED).is_file():  # rejected.jsonl alone: `prepare` did not finish
        _check_limit(config, open_shards(given))
        return given
    name = detect(config.data.source)
    source = open_source(config.data, config.run.seed)
    key = sha256_json({"settings": _settings(config), "cleaning": _cleaning(), "source": name,
                       "content": source.fingerprint()})[:16]  # fmt: skip
    folder = config.cache_dir / "data" / f"{name}-{key}"
    if not _opens(folder):
        with FileLock(folder / _LOCK):
            if not _opens(folder):  # nobody finished it while we waited
                _prepare(config, source, folder, progress)
    open_shards(folder)
    return folder


def _opens(folder: Path) -> bool:
    """Whether a folder of the cache is finished and whole; one that a power loss cut short is prepared again."""
    try:
        open_shards(folder)
    except DataError:
        return False
    return True


def _prepare(config: Config, source: Source, out: Path, progress: Progress | None) -> Manifest:
    with _writing(out):
        for leftover in (
            out / MANIFEST,
            out / REJECTED,
            out / _LEAKS,
            out / _SPOOL,
            *out.glob("*.parquet"),
            *out.glob(".*.parquet"),
        ):
            leftover.unlink(missing_ok=True)
        with open(out / _SPOOL, "w+b") as spool:
            checked = _check_rows(source, config, spool, progress)
            write_jsonl(out / REJECTED, [_rejected_line(r) for r in checked.rejected])
            _drop_duplicates(config, checked)
            splits = _splits(config, source, checked)
            splits = _settle_leaks(config, source, checked, splits, out)
            write_jsonl(out / REJECTED, [_rejected_line(r) for r in checked.rejected])
            kept = _limited(checked, splits, config.data.limit)
            groups = _groups([checked.rows[i] for i in kept], [splits[i] for i in kept])
            files, content = [], hashlib.sha256()
            for split in SPLITS:
                chosen = [(checked.rows[i], g) for i, g in zip(kept, groups) if splits[i] == split]
                files += _write_split(out, split, chosen, spool, config.data.rows_per_shard, content)
        (out / _SPOOL).unlink()
        manifest = _manifest(config, source, checked, files, [splits[i] for i in kept], groups, content.hexdigest())
        manifest["languages"] = _languages([(splits[i], checked.rows[i].source.lang) for i in kept])
        write_json(out / MANIFEST, manifest)
    if progress:
        progress(checked.read, checked.read, _summary(manifest))
    return manifest


def _check_rows(source: Source, config: Config, spool: Any, progress: Progress | None) -> _Checked:
    """First pass: every item of the source is kept (image spooled) or rejected with its reason."""
    found = _Checked()
    total = len(source)
    seen: dict[str, str] = {}
    named: Counter[str] = Counter()
    for item in source:
        found.read += 1
        if progress and found.read % _REPORT_ROWS == 0:
            progress(found.read, total, f"{len(found.rows)} rows kept, {len(found.rejected)} rejected")
        if isinstance(item, SourceRow) and item.image_id in seen:
            error = f"image id '{item.image_id}' stands at {seen[item.image_id]} already"
            item = Rejected(item.image_id, item.where, "duplicate-id", error)
        if isinstance(item, Rejected):
            found.rejected.append(item)
            continue
        if config.data.limit and item.split and named[item.split] >= config.data.limit:
            found.beyond_limit += 1
            continue
        captions, dropped = _clean_captions(item, found)
        found.rejected.extend(dropped)
        if not captions:
            error = f"all of its {len(item.captions)} captions are empty"
            found.rejected.append(Rejected(item.image_id, item.where, "no-captions", error))
            continue
        image = check_image(item.image)
        if isinstance(image, BadImage):
            error = f"{item.path}: {image.error}" if item.path else image.error
            found.rejected.append(Rejected(item.image_id, item.where, image.reason, error))
            continue
        if image.changed:
            found.images_changed[image.changed] += 1
        seen[item.image_id] = item.where
        named[item.split] += 1
        start = spool.tell()
        spool.write(image.data)
        # The bytes are in the spool: held here too, a large set would not fit into memory.
        light = SourceRow(item.image_id, b"", [], item.split, item.group, item.lang, item.source, item.path, item.where)
        size = len(image.data)
        found.rows.append(_Row(light, captions, start, size, image.width, image.height, image.sha256, image.look))
    return found


def _clean_captions(item: SourceRow, found: _Checked) -> tuple[list[str], list[Rejected]]:
    captions, dropped = [], []
    for number, text in enumerate(item.captions):
        caption, changed = clean_caption_counted(text, item.lang)
        found.captions_read += 1
        found.captions_changed.update(changed)
        if caption:
            captions.append(caption)
        else:
            error = f"caption {number} is {text!r}: nothing is left of it"
            dropped.append(Rejected(item.image_id, item.where, "caption-empty", error, what="caption"))
    return captions, dropped


def _pictures(rows: list[_Row]) -> list[Picture]:
    return [Picture(r.source.image_id, r.source.where, r.sha256, r.look, r.source.lang, r.source.split, r.source.group)
            for r in rows]  # fmt: skip


def _drop_duplicates(config: Config, checked: _Checked) -> None:
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


def _settle_leaks(config: Config, source: Source, checked: _Checked, splits: list[str], out: Path) -> list[str]:
    """Find pictures that stand in two splits; the splits of the rows that stay.

    Raises:
        DataError: there are some, and `data.leaks` is fail; or without them a split would have no rows.
    """
    pictures = _pictures(checked.rows)
    leaks = find_leaks(pictures, find_duplicates(pictures), splits)
    if not leaks:
        return splits
    checked.leaks = leak_counts(leaks)
    write_jsonl(out / _LEAKS, [leak_line(leak, pictures) for leak in leaks])
    if config.data.leaks == "fail":
        raise leak_error(leaks, pictures, source.title, str(out / _LEAKS))
    if config.data.leaks == "allow":
        return splits
    gone = {}
    for leak in leaks:
        row, other = pictures[leak.row], pictures[leak.other]
        error = f"{leak.kind} leak {leak.splits}: the picture of '{other.image_id}' at {other.where}"
        gone[leak.row] = Rejected(row.image_id, row.where, "image-leak", error)
    left = [split for i, split in enumerate(splits) if i not in gone]
    for split in set(splits) - set(left):
        raise DataError(f"data.leaks=drop leaves no row in split '{split}' of {source.title}; see {out / _LEAKS}")
    checked.drop(gone)
    return left


def _splits(config: Config, source: Source, checked: _Checked) -> list[str]:
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
        if set(SPLITS) <= set(splits):
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


def _limited(checked: _Checked, splits: list[str], limit: int) -> list[int]:
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


def _groups(rows: list[_Row], splits: list[str]) -> list[str]:
    return resampling_groups([(r.source.image_id, r.source.group, r.captions) for r in rows], splits)


def _write_split(
    out: Path, split: str, rows: list[tuple[_Row, str]], spool: Any, rows_per_shard: int, content: Any
) -> list[dict[str, Any]]:
    """Write the split's shards, add its rows to the hash `content`; returns the manifest's entries."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = []
    for number, begin in enumerate(range(0, len(rows), rows_per_shard)):
        name = f"{split}-{number:05d}.parquet"
        with pq.ParquetWriter(out / f".{name}", schema()) as writer:
            shard = rows[begin : begin + rows_per_shard]
            for start in range(0, len(shard), ROW_GROUP_ROWS):
                records = []
                for row, group in shard[start : start + ROW_GROUP_ROWS]:
                    spool.seek(row.start)
                    record = _record(row, split, group, spool.read(row.size))
                    content.update(sha256_json({k: v for k, v in record.items() if k != "image"}).encode())
                    records.append(record)
                writer.write_table(pa.Table.from_pylist(records, schema=schema()), row_group_size=ROW_GROUP_ROWS)
        (out / f".{name}").rename(out / name)
        size = (out / name).stat().st_size
        files.append(
            {"name": name, "split": split, "rows": len(shard), "bytes": size, "sha256": sha256_file(out / name)}
        )
    return files


def _record(row: _Row, split: str, group: str, image: bytes) -> dict[str, Any]:
    return {
        "image_id": row.source.image_id,
        "image": {"bytes": image, "path": row.source.path or row.source.image_id},
        "captions": row.captions,
        "split": split,
        "group": group,
        "lang": row.source.lang,
        "source": row.source.source,
        "width": row.width,
        "height": row.height,
        "sha256": row.sha256,
    }


def _settings(config: Config) -> dict[str, Any]:
    """The settings that the shards depend on."""
    data = config.data
    chosen = {"splits": list(data.splits), "limit": data.limit, "rows_per_shard": data.rows_per_shard,
              "duplicates": data.duplicates, "leaks": data.leaks}  # fmt: skip
    if data.source == "shapes":
        chosen["shapes_images"] = list(data.shapes_images)
    reading = {"columns": dict(data.columns), "lang": data.lang, "report": data.report,
               "missing_splits": data.missing_splits}  # fmt: skip
    chosen |= {name: value for name, value in reading.items() if value != getattr(DataSettings(), name)}
    return {**chosen, "seed": config.run.seed, "row_group_rows": ROW_GROUP_ROWS, "schema_version": SCHEMA_VERSION}


def _cleaning() -> dict[str, Any]:
    """What cleaning hangs on: a change of it makes cached shards out of date."""
    return {
        "text": [rule.name for rule in RULES],
        "text_examples": sha256_json(ascii([rule.examples for rule in RULES]))[:16],
        "min_side_px": images.MIN_SIDE_PX,
        "max_image_px": images.MAX_IMAGE_PX,
        "max_aspect": images.MAX_ASPECT,
        "near": [duplicates.NEAR_BITS, duplicates.NEAR_SHIFT, duplicates.NEAR_MEAN, duplicates.NEAR_WORST],
    }


def _languages(rows: list[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """Split -> language -> rows, of rows given as (split, language)."""
    counts = Counter(rows)
    return {split: {lang: n for (s, lang), n in sorted(counts.items()) if s == split} for split in SPLITS}


def _manifest(
    config: Config,
    source: Source,
    checked: _Checked,
    files: list[dict[str, Any]],
    splits: list[str],
    groups: list[str],
    content: str,
) -> Manifest:
    import pyarrow as pa

    dropped = Counter(r.reason for r in checked.rejected if r.what == "row")
    captions = Counter(r.reason for r in checked.rejected if r.what == "caption")
    return {
        "schema_version": SCHEMA_VERSION,
        "source": {"kind": detect(config.data.source), "title": source.title, "licence": source.licence},
        "settings": _settings(config),
        "cleaning": _cleaning(),
        "rows": {
            "read": checked.read,
            "kept": len(splits),
            "rejected": sum(dropped.values()),
            "beyond_limit": checked.beyond_limit,
        },
        "counts": {split: splits.count(split) for split in SPLITS},
        "groups": {split: len({g for s, g in zip(splits, groups) if s == split}) for split in SPLITS},
        "rejected": dict(sorted(dropped.items())),
        "captions_dropped": dict(sorted(captions.items())),
        "captions_read": checked.captions_read,
        "captions_changed": dict(sorted(checked.captions_changed.items())),
        "duplicates": checked.duplicates,
        "leaks": checked.leaks,
        "images_changed": dict(sorted(checked.images_changed.items())),
        "files": files,
        "content_sha256": content,
        "pyarrow": pa.__version__,
    }


def _rejected_line(rejected: Rejected) -> dict[str, Any]:
    return {
        "what": rejected.what,
        "image_id": rejected.image_id,
        "where": rejected.where,
        "reason": rejected.reason,
        "error": rejected.error,
    }


def _summary(manifest: Manifest) -> str:
    counts = ", ".join(f"{split} {n}" for split, n in manifest["counts"].items())
    rows = manifest["rows"]
    return f"{rows['kept']} rows kept ({counts}), {rows['rejected']} rejected"


def _check_limit(config: Config, shards: Shards) -> None:
    limit = config.data.limit
    if limit and max(shards.counts.values()) > limit:
        raise ConfigError(
            f"data.limit={limit} has no effect on {without_secret(shards.folder)}, which is prepared already ({shards.counts}): "
            "set it when preparing, or give the source itself"
        )


def _check_empty(out: Path) -> None:
    """Refuse a folder with files that `prepare` did not write: it would remove parquet files there."""
    if out.exists() and not out.is_dir():
        raise RunError(f"cannot write {out}: it is a file. Choose a folder.")
    ours = (MANIFEST, REJECTED, _LEAKS)
    with _writing(out):
        files = sorted(out.iterdir()) if out.is_dir() else []
    for file in files:
        known = file.name in ours or file.name.startswith(".") or _is_shard_name(file.name)
        if not known:
            raise RunError(f"{out} holds {file.name}, which is no shard: choose an empty folder for the shards")


def _is_shard_name(name: str) -> bool:
    split, _, rest = name.partition("-")
    return split in SPLITS and rest.endswith(".parquet")


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write {out}: {error.strerror or error}. Choose a folder you may write to.") from error
