"""The model card: what a person who finds the folder alone has to know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class CardFacts:
    """What only the run knows; the card leaves out what is empty."""

    name: str
    base: str
    """The base as it was given: a hub id, a folder, or builtin:tiny-git."""
    base_sha256: str = ""
    data: str = ""
    data_sha256: str = ""
    lang: str = "en"
    prompt: str = ""
    trial: str = ""
    adapter: Mapping[str, Any] = field(default_factory=dict)
    """The trial's settings: rank, alpha, lr, steps ..."""
    versions: Mapping[str, str] = field(default_factory=dict)


def model_card(facts: CardFacts, *, variant: str, onto: str, dtype: str, gate: Mapping[str, Any] | None = None) -> str:
    """README.md of a model folder: front matter for the hub, then base, data, adapter, scores, the gate's verdict."""
    weights = f"NF4 (bitsandbytes); head and what the family skips in {dtype}" if variant == "merged-nf4" else dtype
    merged_onto = {"original": "the base's original weights", "dequantised": "the base's dequantised weights"}[onto]
    lines = [
        *_front_matter(facts, variant),
        f"# {facts.name}: {variant}",
        "",
        f"An image captioner: a {facts.adapter.get('kind', 'LoRA')} adapter folded into `{shown_place(facts.base)}` by raycap.",
        "Loads in plain `transformers`; the processor is in this folder.",
        "",
        *_table("Weights", {"variant": variant, "stored as": weights, "merged onto": merged_onto}),
        *_table("Base", {"model": shown_place(facts.base), "sha256": facts.base_sha256}),
        *_table("Data", {"source": shown_place(facts.data), "sha256": facts.data_sha256, "language": facts.lang}),
        *_table("Use", {"prompt": facts.prompt}),
        *_table("Adapter", {"trial": facts.trial, **facts.adapter}),
        *(_gate_section(gate) if gate else []),
        *_table("Versions", facts.versions),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _front_matter(facts: CardFacts, variant: str) -> list[str]:
    # base_model must be a hub id: a local folder's name would point at somebody else's model.
    hub_id = facts.base if facts.base.count("/") == 1 and not facts.base.startswith((".", "/", "~")) else ""
    return [
        "---",
        "library_name: transformers",
        "pipeline_tag: image-to-text",
        *([f"base_model: {hub_id}"] if hub_id else []),
        f"language: {facts.lang}",
        f"tags: [image-captioning, lora, {variant}]",
        "---",
        "",
    ]


def _gate_section(gate: Mapping[str, Any]) -> list[str]:
    split, metric = gate["split"], gate["metric"]
    verdict = "passed" if gate["passed"] else "did not pass"
    scores = {
        "adapter on the base it was trained on": gate["adapter"],
        "merged on the original weights": gate["merged"],
        "merged on the dequantised weights": gate["merged_dequantised"],
        "merged, then quantised to NF4": gate["merged_nf4"],
    }
    rows = {k: f"{v:.4f}" for k, v in scores.items() if v is not None and v == v}
    named = {"merged": gate["drop_merged"], "NF4": gate["drop_nf4"]}
    drops = [f"{name} {drop:+.2%}" for name, drop in named.items() if drop is not None]
    return [
        *_table(f"Scores ({metric} on {split})", rows),
        f"The gate before serving allows a relative drop of {gate['max_drop']:.2%} from the adapter. "
        f"Measured: {', '.join(drops) or 'none, a score is missing'}. The variant promoted to serving {verdict}.",
        "",
    ]


def _table(title: str, rows: Mapping[str, Any]) -> list[str]:
    kept = {k: v for k, v in rows.items() if v not in ("", None)}
    if not kept:
        return []
    cells = [f"| {_cell(k)} | {_cell(v)} |" for k, v in kept.items()]
    return [f"## {title}", "", "| | |", "|---|---|", *cells, ""]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        value = ", ".join(map(str, value))
    return " ".join(str(value).split()).replace("|", "\\|")


def shown_place(place: str) -> str:
    """A folder by its name alone: where it lay on the author's disk is nobody else's business."""
    return PurePath(place).name if place.startswith(("/", "~", ".")) else place
