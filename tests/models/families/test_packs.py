"""Packs of every family: equal to plain peft, NF4 kept dequantised bitwise the same, adapters out and in, base as it was."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from raycap.config import DecodeSettings
from raycap.models.lora import start

STEPS = 4
SCHEDULES = {
    "constant": lambda o, s: get_constant_schedule_with_warmup(o, s.warmup_steps),
    "cosine": lambda o, s: get_cosine_schedule_with_warmup(o, s.warmup_steps, s.steps),
    "linear": lambda o, s: get_linear_schedule_with_warmup(o, s.warmup_steps, s.steps),
}
BEAMS = DecodeSettings(max_new_tokens=6, num_beams=2, batch=8)


def train_with_peft(cm, engine, spec, steps):
    """(losses, peft model) of one trial by peft, torch's AdamW, transformers' schedule and torch's cross-entropy."""
    targets = engine.cm.family.match_targets(engine.linears, "language", spec.targets)
    peft = get_peft_model(cm.model, LoraConfig(r=spec.r, lora_alpha=spec.alpha, target_modules=targets))
    for path in engine.full:
        cm.model.get_submodule(path).requires_grad_(True)
    own = {n: p for n, p in peft.named_parameters() if p.requires_grad}
    begin = start(spec, {t: engine.shapes[t] for t in targets})
    with torch.no_grad():
        for name, p in ((n, p) for n, p in own.items() if ".lora_" in n):
            path = name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0]
            p.data = begin[path][0 if ".lora_A." in name else 1].to(cm.compute_dtype)
    optimiser = torch.optim.AdamW(
        own.values(), lr=spec.lr, betas=(spec.beta1, spec.beta2), weight_decay=spec.weight_decay
    )
    schedule, store, losses = SCHEDULES[spec.schedule](optimiser, spec), engine.stores["train"], []
    peft.train()
    for step in range(steps):
        pairs = engine.pairs(spec.captions, step)
        text = engine.validator.text(store, pairs)
        pixels = cm.family.pixel_values(cm.processor, torch.from_numpy(store.pixels(pairs[:, 0])))
        found = cm.family.label_logits(cm, text, pixels.to(cm.compute_dtype))
        loss = torch.nn.functional.cross_entropy(found.logits, found.labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(own.values(), spec.max_grad_norm)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses, peft


def weights_of(peft):
    found = {}
    for name, p in peft.named_parameters():
        if ".lora_A." in name:
            path = name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0]
            found[path] = (p.detach(), peft.get_parameter(name.replace(".lora_A.", ".lora_B.")).detach())
    return found


@pytest.fixture
def no_rounding(monkeypatch):
    """transformers computes norms and attention in fp32 whatever it is given; here fp64 stays fp64, on both sides."""
    to, float_, softmax = torch.Tensor.to, torch.Tensor.float, torch.nn.functional.softmax

    def kept(self, *args, **options):
        if self.dtype == torch.float64 and (torch.float32 in args or options.get("dtype") is torch.float32):
            return self
        return to(self, *args, **options)

    def softmax_kept(x, *args, dtype=None, **options):
        return softmax(x, *args, dtype=None if x.dtype == torch.float64 else dtype, **options)

    monkeypatch.setattr(torch.Tensor, "to", kept)
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self if self.dtype == torch.float64 else float_(self))
    monkeypatch.setattr(torch.nn.functional, "softmax", softmax_kept)


