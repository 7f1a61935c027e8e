"""Do the early rungs foretell the end? Measured on a sweep that pruned nothing, for survivors alone would flatter them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import raycap
from raycap.files import read_whole, write_json
from raycap.report.runs import Run

GLOB = "reference-*.json"
SCHEMA = 1
KEYS = ("cider", "val_loss")
RESAMPLES = 2_000
FEWEST = 4
"""Trials below which a rank correlation says nothing."""
KEPT = ("trial_id", "state", "rank", "alpha", "scale", "lr", "dropout", "curve")
SAME = (("model", "path"), ("data", "source"))
"""What a reference sweep must share with a run to say something about its rungs."""


def reference_of(run: Run) -> dict[str, Any] | None:
    """Rows of `rung_rows` and where they come from: {source, own, command, commit, written, steps, trials, eta, rows}.

    The run itself where it pruned nothing; else a reference sweep of the same base and images, kept as
    `reference-*.json` beside the run folder or in the repository's results/. None where there is neither.
    """
    config = run.config
    if config.get("tune", {}).get("scheduler") == "none":
        return _told(reference_json(run.trials, config, run.entry), "this run, which pruned nothing", own=True)
    for folder in dict.fromkeys((run.folder.absolute().parent, Path(raycap.__file__).resolve().parents[1] / "results")):
        for file in sorted(folder.glob(GLOB)):
            found = read_whole(file)
            if not isinstance(found, dict) or found.get("schema") != SCHEMA:
                continue
            other = found.get("config", {})
            if all(other.get(s, {}).get(k) == config.get(s, {}).get(k) for s, k in SAME):
                return _told(found, f"results/{file.name}", own=False)
    return None


def reference_json(
    trials: Sequence[Mapping[str, Any]], config: Mapping[str, Any], entry: Mapping[str, Any]
) -> dict[str, Any]:
    """What is kept of a sweep without pruning: each trial's curve, the settings, where it came from."""
    sections = ("run", "data", "model", "lora", "train", "tune")
    return {
        "schema": SCHEMA,
        "command": entry.get("command", ""),
        "commit": entry.get("commit", ""),
        "written": entry.get("written", ""),
        "versions": dict(entry.get("versions", {})),
        "seconds": entry.get("seconds", 0.0),
        "data_sha256": entry.get("data_sha256", ""),
        "config": {s: dict(config.get(s, {})) for s in sections},
        "trials": [{k: t.get(k) for k in KEPT} for t in trials],
    }


def write_reference(path: Path | str, found: Mapping[str, Any]) -> Path:
    return write_json(path, dict(found))


def rung_rows(trials: Sequence[Mapping[str, Any]], eta: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """A row a rung before the last, of the trials that reached the end.

    Returns: step; trials; for `cider` and `val_loss` the Spearman correlation of the rung's figure with the CIDEr at the
    end, positive where the rung orders the trials as the end does, with its 95 % interval (bootstrap over trials); kept,
    whether the trial that is best at the end is among the best 1 in eta at the rung by CIDEr; lost, the CIDEr at the end
    that going on with those alone would have cost.
    """
    steps = sorted({p["step"] for t in trials for p in t.get("curve") or []})
    if len(steps) < 2:
        return []
    at = {t["trial_id"]: {p["step"]: p for p in t["curve"]} for t in trials if t.get("curve")}
    whole = [
        t for t, points in at.items() if all(_known(points.get(s, {}).get("cider")) for s in (*steps[:-1], steps[-1]))
    ]
    if len(whole) < FEWEST:
        return []
    end = np.array([at[t][steps[-1]]["cider"] for t in whole])
    rows = []
    for step in steps[:-1]:
        row: dict[str, Any] = {"step": step, "share": step / steps[-1], "trials": len(whole)}
        for key in KEYS:
            values = [at[t][step].get(key) for t in whole]
            if all(map(_known, values)):
                early = np.array(values, dtype=float) * (-1.0 if key == "val_loss" else 1.0)
                low, high = _interval(early, end, seed)
                row[key] = {"spearman": spearman(early, end), "low": low, "high": high}
        early = np.array([at[t][step]["cider"] for t in whole])
        going = np.argsort(-early, kind="stable")[: max(1, len(whole) // max(2, eta))]
        row |= {
            "going": len(going),
            "kept": bool(end[going].max() == end.max()),
            "lost": float(end.max() - end[going].max()),
        }
        rows.append(row)
    return rows


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation of the ranks, equal values sharing theirs; NaN where one side does not vary."""
    one, other = _ranks(a), _ranks(b)
    one, other = one - one.mean(), other - other.mean()
    size = math.sqrt(float(one @ one) * float(other @ other))
    return float(one @ other) / size if size > 0 else math.nan


def _told(found: Mapping[str, Any], source: str, *, own: bool) -> dict[str, Any] | None:
    config = found["config"]
    eta = int(config["tune"].get("eta", 3))
    rows = rung_rows(found["trials"], eta)
    if not rows:
        return None
    facts = {k: found.get(k, "") for k in ("command", "commit", "written")}
    return {"source": source, "own": own, **facts, "steps": config["train"]["steps"], "eta": eta, "rows": rows}


def _interval(a: np.ndarray, b: np.ndarray, seed: int) -> tuple[float, float]:
    draws = np.random.default_rng(seed).integers(0, len(a), size=(RESAMPLES, len(a)))
    found = np.array([spearman(a[draw], b[draw]) for draw in draws])
    found = found[np.isfinite(found)]
    return tuple(float(q) for q in np.quantile(found, (0.025, 0.975))) if len(found) else (math.nan, math.nan)


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def _known(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
