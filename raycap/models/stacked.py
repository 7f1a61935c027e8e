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

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from raycap.models.dropout import Keys, drop_limits
from raycap.trial import TrialSpec

Weights = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""Module path -> (A [r, I], B [O, r])."""
KINDS = ("value", "m", "v")
"""A slot's parameters, and AdamW's two moments of them."""


class _AddLora(torch.autograd.Function):
    """y += (x A^T) B^T, slot by slot and in place, with the six products written out.

    y [K*b, ..., O], x [K*b, ..., I], A [K, R, I], B [K, O, R]. `keep` masks x for the first slots (bool [d, n, I]) and
    `boost` [d, 1, 1] is their 1 / (1 - p), applied where the tensors are narrow.
    """

    @staticmethod
    def forward(ctx, y, x, A, B, keep, boost):
        slots = A.shape[0]
        inner, out = x.reshape(slots, -1, x.shape[-1]), y.view(slots, -1, y.shape[-1])
        if keep is not None:
            dropped = inner[: len(keep)] * keep
            inner = dropped if len(keep) == slots else torch.cat([dropped, inner[len(keep) :]])
        if slots == 1:  # plain matrix products: no batch to walk over
            narrow = (inner[0] @ A[0].mT)[None]
        else:
            narrow = torch.bmm(inner, A.mT)
        if keep is not None:
            narrow[: len(keep)] *= boost
        if slots == 1:
            out[0].addmm_(narrow[0], B[0].mT)
        else:
            out.baddbmm_(narrow, B.mT)
        ctx.mark_dirty(y)
        ctx.save_for_backward(inner, narrow, A, B, keep, boost)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        inner, narrow, A, B, keep, boost = ctx.saved_tensors
        slots, shape = A.shape[0], grad.shape[:-1]
        g = grad.reshape(slots, -1, grad.shape[-1])
        product = _first_matmul if slots == 1 else torch.bmm
        grad_B = product(g.mT, narrow)
        grad_narrow = product(g, B)
        if keep is not None:
            grad_narrow[: len(keep)] *= boost
        grad_A = product(grad_narrow.mT, inner)
        grad_x = None
        if ctx.needs_input_grad[1]:
            grad_x = product(grad_narrow, A)
            if keep is not None:
                grad_x[: len(keep)] *= keep
            grad_x = grad_x.view(*shape, -1)
        return grad, grad_x, grad_A, grad_B, None, None


def _first_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a[0] @ b[0])[None]


class StackedLora(nn.Module):
    """A base linear and the slots' adapters on it. Without adapters bound it is the base linear."""

    def __init__(self, base: nn.Module, name: str, keys: Keys):
        super().__init__()
        self.base, self.name, self.keys = base, name, keys
        self.A: torch.Tensor | None = None
        self.B: torch.Tensor | None = None
        self.limits: torch.Tensor | None = None
        """Dropout thresholds [K], or None where no slot drops."""
        self.boost: torch.Tensor | None = None
        """[d, 1, 1], 1 / (1 - p) of the d slots that drop, which come first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        if self.A is None:
            return y
        keep = None
        if self.boost is not None and self.training and self.keys.on:
            keep = self.keys.keep(f"lora:{self.name}", x.shape, self.limits, slots=len(self.boost))
            keep = keep.reshape(len(self.boost), -1, x.shape[-1])
        if y.dtype == self.A.dtype:
            return _AddLora.apply(y, x.to(y.dtype), self.A, self.B, keep, self.boost)
        return _AddLora.apply(y.to(self.A.dtype), x.to(self.A.dtype), self.A, self.B, keep, self.boost).to(y.dtype)

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


class Stacks:
    """The parameters and moments of all slots that train, and the modules that use them."""

    def __init__(self, model: nn.Module, keys: Keys, *, compute_dtype: torch.dtype, device: torch.device):
        self.model, self.keys, self.device = model, keys, device
        self.compute_dtype = compute_dtype
        self.dtype = torch.float64 if compute_dtype == torch.float64 else torch.float32
        """Parameters and moments are kept in at least fp32, whatever is computed in."""
        self.sites: dict[str, StackedLora] = {}
        self.specs: list[TrialSpec] = []
        self.rebuilds = 0
        self._clear()

    def _clear(self) -> None:
        empty = torch.zeros(0, 0, device=self.device, dtype=self.dtype)
        self.specs, self.names, self._places, self.rank, self.half = [], [], {}, 0, 0
        self.value = self.m = self.v = self.grads = self._work = self._work_grads = empty

    def site(self, path: str) -> StackedLora:
        """The module at `path`, made able to carry adapters."""
        if path not in self.sites:
            parent, _, leaf = path.rpartition(".")
            owner = self.model.get_submodule(parent)
            self.sites[path] = StackedLora(getattr(owner, leaf), path, self.keys).train(owner.training)
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

    def rebuild(self, specs: Sequence[TrialSpec], slots: Sequence[Mapping[str, Weights]]) -> None:
        """Stack `slots`, each {value, m, v: {path: (A, B)}} at its own rank; slots with dropout must come first."""
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
        self.grads = torch.zeros_like(self.value)
        self._work = torch.zeros_like(self.value, dtype=self.compute_dtype)
        self._work_grads = torch.zeros_like(self._work)
        self.scale = torch.tensor([s.scale for s in specs], device=self.device, dtype=self.dtype)[:, None]
        self._bind(self._work, range(len(specs)), self._work_grads)

    def _place(self) -> None:
        """Where each module's A and B begin in a slot's row."""
        sizes = {n: (self.site(n).in_features, self.site(n).out_features) for n in self.names}
        self.half = self.rank * sum(i for i, _ in sizes.values())
        self.width = self.half + self.rank * sum(o for _, o in sizes.values())
        self._places, down, up = {}, 0, self.half
        for name, (inputs, outputs) in sizes.items():
            self._places[name] = (down, inputs, up, outputs)
            down, up = down + self.rank * inputs, up + self.rank * outputs

    def views(self, flat: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A [K, R, I] and B [K, O, R] of a module, as views of `flat` [K, P]."""
        down, inputs, up, outputs = self._places[name]
        a = flat[:, down : down + self.rank * inputs].view(-1, self.rank, inputs)
        return a, flat[:, up : up + self.rank * outputs].view(-1, outputs, self.rank)

    def _bind(self, work: torch.Tensor, slots: Sequence[int], grads: torch.Tensor | None) -> None:
        """Let the modules use `work` [len(slots), P]; with `grads`, as leaves whose gradients add up there."""
        specs = [self.specs[k] for k in slots]
        dropping = [s.dropout for s in specs if s.dropout > 0]
        limits = drop_limits([s.dropout for s in specs], self.device) if dropping else None
        boost = torch.tensor([1 / (1 - p) for p in dropping], device=self.device, dtype=self.dtype)[:, None, None]
        for path, site in self.sites.items():
            site.A = site.B = site.limits = site.boost = None
            if path not in self._places or not specs:
                continue
            site.A, site.B = (view.detach() for view in self.views(work, path))
            if grads is not None:
                site.A.requires_grad_(), site.B.requires_grad_()
                site.A.grad, site.B.grad = self.views(grads, path)
                site.limits, site.boost = limits, boost if dropping else None

    # --- a step -------------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Copy the parameters into what the modules compute with, B times alpha / r, and begin with zero gradients."""
        self._fill(self._work, self.value, self.scale)
        self.grads.zero_()

    def _fill(self, work: torch.Tensor, values: torch.Tensor, scale: torch.Tensor) -> None:
        work[:, : self.half] = values[:, : self.half]
        torch.mul(values[:, self.half :], scale, out=work[:, self.half :])

    def collect(self) -> None:
        """Add what backward left to `grads` [K, P], the gradients of the parameters."""
        self.grads[:, : self.half] += self._work_grads[:, : self.half]
        # A product in fp32: alpha / r on a gradient in 16 bits would round a second time.
        self.grads[:, self.half :].addcmul_(self._work_grads[:, self.half :].to(self.dtype), self.scale)
        self._work_grads.zero_()

    @contextmanager
    def applying(self, slots: Sequence[int]) -> Iterator[None]:
        """For the block: the modules apply slots `slots` alone, without gradients; then everything is as it was."""
        chosen = torch.tensor(list(slots), device=self.device, dtype=torch.long)
        work = torch.empty(len(chosen), self.value.shape[1], device=self.device, dtype=self.compute_dtype)
        if len(chosen):
            self._fill(work, self.value[chosen], self.scale[chosen])
        try:
            self._bind(work, slots, None)
            with torch.no_grad():
                yield
        finally:
            self._bind(self._work, range(len(self.specs)), self._work_grads)

    # --- out ----------------------------------------------------------------------------------------------------------

    def cut(self, k: int, kind: str, names: Sequence[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Slot k's own part of `kind`, at its own rank: copies A [r, I] and B [O, r] by module path."""
        flat, r = getattr(self, kind), self.specs[k].r
        found = {}
        for name in names:
            a, b = self.views(flat, name)
            found[name] = (a[k, :r].clone(), b[k, :, :r].clone())
        return found