def test_packed_equals_plain_peft_in_fp64(case, settings, plain, make_engine, trials, tmp_path, no_rounding):
    """Losses, weights, captions by beams; and the adapter that a slot leaves is one that plain peft reads."""
    config = settings(case, train__weight_decay=0.01, train__max_grad_norm=0.5, decode__num_beams=2)
    engine = make_engine(plain(case), config)
    specs = trials(config)
    specs[2] = trials(config, **{"lora.targets": list(case.targets[:1])})[2]  # others' modules are not its own
    for spec in specs:
        engine.admit(spec)
    losses = {}
    for _ in range(STEPS):
        for trial_id, result in engine.step().items():
            losses.setdefault(trial_id, []).append(result.loss)
    assert len(engine.active) == 3
    packed = {t: list(r.captions.values()) for t, r in engine.evaluate(engine.active).items()}
    zero_shot = list(engine.zero_shot("val").values())
    for spec in specs:
        cm = plain(case)
        alone, peft = train_with_peft(cm, engine, spec, STEPS)
        assert losses[spec.trial_id] == pytest.approx(alone, rel=1e-9, abs=0), spec.trial_id
        value, theirs = engine.state(spec.trial_id)["value"], weights_of(peft)
        assert set(value) == set(theirs)
        for path, pair in value.items():
            for mine, other in zip(pair, theirs[path]):
                assert torch.allclose(mine, other, rtol=1e-9, atol=1e-11), (spec.trial_id, path)
        peft.eval()
        store = engine.stores["val"]
        pixels = cm.family.pixel_values(cm.processor, torch.from_numpy(store.pixels(engine.validator.rows(store))))
        assert packed[spec.trial_id] == cm.family.generate(cm, pixels.to(cm.compute_dtype), config.decode)
    assert len({tuple(c) for c in [*packed.values(), zero_shot]}) > 1  # the adapters speak
    # Out: what a slot leaves loads in plain peft and says the same; and in again.
    folder = engine.export("t0", tmp_path / "adapter", which="last")
    cm = plain(case)
    read = PeftModel.from_pretrained(cm.model, str(folder)).eval()
    value = engine.state("t0")["value"]
    for path, pair in weights_of(read).items():
        assert all(torch.equal(a.double(), b.to(a.dtype).double()) for a, b in zip(pair, value[path]))
    engine.admit_adapter(dataclasses.replace(specs[0], trial_id="again"), folder)
    again = engine.evaluate(["again"])["again"].captions
    assert list(again.values()) == packed["t0"]


def test_projector_copies_of_each_slot_equal_plain_training(
    case, settings, plain, make_engine, trials, tmp_path, no_rounding
):
    """lora.full=projector: weight and bias of the projector are each trial's own; out as an adapter, and in again."""
    if "projector" not in case.scopes:
        pytest.skip(f"{case.family} has no projector: its cross-attention takes the features as they are")
    config = settings(case, lora__full=["projector"], train__weight_decay=0.01)
    engine = make_engine(plain(case), config)
    specs = trials(config, 2)
    for spec in specs:
        engine.admit(spec)
    losses = [{t: r.loss for t, r in engine.step().items()} for _ in range(3)]
    for spec in specs:
        cm = plain(case)
        alone, _ = train_with_peft(cm, engine, spec, 3)
        assert [step[spec.trial_id] for step in losses] == pytest.approx(alone, rel=1e-9, abs=0)
        value = engine.state(spec.trial_id)["value"]
        for path in engine.full:
            module = cm.model.get_submodule(path)
            assert torch.allclose(value[path][0], module.weight, rtol=1e-9, atol=1e-11)
            assert torch.allclose(value[path][1][:, 0], module.bias, rtol=1e-9, atol=1e-11)
            assert not torch.equal(value[path][0], plain(case).model.get_submodule(path).weight)
    folder = engine.export("t1", tmp_path / "adapter", which="last")
    engine.admit_adapter(dataclasses.replace(specs[1], trial_id="again"), folder)
    assert engine.evaluate(["again"])["again"].val_loss == pytest.approx(engine.evaluate(["t1"])["t1"].val_loss, 1e-6)
    cm = plain(case)
    read = PeftModel.from_pretrained(cm.model, str(folder)).eval()
    value = engine.state("t1")["value"]
    for path in engine.full:
        if cm.family.full_file:
            continue
        kept = read.get_submodule(f"base_model.model.{path}").modules_to_save["default"]
        assert torch.allclose(kept.weight.double(), value[path][0], atol=1e-6)


def test_several_parts_at_once(case, settings, load, make_engine, trials):
    """Adapters in every part of the model: slots of a pack differ, and learn, and decode."""
    parts = [p for p in case.scopes if p != "vision" or case.family != "qwen2_vl"]
    config = settings(case, lora__scope="+".join(parts))
    engine = make_engine(load(case), config)
    leaves = {p.rsplit(".", 1)[-1] for p in case.scopes.values()}
    names = [n for n in leaves if any(p.rsplit(".", 1)[-1] == n for p in engine.linears)]
    for spec in trials(config, 2, **{"lora.targets": names, "train.warmup_steps": 0}):
        engine.admit(spec)
    first = engine.step()
    for _ in range(4):
        last = engine.step()
    assert all(r.finite for r in last.values())
    assert len(engine.evaluate(["t0"])["t0"].captions) == 4
    moved = engine.state("t0")["value"]
    for part in parts:  # some tower's last layer is not looked at, so not every one of its linears learns
        inside = {p: b for p, (_, b) in moved.items() if p.startswith(engine.cm.family.scopes()[part])}
        assert any(b.abs().max() > 0 for b in inside.values()), part
    assert {p.split(".")[-1] for p in moved} == set(names)
    assert first["t0"].loss != last["t0"].loss


