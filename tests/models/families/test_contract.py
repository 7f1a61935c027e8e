"""What every family promises: loading, labels, stored features, batches, scopes. One test, all twins."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raycap.config import DecodeSettings
from raycap.errors import ConfigError
from raycap.models.base import IGNORED
from raycap.models.quantise import quantised_linears

GREEDY = DecodeSettings(max_new_tokens=6)
BEAMS = DecodeSettings(max_new_tokens=6, num_beams=3)
CAPTIONS = ["a red ring", "two blue stars above a green cross", "a ring", "one small yellow heart on the left"]


@pytest.fixture(scope="module")
def cm(case, load):
    return load(case)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("quantisation", ["nf4", "none"])
def test_loads_and_runs(case, load, pixel_values, texts, dtype, quantisation):
    cm = load(case, dtype, model__quantisation=quantisation)
    assert cm.quantisation == quantisation
    assert not any(p.requires_grad for p in cm.model.parameters())
    with torch.no_grad():
        logits = cm.family.label_logits(cm, texts(cm, CAPTIONS), pixel_values(cm)).logits
    assert torch.isfinite(logits).all()
    assert logits.dtype == cm.compute_dtype
    assert bool(quantised_linears(cm.model)) == (quantisation == "nf4")


def test_every_quantised_linear_by_name(case, cm):
    expected = case.quantised_paths()
    linears = {n for n, m in cm.model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(quantised_linears(cm.model)) == expected & linears
    assert expected & linears
    assert not set(quantised_linears(cm.model)) & {n for n in linears if n.rsplit(".", 1)[-1] in ("lm_head", "output")}


def test_in_8_bits_it_captions_and_learns(case, cm, load, settings, make_engine, trials):
    """The same linears as in NF4; a pack of trials learns on them, and captions."""
    eight = load(case, model__quantisation="int8")
    assert eight.quantisation == "int8"
    assert set(quantised_linears(eight.model)) == set(quantised_linears(cm.model))
    config = settings(case, model__quantisation="int8")
    engine = make_engine(eight, config)
    for spec in trials(config, 2):
        engine.admit(spec)
    losses = [{t: r.loss for t, r in engine.step().items()} for _ in range(6)]
    assert min(step["t0"] for step in losses[2:]) < losses[0]["t0"]
    assert len(engine.evaluate(["t0", "t1"])["t1"].captions) == 4


def test_resized_once_and_normalised_later_is_what_the_processor_makes(cm, scenes):
    for image in (scenes["val"][0].image, scenes["val"][1].image.resize((97, 71))):
        pixels = cm.family.resize(cm.processor, image)
        assert pixels.dtype == np.uint8
        assert pixels.shape == cm.family.image_size(cm.processor)
        mine = cm.family.pixel_values(cm.processor, torch.from_numpy(pixels[None]))[0]
        theirs = cm.processor.image_processor(image, return_tensors="pt")["pixel_values"]
        # Rounded to uint8 between the two halves: at most half a level, of a range of some 4.
        mine = (
            mine if mine.numel() == theirs.numel() else mine[0, 1 : 1 + len(theirs)]
        )  # after the size, before padding
        assert torch.allclose(mine.flatten(), theirs.flatten(), atol=0.02)


def test_a_row_prepared_while_a_base_loads_is_the_same(cm, scenes):
    """The worker prepares rows beside it, and transformers sets the whole process's default dtype meanwhile."""
    image = scenes["val"][1].image.resize((97, 71))
    size, pixels = cm.family.image_size(cm.processor), cm.family.resize(cm.processor, image)
    values = cm.family.pixel_values(cm.processor, torch.from_numpy(pixels[None]))
    path = cm.processor.tokenizer.name_or_path
    torch.set_default_dtype(torch.bfloat16)
    try:
        other = cm.family.load_processor(path)
        assert np.array_equal(cm.family.resize(other, image), pixels)
        assert np.array_equal(cm.family.resize(cm.processor, image), pixels)
    finally:
        torch.set_default_dtype(torch.float32)
    assert cm.family.image_size(other) == size
    # What is normalised later, when the base is there, has not kept anything of that dtype.
    for processor in (cm.processor, other):
        assert torch.equal(cm.family.pixel_values(processor, torch.from_numpy(pixels[None])), values)


def test_prompt_and_padding_have_no_label_and_the_end_does(cm, texts):
    family = cm.family
    batch = texts(cm, CAPTIONS)
    head = family.head(cm.processor, cm.prompt)
    for caption, ids, mask, labels in zip(CAPTIONS, batch["input_ids"], batch["attention_mask"], batch["labels"]):
        length = int(mask.sum())
        assert ids[: len(head)].tolist() == head
        assert (labels[: len(head)] == IGNORED).all()
        assert (labels[length:] == IGNORED).all()
        assert torch.equal(labels[len(head) : length], ids[len(head) : length])
        assert ids[length - 1] == labels[length - 1] == family.end_token(cm.processor)
        words = cm.processor.tokenizer.decode(ids[len(head) : length], skip_special_tokens=True)
        assert words.strip() == caption


