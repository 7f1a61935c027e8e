"""The tables of report.html: scores, gate, trials. Everything that a run or a person wrote is escaped here."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from raycap.report.data import ReportData
from raycap.report.ledger import variant_order
from raycap.report.livetable import duration, number, sci

METRIC_NAMES = {
    "bleu1": "BLEU-1", "bleu2": "BLEU-2", "bleu3": "BLEU-3", "bleu4": "BLEU-4", "meteor": "METEOR",
    "rouge_l": "ROUGE-L", "cider": "CIDEr",
}  # fmt: skip
VARIANT_NOTES = {
    "constant": "the most frequent training caption, for every picture",
    "zero-shot": "the base as it was, same prompt and decoding",
    "default": "the preset's own settings, trained to the end",
    "adapter": "the winner on the quantised base",
    "merged": "the winner folded into 16-bit weights",
    "merged-nf4": "merged, then quantised again",
    "served": "the promoted model's answers over HTTP",
}
_PLACE = r"(?:cider|val_loss) \S+ (at step \d+): (place \d+ of \d+(?: that cannot win)?), one in \d+ goes on$"
STATE_LOOK = {"finished": "good", "diverged": "bad", "failed": "bad", "running": "warn", "judged": "warn"}


def scores(data: ReportData) -> str:
    """A table a split: variants by metrics, and CIDEr's paired interval against zero-shot."""
    tables = []
    splits = sorted(data.metrics, key=lambda split: (split != "test", split != "val", split))
    for split in splits:
        variants = sorted(data.metrics[split], key=variant_order)
        known = {m for v in variants for m in data.metrics[split][v]}
        names = [m for m in METRIC_NAMES if m in known and m != "cider"] + sorted(known - set(METRIC_NAMES))
        verdicts = {v["variant"]: v for v in data.verdicts if _against_start(v, split)}
        top = max((score_of(data, split, v, "cider") or 0.0 for v in variants), default=0.0)
        weighed = split == "test" and bool(data.weights_bytes)
        # CIDEr first: it picks the winner, and on a phone it is what fits beside the name.
        head = '<th class="l">variant</th>' + ("<th>CIDEr</th>" if "cider" in known else "")
        head += "<th>against zero-shot</th>" if verdicts else ""
        head += "".join(f"<th>{escape(METRIC_NAMES.get(m, m))}</th>" for m in names)
        head += "<th>weights</th>" if weighed else ""
        rows = []
        for variant in variants:
            found = data.metrics[split][variant]
            cells = _score_cell(found.get("cider"), "cider", top) if "cider" in known else ""
            cells += f"<td>{_interval(verdicts.get(variant))}</td>" if verdicts else ""
            cells += "".join(_score_cell(found.get(m), m, top) for m in names)
            if weighed:
                cells += f"<td>{size(data.weights_bytes[variant]) if variant in data.weights_bytes else ''}</td>"
            mark = ' class="win"' if variant == top_score(data)[0] and split == "test" else ""
            fallen = (data.collapse.get(variant) or {}) if split == "test" and variant != "constant" else {}
            tag, what = "", VARIANT_NOTES.get(variant, "")
            if fallen.get("collapsed"):
                pill, sign = _collapsed(fallen)
                tag, what = f" {pill}", "; ".join(filter(None, [what, sign]))
            rows.append(f"<tr{mark}>{named(variant, what, tag)}{cells}</tr>")
        images = next((v["images"] for v in verdicts.values() if v.get("images")), None)
        images = images or (data.data.get("counts") or {}).get(split)
        title = f"{escape(split)}{f', {images:,} images' if images else ''}"
        tables.append(f"<h3>{title}</h3>{scrolled(head, rows)}")
    if not tables:
        return ""
    note = ("The winner meets the test split once, beside the base it started from and the floor that any captioner "
            "has to clear. Intervals are 95 %, from a bootstrap over pairs of captions of the same image.")  # fmt: skip
    return f'<p class="note">{note}</p>' + '<div style="height:18px"></div>'.join(tables)


def _against_start(verdict: Mapping[str, Any], split: str) -> bool:
    compared = (verdict["split"], verdict["against"], verdict.get("metric", "cider"))
    return compared == (split, "zero-shot", "cider")


