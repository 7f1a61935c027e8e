"""The gate before serving: adapter -> merged -> re-quantised, each scored on the same split.

Folding an adapter into 16-bit weights rounds, and onto the original weights it is another model than the one that was
trained on NF4. So both ways of merging are scored and the better is kept; each is quantised again, and of those the better is
kept; nothing is promoted that lost more than `export.max_drop` of the adapter's score.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raycap.config import Config, ExportSettings
from raycap.errors import GateError
from raycap.export.card import CardFacts, model_card
from raycap.export.folder import MANIFEST, read_manifest, write_manifest
from raycap.export.merge import merge
from raycap.export.requantise import requantise
from raycap.files import atomic_folder, write_atomic, write_json
from raycap.settings import prompt_for

Scorer = Callable[[Path, str], float]
"""(model folder, variant) -> score on the gate's split. Variants: merged, merged-dequantised, merged-nf4-original and
merged-nf4-dequantised."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GateResult:
    """gate.json: scores of the same metric on the same split, and relative drops from the adapter (below 0: a gain)."""

    split: str
    metric: str
    adapter: float
    merged: float
    """Merged on the base's original weights."""
    merged_dequantised: float | None
    """Merged on the dequantised weights; None where the base was not quantised."""
    merged_nf4: float
    drop_merged: float | None
    """Of the better way of merging: the one in best/merged. None where it cannot be told."""
    drop_nf4: float | None
    max_drop: float
    passed: bool
    """Whether the variant that `export.promote` names may be served."""

    @property
    def kept(self) -> str:
        """Which weights best/merged is merged onto: original or dequantised."""
        return better(self.merged, self.merged_dequantised)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def judge(
    *,
    adapter: float,
    merged: float,
    merged_dequantised: float | None,
    merged_nf4: float,
    settings: ExportSettings,
    split: str = "val",
    metric: str = "cider",
) -> GateResult:
    """The verdict on ready scores; decides, and does nothing."""
    kept = merged if better(merged, merged_dequantised) == "original" else merged_dequantised
    drops = {"merged": relative_drop(adapter, kept), "merged-nf4": relative_drop(adapter, merged_nf4)}
    promoted = drops[settings.promote]
    return GateResult(
        split=split,
        metric=metric,
        adapter=adapter,
        merged=merged,
        merged_dequantised=merged_dequantised,
        merged_nf4=merged_nf4,
        drop_merged=drops["merged"],
        drop_nf4=drops["merged-nf4"],
        max_drop=settings.max_drop,
        passed=promoted is not None and promoted <= settings.max_drop,
    )


def better(merged: float, merged_dequantised: float | None) -> str:
    """Which way of merging scored higher; a tie goes to the weights that the adapter was trained on."""
    if merged_dequantised is None or not math.isfinite(merged_dequantised):
        return "original"
    return "original" if merged > merged_dequantised else "dequantised"


def relative_drop(adapter: float, score: float | None) -> float | None:
    """(adapter - score) / adapter; None for a score that is no number or an adapter that scores nothing."""
    if score is None or not math.isfinite(score) or not math.isfinite(adapter) or adapter <= 0:
        return None
    return (adapter - score) / adapter


def require_passed(result: GateResult, promote: str) -> None:
    """Raise a GateError that names the drop, the limit and what to do, unless `result` passed."""
    if result.passed:
        return
    drop = result.drop_merged if promote == "merged" else result.drop_nf4
    score = result.merged_nf4
    if promote == "merged":
        score = result.merged if result.kept == "original" else result.merged_dequantised
    what = f"{promote} was not promoted: {result.metric} on {result.split}"
    if drop is None:
        raise GateError(
            f"{what} is {score:.4f} where the adapter has {result.adapter:.4f}, so no relative drop can be told. "
            f"Nothing is served. The adapter has learnt nothing, or a weight is not finite: look at the trial's curve."
        )
    other, other_drop = ("merged-nf4", result.drop_nf4) if promote == "merged" else ("merged", result.drop_merged)
    way_out = f"To accept it, set export.max_drop to at least {drop:.3f}"
    if other_drop is not None and other_drop <= result.max_drop:
        way_out += f"; or set export.promote={other}, which passes with a drop of {other_drop:.1%}"
    raise GateError(
        f"{what} fell from {result.adapter:.4f} (adapter) to {score:.4f}, a drop of {drop:.1%} "
        f"where export.max_drop={result.max_drop:g} allows {result.max_drop:.1%}. Nothing is served. {way_out}."
    )


def run_gate(
    config: Config,
    adapter: Path,
    adapter_score: float,
    scorer: Scorer,
    best: Path,
    gate_file: Path,
    *,
    facts: CardFacts | None = None,
    split: str = "val",
    metric: str = "cider",
    progress: Callable[[str], None] | None = None,
) -> GateResult:
    """Merge both ways, quantise both again, keep the better of each as `best`/merged and `best`/merged-nf4, and write
    `gate_file`.

    All these models are scored by `scorer` on the split that `adapter_score` was taken on. What was measured is
    written, cards included, before the verdict is raised.

    Raises:
        GateError: the promoted variant lost more than export.max_drop of the adapter's score.
    """
    say = progress or (lambda message: None)
    prompt = prompt_for(config.data.prompt, config.evaluate.lang)
    facts = facts or CardFacts(name=config.run.name or "model", base=config.model.path, prompt=prompt)
    best.mkdir(parents=True, exist_ok=True)
    work = best / ".gate"
    shutil.rmtree(work, ignore_errors=True)
    try:
        ways = ["original"] if config.model.quantisation == "none" else ["original", "dequantised"]
        scores: dict[str, float] = {}
        for onto in ways:
            say(f"merging the adapter onto the {onto} weights")
            merge(config.model, config.data, adapter, work / onto, onto)
            scores[onto] = float(scorer(work / onto, "merged" if onto == "original" else "merged-dequantised"))
        kept = better(scores["original"], scores.get("dequantised"))
        # Each way again: dequantised weights lie on NF4's grid, to which a small update is rounded back.
        packed: dict[str, float] = {}
        for onto in ways:
            say(f"quantising the model merged onto the {onto} weights")
            requantise(config.model, config.data, work / onto, work / f"nf4-{onto}")
            packed[onto] = float(scorer(work / f"nf4-{onto}", f"merged-nf4-{onto}"))
        kept_nf4 = better(packed["original"], packed.get("dequantised"))
        result = judge(
            adapter=float(adapter_score),
            merged=scores["original"],
            merged_dequantised=scores.get("dequantised"),
            merged_nf4=packed[kept_nf4],
            settings=config.export,
            split=split,
            metric=metric,
        )
        _keep(work / kept, best / "merged", facts, result)
        _keep(work / f"nf4-{kept_nf4}", best / "merged-nf4", facts, result)
        write_json(gate_file, result.to_dict())
    finally:
        shutil.rmtree(work, ignore_errors=True)
    require_passed(result, config.export.promote)
    return result


def _keep(candidate: Path, out: Path, facts: CardFacts, result: GateResult) -> None:
    """Move a candidate to its place, whole, with the card that knows the scores."""
    manifest = read_manifest(candidate)
    described = {k: v for k, v in manifest.items() if k not in ("schema", "files")}
    with atomic_folder(out) as folder:
        for name in manifest["files"]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(candidate / name, folder / name)
        (candidate / MANIFEST).unlink()
        card = model_card(
            facts, variant=described["variant"], onto=described["onto"], dtype=described["dtype"], gate=result.to_dict()
        )
        write_atomic(folder / "README.md", card)
        write_manifest(folder, {**described, "gate": result.to_dict()})
