"""Dropout whose masks are a pure function of what they fall on, not of a generator's state.

An element is kept or dropped by a hash of (trial seed, slot step, module, row of the effective batch, position,
feature). So packing, padding, the size of a micro-batch, recomputation in backward, restarts and the device change no
mask, and a trial in a pack meets the masks that it would meet alone.

Shapes: K slots, b rows a slot, D features. Rows are slot-major: slot k owns the k-th block of b rows.

The hash is multiplicative (Dietzfelbinger et al. 1997): the odd 32-bit hash of an element's line (everything but module
and feature) times the odd 32-bit hash of its pair of columns (module, features 2j and 2j + 1), modulo 2^32, whose two
halves decide for one feature each. A line's hash is drawn once a step for all modules, a column's once a run. A mask is
an integer of all ones or all zeros, put on by a bitwise and: on a CPU a third of the cost of booleans, measured.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Sequence

import torch
from torch import nn

_LOW = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9


def mix(values: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's 32-bit finaliser, a bijection, on int64 tensors that hold values below 2^32."""
    values = values ^ (values >> 16)
    values = (values * 0x85EBCA6B) & _LOW
    values = values ^ (values >> 13)
    values = (values * 0xC2B2AE35) & _LOW
    return values ^ (values >> 16)


def _odd_int32(hashes: torch.Tensor) -> torch.Tensor:
    """Hashes made odd, as int32 that wraps: an odd factor permutes the 2^32 residues, an even one would not."""
    hashes = hashes | 1
    return torch.where(hashes >= 2**31, hashes - 2**32, hashes).to(torch.int32)


def drop_limits(shares: Sequence[float], device: torch.device) -> torch.Tensor:
    """Thresholds int16 [K]: of 15 bits of an element's hash, what lies below its slot's is dropped."""
    return torch.tensor([_limit(p) for p in shares], dtype=torch.int16, device=device)


def kept_share(p: float) -> float:
    """What is left where `p` is asked to be dropped: 1 - p, to 15 bits."""
    return 1 - _limit(p) / 2**15


def _limit(p: float) -> int:
    return min(round(p * 2**15), 2**15 - 1)


