"""A pack on two Ray Train workers, one of which is killed: it comes to what one worker comes to, without Ray."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from raycap.config import from_dict, load_config
from raycap.data.store import Store
from raycap.models import load_model
from raycap.models.lora import import_adapter
from raycap.train.engine import PackEngine
from raycap.tune.space import sample_trials

DRIVER = """
import json, os, re, signal
from pathlib import Path
from raycap.config import from_dict
from raycap.data.shards import prepare_if_needed
from raycap.tune.sweep import run_sweep
killed, seen = [], []

def on_progress(snapshot):
    seen.append(snapshot)
    if not killed and any(20 <= row["steps"] < 60 for row in snapshot["trials"]):
        log = Path({folder!r}, "logs", "pack-0-worker-1.log").read_text()
        os.kill(int(re.search(r"starts: pid (\\d+)", log)[1]), signal.SIGKILL)
        killed.append(snapshot["trials"][0]["steps"])

config = from_dict(json.loads({config!r}))
run_sweep(config, {folder!r}, prepare_if_needed(config), on_progress=on_progress)
print(json.dumps({{"killed": killed, "packs": seen[-1]["packs"], "trials": seen[-1]["trials"]}}))
"""


@pytest.mark.slow
@pytest.mark.ray
def test_two_workers_one_of_them_killed_come_to_what_one_comes_to(tmp_path, delta):
    settings = [
        "data.shapes_images=40,10,10", "train.steps=80", "train.batch=5", "train.val_images=9", "lora.dropout=0.1",
        "tune.trials=1", "tune.slots=1", "tune.scheduler=none", "tune.grace_steps=0", "tune.space={}", "tune.default_trial=false",
        "train.checkpoint_every_s=0.3", f"run.cache_dir={tmp_path / 'cache'}", "decode.max_new_tokens=8",
        "model.compute_dtype=fp32",
    ]  # fmt: skip
    config = load_config("shapes-git", [*settings, "train.workers=2"])
    folder = tmp_path / "run"
    code = DRIVER.format(config=json.dumps(config.to_dict()), folder=str(folder))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert told["killed"] and told["packs"]["pack-0"]["lives"] == 2
    logs = [(folder / "logs" / f"{name}.log").read_text() for name in ("pack-0", "pack-0-worker-1")]
    assert "resumed t00 at step" in logs[0] and "resumed t00 at step 0" not in logs[0]
    assert [log.count("starts: pid") for log in logs] == [2, 2] and all("ends: done" in log for log in logs)
    assert "rounded otherwise" not in logs[0]

    stores = {split: Store.open(next((tmp_path / "cache" / "store").glob(f"{split}-*"))) for split in ("train", "val")}
    alone = from_dict({**config.to_dict(), "train": {**config.to_dict()["train"], "workers": 1}})
    engine = PackEngine(load_model(alone.model, alone.data, lang="en", device="cpu"), stores, alone, 1)
    (spec,) = sample_trials(alone)
    engine.admit(spec)
    (trial,) = told["trials"]
    points = {point["step"]: point for point in trial["curve"]}
    for step in range(1, spec.steps + 1):
        loss = engine.step()[spec.trial_id].loss
        if step in points:
            result = engine.evaluate([spec.trial_id])[spec.trial_id]
            assert points[step]["loss"] == pytest.approx(loss, rel=1e-3)
            assert points[step]["val_loss"] == pytest.approx(result.val_loss, rel=1e-3)
    assert max(points) == spec.steps
    weights = import_adapter(folder / "checkpoints" / "adapters" / spec.trial_id)[1]
    assert delta(engine.state(spec.trial_id)["best"], weights) <= 1e-3
