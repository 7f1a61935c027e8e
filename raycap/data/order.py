"""Which samples an optimiser step sees: a function of (seed, step) alone, so that trials compare in pairs.

Shapes: N samples, I images.
"""

from __future__ import annotations

import numpy as np

from raycap.errors import DataError


def samples(captions_per_image: np.ndarray, captions: str) -> np.ndarray:
    """Samples [N, 2] as (image row, caption index): each caption one sample (`all`), or an image's first (`first`).

    `captions_per_image` is [I]; the samples come in row order.
    """
    counts = np.asarray(captions_per_image, dtype=np.int64)
    if captions == "first":
        counts = np.minimum(counts, 1)
    elif captions != "all":
        raise DataError(f"data.captions={captions} is not a choice of samples; expected all or first")
    rows = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    return np.stack([rows, np.arange(len(rows), dtype=np.int64) - starts], axis=1)


class SampleOrder:
    """Seeded permutations of `count` samples, one an epoch, joined end to end and cut into batches."""

    def __init__(self, count: int, batch: int, seed: int):
        if count < 1 or batch < 1:
            raise DataError(f"an order over {count} samples in batches of {batch} is empty; both must be at least 1")
        self.count = count
        self.batch = batch
        self.seed = seed
        self._epochs: dict[int, np.ndarray] = {}

    def rows(self, step: int) -> np.ndarray:
        """Indices [batch] of the samples of optimiser step `step`, counted from 0."""
        positions = np.arange(step * self.batch, (step + 1) * self.batch)
        epochs = positions // self.count
        return np.concatenate(
            [self.permutation(int(e))[positions[epochs == e] % self.count] for e in np.unique(epochs)]
        )

    def permutation(self, epoch: int) -> np.ndarray:
        """All `count` indices in the order of that epoch."""
        if epoch not in self._epochs:
            if len(self._epochs) > 2:  # a step needs two neighbours at most
                self._epochs.clear()
            self._epochs[epoch] = seeded_permutation(self.count, self.seed, epoch)
        return self._epochs[epoch]


def seeded_permutation(count: int, *key: int) -> np.ndarray:
    """Permutation [count] that is a pure function of `key`.

    Sorted hashes and not numpy's generator: numpy does not promise its streams across versions, and a run may be
    resumed under another one.
    """
    state = np.uint64(0x9E3779B97F4A7C15)
    for part in key:
        state = _splitmix64(np.array([state ^ np.uint64(part % 2**64)], dtype=np.uint64))[0]
    hashes = _splitmix64(np.arange(count, dtype=np.uint64) ^ state)
    return np.argsort(hashes, kind="stable").astype(np.int64)


def _splitmix64(values: np.ndarray) -> np.ndarray:
    """The finaliser of Steele et al. 2014: a bijection of 64 bits, so that no two indices tie."""
    with np.errstate(over="ignore"):
        z = values + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