def put_on(x: torch.Tensor, mask: torch.Tensor, *, in_place: bool = False) -> torch.Tensor:
    """`x` where `mask` is all ones, and 0 where it is 0; same shape, outside autograd."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    if in_place:
        x.view(integers).bitwise_and_(mask.to(integers))
        return x
    return (x.view(integers) & mask.to(integers)).view(x.dtype)


class SharedKeys:
    """The step that masks belong to. Set before a forward that trains, cleared after its backward.

    One for all threads: on a GPU backward has a thread of its own, in which gradient checkpointing computes again.
    """

    def __init__(self) -> None:
        self.lane = 0
        """Whose gradients the modules add up."""
        self.slots = 0
        self.first_row = 0
        self.rows = 0
        self.stride = 1
        self._slot_hashes: torch.Tensor | None = None
        self._lines: dict[tuple[int, ...], torch.Tensor] = {}
        self._columns: dict[tuple[str, int], torch.Tensor] = {}

    @property
    def on(self) -> bool:
        return self._slot_hashes is not None

    def set(
        self,
        seeds: Sequence[int],
        steps: Sequence[int],
        device: torch.device,
        first_row: int = 0,
        rows: int = 0,
        stride: int = 1,
    ) -> None:
        """`seeds` and `steps` are those of the K slots; `first_row` is the row of the effective batch with which this
        micro-batch begins, every `stride`-th from there on is in it, `rows` how many of a slot it has: some modules see
        rows and positions as one axis."""
        parts = torch.tensor([[s & _LOW, (s >> 32) & _LOW, n] for s, n in zip(seeds, steps)], dtype=torch.int64)
        low, high, step = parts.unbind(1)
        self._slot_hashes = mix(mix(mix(low ^ _GOLDEN) ^ high) ^ step).to(device)
        self.slots, self.first_row, self.rows, self.stride = len(parts), first_row, rows, stride
        self._lines.clear()

    def clear(self) -> None:
        self._slot_hashes = None
        self._lines.clear()

    def mask(self, name: str, shape: torch.Size, limits: torch.Tensor) -> torch.Tensor:
        """Mask int16 [d, n, D] of the first d = len(limits) of K slots, for a tensor of `shape` [K*b, ..., D].

        Element (k, i, j) belongs to the i-th line of slot k, its rows' other axes flattened.
        """
        lines = self._lines_of(shape[:-1]).view(self.slots, -1, 1)[: len(limits)]
        hashes = lines * self._columns_of(name, (shape[-1] + 1) // 2, lines.device)
        hashes ^= hashes >> 16  # the lower half of a product is poor by itself
        low = hashes.view(torch.int16)[..., : shape[-1]] & 0x7FFF
        return ((limits - 1).view(-1, 1, 1) - low) >> 15

    def _lines_of(self, shape: torch.Size) -> torch.Tensor:
        count = self.slots * self.rows
        if count and shape[0] != count and shape[0] % count == 0:
            shape = (count, shape[0] // count, *shape[1:])
        key = tuple(shape)
        if key not in self._lines:
            device = self._slot_hashes.device
            row = torch.arange(shape[0] // self.slots, device=device) * self.stride + self.first_row
            hashes = mix(self._slot_hashes[:, None] ^ mix(row + _GOLDEN)).flatten()
            for size in shape[1:]:  # axis by axis, so that no index depends on how long another axis is
                hashes = mix(hashes[..., None] ^ mix((torch.arange(size, device=device) * _GOLDEN + 1) & _LOW))
            self._lines[key] = _odd_int32(hashes)
        return self._lines[key]

    def _columns_of(self, name: str, size: int, device: torch.device) -> torch.Tensor:
        if (name, size) not in self._columns:
            base = mix(torch.tensor(zlib.crc32(name.encode())))
            self._columns[name, size] = _odd_int32(mix(base ^ mix(torch.arange(size) + _GOLDEN))).to(device)
        return self._columns[name, size]


class Keys(SharedKeys, threading.local):
    """Keys of which every thread has its own, so that lanes (raycap/train/lanes.py) compute different rows at once."""


class _Drop(torch.autograd.Function):
    """x [K*b, ..., D] with `mask` [K, n, D] on, and so its gradient."""

    @staticmethod
    def forward(ctx, x, mask):
        ctx.save_for_backward(mask)
        return put_on(x.reshape(mask.shape), mask).view(x.shape)

    @staticmethod
    def backward(ctx, grad):
        (mask,) = ctx.saved_tensors
        return put_on(grad.reshape(mask.shape), mask).view(grad.shape), None


class KeyedDropout(nn.Module):
    """Stands in for an nn.Dropout of the base; the same share for every slot. Does nothing outside training."""

    def __init__(self, name: str, p: float, keys: Keys):
        super().__init__()
        self.name, self.p, self.keys = name, p, keys

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not (self.training and self.keys.on):
            return x
        mask = self.keys.mask(self.name, x.shape, drop_limits([self.p] * self.keys.slots, x.device))
        return _Drop.apply(x, mask) * (1 / kept_share(self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}, keyed"


def key_base_dropout(model: nn.Module, keys: Keys, *, on: bool) -> int:
    """Put keyed dropout in the place of every nn.Dropout that drops, or none where `on` is False; how many there were.

    What attention draws inside a fused kernel comes from the global generator, would differ between a pack and a run
    alone, and is off in both cases.
    """
    for module in model.modules():
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float) and not isinstance(module, KeyedDropout):
                setattr(module, name, 0.0)
    found = [(n, m) for n, m in model.named_modules() if type(m) is nn.Dropout and m.p > 0]
    for name, module in found:
        parent, _, leaf = name.rpartition(".")
        replacement = KeyedDropout(name, module.p, keys) if on else nn.Identity()
        setattr(model.get_submodule(parent), leaf, replacement)
    return len(found)
