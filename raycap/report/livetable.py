"""The pieces of the progress display: trials, phases, totals, as rich renderables or plain text."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from raycap.report.live import Progress

STATES = {
    "waiting": ("·", "dim", "waiting"),
    "running": ("●", "cyan", "training"),
    "judged": ("●", "cyan", "at a rung"),
    "finished": ("✓", "green", "finished"),
    "stopped": ("■", "dim", "stopped"),
    "diverged": ("✗", "red", "diverged"),
    "failed": ("✗", "bold red", "failed"),
}
_ASCII = str.maketrans("·●✓■✗○━─±★–", ".*v-xo=-~*-")
_BAR = 10
_AROUND_TABLE = 9
"""Lines of the display that are no rows of trials."""
_KEPT = 24
"""Trials that stay on the screen at the end, whatever its height."""
_WIDE = 92
"""Columns from which a terminal has room for the bar and the reason."""


def number(value: float | None, digits: int = 3) -> str:
    """Fixed digits; what is not known or not a number is said so."""
    if value is None:
        return "–"
    return f"{value:.{digits}f}" if math.isfinite(value) else str(value)


def sci(value: float | None) -> str:
    """A learning rate with all the digits it was drawn with: 2.15e-3."""
    if value is None:
        return "–"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "?"
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    minutes, rest = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def clock(seconds: float) -> str:
    """m:ss, or h:mm:ss from an hour on."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def end_line(trial: Mapping[str, Any]) -> str:
    """What became of a trial, in one line."""
    found = f"CIDEr {number(trial.get('cider'))}"
    if trial.get("cider_se") is not None:
        found += f" ± {number(trial['cider_se'])}"
    if trial.get("cider") is None:
        found = f"loss {number(trial.get('loss'))}"
    # A place among CIDErs need not repeat the CIDEr and the step.
    reason = re.sub(r"^cider \S+ at step \d+: ", "", trial.get("reason") or "")
    reason = f"; {reason}" if reason else ""
    return f"{trial['trial_id']} {trial['state']} at step {trial.get('steps', 0):,}: {found} ({setting(trial)}){reason}"


def setting(trial: Mapping[str, Any]) -> str:
    """What a trial trains, in a few words."""
    return f"{adapter(trial)}, lr {sci(trial['lr'])}" + (
        "" if trial.get("variant") == "prompt" else f", dropout {trial['dropout']:g}"
    )


def adapter(trial: Mapping[str, Any]) -> str:
    """The kind and size of a trial's adapter; of LoRA, which most are, the size alone."""
    if trial.get("variant") == "prompt":
        return f"prompt of {trial['prompt_tokens']} tokens"
    kind = "DoRA of " if trial.get("variant") == "dora" else ""
    return f"{kind}rank {trial['rank']}, alpha {trial['alpha']:g}"


def totals_line(snapshot: Mapping[str, Any]) -> str:
    """Done of total, those in training, the best so far, the rate and what is left."""
    trials = list(snapshot.get("trials", []))
    training = sum(t["state"] in ("running", "judged") for t in trials)
    parts = [f"{snapshot.get('done', 0)} of {snapshot.get('total', len(trials))} trials done"]
    if training:
        parts.append(f"{training} training")
    best = best_of(trials)
    if best is not None:
        parts.append(f"best {best['trial_id']} CIDEr {number(best['cider'])}")
    if snapshot.get("rate"):
        parts.append(f"{snapshot['rate']:.0f} steps/s")
    if snapshot.get("eta"):
        parts.append(f"{duration(snapshot['eta'])} left")
    return " · ".join(parts)


