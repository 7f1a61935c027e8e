"""What is known of one trial at its end, or so far: a row of trials.csv and its learning curve."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raycap.files import read_json, read_whole, sha256_file, write_json
from raycap.trial import TrialSpec

ENDED = "trial.json"
FINAL_STATES = ("finished", "stopped", "diverged", "failed")


@dataclass(kw_only=True, slots=True)
class TrialRecord:
    """Scores are those of the trial's best rung by `train.select_by`, which is the one that is exported."""

    trial_id: str
    state: str = "waiting"
    """waiting, running, judged (at a rung, before the verdict), then one of FINAL_STATES."""
    rank: int
    alpha: float
    scale: float
    lr: float
    dropout: float
    targets: list[str]
    captions: str = "all"
    variant: str = "lora"
    prompt_tokens: int = 0
    steps: int = 0
    """Optimiser steps trained."""
    rung: int = 0
    """Highest rung that was scored."""
    best_step: int = 0
    """Rung whose adapter is exported; 0 when none was scored."""
    loss: float | None = None
    val_loss: float | None = None
    cider: float | None = None
    cider_se: float | None = None
    seconds: float = 0.0
    """The trial's share of its pack's time, so that the trials of a sweep sum to its training time."""
    reason: str = ""
    curve: list[dict[str, Any]] = field(default_factory=list)
    """One entry a rung: step, loss, val_loss, cider, cider_se."""
    collapse: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, spec: TrialSpec) -> TrialRecord:
        return cls(
            trial_id=spec.trial_id,
            rank=spec.r,
            alpha=spec.alpha,
            scale=spec.scale,
            lr=spec.lr,
            dropout=spec.dropout,
            targets=list(spec.targets),
            captions=spec.captions,
            variant=spec.variant,
            prompt_tokens=spec.prompt_tokens,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrialRecord:
        """The inverse of `to_dict`; keys of another version are left aside."""
        return cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values})

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def ended(self) -> bool:
        return self.state in FINAL_STATES

    def score(self, select_by: str) -> float | None:
        """The figure that picks the best trial, larger is better; None when there is none."""
        value = self.cider if select_by == "cider" else self.val_loss
        return None if value is None or value != value else (value if select_by == "cider" else -value)


def write_ended(folder: Path, record: TrialRecord) -> None:
    """trial.json, the last file of an ended trial's folder: its record, and the hash of every file beside it."""
    files = {p.name: sha256_file(p) for p in sorted(folder.iterdir()) if p.is_file()}
    write_json(folder / ENDED, {**record.to_dict(), "files": files})


def read_ended(adapters: Path) -> dict[str, TrialRecord]:
    """The ended trials under `adapters`. A folder that is not what was written counts as none: the trial is not ended."""
    found = {}
    for file in sorted(adapters.glob(f"[!.]*/{ENDED}")):
        try:
            values = read_json(file)
            if all(sha256_file(file.parent / name) == digest for name, digest in values["files"].items()):
                found[file.parent.name] = TrialRecord.from_dict(values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return found


def read_records(run_dir: Path) -> dict[str, TrialRecord]:
    """What is known of the trials of a run: the driver's record, and over it the folders of ended trials."""
    known: dict[str, TrialRecord] = {}
    try:
        summary = read_whole(run_dir / "checkpoints" / "trials.json") or {"trials": []}
        rows = [TrialRecord.from_dict(row) for row in summary["trials"]]
        # Ended without a whole folder: damaged since. Its pack's checkpoint has it, or it is trained again.
        known = {r.trial_id: r for r in rows if not r.ended or r.state == "failed"}
    except (KeyError, TypeError, AttributeError):
        pass  # another version's, or damaged: the packs say it all again
    return {**known, **read_ended(run_dir / "checkpoints" / "adapters")}
