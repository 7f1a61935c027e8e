"""Sections of report.html beside its tables: verdicts, effects, rungs, pictures, cost, how to reproduce."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from raycap.report.data import ReportData
from raycap.report.effects import first_rung
from raycap.report.ledger import variant_order
from raycap.report.livetable import duration, number
from raycap.report.pictures import KINDS, PROMOTED, WORST, Picture, is_jpeg
from raycap.report.plots import for_page
from raycap.report.tables import METRIC_NAMES, named, pairs, scrolled, size
from raycap.train.choice import Choice

Drawn = Mapping[str, tuple[str, str]]
PHASE_COLOURS = ("var(--accent)", "var(--finished)", "var(--good)", "var(--warn)", "var(--stopped)", "var(--muted)")
LEVEL = 0.05


def verdicts(data: ReportData) -> str:
    """What was compared with what, how it came out, and who else may be the best."""
    parts = []
    if data.verdicts:
        several = any(v.get("p_holm") is not None for v in data.verdicts)
        head = '<th class="l">compared</th><th class="l">verdict</th><th>CIDEr</th><th>p</th>'
        head += "<th>p, Holm</th>" if several else ""
        rows = [_verdict_row(data, v, several) for v in data.verdicts]
        note = (f"Paired bootstrap over groups of images; the 95 % interval is of the difference. The winner was chosen among "
                f"{len(data.trials)} trials on validation and met the test split once.")  # fmt: skip
        if several:
            note += " Holm: p-values of the tests on one split taken together."
        parts.append(f'<p class="note">{note}</p>{scrolled(head, rows)}')
    together = data.separation.get("together") or []
    if data.separation:
        best = escape(str(data.separation.get("best", "")))
        others = [escape(t) for t in together if t != data.separation.get("best")]
        images, how = f"{data.separation.get('images', 0):,} validation images", "a max-T bootstrap on shared resamples"
        if others:
            said = (f"{len(others)} more of {len(data.separation.get('p', {}))} scored trials may be as good as {best} on "
                    f"{images}: {', '.join(others)}. (Multiple comparisons with the best, {how}: the truly best trial is "
                    "among them with 95 %. They are marked in the table.)")  # fmt: skip
        else:
            said = (f"{best} is separated from every other scored trial on {images}. (Multiple comparisons with the best, "
                    f"{how}, at 95 %.)")  # fmt: skip
        parts.append(f'<h3 class="gap">Which trial is the best?</h3><p class="note">{said}</p>')
    parts.append(_settings(data))
    return "".join(parts)


def _verdict_row(data: ReportData, verdict: Mapping[str, Any], several: bool) -> str:
    p, adjusted = verdict.get("p"), verdict.get("p_holm")
    sure = (adjusted if adjusted is not None else 0.0) <= LEVEL
    look, said = outcome(verdict, sure)
    who = data.best_trial if verdict.get("other") == "runner-up" else str(verdict["variant"])
    against = f"runner-up {verdict['against']}" if verdict.get("other") == "runner-up" else str(verdict["against"])
    holm = f"<td>{'' if adjusted is None else number(adjusted, 4)}</td>" if several else ""
    images = f", {verdict['images']:,} images" if verdict.get("images") else ""
    return (
        f"<tr>{named(f'{who} against {against}', str(verdict['split']) + images)}"
        f'<td class="l"><span class="pill {look}">{said}</span></td><td>{difference(verdict)}</td>'
        f"<td>{'' if p is None else number(p, 4)}</td>{holm}</tr>"
    )


def outcome(verdict: Mapping[str, Any], sure: bool = True) -> tuple[str, str]:
    """(look of the pill, words) of an interval."""
    if verdict["low"] > 0 and sure:
        return "good", "better"
    if verdict["high"] < 0 and sure:
        return "bad", "worse"
    return "", "cannot be told apart"


def difference(verdict: Mapping[str, Any]) -> str:
    return f'{verdict["difference"]:+.3f} <span class="se below">[{verdict["low"]:.3f}, {verdict["high"]:.3f}]</span>'


def _settings(data: ReportData) -> str:
    """The verdict on settings, each trained again with other seeds."""
    told = data.settings
    if not told.get("settings"):
        return ""
    first = told["settings"][0]
    head = '<th class="l">setting of</th><th>CIDEr, mean</th><th class="l">of each seed</th><th class="l">against the first</th>'
    head += "<th>difference</th><th>p, Holm</th>"
    rows = []
    for trial in told["settings"]:
        scores = told.get("cider", {}).get(trial, [])
        mean = number(sum(scores) / len(scores)) if scores else "–"
        each = ", ".join(number(s) for s in scores)
        found = told.get("verdicts", {}).get(trial)
        if found:
            # A verdict says how the first setting does against this one; the row speaks of this one.
            turned = {"difference": -found["difference"], "low": -found["high"], "high": -found["low"]}
            look, said = outcome(turned, found.get("p_holm", 0.0) <= LEVEL)
            rest = (f'<td class="l"><span class="pill {look}">{said}</span></td><td>{difference(turned)}</td>'
                    f"<td>{number(found.get('p_holm'), 4)}</td>")  # fmt: skip
        else:
            rest = '<td class="l">–</td><td></td><td></td>'
        mark = ' class="win"' if trial == first else ""
        rows.append(
            f'<tr{mark}><th scope="row">{escape(trial)}</th><td>{mean}</td><td class="l">{each}</td>{rest}</tr>'
        )
    seeds = len(told.get("cider", {}).get(first, []))
    images = told.get("images", 0)
    note = (f"Each setting was trained again with {seeds} other seeds and scored on {images:,} validation images; the bootstrap "
            "draws seeds, then groups of images. Only this speaks of settings: all else is about one adapter.")  # fmt: skip
    return (
        f'<h3 class="gap">Settings over seeds</h3><p class="note">{note} {escape(told.get("sentence", ""))}</p>'
        + scrolled(head, rows)
    )


def curves(data: ReportData, drawn: Drawn) -> str:
    shown = {k: v for k, v in drawn.items() if k.endswith("by-step")}
    table = rungs(data)
    if not shown:
        return table
    colours = [
        ("accent", f"winner {data.best_trial}".strip()),
        ("finished", "trained to the end"),
        ("stopped", "stopped early"),
        ("bad", "diverged or failed"),
    ]
    legend = "".join(f'<li><i style="background:var(--{c})"></i>{escape(text)}</li>' for c, text in colours)
    return f'<ul class="legend">{legend}</ul>' + figures_of(shown, "wide") + table


def rungs(data: ReportData) -> str:
    """How well each rung foretells the end, in a sweep that pruned nothing."""
    found = data.reference
    if not found:
        return ""
    head = '<th class="l">rung</th><th>CIDEr there with CIDEr at the end</th><th>validation loss there</th>'
    head += '<th class="l">halving here</th>'
    rows = []
    for row in found["rows"]:
        told = [_correlation(row.get(key)) for key in ("cider", "val_loss")]
        kept = "keeps the best trial" if row["kept"] else f"loses the best trial, CIDEr −{row['lost']:.3f} at the end"
        name = named(f"step {row['step']:,}", f"{row['share']:.0%} of the steps")
        rows.append(
            f"<tr>{name}<td>{told[0]}</td><td>{told[1]}</td>"
            f'<td class="l">{row["going"]} of {row["trials"]} go on: {kept}</td></tr>'
        )
    trials = found["rows"][0]["trials"]
    where = escape(found["source"])
    if not found["own"]:
        commit = f", commit {escape(found['commit'][:12])}" if found["commit"] else ""
        where = f"a sweep of the same base and images without pruning, kept in <code>{where}</code>{commit}"
    note = (f"Spearman's rank correlation with the CIDEr at the end, 95 % interval from a bootstrap over {trials} trials of "
            f"{found['steps']:,} steps. Measured on {where}: survivors alone would not show it.")  # fmt: skip
    if not found["own"] and data.steps and data.steps != found["steps"]:
        note += f" A trial of this run has {data.steps:,} steps, so its rungs may foretell better or worse."
    return f'<h3 class="gap">Do early rungs foretell the end?</h3><p class="note">{note}</p>{scrolled(head, rows)}'


def _correlation(found: Mapping[str, float] | None) -> str:
    if not found or found["spearman"] != found["spearman"]:
        return "–"
    return f'{found["spearman"]:.2f} <span class="se below">[{found["low"]:.2f}, {found["high"]:.2f}]</span>'


def effects(data: ReportData, drawn: Drawn) -> str:
    dots = {k: v for k, v in drawn.items() if k.startswith("effect-")}
    cells = {k: v for k, v in drawn.items() if k.startswith("heat-")}
    found = first_rung(data.trials, data.select_by)
    if not found or not (dots or cells):
        return ""
    lost = f" {found.missing} did not get there and are missing." if found.missing else ""
    note = (f"All {len(found.trials)} trials at step {found.step:,}, the first rung: what came later was measured on the "
            f"survivors alone, and would flatter whatever they have in common.{lost} A dot is a trial, the bar the mean of a "
            "value or range, with a 95 % interval (Student's t, spread pooled over the values). The other settings differ between "
            "the trials too, so a mean is an average over them; what is best early need not be best at the end.")  # fmt: skip
    return f'<p class="note">{note}</p>' + figures_of(dots) + (figures_of(cells, "wide gap") if cells else "")


def memory(drawn: Drawn) -> str:
    shown = {k: v for k, v in drawn.items() if k.endswith("over-memory")}
    if not shown:
        return ""
    notes = []
    if "trials-over-memory" in shown:
        notes.append("Of each trial, the memory of a GPU that training it alone would take, as predicted.")
    if "cider-over-memory" in shown:
        notes.append("Of each model that was scored, its weights as they are stored; activations and the decoder's cache come "
                     "on top.")  # fmt: skip
    notes.append("What this run took is under Cost.")
    return f'<p class="note">{" ".join(notes)}</p>' + figures_of(shown, "wide")


def figures_of(shown: Drawn, look: str = "") -> str:
    drawn = [f"<figcaption>{escape(caption)}</figcaption>{for_page(svg, caption)}" for caption, svg in shown.values()]
    return f'<div class="figures {look}">' + "".join(f"<figure>{figure}</figure>" for figure in drawn) + "</div>"


def pictures(data: ReportData) -> str:
    """Best, median and worst pictures by the winner's CIDEr, then some that nobody picked."""
    names = {"winner": f"winner {data.best_trial}".strip(), WORST: f"worst trial {data.worst_trial}".strip()}
    names |= {"worst trial": names[WORST]}
    speaker = next((v for v in PROMOTED if any(v in p.captions for p in data.pictures)), "winner")
    return picture_groups(data.pictures, data.lang, speaker, names, KINDS)


