"""`prepare`: from a source to a folder of parquet shards. Reading them back is `parquet.py`'s, offered here too.

The source is read once and spooled to disk; the images are decoded and checked; only then are all groups known, and
splits can be drawn; captions are scored by CLIP, where asked for; the shards are written. All but the reading is cut
into pieces (units.py) that may run on many cores and nodes, and that a restart does not do again. The same input gives
the same bytes: nothing depends on time, place or the order of a dict; pyarrow's version, on which the bytes of a
parquet file depend, is recorded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from raycap.config import Config, DataSettings
from raycap.data import duplicates, images
from raycap.data.duplicates import Picture, find_duplicates, merged_groups, rows_to_drop
from raycap.data.images import CheckedImage, Look, check_image
from raycap.data.leaks import find_leaks, leak_counts, leak_error, leak_line
from raycap.data.lock import FileLock
from raycap.data.order import SCORED
from raycap.data.parquet import (
    MANIFEST,
    REJECTED,
    ROW_GROUP_ROWS,
    SCHEMA_VERSION,
    Shards,
    is_shards_folder,
    open_shards,
)
from raycap.data.pixels import sizes_on_disk
from raycap.data.sources import SPLITS, Rejected, Source, SourceRow, detect, open_source
from raycap.data.splits import are_counts, assign_splits, fill_missing, resampling_groups
from raycap.data.text_rules import RULES, clean_caption_counted
from raycap.data.units import (
    UNIT_ROWS,
    CheckWork,
    Progress,
    Rate,
    ScoreWork,
    ShardWork,
    Spool,
    Tools,
    choose_best,
    facts_of,
    read_place,
    run_units,
)
from raycap.errors import ConfigError, DataError, RunError
from raycap.files import read_json, read_jsonl, sha256_json, write_json, write_jsonl
from raycap.storage import is_url, without_secret

__all__ = ["Manifest", "Progress", "Shards", "Tools", "is_shards_folder", "open_shards", "prepare", "prepare_if_needed"]

Manifest = dict[str, Any]

_LOCK = ".lock"
_WORK = ".work"
_LEAKS = "leaks.jsonl"
_REPORT_ROWS = 50
_ADDRESS = re.compile(r" <[\w.]+ object at 0x[0-9a-f]+>")
"""What PIL calls a file in memory: another one each time."""
_SIZE_SAMPLE = 32
"""Images from which the size on disk is told beforehand."""


@dataclass(slots=True)
class _Row:
    """A row that passed the checks; its image lies in the working folder at `place` (see units.read_place)."""

    source: SourceRow
    captions: list[str]
    place: list[Any]
    width: int
    height: int
    sha256: str
    look: Look


@dataclass(slots=True)
class _Checked:
    """What the checks found."""

    rows: list[_Row] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    read: int = 0
    beyond_limit: int = 0
    images_changed: Counter[str] = field(default_factory=Counter)
    seen: dict[str, str] = field(default_factory=dict)
    """Where each image id stands."""
    named: Counter[str] = field(default_factory=Counter)
    """Rows kept by the split that the source names."""
    captions_read: int = 0
    captions_changed: Counter[str] = field(default_factory=Counter)
    """Captions by the rule that changed them."""
    duplicates: dict[str, int] = field(default_factory=dict)
    leaks: dict[str, dict[str, int]] = field(default_factory=dict)

    def drop(self, gone: Mapping[int, Rejected]) -> None:
        """Take rows out, each with its reason."""
        self.rejected.extend(gone.values())
        self.rows = [row for i, row in enumerate(self.rows) if i not in gone]


def prepare(config: Config, out: Path | str, progress: Progress | None = None, tools: Tools | None = None) -> Manifest:
    """Write `config.data.source` as shards into `out`, and return the manifest, which is written last.

    An unfinished folder is gone on with, when it had the same input; a finished one is done anew, once the source could
    be opened. `tools` are what the settings ask for from other rooms (pipeline.prepare_tools gives them).

    Raises:
        ConfigError: a setting needs a tool that is not given.
        DataError: the source cannot be read, nothing of it is left, or a split would have no rows.
        RunError: `out` cannot be written, or holds files that are not shards.
    """
    out = Path(out)
    if is_url(config.data.source) or is_shards_folder(Path(config.data.source).expanduser()):
        raise DataError(f"data.source={without_secret(config.data.source)} is prepared already; use it as it is")
    tools = _checked_tools(config, tools)
    source = open_source(config.data, config.run.seed)
    _check_empty(out)
    with FileLock(out / _LOCK):
        return _prepare(config, source, out, tools, progress)


def _checked_tools(config: Config, tools: Tools | None) -> Tools:
    tools, store = tools or Tools(), config.data.store
    if (store != "original") != (tools.resize is not None):
        raise ConfigError(f"data.store={store} and a model's resizing that was {'not ' * (tools.resize is None)}given")
    if needs_clip_scores(config) and tools.score is None:
        raise ConfigError(f"data.captions={config.data.captions} needs CLIPScores, and no scorer was given")
    return tools


def needs_clip_scores(config: Config) -> bool:
    """Whether training, or a trial of the sweep, chooses captions by CLIPScore."""
    searched = (config.tune.space.get("data.captions") or {}).get("choice") or ()
    return config.data.captions in SCORED or any(choice in SCORED for choice in searched)


def prepare_if_needed(config: Config, progress: Progress | None = None, tools: Tools | None = None) -> Path | str:
    """The shards of `config.data.source`: itself when it is a shards folder (a path, or a url of one that `prepare`
    wrote), else prepared once under the cache.

    The cache's folder is named by settings and content, so that a changed source is prepared again.
    """
    if is_url(config.data.source):
        _check_prepared(config, found := open_shards(config.data.source))
        return found.folder
    given = Path(config.data.source).expanduser()
    if is_shards_folder(given) or (given / REJECTED).is_file():  # rejected.jsonl alone: `prepare` did not finish
        _check_prepared(config, open_shards(given))
        return given
    tools = _checked_tools(config, tools)
    source = open_source(config.data, config.run.seed)
    key = _key(config, source, tools)[:16]
    folder = config.cache_dir / "data" / f"{detect(config.data.source)}-{key}"
    if not _opens(folder):
        with FileLock(folder / _LOCK):
            if not _opens(folder):  # nobody finished it while we waited
                _prepare(config, source, folder, tools, progress)
    open_shards(folder)
    return folder


def _opens(folder: Path) -> bool:
    """Whether a folder of the cache is finished and whole; one that a power loss cut short is prepared again."""
    try:
        open_shards(folder)
    except DataError:
        return False
    return True


def _prepare(config: Config, source: Source, out: Path, tools: Tools, progress: Progress | None) -> Manifest:
    with _writing(out):
        work = _working_folder(config, source, out, tools)
        checked = _check_rows(source, config, work, tools, progress)
        write_jsonl(out / REJECTED, [_rejected_line(r) for r in checked.rejected])
        _drop_duplicates(config, checked)
        splits = _splits(config, source, checked)
        splits = _settle_leaks(config, source, checked, splits, out)
        write_jsonl(out / REJECTED, [_rejected_line(r) for r in checked.rejected])
        kept = _limited(checked, splits, config.data.limit)
        rows, splits = [checked.rows[i] for i in kept], [splits[i] for i in kept]
        groups = _groups(rows, splits)
        _check_space(config, out, rows, tools, progress)
        scores = _scores(work, rows, tools, progress)
        files, content = _write_shards(config, work, rows, splits, groups, scores, tools, progress)
        manifest = _manifest(config, source, checked, files, splits, groups, content, tools)
        manifest["languages"] = _languages([(s, row.source.lang) for s, row in zip(splits, rows)])
        write_json(out / MANIFEST, manifest)
        shutil.rmtree(work)
    if progress:
        progress(checked.read, checked.read, _summary(manifest))
    return manifest


def _working_folder(config: Config, source: Source, out: Path, tools: Tools) -> Path:
    """The folder of what is done so far: that of a `prepare` that was killed, when it had the same input, else a new one."""
    import pyarrow as pa

    work, same = out / _WORK, {"key": _key(config, source, tools), "pyarrow": pa.__version__}
    begun = work / "begun.json"
    if (out / MANIFEST).is_file() or not begun.is_file() or read_json(begun) != same:
        for leftover in (out / MANIFEST, out / REJECTED, out / _LEAKS, *out.glob("*.parquet"), *out.glob(".*.parquet")):
            leftover.unlink(missing_ok=True)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        write_json(begun, same)
    return work


def _check_rows(source: Source, config: Config, work: Path, tools: Tools, progress: Progress | None) -> _Checked:
    """Every item of the source is kept (its image spooled) or rejected with its reason, in the source's order."""
    found = _Checked()
    if config.data.limit:  # who wants a few rows shall not wait for all of them to be read: checked as they come
        spool = Spool(work)
        for item in source:
            if isinstance(item, SourceRow) and item.split and found.named[item.split] >= config.data.limit:
                found.read += 1
                found.beyond_limit += 1
                continue
            checked = check_image(item.image) if isinstance(item, SourceRow) else None
            place = spool.put(checked.data) if isinstance(checked, CheckedImage) else []
            facts = None if checked is None else facts_of(checked)[0]
            _take(found, item, place, facts)
        spool.close()
        return found
    items = _spooled(source, work, progress)
    places = [place for item, place in items if isinstance(item, SourceRow)]
    units = [
        {"number": f"{n:05d}", "rows": len(part), "places": part} for n, part in enumerate(_parts(places, UNIT_ROWS))
    ]
    results = run_units(CheckWork(work, check_image), units, tools.run, progress, "images checked")
    facts = (one for result in results for one in result["found"])
    for item, place in items:
        _take(found, item, place, next(facts) if isinstance(item, SourceRow) else None)
    return found


