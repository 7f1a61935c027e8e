"""8-bit weights: what bitsandbytes makes of them, products that no neighbour in the batch changes, gradients, files."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch

from raycap.models.quantise import dequantise, quantised_linears


@pytest.fixture
def int8(load):
    def int8(*path, **settings):
        return load(*path, quantisation="int8", **settings)

    return int8


def test_the_same_linears_as_in_nf4_within_half_a_step_of_their_weights(int8, load):
    cm, whole = int8(), load(quantisation="none")
    linears = quantised_linears(cm.model)
    assert cm.quantisation == "int8"
    assert set(linears) == set(quantised_linears(load().model))
    for name, module in linears.items():
        assert isinstance(module, bnb.nn.Linear8bitLt)
        weight, kept = whole.model.get_submodule(name).weight, dequantise(module)
        assert module.weight.dtype == torch.int8
        assert torch.equal(kept, bnb.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB))
        steps = (weight - kept).abs() / (weight.abs().amax(1, keepdim=True) / 127)
        assert 0.3 < steps.max() < 0.51


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_forward_and_backward_are_those_of_the_unpacked_weight(int8, dtype):
    dense = int8(compute_dtype=dtype, materialise=True)
    for name, module in quantised_linears(int8(compute_dtype=dtype).model).items():
        x = torch.randn(2, 5, module.in_features, dtype=module.compute_dtype, requires_grad=True)
        y = module(x)
        (grad,) = torch.autograd.grad(y.float().square().sum(), x)
        other = dense.model.get_submodule(name)
        z = other(x)
        (again,) = torch.autograd.grad(z.float().square().sum(), x)
        assert torch.equal(y, z)
        assert torch.equal(grad, again)
        assert torch.equal(y, torch.nn.functional.linear(x, dequantise(module), module.bias))


def test_no_row_depends_on_its_neighbours_where_bitsandbytes_own_product_does(int8):
    module = next(iter(quantised_linears(int8().model).values()))
    generator = torch.Generator().manual_seed(0)
    row, loud = (torch.randn(1, 4, module.in_features, generator=generator) for _ in range(2))
    together = torch.cat([row, 10 * loud])
    with torch.no_grad():
        ours = (module(together)[:1] - module(row)).abs().max()
        module.__class__ = bnb.nn.Linear8bitLt
        theirs = (module(together)[:1] - module(row)).abs().max()
    assert ours < 1e-5
    assert theirs > 1e-3


def test_a_folder_saved_in_8_bits_loads_as_what_it_was(int8, load, tmp_path):
    cm = int8()
    cm.model.save_pretrained(tmp_path)
    cm.processor.save_pretrained(tmp_path)
    again = load(tmp_path, quantisation="none")
    assert again.quantisation == "int8"
    found = quantised_linears(again.model)
    for name, module in quantised_linears(cm.model).items():
        assert torch.equal(found[name].weight.data, module.weight.data)
        assert torch.equal(dequantise(found[name]), dequantise(module))
