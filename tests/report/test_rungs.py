from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from raycap.report import rungs
from raycap.report.rungs import reference_json, reference_of, rung_rows, spearman, write_reference
from raycap.report.runs import load_run

RESULTS = Path(__file__).resolve().parents[2] / "results"


def sweep(early, end):
    return [
        {"trial_id": f"t{n}", "state": "finished", "curve": [{"step": 10, "cider": a, "val_loss": -a},
                                                           {"step": 90, "cider": b, "val_loss": 1.0}]}
        for n, (a, b) in enumerate(zip(early, end))
    ]  # fmt: skip


def test_ranks_with_ties_are_those_of_the_textbook():
    a, b = np.array([1.0, 2.0, 2.0, 4.0, 9.0]), np.array([1.0, 3.0, 2.0, 5.0, 4.0])
    ranks = np.array([1, 2.5, 2.5, 4, 5]), np.array([1, 3, 2, 5, 4])
    assert spearman(a, b) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert spearman(a, a) == pytest.approx(1.0) and spearman(a, -a) == pytest.approx(-1.0)
    assert np.isnan(spearman(a, np.ones(5)))


def test_a_rung_is_held_against_the_end():
    (row,) = rung_rows(sweep([1, 2, 3, 4, 5, 6], [10, 20, 30, 40, 60, 50]), eta=3)
    assert (row["step"], row["trials"], row["going"], row["kept"], row["lost"]) == (10, 6, 2, True, 0.0)
    assert row["cider"]["spearman"] == row["val_loss"]["spearman"] == pytest.approx(33 / 35)
    assert row["cider"]["low"] <= row["cider"]["spearman"] <= row["cider"]["high"]
    (row,) = rung_rows(sweep([9, 8, 3, 4, 5, 6], [10, 20, 30, 40, 60, 50]), eta=3)
    assert not row["kept"] and row["lost"] == 40.0  # of the two that go on, the better ends at 20


def test_trials_that_ended_early_say_nothing_of_the_end():
    found = sweep([1, 2, 3, 4, 5], [1, 2, 3, 4, 5])
    found[4]["curve"].pop()
    assert rung_rows(found, eta=3)[0]["trials"] == 4
    found[3]["curve"].pop()
    assert rung_rows(found, eta=3) == []


def test_a_run_quotes_itself_or_the_kept_sweep_of_its_base_and_images(run_folder, monkeypatch):
    run = load_run(run_folder)
    trials = [{"rank": 4, "alpha": 8.0, "scale": 2.0, "lr": 1e-3, "dropout": 0.0, **t}
              for t in sweep([1, 2, 3, 4], [1, 2, 3, 4])]  # fmt: skip
    # Where nothing was pruned the run itself is the reference.
    unpruned = {**run.config, "tune": {**run.config["tune"], "scheduler": "none"}}
    own = reference_of(dataclasses.replace(run, config=unpruned, trials=trials))
    assert own["own"] and own["rows"][0]["cider"]["spearman"] == pytest.approx(1.0)
    # Else a kept file beside the run, of the same base and images and no other.
    monkeypatch.setattr(rungs, "raycap", type("elsewhere", (), {"__file__": str(run_folder / "a" / "b.py")}))
    assert reference_of(run) is None
    kept = reference_json(trials, unpruned, {"command": "made up", "commit": "c" * 40})
    write_reference(
        run_folder.parent / "reference-other.json", {**kept, "config": {**unpruned, "model": {"path": "x"}}}
    )
    assert reference_of(run) is None
    write_reference(run_folder.parent / "reference-shapes.json", kept)
    found = reference_of(run)
    assert not found["own"] and found["source"] == "results/reference-shapes.json" and found["command"] == "made up"
    (run_folder.parent / "reference-shapes.json").write_text("{torn")
    assert reference_of(run) is None


@pytest.mark.skipif(not list(RESULTS.glob(rungs.GLOB)), reason="results/ holds no reference sweep")
@pytest.mark.parametrize("file", sorted(RESULTS.glob(rungs.GLOB)), ids=lambda f: f.name)
def test_what_is_kept_is_a_sweep_that_pruned_nothing(file):
    found = json.loads(file.read_text())
    assert found["config"]["tune"]["scheduler"] == "none" and found["command"] and found["commit"]
    assert {t["state"] for t in found["trials"]} <= {"finished", "diverged"}
    rows = rung_rows(found["trials"], found["config"]["tune"]["eta"])
    assert rows and rows[0]["trials"] >= 12
