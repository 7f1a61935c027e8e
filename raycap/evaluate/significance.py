"""Whether a difference is more than chance: paired bootstrap over groups (Koehn 2004; Efron & Tibshirani 1993)."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from raycap.errors import UsageError

BLOCK_ELEMENTS = 4_000_000
"""Counts drawn and held at once."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """b against a on the same images; the difference is mean(b) - mean(a)."""

    difference: float
    low: float
    high: float
    """95 % percentile interval."""
    p: float
    """Two-sided, (1 + resamples on the other side of zero, doubled) / (resamples + 1)."""
    images: int
    groups: int
    resamples: int
    sentence: str


def paired_bootstrap(
    a: np.ndarray,
    b: np.ndarray,
    groups: Sequence[Hashable] | None = None,
    resamples: int = 10_000,
    seed: int = 0,
    *,
    names: tuple[str, str] = ("A", "B"),
    metric: str = "CIDEr",
) -> Verdict:
    """Compare per-image scores `a` and `b` [N] by resampling whole `groups` of images.

    Images of one group (a study, a scene, the same picture twice) are not independent, so they are drawn together. A
    resample's mean is the ratio of its summed differences and its images.

    Raises:
        UsageError: lengths differ, nothing to compare, or a score that is no number.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise UsageError(f"paired scores must be two lists of one length above 0; these have {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise UsageError("paired scores hold a value that is no number")
    sums, sizes = _by_group(b - a, groups)
    difference = float((b - a).mean())
    means = _resampled_means(sums, sizes, resamples, seed)
    low, high = (float(x) for x in np.percentile(means, [2.5, 97.5]))
    beyond = min(int((means <= 0).sum()), int((means >= 0).sum()))
    p = min(1.0, 2 * (1 + beyond) / (resamples + 1))
    sentence = _sentence(difference, low, high, len(a), names, metric)
    return Verdict(difference, low, high, p, len(a), len(sums), resamples, sentence)


def standard_error(per_image: np.ndarray, groups: Sequence[Hashable] | None = None) -> float:
    """Standard error of the mean of scores [N] whose images are drawn by group (linearised ratio estimator)."""
    values = np.asarray(per_image, dtype=np.float64)
    if len(values) < 2:
        return math.nan
    sums, sizes = _by_group(values - values.mean(), groups)
    count = len(sums)
    if count < 2:
        return math.nan
    return float(math.sqrt(count / (count - 1) * float((sums**2).sum())) / sizes.sum())


def _by_group(values: np.ndarray, groups: Sequence[Hashable] | None) -> tuple[np.ndarray, np.ndarray]:
    """Sums [G] and sizes [G] by group; without groups each image is one."""
    if groups is None:
        return values, np.ones(len(values))
    if len(groups) != len(values):
        raise UsageError(f"{len(groups)} groups for {len(values)} images: give one for each")
    order: dict[Hashable, int] = {}
    index = np.array([order.setdefault(g, len(order)) for g in groups])
    return np.bincount(index, weights=values), np.bincount(index).astype(np.float64)


def _resampled_means(sums: np.ndarray, sizes: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng([seed, 0xB007])
    count = len(sums)
    block = max(1, BLOCK_ELEMENTS // count)
    means = np.empty(resamples)
    for begin in range(0, resamples, block):
        size = min(block, resamples - begin)
        drawn = generator.integers(0, count, size=(size, count))
        means[begin : begin + size] = sums[drawn].sum(1) / sizes[drawn].sum(1)
    return means


def _sentence(difference: float, low: float, high: float, images: int, names: tuple[str, str], metric: str) -> str:
    interval = f"{metric} {difference:+.3f} [{low:.3f}, {high:.3f}]"
    if low > 0:
        return f"{names[1]} is better: {interval}"
    if high < 0:
        return f"{names[1]} is worse: {interval}"
    half = (high - low) / 2
    if difference == 0 or half == 0:
        return f"{names[0]} and {names[1]} cannot be told apart: {interval}"
    needed = math.ceil(images * (half / abs(difference)) ** 2)
    return f"{names[0]} and {names[1]} cannot be told apart at this size: {interval}; about {needed:,} images would be needed"
