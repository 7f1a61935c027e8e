"""Prompt tuning: families that say they can are what plain peft makes of the exported vectors; others refuse by name."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

from raycap.errors import ConfigError, ModelError
from raycap.export.merge import merge
from raycap.models.base import IGNORED
from raycap.models.generic import _spread
from raycap.models.prompt import apply_prompt
from raycap.train import checkpoint
from raycap.train.alone import engine_class
from raycap.trial import trial_spec


@pytest.fixture
def prompt(settings):
    def prompt(case, **changes):
        return settings(case, **{"lora__variant": "prompt", "lora__prompt_tokens": 5, "tune__slots": 1, **changes})

    return prompt


def spec_of(config, trial_id="t0"):
    return dataclasses.replace(trial_spec(config, trial_id, seed=3), lr=5e-2, schedule="constant", warmup_steps=0)


def inputs(cm, text, pixels):
    """What a person hands plain transformers for this family."""
    if cm.family.name == "generic":
        ids, mask, labels = _spread(cm, text, cm.family.encode_images(cm, pixels))
        text = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {**text, "pixel_values": pixels}


def test_a_learnt_prompt_is_what_plain_peft_makes_of_it(case, prompt, load, make_engine, tmp_path):
    config = prompt(case)
    if case.family not in ("git", "generic"):
        with pytest.raises(ConfigError, match=rf"lora\.variant=prompt: .* family {case.family}"):
            engine_class(config)
        return
    engine = make_engine(load(case), config)
    before = {n: p.detach().clone() for n, p in engine.cm.model.named_parameters()}
    zero_shot = engine.zero_shot("val")
    engine.admit(spec_of(config))
    begin = engine.state("t0")["value"]["prompt"][0]
    losses = [engine.step()["t0"].loss for _ in range(12)]
    assert min(losses[6:]) < losses[0]
    assert (engine.state("t0")["value"]["prompt"][0] - begin).abs().max() > 1e-2
    found = engine.evaluate(["t0"])["t0"]
    assert engine.zero_shot("val") == zero_shot
    assert found.captions != zero_shot
    folder = engine.export("t0", tmp_path / "adapter")

    cm, store = load(case), engine.stores["val"]
    peft = PeftModel.from_pretrained(cm.model, str(folder)).eval()
    assert set(get_peft_model_state_dict(peft)) == set(load_file(folder / "adapter_model.safetensors"))
    rows = engine.validator.rows(store)
    pixels = cm.family.pixel_values(cm.processor, torch.from_numpy(store.pixels(rows)))
    pairs = torch.stack([torch.from_numpy(rows), torch.arange(len(rows)) % 5], 1).numpy()
    pairs[:, 1] %= store.captions_per_image[rows]
    text = cm.family.collate(store.tokens(pairs), store.prompt_lens(pairs), cm.family.pad_token(cm.processor))
    given = inputs(cm, text, pixels)
    with torch.no_grad():
        logits = peft(**given).logits
    labels = given["labels"]
    logits = logits[:, -labels.shape[1] : -1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    assert float(loss) == pytest.approx(found.val_loss, rel=1e-5)

    head = torch.tensor([cm.family.head(cm.processor, cm.prompt)] * len(rows))
    begun = inputs(cm, {"input_ids": head, "attention_mask": torch.ones_like(head), "labels": head}, pixels)
    del begun["labels"]
    tokenizer = cm.processor.tokenizer
    # With its cache peft drops position ids, and GIT then counts the image's tokens as text.
    cached = case.family != "git"
    out = peft.generate(
        **begun, max_new_tokens=config.decode.max_new_tokens, do_sample=False, use_cache=cached,
        pad_token_id=cm.family.pad_token(cm.processor), eos_token_id=cm.family.end_token(cm.processor),
    )  # fmt: skip
    texts = tokenizer.batch_decode(out[:, begun["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [t.strip() for t in texts] == list(found.captions.values())

    ours = load(case)  # as the export's captioner loads it
    apply_prompt(ours, folder)
    assert ours.family.generate(ours, pixels, config.decode) == list(found.captions.values())
    engine.close()
    after = dict(engine.cm.model.named_parameters())
    assert set(after) == set(before) and all(torch.equal(after[n], p) for n, p in before.items())
    assert "head" not in vars(engine.cm.family)
    with pytest.raises(ModelError, match="prompt tuning, which cannot be merged"):
        merge(config.model, config.data, folder, tmp_path / "merged")


def test_a_prompt_resumes_to_the_bit_and_is_gone_on_from(case, prompt, load, make_engine, tmp_path):
    if case.twin != "git":
        pytest.skip("the same code for every family that can")
    config = prompt(case)
    straight, broken, resumed = (make_engine(load(case), config) for _ in range(3))
    for engine in (straight, broken):
        engine.admit(spec_of(config))
    losses = [straight.step()["t0"].loss for _ in range(7)]
    assert [broken.step()["t0"].loss for _ in range(3)] == losses[:3]
    broken.evaluate(["t0"])
    checkpoint.save(tmp_path / "c", {"t0": broken.state("t0")})
    resumed.admit(spec_of(config), checkpoint.load(tmp_path / "c")["t0"])
    assert [resumed.step()["t0"].loss for _ in range(4)] == losses[3:]
    for kind in ("value", "m", "v"):
        assert torch.equal(straight.state("t0")[kind]["prompt"][0], resumed.state("t0")[kind]["prompt"][0])
    folder = resumed.export("t0", tmp_path / "adapter", "last")
    resumed.release("t0")
    resumed.admit_adapter(spec_of(config, "t1"), folder)
    assert torch.equal(resumed.state("t1")["value"]["prompt"][0], straight.state("t0")["value"]["prompt"][0])
    with pytest.raises(ModelError, match=r"expected a prompt of \[7, "):
        broken.release("t0")
        broken.admit_adapter(dataclasses.replace(spec_of(config, "t2"), prompt_tokens=7), folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora__variant": "lora"}, r"lora\.prompt_tokens=5 has no effect with lora\.variant=lora"),
        ({"lora__dropout": 0.1}, r"lora\.dropout=0\.1 has no effect with lora\.variant=prompt"),
        ({"lora__scope": "vision"}, r"lora\.scope=vision has no effect"),
        ({"tune__slots": 2}, r"set tune\.slots=1"),
        ({"lora__prompt_tokens": 0}, r"lora\.prompt_tokens=0 must be above 0"),
    ],
)
def test_settings_of_a_prompt_without_effect_are_refused(case, prompt, changes, words):
    if case.twin != "git":
        pytest.skip("no model in it")
    with pytest.raises(ConfigError, match=words):
        prompt(case, **changes)


def test_a_prompt_longer_than_the_model_has_room_for_is_told(case, prompt, load, make_engine):
    if case.twin != "git":
        pytest.skip("the same code for every family that can")
    config = prompt(case, lora__prompt_tokens=5000)
    with pytest.raises(ConfigError, match=r"lora\.prompt_tokens=5000 .* text positions"):
        make_engine(load(case), config).admit(spec_of(config))
