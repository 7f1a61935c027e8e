"""Run folders read back, for comparing and for reports."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from raycap.errors import RunError
from raycap.files import read_json, read_rows
from raycap.report.ledger import CONFIG, CURVES, GATE, METRICS, RUN_JSON, TRIALS, read_metrics, variant_order

_NUMBERS = {
    "rank": int, "steps": int, "rung": int, "best_step": int, "alpha": float, "scale": float, "lr": float,
    "dropout": float, "loss": float, "val_loss": float, "cider": float, "cider_se": float, "seconds": float,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One run folder; what the run has not come to is empty."""

    folder: Path
    config: dict[str, Any]
    """config.yaml as nested plain values."""
    entry: dict[str, Any] = field(default_factory=dict)
    """run.json."""
    trials: list[dict[str, Any]] = field(default_factory=list)
    """Typed rows of trials.csv, with `curve` and `collapse` where they were kept."""
    metrics: dict[str, dict[str, dict[str, dict[str, Any]]]] = field(default_factory=dict)
    """[split][variant][metric] -> {"score", "signature"}."""
    gate: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        return self.entry.get("name") or self.config.get("run", {}).get("name") or self.folder.name

    @property
    def status(self) -> str:
        return self.entry.get("status", "unfinished")

    @property
    def finished(self) -> bool:
        return self.status == "finished"

    @property
    def best(self) -> dict[str, Any] | None:
        wanted = self.entry.get("best_trial")
        return next((t for t in self.trials if t["trial_id"] == wanted), None)

    def variants(self, split: str) -> list[str]:
        """Variants that left predictions on a split."""
        files = (self.folder / "predictions").glob(f"{split}.*.jsonl")
        return sorted((f.name[len(split) + 1 : -len(".jsonl")] for f in files), key=variant_order)

    def predictions(self, split: str, variant: str) -> list[dict[str, Any]]:
        """Rows {"image_id", "caption", "references"}; RunError when there are none, DataError for a torn file."""
        path = self.folder / "predictions" / f"{split}.{variant}.jsonl"
        if not path.is_file():
            there = ", ".join(self.variants(split)) or "none"
            raise RunError(
                f"{self.folder} has no predictions of variant '{variant}' on split '{split}'; there: {there}"
            )
        return read_rows(path, ("image_id", "caption", "references"))


def load_run(folder: Path | str) -> Run:
    """Read a run folder, finished or not.

    Raises:
        RunError: the folder holds no run.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise RunError(f"{folder} is no run folder: there is no {CONFIG} in it")
    try:
        entry = read_json(folder / RUN_JSON) if (folder / RUN_JSON).is_file() else {}
    except ValueError:
        entry = {"status": "damaged"}
    try:
        config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        said = " ".join(str(error).split())
        raise RunError(f"{folder / CONFIG} cannot be read as YAML: {said}") from error
    if not isinstance(config, dict):
        raise RunError(f"{folder / CONFIG} holds no settings: it is no mapping")
    return Run(
        folder=folder,
        config=config,
        entry=entry,
        trials=_trials(folder),
        metrics=entry.get("metrics") or read_metrics(folder / METRICS),
        gate=read_json(folder / GATE) if (folder / GATE).is_file() else None,
    )


def is_run(folder: Path | str) -> bool:
    return (Path(folder) / CONFIG).is_file()


def _trials(folder: Path) -> list[dict[str, Any]]:
    if not (folder / TRIALS).is_file():
        return []
    with open(folder / TRIALS, encoding="utf-8", newline="") as file:
        rows = [{k: _typed(k, v) for k, v in row.items()} for row in csv.DictReader(file)]
    kept = {t["trial_id"]: t for t in read_json(folder / CURVES)} if (folder / CURVES).is_file() else {}
    return [{**kept.get(row["trial_id"], {}), **row} for row in rows]


def _typed(key: str, text: str) -> Any:
    if key == "targets":
        return text.split()
    kind = _NUMBERS.get(key)
    if kind is None:
        return text
    return kind(text) if text else None
