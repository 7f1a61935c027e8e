"""GIT: inputs as its processor makes them, labels, stored features, decoding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raycap.config import DecodeSettings
from raycap.errors import ConfigError
from raycap.models.base import IGNORED, evaluating

GREEDY = DecodeSettings(max_new_tokens=8)


@pytest.fixture(params=["twin", "shipped"])
def cm(request, load):
    """The random twin, and the GIT that ships."""
    return load() if request.param == "twin" else load("builtin:tiny-git")


def texts(cm, captions, prompt=""):
    coded = [cm.family.encode(cm.processor, c, prompt, 32) for c in captions]
    return cm.family.collate([c[0] for c in coded], [c[1] for c in coded], cm.family.pad_token(cm.processor))


def test_resized_once_and_normalised_later_is_what_the_processor_makes(cm, images, pixel_values):
    odd = [images[0].resize((97, 71)), images[1].resize((64, 200))]
    for image in [*images, *odd]:
        pixels = cm.family.resize(cm.processor, image)
        assert pixels.dtype == np.uint8
        assert pixels.shape == cm.family.image_size(cm.processor)
        mine = cm.family.pixel_values(cm.processor, torch.from_numpy(pixels[None]))
        theirs = cm.processor(images=image, return_tensors="pt")["pixel_values"]
        assert torch.equal(mine, theirs)


def test_prompt_and_padding_have_no_label_and_the_end_does(cm):
    family, tokenizer = cm.family, cm.processor.tokenizer
    batch = texts(cm, ["a red ring", "two blue stars above a green cross"], prompt="this is")
    head = 1 + len(tokenizer("this is", add_special_tokens=False)["input_ids"])
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"]):
        length = int(mask.sum())
        assert (labels[:head] == IGNORED).all()
        assert (labels[length:] == IGNORED).all()
        assert torch.equal(labels[head:length], ids[head:length])
        assert ids[length - 1] == labels[length - 1] == tokenizer.sep_token_id
        assert ids[0] == tokenizer.cls_token_id
    with pytest.raises(ConfigError, match="no room"):
        family.encode(cm.processor, "a red ring", "this is", 3)


def test_logits_at_labels_are_those_of_the_whole_model(cm, pixel_values):
    batch = texts(cm, ["a red ring", "two blue stars above a green cross"])
    pixels = pixel_values(cm)[:2]
    with torch.no_grad():
        found = cm.family.label_logits(cm, batch, pixels)
        whole = cm.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], pixel_values=pixels
        ).logits
    whole = whole[:, -batch["labels"].shape[1] : -1]
    learnt = batch["labels"][:, 1:] != IGNORED
    assert torch.allclose(found.logits, whole[learnt], atol=1e-5)
    assert torch.equal(found.labels, batch["labels"][:, 1:][learnt])
    assert torch.equal(found.rows, torch.nonzero(learnt)[:, 0])


def test_gradients_are_those_of_a_last_layer_that_carries_the_image_on(cm, pixel_values, monkeypatch):
    """The last layer computes text positions alone; what reaches the image's keys and values must not be lost."""
    batch = texts(cm, ["a red ring", "two blue stars above a green cross"])
    last = cm.model.git.encoder.layer[-1]
    # A key's bias has no gradient: softmax does not see it.
    wanted = [last.attention.self.value.bias, last.output.LayerNorm.weight]
    wanted.append(cm.model.git.encoder.layer[0].output.LayerNorm.bias)
    for parameter in wanted:
        parameter.requires_grad_(True)

    def gradients():
        logits = cm.family.label_logits(cm, batch, pixel_values(cm)[:2]).logits
        return [logits, *torch.autograd.grad(logits.square().sum(), wanted)]

    trimmed, layer = gradients(), type(last)

    def whole_layer(self, *args, text_tokens, **options):
        return layer.forward(self, *args, **options)[:, -text_tokens:]

    monkeypatch.setattr(last, "__class__", type("Whole", (layer,), {"forward": whole_layer}))
    for mine, whole in zip(trimmed, gradients()):
        assert torch.allclose(mine, whole, rtol=1e-4, atol=1e-5 * float(whole.detach().abs().max()))
    assert all(g.abs().max() > 0 for g in trimmed)


