"""What each setting does, from all trials at the first rung: later ones know only the trials that were let through."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raycap.report.livetable import sci

SETTINGS = {
    "lr": "learning rate", "rank": "rank", "alpha": "alpha", "scale": "scale (alpha / rank)", "dropout": "dropout",
    "targets": "targets", "captions": "captions", "layers": "layers", "schedule": "schedule", "rslora": "rsLoRA",
    "warmup_steps": "warm-up steps", "weight_decay": "weight decay", "beta1": "beta1", "beta2": "beta2",
    "max_grad_norm": "gradient clip", "variant": "kind of adapter", "prompt_tokens": "virtual tokens",
}  # fmt: skip
"""Key of a trial -> what a figure calls it."""
SWEPT = {"lora.r": "rank", "lora.alpha_per_rank": "scale", "train.warmup_ratio": "warmup_steps"}
"""Settings of `tune.space` whose key in a trial is not the last part of their name."""
FEW = 6
"""More different values than this are put together into ranges of about equal numbers of trials."""


@dataclass(frozen=True, slots=True)
class FirstRung:
    """Every trial's figure at the first rung."""

    step: int
    key: str
    """cider or val_loss."""
    trials: list[dict[str, Any]]
    values: np.ndarray
    missing: int
    """Trials that did not get there: they diverged or failed before."""


@dataclass(frozen=True, slots=True)
class Level:
    """The trials of one value, or of one range of values, of a setting."""

    label: str
    low: Any
    high: Any
    """Smallest and largest value in it; equal for a single value."""
    count: int
    mean: float
    half: float | None
    """Half the 95 % interval of the mean; None where the spread is not known."""


def first_rung(trials: Sequence[Mapping[str, Any]], select_by: str = "cider") -> FirstRung | None:
    """The figure that selects trials, where it was measured on all of them; None when nothing was scored."""
    steps = [t["curve"][0]["step"] for t in trials if t.get("curve")]
    if not steps:
        return None
    step = min(steps)
    points = [(t, p) for t in trials for p in (t.get("curve") or [])[:1] if p["step"] == step]
    for key in dict.fromkeys((select_by, "cider", "val_loss")):
        found = [(dict(t), float(p[key])) for t, p in points if _known(p.get(key))]
        if found:
            there, values = zip(*found)
            return FirstRung(step, key, list(there), np.array(values), len(trials) - len(found))
    return None


def varied(trials: Sequence[Mapping[str, Any]], space: Sequence[str] = ()) -> list[str]:
    """Keys of SETTINGS to show: those that the sweep's space names, and where it names none all that differ.

    A scale that follows from rank and alpha has no figure of its own unless it was swept.
    """
    named = [SWEPT.get(s, s.rpartition(".")[2]) for s in space]
    keys = [k for k in SETTINGS if k in named] if named else [k for k in SETTINGS if k != "alpha"]
    return [k for k in keys if len({plain(t.get(k)) for t in trials if plain(t.get(k)) is not None}) > 1]


def plain(value: Any) -> Any:
    """A setting's value as something to compare: a list of names as one text."""
    return " ".join(value) if isinstance(value, (list, tuple)) else value


def levels(values: Sequence[Any], scores: np.ndarray) -> list[Level]:
    """A level a value, or up to four ranges of a number with many values; the interval takes the spread inside the levels.

    The spread within a level (pooled over the levels, Student's t) comes from the other settings, which differ between
    its trials: the interval says how far the mean might move with other draws of them.
    """
    found = groups(values)
    inside = [scores[rows] - scores[rows].mean() for *_, rows in found]
    freedom = len(scores) - len(found)
    spread = math.sqrt(float(sum((d**2).sum() for d in inside)) / freedom) if freedom > 0 else None
    return [
        Level(label, low, high, len(rows), float(scores[rows].mean()),
              None if spread is None else t95(freedom) * spread / math.sqrt(len(rows)))
        for label, low, high, rows in found
    ]  # fmt: skip


def groups(values: Sequence[Any], ranges: int = 0) -> list[tuple[str, Any, Any, np.ndarray]]:
    """(label, smallest, largest, rows [n]) of each level, in rising order; `ranges` is the number of ranges, 0: by count."""
    simple = [plain(v) for v in values]
    numbers = all(_known(v) for v in simple)
    distinct = sorted(set(simple), key=None if numbers else str)
    if len(distinct) <= FEW or not numbers:
        return [(name_of(v), v, v, np.array([n for n, x in enumerate(simple) if x == v])) for v in distinct]
    many = ranges or (3 if len(simple) < 24 else 4)
    order = np.argsort(np.array(simple, dtype=float), kind="stable")
    found = []
    for part in np.array_split(order, many):
        low, high = simple[part[0]], simple[part[-1]]
        named = [sci(v) if 0 < abs(low) < 0.01 else name_of(v) for v in (low, high)]
        found.append((" – ".join(named), low, high, np.sort(part)))
    return found


@dataclass(frozen=True, slots=True)
class Heat:
    """Means of cells [rows][columns]; None where no trial lies."""

    rows: list[str]
    columns: list[str]
    mean: list[list[float | None]]
    count: list[list[int]]


def heat(found: FirstRung, row: str = "rank", column: str = "lr") -> Heat | None:
    """Mean figure by two settings; None where either does not vary."""
    down = groups([t.get(row) for t in found.trials])
    across = groups([t.get(column) for t in found.trials], ranges=5 if len(found.trials) >= 24 else 4)
    if len(down) < 2 or len(across) < 2:
        return None
    cells = [[np.intersect1d(r[3], c[3]) for c in across] for r in down]
    mean = [[float(found.values[cell].mean()) if len(cell) else None for cell in line] for line in cells]
    return Heat([r[0] for r in down], [c[0] for c in across], mean, [[len(c) for c in line] for line in cells])


def name_of(value: Any) -> str:
    """A value as a person writes it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value) or "all"
    return sci(value) if value and abs(value) < 0.01 else f"{value:g}"


def t95(freedom: int) -> float:
    """97.5 % point of Student's t: the expansion in 1/freedom of Abramowitz and Stegun 26.7.5, to 0.2 % from 3 on."""
    if freedom < 3:
        return {1: 12.7062, 2: 4.3027}[freedom]
    z = 1.959964
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (n + 1) for n, term in enumerate(terms))


def _known(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
