"""A sweep's state as Ray metrics, for the dashboard and Prometheus; their names are in docs/operations.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TRIAL = {
    "raycap_trial_cider": ("CIDEr of the trial's last rung", "cider"),
    "raycap_trial_val_loss": ("Validation loss of the trial's last rung", "val_loss"),
    "raycap_trial_loss": ("Training loss of the trial's last step", "loss"),
    "raycap_trial_step": ("Optimiser steps that the trial has trained", "steps"),
}
PACK = {
    "raycap_pack_slot_steps_per_second": ("Steps of all slots a second", "rate"),
    "raycap_pack_slots": ("Slots in use", "slots"),
    "raycap_pack_memory_bytes": (
        "Memory of the pack: the GPU's where there is one, else the process's",
        "memory_bytes",
    ),
}


class Gauges:
    """Gauges of one run, set from the board's snapshots. One process exports all of them, so that no series is twice."""

    def __init__(self, run: str):
        from ray.util.metrics import Gauge

        self._run = run
        self._trial = {n: Gauge(n, text, tag_keys=("run", "trial")) for n, (text, _) in TRIAL.items()}
        self._pack = {n: Gauge(n, text, tag_keys=("run", "pack")) for n, (text, _) in PACK.items()}

    def set(self, snapshot: Mapping[str, Any]) -> None:
        for trial in snapshot["trials"]:
            last = trial["curve"][-1] if trial["curve"] else {}
            for name, (_, key) in TRIAL.items():
                value = last.get(key) if key in ("cider", "val_loss") else trial[key]
                if value is not None and value == value:
                    self._trial[name].set(float(value), tags={"run": self._run, "trial": trial["trial_id"]})
        for pack, found in snapshot["packs"].items():
            for name, (_, key) in PACK.items():
                self._pack[name].set(float(found[key]), tags={"run": self._run, "pack": pack})
