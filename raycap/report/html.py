"""report.html: one offline page that a run's numbers, curves and pictures can be read from."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path

import raycap
from raycap.files import write_atomic
from raycap.report.charts import figures
from raycap.report.data import ReportData, report_data
from raycap.report.ledger import REPORT
from raycap.report.livetable import adapter, duration, number, sci
from raycap.report.page import page
from raycap.report.pictures import PICTURES, write_pictures
from raycap.report.plots import write_plots
from raycap.report.runs import load_run
from raycap.report.sections import cost, curves, effects, memory, pictures, provenance, verdicts
from raycap.report.tables import gate, score_of, scores, size, top_score, trials


def write_report(folder: Path | str, data: ReportData | None = None) -> Path:
    """report.html and plots/*.svg of a run folder; without `data` they are made again from its files."""
    folder = Path(folder)
    data = data or report_data(load_run(folder))
    if data.pictures and not (folder / PICTURES).is_file():
        write_pictures(folder, data.pictures)  # so that the page can be made again without the shards
    drawn = figures(data)
    write_plots(folder, drawn)
    return write_atomic(folder / REPORT, render(data, drawn))


def render(data: ReportData, drawn: Mapping[str, tuple[str, str]] | None = None) -> str:
    """The page as text; `drawn` saves drawing the figures twice."""
    drawn = figures(data) if drawn is None else drawn
    parts = [
        ("scores", "Scores", scores(data)),
        ("verdicts", "Verdicts", verdicts(data)),
        ("gate", "Gate", gate(data)),
        ("trials", "Trials", trials(data)),
        ("curves", "Learning curves", curves(data, drawn)),
        ("effects", "Effect of each setting", effects(data, drawn)),
        ("pictures", "Pictures", pictures(data)),
        ("memory", "CIDEr over memory", memory(drawn)),
        ("cost", "Cost", cost(data)),
        ("provenance", "How to reproduce", provenance(data)),
    ]
    shown = [(key, title, body) for key, title, body in parts if body]
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in shown)
    body = "\n".join(f'<section id="{key}"><h2>{title}</h2>{text}</section>' for key, title, text in shown)
    version = data.versions.get("raycap", raycap.__version__)
    made = f", {when(data.written)}" if data.written else ""
    footer = f"Made by raycap {escape(version)}{made}. Loads nothing from outside."
    return page(f"{data.name} · raycap", _header(data) + f"<nav>{links}</nav>", body, footer)


def _header(data: ReportData) -> str:
    look = {"finished": "good", "failed": "bad"}.get(data.status, "warn")
    finished = sum(t["state"] == "finished" for t in data.trials)
    facts: list[tuple[str, str, str]] = []
    variant, score = top_score(data)
    if score is not None:
        facts.append(
            (
                "test CIDEr",
                number(score),
                f"{variant}; zero-shot {number(score_of(data, 'test', 'zero-shot', 'cider'))}",
            )
        )
    best = next((t for t in data.trials if t["trial_id"] == data.best_trial), None)
    if best:
        facts.append(
            (
                "winner",
                escape(best["trial_id"]),
                f'{adapter(best)}, <span class="nb">lr {sci(best["lr"])}</span>',
            )
        )
    if data.trials:
        facts.append(("trials", str(len(data.trials)), f"{finished} trained to the end"))
    if data.seconds:
        facts.append(("time", duration(data.seconds), escape(data.device)))
    if data.peak_memory_bytes:
        facts.append(("peak memory", size(data.peak_memory_bytes), "all processes of the run"))
    tiles = "".join(f"<div><dt>{k}</dt><dd>{v}<small>{note}</small></dd></div>" for k, v, note in facts)
    lead = f'<p class="lead">{escape(data.sentence)}</p>' if data.sentence else ""
    return (
        f'<p class="kicker">raycap run{" · " + when(data.written) if data.written else ""}</p>'
        f'<h1>{escape(data.name)} <span class="pill {look}">{escape(data.status)}</span></h1>{lead}'
        + (f'<dl class="facts">{tiles}</dl>' if tiles else "")
    )


def when(written: str) -> str:
    from datetime import datetime

    try:
        at = datetime.fromisoformat(written.replace("Z", "+00:00"))
    except ValueError:
        return escape(written)
    return f"{at.day} {at:%b %Y, %H:%M} UTC"
