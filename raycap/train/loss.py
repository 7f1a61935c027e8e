"""The loss of a pack, in one place for all families.

Shapes: K slots, B = K*b rows, slot-major, M positions with a label, V vocabulary.
"""

from __future__ import annotations

import torch

BLOCK = 1 << 18
"""Logits worked on at a time on a CPU: they stay in its cache. On a GPU, where kernels cost their launch, more."""


@torch.no_grad()
def slot_losses(
    logits: torch.Tensor,
    labels: torch.Tensor,
    rows: torch.Tensor,
    rows_per_slot: int,
    tokens: torch.Tensor,
    *,
    gradient: bool = False,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Per slot [K]: summed cross-entropy of its labelled tokens in this piece / `tokens` [K] of its whole batch.

    logits [M, V] belong to labels [M] of `rows` [M], ascending. Pieces of an effective batch add up to the loss of the
    whole. With `gradient`, logits are overwritten by the gradient of the slots' sum, each slot's part times its
    `scales` [K]: the slots share no trainable weight, so their gradients do not mix. Block by block and in place,
    because with a vocabulary of 250,000 each copy of the logits in fp32 is gigabytes.
    """
    slot = rows // rows_per_slot
    weights = 1 / tokens if scales is None else scales / tokens
    kind = torch.float32 if logits.dtype in (torch.float16, torch.bfloat16) else logits.dtype
    losses = torch.empty(len(labels), device=logits.device, dtype=kind)
    block = max(1, (BLOCK if logits.device.type == "cpu" else BLOCK * 64) // logits.shape[1])
    for begin in range(0, len(labels), block):
        part, label = logits[begin : begin + block], labels[begin : begin + block, None]
        shares = torch.log_softmax(part.to(kind), dim=-1)
        losses[begin : begin + block] = -shares.gather(1, label)[:, 0]
        if gradient:
            shares.exp_().scatter_add_(1, label, torch.full_like(label, -1, dtype=kind))
            part.copy_(shares.mul_(weights[slot[begin : begin + block], None]))
    lengths = torch.bincount(slot, minlength=len(tokens))
    # Segments, not index_add: on a GPU that one adds in no fixed order.
    return torch.segment_reduce(losses, "sum", lengths=lengths, initial=0) / tokens
