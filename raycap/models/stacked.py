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

from raycap.models.dropout import Keys, drop_limits, kept_share, put_on
from raycap.models.quantise import dequantise
from raycap.trial import TrialSpec

Weights = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""Module path -> (A [r, I], B [O, r])."""
KINDS = ("value", "m", "v")
"""A slot's parameters, and AdamW's two moments of them."""


class _AddLora(torch.autograd.Function):
    """y += (x A^T) B^T, slot by slot and in place, with the products of both directions written out.

    y [K*b, ..., O], x [K*b, ..., I]; A, B and where their gradients add up are `site`'s. `mask` [d, n, I] drops parts
    of x for the first d slots. `anchor` requires a gradient, so that backward comes here where neither x nor y does.
    """

    @staticmethod
    def forward(ctx, y, x, anchor, site, mask):
        A, B = site.A, site.B
        slots = A.shape[0]
        rows, out = x.reshape(slots, -1, x.shape[-1]), y.view(slots, -1, y.shape[-1])
        dropped = None if mask is None else put_on(rows[: len(mask)], mask)
        narrow = torch.empty(*rows.shape[:2], A.shape[1], dtype=A.dtype, device=A.device)
        for part, inner in _parts(rows, dropped):
            _product(inner, A[part].mT, narrow[part])
        _add_product(out, narrow, B.mT)
        ctx.mark_dirty(y)
        ctx.site, ctx.lane = site, site.keys.lane
        ctx.save_for_backward(rows, narrow, A, B, mask, dropped)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, narrow, A, B, mask, dropped = ctx.saved_tensors
        g = grad.reshape(A.size(0), -1, grad.shape[-1])
        grad_narrow = _adapter_gradients(ctx, g, rows, narrow, B, dropped)
        grad_x = None
        if ctx.needs_input_grad[1]:
            grad_x = _product(grad_narrow, A, torch.empty_like(rows))
            if mask is not None:
                put_on(grad_x[: len(mask)], mask, in_place=True)
            grad_x = grad_x.view(*grad.shape[:-1], -1)
        return grad, grad_x, None, None, None


class _LoraLinear(torch.autograd.Function):
    """y = x W^T + c + (x A^T) B^T, slot by slot, on the frozen weight W [O, I] that `site` finds in its base.

    As the base linear and _AddLora, without the sum of two gradients of x: a tenth of a small model's step on a CPU.
    """

    @staticmethod
    def forward(ctx, x, anchor, site, weight, bias, mask):
        A, B = site.A, site.B
        slots = A.shape[0]
        rows = x.reshape(slots, -1, x.shape[-1])
        y = torch.nn.functional.linear(rows, weight, bias)
        dropped = None if mask is None else put_on(rows[: len(mask)], mask)
        narrow = torch.empty(*rows.shape[:2], A.shape[1], dtype=A.dtype, device=A.device)
        for part, inner in _parts(rows, dropped):
            _product(inner, A[part].mT, narrow[part])
        _add_product(y, narrow, B.mT)
        ctx.site, ctx.lane = site, site.keys.lane
        # A weight that was unpacked for this is unpacked again: keeping it would take the memory that packing saves.
        ctx.save_for_backward(rows, narrow, A, B, None if site.packed else weight, mask, dropped)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, narrow, A, B, weight, mask, dropped = ctx.saved_tensors
        g = grad.reshape(A.size(0), -1, grad.shape[-1])
        grad_narrow = _adapter_gradients(ctx, g, rows, narrow, B, dropped)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.matmul(g, ctx.site.frozen_weight() if weight is None else weight)
            drops = 0 if mask is None else mask.size(0)
            if drops:
                through = _product(grad_narrow[:drops], A[:drops], torch.empty_like(rows[:drops]))
                grad_x[:drops] += put_on(through, mask, in_place=True)
            if drops < A.size(0):
                _add_product(grad_x[drops:], grad_narrow[drops:], A[drops:])
            grad_x = grad_x.view(*grad.shape[:-1], -1)
        return grad_x, None, None, None, None, None


def _adapter_gradients(ctx, g, rows, narrow, B, dropped) -> torch.Tensor:
    """Add A's and B's gradients up where they are collected; that of `narrow` [K, n, R]."""
    grad_A, grad_B = ctx.site.grads[ctx.lane]
    _add_product(grad_B, g.mT, narrow)
    grad_narrow = _product(g, B, torch.empty_like(narrow))
    for part, inner in _parts(rows, dropped):
        _add_product(grad_A[part], grad_narrow[part].mT, inner)
    return grad_narrow


def _parts(rows: torch.Tensor, dropped: torch.Tensor | None) -> list[tuple[slice, torch.Tensor]]:
    """The slots with dropout and those without, each with what their A is applied to."""
    if dropped is None:
        return [(slice(None), rows)]
    d = len(dropped)
    return [(slice(0, d), dropped)] + ([(slice(d, None), rows[d:])] if d < len(rows) else [])


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Batched product into `out`; a batch of one is a plain one, which is faster."""
    if a.size(0) == 1:
        torch.mm(a[0], b[0], out=out[0])
    else:
        torch.bmm(a, b, out=out)
    return out


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    if a.size(0) == 1:
        total[0].addmm_(a[0], b[0])
    else:
        total.baddbmm_(a, b)