def best_of(trials: list[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    scored = [t for t in trials if t.get("cider") is not None and math.isfinite(t["cider"])]
    return max(scored, key=lambda t: t["cider"], default=None)


def draw(progress: Progress, console: Console, *, final: bool = False) -> RenderableType:
    """The whole display, cut to the terminal's height."""
    from rich.console import Group
    from rich.text import Text

    ascii_only = "utf" not in (console.encoding or "").lower()
    parts: list[Any] = [_phases(progress, final, console.width)]
    trials = progress.snapshot.get("trials", [])
    if trials:
        room = max(3, (console.height or 25) - _AROUND_TABLE)
        parts += [Text(), _table(progress, max(room, _KEPT) if final else room, console.width, ascii_only)]
    if not final and (status := _status(progress, console.width)):
        parts += [Text(), status]
    elif final and trials:
        parts += [Text(), Text(" " + totals_line({**progress.snapshot, "eta": None, "rate": 0}))]
    if ascii_only:
        parts = [Text(p.plain.translate(_ASCII)) if isinstance(p, Text) else p for p in parts]
    return Group(*parts)


def _phases(progress: Progress, final: bool, width: int) -> Any:
    from rich.text import Text

    line = Text(" ")
    line.append(progress.title or "raycap", style="bold")
    line.append(f"  {'took' if final else 'for'} {clock(progress.elapsed)}\n ", style="dim")
    gap = "   " if width >= _WIDE else "  "
    for name in progress.phases:
        took = progress.seconds.get(name, 0.0)
        if name == progress.phase_name:
            line.append(f"● {name} {clock(took + progress.phase_elapsed)}", style="bold cyan")
        elif name in progress.seconds:
            line.append("✓ ", style="green").append(f"{name} {clock(took)}")
        else:
            line.append(f"○ {name}", style="dim")
        line.append(gap)
    return line


def _status(progress: Progress, width: int) -> Any:
    from rich.text import Text

    line = Text(" ")
    if progress.phase_name == "sweep" and progress.snapshot.get("trials"):
        left, total = progress.snapshot.get("steps_left"), progress.snapshot.get("total")
        gone = sum(t.get("steps", 0) for t in progress.snapshot["trials"])
        if width >= _WIDE and left is not None and total and gone + left:
            line.append_text(_bar(gone / (gone + left), 12, "cyan")).append("  ")
        return line.append(totals_line(progress.snapshot))
    if progress.counted:
        done, total = progress.counted
        if total:
            line.append_text(_bar(done / total, 24, "cyan")).append(f"  {done:,} of {total:,}  ")
            if 0 < done < total:
                line.append(f"{duration(progress.phase_elapsed * (total - done) / done)} left  ", style="dim")
        else:
            line.append(f"{done:,}  ")
    line.append(progress.message)
    return line if line.plain.strip() else None


def _table(progress: Progress, room: int, width: int, ascii_only: bool) -> Any:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    trials = list(progress.snapshot["trials"])
    best = best_of(trials)
    wide = width >= _WIDE
    table = Table(box=None, pad_edge=True, padding=(0, 1, 0, 1) if wide else (0, 1, 0, 0), header_style="dim underline")
    for head, side in ((" trial", "left"), ("rank", "right"), ("alpha", "right"), ("lr", "right"), ("drop", "right"),
                       ("step", "right"), ("loss", "right"), ("CIDEr", "right"), ("state", "left")):  # fmt: skip
        table.add_column(head, justify=side, no_wrap=True)
    shown = _choose(trials, room)
    goal = progress.steps or max((t.get("steps", 0) for t in trials), default=0)
    for trial in shown:
        mark, style, word = STATES.get(trial["state"], ("?", "", trial["state"]))
        is_best = best is not None and trial["trial_id"] == best["trial_id"]
        row = "bold" if is_best else "dim" if trial["state"] in ("waiting", "stopped") else ""
        score = Text(number(trial.get("cider")))
        if trial.get("cider_se") is not None:
            score.append(f" ± {number(trial['cider_se'])}", style="dim")
        steps = trial.get("steps", 0)
        step = Text(f"{steps:,}")
        if wide and goal:
            step = _bar(steps / goal, _BAR, style).append(f" {steps:>6,}")
        state = Text(f"{mark} {word}", style=style)
        if is_best:
            state.append(" ★ best" if wide else " ★", style="bold yellow")
        if (trial.get("collapse") or {}).get("collapsed"):
            state.append(" collapsed", style="yellow")
        cells = [Text(f" {trial['trial_id']}"), str(trial["rank"]), f"{trial['alpha']:g}", sci(trial["lr"]),
                 f"{trial['dropout']:g}", step, number(trial.get("loss")), score, state]  # fmt: skip
        if ascii_only:
            cells = [Text(str(c).translate(_ASCII)) for c in cells]
        table.add_row(*cells, style=row)
    if hidden := [t for t in trials if t not in shown]:
        left = Counter(STATES.get(t["state"], ("", "", t["state"]))[2] for t in hidden)
        more = Text(f" and {len(hidden)} more: " + ", ".join(f"{n} {state}" for state, n in left.items()), style="dim")
        return Group(table, more)
    return table


def _choose(trials: list[dict[str, Any]], room: int) -> list[dict[str, Any]]:
    """All trials if they fit; else those in training, then the best that ended, then the next to come."""
    if len(trials) <= room:
        return trials
    rank = {"running": 0, "judged": 0, "finished": 1, "failed": 2, "diverged": 2, "stopped": 3, "waiting": 4}

    def key(trial: dict[str, Any]) -> tuple[int, float]:
        cider = trial.get("cider")
        return rank.get(trial["state"], 5), -(cider if cider is not None and math.isfinite(cider) else -1.0)

    kept = {t["trial_id"] for t in sorted(trials, key=key)[: room - 1]}
    return [t for t in trials if t["trial_id"] in kept]


def _bar(share: float, width: int, style: str) -> Any:
    from rich.text import Text

    full = max(0, min(width, round(share * width)))
    return Text("━" * full, style=style).append("─" * (width - full), style="bright_black")
