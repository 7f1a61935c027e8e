"""Figures of a report beside the learning curves: effects of settings, rank by learning rate, scores over memory, intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from raycap.report.data import ReportData
from raycap.report.effects import SETTINGS, FirstRung, Level, first_rung, heat, levels, plain, varied
from raycap.report.plots import (
    CURVE_IN,
    FINISHED,
    INK,
    LINE,
    MANY,
    MUTED,
    WINNER,
    curves,
    figure,
    gid,
    known,
    points_of,
    ticks,
    with_titles,
)  # fmt: skip

Draw = Callable[[Any], None]
"""Puts a figure on a pair of matplotlib's axes."""
Chart = tuple[str, Draw, tuple[float, float]]
"""Caption, how it is drawn, its size in inches."""
EFFECT_IN, HEAT_IN, MEMORY_IN = (2.9, 2.4), (4.5, 2.6), (4.5, 2.6)
NAMES = {"cider": "CIDEr", "val_loss": "validation loss"}
STRONGEST = 0.55
"""Opacity of the strongest cell: what is written on it stays readable, light or dark."""


def figures(data: ReportData) -> dict[str, tuple[str, str]]:
    """Name -> (caption, SVG). What was not varied or not measured has no figure."""
    drawn: dict[str, Chart] = {}
    if any(points_of(t, "cider") for t in data.trials):
        drawn["cider-by-step"] = ("Validation CIDEr at the rungs", curves(data, "cider", "CIDEr"), CURVE_IN)
    if any(points_of(t, "val_loss") for t in data.trials):
        drawn["val-loss-by-step"] = (
            "Validation loss at the rungs",
            curves(data, "val_loss", "loss per token"),
            CURVE_IN,
        )
    if found := first_rung(data.trials, data.select_by):
        for key in varied(found.trials, data.space):
            if chart := effect(found, key, SETTINGS[key], data.best_trial):
                drawn[f"effect-{key}"] = chart
        if chart := heat_map(found):
            drawn["heat-rank-lr"] = chart
        if chart := trials_over_memory(found, data.best_trial):
            drawn["trials-over-memory"] = chart
    test = {v: scored["cider"]["score"] for v, scored in data.metrics.get("test", {}).items() if "cider" in scored}
    points = [(v, data.weights_bytes[v], s) for v, s in test.items() if v in data.weights_bytes and known(s)]
    if len({size for _, size, _ in points}) > 1:
        drawn["cider-over-memory"] = over_memory(points, "Test CIDEr over the weights' memory", "weights")
    return {name: (caption, with_titles(figure(draw, size), data)) for name, (caption, draw, size) in drawn.items()}


def effect(found: FirstRung, key: str, label: str, best: str) -> Chart | None:
    """A dot a trial, and each level's mean with its 95 % interval; None where the trials are all of one level."""
    there = [n for n, t in enumerate(found.trials) if plain(t.get(key)) is not None]
    trials, values = [found.trials[n] for n in there], found.values[there]
    shown = levels([t[key] for t in trials], values)
    if len(shown) < 2:
        return None
    ranges = any(level.low != level.high for level in shown)
    place = {plain(level.low): n for n, level in enumerate(shown)}

    def draw(axes: Any) -> None:
        size = 7 if len(trials) > MANY else 18
        for n, (trial, value) in enumerate(sorted(zip(trials, values), key=lambda tv: tv[0]["trial_id"] == best)):
            mine = trial["trial_id"] == best
            # Side by side, so that trials of one level do not hide each other.
            x = trial[key] if ranges else place[plain(trial[key])] + 0.24 * ((n * 0.618) % 1 - 0.5)
            axes.scatter([x], [value], s=size * (2 if mine else 1), color=WINNER if mine else FINISHED, linewidths=0,
                         gid=gid(trial), zorder=4 if mine else 2)  # fmt: skip
        for n, level in enumerate(shown):
            _mean(axes, level, n, ranges)
        if ranges:
            low, high = shown[0].low, shown[-1].high
            if low > 0 and high / low > 20:
                axes.set_xscale("log")
                decades = range(math.ceil(math.log10(low / 1.3)), math.floor(math.log10(high * 1.3)) + 1)
                ticks(axes, [10.0**e for e in decades], lambda v: f"1e{round(math.log10(v))}")
        else:
            long = max(len(level.label) for level in shown) * len(shown) > 34
            ticks(axes, range(len(shown)), lambda n: _cut(shown[n].label, 12 if long else 30))
            axes.set_xlim(-0.5, len(shown) - 0.5)
            if long:
                axes.tick_params(axis="x", labelrotation=25)
        axes.set_xlabel(label)
        axes.set_ylabel(f"{NAMES[found.key]}, step {found.step:,}")

    return f"{NAMES[found.key]} by {label}", draw, EFFECT_IN