def gate(data: ReportData) -> str:
    found = data.gate
    if not found:
        return ""
    passed = bool(found["passed"])
    kept_dequantised = found.get("merged_dequantised") is not None and found["merged_dequantised"] >= found["merged"]
    kept_drop = found["drop_merged"]
    rows_of = [
        ("adapter", found["adapter"], None, "on the base it was trained on"),
        ("merged", found["merged"], None if kept_dequantised else kept_drop, "folded into the original weights"),
        ("merged, dequantised", found.get("merged_dequantised"), kept_drop if kept_dequantised else None,
         "folded into the dequantised weights"),
        ("merged-nf4", found["merged_nf4"], found["drop_nf4"], "each quantised again, the better of the two"),
    ]  # fmt: skip
    kept = "merged, dequantised" if kept_dequantised else "merged"
    rows = []
    for name, score, drop, what in rows_of:
        if score is None:
            continue
        tag = ' <span class="pill">kept</span>' if name == kept else ""
        dropped = "" if drop is None else f"{drop:+.2%}" + (' <span class="se">(a gain)</span>' if drop < 0 else "")
        rows.append(f"<tr>{named(name, what, tag)}<td>{number(score, 4)}</td><td>{dropped}</td></tr>")
    look, verdict = ("good", "passed") if passed else ("bad", "not passed: nothing is served")
    pill = f'<span class="pill {look}">{verdict}</span>'
    metric = METRIC_NAMES.get(found["metric"], found["metric"])
    note = (f"Each step from adapter to served model is scored again on {escape(found['split'])}. A drop of more than "
            f"{found['max_drop']:.1%} from the adapter stops promotion. {pill}")  # fmt: skip
    head = f'<th class="l">model</th><th>{escape(metric)}</th><th>drop</th>'
    return f'<p class="note">{note}</p>' + scrolled(head, rows)


def trials(data: ReportData) -> str:
    """Sortable; best first."""
    if not data.trials:
        return ""
    ordered = sorted(data.trials, key=lambda t: -(t["cider"] if _finite(t.get("cider")) else -1.0))
    weighed = any(t.get("memory_bytes") for t in ordered)
    # As wide as the best one's interval, so that no bar's end is cut.
    top = max((t["cider"] + 1.96 * (t["cider_se"] if _finite(t.get("cider_se")) else 0.0) for t in ordered
               if _finite(t.get("cider"))), default=0.0)  # fmt: skip
    columns = (
        *(("trial", "l", ""), ("state", "l", ""), ("CIDEr", "", "descending"), ("note", "l", ""), ("rank", "", "")),
        *(("alpha", "", ""), ("scale", "", ""), ("lr", "", ""), ("dropout", "", ""), ("steps", "", "descending")),
        *(("val loss", "", ""), ("time", "", "descending"), *((("memory", "", ""),) if weighed else ())),
    )
    head = ""
    for name, side, first in columns:
        sort = ' aria-sort="descending"' if name == "CIDEr" else ""
        attributes = (f' class="{side}"' if side else "") + (f' data-first="{first}"' if first else "") + sort
        head += f'<th{attributes}><button type="button">{name}</button></th>'
    rows = [_trial_row(data, t, top, weighed) for t in ordered]
    states = ", ".join(f"{n} {s}" for s, n in Counter(t["state"] for t in data.trials).most_common())
    collapsed = sum(bool((t.get("collapse") or {}).get("collapsed")) for t in data.trials)
    note = f"{states}. CIDEr ± its standard error on validation images, at each trial's best rung; the line on a bar is 95 %."
    if len(data.separation.get("together") or ()) > 1:
        note += " The bar at the left marks the trials that cannot be told apart from the best."
    if collapsed:
        note += (
            f" {collapsed} collapsed, whatever the score says: the note has the first sign and the number of others."
        )
    tall = " tall" if len(rows) > 20 else ""
    return f'<p class="note">{note}</p>' + scrolled(head, rows, f"sortable{tall}")


def _trial_row(data: ReportData, t: Mapping[str, Any], top: float, weighed: bool) -> str:
    best = t["trial_id"] == data.best_trial
    together = bool(t.get("not_separable")) or t["trial_id"] in (data.separation.get("together") or ())
    pill = f'<span class="pill {STATE_LOOK.get(t["state"], "")}">{escape(t["state"])}</span>'
    collapse = t.get("collapse") or {}
    notes, said = [], []
    if best:
        notes.append('<span class="pill win">winner</span>')
    elif together:
        p = (data.separation.get("p") or {}).get(t["trial_id"])
        told = f" (max-T p {number(p)})" if _finite(p) else ""
        notes.append(f'<span class="pill near">not separable from the best{told}</span>')
    if t["trial_id"] == "default":
        said.append("the preset's own settings, never pruned")
    if t["trial_id"] == data.worst_trial and len(data.trials) > 1:
        notes.append('<span class="pill">worst</span>')
    if collapse.get("collapsed"):
        mark, sign = _collapsed(collapse)
        notes.append(mark)
        said.append(escape(sign))
    if short := _short(t.get("reason") or ""):
        said.append(f'<span title="{escape(t["reason"], quote=True)}">{escape(short)}</span>')
    notes.append("; ".join(filter(None, said)))
    cider = "–"
    if _finite(t.get("cider")):
        se = f' <span class="se">± {number(t["cider_se"])}</span>' if _finite(t.get("cider_se")) else ""
        cider = _meter(t["cider"], top, t.get("cider_se")) + number(t["cider"]) + se
    looks = ["win"] if best else ["dim"] if t["state"] == "stopped" else []
    looks += ["near"] if together else []
    row = f' class="{" ".join(looks)}"' if looks else ""
    cells = (
        (t["rank"], str(t["rank"])),
        (t["alpha"], f"{t['alpha']:g}"),
        (t["scale"], f"{t['scale']:g}"),
        (t["lr"], sci(t["lr"])),
        (t["dropout"], f"{t['dropout']:g}"),
        (t["steps"], f"{t['steps']:,}"),
        (t.get("val_loss"), number(t.get("val_loss"))),
        (t.get("seconds"), duration(t.get("seconds"))),
        *(((t.get("memory_bytes"), size(t["memory_bytes"]) if t.get("memory_bytes") else "–"),) if weighed else ()),
    )
    return (
        f'<tr{row}><th scope="row">{escape(t["trial_id"])}</th><td class="l">{pill}</td>'
        # Before what scrolls out of a narrow window: why a trial is where it is.
        + _cell(t.get("cider"), cider)
        + f'<td class="l note">{" ".join(notes)}</td>'
        + "".join(_cell(value, text) for value, text in cells)
        + "</tr>"
    )


