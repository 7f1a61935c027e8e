"""Stacked adapters: one base product for any number of slots, gradients as autograd has them, padding that stays zero."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from raycap.config import from_dict
from raycap.models.dropout import Keys
from raycap.models.stacked import KINDS, Stacks
from raycap.trial import trial_spec

CPU = torch.device("cpu")


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 5)
        self.double().requires_grad_(False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def spec(k, r, dropout=0.0):
    return trial_spec(from_dict({}), f"t{k}", {"lora.r": r, "lora.alpha": 3.0, "lora.dropout": dropout}, seed=k)


def weights(r, names, seed):
    shapes, generator = {"first": (6, 10), "second": (10, 5)}, torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    return {n: (draw(r, shapes[n][0]), draw(shapes[n][1], r)) for n in names}


@pytest.fixture
def packed():
    """(model, stacks, specs, weights) of three slots of rank 2, 4, 1; the last one adapts `second` alone."""
    model = Two()
    stacks = Stacks(model, Keys(), compute_dtype=torch.float64, device=CPU)
    specs = [spec(0, 2), spec(1, 4), spec(2, 1)]
    values = [weights(2, ["first", "second"], 0), weights(4, ["first", "second"], 1), weights(1, ["second"], 2)]
    stacks.rebuild(specs, [{"value": v, "m": {}, "v": {}} for v in values])
    return model, stacks, specs, values


def reference(x, specs, values):
    """The same by plain autograd, slot by slot; leaves by slot and name."""
    plain, leaves, out = Two(), [], []
    for k, rows in enumerate(x.chunk(len(specs))):
        own = {n: tuple(t.clone().requires_grad_() for t in pair) for n, pair in values[k].items()}
        leaves.append(own)

        def adapted(name, inner, own=own, k=k):
            y = getattr(plain, name)(inner)
            if name in own:
                y = y + specs[k].scale * inner @ own[name][0].T @ own[name][1].T
            return y

        out.append(adapted("second", torch.tanh(adapted("first", rows))))
    return torch.cat(out), leaves


@pytest.mark.parametrize("count", [1, 3])
def test_forward_and_gradients_are_those_of_plain_autograd(packed, count):
    model, stacks, specs, values = packed
    specs, values = specs[-count:], values[-count:]
    stacks.rebuild(specs, [{"value": v} for v in values])
    x = torch.randn(2 * count, 7, 6, dtype=torch.float64, requires_grad=True)
    expected, leaves = reference(x, specs, values)
    factor = torch.randn_like(expected)
    (expected * factor).sum().backward()
    wanted, x.grad = x.grad, None
    stacks.refresh()
    found = model(x)
    (found * factor).sum().backward()
    stacks.collect()
    assert torch.allclose(found, expected, atol=1e-12)
    assert torch.allclose(x.grad, wanted, atol=1e-12)
    for k, own in enumerate(leaves):
        grads = stacks.cut(k, "grads", list(own))
        for name, pair in own.items():
            for mine, leaf in zip(grads[name], pair):
                assert torch.allclose(mine, leaf.grad, atol=1e-12)


def test_gradients_reach_adapters_on_frozen_inputs_and_add_up_over_pieces(packed):
    model, stacks, _, _ = packed
    x = torch.randn(6, 7, 6, dtype=torch.float64)
    stacks.refresh()
    model(x).square().sum().backward()
    stacks.collect()
    whole = stacks.grads.clone()
    assert whole.abs().sum(1).gt(0).all()
    stacks.refresh()
    for piece in (0, 1):
        rows = torch.cat([block[piece : piece + 1] for block in x.chunk(3)])
        model(rows).square().sum().backward()
        stacks.collect()
    assert torch.allclose(stacks.grads, whole, atol=1e-12)


def test_padding_gets_no_gradient(packed):
    model, stacks, specs, values = packed
    stacks.refresh()
    model(torch.randn(3, 7, 6, dtype=torch.float64)).square().sum().backward()
    stacks.collect()
    own = torch.zeros_like(stacks.grads, dtype=torch.bool)
    for k, value in enumerate(values):
        for name in value:
            down, up = stacks.views(own, name)
            down[k, : specs[k].r] = True
            up[k, :, : specs[k].r] = True
    assert not stacks.grads[~own].any()
    assert stacks.grads[own].ne(0).all()


class Opaque(nn.Linear):
    """A linear of another class: what it does is its own affair (4-bit weights, say), so it is called."""


@pytest.mark.parametrize("kind", [nn.Linear, Opaque])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_each_base_linear_is_applied_once_for_any_number_of_slots(count, kind):
    from torch.utils._python_dispatch import TorchDispatchMode

    model = Two()
    for linear in (model.first, model.second):
        linear.__class__ = kind
    places = {model.first.weight.data_ptr(): "first", model.second.weight.data_ptr(): "second"}
    products = {"first": 0, "second": 0}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.mm, torch.ops.aten.bmm):
                for name in {places.get(a.data_ptr()) for a in args if isinstance(a, torch.Tensor)} - {None}:
                    products[name] += 1
            return function(*args, **(kwargs or {}))

    stacks = Stacks(model, Keys(), compute_dtype=torch.float64, device=CPU)
    specs = [spec(k, 1 + k % 3) for k in range(count)]
    stacks.rebuild(specs, [{"value": weights(s.r, ["first", "second"], k)} for k, s in enumerate(specs)])
    stacks.refresh()
    with Count():
        out = model(torch.randn(2 * count, 3, 6, dtype=torch.float64))
        assert products == {"first": 1, "second": 1}
        out.sum().backward()
    assert products == {"first": 1, "second": 2}, "once more for the gradient of what comes before it"


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_weight_that_is_plainly_there_gives_what_calling_the_base_gives(dtype, dropout):
    """Outputs and the adapters' gradients; through a linear whose weight is taken, and through one that is called."""
    found = []
    for kind in (nn.Linear, Opaque):
        model, keys = Two().to(dtype), Keys()
        for linear in (model.first, model.second):
            linear.__class__ = kind
        specs = [spec(0, 2, dropout), spec(1, 4), spec(2, 1)]
        values = [weights(r, ["first", "second"], k) for k, r in enumerate((2, 4, 1))]
        stacks = Stacks(model, keys, compute_dtype=dtype, device=CPU)
        stacks.rebuild(specs, [{"value": v} for v in values])
        stacks.refresh()
        keys.set([1, 2, 3], [0, 0, 0], CPU)
        x = torch.randn(6, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
        out = model(x.requires_grad_())
        out.square().sum().backward()
        stacks.collect()
        found.append((out.detach(), stacks.grads.clone(), x.grad))
    (out, grads, of_x), (out2, grads2, of_x2) = found
    assert torch.equal(out, out2), "the forward is the same, to the bit"
    rough = {torch.float64: 1e-12, torch.bfloat16: 3e-2}[dtype]  # one rounding less, in the gradients of the inputs
    assert torch.allclose(grads, grads2, rtol=rough, atol=rough * grads2.abs().max().item())
    assert torch.allclose(of_x, of_x2, rtol=rough, atol=rough * of_x2.abs().max().item())
    assert of_x.ne(0).any() and grads.ne(0).any()


def test_operations_do_not_grow_with_the_slots():
    """No loop over adapters, in whatever place: as many tensor operations for nine slots as for four."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += 1
            return function(*args, **(kwargs or {}))

    found = []
    for count in (4, 9):
        model, keys = Two(), Keys()
        stacks = Stacks(model, keys, compute_dtype=torch.float64, device=CPU)
        specs = [spec(k, 1 + k % 3, dropout=0.2 if k < count - 2 else 0.0) for k in range(count)]
        stacks.rebuild(specs, [{"value": weights(s.r, ["first", "second"], k)} for k, s in enumerate(specs)])
        x = torch.randn(2 * count, 3, 6, dtype=torch.float64)
        with Count() as counter:
            stacks.refresh()
            keys.set([s.seed for s in specs], [0] * count, CPU)
            model(x).sum().backward()
            stacks.collect()
        found.append(counter.calls)
    assert found[0] == found[1]


def test_dropout_of_some_slots_leaves_the_others_alone(packed):
    model, stacks, _, _ = packed
    specs = [spec(0, 2, dropout=0.5), spec(1, 4)]
    values = [weights(s.r, ["first", "second"], k) for k, s in enumerate(specs)]
    stacks.rebuild(specs, [{"value": v} for v in values])
    x = torch.randn(4, 7, 6, dtype=torch.float64)
    stacks.refresh()
    clean = model(x).detach()
    stacks.keys.set([0, 1], [0, 0], CPU)
    dropped = model(x).detach()
    assert torch.allclose(dropped[2:], clean[2:], atol=1e-12)
    assert not torch.allclose(dropped[:2], clean[:2])
    # The mean over many steps is the clean output of a linear module, scaled up by what was dropped.
    total, site = 0, stacks.sites["first"]
    for step in range(400):
        stacks.keys.set([0, 1], [step, step], CPU)
        total = total + site(x).detach()
    stacks.keys.clear()
    with stacks.applying([0, 1]):
        wanted = site(x)
    apart = ((total / 400 - wanted)[:2].norm() / (wanted - site.base(x))[:2].norm()).item()
    assert apart < 0.1


def test_applying_some_slots_and_none(packed):
    model, stacks, specs, values = packed
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    before = {k: getattr(stacks, k).clone() for k in KINDS}
    with stacks.applying([2, 0]):
        found = model(torch.cat([x, x]))
        assert not found.requires_grad
    for k, rows in zip((2, 0), found.chunk(2)):
        assert torch.allclose(rows, reference(x, [specs[k]], [values[k]])[0], atol=1e-12)
    with stacks.applying([]):
        assert torch.equal(model(x), Two()(x))
    assert all(torch.equal(before[k], getattr(stacks, k)) for k in KINDS)
    stacks.refresh()
    model(torch.cat([x, x, x])).sum().backward()  # trains as before


def test_rebuilding_keeps_every_number(packed):
    _, stacks, specs, values = packed
    moments = [{n: tuple(t * 0.1 for t in pair) for n, pair in v.items()} for v in values]
    stacks.rebuild(specs, [{"value": v, "m": m, "v": m} for v, m in zip(values, moments)])
    stacks.rebuild(
        [specs[1], specs[2]],
        [{kind: stacks.cut(k, kind, list(values[k])) for kind in KINDS} for k in (1, 2)],
    )
    assert stacks.rank == 4
    for k, old in enumerate((1, 2)):
        for name, pair in values[old].items():
            assert all(torch.equal(x, y) for x, y in zip(stacks.cut(k, "value", [name])[name], pair))
            assert all(torch.equal(x, y) for x, y in zip(stacks.cut(k, "v", [name])[name], moments[old][name]))


def test_unwrap_gives_the_plain_modules_back(packed):
    model, stacks, _, _ = packed
    stacks.unwrap()
    assert type(model.first) is nn.Linear
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    assert torch.equal(model(x), Two()(x))
