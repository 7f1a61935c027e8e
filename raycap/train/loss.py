"""The loss of a pack, in one place for all families.

Shapes: K slots, b rows a slot, M labelled positions of all rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def slot_loss(
    logits: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor, rows_per_slot: int
) -> torch.Tensor:
    """Per slot: summed cross-entropy of its labelled tokens / `tokens` [K] of its whole effective batch.

    logits [M, V] predict labels [M] of rows [M], where slot k owns rows k*b .. (k+1)*b - 1. Returns [K]. Dividing by the
    tokens of the whole batch makes accumulated pieces sum to what one large batch gives.
    """
    losses = F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), labels, reduction="none")
    sums = torch.zeros(len(tokens), dtype=losses.dtype, device=losses.device)
    return sums.index_add(0, rows // rows_per_slot, losses) / tokens