def picture_groups(
    shown: Sequence[Picture], lang: str, speaker: str, names: Mapping[str, str], kinds: Mapping[str, str]
) -> str:
    """A heading and cards a kind; pictures without a kind come first, under none."""
    parts = []
    for kind in dict.fromkeys(p.kind for p in shown):
        of_kind = [p for p in shown if p.kind == kind]
        title = (
            f'<h3 class="gap">{escape(kind).capitalize()}</h3><p class="note">{escape(kinds.get(kind, ""))}</p>'
            if kind
            else ""
        )
        cards = "".join(_card(p, lang, speaker, names) for p in of_kind)
        parts.append(f'{title}<div class="pictures">{cards}</div>')
    return "".join(parts)


def _card(picture: Picture, lang: str, speaker: str, names: Mapping[str, str]) -> str:
    kind = "jpeg" if is_jpeg(picture.image) else "png"
    source = f"data:image/{kind};base64,{base64.b64encode(picture.image).decode()}"
    tongue = f' lang="{escape(lang, quote=True)}"'
    count = len(picture.references)
    said = []
    if picture.references:
        rest = "".join(f"<li>{escape(r)}</li>" for r in picture.references[1:])
        more = f"<details><summary>{count - 1} more</summary><ul{tongue}>{rest}</ul></details>" if rest else ""
        said.append(f'<dt>reference</dt><dd class="r"{tongue}>{escape(picture.references[0])}{more}</dd>')
    for caption, whose in _by_caption(picture.captions).items():
        # One score for all who say the same: it depends on the caption alone.
        mine = speaker in whose
        look = ' class="w"' if mine else "" if caption else ' class="none"'
        score = next((picture.scores[w] for w in whose if w in picture.scores), None)
        told = "" if score is None else f' <span class="se">CIDEr {number(score, 2)}</span>'
        who = ", ".join(names.get(w, w) for w in whose)
        said.append(f"<dt{look}>{escape(who)}{told}</dt><dd{look}{tongue}>{escape(caption) or 'says nothing'}</dd>")
    small = ' class="small"' if len(picture.image) < 6_000 and kind == "png" else ""
    name = escape(picture.image_id, quote=True)
    image = f'<img{small} src="{source}" alt="picture {name}"><div class="id">{name}</div>'
    return f'<article class="card"><div>{image}</div><dl>{"".join(said)}</dl></article>'


