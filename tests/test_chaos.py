"""tools/chaos.py at its smallest: kills from outside, and adapters to the last bit those of an undisturbed run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[1] / "tools" / "chaos.py"


@pytest.mark.slow
@pytest.mark.ray
def test_a_killed_and_resumed_sweep_leaves_the_adapters_of_an_undisturbed_one(tmp_path):
    command = [sys.executable, str(TOOL), "--kills", "1", "--targets", "driver", "--work", str(tmp_path)]
    smaller = ["train.steps=24", "tune.grace_steps=8"]
    done = subprocess.run([*command, *smaller], capture_output=True, text=True, timeout=550)
    logs = "\n".join(f"{log}:\n{log.read_text()[-3000:]}" for log in tmp_path.glob("*.log"))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{logs}"
    found = json.loads(done.stdout)
    assert found["equal"] and not found["different"] and found["trials"] == 4  # three, and the preset's own settings
    assert found["killed"] == 1 and found["drivers"] == 2


def test_adapters_that_differ_are_told(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(TOOL.parent))
    import chaos

    for run, weights in (("one", b"a"), ("other", b"b")):
        folder = tmp_path / run / "checkpoints" / "adapters" / "t00"
        folder.mkdir(parents=True)
        (folder / "trial.json").write_text('{"state": "finished"}')
        (folder / "adapter_model.safetensors").write_bytes(weights)
    one, other = chaos.adapters(tmp_path / "one"), chaos.adapters(tmp_path / "other")
    assert set(one) == set(other) == {"t00"} and one != other and one["t00"].startswith("finished ")


def test_a_target_that_is_none_is_refused():
    done = subprocess.run([sys.executable, str(TOOL), "--targets", "driver,printer"], capture_output=True, text=True)
    assert done.returncode == 2 and "no target printer" in done.stderr
