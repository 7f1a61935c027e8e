"""The engine of one adapter: DoRA is what plain peft trains, LoRA what a pack of one trains, and all of it resumes."""

from __future__ import annotations

import math

import pytest
import torch
from bitsandbytes.optim import PagedAdamW8bit
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from tiny_models import step_inputs

from raycap.errors import ConfigError, ModelError
from raycap.models import load_model
from raycap.models.quantise import quantised_linears
from raycap.train import checkpoint
from raycap.train.alone import AloneEngine
from raycap.train.engine import PackEngine
from raycap.trial import trial_spec


@pytest.fixture
def dora(config):
    def dora(**changes):
        return config(**{"lora__variant": "dora", "tune__slots": 1, **changes})

    return dora


def spec_of(c, trial_id="t0", **overrides):
    return trial_spec(c, trial_id, {"lora.alpha_per_rank": 2, **overrides}, seed=7)


def identical(one, other):
    return set(one) == set(other) and all(torch.equal(x, y) for path in one for x, y in zip(one[path], other[path]))


def halted(make_engine, c, run, folder, scored=False):
    """Engines after eight steps (run through, broken off after three, resumed from there), which must have lost the same."""
    spec = spec_of(c, **{"lora.dropout": 0.1})
    straight, broken, resumed = (make_engine(c) for _ in range(3))
    straight.admit(spec)
    broken.admit(spec)
    losses = run(straight, 8)["t0"]
    run(broken, 3)
    if scored:
        broken.evaluate(["t0"])
    checkpoint.save(folder, {"t0": broken.state("t0")})
    resumed.admit(spec, checkpoint.load(folder)["t0"])
    assert run(resumed, 5)["t0"] == losses[3:]
    for kind in ("value", "m", "v"):
        assert identical(straight.state("t0")[kind], resumed.state("t0")[kind])
    return straight, broken, resumed


