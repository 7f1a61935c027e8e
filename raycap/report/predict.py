"""What a sweep will cost, told before it runs: steps from ASHA's arithmetic, seconds and memory from earlier runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from raycap.config import Config
from raycap.errors import RaycapError
from raycap.report.livetable import duration
from raycap.report.runs import Run, is_run, load_run

SAME = (("model", "path"), ("model", "quantisation"), ("model", "materialise"), ("train", "batch"), ("data", "prompt"))
"""Settings that a run must share for its seconds a step and its memory to say anything."""


def predict(config: Config, *, root: Path | str = "results") -> dict[str, str]:
    """Name -> what is expected, in words; what there is no measurement for says so."""
    full = (config.tune.trials + config.tune.default_trial) * config.train.steps
    expected = expected_steps(config)
    share = f", {expected / full:.0%} of {full:,} without pruning" if expected < full else ""
    found = {"predicted work": f"about {expected:,} optimiser steps{share}"}
    like = next(_alike(config, _newest_runs(Path(root))), None)
    if like is None:
        nothing = f"unknown: no finished run with this base and batch under {root}/ to measure by"
        return found | {"predicted time": nothing}
    sweep_s, steps = like.entry["seconds_by_phase"].get("sweep", 0.0), sum(t["steps"] for t in like.trials)
    other_s = like.entry["seconds"] - sweep_s
    time_s = other_s + sweep_s * expected / max(1, steps)
    memory = like.entry["peak_memory_bytes"] / 2**30
    source = f"as in {like.folder.as_posix()}"
    slots = like.config["tune"]["slots"] * like.config["tune"]["packs"]
    return found | {
        "predicted time": f"about {duration(time_s)} ({1000 * sweep_s / max(1, steps):.0f} ms a step {source})",
        "memory of all processes": f"about {memory:.1f} GiB ({source}, with {slots} slots)",
    }


def expected_steps(config: Config) -> int:
    """Optimiser steps of all trials if one in `tune.eta` passes each rung."""
    if config.tune.scheduler == "none":
        return (config.tune.trials + config.tune.default_trial) * config.train.steps
    from raycap.tune.schedule import rungs

    total, at, left = 0.0, 0, float(config.tune.trials)
    for rung in rungs(config.train.steps, config.tune.grace_steps, config.tune.eta):
        total += left * (rung - at)
        at, left = rung, max(1.0, left / config.tune.eta)
    # The preset's own settings are never pruned.
    return round(total) + config.tune.default_trial * config.train.steps


def _newest_runs(root: Path) -> Iterable[Run]:
    folders = sorted((p for p in root.glob("*/run.json")), key=lambda p: -p.stat().st_mtime)
    for path in folders:
        try:
            if is_run(path.parent) and (run := load_run(path.parent)).finished:
                yield run
        except (RaycapError, OSError, ValueError):
            continue  # a damaged folder is no reason to refuse a prediction


def _alike(config: Config, runs: Iterable[Run]) -> Iterable[Run]:
    wanted: dict[str, Any] = config.to_dict()
    for run in runs:
        same = all(run.config.get(s, {}).get(k) == wanted[s][k] for s, k in SAME)
        if same and run.trials and {"seconds_by_phase", "seconds", "peak_memory_bytes"} <= set(run.entry):
            yield run


def memory_lines(plan: Mapping[str, Any]) -> list[str]:
    """The memory of a GPU as raycap.train.memory.plan tells it, as lines of a table."""
    if "unknown" in plan:
        return [f"predicted memory: unknown: {plan['unknown']}"]
    by = "the architecture that raycap knows by this name" if plan["known"] else "the model's configuration"
    lines = [f"predicted memory: GB of a GPU, {plan['dtype']}, texts of {plan['text_tokens']} tokens, by {by}"]
    heads = ("weights", "adapters", "step", "tower", "validation", "total")
    rows = [("slots", *heads)] + [(str(p["slots"]), *(f"{p[h] / 1e9:.2f}" for h in heads)) for p in plan["training"]]
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines += ["  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    served = plan["serving"]
    lines.append(
        f"  serving {served['variant']}, {served['rows']} images at once: {served['total'] / 1e9:.2f} GB; "
        f"its weights on disk {served['checkpoint'] / 1e9:.2f} GB"
    )
    return lines