class StackedLora(nn.Module):
    """A base linear and the slots' adapters on it. Without adapters bound it is the base linear."""

    def __init__(self, base: nn.Module, name: str, keys: Keys):
        super().__init__()
        self.base, self.name, self.keys = base, name, keys
        self.packed = hasattr(base.weight, "quant_state") and not hasattr(base, "dense")
        """Whether the base's weight is in 4 bits, and not kept dense beside them."""
        self.anchor = torch.zeros((), requires_grad=True)
        self.A: torch.Tensor | None = None
        """[K, R, I]; B is [K, O, R] and holds alpha / r too. Views of the stacks, as are the gradients."""
        self.B: torch.Tensor | None = None
        self.grads: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Those of A and B, for each lane."""
        self.limits: torch.Tensor | None = None
        """Dropout thresholds [d] of the slots that drop, which come first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.A is None:
            return self.base(x)
        mask = None
        if self.limits is not None and self.training and self.keys.on:
            mask = self.keys.mask(f"lora:{self.name}", x.shape, self.limits)
        kind = self.A.dtype
        weight = self.frozen_weight()
        if weight is not None:
            bias = None if self.base.bias is None else self.base.bias.to(kind)
            return _LoraLinear.apply(x.to(kind), self.anchor, self, weight, bias, mask).to(x.dtype)
        y = self.base(x)
        return _AddLora.apply(y.to(kind), x.to(kind), self.anchor, self, mask).to(y.dtype)

    def frozen_weight(self) -> torch.Tensor | None:
        """What the base multiplies with [O, I], where that is all it does and in the adapters' dtype; else None."""
        if self.packed:
            weight = dequantise(self.base)
        else:
            weight = self.base.weight if type(self.base) is nn.Linear else getattr(self.base, "dense", None)
        return None if weight is None or weight.dtype != self.A.dtype or weight.requires_grad else weight

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


class _FullLinear(torch.autograd.Function):
    """y [K*b, ..., O] = x W^T + c with each slot's own W [K, O, I] and c [K, O, 1] (or [K, O, 0] for none)."""

    @staticmethod
    def forward(ctx, x, anchor, site, lane):
        W, c = site.A, site.B
        rows = x.reshape(len(W), -1, x.shape[-1])
        y = torch.bmm(rows, W.mT)
        if c.shape[2]:
            y += c.mT
        ctx.site, ctx.lane, ctx.shape = site, lane, x.shape
        ctx.save_for_backward(rows, W)
        return y.view(*x.shape[:-1], W.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, W = ctx.saved_tensors
        g = grad.reshape(len(W), -1, grad.shape[-1])
        grad_W, grad_c = ctx.site.grads[ctx.lane]
        _add_product(grad_W, g.mT, rows)
        if grad_c.shape[2]:
            grad_c += g.sum(1)[:, :, None]
        grad_x = torch.bmm(g, W).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None


class StackedFull(StackedLora):
    """A base linear that each slot has a copy of its own of: A is its weight [K, O, I], B its bias [K, O, 1]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.A is None:
            return self.base(x)
        return _FullLinear.apply(x.to(self.A.dtype), self.anchor, self, self.keys.lane).to(x.dtype)


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
        self.value = self.m = self.v = self.grads = self._work = empty
        self._work_grads: list[torch.Tensor] = []
        """Where backward adds up, a tensor [K, P] a lane."""

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
        self._work_grads = [torch.zeros_like(self._work) for _ in range(self.lanes)]
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
        """Let the modules use `work` [K', P]; with `grads` to train, each lane's gradients adding up in one of them."""
        dropping = [s.dropout for s in self.specs if s.dropout > 0]
        limits = drop_limits(dropping, self.device) if dropping and grads else None
        for path, site in self.sites.items():
            site.A = site.B = None
            site.grads = []
            site.limits = limits
            if path in self._places and len(work):
                site.A, site.B = self.views(work, path)
                site.grads = [self.views(lane, path) for lane in grads]

    # --- a step -------------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Begin a step: copy the parameters into what the modules compute with."""
        self._fill(self._work, self.value, self.train_scale)
        self._collected = False

    def _fill(self, work: torch.Tensor, value: torch.Tensor, scale: torch.Tensor) -> None:
        work[:, : self.half] = value[:, : self.half]
        torch.mul(value[:, self.half :], scale, out=work[:, self.half :])

    def collect(self, lanes: int = 1) -> None:
        """Take what the backward of a piece left in the first `lanes` lanes into `grads` [K, P], the gradients of the
        parameters; always in the lanes' order."""
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
