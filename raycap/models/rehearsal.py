"""Runs a model without its numbers, and follows how much memory the tensors that it makes would take.

Weights are on torch's meta device: shapes without storage. What depends on them has no numbers either; what does not
(token ids, masks, positions, sizes of images) is computed for real, so that code which looks at such values goes the way
that it always goes. Whole numbers that would be read from activations (the most likely token) are taken to be zero.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ALIGN_BYTES = 512
"""CUDA's caching allocator hands out multiples of it."""
_META = torch.device("meta")
_VALUES = (torch.int64, torch.bool)
"""Types of which code may want to know the values."""
aten = torch.ops.aten


class Rehearsal(TorchDispatchMode):
    """Counts the bytes of storages made while it is on: `now`, and the most at any time, `peak`."""

    def __init__(self, align_bytes: int = ALIGN_BYTES):
        super().__init__()
        self.align_bytes = align_bytes
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref] = {}
        self._fused = _Fused()

    def __enter__(self) -> Rehearsal:
        self._fused.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._fused.__exit__(*error)

    def restart(self) -> None:
        """Let `peak` begin at what is held now."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        for tensor in tensors:
            self._note(tensor, counted=False)
        if not any(t.is_meta for t in tensors):
            found = self._real(func, args, kwargs, made=not tensors)
        elif func._schema.is_mutable and isinstance(args[0], torch.Tensor) and not args[0].is_meta:
            return args[0]  # numbers that are not there, written over some that are
        else:
            found = self._without_numbers(func, args, kwargs)
        return tree_map(lambda t: self._note(t) if isinstance(t, torch.Tensor) else t, found)

    def _real(self, func: Any, args: Any, kwargs: dict[str, Any], *, made: bool) -> Any:
        asked = kwargs.get("device")
        if asked is None or torch.device(asked).type != "meta":
            return func(*args, **kwargs)
        if made:
            found = func(*args, **kwargs)
            if not isinstance(found, torch.Tensor) or found.is_floating_point():
                return found
        return func(*args, **{**kwargs, "device": torch.device("cpu")})

    def _without_numbers(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if kwargs.get("device") is not None:
            kwargs["device"] = _META
        if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            args = (args[0], _places(args[1]), *args[2:])
        if func is aten._local_scalar_dense.default and args[0].dtype in _VALUES:
            return 0
        if func is aten.segment_reduce.default:
            return torch.empty(len(kwargs["lengths"]), dtype=args[0].dtype, device=_META)
        found = func(*tree_map(_shape_of, args), **tree_map(_shape_of, kwargs))
        return tree_map(self._values, found)

    def _values(self, found: Any) -> Any:
        if not isinstance(found, torch.Tensor) or found.dtype not in _VALUES or not found.is_meta:
            return found
        if found.untyped_storage()._cdata in self._known:
            return found
        return torch.zeros(found.shape, dtype=found.dtype)

    def _note(self, tensor: torch.Tensor, *, counted: bool = True) -> torch.Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return tensor
        size = self.align_bytes * math.ceil(storage.nbytes() / self.align_bytes) if counted else 0

        def gone(_: Any) -> None:
            self._known.pop(key, None)
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)
        return tensor


def _shape_of(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or value.is_meta:
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_META)


def _places(indices: Any) -> list[Any]:
    """Masks as the places where they are true, which have a number that a shape can be told from."""
    found: list[Any] = []
    for index in indices:
        if isinstance(index, torch.Tensor) and index.dtype == torch.bool and not index.is_meta:
            found += list(index.nonzero(as_tuple=True))
        else:
            found.append(index)
    return found


class _Fused(TorchFunctionMode):
    """Attention as the kernels of GPUs and CPUs do it: the products of all pairs are never there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention and (args or [kwargs["query"]])[0].is_meta:
            return _attend(*args, **(kwargs or {}))
        if func is torch.take_along_dim:  # the one function that looks at devices before it comes to `Rehearsal`
            return _taken(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _taken(input: torch.Tensor, indices: torch.Tensor, dim: int) -> torch.Tensor:
    """torch.take_along_dim."""
    shape, picks = list(input.shape), list(indices.shape)
    shape[dim] = picks[dim] = 1
    whole = list(torch.broadcast_shapes(shape, picks))
    along, indices = list(whole), indices.expand(*whole[:dim], indices.shape[dim], *whole[dim + 1 :])
    along[dim] = input.shape[dim]
    return input.expand(along).gather(dim, indices)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Any = None, *_: Any, **__: Any
) -> Any:
    return _Attention.apply(query, key, value, attn_mask)


class _Attention(torch.autograd.Function):
    """Keeps what flash and memory-efficient attention keep: inputs, output, and a sum a row in fp32."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, mask: Any) -> torch.Tensor:
        *lead, heads, rows, _ = query.shape
        out = query.new_empty(*lead, rows, heads, value.shape[-1]).transpose(-2, -3)
        sums = query.new_empty(*lead, heads, rows, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


class _Unpacked(torch.autograd.Function):
    """A product with a quantised weight, which is unpacked for as long as the product takes, in both directions."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: Any) -> torch.Tensor:
        ctx.weight = weight
        return functional.linear(x, torch.empty_like(weight), bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad @ torch.empty_like(ctx.weight), None, None


class PackedLinear(nn.Linear):
    """A linear whose weight is kept quantised; with `dense`, beside a copy that is not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if hasattr(self, "dense"):
            return functional.linear(x, self.dense, self.bias)
        return _Unpacked.apply(x, self.weight, self.bias)

    def unpack(self) -> torch.Tensor:
        """In the place of quantise.dequantise: a weight [O, I] that lasts as long as it is used."""
        return torch.empty_like(self.weight)


def hollow(build: Callable[[], nn.Module], dtype: torch.dtype, made_in: torch.dtype | None = None) -> nn.Module:
    """What `build` makes, on the meta device with parameters in `dtype`, frozen.

    `made_in`: the default dtype that it is made under, which some buffers keep; else `dtype`.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(made_in or dtype)
    try:
        with _META:
            model = build()
    finally:
        torch.set_default_dtype(before)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model.requires_grad_(False).eval()


@contextmanager
def saved_for_backward() -> Iterator[dict[int, int]]:
    """Storages that autograd keeps for backward inside the block: key -> bytes; each counted once."""
    found: dict[int, int] = {}
    kept = []  # else an address could be given away twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        found[storage._cdata] = storage.nbytes()
        kept.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found
