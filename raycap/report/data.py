"""What a report says, as plain values: filled by the pipeline, or read back from a run folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raycap.report.pictures import PROMOTED, Picture, pictures_of, read_pictures
from raycap.report.provenance import weights_bytes
from raycap.report.rungs import reference_of
from raycap.report.runs import Run
from raycap.report.tokens import token_line


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportData:
    """Everything on the page. What is empty or None is left out of it."""

    name: str
    status: str = "finished"
    sentence: str = ""
    """The one honest sentence at the top; `headline` writes one from the verdicts."""
    command: str = ""
    folder: str = ""
    written: str = ""
    """When, UTC, ISO 8601."""
    seed: int = 0
    select_by: str = "cider"
    steps: int = 0
    """A trial's full budget."""
    batch: int = 0
    """Images of an optimiser step."""
    eta: int = 0
    lang: str = "en"
    best_trial: str = ""
    worst_trial: str = ""
    space: tuple[str, ...] = ()
    """Settings that the sweep varied, as `tune.space` names them; empty where that is not known."""
    trials: list[dict[str, Any]] = field(default_factory=list)
    """TrialRecord.to_dict() of each."""
    metrics: dict[str, dict[str, dict[str, dict[str, Any]]]] = field(default_factory=dict)
    """[split][variant][metric] -> {"score", "signature"}, as in run.json."""
    verdicts: list[dict[str, Any]] = field(default_factory=list)
    """Paired bootstraps, {"split", "metric", "variant", "against", "difference", "low", "high", "p", "images",
    "sentence"} each. `variant` and `against` are variants or trial ids; the difference is variant - against.
    """
    separation: dict[str, Any] = field(default_factory=dict)
    """The trials that cannot be told apart from the best: best, together [ids], p {id: p}, split, images."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The verdict on settings over other seeds, where `tune.confirm_seeds` asked for it (raycap/pipeline/confirm.py)."""
    reference: dict[str, Any] | None = None
    """What a sweep without pruning says of the rungs (raycap/report/rungs.py)."""
    gate: dict[str, Any] | None = None
    """gate.json."""
    pictures: list[Picture] = field(default_factory=list)
    collapse: dict[str, Any] = field(default_factory=dict)
    """Signs of collapse of each variant on test."""
    seconds: float = 0.0
    seconds_by_phase: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    weights_bytes: dict[str, int] = field(default_factory=dict)
    """Variant -> size of its weights as they are stored."""
    features: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By split, whether vision features were kept on disk, and the figures behind it."""
    device: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    """Facts of the data in the order to show: counts, what was dropped, hashes."""
    base: dict[str, Any] = field(default_factory=dict)
    """Facts of the base: path, quantisation, parameters, hash."""
    versions: dict[str, str] = field(default_factory=dict)
    commit: str = ""
    dirty: bool = False


def report_data(run: Run) -> ReportData:
    """The report of a run folder, from its files alone."""
    entry, config = run.entry, run.config
    train, model, data, tune = (config.get(s, {}) for s in ("train", "model", "data", "tune"))
    facts = {k: v for k, v in entry.get("data", {}).items() if k != "folder"}  # a cache's path tells a reader nothing
    if tokens := facts.get("tokens"):
        facts["tokens"] = "; ".join(f"{split}: {token_line(counts)}" for split, counts in tokens.items())
    told = entry.get("verdicts") or {}
    values: dict[str, Any] = {
        "name": run.name,
        "status": run.status,
        "sentence": report_sentence(run),
        "command": entry.get("command", ""),
        "folder": run.folder.as_posix(),
        "written": entry.get("written", ""),
        "seed": config.get("run", {}).get("seed", 0),
        "select_by": train.get("select_by", "cider"),
        "steps": train.get("steps", 0),
        "batch": train.get("batch", 0),
        "eta": tune.get("eta", 0) if tune.get("scheduler", "asha") == "asha" else 0,
        "lang": config.get("evaluate", {}).get("lang", "en"),
        "best_trial": entry.get("best_trial", ""),
        "worst_trial": entry.get("worst_trial") or worst_trial(run.trials),
        "space": tuple(tune.get("space") or ()),
        "trials": run.trials,
        "metrics": run.metrics,
        "verdicts": verdict_list(told),
        "separation": told.get("separation", {}) if isinstance(told, Mapping) else {},
        "settings": told.get("settings", {}) if isinstance(told, Mapping) else {},
        "reference": reference_of(run),
        "gate": run.gate,
        "pictures": read_pictures(run.folder) or pictures_of(run),
        "collapse": entry.get("collapse", {}),
        "seconds": entry.get("seconds", 0.0),
        "seconds_by_phase": entry.get("seconds_by_phase", {}),
        "peak_memory_bytes": entry.get("peak_memory_bytes", 0),
        "weights_bytes": entry.get("weights_bytes") or weights_bytes(run.folder, config),
        "features": entry.get("features") or {},
        "device": entry.get("device", ""),
        "data": {"source": data.get("source", ""), **facts, "sha256": entry.get("data_sha256", "")},
        "base": {"model": model.get("path", ""), "family": model.get("family", ""),
              "quantisation": model.get("quantisation", ""), "sha256": entry.get("base_sha256", "")},
        "versions": entry.get("versions", {}),
        "commit": entry.get("commit", ""),
        "dirty": entry.get("dirty", False),
    }  # fmt: skip
    return ReportData(**values)


def report_sentence(run: Run) -> str:
    """The run's own sentence, or one from its verdicts."""
    verdicts = verdict_list(run.entry.get("verdicts") or {})
    return run.entry.get("sentence") or headline(run.metrics, verdicts, run.entry.get("best_trial", ""))


