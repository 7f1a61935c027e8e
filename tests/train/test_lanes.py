"""Lanes: the same step cut into other pieces, done side by side."""

from __future__ import annotations

import dataclasses
import threading
from itertools import pairwise

import pytest
import torch

from raycap.train.lanes import RANK_COST, Lanes, lanes_for, like_ranks


def with_lanes(engine, count):
    engine.lanes = engine.validator.lanes = Lanes(count, 1, min_rows=1)
    engine.stacks.lanes = count
    return engine


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("slots", [1, 2, 5])
def test_lanes_train_what_one_lane_trains(make_engine, config, specs, run, delta, slots, dropout):
    """Three lanes: rows are spread over them for one slot and two, slots for five."""
    c = config(train__base_dropout=dropout > 0)
    engines = [with_lanes(make_engine(c, dtype="fp64"), count) for count in (1, 3)]
    losses = []
    for engine in engines:
        for spec in specs(c, slots, dropout=dropout):
            engine.admit(spec)
        losses.append(run(engine, 6))
    one, other = engines
    assert len(other.stacks.spans) == (3 if slots == 5 else 1)
    assert len(other.stacks._work_grads) == (1 if slots == 5 else 3), "what lanes do not share needs no copy each"
    for trial_id in one.active:
        assert losses[1][trial_id] == pytest.approx(losses[0][trial_id], rel=1e-9)
        assert delta(one.state(trial_id)["value"], other.state(trial_id)["value"]) < 1e-9
    alone, wide = (engine.evaluate(engine.active) for engine in engines)
    for trial_id in alone:
        assert wide[trial_id].captions == alone[trial_id].captions
        assert wide[trial_id].val_loss == pytest.approx(alone[trial_id].val_loss, rel=1e-9)


def test_the_same_lanes_repeat_bitwise(make_engine, config, specs, run):
    c = config()
    found = []
    for _ in range(2):
        engine = with_lanes(make_engine(c), 2)
        for spec in specs(c, 3, dropout=0.1):
            engine.admit(spec)
        run(engine, 5)
        found.append(engine)
    for trial_id in found[0].active:
        first, second = (e.state(trial_id)["value"] for e in found)
        assert all(torch.equal(x, y) for path in first for x, y in zip(first[path], second[path]))


def test_each_lane_is_a_thread_of_its_own_and_answers_come_in_order():
    lanes = Lanes(2, 1, min_rows=4)
    assert [lanes.worth(rows) for rows in (1, 7, 8, 100)] == [1, 1, 2, 2]
    met = threading.Barrier(2)

    def work(lane, item):
        met.wait(timeout=10)  # passes only when two are at work at the same time
        return lane, item, threading.current_thread().name

    found = lanes.run(work, [1, 2, 3, 4])
    assert [(lane, item) for lane, item, _ in found] == [(0, 1), (1, 2), (0, 3), (1, 4)]
    assert len({name for _, _, name in found}) == 2
    lanes.close()


def test_an_error_in_a_lane_reaches_the_caller_when_all_have_ended():
    lanes, ended = Lanes(2, 1, min_rows=1), []

    def work(lane, item):
        if item == "bad":
            raise ValueError("in a lane")
        ended.append(item)

    with pytest.raises(ValueError, match="in a lane"):
        lanes.run(work, ["bad", "good"])
    assert ended == ["good"]
    lanes.close()


def test_a_machine_of_one_core_and_a_gpu_have_one_lane(monkeypatch):
    assert lanes_for(torch.device("cuda")).count == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert lanes_for(torch.device("cpu")).count == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    lanes = lanes_for(torch.device("cpu"))
    assert (lanes.count, lanes.threads_each) == (4, 4)


def test_lanes_share_the_cores_of_those_without_work():
    before, lanes = torch.get_num_threads(), Lanes(4, 2, min_rows=1)

    def threads(lane: int, item: int) -> int:
        return torch.get_num_threads()

    assert lanes.run(threads, range(4)) == [2] * 4
    assert lanes.run(threads, range(2)) == [4] * 2
    assert lanes.run(threads, range(5)) == [2] * 4 + [8]
    assert torch.get_num_threads() == before
    lanes.close()


def test_rows_are_spread_over_as_many_lanes_as_are_worth_it():
    assert [Lanes(2, 1).worth(rows) for rows in (4, 16, 31, 32, 64)] == [1, 1, 1, 2, 2]
    assert Lanes(4, 1).worth(48) == 3


def test_slots_are_spread_where_each_lane_gets_some():
    assert [Lanes(2, 1).of_slots(16, slots) for slots in (1, 2, 3, 12)] == [1, 2, 2, 2]
    assert [Lanes(4, 1).of_slots(64, slots) for slots in (1, 2, 3, 4)] == [1, 1, 1, 4]  # else rows are
    assert Lanes(1, 2).of_slots(16, 12) == 1
    assert Lanes(4, 1).of_slots(1, 40) == 2  # one row a slot: 16 slots are worth a lane


def test_slots_of_like_rank_go_together_and_no_lane_waits_long():
    ranks = [2, 32, 8, 2, 16, 4, 32, 8, 4, 32, 8, 2]
    for groups in (1, 2, 3, 4, 12):
        found = like_ranks(ranks, groups)
        assert len(found) == groups and sorted(i for g in found for i in g) == list(range(12)) and all(found)
        spans = [[ranks[i] for i in g] for g in found]
        assert all(min(a) >= max(b) for a, b in pairwise(spans))
    cost = [len(g) * (1 + RANK_COST * max(ranks[i] for i in g)) for g in like_ranks(ranks, 2)]
    every = [max(n * (1 + RANK_COST * 32), (12 - n) * (1 + RANK_COST * sorted(ranks)[::-1][n])) for n in range(1, 12)]
    assert max(cost) == pytest.approx(min(every))
    assert like_ranks([8] * 6, 2) == [[0, 1, 2], [3, 4, 5]]


def test_a_narrow_lane_computes_no_wider_than_its_own_ranks(make_engine, config, specs):
    engine = with_lanes(make_engine(config()), 2)
    for spec, rank in zip(specs(config(), 4), (2, 16, 2, 16)):
        engine.admit(dataclasses.replace(spec, r=rank))
    engine.step()
    site = next(s for s in engine.stacks.sites.values() if s.parts)
    assert [tuple(part.A.shape[:2]) for part in site.parts] == [(2, 16), (2, 2)]
    assert engine.stacks.value.shape[1] == engine.stacks.width and engine.stacks.rank == 16


def test_lanes_take_rows_where_each_would_run_the_tower_for_all_images(make_engine, config, specs):
    c = config(lora__scope="vision", lora__targets=["q_proj", "fc1"])
    engine = with_lanes(make_engine(c), 2)
    for spec in specs(c, 4):
        engine.admit(spec)
    engine.step()
    assert not engine.images.stored and len(engine.stacks.spans) == 1
    assert {end - begin for begin, end in engine._cuts(engine.share, 4)[0]} == {engine.share // 2}


def test_a_little_work_is_done_by_one_thread_and_the_others_come_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for lanes, products, threads in (
            (Lanes(2, 1), 16 * 128 * 128, 1),
            (Lanes(2, 1), 16 * 768 * 768, 2),
            (Lanes(1, 2), 16 * 128 * 128, 2),  # one lane: a GPU, or a core of its own
        ):
            with pytest.raises(ZeroDivisionError), lanes.threads(products):
                assert torch.get_num_threads() == threads
                raise ZeroDivisionError
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
