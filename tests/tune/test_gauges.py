"""The dashboard's figures: every documented name is set, and every name is documented."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from pathlib import Path

import pytest

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


def test_the_grafana_dashboard_shows_every_gauge_and_nothing_else():
    dashboard = json.loads(DOCS.with_name("grafana.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    shown = {re.search(r"ray_(raycap_\w+)\{", expression).group(1) for expression in asked}
    assert shown == {*gauges.TRIAL, *gauges.PACK}
    for expression in asked:
        tag = "trial" if "raycap_trial" in expression else "pack"
        # Several processes may export one trial, one after another.
        assert expression.startswith(f"max by ({tag}) (") and 'run=~"$run"' in expression
    variables = {v["name"]: v for v in dashboard["templating"]["list"]}
    assert "label_values(ray_raycap_pack_slots, run)" in variables["run"]["query"]["query"]
    assert len({(p["gridPos"]["x"], p["gridPos"]["y"]) for p in dashboard["panels"]}) == len(dashboard["panels"])


@pytest.mark.ray
def test_prometheus_finds_them_at_the_node(ray_session):
    """Set in this process, scraped from the port of the node's agent, under the names of docs/operations.md."""
    trial = {"trial_id": "t00", "steps": 4, "loss": 2.5, "curve": [{"val_loss": 3.0, "cider": 0.75}]}
    pack = {"slots": 1, "rate": 9.0, "memory_bytes": 5e9}
    gauges.Gauges("scraped").set({"trials": [trial], "packs": {"pack-0": pack}})
    (node,) = ray_session.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    expected = {f"ray_{name}" for name in (*gauges.TRIAL, *gauges.PACK)}
    deadline, found = time.monotonic() + 60, {}
    while expected - set(found) and time.monotonic() < deadline:
        time.sleep(1)
        text = urllib.request.urlopen(url, timeout=10).read().decode()
        found = dict(re.findall(r'^(ray_raycap_\w+)\{[^}]*run="scraped"[^}]*\} (\S+)', text, re.MULTILINE))
    assert {name: float(value) for name, value in found.items()} == {
        "ray_raycap_trial_cider": 0.75, "ray_raycap_trial_val_loss": 3, "ray_raycap_trial_loss": 2.5,
        "ray_raycap_trial_step": 4, "ray_raycap_pack_slot_steps_per_second": 9, "ray_raycap_pack_slots": 1,
        "ray_raycap_pack_memory_bytes": 5e9,
    }  # fmt: skip
