"""DoRA on the twin of every family, NF4 base included: it learns, and plain peft captions and merges what it exports."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from peft import PeftModel

from raycap.trial import trial_spec


def test_dora_of_every_family(case, settings, load, make_engine, tmp_path):
    config = settings(case, lora__variant="dora", tune__slots=1, lora__r=8)
    engine = make_engine(load(case), config)
    spec = dataclasses.replace(trial_spec(config, "t0", {"lora.dropout": 0.1}, seed=3), lr=1e-2, schedule="constant")
    engine.admit(spec)
    losses = [engine.step()["t0"].loss for _ in range(8)]
    assert min(losses[3:]) < losses[0]
    begun = {path: layer.lora_magnitude_vector["default"].weight for path, layer in engine.stacks.layers.items()}
    assert all(m.grad.abs().max() > 0 for m in begun.values())
    captions = engine.evaluate(["t0"])["t0"].captions
    folder = engine.export("t0", tmp_path / "adapter")

    cm, store = load(case), engine.stores["val"]
    loaded = PeftModel.from_pretrained(cm.model, str(folder)).eval()
    rows = engine.validator.rows(store)
    pixels = cm.family.pixel_values(cm.processor, torch.from_numpy(store.pixels(rows)))
    assert cm.family.generate(cm, pixels, config.decode) == list(captions.values())
    del loaded


@pytest.mark.parametrize("twin", ["git", "blip"])
def test_dora_merged_is_dora(case, settings, plain, make_engine, tmp_path, twin):
    """On the dequantised weights in fp32: logits of the folded weights are those of the adapter beside them."""
    if case.twin != twin:
        pytest.skip("one case a twin")
    config = settings(case, lora__variant="dora", tune__slots=1)
    engine = make_engine(plain(case, torch.float32), config)
    engine.admit(dataclasses.replace(trial_spec(config, "t0", seed=3), lr=1e-2, schedule="constant"))
    for _ in range(4):
        engine.step()
    folder = engine.export("t0", tmp_path / "adapter", "last")
    pairs = engine.pairs("all", 0)
    text, images = (
        engine.validator.text(engine.stores["train"], pairs),
        engine.images.rows(engine.stores["train"], pairs[:, 0]),
    )

    def logits(cm):
        with torch.no_grad():
            return cm.family.label_logits(cm, text, images).logits

    base = plain(case, torch.float32)
    start = logits(base)
    beside = PeftModel.from_pretrained(base.model, str(folder)).eval()
    trained = logits(base)
    folded = dataclasses.replace(base, model=beside.merge_and_unload(safe_merge=True))
    assert (trained - start).abs().max() > 1e-2
    torch.testing.assert_close(logits(folded), trained, rtol=1e-4, atol=1e-4)
