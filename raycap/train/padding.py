"""How much of what the model computes is padding, with texts of like length side by side and as they are drawn.

Shapes: b samples of a slot's batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from raycap.data.store import Store


def longest_captions(store: Store, rows: np.ndarray) -> np.ndarray:
    """Tokens [b] of each image's longest caption."""
    counts = store.captions_per_image[rows]
    first = np.cumsum(counts) - counts
    captions = np.arange(counts.sum()) - np.repeat(first, counts)
    lengths = store.token_lens(np.stack([np.repeat(rows, counts), captions], axis=1))
    return np.maximum.reduceat(lengths, first)


class Padding:
    """Counts text positions: those with a token, and those computed."""

    def __init__(self) -> None:
        self.tokens = self.computed = self.computed_as_drawn = 0

    def add(
        self,
        store: Store,
        drawn: Sequence[np.ndarray],
        bucketed: Sequence[np.ndarray],
        cuts: Sequence[Sequence[tuple[int, int]]],
    ) -> None:
        """Take in one step: samples [b, 2] of every slot in both orders, and where the batch is cut into pieces."""
        for pairs, name in ((drawn, "computed_as_drawn"), (bucketed, "computed")):
            lengths = np.stack([store.token_lens(p) for p in pairs])
            widths = [(end - begin) * int(lengths[:, begin:end].max()) for part in cuts for begin, end in part]
            setattr(self, name, getattr(self, name) + sum(widths) * len(pairs))
        self.tokens += int(lengths.sum())

    @property
    def share(self) -> float:
        """Of the computed text positions, those that are padding."""
        return 1 - self.tokens / self.computed if self.computed else 0.0

    @property
    def share_as_drawn(self) -> float:
        """What it would be without buckets."""
        return 1 - self.tokens / self.computed_as_drawn if self.computed_as_drawn else 0.0

    def line(self) -> str:
        return f"padding: {self.share:.1%} of the text positions, {self.share_as_drawn:.1%} without buckets by length"
