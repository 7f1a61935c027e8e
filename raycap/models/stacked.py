"""Many LoRA adapters on one base: each base linear is applied once, all adapters of all slots by batched products.

Shapes: K slots, R the widest rank among them, I inputs, O outputs of a linear, n rows x positions of a slot, P all
parameters of a slot. Rows are slot-major: slot k owns the k-th of K equal blocks of rows (beam search, which repeats
rows in place, keeps that).

A slot's parameters are one row of a tensor [K, P], first the A of every module, then the B; so clipping and AdamW are a
few operations on everything at once, and `[K, R, I]` and `[K, O, R]` are views of it. Ranks below R are padded with
zeros, which stay zero: with A's row and B's column zero, so are both their gradients. For the same reason a slot that
does not adapt a module holds zeros there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import nn

from raycap.models.dropout import Keys, drop_limits, kept_share
from raycap.models.lora_ops import AddLora, FullLinear, LoraLinear
from raycap.models.quantise import dequantise, is_packed
from raycap.trial import TrialSpec

Weights = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""Module path -> (A [r, I], B [O, r])."""
KINDS = ("value", "m", "v")
"""A slot's parameters, and AdamW's two moments of them."""


class Part(NamedTuple):
    """What one lane applies at a site: neighbouring slots of the stacks, as wide as the widest of them."""

    A: torch.Tensor
    """[K, R, I]; B is [K, O, R] and holds alpha / r too. Views of the stacks, as are the gradients."""
    B: torch.Tensor
    grads: tuple[torch.Tensor, torch.Tensor] | None = None
    """Where those of A and B add up."""
    limits: torch.Tensor | None = None
    """Dropout thresholds [d] of the slots that drop, which come first."""


class StackedLora(nn.Module):
    """A base linear and the slots' adapters on it. Without adapters bound it is the base linear."""

    def __init__(self, base: nn.Module, name: str, keys: Keys):
        super().__init__()
        self.base, self.name, self.keys = base, name, keys
        self.packed = is_packed(base)
        """Whether the base's weight is in 4 or 8 bits, and not kept dense beside them."""
        self.anchor = torch.zeros((), requires_grad=True)
        self.parts: list[Part] = []
        """A part for each lane; none while no adapters are bound."""

    @property
    def part(self) -> Part:
        """What the lane at work in this thread applies."""
        return self.parts[self.keys.lane]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.parts:
            return self.base(x)
        part, mask = self.part, None
        if part.limits is not None and self.training and self.keys.on:
            mask = self.keys.mask(f"lora:{self.name}", x.shape, part.limits)
        kind = part.A.dtype
        weight = self.frozen_weight()
        if weight is not None:
            bias = None if self.base.bias is None else self.base.bias.to(kind)
            return LoraLinear.apply(x.to(kind), self.anchor, self, part, weight, bias, mask).to(x.dtype)
        y = self.base(x)
        return AddLora.apply(y.to(kind), x.to(kind), self.anchor, part, mask).to(y.dtype)

    def frozen_weight(self) -> torch.Tensor | None:
        """What the base multiplies with [O, I], where that is all it does and in the adapters' dtype; else None."""
        if self.packed:
            weight = dequantise(self.base)
        else:
            weight = self.base.weight if type(self.base) is nn.Linear else getattr(self.base, "dense", None)
        return None if weight is None or weight.dtype != self.parts[0].A.dtype or weight.requires_grad else weight

    # What code around a linear may ask of it.
    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias


