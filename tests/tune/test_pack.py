"""Whole sweeps without Ray: decisions depend on scores alone, and no kill changes what comes out."""

from __future__ import annotations

import random

import pytest
from simulation import settings, simulate
from toy_engine import ToyEngine

from raycap.files import read_json
from raycap.train.record import FINAL_STATES


def outcome(run):
    """State, steps and best adapter of every trial; the adapter tells what was trained beside it at each step."""
    found = {}
    for trial, seat in run.board.seats.items():
        adapter = run.folder / "adapters" / trial / "adapter.json"
        record = seat.record
        found[trial] = (record.state, record.steps, record.reason, adapter.is_file() and adapter.read_text())
        assert read_json(run.folder / "adapters" / trial / "trial.json")["state"] == record.state
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return simulate(ToyEngine, tmp_path_factory.mktemp("undisturbed"))


def test_every_trial_ends_and_the_best_go_furthest(undisturbed):
    records = [seat.record for seat in undisturbed.board.seats.values()]
    assert all(r.state in FINAL_STATES for r in records)
    assert {r.steps for r in records} == {10, 30, 90}
    best = max(records, key=lambda r: r.cider or 0)
    assert best.state == "finished" and best.lr == max(r.lr for r in records if r.state != "diverged")
    assert [p["step"] for p in best.curve] == [10, 30, 90]
    assert undisturbed.board.snapshot()["finished"]
    captions = read_json(undisturbed.folder / "adapters" / best.trial_id / "val_captions.json")
    assert captions == {"a": f"{best.trial_id} at 90"}


@pytest.mark.parametrize("shuffle", range(1, 6))
def test_the_order_in_which_tune_hears_of_results_changes_nothing(undisturbed, shuffle, tmp_path):
    assert outcome(simulate(ToyEngine, tmp_path, shuffle=shuffle)) == outcome(undisturbed)


@pytest.mark.parametrize("seed", range(20))
def test_a_pack_killed_at_any_moment_ends_as_if_undisturbed(undisturbed, seed, tmp_path):
    kills = random.Random(seed).sample(range(1, undisturbed.calls), 4)
    run = simulate(ToyEngine, tmp_path, kills=kills, shuffle=seed)
    assert run.lives > 1
    assert outcome(run) == outcome(undisturbed)


def test_without_a_scheduler_every_trial_gets_its_full_budget(tmp_path):
    run = simulate(ToyEngine, tmp_path, settings(scheduler="none"))
    records = [seat.record for seat in run.board.seats.values()]
    assert {(r.state, r.steps) for r in records} == {("finished", 90)}


def test_a_loss_that_is_not_finite_ends_its_trial_alone(tmp_path):
    config = settings(trials=6, slots=3, space={"train.lr": {"choice": [0.1, 0.95]}})
    run = simulate(ToyEngine, tmp_path, config)
    by_state = {}
    for seat in run.board.seats.values():
        by_state.setdefault(seat.record.state == "diverged", []).append(seat.record)
    assert {r.lr for r in by_state[True]} == {0.95} and {r.steps for r in by_state[True]} == {5}
    assert "not finite at step 5" in by_state[True][0].reason
    assert {r.lr for r in by_state[False]} == {0.1}
    assert not (tmp_path / "adapters" / by_state[True][0].trial_id / "adapter.json").exists()


def test_shares_of_time_sum_to_no_more_than_the_whole(undisturbed):
    assert 0 < sum(seat.record.seconds for seat in undisturbed.board.seats.values()) <= undisturbed.calls * 0.01


class Collapsing(ToyEngine):
    """Whose second trial says the same of every picture from step 30 on, at the best score of all."""

    def evaluate(self, trial_ids):
        found = super().evaluate(trial_ids)
        for trial_id, result in found.items():
            if trial_id == "t01" and result.step >= 10:
                result.collapse = {"collapsed": True, "reasons": ["98% of the captions are the same"]}
        return found


def test_a_collapsed_trial_is_pruned_where_that_is_asked_for(tmp_path):
    kept = simulate(Collapsing, tmp_path / "kept", settings(scheduler="none"))
    assert kept.board.seats["t01"].record.steps == 90
    pruned = simulate(Collapsing, tmp_path / "pruned", settings(scheduler="none"), prune_collapsed=True)
    record = pruned.board.seats["t01"].record
    assert (record.state, record.steps) == ("stopped", 10) and "98% of the captions are the same" in record.reason
    assert [s.record.steps for t, s in pruned.board.seats.items() if t != "t01"] == [90] * 11
