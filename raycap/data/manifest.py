"""What `prepare` says of its shards: manifest.json, the lines of rejected.jsonl, and the key that names them in a cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from raycap.config import Config, DataSettings
from raycap.data import duplicates, images
from raycap.data.checking import Checked
from raycap.data.parquet import ROW_GROUP_ROWS, SCHEMA_VERSION
from raycap.data.sources import SPLITS, Rejected, Source, detect
from raycap.data.text_rules import RULES
from raycap.data.units import Tools
from raycap.files import sha256_json

Manifest = dict[str, Any]


def key_of(config: Config, source: Source, tools: Tools) -> str:
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


def make_manifest(
    config: Config,
    source: Source,
    checked: Checked,
    files: list[dict[str, Any]],
    splits: Sequence[str],
    groups: Sequence[str],
    langs: Sequence[str],
    content: str,
    tools: Tools,
) -> Manifest:
    """The whole of it; `splits`, `groups` and `langs` are those of the rows that were written, in order."""
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
        "languages": _languages(list(zip(splits, langs))),
    }


def _languages(rows: Sequence[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """Split -> language -> rows, of rows given as (split, language)."""
    counts = Counter(rows)
    return {split: {lang: n for (s, lang), n in sorted(counts.items()) if s == split} for split in SPLITS}


def rejected_line(rejected: Rejected) -> dict[str, Any]:
    return {
        "what": rejected.what,
        "image_id": rejected.image_id,
        "where": rejected.where,
        "reason": rejected.reason,
        "error": rejected.error,
    }


def summary(manifest: Manifest) -> str:
    counts = ", ".join(f"{split} {n}" for split, n in manifest["counts"].items())
    rows = manifest["rows"]
    return f"{rows['kept']} rows kept ({counts}), {rows['rejected']} rejected"
