"""Several runs side by side: report.html, metrics.csv, comparison.json, plots as SVG and PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import raycap
from raycap.errors import RunError
from raycap.evaluate.signature import differences
from raycap.files import write_atomic, write_json
from raycap.report.charts import Chart, Draw, intervals, over_memory, spread
from raycap.report.ledger import CONFIG, METRIC_COLUMNS, METRICS, REPORT, csv_text, metric_rows, variant_order
from raycap.report.livetable import duration, number
from raycap.report.page import page
from raycap.report.pictures import Picture, choose, cider_by_image, read_images
from raycap.report.plots import BAD, CURVE_IN, FINISHED, INK, MUTED, WINNER, figure, known, png, points_of
from raycap.report.provenance import weights_bytes
from raycap.report.runs import Run
from raycap.report.sections import difference, figures_of, outcome, picture_groups, signatures
from raycap.report.tables import METRIC_NAMES, named, scrolled, size

COMPARISON = "comparison.json"
KINDS = {
    "best": "where {other} gains most over {first}",
    "median": "where half of the pictures gain more",
    "worst": "where {other} loses most against {first}",
}
LINES = ((WINNER, "-"), (BAD, "-"), (INK, "--"), (FINISHED, "-"), (MUTED, ":"), (WINNER, ":"), (BAD, "--"), (INK, ":"))


def write_comparison(out: Path | str, runs: Sequence[Run], found: Mapping[str, Any], command: str = "") -> Path:
    """The report of what `raycap compare` found, into the folder `out`; an earlier comparison there is replaced.

    Raises:
        RunError: a run lies in `out`.
    """
    out = Path(out)
    if (out / CONFIG).exists():
        raise RunError(f"{out} holds a run: a comparison would overwrite its report. Choose another folder with --out")
    names = labels(runs)
    rows = [{"run": name, **row} for name, run in zip(names, runs) for row in metric_rows(run.metrics)]
    charts = _charts(runs, names, found)
    drawn = {}
    for name, (caption, draw, size_in) in charts.items():
        drawn[name] = (caption, figure(draw, size_in))
        write_atomic(out / "plots" / f"{name}.svg", drawn[name][1])
        write_atomic(out / "plots" / f"{name}.png", png(draw, size_in))
    write_atomic(out / METRICS, csv_text(("run", *METRIC_COLUMNS), rows))
    write_json(out / COMPARISON, {**found, "command": command})
    return write_atomic(out / REPORT, render(runs, found, drawn, _pictures(runs, names, found), command))


def labels(runs: Sequence[Run]) -> list[str]:
    """Short names that tell the runs apart: the folder's, as much of its path as it takes, and a number at the last."""
    paths = [run.folder.absolute().parts for run in runs]
    for depth in range(1, max(map(len, paths)) + 1):
        names = ["/".join(p[-depth:]) for p in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{p[-1]} ({n})" for n, p in enumerate(paths, start=1)]


def render(
    runs: Sequence[Run],
    found: Mapping[str, Any],
    drawn: Mapping[str, tuple[str, str]],
    pictures: Sequence[Picture] = (),
    command: str = "",
) -> str:
    """The page as text, from what `raycap compare` found."""
    names = labels(runs)
    other = names[_furthest(found)]
    kinds = {kind: text.format(first=names[0], other=other) for kind, text in KINDS.items()}
    langs = [run.config.get("evaluate", {}).get("lang", "en") for run in runs]
    parts = [
        ("verdicts", "Verdicts", _verdicts(names, found, drawn)),
        ("scores", "Scores", _scores(runs, names, found)),
        ("curves", "Learning curves of the winners", _shown(drawn, "winners-by-step")),
        ("memory", "CIDEr over memory", _shown(drawn, "score-over-memory", "score-over-weights")),
        ("cost", "Cost", _cost(runs, names)),
        ("settings", "Settings that differ", _settings(runs, names)),
        ("pictures", "Pictures", picture_groups(pictures, langs[0], other, {}, kinds) if pictures else ""),
        ("provenance", "How to reproduce", _provenance(runs, command, found)),
    ]
    shown = [(key, title, body) for key, title, body in parts if body]
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in shown)
    body = "\n".join(f'<section id="{key}"><h2>{title}</h2>{text}</section>' for key, title, text in shown)
    title = f"{names[0]} against {names[1]}" if len(names) == 2 else f"{len(names)} runs"
    said = " ".join(f"{row['sentence']}." for row in found["runs"][1:4])
    more = f" And {len(names) - 4} more runs." if len(names) > 4 else ""
    # The longest first: one folder's name may begin with another's.
    for row, name in sorted(zip(found["runs"], names), key=lambda pair: -len(pair[0]["run"])):
        said = said.replace(row["run"], name)
    header = (
        f'<p class="kicker">raycap compare · {escape(found["variant"])} captions on {found["images"]:,} '
        f"{escape(found['split'])} images that all runs have</p><h1>{escape(title)}</h1>"
        f'<p class="lead">{escape(said + more)}</p><nav>{links}</nav>'
    )
    footer = f"Made by raycap {escape(raycap.__version__)}. Loads nothing from outside."
    return page(f"{title} · raycap", header, body, footer)


