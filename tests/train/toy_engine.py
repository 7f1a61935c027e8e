"""A pack engine without torch: scores follow from the settings, states from the whole history of the pack.

`mates` sums what was trained beside a trial at each of its steps, so equal states mean equal company throughout.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from raycap.errors import DataError
from raycap.files import read_json, write_json


class ToyEngine:
    def __init__(self, step_s: float = 0.0):
        self.step_s = step_s
        self.slots: dict[str, dict] = {}
        self.paused: set[str] = set()

    @property
    def active(self):
        return list(self.slots)

    def admit(self, spec, state=None):
        assert spec.trial_id not in self.slots
        fresh = {"step": 0, "weight": 0.0, "mates": 0.0, "best": None}
        self.slots[spec.trial_id] = {"spec": spec, **(state or fresh)}

    def release(self, trial_id):
        del self.slots[trial_id]
        self.paused.discard(trial_id)

    def pause(self, trial_id):
        self.paused.add(trial_id)

    def resume(self, trial_id):
        self.paused.discard(trial_id)

    def step(self):
        time.sleep(self.step_s)
        running = [t for t in self.slots if t not in self.paused]
        company = sum((i + 1) * (1 + self.slots[t]["step"]) for i, t in enumerate(sorted(running)))
        found = {}
        for t in running:
            slot = self.slots[t]
            slot["step"] += 1
            rng = np.random.default_rng([slot["spec"].seed, slot["step"]])
            slot["weight"] += slot["spec"].lr * (0.5 + rng.random())
            slot["mates"] = math.fmod(slot["mates"] * 1.000001 + company, 1e9)
            loss = math.nan if slot["spec"].lr > 0.9 and slot["step"] >= 5 else 1 / (1 + slot["weight"])
            found[t] = SimpleNamespace(
                step=slot["step"], loss=loss, grad_norm=1.0, lr=slot["spec"].lr, finite=loss == loss
            )
        return found

    def evaluate(self, trial_ids):
        found = {}
        for t in trial_ids:
            slot = self.slots[t]
            cider = slot["weight"] / (1 + slot["weight"])
            if slot["best"] is None or cider > slot["best"]["cider"]:
                slot["best"] = {"cider": cider, "weight": slot["weight"], "mates": slot["mates"], "step": slot["step"]}
            found[t] = SimpleNamespace(
                step=slot["step"], val_loss=1 - cider, cider=cider, cider_se=0.01,
                captions={"a": f"{t} at {slot['step']}"}, collapse={"collapsed": False},
            )  # fmt: skip
        return found

    def state(self, trial_id):
        return {k: self.slots[trial_id][k] for k in ("step", "weight", "mates", "best")}

    def export(self, trial_id, folder, which="best"):
        write_json(Path(folder) / "adapter.json", self.slots[trial_id]["best"])


class ToyCheckpoints:
    @staticmethod
    def save(folder, states):
        write_json(Path(folder) / "states.json", states)

    @staticmethod
    def load(folder):
        return read_json(Path(folder) / "states.json")


def build(config, job, log):
    return ToyEngine(), ToyCheckpoints, None


def build_slow(config, job, log):
    return ToyEngine(step_s=0.01), ToyCheckpoints, None


def build_slower(config, job, log):
    return ToyEngine(step_s=0.04), ToyCheckpoints, None


def build_broken(config, job, log):
    raise DataError("shard train-00003.parquet, row group 2: cannot be read (it was poisoned)")
