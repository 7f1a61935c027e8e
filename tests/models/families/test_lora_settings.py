"""lora.layers, lora.rslora, lora.init_from: slots of one pack may differ in the first two; each as plain peft has it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from peft import PeftModel

from raycap.errors import ConfigError, ModelError


def test_layers_scale_and_start_from_an_adapter(case, settings, plain, make_engine, trials, tmp_path):
    if case.twin not in ("git", "blip", "qwen2_vl"):
        pytest.skip("the same code as of the families that are tried")
    config = settings(case)
    engine = make_engine(plain(case, torch.float32), config)
    whole, top, stable = trials(config)
    top = dataclasses.replace(top, layers="top1")
    stable = dataclasses.replace(stable, rslora=True)
    for spec in (whole, top, stable):
        engine.admit(spec)
    for _ in range(2):
        assert all(r.finite for r in engine.step().values())
    paths = {t: set(engine.state(t)["value"]) for t in engine.active}
    assert paths["t1"] < paths["t0"]
    assert all(".1." in p for p in paths["t1"])
    assert any(".0." in p for p in paths["t0"])
    # rsLoRA: what plain peft makes of the folder is what the slot does.
    folder = engine.export("t2", tmp_path / "stable", which="last")
    cm = plain(case, torch.float32)
    PeftModel.from_pretrained(cm.model, str(folder)).eval()
    store = engine.stores["val"]
    rows = engine.validator.rows(store)
    pixels = cm.family.pixel_values(cm.processor, torch.from_numpy(store.pixels(rows)))
    assert list(engine.evaluate(["t2"])["t2"].captions.values()) == cm.family.generate(cm, pixels, config.decode)
    # Going on from it, and only with what it is.
    again = make_engine(plain(case, torch.float32), settings(case, lora__init_from=str(folder)))
    again.admit(dataclasses.replace(stable, trial_id="again"))
    for path, pair in again.state("again")["value"].items():
        assert all(torch.equal(a, b) for a, b in zip(pair, engine.state("t2")["value"][path]))
    with pytest.raises(ModelError, match="expected"):
        again.admit(whole)
    with pytest.raises(ModelError, match="use_rslora True"):
        again.admit(dataclasses.replace(stable, trial_id="plain", rslora=False))
    with pytest.raises(ConfigError, match=r"lora.layers=top2: family \w+ has 2 language layers"):
        engine.admit(dataclasses.replace(top, trial_id="deep", layers="top2"))


@pytest.mark.parametrize("twin", ["git", "clip_llama"])
def test_trials_of_a_pack_differ_in_scope_and_in_what_they_train_in_full(
    case, settings, plain, make_engine, trials, twin
):
    """Each as alone: losses of a mixed pack are those of packs of one; a projector that stays is the base's to the bit."""
    if case.twin != twin:
        pytest.skip("one case a twin")
    names = ("q_proj", "v_proj") if twin == "clip_llama" else ("query", "value")
    space = {"lora.full": {"choice": [[], ["projector"]]}}
    if twin == "git":
        space["lora.scope"] = {"choice": ["language", "vision+language"]}
    config = settings(
        case, tune__space=space, tune__default_trial=False, lora__targets=list(names), train__weight_decay=0.1
    )
    rest, whole, _ = trials(config)
    rest, whole = dataclasses.replace(rest, lr=1e-3), dataclasses.replace(whole, lr=1e-3, full=("projector",))
    if twin == "git":
        whole = dataclasses.replace(whole, scope="vision+language", targets=(*names, "fc1"))
    packed = make_engine(plain(case, torch.float64), config)
    for spec in (rest, whole):
        packed.admit(spec)
    together = [packed.step() for _ in range(3)]
    for spec in (rest, whole):
        alone = make_engine(plain(case, torch.float64), config)
        alone.admit(spec)
        for step in together:
            assert alone.step()[spec.trial_id].loss == pytest.approx(step[spec.trial_id].loss, rel=1e-5)
    base = packed._full_start()
    assert base, "the projector has linears"
    for path, pair in base.items():
        assert all(torch.equal(a, b) for a, b in zip(packed.state("t0")["value"][path], pair))
        assert not torch.equal(packed.state("t1")["value"][path][0], pair[0])
    paths = set(packed.state("t1")["value"]) - set(base)
    assert any("image_encoder" in p for p in paths) == (twin == "git")
    assert not any("image_encoder" in p for p in packed.state("t0")["value"])


def test_settings_without_effect_are_refused(case, settings):
    with pytest.raises(ConfigError, match="top<n>"):
        settings(case, lora__layers="six")
    with pytest.raises(ConfigError, match="has no effect with"):
        settings(case, lora__layers="top1", lora__scope="vision")


def test_gradient_checkpointing_computes_the_same(case, settings, twins, load, make_engine, trials):
    """Losses of a pack with dropout, in adapters and base, are those without it; the layers do run twice."""
    losses, calls = [], []
    for on in (False, True):
        config = settings(case, train__gradient_checkpointing=on, model__path=str(twins(case.twin, 0.1)))
        engine = make_engine(load(case, model__path=str(twins(case.twin, 0.1))), config)
        for spec in trials(config, 2, **{"lora.dropout": 0.2, "train.lr": 1e-3}):
            engine.admit(spec)
        calls.append([])
        losses.append([[r.loss for r in engine.step().values()]])
        site = engine.stacks.sites[engine.slots["t0"].targets[0]]
        site.register_forward_hook(lambda *_: calls[-1].append(1))
        losses[-1] += [[r.loss for r in engine.step().values()] for _ in range(2)]
        engine.close()
    assert losses[1] == [pytest.approx(step, rel=1e-5) for step in losses[0]]
    assert len(calls[1]) == 2 * len(calls[0]) > 0