def _mean(axes: Any, level: Level, n: int, ranges: bool) -> None:
    if ranges:
        low, high = level.low, level.high
        middle = math.sqrt(low * high) if low > 0 else (low + high) / 2
        axes.plot([low, high], [level.mean] * 2, color=INK, linewidth=1.6, solid_capstyle="butt", zorder=5)
    else:
        middle = n
        axes.plot([n - 0.3, n + 0.3], [level.mean] * 2, color=INK, linewidth=1.6, solid_capstyle="butt", zorder=5)
    if level.half is not None:
        axes.plot([middle] * 2, [level.mean - level.half, level.mean + level.half], color=INK, linewidth=1.0, zorder=5)


def heat_map(found: FirstRung) -> Chart | None:
    """Mean figure by rank and learning rate, the stronger the better; None where one of them does not vary."""
    cells = heat(found)
    if cells is None:
        return None
    sign = -1.0 if found.key == "val_loss" else 1.0
    known = [sign * v for line in cells.mean for v in line if v is not None]
    low, high = min(known), max(known)

    def draw(axes: Any) -> None:
        from matplotlib.patches import Rectangle

        axes.grid(visible=False)
        for row, line in enumerate(cells.mean):
            for column, value in enumerate(line):
                share = 0.0 if value is None else (sign * value - low) / (high - low) if high > low else 0.5
                if value is not None:
                    axes.add_patch(
                        Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, facecolor=WINNER, linewidth=0,
                                  alpha=0.04 + (STRONGEST - 0.04) * share)
                    )  # fmt: skip
                text = "–" if value is None else f"{value:.2f}"
                axes.text(
                    column, row + 0.1, text, ha="center", va="center", color=MUTED if value is None else INK, fontsize=9
                )
                if value is not None:
                    axes.text(column, row - 0.27, f"n {cells.count[row][column]}", ha="center", va="center", color=INK,
                              fontsize=7.5)  # fmt: skip
        axes.set_xlim(-0.5, len(cells.columns) - 0.5)
        axes.set_ylim(-0.5, len(cells.rows) - 0.5)
        ticks(axes, range(len(cells.columns)), lambda n: cells.columns[n].replace(" – ", "\nto "))
        axes.tick_params(axis="both", length=0)
        axes.set_yticks(range(len(cells.rows)), cells.rows)
        axes.spines["bottom"].set_visible(False)
        axes.set_xlabel("learning rate")
        axes.set_ylabel("rank")

    height = max(HEAT_IN[1], 0.9 + 0.36 * len(cells.rows))
    return f"Mean {NAMES[found.key]} by rank and learning rate, step {found.step:,}", draw, (HEAT_IN[0], height)


