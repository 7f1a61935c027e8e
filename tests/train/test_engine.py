"""The engine: what leaves no trace, what is bitwise repeated, what stays in its slot, what is refused."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from peft import PeftModel

from raycap.errors import ConfigError, DataError, ModelError, RunError
from raycap.models import load_model
from raycap.models.quantise import dequantise, quantised_linears
from raycap.train import checkpoint
from raycap.train.lanes import Lanes
from raycap.train.optim import FIRST_LOSS_SCALE
from raycap.train.padding import longest_captions


def weights_of(engine, trial_id):
    return engine.state(trial_id)["value"]


def identical(one, other):
    return set(one) == set(other) and all(torch.equal(x, y) for path in one for x, y in zip(one[path], other[path]))


def test_training_moves_adapters_and_never_the_base(make_engine, config, specs, run):
    c = config()
    engine = make_engine(c)
    linears = quantised_linears(engine.cm.model)
    assert linears
    packed = {
        n: (m.weight.data.clone(), m.weight.quant_state.absmax.clone(), dequantise(m)) for n, m in linears.items()
    }
    plain = {n: p.detach().clone() for n, p in engine.cm.model.named_parameters()}
    for spec in specs(c, 3, dropout=0.1):
        engine.admit(spec)
    begin = {t: weights_of(engine, t) for t in engine.active}
    losses = run(engine, 20)
    engine.evaluate(engine.active)
    for trial_id in engine.active:
        for path, (a, b) in weights_of(engine, trial_id).items():
            assert not torch.equal(a, begin[trial_id][path][0])
            assert b.abs().max() > 0
    assert min(losses["t2"]) < losses["t2"][0]
    engine.close()
    for name, module in quantised_linears(engine.cm.model).items():
        assert torch.equal(module.weight.data, packed[name][0])
        assert torch.equal(module.weight.quant_state.absmax, packed[name][1])
        assert torch.equal(dequantise(module), packed[name][2])
    after = dict(engine.cm.model.named_parameters())
    # The tower may have been given a wrapper that passes stored features through.
    same = {n.replace("image_encoder.tower.", "image_encoder."): p for n, p in after.items()}
    assert all(torch.equal(same[n], p) for n, p in plain.items())


def test_evaluation_leaves_no_trace(make_engine, config, specs, run):
    c = config(train__base_dropout=True)
    quiet, busy = make_engine(c), make_engine(c)
    for spec in specs(c, 3, dropout=0.1):
        quiet.admit(spec)
        busy.admit(spec)
    first = run(quiet, 8)
    second = run(busy, 4)
    busy.evaluate(["t1"])
    busy.evaluate(busy.active)
    busy.zero_shot("val")
    busy.caption("t0", "val")
    for trial_id, losses in run(busy, 4).items():
        second[trial_id] += losses
    assert first == second  # bitwise, in fp32
    for trial_id in quiet.active:
        assert identical(weights_of(quiet, trial_id), weights_of(busy, trial_id))


def test_resumed_is_bitwise_what_was_not_interrupted(make_engine, config, specs, run, tmp_path):
    c = config()
    straight, broken, resumed = make_engine(c), make_engine(c), make_engine(c)
    for engine in (straight, broken):
        for spec in specs(c, 3, dropout=0.1):
            engine.admit(spec)
    losses = run(straight, 9)
    run(broken, 4)
    broken.evaluate(["t0"])
    checkpoint.save(tmp_path / "c", {t: broken.state(t) for t in broken.active})
    for trial_id, state in checkpoint.load(tmp_path / "c").items():
        resumed.admit(next(s for s in specs(c, 3, dropout=0.1) if s.trial_id == trial_id), state)
    rest = run(resumed, 5)
    assert {t: v[4:] for t, v in losses.items()} == rest
    for trial_id in straight.active:
        assert identical(weights_of(straight, trial_id), weights_of(resumed, trial_id))
    assert identical(broken.state("t0")["best"], resumed.state("t0")["best"])
    assert resumed.state("t1")["best"] is None


@pytest.mark.parametrize("pieces", [2, 4])
def test_accumulated_is_one_large_batch(make_engine, config, specs, dropping_twin, run, delta, pieces):
    path = str(dropping_twin)
    whole, parts = config(model__path=path), config(model__path=path, train__accumulation=pieces)
    one, many = make_engine(whole), make_engine(parts)
    for engine in (one, many):
        for spec in specs(whole, 2, dropout=0.1):
            engine.admit(spec)
    single, pieced = run(one, 8), run(many, 8)
    for trial_id, losses in single.items():
        assert pieced[trial_id] == pytest.approx(losses, rel=1e-5)
        assert delta(weights_of(one, trial_id), weights_of(many, trial_id)) <= 1e-3


def test_out_of_memory_halves_the_micro_batch_and_goes_on(make_engine, config, specs, run, monkeypatch):
    c = config()
    roomy, tight = make_engine(c), make_engine(c)
    for engine in (roomy, tight):
        for spec in specs(c, 2, dropout=0.1):
            engine.admit(spec)
    inner = tight.cm.family.label_logits

    def limited(cm, batch, images):
        if len(batch["labels"]) > 2 * 3:
            raise torch.OutOfMemoryError("no room")
        return inner(cm, batch, images)

    monkeypatch.setattr(tight.cm.family, "label_logits", limited)
    first, second = run(roomy, 4), run(tight, 4)
    assert tight.micro == 2
    for trial_id in first:
        assert second[trial_id] == pytest.approx(first[trial_id], rel=1e-5)
    monkeypatch.setattr(tight.cm.family, "label_logits", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    with pytest.raises(RunError, match=r"tune\.slots"):
        tight.step()


@pytest.mark.parametrize("where", ["weights", "gradient"])
def test_a_slot_that_is_not_finite_fails_alone(make_engine, config, specs, run, where):
    c = config()
    clean, hurt = make_engine(c), make_engine(c)
    for engine in (clean, hurt):
        for spec in specs(c, 3):
            engine.admit(spec)
        run(engine, 2)
    if where == "weights":
        hurt.stacks.value[1] = math.nan
    else:
        collect = hurt.stacks.collect

        def spoiled(lanes):
            collect(lanes)
            hurt.stacks.grads[1, 0] = math.inf

        hurt.stacks.collect = spoiled
    before = weights_of(hurt, "t1")
    for _ in range(3):
        wanted, found = clean.step(), hurt.step()
        assert not found["t1"].finite
        assert math.isfinite(found["t1"].loss) == (where == "gradient")
        for trial_id in ("t0", "t2"):
            assert found[trial_id] == wanted[trial_id]
            assert found[trial_id].finite
    assert found["t1"].step == 5
    if where == "gradient":
        assert identical(before, weights_of(hurt, "t1"))
        assert hurt.state("t1")["updates"] == 2
    scored = hurt.evaluate(["t0", "t1"])
    assert math.isfinite(scored["t0"].val_loss)
    # What is broken has no score, whatever captions come out of it.
    assert math.isfinite(scored["t1"].val_loss) == math.isfinite(scored["t1"].cider) == (where == "gradient")
    assert (hurt.state("t1")["best"] is None) == (where == "weights")


def test_slots_may_differ_in_their_choice_of_captions(make_engine, config, specs, run):
    c = config()
    choices = ["first", "random-per-epoch", "first", "all"]
    trials = [dataclasses.replace(s, captions=choice) for s, choice in zip(specs(c, 4), choices)]
    for group in (trials[:3], trials):  # three that share their images, then one with other images too
        packed = make_engine(c)
        for spec in group:
            packed.admit(spec)
        together = run(packed, 4)
        for spec in group:
            alone = make_engine(c)
            alone.admit(spec)
            assert run(alone, 4)[spec.trial_id] == pytest.approx(together[spec.trial_id], rel=1e-5), spec.captions
    pairs = {choice: packed.pairs(choice, 1) for choice in choices}
    assert np.array_equal(pairs["first"][:, 0], pairs["random-per-epoch"][:, 0])
    assert not np.array_equal(pairs["first"], pairs["random-per-epoch"])
    assert not np.array_equal(pairs["first"][:, 0], pairs["all"][:, 0])


def test_buckets_by_length_cut_padding_and_keep_the_batch(make_engine, config, specs, run):
    c = config(train__accumulation=4)
    engine = make_engine(c)
    for spec in specs(c, 2):
        engine.admit(spec)
    run(engine, 6)
    assert 0 < engine.padding.share < engine.padding.share_as_drawn
    train = engine.stores["train"]
    for choice in ("all", "first", "random-per-epoch"):
        drawn = engine.pairs(choice, 3)
        bucketed = engine.bucketed(choice, drawn)
        assert sorted(map(tuple, drawn.tolist())) == sorted(map(tuple, bucketed.tolist()))
        lengths = train.token_lens(bucketed) if choice == "all" else longest_captions(train, bucketed[:, 0])
        assert (np.diff(lengths) >= 0).all()
    whole = [[row, j] for row in range(train.count) for j in range(train.captions_per_image[row])]
    every = train.token_lens(np.array(whole))
    ends = np.cumsum(train.captions_per_image)
    assert longest_captions(train, np.array([4, 0])).tolist() == [max(every[ends[3] : ends[4]]), max(every[: ends[0]])]


def test_a_choice_by_scores_that_are_not_there_is_refused(make_engine, config, specs):
    c = config()
    with pytest.raises(DataError, match="best-clipscore"):
        make_engine(c).admit(dataclasses.replace(specs(c, 1)[0], captions="best-clipscore"))


@pytest.mark.parametrize("count", [1, 4])
def test_one_base_product_a_linear_and_step(make_engine, config, specs, count):
    c = config()
    engine = make_engine(c)
    engine.lanes = Lanes()  # with two of them each applies it to its own rows
    for spec in specs(c, count):
        engine.admit(spec)
    calls = {}
    engine.step()
    for path in engine.linears:  # one product in each of their calls: tests/models/test_stacked.py
        site = engine.stacks.sites[path]
        site.register_forward_hook(lambda *_, p=path: calls.__setitem__(p, calls.get(p, 0) + 1))
    engine.step()
    assert calls == dict.fromkeys(engine.linears, 1)
    for _ in range(2):
        engine.step()
    assert engine.stacks.rebuilds == 1
    engine.evaluate(engine.active)
    engine.step()
    assert engine.stacks.rebuilds == 1
    engine.release("t0")
    if count > 1:
        engine.step()
        assert engine.stacks.rebuilds == 2


def test_slots_at_different_steps_see_their_own_rows(make_engine, config, specs, run):
    c = config()
    early, late = specs(c, 2)
    engine, alone = make_engine(c), make_engine(c)
    engine.admit(early)
    run(engine, 3)
    engine.admit(late)
    alone.admit(late)
    assert run(engine, 3)["t1"] == pytest.approx(run(alone, 3)["t1"], rel=1e-5)


def test_evaluation_scores_captions_of_each_slot(make_engine, config, specs, run, delta):
    c = config(decode__batch=9)
    engine = make_engine(c)
    for spec in specs(c, 3):
        engine.admit(spec)
    run(engine, 10)
    found = engine.evaluate(["t2", "t0"])
    assert list(found) == ["t2", "t0"]
    val = engine.stores["val"]
    for trial_id, result in found.items():
        assert result.step == 10
        assert list(result.captions) == val.image_ids
        assert math.isfinite(result.val_loss)
        assert math.isfinite(result.cider)
        assert result.cider_se >= 0
        assert "collapsed" in result.collapse
        assert engine.caption(trial_id, "val") == result.captions
    again = engine.evaluate(engine.active)
    for trial_id, result in found.items():
        assert again[trial_id].captions == result.captions
        assert again[trial_id].val_loss == pytest.approx(result.val_loss, rel=1e-5)
    one = make_engine(c)
    one.admit(specs(c, 3)[2], engine.state("t2"))
    assert one.evaluate(["t2"])["t2"].captions == found["t2"].captions


@pytest.mark.parametrize("beams", [1, 3])
def test_slots_decoded_together_are_decoded_by_plain_peft(make_engine, config, specs, run, tmp_path, beams):
    c = config(decode__num_beams=beams, decode__batch=18, train__lr=2e-2)
    engine = make_engine(c)
    for spec in specs(c, 3):
        engine.admit(spec)
    run(engine, 12)
    found = engine.evaluate(engine.active)
    store = engine.stores["val"]
    for trial_id, result in found.items():
        plain = load_model(c.model, c.data, device="cpu")
        PeftModel.from_pretrained(plain.model, str(engine.export(trial_id, tmp_path / trial_id, which="last")))
        pixels = plain.family.pixel_values(plain.processor, torch.from_numpy(store.pixels(range(store.count))))
        assert list(result.captions.values()) == plain.family.generate(plain, pixels, c.decode)
    assert len({tuple(r.captions.values()) for r in found.values()}) > 1


def test_zero_shot_is_the_base(make_engine, config, specs, run):
    c = config()
    engine = make_engine(c)
    before = engine.zero_shot("val")
    engine.admit(specs(c, 1)[0])
    run(engine, 10)
    assert engine.zero_shot("val") == before
    plain = load_model(c.model, c.data, device="cpu")
    store = engine.stores["val"]
    pixels = plain.family.pixel_values(plain.processor, torch.from_numpy(store.pixels(range(store.count))))
    assert list(before.values()) == plain.family.generate(plain, pixels, c.decode)


@pytest.mark.parametrize("select_by", ["cider", "val_loss"])
def test_the_best_rung_is_what_is_exported(make_engine, config, specs, run, tmp_path, monkeypatch, select_by):
    c = config(train__select_by=select_by)
    engine = make_engine(c)
    engine.admit(specs(c, 1)[0])
    with pytest.raises(RunError, match="never scored"):
        engine.export("t0", tmp_path / "none")
    scores, kept = iter([0.2, 0.5, 0.4]), []
    evaluate = engine.validator.evaluate

    def scripted(store, slots):
        score = next(scores)
        return [dataclasses.replace(r, cider=score, val_loss=-score) for r in evaluate(store, slots)]

    monkeypatch.setattr(engine.validator, "evaluate", scripted)
    for _ in range(3):
        run(engine, 3)
        engine.evaluate(["t0"])
        kept.append(weights_of(engine, "t0"))
    assert identical(engine.state("t0")["best"], kept[1])
    engine.export("t0", tmp_path / "best")
    engine.export("t0", tmp_path / "last", which="last")
    for name, wanted in (("best", kept[1]), ("last", kept[2])):
        fresh = make_engine(c)
        fresh.admit_adapter(specs(c, 1)[0], tmp_path / name)
        assert identical(weights_of(fresh, "t0"), wanted)


def test_an_exported_slot_gives_the_same_logits_in_plain_peft(make_engine, config, specs, run, tmp_path):
    c = config()
    engine = make_engine(c)
    for spec in specs(c, 4):
        engine.admit(spec)
    run(engine, 10)
    store, pairs = engine.stores["val"], np.array([[i, 0] for i in range(6)])
    text = engine.validator.text(store, pairs)
    pixels = engine.cm.family.pixel_values(engine.cm.processor, torch.from_numpy(store.pixels(pairs[:, 0])))
    for trial_id in engine.active:
        folder = engine.export(trial_id, tmp_path / trial_id, which="last")
        with engine._decoding([trial_id]):
            mine = engine.cm.family.label_logits(engine.cm, text, pixels).logits
        plain = load_model(c.model, c.data, device="cpu")
        peft = PeftModel.from_pretrained(plain.model, str(folder))
        with torch.no_grad():
            theirs = peft(**text, pixel_values=pixels).logits[:, -text["labels"].shape[1] : -1]
        assert torch.allclose(mine, theirs[text["labels"][:, 1:] != -100], atol=1e-5, rtol=1e-5)


def test_projector_and_vision_scopes_train_through_the_tower(make_engine, config, specs, run):
    for scope, targets in (("projector", ["visual_projection.0"]), ("vision", ["q_proj", "fc1"])):
        c = config(lora__scope=scope, lora__targets=targets)
        engine = make_engine(c)
        for spec in specs(c, 2):
            engine.admit(spec)
        together = run(engine, 3)
        # The tower's features stay true while only the projector behind it trains.
        assert (engine.stores["train"].features is None) == (scope == "vision")
        assert all(b.abs().max() > 0 for t in engine.active for _, b in weights_of(engine, t).values())
        one = make_engine(c)
        one.admit(specs(c, 2)[1])
        assert run(one, 3)["t1"] == pytest.approx(together["t1"], rel=1e-5)


def rerun(engine, trials, steps):
    found = {}
    for spec in trials:
        engine.admit(spec)
    for _ in range(steps):
        for trial_id, result in engine.step().items():
            found.setdefault(trial_id, []).append(result.loss)
    return found


def test_fp16_scales_each_slots_loss_and_skips_only_what_overflows(make_engine, config, specs, run):
    c = config()
    engine = make_engine(c, dtype="fp16")
    for spec in specs(c, 2):
        engine.admit(spec)
    assert {s.loss_scale.value for s in engine.slots.values()} == {FIRST_LOSS_SCALE}
    run(engine, 3)
    engine.slots["t1"].loss_scale.value = 1e30  # the scaled loss leaves fp16's range
    before = weights_of(engine, "t1")
    found = engine.step()
    assert (found["t0"].finite, found["t1"].finite) == (True, False)
    assert math.isfinite(found["t1"].loss)
    assert identical(before, weights_of(engine, "t1"))
    assert engine.slots["t1"].loss_scale.value == 5e29
    exact = rerun(make_engine(c), specs(c, 2), 4)["t0"]
    again = rerun(make_engine(c, dtype="fp16"), specs(c, 2), 4)["t0"]
    assert again == pytest.approx(exact, rel=2e-2)


def test_materialised_trains_bitwise_the_same(make_engine, config, specs):
    packed, dense = config(), config(model__materialise=True)
    assert rerun(make_engine(packed), specs(packed, 2), 5) == rerun(make_engine(dense), specs(dense, 2), 5)


def test_what_cannot_be_admitted_is_told(make_engine, config, specs, run):
    c = config()
    engine = make_engine(c, slots=2)
    one, two, three, _ = specs(c, 4)
    with pytest.raises(ConfigError, match=r"lora\.r=0"):
        engine.admit(dataclasses.replace(one, r=0))
    with pytest.raises(ConfigError, match="did you mean"):
        engine.admit(dataclasses.replace(one, targets=("querie",)))
    assert engine.active == []
    engine.admit(one)
    with pytest.raises(RunError, match="has a slot already"):
        engine.admit(one)
    state = engine.state("t0")
    with pytest.raises(ModelError, match="expected"):
        engine.admit(two, state)
    engine.admit(two)
    with pytest.raises(RunError, match=r"tune\.slots=2"):
        engine.admit(three)
    with pytest.raises(RunError, match="t9 has no slot"):
        engine.release("t9")
    engine.pause("t0")
    engine.pause("t1")
    assert engine.step() == {}


def test_a_target_that_matches_nothing_is_told_at_once(make_engine, config):
    with pytest.raises(ConfigError, match=r"lora\.targets: 'q_proj' matches no linear module"):
        make_engine(config(lora__targets=["q_proj"]))


def test_a_pack_on_8_bit_weights_is_one_on_what_they_stand_for(make_engine, config, specs, run):
    c = config(model__quantisation="int8")
    packed, plain = make_engine(c), make_engine(c, dtype="fp64")
    codes = {n: m.weight.data.clone() for n, m in quantised_linears(packed.cm.model).items()}
    assert codes
    for spec in specs(c, 3):
        packed.admit(spec)
        plain.admit(spec)
    losses = run(plain, 6)
    for trial_id, found in run(packed, 6).items():
        assert found == pytest.approx(losses[trial_id], rel=1e-5)
    assert packed.evaluate(["t0"])["t0"].captions == plain.evaluate(["t0"])["t0"].captions
    packed.close()
    assert all(torch.equal(m.weight.data, codes[n]) for n, m in quantised_linears(packed.cm.model).items())