def _spooled(source: Source, work: Path, progress: Progress | None) -> list[tuple[SourceRow | Rejected, list[Any]]]:
    """The source's items without their images, and where in the spool those lie; read once, and kept for a restart."""
    kept = work / "items.jsonl"
    if not kept.is_file():
        spool, lines = Spool(work), []
        rate = Rate(progress, 0, len(source), "rows read")
        for item in source:
            place = spool.put(item.image) if isinstance(item, SourceRow) else []
            # The bytes are in the spool: held here too, a large set would not fit into memory.
            fields = {f.name: getattr(item, f.name) for f in dataclasses.fields(item) if f.name != "image"}
            lines.append({"kind": type(item).__name__, "place": place, "item": fields})
            if len(lines) % _REPORT_ROWS == 0:
                rate.add(_REPORT_ROWS)
        spool.close()
        write_jsonl(kept, lines)
    return [
        (SourceRow(image=b"", **line["item"]) if line["kind"] == "SourceRow" else Rejected(**line["item"]),
         line["place"])
        for line in read_jsonl(kept)
    ]  # fmt: skip


def _take(found: _Checked, item: SourceRow | Rejected, place: list[Any], facts: dict[str, Any] | None) -> None:
    """Keep or reject one item, given what the check of its image found."""
    found.read += 1
    if isinstance(item, SourceRow) and item.image_id in found.seen:
        error = f"image id '{item.image_id}' stands at {found.seen[item.image_id]} already"
        item = Rejected(item.image_id, item.where, "duplicate-id", error)
    if isinstance(item, Rejected):
        found.rejected.append(item)
        return
    captions, dropped = _clean_captions(item, found)
    found.rejected.extend(dropped)
    if not captions:
        error = f"all of its {len(item.captions)} captions are empty"
        found.rejected.append(Rejected(item.image_id, item.where, "no-captions", error))
        return
    if "reason" in facts:
        error = _ADDRESS.sub(" the file", facts["error"])
        error = f"{item.path}: {error}" if item.path else error
        found.rejected.append(Rejected(item.image_id, item.where, facts["reason"], error))
        return
    if facts["changed"]:
        found.images_changed[facts["changed"]] += 1
    found.seen[item.image_id] = item.where
    found.named[item.split] += 1
    light = dataclasses.replace(item, image=b"", captions=[])
    place = facts.get("place") or place
    look = Look(facts["look"]["phash"], bytes.fromhex(facts["look"]["thumbnail"]))
    found.rows.append(_Row(light, captions, place, facts["width"], facts["height"], facts["sha256"], look))


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


