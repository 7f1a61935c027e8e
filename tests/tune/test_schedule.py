"""Rungs, verdicts that do not depend on the order of arrival, and their record."""

from __future__ import annotations

import itertools
import json
import math
from types import SimpleNamespace

import pytest

from raycap.errors import RunError
from raycap.tune.schedule import PackAsha, PackFifo, RungLedger, rungs


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ((999, 0, 3), [111, 333, 999]),
        ((1000, 0, 3), [111, 333, 999, 1000]),
        ((81, 1, 3), [1, 3, 9, 27, 81]),
        ((243, 0, 3), [27, 81, 243]),  # exact where int(log(9) / log(3)) may be 1
        ((5, 0, 3), [1, 3, 5]),
        ((100, 100, 3), [100]),
    ],
)
def test_rungs(given, wanted):
    assert rungs(*given) == wanted


def ledger(path=None, **changes):
    return RungLedger(path, **{"steps": [10, 30, 90], "eta": 3, "select_by": "cider", **changes})


def going(verdicts):
    return {trial for trial, verdict in verdicts.items() if verdict["action"] == "go"}


def test_one_in_eta_of_a_cohort_goes_on():
    cohort = {f"t{i}": i / 10 for i in range(6)}
    assert going(ledger().judge(10, cohort)) == {"t4", "t5"}
    assert going(ledger(select_by="val_loss").judge(10, cohort)) == {"t0", "t1"}
    assert going(ledger(halving=False).judge(10, cohort)) == set(cohort)


def test_the_first_to_reach_a_rung_goes_on_and_equals_share_a_place():
    assert going(ledger().judge(10, {"t0": 0.0})) == {"t0"}
    assert going(ledger().judge(10, dict.fromkeys("abcdef", 0.5))) == set("abcdef")


def test_order_within_a_cohort_decides_nothing():
    scores = {"a": 0.1, "b": 0.4, "c": math.nan, "d": 0.3, "e": None}
    verdicts = [ledger().judge(10, dict(order)) for order in itertools.permutations(scores.items())]
    assert all(v == verdicts[0] for v in verdicts)
    assert going(verdicts[0]) == {"b"}


def test_a_score_that_is_not_finite_stops_its_trial_and_counts_for_nobody():
    verdicts = ledger().judge(10, {"a": 0.1, "b": math.nan, "c": None, "d": math.inf})
    assert going(verdicts) == {"a"}
    assert {verdicts[t]["state"] for t in "bcd"} == {"diverged"}


def test_the_last_rung_finishes():
    verdicts = ledger().judge(90, {"a": 0.1, "b": math.nan})
    assert verdicts["a"] == {"action": "stop", "state": "finished", "reason": ""}
    assert verdicts["b"]["state"] == "diverged"


def test_the_reason_says_place_and_number():
    verdict = ledger().judge(10, {"a": 0.1, "b": 0.2, "c": 0.3})["a"]
    assert verdict["reason"] == "cider 0.1 at step 10: place 3 of 3, one in 3 goes on"


def test_the_record_outlives_the_driver_and_what_was_judged_stays(tmp_path):
    path = tmp_path / "rungs.json"
    first = ledger(path).judge(10, {"a": 0.1, "b": 0.2, "c": math.nan})
    again = ledger(path)
    assert again.judge(10, {"a": 9.9, "b": 0.0, "c": 1.0}) == first  # said again with other scores: the verdict holds
    assert going(again.judge(10, {"d": 0.15})) == set()  # and new ones meet the old scores
    assert json.loads(path.read_text())["scores"]["10"] == {"a": 0.1, "b": 0.2, "c": None, "d": 0.15}


def test_a_record_of_other_settings_is_refused(tmp_path):
    ledger(tmp_path / "rungs.json").judge(10, {"a": 0.1})
    with pytest.raises(RunError, match="eta=3, this run has 2"):
        ledger(tmp_path / "rungs.json", eta=2)


@pytest.mark.parametrize("kind", [PackAsha, PackFifo])
def test_schedulers_follow_the_ledger_and_tell_the_board(kind):
    told = []
    book = ledger(halving=kind is PackAsha)
    scheduler = kind(book, lambda step, verdicts: told.append((step, going(verdicts))))
    scores = {"a": 0.1, "b": 0.2, "c": math.nan}
    decisions = {}
    for trial in scores:
        tune_trial = SimpleNamespace(trial_id=f"tune-{trial}")
        scheduler.on_trial_add(None, tune_trial)
        result = {"trial": trial, "step": 10, "cohort": json.dumps(scores), "cider": scores[trial]}
        decisions[trial] = scheduler.on_trial_result(None, tune_trial, result)
    halved = {"a": "STOP", "b": "CONTINUE", "c": "STOP"}
    assert decisions == (halved if kind is PackAsha else {**halved, "a": "CONTINUE"})
    assert told[0] == (10, {"b"} if kind is PackAsha else {"a", "b"})  # the whole cohort, with the first result
    lost = {"trial": "b", "step": 17, "cohort": json.dumps({"b": None}), "diverged": True}
    assert scheduler.on_trial_result(None, SimpleNamespace(trial_id="tune-b"), lost) == "STOP"
    scheduler.on_trial_remove(None, SimpleNamespace(trial_id="tune-b"))
    scheduler.on_trial_complete(None, SimpleNamespace(trial_id="tune-a"), {})
    assert "PackAsha" in scheduler.debug_string() or kind is PackFifo


def test_an_exempt_trial_is_scored_never_stopped_and_not_counted():
    ledger = RungLedger(None, steps=[10, 30], eta=3, select_by="cider", exempt=("default",))
    found = ledger.judge(10, {"a": 0.1, "b": 0.2, "c": 0.3, "default": 0.9})
    assert {t for t, v in found.items() if v["action"] == "go"} == {"c", "default"}
    assert ledger.judge(30, {"default": 0.0})["default"]["state"] == "finished"
    low = RungLedger(None, steps=[10, 30], eta=3, select_by="cider", exempt=("default",))
    assert low.judge(10, {"a": 0.1, "b": 0.2, "c": 0.3, "default": 0.0})["default"]["action"] == "go"
    assert low.judge(30, {"default": None})["default"]["state"] == "diverged"


def test_trials_that_cannot_win_take_no_place_and_are_compared_among_themselves():
    scores = {"a": 0.1, "b": 0.2, "c": 0.3, "x": 0.9, "y": 0.8, "z": 0.7}
    plain = RungLedger(None, steps=[10, 30], eta=3, select_by="cider").judge(10, scores)
    assert going(plain) == {"x", "y"}  # all the places go to those that cannot win
    apart = RungLedger(None, steps=[10, 30], eta=3, select_by="cider", apart="xyz").judge(10, scores)
    assert going(apart) == {"c", "x"}
    assert apart["y"]["reason"] == "cider 0.8 at step 10: place 2 of 3 that cannot win, one in 3 goes on"
    assert apart["b"]["reason"] == "cider 0.2 at step 10: place 2 of 3, one in 3 goes on"
    few = RungLedger(None, steps=[10, 30], eta=3, select_by="cider", apart="xy")
    assert going(few.judge(10, {"a": 0.1, "x": 0.9, "y": 0.8})) == {"a"}
    assert few.judge(30, {"x": 0.5})["x"]["state"] == "finished"
