"""report.html: one offline page that a run's numbers, curves and pictures can be read from."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from pathlib import Path

import raycap
from raycap.files import write_atomic
from raycap.report.data import PICTURES, ReportData, report_data, write_pictures
from raycap.report.ledger import REPORT
from raycap.report.livetable import duration, number, sci
from raycap.report.page import page
from raycap.report.plots import figures, for_page, write_plots
from raycap.report.runs import load_run
from raycap.report.tables import METRIC_NAMES, gate, pairs, score_of, scores, scrolled, size, top_score, trials

PHASE_COLOURS = ("var(--accent)", "var(--finished)", "var(--good)", "var(--warn)", "var(--stopped)", "var(--muted)")


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
        ("gate", "Gate", gate(data)),
        ("trials", "Trials", trials(data)),
        ("curves", "Learning curves", _curves(data, drawn)),
        ("effects", "Effect of each setting", _effects(drawn)),
        ("pictures", "Pictures", pictures(data)),
        ("cost", "Cost", cost(data)),
        ("provenance", "How to reproduce", provenance(data)),
    ]
    shown = [(key, title, body) for key, title, body in parts if body]
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in shown)
    body = "\n".join(f'<section id="{key}"><h2>{title}</h2>{text}</section>' for key, title, text in shown)
    version = data.versions.get("raycap", raycap.__version__)
    when = f", {_when(data.written)}" if data.written else ""
    footer = f"Made by raycap {escape(version)}{when}. Loads nothing from outside."
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
                f'rank {best["rank"]}, alpha {best["alpha"]:g}, <span class="nb">lr {sci(best["lr"])}</span>',
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
        f'<p class="kicker">raycap run{" · " + _when(data.written) if data.written else ""}</p>'
        f'<h1>{escape(data.name)} <span class="pill {look}">{escape(data.status)}</span></h1>{lead}'
        + (f'<dl class="facts">{tiles}</dl>' if tiles else "")
    )


def _when(written: str) -> str:
    from datetime import datetime

    try:
        at = datetime.fromisoformat(written.replace("Z", "+00:00"))
    except ValueError:
        return escape(written)
    return f"{at.day} {at:%b %Y, %H:%M} UTC"


def _curves(data: ReportData, drawn: Mapping[str, tuple[str, str]]) -> str:
    shown = {k: v for k, v in drawn.items() if k.endswith("by-step")}
    if not shown:
        return ""
    colours = [
        ("accent", f"winner {data.best_trial}".strip()),
        ("finished", "trained to the end"),
        ("stopped", "stopped early"),
        ("bad", "diverged or failed"),
    ]
    legend = "".join(f'<li><i style="background:var(--{c})"></i>{escape(text)}</li>' for c, text in colours)
    return f'<ul class="legend">{legend}</ul>' + _figures(shown, "wide")


def _effects(drawn: Mapping[str, tuple[str, str]]) -> str:
    shown = {k: v for k, v in drawn.items() if not k.endswith("by-step")}
    if not shown:
        return ""
    note = ("Each dot is a trial. Hollow ones were stopped and scored at an earlier rung, so their height is not "
            "comparable with the full ones; other settings differ between dots too.")  # fmt: skip
    return f'<p class="note">{note}</p>' + _figures(shown)


def _figures(shown: Mapping[str, tuple[str, str]], look: str = "") -> str:
    drawn = [f"<figcaption>{escape(caption)}</figcaption>{for_page(svg, caption)}" for caption, svg in shown.values()]
    return f'<div class="figures {look}">' + "".join(f"<figure>{figure}</figure>" for figure in drawn) + "</div>"


def pictures(data: ReportData) -> str:
    if not data.pictures:
        return ""
    names = {"winner": f"winner {data.best_trial}".strip(), "worst trial": f"worst trial {data.worst_trial}".strip()}
    lang = f' lang="{escape(data.lang, quote=True)}"'
    cards = []
    for picture in data.pictures:
        kind = "jpeg" if picture.image[:2] == bytes((0xFF, 0xD8)) else "png"
        source = f"data:image/{kind};base64,{base64.b64encode(picture.image).decode()}"
        more = f" (one of {len(picture.references)})" if len(picture.references) > 1 else ""
        hover = escape("\n".join(picture.references), quote=True)
        said = (
            [f'<dt>reference{more}</dt><dd class="r"{lang} title="{hover}">{escape(picture.references[0])}</dd>']
            if picture.references
            else []
        )
        for who, caption in picture.captions.items():
            look = ' class="w"' if who == "winner" else "" if caption else ' class="none"'
            said.append(
                f"<dt{look}>{escape(names.get(who, who))}</dt><dd{look}{lang}>{escape(caption) or 'says nothing'}</dd>"
            )
        small = ' class="small"' if len(picture.image) < 12_000 else ""
        name = escape(picture.image_id, quote=True)
        image = f'<img{small} src="{source}" alt="test picture {name}"><div class="id">{name}</div>'
        cards.append(f'<article class="card"><div>{image}</div><dl>{"".join(said)}</dl></article>')
    note = "Test pictures at even distances through the split: nobody picked them."
    return f'<p class="note">{note}</p><div class="pictures">{"".join(cards)}</div>'


def cost(data: ReportData) -> str:
    spent = {k: v for k, v in data.seconds_by_phase.items() if v > 0}
    if not spent:
        return ""
    total = sum(spent.values())
    colours = {name: PHASE_COLOURS[n % len(PHASE_COLOURS)] for n, name in enumerate(spent)}
    bar = "".join(
        f'<i style="flex:{v / total:.4f};background:{colours[k]}" title="{escape(k)}"></i>' for k, v in spent.items()
    )
    legend = "".join(f'<li><i style="background:{colours[k]}"></i>{escape(k)} {duration(v)} ({v / total:.0%})</li>'
                     for k, v in spent.items())  # fmt: skip
    steps = sum(t.get("steps") or 0 for t in data.trials)
    facts = {
        "total": duration(total),
        "optimiser steps, all trials": f"{steps:,}" if steps else "",
        "of a full grid": f"{steps / (len(data.trials) * data.steps):.0%}" if steps and data.steps else "",
        "peak memory": size(data.peak_memory_bytes) if data.peak_memory_bytes else "",
        "device": data.device,
    }
    return f'<div class="stack">{bar}</div><ul class="legend">{legend}</ul>{pairs(facts)}'


def provenance(data: ReportData) -> str:
    lines = [line for line in (data.command, f"raycap sweep {data.folder}/config.yaml" if data.folder else "") if line]
    signatures = {
        (METRIC_NAMES.get(metric, metric), split, found["signature"])
        for split, variants in data.metrics.items()
        for scored in variants.values()
        for metric, found in scored.items()
        if found.get("signature")
    }
    rows = [
        f'<tr><th scope="row">{escape(metric)}</th><td class="l">{escape(split)}</td>'
        f'<td class="l"><code>{escape(text)}</code></td></tr>'
        for metric, split, text in sorted(signatures)
    ]
    table = (
        scrolled('<th class="l">metric</th><th class="l">split</th><th class="l">signature</th>', rows) if rows else ""
    )
    signed = f"<details><summary>Signatures: how each score was computed</summary>{table}</details>" if rows else ""
    commit = data.commit[:12] + (" with changes that are not committed" if data.dirty else "")
    run = {
        "seed": str(data.seed),
        "commit": commit.strip() if data.commit else "",
        "status": data.status,
        **data.versions,
    }
    return (
        (f"<pre>{escape(chr(10).join(lines))}</pre>" if lines else "")
        + f'<div class="two"><div><h3>Data</h3>{pairs(data.data)}</div><div><h3>Base</h3>{pairs(data.base)}</div>'
        + f"<div><h3>Run</h3>{pairs(run)}</div></div>{signed}"
    )
