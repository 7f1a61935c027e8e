"""The end of a run in a few lines, and the same for machines."""

from __future__ import annotations

from typing import Any

from raycap.report.data import report_sentence
from raycap.report.ledger import REPORT, variant_order
from raycap.report.livetable import duration, number, setting
from raycap.report.runs import Run

SHOWN = {"cider": "CIDEr", "bleu4": "BLEU-4", "meteor": "METEOR", "rouge_l": "ROUGE-L"}


def run_summary(run: Run) -> dict[str, Any]:
    """What `--json` prints of a run."""
    return {
        "name": run.name,
        "status": run.status,
        "folder": run.folder.as_posix(),
        "report": (run.folder / REPORT).as_posix() if (run.folder / REPORT).is_file() else None,
        "best_trial": run.entry.get("best_trial"),
        "sentence": report_sentence(run),
        "metrics": run.metrics,
        "gate": run.gate,
        "seconds": run.entry.get("seconds"),
        "peak_memory_bytes": run.entry.get("peak_memory_bytes"),
        "reason": run.entry.get("reason"),
    }


def text_summary(run: Run) -> str:
    """Where the run is, the numbers that matter, the time it took, and the one honest sentence."""
    lines = [f"{run.name}: {run.status}" + (f" ({run.entry['reason']})" if run.entry.get("reason") else "")]
    if run.best:
        best = run.best
        chosen = f", captions {best['captions']}" if best.get("captions") not in (None, "", "all") else ""
        lines.append(f"  winner   {best['trial_id']} of {len(run.trials)} trials: {setting(best)}{chosen}")
    test = run.metrics.get("test", {})
    for variant in sorted(test, key=variant_order):
        scores = test[variant]
        shown = [f"{label} {number(scores[key]['score'])}" for key, label in SHOWN.items() if key in scores]
        lines.append(f"  {variant:<11} {'  '.join(shown)}")
    if run.gate:
        gate = run.gate
        verdict = "passed" if gate["passed"] else "NOT passed"
        drops = [
            f"{name} {gate[key]:+.2%}{' (a gain)' if gate[key] < 0 else ''}"
            for name, key in (("merged", "drop_merged"), ("nf4", "drop_nf4"))
            if gate.get(key) is not None
        ]
        lines.append(f"  gate     {verdict}: drop of {gate['metric']} on {gate['split']}: {', '.join(drops)}")
    if run.entry.get("seconds"):
        memory = run.entry.get("peak_memory_bytes") or 0
        lines.append(
            f"  took     {duration(run.entry['seconds'])}" + (f", {memory / 2**30:.1f} GiB at most" if memory else "")
        )
    lines.append(f"  folder   {run.folder.as_posix()}")
    if (run.folder / REPORT).is_file():
        lines.append(f"  report   {(run.folder / REPORT).as_posix()}")
    sentence = report_sentence(run)
    return "\n".join([*lines, *(["", sentence] if sentence else [])])
