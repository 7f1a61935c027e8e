"""A decoding grid as text, CSV and figures; a row is one model with one prompt, decoding and seed."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raycap.files import write_atomic
from raycap.report.plots import BAD, MUTED, WINNER, figure, write_plots

HEADS = ("model", "prompt", "decode", "seed")


def write_grid(folder: Path | str, rows: Sequence[Mapping[str, Any]]) -> list[Path]:
    """grid.csv and plots/grid-<metric>.svg."""
    return [write_atomic(Path(folder) / "grid.csv", csv_text(rows)), *write_plots(folder, figures(rows))]


def table_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line a row; `!` before the reasons where captions have collapsed."""
    names = _metrics(rows)
    lines = [[*HEADS, *names, ""]]
    for row in rows:
        scores = [f"{row['metrics'][n]['score']:.4f}" if n in row["metrics"] else "" for n in names]
        reasons = "! " + "; ".join(row["collapse"]["reasons"]) if row["collapse"]["collapsed"] else ""
        lines.append([row["model"], row["prompt"], row["decode"], _seed(row), *scores, reasons])
    widths = [max(len(line[n]) for line in lines) for n in range(len(lines[0]) - 1)]
    return "\n".join(
        "  ".join([c.ljust(w) if n < 3 else c.rjust(w) for n, (c, w) in enumerate(zip(line, widths))] + line[-1:])
        .rstrip() for line in lines
    )  # fmt: skip


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Scores in full, with what they and the captions depend on."""
    names, out = _metrics(rows), io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*HEADS, "prompt_text", "images", *names, "collapsed", "reasons", "decoding", "captions"])
    for row in rows:
        scores = [repr(float(row["metrics"][n]["score"])) if n in row["metrics"] else "" for n in names]
        collapse = row["collapse"]
        writer.writerow([
            row["model"], row["prompt"], row["decode"], _seed(row), row["prompt_text"], row["images"], *scores,
            str(collapse["collapsed"]).lower(), "; ".join(collapse["reasons"]), row["decoding"], row["key"],
        ])  # fmt: skip
    return out.getvalue()


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """Name -> (caption, SVG): a figure a metric, a line for every model and prompt, a dot a decoding and seed."""
    return {f"grid-{name}": (f"{name} by prompt and decoding", _dots(rows, name)) for name in _metrics(rows)}


def _dots(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    scored = [row for row in rows if name in row["metrics"]]
    several = len({row["model"] for row in scored}) > 1
    labels = list(dict.fromkeys(_label(row, several) for row in scored))
    decodings = list(dict.fromkeys(row["decode"] for row in scored))
    shapes = "os^Dvp*X"

    def draw(axes: Any) -> None:
        for row in scored:
            colour = BAD if row["collapse"]["collapsed"] else WINNER
            number = decodings.index(row["decode"])
            axes.plot(
                [row["metrics"][name]["score"]], [labels.index(_label(row, several))],
                shapes[number % len(shapes)], color=colour, markersize=6, fillstyle="full" if number % 2 == 0 else "none",
            )  # fmt: skip
        for number, decode in enumerate(decodings):
            axes.plot(
                [], [], shapes[number % len(shapes)], color=MUTED, label=decode, markersize=6,
                fillstyle="full" if number % 2 == 0 else "none",
            )  # fmt: skip
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_xlabel(f"{name} (red: collapsed)" if any(r["collapse"]["collapsed"] for r in scored) else name)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)

    return figure(draw, (6.0, 1.0 + 0.32 * len(labels)))


def _label(row: Mapping[str, Any], several: bool) -> str:
    return f"{row['model']} · {row['prompt']}" if several else row["prompt"]


def _metrics(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["metrics"]))


def _seed(row: Mapping[str, Any]) -> str:
    return "" if row["seed"] is None else str(row["seed"])