def _verdicts(names: Sequence[str], found: Mapping[str, Any], drawn: Mapping[str, tuple[str, str]]) -> str:
    metric = METRIC_NAMES.get(found["metric"], found["metric"])
    head = (
        f'<th class="l">run</th><th>{escape(metric)}</th><th class="l">verdict</th><th>against {escape(names[0])}</th>'
    )
    head += "<th>p</th><th>p, Holm</th>"
    rows = []
    for n, (name, row) in enumerate(zip(names, found["runs"])):
        cells = f"<td>{number(row['score'], 4)}</td>"
        if n:
            look, said = outcome(row, row["p_holm"] <= 0.05)
            cells += f'<td class="l"><span class="pill {look}">{said}</span></td><td>{difference(row)}</td>'
            cells += f"<td>{number(row['p'], 4)}</td><td>{number(row['p_holm'], 4)}</td>"
        else:
            cells += '<td class="l">the first</td><td></td><td></td><td></td>'
        rows.append(f"<tr>{named(name, '')}{cells}</tr>")
    note = (
        "Paired bootstrap on the images that all runs have, whole groups drawn; all scored anew by one scale. Holm: p-values "
        "of all runs against the first taken together. A verdict is about these adapters, not about their settings."
    )
    warned = "".join(f"<li>{escape(text)}</li>" for text in found["warnings"])
    warned = f'<ul class="note">{warned}</ul>' if warned else ""
    return f'<p class="note">{note}</p>{warned}{scrolled(head, rows)}' + _shown(drawn, "differences")


def _scores(runs: Sequence[Run], names: Sequence[str], found: Mapping[str, Any]) -> str:
    """Stored scores; one that was not computed as the first run's was is not put beside it."""
    split, variants = found["split"], ("zero-shot", found["variant"], "merged-nf4")
    rows_of = [(n, run, v) for n, run in enumerate(runs) for v in sorted(set(variants), key=variant_order)
               if v in run.metrics.get(split, {})]  # fmt: skip
    metrics = [m for m in ("cider", *(m for m in METRIC_NAMES if m != "cider")) if any(
        m in run.metrics[split][v] for _, run, v in rows_of)]  # fmt: skip
    if not metrics:
        return ""
    head = '<th class="l">run and variant</th>' + "".join(f"<th>{METRIC_NAMES[m]}</th>" for m in metrics)
    head += "<th>weights</th>"
    scale: dict[str, str] = {}
    rows, apart = [], False
    for n, run, variant in rows_of:
        cells = ""
        for metric in metrics:
            score = run.metrics[split][variant].get(metric, {})
            mine = score.get("signature", "")
            if known(score.get("score")) and differences(scale.setdefault(metric, mine), mine):
                apart = True
                cells += (
                    '<td><span class="pill warn" title="not computed as the first run\'s was">other scale</span></td>'
                )
            else:
                cells += f"<td>{number(score.get('score'))}</td>"
        stored = _weights(run).get(variant)
        mark = ' class="win"' if variant == found["variant"] else ""
        rows.append(
            f"<tr{mark}>{named(names[n], variant, keep=True)}{cells}<td>{size(stored) if stored else ''}</td></tr>"
        )
    note = f"As each run stored them on {escape(split)}; every split, variant and metric is in metrics.csv."
    note += " Scores of another signature are left out here." if apart else ""
    return f'<p class="note">{note}</p>{scrolled(head, rows)}'


def _cost(runs: Sequence[Run], names: Sequence[str]) -> str:
    head = '<th class="l">run</th><th>time</th><th>of it training</th><th>peak memory</th><th>trials</th>'
    head += "<th>optimiser steps</th><th>training samples</th>"
    rows = []
    for name, run in zip(names, runs):
        entry = run.entry
        steps = sum(t.get("steps") or 0 for t in run.trials)
        memory = entry.get("peak_memory_bytes")
        training = entry.get("seconds_by_phase", {}).get("sweep")
        cells = [duration(entry.get("seconds")), duration(training), size(memory) if memory else "–", str(len(run.trials)),
                 f"{steps:,}", f"{steps * run.config.get('train', {}).get('batch', 0):,}"]  # fmt: skip
        rows.append(f"<tr>{named(name, entry.get('device', ''))}{''.join(f'<td>{escape(c)}</td>' for c in cells)}</tr>")
    return scrolled(head, rows)


def _settings(runs: Sequence[Run], names: Sequence[str]) -> str:
    flat = [_flat({k: v for k, v in run.config.items() if k != "run"}) for run in runs]
    keys = [k for k in dict.fromkeys(k for f in flat for k in f) if len({repr(f.get(k)) for f in flat}) > 1]
    seeds = {run.config.get("run", {}).get("seed") for run in runs}
    if len(seeds) > 1:
        keys.insert(0, "run.seed")
        for own, run in zip(flat, runs):
            own["run.seed"] = run.config.get("run", {}).get("seed")
    if not keys:
        return '<p class="note">None: the runs differ in nothing that was set.</p>'
    head = '<th class="l">setting</th>' + "".join(f'<th class="l">{escape(n)}</th>' for n in names)
    rows = [
        f'<tr><th scope="row">{escape(key)}</th>'
        + "".join(f'<td class="l wrap">{escape(_value(own.get(key)))}</td>' for own in flat)
        + "</tr>"
        for key in keys
    ]
    return scrolled(head, rows)


