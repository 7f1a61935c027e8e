"""The dashboard's figures: every documented name is set, and every name is documented."""

from __future__ import annotations

from pathlib import Path

from raycap.config import load_config
from raycap.tune import gauges
from raycap.tune.board import Board
from raycap.tune.space import sample_trials

DOCS = Path(__file__).resolve().parents[2] / "docs" / "operations.md"


def test_a_snapshot_fills_the_gauges(monkeypatch):
    said = {}

    class Recorder:
        def __init__(self, name, text, tag_keys):
            self.name = name

        def set(self, value, tags):
            said[self.name, tags.get("trial") or tags["pack"]] = value

    monkeypatch.setattr("ray.util.metrics.Gauge", Recorder)
    board = Board(sample_trials(load_config("shapes-git", ["tune.trials=2"])), rungs=[4, 12], slots=2, packs=1)
    record = board.seats["t00"].record.to_dict() | {
        "steps": 4, "loss": 2.5, "curve": [{"step": 4, "loss": 2.5, "val_loss": 3.0, "cider": 0.7, "cider_se": 0.1}],
    }  # fmt: skip
    board.register("pack-0", "n", 1, {"active": {"t00": 4}, "records": {"t00": record}, "rate": 9.0, "memory_bytes": 5})
    gauges.Gauges("run").set(board.snapshot())
    assert said["raycap_trial_cider", "t00"] == 0.7 and said["raycap_trial_step", "t00"] == 4
    assert said["raycap_trial_val_loss", "t00"] == 3.0 and said["raycap_trial_loss", "t00"] == 2.5
    assert said["raycap_pack_slot_steps_per_second", "pack-0"] == 9 and said["raycap_pack_memory_bytes", "pack-0"] == 5
    assert said["raycap_pack_slots", "pack-0"] == 1
    assert ("raycap_trial_cider", "t01") not in said, "a score that is not known is not zero"


def test_the_docs_name_every_gauge():
    text = DOCS.read_text()
    for name in (*gauges.TRIAL, *gauges.PACK):
        assert f"`ray_{name}`" in text, name