def test_long_captions_are_cut_and_keep_their_end(cm):
    family = cm.family
    room = len(family.head(cm.processor, cm.prompt))
    ids, prompt, cut = family.encode(cm.processor, CAPTIONS[1], cm.prompt, room + 4)
    assert (len(ids), prompt, cut) == (room + 4, room, True)
    assert ids[-1] == family.end_token(cm.processor)
    assert ids[:-1] == family.encode(cm.processor, CAPTIONS[1], cm.prompt, 96)[0][: room + 3]
    assert not family.encode(cm.processor, CAPTIONS[0], cm.prompt, 96)[2]
    with pytest.raises(ConfigError, match="no room"):
        family.encode(cm.processor, CAPTIONS[0], cm.prompt, room + 1)


def test_padding_to_a_longer_length_changes_nothing(cm, texts, pixel_values):
    batch = texts(cm, CAPTIONS[:1])
    longer = {k: torch.nn.functional.pad(v, (0, 7), value=IGNORED if k == "labels" else 0) for k, v in batch.items()}
    with torch.no_grad():
        short, long = (cm.family.label_logits(cm, b, pixel_values(cm)[:1]).logits for b in (batch, longer))
    assert torch.allclose(short, long, atol=1e-4)


def test_the_picture_matters(cm, texts, pixel_values):
    batch = texts(cm, CAPTIONS[:1] * 2)
    with torch.no_grad():
        found = cm.family.label_logits(cm, batch, pixel_values(cm)[:2])
    one, other = (found.logits[found.rows == row] for row in (0, 1))
    assert (one - other).abs().max() > 1e-3


def test_stored_features_give_the_same_logits_and_captions(cm, texts, pixel_values):
    pixels, batch = pixel_values(cm), texts(cm, CAPTIONS)
    features = cm.family.encode_images(cm, pixels)
    assert len(features) == len(pixels)
    assert not features.requires_grad
    with torch.no_grad():
        with_tower, stored = (cm.family.label_logits(cm, batch, images).logits for images in (pixels, features))
    assert torch.equal(with_tower, stored)
    for decode in (GREEDY, BEAMS):
        assert cm.family.generate(cm, pixels, decode) == cm.family.generate(cm, features, decode)


def test_fewer_images_are_shared_by_blocks_of_rows(cm, texts, pixel_values):
    images = cm.family.encode_images(cm, pixel_values(cm)[:2])
    batch = texts(cm, CAPTIONS)
    with torch.no_grad():
        shared, whole = (cm.family.label_logits(cm, batch, i).logits for i in (images, images.repeat(2, 1, 1)))
    assert torch.allclose(shared, whole, atol=1e-5)


@pytest.mark.parametrize("decode", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_batched_captions_equal_single_ones(cm, pixel_values, decode):
    pixels = pixel_values(cm)
    together = cm.family.generate(cm, pixels, decode)
    assert together == [cm.family.generate(cm, p[None], decode)[0] for p in pixels]
    assert any(together)


def test_generation_begins_where_the_labels_do(cm, pixel_values, texts):
    """The first token that is generated is the one that the training forward finds most likely after the prompt."""
    pixels = pixel_values(cm)
    one = DecodeSettings(max_new_tokens=1)
    with torch.no_grad():
        found = cm.family.label_logits(cm, texts(cm, CAPTIONS[:1] * len(pixels)), pixels)
    first = [int(found.logits[found.rows == row][0].argmax()) for row in range(len(pixels))]
    tokenizer = cm.processor.tokenizer
    said = [t.strip() for t in tokenizer.batch_decode([[t] for t in first], skip_special_tokens=True)]
    assert cm.family.generate(cm, pixels, one) == said


def test_generate_runs_the_tower_once(cm, pixel_values):
    calls = []
    hook = cm.family.tower(cm.model).register_forward_hook(lambda *_: calls.append(1))
    cm.family.generate(cm, pixel_values(cm), GREEDY)
    hook.remove()
    assert len(calls) == 1


def test_training_after_decoding_is_training(case, load, texts, pixel_values):
    """An evaluation leaves nothing behind: 4-bit weights, cached positions, modes."""
    cm = load(case)
    batch, pixels = texts(cm, CAPTIONS), pixel_values(cm)
    with torch.no_grad():
        before = cm.family.label_logits(cm, batch, pixels).logits
        cm.family.generate(cm, pixels[:1], BEAMS)
        assert torch.equal(before, cm.family.label_logits(cm, batch, pixels).logits)


def test_scopes_name_their_linears(case, cm):
    family, model = cm.family, cm.model
    assert set(family.scopes()) == set(case.scopes)
    seen = []
    for scope, path in case.scopes.items():
        paths = family.linear_paths(model, scope)
        assert path in paths
        seen += paths
    assert len(seen) == len(set(seen))
    assert sorted(seen) == sorted(family.linear_paths(model, "all"))
    heads = {n for n, m in model.named_modules() if m is model.get_output_embeddings()}
    assert not heads & set(seen)
    found = family.lora_targets(model, "language", case.targets)
    assert found
    assert {p.rsplit(".", 1)[-1] for p in found} == set(case.targets)
    with pytest.raises(ConfigError, match="'nothing' matches no linear"):
        family.lora_targets(model, "language", ("nothing",))
