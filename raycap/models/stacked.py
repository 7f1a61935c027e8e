"""Many LoRA adapters on one base: each base linear is applied once, all adapters by two batched products.

Shapes: K slots, b rows a slot, T positions, R the widest rank, I in, O out, P all parameters of a slot.
Rows are slot-major: slot k owns rows k*b .. (k+1)*b - 1, under beam search too, which repeats rows in place.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from raycap.models.dropout import Keys, drop_limits, masked
from raycap.trial import TrialSpec


@dataclass(frozen=True)
class Site:
    """A linear module that can carry adapters, and where its stacks lie in a slot's parameters."""

    name: str
    module: nn.Module
    inputs: int
    outputs: int


class StackedLora(nn.Module):
    """base(x) + scale_k B_k A_k dropout(x) for the rows of slot k."""

    def __init__(self, base: nn.Module, name: str, keys: Keys):
        super().__init__()
        self.base, self.name, self.keys = base, name, keys
        self.key = zlib.crc32(f"lora {name}".encode())
        self.down: torch.Tensor | None = None  # [K, R, I]
        self.up: torch.Tensor | None = None  # [K, O, R]
        self.scale: torch.Tensor | None = None  # [K, 1, 1]
        self.scale_kept: torch.Tensor | None = None  # [K, 1, 1], scale / (1 - dropout)
        self.limits: torch.Tensor | None = None  # [K], None without dropout
        self.base_calls = 0

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.base_calls += 1
        out = self.base(x)
        if self.down is None:
            return out
        slots = self.down.shape[0]
        inner, scale = x, self.scale
        if self.limits is not None and self.training and self.keys.slot_keys is not None:
            # What is left is scaled by 1 / (1 - p) through the small matrix, not element by element.
            inner, scale = masked(x, self.key, self.keys, self.limits), self.scale_kept
        down, up = self.down.to(x.dtype), (self.up * scale).to(x.dtype)
        if slots == 1:  # the plain path: two matrix products, as peft does it
            update = nn.functional.linear(nn.functional.linear(inner, down[0]), up[0])
            return out + update.to(out.dtype)
        rows = inner.reshape(slots, -1, inner.shape[-1])
        update = torch.bmm(torch.bmm(rows, down.mT), up.mT)
        return out + update.view(out.shape).to(out.dtype)


class Stacks:
    """All adapters of a pack: one tensor of parameters [K, P], of which each site's stacks are views.

    One tensor lets clipping and AdamW run over everything in a dozen operations, whatever the number of modules.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str], keys: Keys):
        self.keys = keys
        self.sites: dict[str, StackedLora] = {}
        for path in paths:
            parent, _, leaf = path.rpartition(".")
            owner = model.get_submodule(parent)
            wrapped = StackedLora(getattr(owner, leaf), path, keys)
            setattr(owner, leaf, wrapped)
            self.sites[path] = wrapped
        self.device = next(model.parameters()).device
        self.specs: list[TrialSpec] = []
        self.targets: list[set[str]] = []
        self.values = torch.zeros(0, 0, device=self.device)
        self.grads = torch.zeros(0, 0, device=self.device)
        self.rank = 0

    def remove(self, model: nn.Module) -> None:
        """Give the model its plain modules back."""
        for path, site in self.sites.items():
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, site.base)

    def layout(self, rank: int) -> dict[str, tuple[int, int, int]]:
        """Per site (offset of A, offset of B, end) in a slot's parameters."""
        offset, places = 0, {}
        for name, site in self.sites.items():
            middle = offset + rank * site.in_features
            end = middle + rank * site.out_features
            places[name] = (offset, middle, end)
            offset = end
        return places

    def rebuild(
        self, specs: Sequence[TrialSpec], targets: Sequence[set[str]], slots: Sequence[dict[str, dict]]
    ) -> list[torch.Tensor]:
        """Stack the tensors of `slots` (each {"value"|"m"|"v": {site: (A [r, I], B [O, r])}}); returns [m, v] as [K, P]."""
        self.specs, self.targets = list(specs), list(targets)
        self.rank = max((s.r for s in specs), default=0)
        places = self.layout(self.rank)
        size = max((end for _, _, end in places.values()), default=0)
        whole = [torch.zeros(len(specs), size, device=self.device) for _ in range(3)]
        for k, slot in enumerate(slots):
            for kind, tensor in zip(("value", "m", "v"), whole):
                for name, (a, b) in slot.get(kind, {}).items():
                    begin, middle, end = places[name]
                    site, r = self.sites[name], specs[k].r
                    tensor[k, begin:middle].view(self.rank, site.in_features)[:r] = a
                    tensor[k, middle:end].view(site.out_features, self.rank)[:, :r] = b
        self.values, self.grads = whole[0], torch.zeros_like(whole[0])
        scale = torch.tensor([s.scale for s in specs], device=self.device)
        shares = torch.tensor([s.dropout for s in specs], device=self.device)
        for name, site in self.sites.items():
            on = torch.tensor([name in t for t in targets], device=self.device)
            if not specs or not bool(on.any()):
                site.down = site.up = site.scale = site.scale_kept = site.limits = None
                continue
            begin, middle, end = places[name]
            site.down = self._leaf(begin, middle, self.rank, site.in_features)
            site.up = self._leaf(middle, end, site.out_features, self.rank)
            site.scale = torch.where(on, scale, 0.0)[:, None, None]
            site.scale_kept = site.scale / (1 - shares)[:, None, None]
            site.limits = drop_limits(shares) if bool((shares > 0).any()) else None
        return whole[1:]

    def _leaf(self, begin: int, end: int, rows: int, columns: int) -> torch.Tensor:
        leaf = self.values[:, begin:end].view(-1, rows, columns).detach().requires_grad_()
        leaf.grad = self.grads[:, begin:end].view(-1, rows, columns)
        return leaf

    def cut(self, k: int, tensor: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Slot k's own part of a [K, P] tensor, by site: A [r, I] and B [O, r], copies."""
        r, found = self.specs[k].r, {}
        for name, (begin, middle, end) in self.layout(self.rank).items():
            if name in self.targets[k]:
                site = self.sites[name]
                a = tensor[k, begin:middle].view(self.rank, site.in_features)[:r].clone()
                b = tensor[k, middle:end].view(site.out_features, self.rank)[:, :r].clone()
                found[name] = (a, b)
        return found

    def fresh(self, spec: TrialSpec, targets: set[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """A trial's start: A as peft draws it (kaiming, a = sqrt 5), keyed by (trial seed, module); B zero."""
        found = {}
        for name in sorted(targets):
            site = self.sites[name]
            generator = torch.Generator().manual_seed((spec.seed * 0x9E3779B1 + zlib.crc32(name.encode())) & 0x7FFFFFFF)
            a = torch.empty(spec.r, site.in_features)
            bound = math.sqrt(3.0) * math.sqrt(2.0 / (1 + 5)) / math.sqrt(site.in_features)
            a.uniform_(-bound, bound, generator=generator)
            found[name] = (a.to(self.device), torch.zeros(site.out_features, spec.r, device=self.device))
        return found
