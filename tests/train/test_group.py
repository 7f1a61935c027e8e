"""Workers that share every step of a pack: what they compute together is what one computes alone."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
import torch
from tiny_models import with_dequantised
from workers import side_by_side

from raycap.config import from_dict
from raycap.data.store import Store
from raycap.errors import ConfigError, RunError
from raycap.models import load_model
from raycap.train.engine import PackEngine
from raycap.train.group import FRAME_BYTES, Group, Lead, follow

LOSSES = {"rel": 1e-5}
DELTA = 1e-3
"""As for a batch in pieces and a pack against plain PEFT: in fp32 the same terms are summed in another order, and Adam,
which divides a gradient by its own size, magnifies the rounding of those near zero. In fp64 1e-9, and far less, is met."""


@pytest.fixture
def grouped(config, make_stores, specs):
    """Trains `steps` with `size` workers; {"losses", "states", "engine"} by rank. `tinker(engine)` before the first."""

    def grouped(
        size, c, steps, *, count=2, dropout=0.1, tinker=lambda engine: None, then=lambda engine: None, dtype=None
    ):
        stores = make_stores(load_model(c.model, c.data, device="cpu"))
        c = from_dict({**c.to_dict(), "train": {**c.to_dict()["train"], "workers": size}})

        def work(group):
            engine = PackEngine(loaded(c, group, dtype), stores, c, 16, group)
            tinker(engine)
            for spec in specs(c, count, dropout=dropout):
                engine.admit(spec)
            losses = {}
            for _ in range(steps):
                for trial_id, result in engine.step().items():
                    losses.setdefault(trial_id, []).append(result.loss)
            more = then(engine)
            return {
                "losses": losses,
                "states": {t: engine.state(t) for t in engine.active},
                "then": more,
                "engine": engine,
            }

        return side_by_side(size, work)

    return grouped


LOADING = threading.Lock()


def loaded(c, group, dtype=None):
    """A worker's own model. One after the other, and nobody trains meanwhile: `transformers` sets the default dtype of
    the process, in which what prepares pixels would compute."""
    with LOADING:
        cm = load_model(c.model, c.data, device="cpu") if dtype is None else with_dequantised(c, dtype)
    group.collect(b"loaded")
    return cm


def identical(one, other):
    return all(
        torch.equal(x, y)
        for trial_id in one
        for kind in ("value", "m", "v")
        for path in one[trial_id][kind]
        for x, y in zip(one[trial_id][kind][path], other[trial_id][kind][path])
    )


def test_shares_are_joined_again_and_words_of_any_length_arrive():
    rows = np.arange(7)

    def work(group):
        said = [group.say(word if group.rank == 0 else b"") for word in words]
        mine = group.share(rows)
        return mine.tolist(), group.join([[f"a{r}" for r in mine], [f"b{r}" for r in mine]]), said, group.collect(
            b"x" * (group.rank + 1)
        )  # fmt: skip

    words = [b"", b"step", bytes(range(256)) * 20, b"e" * (FRAME_BYTES - 8), b"f" * (FRAME_BYTES - 7)]
    found = side_by_side(3, work)
    assert [f[0] for f in found] == [[0, 3, 6], [1, 4], [2, 5]]
    whole = [[f"a{r}" for r in rows], [f"b{r}" for r in rows]]
    assert all(f[1] == whole and f[2] == words and f[3] == [b"x", b"xx", b"xxx"] for f in found)
    alone = Group()
    assert alone.join(whole) == whole and alone.say(b"w") == b"w" and alone.collect(b"w") == [b"w"]


@pytest.mark.parametrize("batch", [8, 7])
def test_two_workers_are_one(grouped, config, dropping_twin, delta, batch):
    c = config(model__path=str(dropping_twin), train__batch=batch)
    (alone,) = grouped(1, c, 6)
    first, second = grouped(2, c, 6)
    assert first["losses"] == second["losses"] and identical(first["states"], second["states"])  # to the last bit
    for trial_id, losses in alone["losses"].items():
        assert first["losses"][trial_id] == pytest.approx(losses, **LOSSES)
        assert delta(alone["states"][trial_id]["value"], first["states"][trial_id]["value"]) <= DELTA


def test_in_fp64_two_workers_are_one_but_for_rounding(grouped, config, dropping_twin, delta):
    c = config(model__path=str(dropping_twin), train__batch=5, train__accumulation=5)
    (alone,) = grouped(1, c, 5, dtype=torch.float64)
    first, _ = grouped(2, c, 5, dtype=torch.float64)
    for trial_id, losses in alone["losses"].items():
        assert first["losses"][trial_id] == pytest.approx(losses, rel=1e-12)
        assert delta(alone["states"][trial_id]["value"], first["states"][trial_id]["value"]) <= 1e-9


def test_between_them_workers_read_each_row_once_an_epoch(grouped, config, monkeypatch):
    read, inner = {}, Store.pixels

    def pixels(self, rows):
        read.setdefault(threading.get_ident(), []).append(np.asarray(rows))
        return inner(self, rows)

    monkeypatch.setattr(Store, "pixels", pixels)
    # Not stored features: pixels are read for each step.
    c = config(lora__scope="all", data__captions="first", train__batch=5)
    first, _ = grouped(2, c, 12, count=1)
    shares = [np.concatenate(rows) for rows in read.values()]
    assert len(shares) == 2 and first["engine"].stores["train"].count == 12
    assert np.bincount(np.concatenate(shares)).tolist() == [5] * 12  # twelve steps of five rows
    assert sorted(map(len, shares)) == [24, 36]  # of the five rows of a step one has three


def test_scores_are_those_of_one_worker(grouped, config):
    c = config(train__val_images=5)

    def then(engine):
        return engine.evaluate(engine.active)

    (alone,) = grouped(1, c, 3, then=then)
    first, second = grouped(2, c, 3, then=then)
    for trial_id, result in alone["then"].items():
        for other in (first, second):
            found = other["then"][trial_id]
            assert found.captions == result.captions and list(found.captions) == list(result.captions)
            assert (found.cider, found.cider_se, found.collapse) == (result.cider, result.cider_se, result.collapse)
            assert found.val_loss == pytest.approx(result.val_loss, **LOSSES)
        assert first["then"][trial_id].val_loss == second["then"][trial_id].val_loss


def test_fewer_validation_images_than_workers(grouped, config):
    first, second = grouped(2, config(train__val_images=1), 1, then=lambda engine: engine.evaluate(engine.active))
    assert len(first["then"]["t0"].captions) == 1 and first["then"]["t0"] == second["then"]["t0"]


def test_one_worker_without_memory_makes_both_take_smaller_pieces(grouped, config, delta):
    def tinker(engine):
        inner = engine.cm.family.label_logits

        def limited(cm, batch, images):
            if engine.group.rank == 1 and len(batch["labels"]) > 2 * 2:
                raise torch.OutOfMemoryError("no room")
            return inner(cm, batch, images)

        family = type(engine.cm.family).__new__(type(engine.cm.family))
        family.__dict__ |= engine.cm.family.__dict__
        family.label_logits = limited
        object.__setattr__(engine.cm, "family", family)

    roomy, _ = grouped(2, config(), 3)
    tight, other = grouped(2, config(), 3, tinker=tinker)
    assert tight["engine"].micro == other["engine"].micro == 2
    assert identical(tight["states"], other["states"])
    for trial_id, losses in roomy["losses"].items():
        assert tight["losses"][trial_id] == pytest.approx(losses, **LOSSES)

    def none(engine):
        family = type(engine.cm.family).__new__(type(engine.cm.family))
        family.__dict__ |= engine.cm.family.__dict__
        if engine.group.rank == 1:
            family.label_logits = lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no"))
        object.__setattr__(engine.cm, "family", family)

    with pytest.raises(RunError, match=r"tune\.slots"):
        grouped(2, config(), 1, tinker=none)


def test_a_gradient_that_is_not_finite_on_one_worker_stops_the_slot_on_all(grouped, config):
    def tinker(engine):
        inner, calls = engine.stacks.collect, []

        def hurt(lanes=1):
            inner(lanes)
            calls.append(1)
            if engine.group.rank == 1 and len(calls) == 2:
                engine.stacks.grads[0] = torch.nan

        engine.stacks.collect = hurt

    first, second = grouped(2, config(), 3, tinker=tinker)
    updates = {t: s["updates"] for t, s in first["states"].items()}
    assert sorted(updates.values()) == [2, 3] and updates == {t: s["updates"] for t, s in second["states"].items()}
    assert identical(first["states"], second["states"])


def test_the_first_leads_and_the_others_follow(config, make_stores, specs, delta):
    c = config(train__workers=2)
    stores = make_stores(load_model(c.model, c.data, device="cpu"))
    reported = []

    def work(group):
        engine = PackEngine(loaded(c, group), stores, c, 4, group)
        if group.rank:
            return follow(engine, group, {"report": lambda saves: reported.append(saves)}), engine
        lead = Lead(engine, group)
        one, two, three = specs(c, 3, dropout=0.1)
        lead.admit(one)
        lead.admit(two)
        lead.step()
        lead.evaluate(["t0"])
        lead.say("report", saves=1)
        lead.pause("t0")
        lead.step()
        lead.resume("t0")
        state = lead.state("t0")
        lead.release("t0")
        lead.step()
        lead.admit(three)
        lead.admit(one, json_trip(state))  # as from a checkpoint, its best weights and all
        lead.step()
        lead.say("end", reason="done")
        return "done", engine

    (_, leader), (reason, follower) = side_by_side(2, work)
    assert reason == "done" and reported == [1]
    assert leader.active == follower.active == ["t1", "t2", "t0"]
    assert [leader.slots[t].step for t in leader.active] == [4, 1, 2]
    states = [{t: e.state(t) for t in e.active} for e in (leader, follower)]
    assert identical(*states)
    for t in ("t0", "t1", "t2"):
        assert states[0][t]["best_score"] == states[1][t]["best_score"]
        assert (states[0][t]["best"] is None) == (states[1][t]["best"] is None) == (t != "t0")


def json_trip(state):
    """A state as a checkpoint gives it back."""
    from raycap.train import checkpoint

    tensors, plain = checkpoint.apart(state)
    return checkpoint.together(checkpoint.from_bytes(checkpoint.to_bytes(tensors)), json.loads(json.dumps(plain)))


def test_a_worker_that_rounds_otherwise_takes_the_firsts_adapters(config, make_stores, specs):
    c = config(train__workers=2)
    stores = make_stores(load_model(c.model, c.data, device="cpu"))

    def work(group):
        engine = PackEngine(loaded(c, group), stores, c, 4, group)
        engine.admit(specs(c, 1)[0])
        engine.step()
        same = group.agree(engine.stacks)
        if group.rank:
            engine.stacks.m[0, 0] += 1e-3
        return same, group.agree(engine.stacks), {"t0": engine.state("t0")}

    first, second = side_by_side(2, work)
    assert first[:2] == second[:2] == ([], [1]) and identical(first[2], second[2])


def test_who_leaves_is_not_waited_for():
    def work(group):
        if group.rank:
            raise KeyError("died")
        group.add(torch.ones(3))

    with pytest.raises((KeyError, RuntimeError)):
        side_by_side(2, work, timeout_s=30)


def test_more_workers_than_rows_are_refused(config):
    with pytest.raises(ConfigError, match=r"train\.workers=9 leaves workers without a row of train\.batch=8"):
        config(train__workers=9)
    with pytest.raises(ConfigError, match=r"train\.workers=0"):
        config(train__workers=0)
    with pytest.raises(ConfigError, match=r"lora\.variant=dora trains on one worker"):
        config(lora__variant="dora", tune__slots=1, train__workers=2)
