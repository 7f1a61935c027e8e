"""Figures of a run as SVG: drawn by matplotlib in a fixed palette that a page can swap for its own, light or dark."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from raycap.files import write_atomic
from raycap.report.data import ReportData
from raycap.report.livetable import number, setting

INK, MUTED, LINE = "#1b1f24", "#6a7280", "#d9dde3"
WINNER, FINISHED, STOPPED, BAD = "#1f5fd0", "#7b98c9", "#b4bac4", "#c8372d"
THEME = {
    INK: "currentColor", MUTED: "var(--muted)", LINE: "var(--line)", WINNER: "var(--accent)",
    FINISHED: "var(--finished)", STOPPED: "var(--stopped)", BAD: "var(--bad)",
}  # fmt: skip
"""Colour in the file -> colour on the page."""
CURVE_IN = (4.5, 2.6)
MANY = 40
"""Trials from which lines and dots get thinner."""


def write_plots(folder: Path | str, drawn: Mapping[str, tuple[str, str]]) -> list[Path]:
    """plots/<name>.svg, in the light palette on white."""
    return [write_atomic(Path(folder) / "plots" / f"{name}.svg", svg) for name, (_, svg) in drawn.items()]


def curves(data: ReportData, key: str, label: str) -> Callable[[Any], None]:
    """One line a trial over its rungs; the winner's in front."""

    def draw(axes: Any) -> None:
        thin = len(data.trials) > MANY
        for trial in sorted(data.trials, key=lambda t: _layer(data, t)):
            points = points_of(trial, key)
            if not points:
                continue
            best, colour = trial["trial_id"] == data.best_trial, _colour(data, trial)
            width = 2.2 if best else 0.6 if thin else 1.2
            dot = 3.5 if best else 0 if thin and len(points) > 1 else 2.2
            steps, values = zip(*points)
            axes.plot(steps, values, color=colour, linewidth=width, marker="o", markersize=dot or 1.2, gid=gid(trial))
            spread = [point.get(f"{key}_se") for point in trial["curve"] if known(point.get(key))]
            if best and all(known(s) for s in spread):
                low, high = (
                    [v - 1.96 * s for v, s in zip(values, spread)],
                    [v + 1.96 * s for v, s in zip(values, spread)],
                )
                axes.fill_between(steps, low, high, color=colour, alpha=0.16, linewidth=0)
        axes.set_xlabel("optimiser step")
        axes.set_ylabel(label)
        rungs = sorted({int(s) for t in data.trials for s, _ in points_of(t, key)})
        if 1 < len(rungs) <= 6:
            axes.set_xscale("log")
            ticks(axes, rungs, lambda value: f"{value:,.0f}")

    return draw


def for_page(svg: str, label: str) -> str:
    """The figure for an HTML page: the page's colours and font, as wide as its place, no address in it."""
    svg = svg[svg.index("<svg") :]
    for colour, theme in THEME.items():
        svg = re.sub(re.escape(colour), theme, svg, flags=re.IGNORECASE)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    head, rest = svg.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{html.escape(label, quote=True)}">{rest}'


def figure(draw: Callable[[Any], None], size_in: tuple[float, float]) -> str:
    """The SVG of what `draw` puts on a pair of axes, in the palette and without a window system."""
    out = io.BytesIO()
    _draw(draw, size_in, out, "svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px; font-family: sans-serif", out.getvalue().decode())


def png(draw: Callable[[Any], None], size_in: tuple[float, float]) -> bytes:
    """The same as a picture for slides and papers: on white, 200 dots an inch."""
    out = io.BytesIO()
    _draw(draw, size_in, out, "png", dpi=200, facecolor="#ffffff", metadata={"Software": None})
    return out.getvalue()


def _draw(draw: Callable[[Any], None], size_in: tuple[float, float], out: io.BytesIO, kind: str, **how: Any) -> None:
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    look = {
        "svg.fonttype": "none", "svg.hashsalt": "raycap", "font.family": "sans-serif", "font.size": 9,
        "text.color": INK, "axes.labelcolor": MUTED, "axes.edgecolor": LINE, "xtick.color": LINE, "ytick.color": LINE,
        "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED, "axes.grid": True, "grid.color": LINE,
        "grid.linewidth": 0.6, "axes.axisbelow": True, "axes.linewidth": 0.8, "axes.labelsize": 9,
        "figure.facecolor": "none", "axes.facecolor": "none",
    }  # fmt: skip
    with mpl.rc_context(look):
        # The canvas by hand and no pyplot: pyplot holds figures in a global and picks a window system.
        sheet = Figure(figsize=size_in, layout="constrained")
        (FigureCanvasSVG if kind == "svg" else FigureCanvasAgg)(sheet)
        axes = sheet.add_subplot()
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", visible=False)
        draw(axes)
        sheet.savefig(out, format=kind, **how)


def with_titles(svg: str, data: ReportData) -> str:
    """A group per trial gets the trial's facts as its tooltip, and its id as data: ids repeat from figure to figure."""
    facts = {t["trial_id"]: t for t in data.trials}

    def titled(match: re.Match[str]) -> str:
        trial = facts.get(match[1])
        if trial is None:
            return match[0]
        text = f"{trial['trial_id']} {trial['state']}: {setting(trial)}; CIDEr {number(trial.get('cider'))}"
        return f'<g class="trial" data-trial="{html.escape(match[1], quote=True)}"><title>{html.escape(text)}</title>'

    return re.sub(r'<g id="trial-([^"]+)">', titled, svg)


def gid(trial: Mapping[str, Any]) -> str:
    return f"trial-{trial['trial_id']}"


def ticks(axes: Any, values: Sequence[float], text: Callable[[float], str]) -> None:
    from matplotlib.ticker import NullLocator

    axes.set_xticks(list(values), [text(v) for v in values])
    axes.xaxis.set_minor_locator(NullLocator())


def points_of(trial: Mapping[str, Any], key: str) -> list[tuple[float, float]]:
    return [(p["step"], p[key]) for p in trial.get("curve", []) if known(p.get(key))]


def known(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _colour(data: ReportData, trial: Mapping[str, Any]) -> str:
    if trial["trial_id"] == data.best_trial:
        return WINNER
    return {"finished": FINISHED, "diverged": BAD, "failed": BAD}.get(trial["state"], STOPPED)


def _layer(data: ReportData, trial: Mapping[str, Any]) -> int:
    """Drawn from the back to the front: stopped, broken, finished, the winner."""
    return [STOPPED, BAD, FINISHED, WINNER].index(_colour(data, trial))
