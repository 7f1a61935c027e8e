"""Dropout whose mask is a function of what is dropped, not of a generator's state.

Shapes: K slots, b rows a slot, T positions, D features. A mask bit is the top bits of the product of two odd 32-bit
hashes, one of (slot seed, slot step, module, row, position) and one of (module, feature): multiplicative hashing
(Dietzfelbinger et al. 1997). Packing, padding, micro-batches, recomputation and device change nothing.
"""

from __future__ import annotations

import zlib

import torch
from torch import nn

_MASK = 0xFFFFFFFF


def mix(values: torch.Tensor) -> torch.Tensor:
    """The finaliser of MurmurHash3 (32 bit) on int64 tensors that hold unsigned 32-bit values."""
    values = values ^ (values >> 16)
    values = (values * 0x85EBCA6B) & _MASK
    values = values ^ (values >> 13)
    values = (values * 0xC2B2AE35) & _MASK
    return values ^ (values >> 16)


class Keys:
    """What masks depend on in the step that runs; the engine sets it before each forward."""

    def __init__(self) -> None:
        self.slot_keys: torch.Tensor | None = None
        """[K], hash of (trial seed, slot step); None outside training."""
        self.first_row = 0
        """Row of the effective batch at which this micro-batch begins."""

    def set(self, seeds: torch.Tensor, steps: torch.Tensor, first_row: int = 0) -> None:
        self.slot_keys = mix(mix(seeds & _MASK) ^ (steps & _MASK))
        self.first_row = first_row

    def clear(self) -> None:
        self.slot_keys = None


class KeyedDropout(nn.Module):
    """The base's own dropout on slot-major rows [K*b, ..., D], the same share for all slots."""

    def __init__(self, name: str, keys: Keys, p: float = 0.0):
        super().__init__()
        self.key = zlib.crc32(name.encode())
        self.keys = keys
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.keys.slot_keys is None or not self.training or self.p <= 0:
            return x
        limits = drop_limits(torch.full((len(self.keys.slot_keys),), self.p))
        return masked(x, self.key, self.keys, limits) * (1 / (1 - self.p))


def drop_limits(shares: torch.Tensor) -> torch.Tensor:
    """[K] shares to drop as the int32 below which a mask's bits mean zero."""
    return (shares.double() * 2**32 - 2**31).clamp(-(2**31), 2**31 - 1).to(torch.int32)


def masked(x: torch.Tensor, key: int, keys: Keys, limits: torch.Tensor) -> torch.Tensor:
    """x [K*b, ..., D] with each element zeroed with its slot's probability; the rest is not scaled here."""
    slots = len(keys.slot_keys)
    rows, middle, device = x.shape[0] // slots, x.shape[1:-1].numel(), x.device
    row = torch.arange(keys.first_row, keys.first_row + rows, device=device)
    place = torch.arange(middle, device=device)
    seeds = mix(keys.slot_keys.to(device) ^ key)
    lines = mix(mix(seeds[:, None] ^ mix(row))[:, :, None] ^ mix(place + 0x9E3779B9 & _MASK)) | 1
    columns = mix(torch.arange(x.shape[-1], device=device) + key & _MASK) | 1
    bits = _wrap(lines)[..., None] * _wrap(columns)
    zero = bits < limits.to(device)[:, None, None, None]
    return x.masked_fill(zero.view(x.shape), 0.0)


def _wrap(values: torch.Tensor) -> torch.Tensor:
    """Unsigned 32-bit values in int64 as int32; products of those wrap, which is what the hash wants."""
    return torch.where(values >= 2**31, values - 2**32, values).to(torch.int32)
