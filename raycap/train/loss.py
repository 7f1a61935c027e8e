"""The loss of a pack, in one place for all families.

Shapes: K slots, b rows a slot, T positions, V vocabulary.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def slot_loss(logits: torch.Tensor, labels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Per slot: summed cross-entropy of its labelled tokens / `tokens` [K] of its whole effective batch.

    logits [K*b, T, V] predict labels [K*b, T] (already shifted; -100 is left out). Returns [K].
    """
    slots = tokens.shape[0]
    flat = labels.flatten()
    losses = F.cross_entropy(logits.flatten(0, 1).float(), flat, reduction="none", ignore_index=-100)
    return losses.view(slots, -1).sum(1) / tokens