def _by_caption(captions: Mapping[str, str]) -> dict[str, list[str]]:
    """Caption -> who says it, in the order of the variants."""
    found: dict[str, list[str]] = {}
    for who in sorted(captions, key=variant_order):
        found.setdefault(captions[who], []).append(who)
    return found


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
        "share of training all of them to the end": f"{steps / (len(data.trials) * data.steps):.0%}"
        if steps and data.steps
        else "",
        "training samples, all trials": f"{steps * data.batch:,}" if steps and data.batch else "",
        "training samples a second": f"{steps * data.batch / spent['sweep']:,.0f}"
        if steps and data.batch and "sweep" in spent
        else "",
        "peak memory, all processes": size(data.peak_memory_bytes) if data.peak_memory_bytes else "",
        "vision features": "; ".join(f"{split}: {Choice(**found).line()}" for split, found in data.features.items()),
        "weights": {k: size(v) for k, v in sorted(data.weights_bytes.items(), key=lambda kv: variant_order(kv[0]))},
        "device": data.device,
    }
    return f'<div class="stack">{bar}</div><ul class="legend">{legend}</ul>{pairs(facts)}'


def provenance(data: ReportData) -> str:
    lines = [line for line in (data.command, f"raycap sweep {data.folder}/config.yaml" if data.folder else "") if line]
    note = ("The first line is what was run; the second runs the same resolved settings again, into a new folder. With the data, "
            "base and versions below, the trials, their samples and the order of these are the same.")  # fmt: skip
    commit = data.commit[:12] + (" with changes that are not committed" if data.dirty else "")
    run = {
        "seed": str(data.seed),
        "commit": commit.strip() if data.commit else "",
        "status": data.status,
        **data.versions,
    }
    return (
        (f'<p class="note">{note}</p><pre>{escape(chr(10).join(lines))}</pre>' if lines else "")
        + f'<div class="two"><div><h3>Data</h3>{pairs(data.data)}</div><div><h3>Base</h3>{pairs(data.base)}</div>'
        + f"<div><h3>Run</h3>{pairs(run)}</div></div>{signatures(data.metrics)}"
    )


def signatures(metrics: Mapping[str, Any]) -> str:
    """metrics[split][variant][metric]: a row a metric and split, folded away."""
    found = {
        (METRIC_NAMES.get(metric, metric), split, score["signature"])
        for split, variants in metrics.items()
        for scored in variants.values()
        for metric, score in scored.items()
        if score.get("signature")
    }
    rows = [
        f'<tr><th scope="row">{escape(metric)}</th><td class="l">{escape(split)}</td>'
        f'<td class="l"><code>{escape(text)}</code></td></tr>'
        for metric, split, text in sorted(found)
    ]
    if not rows:
        return ""
    table = scrolled('<th class="l">metric</th><th class="l">split</th><th class="l">signature</th>', rows)
    return f"<details><summary>Signatures: how each score was computed</summary>{table}</details>"
