"""Which samples an optimiser step sees: a function of (seed, step) alone, so that trials compare in pairs.

Shapes: N samples, I images, S captions over all images, b samples of a step.
"""

from __future__ import annotations

import numpy as np

from raycap.errors import DataError

CHOICES = ("all", "first", "random-per-epoch", "best-clipscore", "weighted-clipscore")
"""data.captions: every caption a sample of its own, or one caption an image by one of four rules."""
SCORED = ("best-clipscore", "weighted-clipscore")
"""Choices that need the CLIPScores that `prepare` stores."""
_CHOICE_KEY, _GROUP_KEY = 0xCA9710, 0x96209  # apart from the keys of the permutations


def samples(captions_per_image: np.ndarray, captions: str) -> np.ndarray:
    """Samples [N, 2] as (image row, caption index): each caption one sample (`all`), or an image's first (`first`).

    `captions_per_image` is [I]; the samples come in row order.
    """
    counts = np.asarray(captions_per_image, dtype=np.int64)
    if captions == "first":
        counts = np.minimum(counts, 1)
    elif captions != "all":
        raise DataError(f"data.captions={captions} is no fixed set of samples, as all and first are; see Sampler")
    rows = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    return np.stack([rows, np.arange(len(rows), dtype=np.int64) - starts], axis=1)


class Sampler:
    """The samples of each step under one choice of captions.

    With `all` an epoch has every caption once; with any other choice every image once, so that trials of different
    choices at the same step see the same images. Which caption stands for an image depends on (seed, epoch, image)
    alone: not on the batch, the pack or a restart.

    `captions_per_image` is [I]; `clip_scores` [S] and `selected` [I] (the index of each image's best caption) are
    those of the shards. With `row_groups` [I] the order is that of a set read in windows (WindowOrder).

    Raises:
        DataError: a choice by CLIPScore, and the shards hold no scores.
    """

    def __init__(
        self,
        captions_per_image: np.ndarray,
        choice: str,
        batch: int,
        seed: int,
        *,
        clip_scores: np.ndarray | None = None,
        selected: np.ndarray | None = None,
        row_groups: np.ndarray | None = None,
        window_groups: int = 0,
    ):
        if choice not in CHOICES:
            raise DataError(f"data.captions={choice} is unknown; expected one of {', '.join(CHOICES)}")
        if choice in SCORED and (clip_scores is None or selected is None):
            raise DataError(
                f"data.captions={choice} needs CLIPScores, and these shards hold none: prepare the source again with "
                f"data.captions={choice}"
            )
        self.choice, self.seed = choice, seed
        self.counts = np.asarray(captions_per_image, dtype=np.int64)
        self._samples = samples(self.counts, "all" if choice == "all" else "first")
        if row_groups is None:
            self.order = SampleOrder(len(self._samples), batch, seed)
        else:
            self.order = WindowOrder(row_groups[self._samples[:, 0]], batch, seed, window_groups)
        self._selected = selected
        self._first = np.cumsum(self.counts) - self.counts
        self._clip_scores = clip_scores

    def pairs(self, step: int) -> np.ndarray:
        """Samples [b, 2] as (image row, caption index) of optimiser step `step`, counted from 0."""
        pairs = self._samples[self.order.rows(step)]
        if self.choice in ("all", "first"):
            return pairs
        rows = pairs[:, 0]
        if self.choice == "best-clipscore":
            return np.stack([rows, np.asarray(self._selected, dtype=np.int64)[rows]], axis=1)
        draws = keyed_uniform(rows, self.seed, self.order.epochs(step), _CHOICE_KEY)
        if self.choice == "random-per-epoch":
            return np.stack([rows, (draws * self.counts[rows]).astype(np.int64)], axis=1)
        return np.stack([rows, [self._by_score(r, u) for r, u in zip(rows, draws)]], axis=1)

    def _by_score(self, row: int, draw: float) -> int:
        """A caption with a probability proportional to its CLIPScore; evenly where all are 0."""
        first, count = self._first[row], self.counts[row]
        weights = np.maximum(np.asarray(self._clip_scores[first : first + count], dtype=np.float64), 0)
        if not weights.sum() > 0:
            weights = np.ones(count)
        bounds = np.cumsum(weights)
        return min(int(np.searchsorted(bounds, draw * bounds[-1], side="right")), int(count) - 1)


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

    def epochs(self, step: int) -> np.ndarray:
        """The epoch [batch] that each sample of the step belongs to."""
        return np.arange(step * self.batch, (step + 1) * self.batch) // self.count

    def permutation(self, epoch: int) -> np.ndarray:
        """All `count` indices in the order of that epoch."""
        if epoch not in self._epochs:
            if len(self._epochs) > 2:  # a step needs two neighbours at most
                self._epochs.clear()
            self._epochs[epoch] = seeded_permutation(self.count, self.seed, epoch)
        return self._epochs[epoch]


class WindowOrder(SampleOrder):
    """The order of a set that is read in windows: row groups in a seeded order an epoch, `window` of them shuffled together.

    A function of (seed, step) too, though another one than SampleOrder's. `groups` [N] is the row group of each sample.
    """

    def __init__(self, groups: np.ndarray, batch: int, seed: int, window: int):
        super().__init__(len(groups), batch, seed)
        self.groups, self.window = np.asarray(groups, dtype=np.int64), max(1, window)
        self._ranks: dict[int, np.ndarray] = {}

    def permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            if len(self._epochs) > 2:
                self._epochs.clear()
                self._ranks.clear()
            count = int(self.groups.max()) + 1
            ranks = np.empty(count, dtype=np.int64)
            ranks[seeded_permutation(count, self.seed, epoch, _GROUP_KEY)] = np.arange(count)
            shuffled = seeded_permutation(self.count, self.seed, epoch)
            windows = ranks[self.groups[shuffled]] // self.window
            self._epochs[epoch], self._ranks[epoch] = shuffled[np.argsort(windows, kind="stable")], ranks
        return self._epochs[epoch]

    def ahead(self, step: int) -> list[int]:
        """The row groups of the window that the step begins in, then those of the next one."""
        position = step * self.batch
        epoch, place = position // self.count, position % self.count
        now = self._ranks_of(epoch)[self.groups[self.permutation(epoch)[place]]] // self.window
        last = int(self._ranks_of(epoch).max()) // self.window
        following = (epoch, now + 1) if now < last else (epoch + 1, 0)
        return [g for e, w in ((epoch, now), following) for g in np.flatnonzero(self._ranks_of(e) // self.window == w)]

    def _ranks_of(self, epoch: int) -> np.ndarray:
        self.permutation(epoch)
        return self._ranks[epoch]


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


def keyed_uniform(indices: np.ndarray, *key: int | np.ndarray) -> np.ndarray:
    """Numbers in [0, 1), float64 [n], each a pure function of its index and of `key` (numbers, or one [n] each)."""
    state = _splitmix64(np.asarray(indices, dtype=np.int64).astype(np.uint64))
    for part in key:
        part = np.uint64(part % 2**64) if isinstance(part, int) else np.asarray(part).astype(np.uint64)
        state = _splitmix64(state ^ part)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _splitmix64(values: np.ndarray) -> np.ndarray:
    """The finaliser of Steele et al. 2014: a bijection of 64 bits, so that no two indices tie."""
    with np.errstate(over="ignore"):
        z = values + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