def _provenance(runs: Sequence[Run], command: str, found: Mapping[str, Any]) -> str:
    lines = [command, *(run.entry.get("command", "") for run in runs)]
    code = escape("\n".join(line for line in lines if line))
    merged: dict[str, Any] = {}
    for n, run in enumerate(runs):
        for split, variants in run.metrics.items():
            merged.setdefault(split, {}).update({f"{n}.{v}": scored for v, scored in variants.items()})
    note = f"Compared by <code>{escape(found['signature'])}</code>."
    return f'<p class="note">{note}</p><pre>{code}</pre>{signatures(merged)}'


def _charts(runs: Sequence[Run], names: Sequence[str], found: Mapping[str, Any]) -> dict[str, Chart]:
    metric = METRIC_NAMES.get(found["metric"], found["metric"])
    told = [{**row, "name": name} for name, row in zip(names, found["runs"])][1:]
    finite = [row for row in told if math.isfinite(row["low"]) and math.isfinite(row["high"])]
    charts: dict[str, Chart] = {}
    if finite:
        charts["differences"] = intervals(
            finite, f"{metric} against {names[0]}, 95 % intervals", f"difference in {metric}"
        )
    lines = [(name, points_of(run.best, "cider")) for name, run in zip(names, runs) if run.best]
    if any(len(points) > 1 for _, points in lines):
        charts["winners-by-step"] = ("Validation CIDEr of each run's winner", _lines(lines), CURVE_IN)
    scores = [row["score"] for row in found["runs"]]
    memory = [(name, run.entry.get("peak_memory_bytes") or 0, s) for name, run, s in zip(names, runs, scores)]
    if all(m for _, m, _ in memory):
        charts["score-over-memory"] = over_memory(
            memory, f"{metric} over peak memory of the run", "peak memory", metric
        )
    stored = [(name, _weights(run).get(found["variant"], 0), s) for name, run, s in zip(names, runs, scores)]
    if all(w for _, w, _ in stored):
        charts["score-over-weights"] = over_memory(stored, f"{metric} over the weights' memory", "weights", metric)
    return charts


def _lines(lines: Sequence[tuple[str, Sequence[tuple[float, float]]]]) -> Draw:
    """A line a run, its name at its end."""

    def draw(axes: Any) -> None:
        there = [(name, points) for name, points in lines if points]
        high = max(v for _, points in there for _, v in points)
        low = min(v for _, points in there for _, v in points)
        last = max(s for _, points in there for s, _ in points)
        places = spread([points[-1][1] for _, points in there], 0.09 * ((high - low) or 1.0))
        for n, ((name, points), at) in enumerate(zip(there, places)):
            colour, style = LINES[n % len(LINES)]
            axes.plot(*zip(*points), color=colour, linestyle=style, linewidth=1.6, marker="o", markersize=3)
            axes.annotate(name if len(name) <= 24 else f"{name[:23]}…", points[-1], (1.04 * last, at), fontsize=8.5,
                          color=colour if colour in (WINNER, BAD, INK) else MUTED, va="center")  # fmt: skip
        axes.set_xlim(0, last * 1.55)  # room for the names
        axes.set_xlabel("optimiser step")
        axes.set_ylabel("CIDEr")

    return draw


def _pictures(runs: Sequence[Run], names: Sequence[str], found: Mapping[str, Any]) -> list[Picture]:
    split, variant = found["split"], found["variant"]
    rows = [{r["image_id"]: r for r in run.predictions(split, variant)} for run in runs]
    shared = [i for i in rows[0] if all(i in other for other in rows[1:])]
    references = {i: list(rows[0][i]["references"]) for i in shared}
    captions = {name: {i: own[i]["caption"] for i in shared} for name, own in zip(names, rows)}
    scores = cider_by_image(captions, references, runs[0].config.get("evaluate", {}).get("lang", "en"))
    first, other = scores[names[0]], scores[names[_furthest(found)]]
    chosen = choose({i: other[i] - first[i] for i in shared})
    for run in runs:  # whichever run's shards are still here
        if pictures := read_images(run, split, chosen, captions, references, scores):
            return pictures
    return []


def _furthest(found: Mapping[str, Any]) -> int:
    """The run whose score is furthest from the first's."""
    return max(range(1, len(found["runs"])), key=lambda n: abs(found["runs"][n]["difference"]))


def _weights(run: Run) -> dict[str, int]:
    return run.entry.get("weights_bytes") or weights_bytes(run.folder, run.config)


def _shown(drawn: Mapping[str, tuple[str, str]], *names: str) -> str:
    shown = {name: drawn[name] for name in names if name in drawn}
    return figures_of(shown, "wide gap") if shown else ""


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        found.update(_flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value})
    return found


def _value(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return "–" if value in (None, "", [], {}) else text if len(text) <= 60 else f"{text[:59]}…"
