"""A linear and many adapters on it as one operation, forward and backward written out.

Shapes: K slots, R the widest rank among them, I inputs, O outputs of a linear, n rows x positions of a slot, b rows of a
slot. `part` (raycap.models.stacked) has A, B and where their gradients add up; `site` is the module that applies it.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from raycap.models.dropout import put_on


class AddLora(torch.autograd.Function):
    """y += (x A^T) B^T, slot by slot and in place, with the products of both directions written out.

    y [K*b, ..., O], x [K*b, ..., I]; A, B and where their gradients add up are `part`'s. `mask` [d, n, I] drops parts
    of x for the first d slots. `anchor` requires a gradient, so that backward comes here where neither x nor y does.
    """

    @staticmethod
    def forward(ctx, y, x, anchor, part, mask):
        A, B = part.A, part.B
        slots = A.shape[0]
        rows, out = x.reshape(slots, -1, x.shape[-1]), y.view(slots, -1, y.shape[-1])
        dropped = None if mask is None else put_on(rows[: len(mask)], mask)
        narrow = torch.empty(*rows.shape[:2], A.shape[1], dtype=A.dtype, device=A.device)
        for some, inner in _halves(rows, dropped):
            _product(inner, A[some].mT, narrow[some])
        _add_product(out, narrow, B.mT)
        ctx.mark_dirty(y)
        ctx.part = part
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


class LoraLinear(torch.autograd.Function):
    """y = x W^T + c + (x A^T) B^T, slot by slot, on the frozen weight W [O, I] that `site` finds in its base.

    As the base linear and AddLora, without the sum of two gradients of x: a tenth of a small model's step on a CPU.
    """

    @staticmethod
    def forward(ctx, x, anchor, site, part, weight, bias, mask):
        A, B = part.A, part.B
        slots = A.shape[0]
        rows = x.reshape(slots, -1, x.shape[-1])
        y = torch.nn.functional.linear(rows, weight, bias)
        dropped = None if mask is None else put_on(rows[: len(mask)], mask)
        narrow = torch.empty(*rows.shape[:2], A.shape[1], dtype=A.dtype, device=A.device)
        for some, inner in _halves(rows, dropped):
            _product(inner, A[some].mT, narrow[some])
        _add_product(y, narrow, B.mT)
        ctx.site, ctx.part = site, part
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
        return grad_x, None, None, None, None, None, None


def _adapter_gradients(ctx, g, rows, narrow, B, dropped) -> torch.Tensor:
    """Add A's and B's gradients up where they are collected; that of `narrow` [K, n, R]."""
    grad_A, grad_B = ctx.part.grads
    _add_product(grad_B, g.mT, narrow)
    grad_narrow = _product(g, B, torch.empty_like(narrow))
    for some, inner in _halves(rows, dropped):
        _add_product(grad_A[some], grad_narrow[some].mT, inner)
    return grad_narrow


def _halves(rows: torch.Tensor, dropped: torch.Tensor | None) -> list[tuple[slice, torch.Tensor]]:
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


class FullLinear(torch.autograd.Function):
    """y [K*b, ..., O] = x W^T + c with each slot's own W [K, O, I] and c [K, O, 1] (or [K, O, 0] for none)."""

    @staticmethod
    def forward(ctx, x, anchor, part):
        W, c = part.A, part.B
        rows = x.reshape(len(W), -1, x.shape[-1])
        y = torch.bmm(rows, W.mT)
        if c.shape[2]:
            y += c.mT
        ctx.part, ctx.shape = part, x.shape
        ctx.save_for_backward(rows, W)
        return y.view(*x.shape[:-1], W.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, W = ctx.saved_tensors
        g = grad.reshape(len(W), -1, grad.shape[-1])
        grad_W, grad_c = ctx.part.grads
        _add_product(grad_W, g.mT, rows)
        if grad_c.shape[2]:
            grad_c += g.sum(1)[:, :, None]
        grad_x = torch.bmm(g, W).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return grad_x, None, None