def _check_space(config: Config, out: Path, rows: list[_Row], tools: Tools, progress: Progress | None) -> None:
    """Say what the shards will take on disk under each `data.store`, and refuse what has no room."""
    sample = [read_place(out / _WORK, row.place) for row in rows[:: max(1, len(rows) // _SIZE_SAMPLE)]]
    total = sum(row.place[2] for row in rows)
    sizes = sizes_on_disk(sample[:_SIZE_SAMPLE], total, len(rows), tools.resize, config.data.quality)
    wanted, free = sizes[config.data.store], shutil.disk_usage(out).free
    if progress:
        told = ", ".join(f"{store} {size / 1e6:,.1f} MB" for store, size in sizes.items())
        progress(0, len(rows), f"size on disk by data.store (here {config.data.store}): {told}")
    if wanted > free:
        raise RunError(
            f"cannot write {out}: data.store={config.data.store} needs about {wanted / 1e9:,.1f} GB and "
            f"{free / 1e9:,.1f} GB are free. Make room, or choose another data.store ({sizes})."
        )


def _scores(work: Path, rows: list[_Row], tools: Tools, progress: Progress | None) -> list[list[float]] | None:
    """CLIPScores of every row's captions, where they are asked for."""
    if tools.score is None:
        return None
    units = [
        {
            "number": f"{n:05d}",
            "rows": len(part),
            "places": [r.place for r in part],
            "captions": [r.captions for r in part],
        }
        for n, part in enumerate(_parts(rows, UNIT_ROWS))
    ]
    results = run_units(ScoreWork(work, tools.score), units, tools.run, progress, "rows scored by CLIP")
    return [scores for result in results for scores in result["scores"]]


def _write_shards(
    config: Config,
    work: Path,
    rows: list[_Row],
    splits: list[str],
    groups: list[str],
    scores: list[list[float]] | None,
    tools: Tools,
    progress: Progress | None,
) -> tuple[list[dict[str, Any]], str]:
    """Write all shards; returns the manifest's entries and the hash of all rows."""
    units = []
    for split in SPLITS:
        chosen = [i for i, s in enumerate(splits) if s == split]
        for number, part in enumerate(_parts(chosen, config.data.rows_per_shard)):
            records = [
                _record(rows[i], split, groups[i], None if scores is None else scores[i], config.run.seed) for i in part
            ]
            units.append({"number": f"{split}-{number:05d}", "split": split, "rows": len(part), "records": records})
    task = ShardWork(work, config.data.store, config.data.quality, tools.resize, scores is not None)
    files, content = [], hashlib.sha256()
    for result in run_units(task, units, tools.run, progress, "rows written"):
        files.append(result["entry"])
        for row in result["hashes"]:
            content.update(row.encode())
    return files, content.hexdigest()


def _record(row: _Row, split: str, group: str, scores: list[float] | None, seed: int) -> dict[str, Any]:
    record = {
        "image_id": row.source.image_id,
        "place": row.place,
        "path": row.source.path or row.source.image_id,
        "captions": row.captions,
        "split": split,
        "group": group,
        "lang": row.source.lang,
        "source": row.source.source,
        "width": row.width,
        "height": row.height,
        "sha256": row.sha256,
    }
    if scores is not None:
        record |= {"clip_scores": scores, "selected": choose_best(scores, seed, row.source.image_id)}
    return record


def _parts(items: list[Any], size: int) -> list[list[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _key(config: Config, source: Source, tools: Tools) -> str:
    """Names what the shards depend on: settings, cleaning, the source's content, the model's resizing."""
    return sha256_json({"settings": _settings(config), "cleaning": _cleaning(), "source": detect(config.data.source),
                        "content": source.fingerprint(), **tools.describe()})  # fmt: skip


def _settings(config: Config) -> dict[str, Any]:
    """The settings that the shards depend on."""
    data = config.data
    chosen = {"splits": list(data.splits), "limit": data.limit, "rows_per_shard": data.rows_per_shard,
              "duplicates": data.duplicates, "leaks": data.leaks}  # fmt: skip
    if data.store != "original":
        chosen |= {"store": data.store, "quality": data.quality}
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
    tools: Tools,
) -> Manifest:
    import pyarrow as pa

    optional = {}
    if tools.resize is not None:
        optional["store"] = {"kind": config.data.store, "quality": config.data.quality, **tools.resize.describe()}
    if tools.score is not None:
        optional["clip_scores"] = tools.score.describe()

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
        **optional,
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


def _check_prepared(config: Config, shards: Shards) -> None:
    """Raise for settings that a folder prepared already cannot follow."""
    if needs_clip_scores(config) and "clip_scores" not in shards.manifest:
        raise ConfigError(
            f"data.captions={config.data.captions}: {shards.folder} was prepared without CLIPScores. Prepare the source "
            "again with this setting."
        )
    store = (shards.manifest.get("store") or {}).get("kind", "original")
    if config.data.store not in ("original", store):
        raise ConfigError(
            f"data.store={config.data.store} has no effect on {shards.folder}, which is prepared already as '{store}'"
        )
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