def over_memory(
    points: Sequence[tuple[str, float, float]], caption: str, x_label: str, y_label: str = "CIDEr"
) -> Chart:
    """Named points (name, bytes, score); those that fall together share a dot."""
    together: dict[tuple[float, float], list[str]] = {}
    for name, size, score in points:
        together.setdefault((size / 2**20, score), []).append(name)
    gib = max(x for x, _ in together) >= 4096
    dots = [(x / 1024 if gib else x, y, " = ".join(names)) for (x, y), names in together.items()]

    def draw(axes: Any) -> None:
        xs, ys = [d[0] for d in dots], [d[1] for d in dots]
        width = (max(xs) - min(xs)) or max(xs) or 1.0
        height = (max(ys) - min(ys)) or abs(max(ys)) or 1.0
        axes.set_xlim(min(xs) - 0.1 * width, max(xs) + 0.75 * width)  # room for the names
        axes.set_ylim(min(ys) - 0.15 * height, max(ys) + 0.15 * height)
        axes.scatter(xs, ys, s=26, color=WINNER, linewidths=0, zorder=3)
        for (x, y, name), at in zip(dots, spread(ys, 0.11 * height)):
            axes.annotate(
                _cut(name, 34), (x, y), (x + 0.05 * width, at), va="center", fontsize=8.5, color=INK,
                arrowprops={"arrowstyle": "-", "color": LINE, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 2},
            )  # fmt: skip
        axes.locator_params(axis="x", nbins=6)
        axes.set_xlabel(f"{x_label}, {'GiB' if gib else 'MiB'}")
        axes.set_ylabel(y_label)

    return caption, draw, MEMORY_IN


def trials_over_memory(found: FirstRung, best: str) -> Chart | None:
    """A dot a trial: what training it alone is predicted to take of a GPU; None where that is not known."""
    there = [n for n, t in enumerate(found.trials) if known(t.get("memory_bytes"))]
    sizes = [found.trials[n]["memory_bytes"] / 2**30 for n in there]
    if len(set(sizes)) < 2:
        return None

    def draw(axes: Any) -> None:
        for n, size in sorted(zip(there, sizes), key=lambda pair: found.trials[pair[0]]["trial_id"] == best):
            mine = found.trials[n]["trial_id"] == best
            axes.scatter([size], [found.values[n]], s=36 if mine else 18, color=WINNER if mine else FINISHED, linewidths=0,
                         gid=gid(found.trials[n]), zorder=4 if mine else 2)  # fmt: skip
        axes.set_xlabel("predicted memory of training it alone, GiB")
        axes.set_ylabel(f"{NAMES[found.key]}, step {found.step:,}")

    return f"Trials: {NAMES[found.key]} over memory", draw, MEMORY_IN


def intervals(rows: Sequence[Mapping[str, Any]], caption: str, x_label: str) -> Chart:
    """A line a row {name, difference, low, high}: what differs, with its interval, around nothing."""

    def draw(axes: Any) -> None:
        axes.axvline(0, color=MUTED, linewidth=0.9)
        for n, row in enumerate(rows):
            sure = row["low"] > 0 or row["high"] < 0
            colour = WINNER if sure else MUTED
            axes.plot([row["low"], row["high"]], [n, n], color=colour, linewidth=1.8, solid_capstyle="butt")
            axes.plot([row["difference"]], [n], "o", color=colour, markersize=5)
        axes.set_yticks(range(len(rows)), [_cut(row["name"], 28) for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.locator_params(axis="x", nbins=5)
        axes.grid(axis="x", visible=True)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(x_label)

    return caption, draw, (4.5, 0.9 + 0.34 * len(rows))


def spread(places: Sequence[float], gap: float) -> list[float]:
    """The places moved apart so far that neighbours are at least `gap` from each other, around where they were."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = [places[n] for n in order]
    for _ in range(50):
        apart = True
        for n in range(1, len(moved)):
            short = gap - (moved[n] - moved[n - 1])
            if short > 1e-12 * max(1.0, abs(gap)):
                moved[n - 1] -= short / 2
                moved[n] += short / 2
                apart = False
        if apart:
            break
    found = [0.0] * len(places)
    for place, n in zip(moved, order):
        found[n] = place
    return found


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
