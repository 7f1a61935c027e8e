"""The lease board: repeated calls, lapsed leases, packs and clients that come back."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from simulation import settings

from raycap.train.record import TrialRecord
from raycap.tune.board import AWAY_S, LEASE_S, RETURN_S, UNLEASED_S, Board
from raycap.tune.space import sample_trials

STOP = {"action": "stop", "state": "stopped", "reason": "too low"}
GO = {"action": "go", "state": "", "reason": ""}


@pytest.fixture
def time():
    return SimpleNamespace(now=0.0)


@pytest.fixture
def trials():
    return sample_trials(settings(trials=6))


@pytest.fixture
def board(trials, time):
    return Board(trials, rungs=[10, 30, 90], slots=2, packs=1, clock=lambda: time.now)


def report(active=(), cohorts=(), ended=(), trials=()):
    records = {}
    for trial in trials:
        records[trial.trial_id] = TrialRecord.of(trial)
    return {
        "active": dict(active), "cohorts": list(cohorts),
        "records": {t: {**records[t].to_dict(), "state": "running", "steps": s} for t, s in dict(active).items() if t in records},
        "ended": {t: {**records[t].to_dict(), "state": "stopped"} for t in ended},
    }  # fmt: skip


def cohort(step, **scores):
    return {"step": step, "scores": scores, "metrics": {t: {"step": step, "cider": s} for t, s in scores.items()}}


def admitted(orders):
    return [spec["trial_id"] for spec in orders["admit"]]


def test_a_pack_gets_the_next_trials_in_order_whether_their_clients_are_there_or_not(board):
    board.lease("t03", "c3")
    orders = board.register("pack-0", "n", 1, report())
    assert admitted(orders) == ["t00", "t01"] and not orders["hold"]
    assert admitted(board.orders("pack-0", "n")) == ["t00", "t01"]  # asked again, told again
    assert admitted(board.exchange("pack-0", "n", report({"t00": 0, "t01": 0}))) == []


def test_packs_that_have_their_place_are_counted_before_they_register(trials):
    board = Board(trials, rungs=[10], slots=2, packs=2)
    assert board.snapshot()["arrived"] == 0
    board.arrive("pack-0")
    board.arrive("pack-0")  # a worker that was started again
    assert board.snapshot()["arrived"] == 1 and not board.snapshot()["packs"]
    board.register("pack-1", "n", 1, report())  # to a board that was killed meanwhile, none has arrived
    assert board.snapshot()["arrived"] == 2


def test_packs_share_the_trials_evenly(trials):
    board = Board(trials, rungs=[10], slots=6, packs=2)
    assert admitted(board.register("pack-0", "a", 1, report())) == ["t00", "t01", "t02"]
    assert admitted(board.register("pack-1", "b", 2, report())) == ["t03", "t04", "t05"]


def start(board):
    board.register("pack-0", "n", 1, report())
    for trial in ("t00", "t01"):
        board.lease(trial, f"client of {trial}")
    board.orders("pack-0", "n")
    return board.exchange("pack-0", "n", report({"t00": 0, "t01": 0}))


def test_a_cohort_holds_its_pack_until_all_its_verdicts_are_in(board, trials):
    start(board)
    at_rung = report({"t00": 10, "t01": 10}, [cohort(10, t00=0.1, t01=0.2)], trials=trials)
    assert board.exchange("pack-0", "n", at_rung)["hold"]
    event = board.next_event("t00", "client of t00", 0)
    assert event["kind"] == "rung" and event["cohort"] == {"t00": 0.1, "t01": 0.2}
    board.exchange("pack-0", "n", at_rung)
    assert board.next_event("t00", "client of t00", 1) is None  # reported twice, heard once
    board.judge(10, {"t00": STOP})
    assert board.orders("pack-0", "n")["hold"]
    board.proceed("t01", 10)
    orders = board.orders("pack-0", "n")
    assert not orders["hold"] and orders["verdicts"] == {"t00": STOP, "t01": GO}
    assert admitted(orders) == []  # t02 waits until t00 has left its slot
    board.lease("t02", "c2")
    left = report({"t01": 10}, ended=["t00"], trials=trials)
    assert admitted(board.exchange("pack-0", "n", left)) == ["t02"]
    assert board.next_event("t00", "client of t00", 1)["kind"] == "end"


def test_a_strict_verdict_is_not_softened_by_a_late_proceed(board):
    start(board)
    board.judge(10, {"t00": STOP})
    board.proceed("t00", 10)
    assert board.verdicts[10]["t00"] == STOP


def test_a_restarted_worker_gets_its_trials_back_and_judged_rungs_are_answered_at_once(board, trials):
    start(board)
    board.exchange("pack-0", "n", report({"t00": 10, "t01": 10}, [cohort(10, t00=0.1, t01=0.2)], trials=trials))
    board.judge(10, {"t00": STOP, "t01": GO})
    orders = board.register("pack-0", "second life", 2, report({"t00": 7, "t01": 7}, trials=trials))
    assert admitted(orders) == [] and not orders["hold"]
    assert "died" in board.notes[0]
    again = report({"t00": 10, "t01": 10}, [cohort(10, t00=0.1, t01=0.2)], trials=trials)
    assert board.exchange("pack-0", "second life", again)["verdicts"] == {"t00": STOP, "t01": GO}
    assert board.exchange("pack-0", "n", again) == {"stale": True}
    assert not board.alive("pack-0", "n") and board.alive("pack-0", "second life")


def test_a_worker_without_a_checkpoint_gets_its_trials_afresh(board):
    start(board)
    assert admitted(board.register("pack-0", "second life", 2, report())) == ["t00", "t01"]


def test_a_board_that_lost_its_memory_learns_everything_again(board, trials, time):
    fresh = Board(trials, rungs=[10, 30, 90], slots=2, packs=1, verdicts={"10": {"t00": STOP, "t01": GO}})
    assert fresh.exchange("pack-0", "n", report()) == {"unknown": True}
    again = report({"t00": 10, "t01": 10}, [cohort(10, t00=0.1, t01=0.2)], trials=trials)
    assert fresh.register("pack-0", "n", 1, again)["verdicts"] == {"t00": STOP, "t01": GO}
    assert fresh.next_event("t01", "client of t01", 1) == {"kind": "lost"}
    fresh.lease("t01", "client of t01")
    assert fresh.next_event("t01", "client of t01", 0)["kind"] == "rung"


def test_a_lease_lapses_and_the_driver_is_told_of_the_cohort_that_nobody_can_ask_about(board, trials, time):
    start(board)
    board.exchange("pack-0", "n", report({"t00": 10, "t01": 10}, [cohort(10, t00=0.1, t01=0.2)], trials=trials))
    assert board.snapshot()["unclaimed"] == []
    time.now = LEASE_S + 1
    assert board.orders("pack-0", "n")["hold"]
    assert board.snapshot()["unclaimed"] == [{"step": 10, "scores": {"t00": 0.1, "t01": 0.2}}]
    assert board.next_event("t00", "client of t00", 0) == {"kind": "lost"}
    board.judge(10, {"t00": STOP, "t01": GO})
    assert board.snapshot()["unclaimed"] == []


def test_a_cohort_without_a_first_client_is_soon_the_drivers(board, trials, time):
    board.register("pack-0", "n", 1, report())
    board.exchange("pack-0", "n", report({"t00": 0, "t01": 0}))
    board.exchange("pack-0", "n", report({"t00": 10, "t01": 10}, [cohort(10, t00=0.1, t01=0.2)], trials=trials))
    assert board.snapshot()["unclaimed"] == []
    time.now = UNLEASED_S + 0.1
    assert board.snapshot()["unclaimed"] == [{"step": 10, "scores": {"t00": 0.1, "t01": 0.2}}]
    board.judge(10, {"t00": STOP, "t01": GO})
    assert board.snapshot()["unclaimed"] == []
    board.lease("t00", "late client")  # hears of its rung all the same
    assert board.next_event("t00", "late client", 0)["kind"] == "rung"


def test_a_restarted_client_takes_its_trial_over(board, trials):
    start(board)
    board.lease("t00", "second client")
    assert board.next_event("t00", "client of t00", 0) == {"kind": "lost"}
    board.release("t00", "client of t00")  # the old one's last word changes nothing
    assert board.next_event("t00", "second client", 0) is None


def test_trials_of_a_lost_pack_go_on_elsewhere(trials, time):
    board = Board(trials, rungs=[10], slots=2, packs=2, clock=lambda: time.now)
    for trial in trials[:4]:
        board.lease(trial.trial_id, "c")
    assert admitted(board.register("pack-0", "a", 1, report())) == ["t00", "t01"]
    assert admitted(board.register("pack-1", "b", 2, report())) == ["t02", "t03"]
    assert board.pack_lost("pack-0")
    orders = board.exchange("pack-1", "b", report(ended=["t02"], active={"t03": 5}, trials=trials))
    assert admitted(orders) == ["t00"] and orders["admit"][0]["from"] == "pack-0"
    assert not board.pack_lost("pack-1")


def test_trials_of_a_silent_pack_go_on_elsewhere_and_are_not_trained_twice(trials, time):
    board = Board(trials, rungs=[10], slots=3, packs=2, clock=lambda: time.now)
    assert admitted(board.register("pack-0", "a", 1, report())) == ["t00", "t01", "t02"]
    assert admitted(board.register("pack-1", "b", 2, report())) == ["t03", "t04", "t05"]
    at_work = report({"t00": 4, "t01": 4, "t02": 4}, trials=trials)
    board.exchange("pack-0", "a", at_work)
    time.now = AWAY_S - 1
    mine = report({"t05": 5}, ended=["t03", "t04"], trials=trials)
    assert admitted(board.exchange("pack-1", "b", mine)) == []
    assert board.alive("pack-0", "a")  # a long step: its main thread is silent, its process is not
    time.now = 2 * AWAY_S - 2
    board.alive("pack-1", "b")
    assert admitted(board.exchange("pack-1", "b", mine)) == []
    time.now += 2
    orders = board.exchange("pack-1", "b", mine)
    assert [(o["trial_id"], o["from"]) for o in orders["admit"]] == [("t00", "pack-0"), ("t01", "pack-0")]
    assert "silent" in board.notes[-1] and not board.snapshot()["packs"]["pack-0"]["here"]
    board.exchange("pack-1", "b", report({"t00": 4, "t01": 4, "t05": 5}, trials=trials))
    # The one that was away lives: it is told to leave, comes back with its checkpoint, and keeps what nobody took.
    assert not board.alive("pack-0", "a") and board.exchange("pack-0", "a", at_work) == {"stale": True}
    back = board.register("pack-0", "c", 3, at_work)
    assert sorted(back["drop"]) == ["t00", "t01"] and board.seats["t02"].pack == "pack-0"
    assert board.snapshot()["packs"]["pack-0"]["lives"] == 2


def test_a_resumed_sweep_gives_each_pack_the_trials_of_its_checkpoint(trials, time):
    held = {"t00": "pack-1", "t01": "pack-1"}
    board = Board(trials, rungs=[10], slots=2, packs=2, holders=held, clock=lambda: time.now)
    assert admitted(board.register("pack-0", "a", 1, report())) == ["t02", "t03"]
    assert admitted(board.register("pack-1", "b", 2, report({"t00": 4, "t01": 4}, trials=trials))) == []
    assert board.seats["t00"].pack == "pack-1"
    # A pack that does not come: after a while the others take its trials from its checkpoint.
    board = Board(trials[:2], rungs=[10], slots=2, packs=2, holders=held, clock=lambda: time.now)
    assert admitted(board.register("pack-0", "a", 1, report())) == []
    time.now += RETURN_S
    assert [o["from"] for o in board.exchange("pack-0", "a", report())["admit"]] == ["pack-1", "pack-1"]


def test_an_ended_trial_that_a_checkpoint_still_holds_is_repeated_without_changing_its_record(trials):
    records = {"t00": TrialRecord.of(trials[0])}
    records["t00"].state, records["t00"].steps = "stopped", 10
    board = Board(trials, rungs=[10, 30], slots=2, packs=1, verdicts={10: {"t00": STOP}}, records=records)
    board.lease("t01", "c1")
    orders = board.register("pack-0", "n", 1, report({"t00": 8}, trials=trials))
    assert admitted(orders) == ["t01"]  # the other slot
    at_rung = report({"t00": 10, "t01": 2}, [cohort(10, t00=0.1)], trials=trials)
    assert board.exchange("pack-0", "n", at_rung)["verdicts"] == {"t00": STOP}
    board.lease("t02", "c2")
    after = board.exchange("pack-0", "n", report({"t01": 2}, ended=["t00"], trials=trials))
    assert admitted(after) == ["t02"]
    assert board.seats["t00"].record.steps == 10


def test_stop_and_error_reach_packs_and_clients(board):
    start(board)
    board.stop()
    assert board.exchange("pack-0", "n", report({"t00": 3, "t01": 3}))["stop"]
    assert board.next_event("t00", "client of t00", 0) == {"kind": "interrupted"}
    board.fail("DataError", "first")
    board.fail("RunError", "second")
    assert board.snapshot()["error"] == {"kind": "DataError", "message": "first"}


def test_the_estimate_of_what_is_left_thins_out(trials):
    full = Board(trials[:1], rungs=[10, 30, 90], slots=1, packs=1)
    halved = Board(trials[:1], rungs=[10, 30, 90], slots=1, packs=1, thinning=2.0)
    assert full.snapshot()["steps_left"] == 90
    assert halved.snapshot()["steps_left"] == 10 + 20 / 2 + 60 / 4


def test_what_the_tokeniser_made_of_each_split_reaches_the_driver(board):
    board.register("pack-0", "n", 1, report())
    assert board.snapshot()["tokens"] == {}
    board.exchange("pack-0", "n", {**report(), "tokens": {"val": {"captions": 3}}})
    board.exchange("pack-0", "n", {**report(), "tokens": {"val": {"captions": 3}, "train": {"captions": 9}}})
    assert board.snapshot()["tokens"] == {"val": {"captions": 3}, "train": {"captions": 9}}
