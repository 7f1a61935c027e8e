"""NF4: what is quantised by name, weights that stay as they are, dequantised copies that are the same."""

from __future__ import annotations

import copy

import bitsandbytes as bnb
import pytest
import torch

from raycap.config import DecodeSettings
from raycap.errors import ConfigError, ModelError
from raycap.models.quantise import dequantise, materialise, pick_dtype, quantised_linears

PER_LAYER = [
    "attention.output.dense", "attention.self.key", "attention.self.query", "attention.self.value",
    "intermediate.dense", "output.dense",
]  # fmt: skip


def names(layers):
    return sorted(f"git.encoder.layer.{n}.{m}" for n in range(layers) for m in PER_LAYER)


def forward(cm, pixels, ids=None):
    ids = torch.arange(3, 13).repeat(len(pixels), 1) if ids is None else ids
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return cm.family.label_logits(cm, batch, pixels).logits


@pytest.mark.parametrize("path", ["twin", "builtin:tiny-git"])
def test_every_quantised_linear_by_name(load, twin, path):
    cm = load(twin if path == "twin" else path)
    assert cm.quantisation == "nf4"
    assert sorted(quantised_linears(cm.model)) == names(len(cm.model.git.encoder.layer))
    assert type(cm.model.output) is torch.nn.Linear
    assert all(m.weight.quant_state.quant_type == "nf4" for m in quantised_linears(cm.model).values())


def test_codes_do_not_depend_on_what_is_computed_in(load):
    fine, coarse = (quantised_linears(load(compute_dtype=d).model) for d in ("fp32", "bf16"))
    for name, module in fine.items():
        assert torch.equal(module.weight.data, coarse[name].weight.data)
        assert torch.equal(module.weight.quant_state.absmax, coarse[name].weight.quant_state.absmax)


def test_a_forward_multiplies_with_the_dequantised_weight(load, pixel_values):
    cm = load()
    module = cm.model.get_submodule(names(1)[0])
    x = torch.randn(2, 5, module.in_features)
    assert torch.allclose(module(x), torch.nn.functional.linear(x, dequantise(module), module.bias), atol=1e-6)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_materialised_is_bitwise_the_same_forward_and_backward(load, pixel_values, dtype):
    packed, dense = load(compute_dtype=dtype), load(compute_dtype=dtype, materialise=True)
    found = {}
    for cm in (packed, dense):
        features = cm.family.encode_images(cm, pixel_values(cm)).requires_grad_()
        logits = forward(cm, features)
        logits.float().square().sum().backward()
        found[cm is dense] = (logits.detach(), features.grad)
    for one, other in zip(found[True], found[False]):
        assert torch.equal(one, other)
    linears = quantised_linears(dense.model)
    assert sorted(linears) == names(2)  # still Linear4bit, by name, to whoever looks
    assert all(torch.equal(m.weight, quantised_linears(packed.model)[n].weight) for n, m in linears.items())


def test_an_evaluation_repacks_no_weight(load, pixel_values):
    cm = load()
    before = {n: (m.weight.data.clone(), dequantise(m)) for n, m in quantised_linears(cm.model).items()}
    cm.model.eval()
    with torch.no_grad():
        forward(cm, pixel_values(cm))
    cm.family.generate(cm, pixel_values(cm), DecodeSettings(max_new_tokens=4))
    for name, module in quantised_linears(cm.model).items():
        assert torch.equal(module.weight.data, before[name][0])
        assert torch.equal(dequantise(module), before[name][1])
    features = cm.family.encode_images(cm, pixel_values(cm)).requires_grad_()
    cm.model.train()
    forward(cm, features).sum().backward()
    assert features.grad.abs().sum() > 0


def test_a_repacked_weight_is_told_and_not_dequantised_into_garbage(load):
    module = next(iter(quantised_linears(load().model).values()))
    module.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ModelError, match="repacked"):
        dequantise(module)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_folder_saved_in_nf4_loads_as_what_it_was(load, tmp_path, pixel_values, dtype):
    cm = load(compute_dtype=dtype)
    cm.model.save_pretrained(tmp_path)
    cm.processor.save_pretrained(tmp_path)
    again = load(tmp_path, compute_dtype=dtype, quantisation="none")
    assert again.quantisation == "nf4"
    assert sorted(quantised_linears(again.model)) == names(2)
    with torch.no_grad():
        assert torch.equal(forward(cm, pixel_values(cm)), forward(again, pixel_values(cm)))


def test_a_model_saved_in_another_quantisation_is_refused(load, tmp_path, twin):
    from transformers import BitsAndBytesConfig, GitForCausalLM

    skip = ["output", "git.image_encoder", "git.visual_projection"]
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", llm_int8_skip_modules=skip)
    GitForCausalLM.from_pretrained(twin, quantization_config=settings, device_map={"": "cpu"}).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="not in NF4"):
        load(tmp_path)


def test_without_quantisation_nothing_is(load):
    cm = load(quantisation="none")
    assert cm.quantisation == "none"
    assert not quantised_linears(cm.model)
    assert not any(isinstance(m, bnb.nn.Linear4bit) for m in cm.model.modules())
    assert materialise(copy.deepcopy(cm.model)) == 0


def test_compute_dtype():
    cpu = torch.device("cpu")
    assert pick_dtype("fp32", cpu) == torch.float32
    assert pick_dtype("auto", cpu) in (torch.bfloat16, torch.float32)
    with pytest.raises(ConfigError, match="valid: auto"):
        pick_dtype("fp8", cpu)