def by_peft(model, engine, spec, steps, adam=torch.optim.AdamW):
    """(losses, adapter's state) of plain peft, `adam` and cross-entropy on the engine's samples."""
    dtype = next(model.parameters()).dtype
    targets = engine.cm.family.match_targets(engine.linears, "language", spec.targets)
    settings = LoraConfig(r=spec.r, lora_alpha=spec.alpha, target_modules=targets, use_dora=spec.variant == "dora")
    peft = get_peft_model(model, settings)
    begin = engine.state(spec.trial_id)["value"]
    own = {n: p for n, p in peft.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, p in own.items():
            path, _, kind = name.removeprefix("base_model.model.").rpartition(".lora_")
            # Magnitudes stay as peft has made them.
            if kind[0] in "AB":
                p.data = begin[path]["AB".index(kind[0])].to(dtype)
            else:
                p.data = p.data.to(dtype)
                assert torch.equal(p.data, begin[path][2])
    optimiser = adam(own.values(), lr=spec.lr, betas=(spec.beta1, spec.beta2), weight_decay=0.01)
    losses = []
    peft.train()
    for step in range(steps):
        text = step_inputs(engine, step, dtype)
        logits = peft(**text).logits[:, -text["labels"].shape[1] : -1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text["labels"][:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(own.values(), spec.max_grad_norm)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses, get_peft_model_state_dict(peft)


def test_dora_is_what_plain_peft_trains(make_engine, dora, oracle, run, tmp_path):
    c = dora(train__weight_decay=0.01, train__max_grad_norm=0.5, train__schedule="constant", train__warmup_steps=0)
    engine, spec = make_engine(c, dtype="fp64"), spec_of(c)
    assert isinstance(engine, AloneEngine)
    engine.admit(spec)
    alone, trained = by_peft(oracle(c, torch.float64), engine, spec, 10)
    assert run(engine, 10)["t0"] == pytest.approx(alone, rel=1e-9, abs=0)
    found = load_file(engine.export("t0", tmp_path / "a", "last") / "adapter_model.safetensors")
    assert set(found) == set(trained)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, trained[name], rtol=1e-6, atol=1e-9)
    moved = [n for n in found if "magnitude" in n and (found[n] - engine_start(engine, n)).abs().max() > 1e-4]
    assert moved  # the lengths learn too


def engine_start(engine, name):
    path = name.removeprefix("base_model.model.").removesuffix(".lora_magnitude_vector")
    return torch.linalg.norm(engine.stacks.layers[path].base_layer.weight, dim=1)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_lora_alone_is_a_pack_of_one(make_engine, config, dora, specs, run, delta, dropping_twin, dropout):
    path = {"model__path": str(dropping_twin)}
    packed, alone = make_engine(config(**path)), make_engine(dora(**path))
    assert type(packed) is PackEngine
    spec = specs(config(), 1, dropout=dropout)[0]
    packed.admit(spec)
    alone.admit(spec)
    assert run(alone, 10)["t0"] == pytest.approx(run(packed, 10)["t0"], rel=1e-5)
    assert delta(packed.state("t0")["value"], alone.state("t0")["value"]) <= 1e-3
    one, other = packed.evaluate(["t0"])["t0"], alone.evaluate(["t0"])["t0"]
    assert other.captions == one.captions
    assert other.val_loss == pytest.approx(one.val_loss, rel=1e-5)
    assert alone.zero_shot("val") == packed.zero_shot("val")


def test_dora_resumed_is_dora_uninterrupted(make_engine, dora, run, tmp_path):
    _, broken, resumed = halted(make_engine, dora(), run, tmp_path / "c", scored=True)
    assert identical(broken.state("t0")["best"], resumed.state("t0")["best"])


def test_the_next_trial_begins_as_if_it_were_the_first(make_engine, dora, run):
    c = dora()
    one, two = spec_of(c, "t1"), spec_of(c, "t2", **{"lora.r": 2, "lora.dropout": 0.2, "lora.variant": "lora"})
    busy, fresh = make_engine(c), make_engine(c)
    before = {n: p.detach().clone() for n, p in fresh.cm.model.named_parameters()}
    packed = {n: m.weight.data.clone() for n, m in quantised_linears(busy.cm.model).items()}
    busy.admit(one)
    run(busy, 3)
    busy.evaluate(["t1"])
    busy.release("t1")
    busy.admit(two)
    fresh.admit(two)
    assert run(busy, 4) == run(fresh, 4)
    assert identical(busy.state("t2")["value"], fresh.state("t2")["value"])
    busy.close()
    after = dict(busy.cm.model.named_parameters())
    assert set(after) == set(before)
    assert all(torch.equal(after[n], p) for n, p in before.items())
    assert all(torch.equal(m.weight.data, packed[n]) for n, m in quantised_linears(busy.cm.model).items())


def test_validation_captions_are_those_of_the_adapter_in_plain_peft(make_engine, dora, run, tmp_path):
    c = dora(train__lr=2e-2, lora__r=8)
    engine = make_engine(c)
    engine.admit(spec_of(c))
    run(engine, 12)
    validated = engine.evaluate(["t0"])["t0"].captions
    assert validated != engine.zero_shot("val")
    folder = engine.export("t0", tmp_path / "adapter")
    plain = load_model(c.model, c.data, device="cpu")
    loaded = PeftModel.from_pretrained(plain.model, str(folder))
    assert set(get_peft_model_state_dict(loaded)) == set(load_file(folder / "adapter_model.safetensors"))
    plain.model.eval()
    store = engine.stores["val"]
    pixels = plain.family.pixel_values(plain.processor, torch.from_numpy(store.pixels(range(store.count))))
    assert plain.family.generate(plain, pixels, c.decode) == list(validated.values())
    again = make_engine(c)  # and goes on in an engine
    again.admit_adapter(spec_of(c, "t9"), folder)
    assert again.caption("t9", "val") == validated
    with pytest.raises(ModelError, match="is a DoRA adapter"):
        make_engine(dora()).admit_adapter(spec_of(c, **{"lora.variant": "lora", "lora.r": 8}), folder)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"tune__slots": 4}, r"lora\.variant=dora .* set tune\.slots=1 \(it is 4\)"),
        ({"lora__full": ["projector"]}, r"lora\.variant=dora .* lora\.full"),
        ({"tune__memory_limit_bytes": 10**9}, r"lora\.variant=dora: .*tune\.memory_limit_bytes"),
        ({"lora__variant": "lora", "tune__slots": 2, "tune__space": {"lora.variant": {"choice": ["lora", "dora"]}}},
         r"tune\.slots=1"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(dora, changes, names):
    with pytest.raises(ConfigError, match=names):
        dora(**changes)


def test_its_memory_is_not_predicted_and_says_so(dora):
    from raycap.train.memory import plan

    c = dora()
    assert "lora.variant=dora" in plan(c, [spec_of(c)])["unknown"]


@pytest.mark.parametrize("quantisation", ["nf4", "int8"])
def test_dora_on_packed_weights_is_dora_on_what_they_stand_for(make_engine, dora, run, quantisation):
    c = dora(model__quantisation=quantisation)
    packed, plain = make_engine(c), make_engine(c, dtype="fp64")
    assert quantised_linears(packed.cm.model) and not quantised_linears(plain.cm.model)
    for engine in (packed, plain):
        engine.admit(spec_of(c))
    assert run(packed, 6)["t0"] == pytest.approx(run(plain, 6)["t0"], rel=1e-5)


@pytest.fixture
def eight(config):
    def eight(**changes):
        # Of rank 16 the widest tensors have the 4,096 elements from which on moments are kept in 8 bits.
        return config(**{"train__optimiser": "adamw-8bit-paged", "tune__slots": 1, "lora__r": 16, **changes})

    return eight


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_8_bit_adamw_is_bitsandbytes_own_on_plain_peft(make_engine, eight, oracle, run, tmp_path, variant):
    c = eight(
        train__weight_decay=0.01, train__max_grad_norm=0.5, train__schedule="constant", train__warmup_steps=0,
        lora__variant=variant, model__quantisation="none",
    )  # fmt: skip
    engine, spec = make_engine(c), spec_of(c)
    engine.admit(spec)
    kinds = [t.dtype for found in engine.state("t0")["m"].values() for t in found[::2]]
    assert {torch.uint8, torch.float32} == set(kinds)
    alone, trained = by_peft(oracle(c, torch.float32), engine, spec, 8, PagedAdamW8bit)
    assert run(engine, 8)["t0"] == pytest.approx(alone, rel=1e-4)
    found = load_file(engine.export("t0", tmp_path / "a", "last") / "adapter_model.safetensors")
    assert set(found) == set(trained)
    begun = make_engine(c)
    begun.admit(spec)
    start = load_file(begun.export("t0", tmp_path / "b", "last") / "adapter_model.safetensors")
    apart = sum(float(((found[n] - trained[n]) ** 2).sum()) for n in found) ** 0.5
    moved = sum(float(((found[n] - start[n]) ** 2).sum()) for n in found) ** 0.5
    assert apart <= 1e-2 * moved


def test_8_bit_moments_resume_to_the_bit(make_engine, eight, run, tmp_path):
    *_, resumed = halted(make_engine, eight(), run, tmp_path / "c")
    assert any(t.dtype == torch.uint8 and t.unique().numel() > 9 for f in resumed.state("t0")["m"].values() for t in f)


def test_8_bit_adamw_leaves_out_a_step_that_is_not_finite(make_engine, eight, run, monkeypatch):
    engine = make_engine(eight())
    engine.admit(spec_of(engine.config))
    run(engine, 2)
    before = {kind: engine.state("t0")[kind] for kind in ("value", "m", "v")}
    plain = engine._gradients
    monkeypatch.setattr(engine, "_gradients", lambda *a: plain(*a) * math.nan)
    assert not engine.step()["t0"].finite
    for kind, found in before.items():
        assert identical(found, engine.state("t0")[kind])
    assert (engine.state("t0")["step"], engine.state("t0")["updates"]) == (3, 2)


def test_8_bit_adamw_asks_for_one_slot(eight):
    with pytest.raises(ConfigError, match=r"train\.optimiser=adamw-8bit-paged .* tune\.slots=1 \(it is 2\)"):
        eight(tune__slots=2)