def _collapsed(collapse: Mapping[str, Any]) -> tuple[str, str]:
    """(A mark that names all signs where the pointer rests, the first sign and how many there are more)."""
    signs = [str(sign) for sign in collapse.get("reasons") or ()]
    more = f" (+{len(signs) - 1})" if len(signs) > 1 else ""
    pill = f'<span class="pill warn" title="{escape("; ".join(signs), quote=True)}">collapsed</span>'
    return pill, f"{signs[0]}{more}" if signs else ""


def _short(reason: str) -> str:
    """A scheduler's reason without what other columns and marks say; any other as it is."""
    told = []
    for clause in reason.split("; "):
        found = re.match(_PLACE, clause)
        if found:
            told.append(f"{found[2]} {found[1]}")
        elif not clause.startswith("its captions have collapsed"):
            told.append(clause)
    return "; ".join(told)


def named(name: str, note: str, tag: str = "", *, keep: bool = False) -> str:
    """A row's head; its note is left out on a phone, unless `keep`."""
    look = ' class="keep"' if keep else ""
    return f'<th scope="row">{escape(name)}{tag}<small{look}>{escape(note)}</small></th>'


def scrolled(head: str, rows: Sequence[str], look: str = "") -> str:
    tall = " tall" if "tall" in look else ""
    name = f' class="{look.replace(" tall", "")}"' if look else ""
    table = f"<table{name}><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="scroll{tall}" tabindex="0">{table}</div>'


def pairs(facts: Mapping[str, Any]) -> str:
    rows = []
    for key, value in facts.items():
        if value in ("", None, {}, []):
            continue
        if isinstance(value, Mapping):
            value = ", ".join(f"{k} {v:,}" if isinstance(v, int) else f"{k} {v}" for k, v in value.items())
        rows.append(
            f"<dt>{escape(str(key))}</dt><dd>{escape(f'{value:,}' if isinstance(value, int) else str(value))}</dd>"
        )
    return f'<dl class="kv">{"".join(rows)}</dl>'


def _score_cell(found: Mapping[str, Any] | None, metric: str, top: float) -> str:
    if not found or not _finite(found.get("score")):
        return "<td>–</td>"
    meter = _meter(found["score"], top) if metric == "cider" else ""
    return f"<td>{meter}{number(found['score'])}</td>"


def _interval(verdict: Mapping[str, Any] | None) -> str:
    if verdict is None:
        return ""
    return f'{verdict["difference"]:+.3f} <span class="se below">[{verdict["low"]:.3f}, {verdict["high"]:.3f}]</span>'


def _meter(value: float, top: float, error: float | None = None) -> str:
    """A bar; with a standard error also its 95 % interval, drawn over it."""

    def share(of: float) -> float:
        return max(0.0, min(1.0, of / top)) if top > 0 else 0.0

    whisker = ""
    if _finite(error) and error:
        low, high = share(value - 1.96 * error), share(value + 1.96 * error)
        whisker = f'<b style="left:{low:.1%};width:{high - low:.1%}"></b>'
    return f'<span class="meter"><i style="width:{share(value):.1%}"></i>{whisker}</span>'


def _cell(value: Any, text: str) -> str:
    raw = f"{value:.10g}" if _finite(value) else ""
    return f'<td data-v="{raw}">{text}</td>'


def top_score(data: ReportData) -> tuple[str, float | None]:
    for variant in ("served", "merged", "merged-nf4", "adapter"):
        score = score_of(data, "test", variant, "cider")
        if score is not None:
            return variant, score
    return "", None


def score_of(data: ReportData, split: str, variant: str, metric: str) -> float | None:
    return data.metrics.get(split, {}).get(variant, {}).get(metric, {}).get("score")


def size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
