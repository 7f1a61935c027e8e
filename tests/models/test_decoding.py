"""Draws that belong to an image, and words that no caption holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raycap.config import DecodeSettings
from raycap.errors import ConfigError
from raycap.models.decoding import KeyedGumbel, bad_token_ids, for_batch, image_keys

SAMPLE = DecodeSettings(max_new_tokens=8, do_sample=True, temperature=2.0)


@pytest.fixture
def pixels(load, images):
    cm = load()
    return np.stack([cm.family.resize(cm.processor, image) for image in images])


@pytest.fixture
def said(load, pixels):
    """Captions of the images in `order`, in batches of `size`."""
    cm = load()

    def said(decode, order=range(6), size=6):
        order = list(order)
        found = {}
        for begin in range(0, len(order), size):
            part = order[begin : begin + size]
            values = cm.family.pixel_values(cm.processor, torch.from_numpy(pixels[part]))
            texts = cm.family.generate(cm, values, for_batch(decode, cm.processor, pixels[part]))
            found.update(zip(part, texts))
        return [found[i] for i in sorted(found)]

    return said


def test_draws_follow_the_softmax_and_do_not_repeat():
    p = torch.tensor([0.5, 0.25, 0.15, 0.1])
    keys = tuple(int(k) for k in np.random.default_rng(0).integers(0, 2**63, 20_000))
    noise = KeyedGumbel(7, keys)
    first, second = (noise(None, p.log().expand(len(keys), -1)).argmax(1) for _ in range(2))
    for drawn in (first, second):
        share = torch.bincount(drawn, minlength=4) / len(keys)
        assert ((share - p).abs() < 4 * (p * (1 - p) / len(keys)).sqrt()).all()
    # Positions and seeds are independent: two draws agree as often as chance has them.
    other = KeyedGumbel(8, keys)(None, p.log().expand(len(keys), -1)).argmax(1)
    chance = float((p**2).sum())
    for again in (second, other):
        assert abs(float((first == again).float().mean()) - chance) < 4 * (chance * (1 - chance) / len(keys)) ** 0.5


def test_a_draw_does_not_depend_on_the_batch_or_the_generator(said):
    together = said(SAMPLE)
    torch.manual_seed(99)
    assert said(SAMPLE, reversed(range(6)), size=4) == together
    assert said(SAMPLE, size=1) == together
    other = said(DecodeSettings(max_new_tokens=8, do_sample=True, temperature=2.0, seed=1))
    assert other != together and together != said(DecodeSettings(max_new_tokens=8))


def test_narrow_sampling_is_greedy(said):
    greedy = said(DecodeSettings(max_new_tokens=8))
    assert said(DecodeSettings(max_new_tokens=8, do_sample=True, top_k=1)) == greedy
    assert said(DecodeSettings(max_new_tokens=8, do_sample=True, top_p=1e-9)) == greedy
    assert said(DecodeSettings(max_new_tokens=8, do_sample=True, temperature=1e-6)) == greedy


@pytest.mark.parametrize("beams", [1, 3])
def test_bad_words_never_come(said, beams):
    plain = said(DecodeSettings(max_new_tokens=8, num_beams=beams))
    word = max({w for text in plain for w in text.split() if w.isalpha()}, key=len)
    kept = said(DecodeSettings(max_new_tokens=8, num_beams=beams, bad_words=(word,)))
    assert any(word in text.split() for text in plain) and kept != plain
    assert not any(word in text.split() for text in kept)


def test_words_that_cannot_be_written_and_settings_that_were_not_resolved(load, pixels):
    def latin(text, add_special_tokens):
        return {"input_ids": [ord(c) if ord(c) < 256 else 0 for c in text]}

    latin.unk_token_id = 0
    assert bad_token_ids(latin, ("ab",)) == ((97, 98), (32, 97, 98), (65, 98), (32, 65, 98))
    with pytest.raises(ConfigError, match="cannot write '雪'"):
        bad_token_ids(latin, ("雪",))
    cm = load()
    values = cm.family.pixel_values(cm.processor, torch.from_numpy(pixels))
    for decode in (SAMPLE, DecodeSettings(bad_words=("red",))):
        with pytest.raises(ConfigError, match="for_batch"):
            cm.family.generate(cm, values, decode)
    plain = DecodeSettings(num_beams=2)
    assert for_batch(plain, cm.processor, pixels) is plain
    assert len(set(image_keys(pixels))) == len(pixels)
