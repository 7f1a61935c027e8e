"""The last part of `prepare`: room on the disk, CLIPScores where they are asked for, the shards."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

from raycap.config import Config
from raycap.data.checking import Row
from raycap.data.pixels import sizes_on_disk
from raycap.data.sources import SPLITS
from raycap.data.units import (
    UNIT_ROWS,
    Progress,
    ScoreWork,
    ShardWork,
    Tools,
    choose_best,
    parts,
    read_place,
    run_units,
)
from raycap.errors import RunError

_SIZE_SAMPLE = 32
"""Images from which the size on disk is told beforehand."""


def check_space(
    config: Config, out: Path, work: Path, rows: list[Row], tools: Tools, progress: Progress | None
) -> None:
    """Say what the shards will take on disk under each `data.store`, and refuse what has no room."""
    sample = [read_place(work, row.place) for row in rows[:: max(1, len(rows) // _SIZE_SAMPLE)]]
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


def clip_scores_of(work: Path, rows: list[Row], tools: Tools, progress: Progress | None) -> list[list[float]] | None:
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
        for n, part in enumerate(parts(rows, UNIT_ROWS))
    ]
    results = run_units(ScoreWork(work, tools.score), units, tools.run, progress, "rows scored by CLIP")
    return [scores for result in results for scores in result["scores"]]


def write_shards(
    config: Config,
    work: Path,
    rows: list[Row],
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
        for number, part in enumerate(parts(chosen, config.data.rows_per_shard)):
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


def _record(row: Row, split: str, group: str, scores: list[float] | None, seed: int) -> dict[str, Any]:
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