def headline(
    metrics: Mapping[str, Any], verdicts: Sequence[Mapping[str, Any]], best_trial: str = "", *, split: str = "test"
) -> str:
    """One honest sentence: the winner against zero-shot with its interval, and against the runner-up.

    Falls back to the bare scores, named as such, where nothing was compared.
    """
    winner = f"the winner {best_trial}" if best_trial else "the winner"
    parts = []
    start = _verdict(verdicts, against=("zero-shot",), split=split)
    if start:
        interval = f"[{start['low']:.3f}, {start['high']:.3f}]"
        gap = f"by {start['difference']:.3f} CIDEr {interval}"
        on = f" on {start['images']:,} {split} images" if start.get("images") else f" on {split}"
        if start["low"] > 0:
            parts.append(f"{winner} beats zero-shot {gap}{on}")
        elif start["high"] < 0:
            parts.append(f"{winner} is worse than zero-shot {gap}{on}")
        else:
            parts.append(
                f"{winner} cannot be told apart from zero-shot{on} (CIDEr {start['difference']:+.3f} {interval})"
            )
    else:
        scores = metrics.get(split, {})
        known = [(v, scores[v]["cider"]["score"]) for v in ("served", "merged", "adapter", "zero-shot")
                 if "cider" in scores.get(v, {}) and scores[v]["cider"]["score"] is not None]  # fmt: skip
        if known:
            parts.append(
                ", ".join(f"{v} CIDEr {s:.3f}" for v, s in known) + f" on {split}; not tested for significance"
            )
    rival = next((v for v in verdicts if v.get("other") == "runner-up" or v["variant"] == best_trial), None)
    if rival:
        apart = "is ahead of" if rival["low"] > 0 else "cannot be told apart from"
        parts.append(f"on {rival['split']} it {apart} the runner-up {rival['against']}")
    text = "; ".join(parts)
    return text[:1].upper() + text[1:] + "." if text else ""


def verdict_list(verdicts: Any) -> list[dict[str, Any]]:
    """The verdicts of run.json as ReportData wants them.

    There they are {"metric", "split", "winner", <other>: {"difference", "low", "high", "p", "sentence"}}, where the
    other may say its own "split" and, when it is a trial, its "trial".
    """
    if isinstance(verdicts, list):
        return [dict(v) for v in verdicts]
    shared = {"metric": verdicts.get("metric", "cider"), "split": verdicts.get("split", "test")}
    found = []
    for other, verdict in verdicts.items():
        if isinstance(verdict, Mapping) and "difference" in verdict:
            who = {"variant": verdicts.get("winner", "served"), "against": verdict.get("trial", other)}
            found.append({**shared, **who, "other": other, **verdict})
    return found


def worst_trial(trials: Sequence[Mapping[str, Any]]) -> str:
    """The trial of the lowest CIDEr among those that were scored; empty when none was."""
    scored = [t for t in trials if t.get("cider") is not None and math.isfinite(t["cider"])]
    return min(scored, key=lambda t: t["cider"])["trial_id"] if scored else ""


def _verdict(verdicts: Sequence[Mapping[str, Any]], *, against: Sequence[str], split: str) -> Mapping[str, Any] | None:
    found = [
        v for v in verdicts if v["against"] in against and v["split"] == split and v.get("metric", "cider") == "cider"
    ]
    found.sort(key=lambda v: PROMOTED.index(v["variant"]) if v["variant"] in PROMOTED else len(PROMOTED))
    return found[0] if found else None