def test_padding_to_a_longer_length_changes_nothing(cm, pixel_values):
    batch = texts(cm, ["a red ring"])
    longer = {k: torch.nn.functional.pad(v, (0, 7), value=IGNORED if k == "labels" else 0) for k, v in batch.items()}
    with torch.no_grad():
        short, long = (cm.family.label_logits(cm, b, pixel_values(cm)[:1]).logits for b in (batch, longer))
    assert torch.allclose(short, long, atol=1e-5)


def test_stored_features_give_the_same_logits_and_captions(cm, pixel_values):
    pixels = pixel_values(cm)
    features = cm.family.encode_images(cm, pixels)
    batch = texts(cm, ["a red ring"] * len(pixels))
    with torch.no_grad():
        with_tower, stored = (cm.family.label_logits(cm, batch, images).logits for images in (pixels, features))
    assert torch.equal(with_tower, stored)
    assert cm.family.generate(cm, pixels, GREEDY) == cm.family.generate(cm, features, GREEDY)


def test_fewer_images_are_shared_by_blocks_of_rows(cm, pixel_values):
    images = cm.family.encode_images(cm, pixel_values(cm)[:2])
    batch = texts(cm, ["a red ring", "two blue stars", "a green cross", "a star"])
    with torch.no_grad():
        shared, whole = (cm.family.label_logits(cm, batch, i).logits for i in (images, images.repeat(2, 1, 1)))
    assert torch.equal(shared, whole)


def test_generate_runs_the_tower_once(cm, pixel_values):
    calls = []
    hook = cm.family.tower(cm.model).register_forward_hook(lambda *_: calls.append(1))
    cm.family.generate(cm, pixel_values(cm), GREEDY)
    hook.remove()
    assert len(calls) == 1


@pytest.mark.parametrize("decode", [GREEDY, DecodeSettings(max_new_tokens=8, num_beams=3)], ids=["greedy", "beams"])
def test_batched_captions_equal_single_ones(cm, pixel_values, decode):
    pixels = pixel_values(cm)
    assert cm.family.generate(cm, pixels, decode) == [cm.family.generate(cm, p[None], decode)[0] for p in pixels]


def test_scopes_name_their_linears_and_nothing_else(cm):
    family, model = cm.family, cm.model
    language = family.linear_paths(model, "language")
    assert language
    assert all(p.startswith("git.encoder.layer.") for p in language)
    assert all(p.startswith("git.image_encoder.") for p in family.linear_paths(model, "vision"))
    assert family.linear_paths(model, "projector") == ["git.visual_projection.visual_projection.0"]
    assert "output" not in family.linear_paths(model, "all")
    layers = len(model.git.encoder.layer)
    assert len(family.lora_targets(model, "language", ("query", "key", "value", "dense"))) == 6 * layers
    assert len(family.lora_targets(model, "language", ("output.dense",))) == 2 * layers
    one = "git.encoder.layer.1.attention.self.query"
    assert family.lora_targets(model, "language", (one,)) == [one]


def test_a_target_that_matches_nothing_names_the_nearest(cm):
    with pytest.raises(ConfigError, match=r"'querry' matches no linear module in scope 'language'.*'query'"):
        cm.family.lora_targets(cm.model, "language", ("query", "querry"))
    with pytest.raises(ConfigError, match="'q_proj' matches no linear"):
        cm.family.lora_targets(cm.model, "language", ("q_proj",))
    with pytest.raises(ConfigError, match="scope"):
        cm.family.linear_paths(cm.model, "langage")


def test_evaluating_gives_every_module_its_mode_back(cm):
    cm.model.train()
    cm.model.output.eval()
    with evaluating(cm.model):
        assert not cm.model.training
        assert not torch.is_grad_enabled()
    assert cm.model.training
    assert not cm.model.output.training
    assert torch.is_grad_enabled()
