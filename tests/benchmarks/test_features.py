"""benchmarks/features.py prints both sides and the decision, as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import features

pytestmark = pytest.mark.filterwarnings("ignore:CIDEr takes its document frequencies")


def test_both_sides_and_the_decision_are_printed(tmp_path, capsys):
    small = ["data.shapes_images=24,8,8", "tune.trials=2", "tune.slots=2", "tune.default_trial=false", "train.batch=4",
             "train.val_images=4", "decode.max_new_tokens=6", f"run.cache_dir={tmp_path}"]  # fmt: skip
    assert features.main(["shapes-git", *small, "--steps", "2", "--rounds", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    kept, live = found["measured"]["kept"], found["measured"]["at_each_look"]
    assert found["measured"]["ratio"] == pytest.approx(live["run_s"] / kept["run_s"])
    assert live["run_s"] == pytest.approx(999 * live["step_s"] + found["measured"]["rungs"] * live["rung_s"])
    assert found["foreseen"]["train"]["looks"] == 999 * 4 and found["foreseen"]["train"]["live_s"] > 0
    assert found["right"] in (True, False)


def test_a_setting_that_is_none_is_told(capsys):
    assert features.main(["shapes-git", "train.stepz=3"]) == 1
    assert "train.stepz" in capsys.readouterr().err
