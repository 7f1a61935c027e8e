"""The loss of a pack, in one place for all families.

Shapes: K slots, B = K*b rows, slot-major, M positions with a label, V vocabulary.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def slot_losses(
    logits: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor, rows_per_slot: int, tokens: torch.Tensor
) -> torch.Tensor:
    """Per slot: summed cross-entropy of its labelled tokens in this piece / `tokens` [K] of its whole effective batch.

    logits [M, V] belong to labels [M] of `rows` [M], ascending. Pieces of an effective batch add up to the loss of the
    whole. The slots share no trainable weight, so backward from the sum of the result [K] mixes no gradients.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    losses = F.cross_entropy(logits, labels, reduction="none")
    slots = len(tokens)
    lengths = torch.bincount(rows // rows_per_slot, minlength=slots)
    # Segments, not index_add: on a GPU that one adds in no fixed order.
    return torch.segment_reduce(losses, "sum", lengths=lengths, initial=0) / tokens