class StackedFull(StackedLora):
    """A base linear that each slot has a copy of its own of: a part's A is the weight [K, O, I], its B the bias [K, O, 1]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.parts:
            return self.base(x)
        part = self.part
        return FullLinear.apply(x.to(part.A.dtype), self.anchor, part).to(x.dtype)


class Stacks:
    """The parameters and moments of all slots that train, and the modules that use them."""

    def __init__(
        self, model: nn.Module, keys: Keys, *, compute_dtype: torch.dtype, device: torch.device, lanes: int = 1
    ):
        self.model, self.keys, self.device, self.lanes = model, keys, device, lanes
        self.compute_dtype = compute_dtype
        self.dtype = torch.float64 if compute_dtype == torch.float64 else torch.float32
        """Parameters and moments are kept in at least fp32, whatever is computed in."""
        self.sites: dict[str, StackedLora] = {}
        self.full: set[str] = set()
        """Paths of the linears that are trained in full: every slot has all of them."""
        self.specs: list[TrialSpec] = []
        self.rebuilds = 0
        self._clear()

    def _clear(self) -> None:
        empty = torch.zeros(0, 0, device=self.device, dtype=self.dtype)
        self.specs, self.names, self._places, self.rank, self.half = [], [], {}, 0, 0
        self.full_width = 0
        """Of a slot's row, what holds the linears that are trained in full."""
        self.value = self.m = self.v = self.grads = self._work = self.room = self.tail = empty
        self._work_grads: list[torch.Tensor] = []
        """Where backward adds up, tensors [K, P]: one that all lanes share, or a lane each where they share slots."""
        self.spans: list[slice] = []
        """The slots of each piece of a step: spans of all slots, a lane each; or all of them, once."""

    def site(self, path: str) -> StackedLora:
        """The module at `path`, made able to carry adapters."""
        if path not in self.sites:
            parent, _, leaf = path.rpartition(".")
            owner = self.model.get_submodule(parent)
            kind = StackedFull if path in self.full else StackedLora
            self.sites[path] = kind(getattr(owner, leaf), path, self.keys).train(owner.training)
            setattr(owner, leaf, self.sites[path])
        return self.sites[path]

    def unwrap(self) -> None:
        """Give the model its plain modules back."""
        for path, site in self.sites.items():
            parent, _, leaf = path.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, site.base)
        self.sites.clear()
        self._clear()

    # --- building -----------------------------------------------------------------------------------------------------

    def rebuild(
        self, specs: Sequence[TrialSpec], slots: Sequence[Mapping[str, Weights]], spans: Sequence[int] = ()
    ) -> None:
        """Stack `slots`, each {value, m, v: {path: (A, B)}} at its own rank.

        `spans` is how many slots each lane has, in their order; without it every lane has all. The slots with dropout
        come first in each span.
        """
        self._clear()
        self.rebuilds += 1
        self.specs = list(specs)
        self.names = sorted({name for slot in slots for name in slot["value"]})
        self.rank = max((s.r for s in specs), default=0)
        self._place()
        for kind in KINDS:
            setattr(self, kind, torch.zeros(len(specs), self.width, device=self.device, dtype=self.dtype))
            for k, slot in enumerate(slots):
                for name, (a, b) in slot.get(kind, {}).items():
                    down, up = self.views(getattr(self, kind), name)
                    down[k, : a.shape[0]] = a
                    up[k, :, : b.shape[1]] = b
        # Gradients, then a loss of each slot and one more number: workers of a pack add all of it up at once.
        self.room = torch.zeros(self.value.numel() + len(specs) + 1, device=self.device, dtype=self.dtype)
        self.grads = self.room[: self.value.numel()].view_as(self.value)
        self.tail = self.room[self.value.numel() :]
        self._work = torch.zeros_like(self.value, dtype=self.compute_dtype)
        ends = list(accumulate(spans or [len(specs)]))
        self.spans = [slice(end - size, end) for end, size in zip(ends, spans or [len(specs)])]
        self._work_grads = [torch.zeros_like(self._work) for _ in range(1 if spans else self.lanes)]
        self.scale = self._column([s.scale for s in specs])
        # What dropout leaves is scaled up through B as well, not element by element.
        self.train_scale = self._column([s.scale / kept_share(s.dropout) for s in specs])
        self._bind(self._work, self._work_grads)

    def _column(self, values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, device=self.device, dtype=self.dtype)[:, None]

    def _place(self) -> None:
        """Where each module's A and B begin in a slot's row."""
        sizes = {n: (self.site(n).in_features, self.site(n).out_features) for n in self.names}
        # Weights and biases of what is trained in full come first, where alpha / r does not reach.
        self._places, down = {}, 0
        for name in (n for n in self.names if n in self.full):
            inputs, outputs = sizes.pop(name)
            self._places[name] = (down, inputs, down + inputs * outputs, outputs)
            down += outputs * (inputs + (self.site(name).bias is not None))
        self.full_width = down
        self.half = up = down + self.rank * sum(i for i, _ in sizes.values())
        self.width = self.half + self.rank * sum(o for _, o in sizes.values())
        for name, (inputs, outputs) in sizes.items():
            self._places[name] = (down, inputs, up, outputs)
            down, up = down + self.rank * inputs, up + self.rank * outputs

    def views(self, flat: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A [K, R, I] and B [K, O, R] of a module, as views of `flat` [K, P]; of a full one W [K, O, I] and c [K, O, 1]."""
        down, inputs, up, outputs = self._places[name]
        full = name in self.full
        high, wide = (outputs, int(self.sites[name].bias is not None)) if full else (self.rank, self.rank)
        a = flat[:, down : down + high * inputs].view(-1, high, inputs)
        return a, flat[:, up : up + outputs * wide].view(-1, outputs, wide)

    def _bind(self, work: torch.Tensor, grads: Sequence[torch.Tensor]) -> None:
        """Let the modules use `work` [K', P]; with `grads` to train, the lanes' gradients adding up there."""
        lanes = self._training_lanes(len(grads)) if grads else [(slice(None), self.rank, None)] * self.lanes
        for path, site in self.sites.items():
            site.parts = []
            if path in self._places and len(work):
                for lane, (span, rank, limits) in enumerate(lanes):
                    own = self._narrow(grads[min(lane, len(grads) - 1)], path, span, rank) if grads else None
                    site.parts.append(Part(*self._narrow(work, path, span, rank), own, limits))

    def _training_lanes(self, grads: int) -> list[tuple[slice, int, torch.Tensor | None]]:
        """Of each lane: its slots, the widest rank among them, and the dropout thresholds of those that drop."""
        found = []
        for span in self.spans if len(self.spans) > 1 else self.spans * grads:
            specs = self.specs[span]
            shares = [s.dropout for s in specs if s.dropout > 0]
            limits = drop_limits(shares, self.device) if shares else None
            found.append((span, max((s.r for s in specs), default=0), limits))
        return found

    def _narrow(self, flat: torch.Tensor, path: str, span: slice, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`views` of the slots in `span`, no wider than `rank`."""
        a, b = self.views(flat, path)
        return (a[span], b[span]) if path in self.full else (a[span, :rank], b[span, :, :rank])

    # --- a step -------------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Begin a step: copy the parameters into what the modules compute with."""
        self._fill(self._work, self.value, self.train_scale)
        self._collected = False

    def _fill(self, work: torch.Tensor, value: torch.Tensor, scale: torch.Tensor) -> None:
        work[:, : self.half] = value[:, : self.half]
        torch.mul(value[:, self.half :], scale, out=work[:, self.half :])

    def collect(self, lanes: int = 1) -> None:
        """Take what the backward of `lanes` pieces left into `grads` [K, P], the gradients of the parameters; where lanes
        have added up apart, always in their order."""
        for work in self._work_grads[:lanes]:
            downs, ups = work[:, : self.half], work[:, self.half :]
            if self._collected:
                self.grads[:, : self.half] += downs
                self.grads[:, self.half :].addcmul_(ups.to(self.dtype), self.train_scale)
            else:
                self.grads[:, : self.half] = downs
                torch.mul(ups, self.train_scale, out=self.grads[:, self.half :])
            self._collected = True
            work.zero_()

    def discard(self) -> None:
        """Forget the gradients of a piece that did not come to its end."""
        for work in self._work_grads:
            work.zero_()

    def hold_full(self, slots: Sequence[int]) -> torch.Tensor:
        """Before an update: slots whose trials leave those linears as they are get no gradient there; what they hold."""
        if not slots:
            return self.value[:0]
        self.grads[slots, : self.full_width] = 0.0
        return self.value[slots, : self.full_width].clone()

    def put_full(self, slots: Sequence[int], kept: torch.Tensor) -> None:
        """After the update, which decays weights too: put back what `hold_full` gave."""
        if slots:
            self.value[slots, : self.full_width] = kept

    @contextmanager
    def applying(self, slots: Sequence[int]) -> Iterator[None]:
        """For the block: the modules apply slots `slots` alone, without gradients; then everything is as it was."""
        chosen = torch.tensor(list(slots), device=self.device, dtype=torch.long)
        work = torch.empty(len(chosen), self.value.shape[1], device=self.device, dtype=self.compute_dtype)
        if len(chosen):
            self._fill(work, self.value[chosen], self.scale[chosen])
        try:
            self._bind(work, ())
            with torch.no_grad():
                yield
        finally:
            self._bind(self._work, self._work_grads)

    # --- out ----------------------------------------------------------------------------------------------------------

    def cut(self, k: int, kind: str, names: Sequence[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Slot k's own part of `kind`, at its own rank: copies A [r, I] and B [O, r] by module path."""
        flat, r = getattr(self, kind), self.specs[k].r
        found = {}
        for name in names:
            a, b = self.views(flat, name)
            own = slice(None) if name in self.full else slice(r)
            found[name] = (a[k, own].clone(), b[k, :, own].clone())
        return found
