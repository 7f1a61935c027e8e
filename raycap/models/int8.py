"""8-bit weights of bitsandbytes, one scale a row, multiplied in the compute dtype.

bitsandbytes' own product (LLM.int8(), Dettmers et al. 2022) rounds activations too, and picks the columns that it does not
round by whatever is in the batch: a caption would depend on what it is computed beside. Here the weight is unpacked for
each product, forward and backward, as NF4's is.
"""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from torch import nn

STEP = 7.874015718698502e-3
"""1 / 127, as bitsandbytes writes it."""


class Int8Linear(bnb.nn.Linear8bitLt):
    """Still a Linear8bitLt to whoever looks (peft, save_pretrained), with its weight untouched."""

    compute_dtype = torch.float32

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        inner = x.to(self.compute_dtype)
        dense = getattr(self, "dense", None)
        if dense is not None:
            return nn.functional.linear(inner, dense, bias).to(x.dtype)
        return _Product.apply(inner, bias, self).to(x.dtype)


class _Product(torch.autograd.Function):
    """x W^T + c on a weight that is unpacked again for backward: keeping it would take the memory that packing saves."""

    @staticmethod
    def forward(ctx, x, bias, module):
        ctx.module = module
        return nn.functional.linear(x, unpacked(module.weight).to(x.dtype), bias)

    @staticmethod
    def backward(ctx, grad):
        if not ctx.needs_input_grad[0]:
            return None, None, None
        return grad @ unpacked(ctx.module.weight).to(grad.dtype), None, None


def unpacked(weight: torch.nn.Parameter) -> torch.Tensor:
    """[O, I] in fp32 of codes int8 [O, I] and the largest number of each row [O]; to the bit what bitsandbytes and peft
    unpack."""
    return (weight.data * weight.SCB.view(-1, 1)).mul_(STEP)