def fingerprint(model):
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.replace(".base.", ".").encode())
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_materialised_is_bitwise_the_same_and_the_base_stays_as_it_was(
    case, settings, load, make_engine, trials, dtype
):
    config, found = settings(case), {}
    for materialise in (False, True):
        cm = load(case, dtype, model__materialise=materialise)
        before = fingerprint(cm.model)
        engine = make_engine(cm, config)
        for spec in trials(config, 2, **{"lora.dropout": 0.1}):
            engine.admit(spec)
        losses = [[r.loss for r in engine.step().values()] for _ in range(2)]
        captions = {t: r.captions for t, r in engine.evaluate(engine.active).items()}
        losses += [[r.loss for r in engine.step().values()]]
        engine.close()
        assert fingerprint(cm.model) == before
        found[materialise] = losses, captions
    assert found[True] == found[False]
    assert all(b != a for a, b in zip(found[True][0][0], found[True][0][-1]))


def test_features_kept_or_computed_at_each_look_train_and_say_the_same(case, settings, load, make_engine, trials):
    found = {}
    for features in ("on", "off"):
        config = settings(case, train__features=features)
        engine = make_engine(load(case), config)
        for spec in trials(config, 2, **{"lora.dropout": 0.1, "train.lr": 1e-3}):
            engine.admit(spec)
        losses = [[r.loss for r in engine.step().values()] for _ in range(3)]
        results = engine.evaluate(engine.active)
        losses.append([r.val_loss for r in results.values()])
        found[features] = losses, {t: r.captions for t, r in results.items()}
        assert all((store.features is not None) == (features == "on") for store in engine.stores.values())
        engine.close()
    assert found["off"][0] == [pytest.approx(step, rel=1e-5) for step in found["on"][0]]
    assert found["off"][1] == found["on"][1]


def test_in_fp16_each_slot_has_a_loss_scale_and_an_overflow_costs_its_slot_alone_a_step(
    case, settings, load, make_engine, trials
):
    """The scaled loss of one slot leaves fp16's range: its weights stand still, the other's are as if it had not."""
    config = settings(case)
    specs = trials(config, 2, **{"train.lr": 1e-3, "train.warmup_steps": 0})
    exact = make_engine(load(case), config)
    for spec in specs:
        exact.admit(spec)
    told = [exact.step()["t0"].loss for _ in range(3)]
    exact.close()
    found = {}
    for overflows in (False, True):
        engine = make_engine(load(case, "fp16"), config)
        assert engine.cm.compute_dtype == torch.float16
        for spec in specs:
            engine.admit(spec)
        first = engine.step()
        assert all(r.finite for r in first.values())
        assert engine.slots["t1"].loss_scale.value > 1
        before = engine.state("t1")["value"]
        if overflows:
            engine.slots["t1"].loss_scale.value = 1e30
        second = engine.step()
        assert second["t0"].finite and second["t1"].finite == (not overflows)
        assert (engine.slots["t1"].loss_scale.value == 5e29) == overflows
        stands = all(
            torch.equal(a, b) for p, pair in engine.state("t1")["value"].items() for a, b in zip(pair, before[p])
        )
        assert stands == overflows
        losses = [first["t0"].loss, second["t0"].loss, engine.step()["t0"].loss]
        assert losses == pytest.approx(told, rel=2e-2)
        results = engine.evaluate(engine.active)
        assert all(r.val_loss == r.val_loss for r in results.values())
        found[overflows] = losses, engine.state("t0")["value"]
        engine.close()
    assert found[True][0] == found[False][0]
    for path, pair in found[True][1].items():
        assert all(torch.equal(a, b) for a, b in zip(pair, found[False][1][path]))
