"""What a report says, as plain values: filled by the pipeline, or read back from a run folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raycap.files import read_json, write_atomic, write_json
from raycap.report.runs import Run
from raycap.report.tokens import token_line

PICTURES = "plots/pictures.json"
PICTURE_COUNT = 12
WORST = "worst-trial"
"""Variant under which the worst trial's captions of the shown pictures are kept; never scored."""
WINNERS = ("merged", "merged-nf4", "adapter")


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """One test picture with what was said about it."""

    image_id: str
    image: bytes
    """The file's bytes: PNG or JPEG, shown as they are, so a few tens of kB at most."""
    references: list[str]
    captions: dict[str, str]
    """Who says -> what. Expected: "zero-shot", "winner" and "worst trial"; others are shown as they are named."""


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
    lang: str = "en"
    best_trial: str = ""
    worst_trial: str = ""
    trials: list[dict[str, Any]] = field(default_factory=list)
    """TrialRecord.to_dict() of each."""
    metrics: dict[str, dict[str, dict[str, dict[str, Any]]]] = field(default_factory=dict)
    """[split][variant][metric] -> {"score", "signature"}, as in run.json."""
    verdicts: list[dict[str, Any]] = field(default_factory=list)
    """Paired bootstraps, {"split", "metric", "variant", "against", "difference", "low", "high", "p", "images",
    "sentence"} each. `variant` and `against` are variants or trial ids; the difference is variant - against.
    """
    gate: dict[str, Any] | None = None
    """gate.json."""
    pictures: list[Picture] = field(default_factory=list)
    seconds: float = 0.0
    seconds_by_phase: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int = 0
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
    train, model, data = (config.get(s, {}) for s in ("train", "model", "data"))
    facts = {k: v for k, v in entry.get("data", {}).items() if k != "folder"}  # a cache's path tells a reader nothing
    if tokens := facts.get("tokens"):
        facts["tokens"] = "; ".join(f"{split}: {token_line(counts)}" for split, counts in tokens.items())
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
        "lang": config.get("evaluate", {}).get("lang", "en"),
        "best_trial": entry.get("best_trial", ""),
        "worst_trial": entry.get("worst_trial") or worst_trial(run.trials),
        "trials": run.trials,
        "metrics": run.metrics,
        "verdicts": verdict_list(entry.get("verdicts") or {}),
        "gate": run.gate,
        "pictures": read_pictures(run.folder) or pictures_from_shards(run),
        "seconds": entry.get("seconds", 0.0),
        "seconds_by_phase": entry.get("seconds_by_phase", {}),
        "peak_memory_bytes": entry.get("peak_memory_bytes", 0),
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


def write_pictures(folder: Path | str, pictures: Sequence[Picture]) -> Path:
    """plots/pictures/ and the list of them, so that the report can be made again without the data."""
    folder = Path(folder)
    rows = []
    for n, picture in enumerate(pictures):
        file = f"plots/pictures/{n:02d}.{'jpg' if picture.image[:2] == bytes((0xFF, 0xD8)) else 'png'}"
        write_atomic(folder / file, picture.image)
        rows.append({"image_id": picture.image_id, "file": file, "references": picture.references,
                     "captions": picture.captions})  # fmt: skip
    return write_json(folder / PICTURES, rows)


def read_pictures(folder: Path | str) -> list[Picture]:
    folder = Path(folder)
    if not (folder / PICTURES).is_file():
        return []
    return [
        Picture(
            image_id=row["image_id"],
            image=(folder / row["file"]).read_bytes(),
            references=row["references"],
            captions=row["captions"],
        )
        for row in read_json(folder / PICTURES)
        if (folder / row["file"]).is_file()
    ]


def pictures_from_shards(run: Run, split: str = "test") -> list[Picture]:
    """The pictures that the worst trial captioned too, else the first of the split, read from the run's shards.

    Empty when the shards are not on this machine any more.
    """
    from raycap.data.parquet import is_shards_folder, open_shards

    folder = Path(run.entry.get("data", {}).get("folder") or "-")
    said = {v: {r["image_id"]: r for r in run.predictions(split, v)} for v in run.variants(split)}
    winner = next((v for v in ("served", *WINNERS) if v in said), None)
    if winner is None or not is_shards_folder(folder):
        return []
    shown = list(said.get(WORST) or said[winner])[:PICTURE_COUNT]
    speakers = {"zero-shot": said.get("zero-shot", {}), "winner": said[winner], "worst trial": said.get(WORST, {})}
    images: dict[str, bytes] = {}
    for row in open_shards(folder).iter_rows(split, ("image_id", "image")):
        if row["image_id"] in shown:
            images[row["image_id"]] = thumbnail(row["image"]["bytes"])
            if len(images) == len(shown):
                break
    return [
        Picture(
            image_id=i,
            image=images[i],
            references=list(said[winner][i]["references"]),
            captions={who: rows[i]["caption"] for who, rows in speakers.items() if i in rows},
        )
        for i in shown
        if i in images and i in said[winner]
    ]


def thumbnail(image: bytes, longest_px: int = 320) -> bytes:
    """An encoded picture small enough for a report: as it is when it fits, else a JPEG."""
    import io

    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(image)) as opened:
        if max(opened.size) <= longest_px and opened.format in ("PNG", "JPEG") and len(image) < 100_000:
            return image
        small = ImageOps.exif_transpose(opened).convert("RGB")
    small.thumbnail((longest_px, longest_px))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=85)
    return out.getvalue()


def _verdict(verdicts: Sequence[Mapping[str, Any]], *, against: Sequence[str], split: str) -> Mapping[str, Any] | None:
    order = ("served", *WINNERS)
    found = [
        v for v in verdicts if v["against"] in against and v["split"] == split and v.get("metric", "cider") == "cider"
    ]
    found.sort(key=lambda v: order.index(v["variant"]) if v["variant"] in order else len(order))
    return found[0] if found else None
