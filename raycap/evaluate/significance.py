"""Whether two sets of scores of the same images can be told apart, by resampling the images' groups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raycap.errors import DataError

_BLOCK = 2_000_000  # draws held in memory at once: 16 MB of indices
_NORMAL_95, _NORMAL_80 = 1.959964, 0.841621


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a paired bootstrap says of B against A."""

    difference: float
    """Mean of B minus mean of A."""
    low: float
    high: float
    """95 % percentile interval of the difference."""
    p: float
    """Two-sided, (1 + #) / (resamples + 1); # counts resamples on the other side of zero, twice."""
    images: int
    groups: int
    resamples: int
    sentence: str


def paired_bootstrap(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    groups: Sequence[Any] | np.ndarray | None = None,
    resamples: int = 10000,
    seed: int = 0,
    *,
    names: tuple[str, str] = ("A", "B"),
    metric: str = "CIDEr",
) -> Verdict:
    """Compare per-image scores [N] of A and B; whole groups are drawn, since images of one scene are not independent.

    Raises:
        DataError: lengths that differ, no images, or a score that is not a number.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.shape != b.shape or a.ndim != 1:
        raise DataError(f"a paired comparison needs scores of the same images: {a.shape} against {b.shape}")
    if not len(a):
        raise DataError("a paired comparison needs at least one image")
    bad = int((~np.isfinite(a) | ~np.isfinite(b)).sum())
    if bad:
        raise DataError(f"{bad} of {len(a)} images have a score that is not a number")
    if resamples < 1:
        raise DataError(f"resamples={resamples}: at least 1 is needed, 10000 is usual")
    sums, counts = by_group(b - a, groups)
    difference = float(sums.sum() / counts.sum())
    if len(sums) < 2:
        said = f"{names[0]} and {names[1]} cannot be told apart: all images are of one group"
        return Verdict(difference, -math.inf, math.inf, 1.0, len(a), len(sums), resamples, said)
    drawn = _resample(sums, counts, resamples, np.random.default_rng(seed))
    return verdict_of(drawn, difference, len(a), len(sums), names, metric)


def verdict_of(
    drawn: np.ndarray,
    difference: float,
    images: int,
    groups: int,
    names: tuple[str, str],
    metric: str,
    *,
    symmetric: bool = False,
) -> Verdict:
    """What resampled differences [B] say: their 95 % interval, the p-value, the sentence.

    `symmetric` takes the 95 % point of the distance from `difference`, on both sides: for draws whose tails count.
    """  # fmt: skip
    resamples = len(drawn)
    if symmetric:
        apart = np.abs(drawn - difference)
        half = float(np.quantile(apart, 0.95))
        low, high = difference - half, difference + half
        p = (1 + int((apart >= abs(difference)).sum())) / (resamples + 1)
        error = half / _NORMAL_95
    else:
        low, high = (float(q) for q in np.quantile(drawn, (0.025, 0.975)))
        beyond = 2 * min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
        p, error = min(1.0, (1 + beyond) / (resamples + 1)), float(drawn.std())
    said = _sentence(difference, low, high, error, images, names, metric)
    return Verdict(difference, low, high, p, images, groups, resamples, said)


def standard_error(per_image: Sequence[float] | np.ndarray, groups: Sequence[Any] | np.ndarray | None = None) -> float:
    """Standard error of the mean score; between groups where images come in groups. NaN below two of them."""
    values = np.asarray(per_image, dtype=float)
    if not len(values):
        return math.nan
    sums, counts = by_group(values, groups)
    many = len(sums)
    if many < 2:
        return math.nan
    apart = sums - values.mean() * counts
    return float(math.sqrt(many / (many - 1) * float((apart**2).sum())) / len(values))


def by_group(values: np.ndarray, groups: Sequence[Any] | np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Sum and size of each group."""
    if groups is None:
        return values, np.ones(len(values))
    if len(groups) != len(values):
        raise DataError(f"{len(groups)} groups for {len(values)} images")
    number: dict[Any, int] = {}
    index = np.array([number.setdefault(group, len(number)) for group in groups])
    return np.bincount(index, values), np.bincount(index).astype(float)


def _resample(sums: np.ndarray, counts: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Means over groups drawn with replacement [resamples]."""
    many = len(sums)
    equal = bool((counts == counts[0]).all())
    rows = max(1, _BLOCK // many)
    found = []
    for done in range(0, resamples, rows):
        draw = rng.integers(0, many, size=(min(rows, resamples - done), many), dtype=np.int32)
        total = sums[draw].sum(axis=1)
        found.append(total / (many * counts[0] if equal else counts[draw].sum(axis=1)))
    return np.concatenate(found)


def _sentence(
    difference: float, low: float, high: float, error: float, images: int, names: tuple[str, str], metric: str
) -> str:
    interval = f"{metric} {difference:+.3f} [{low:.3f}, {high:.3f}]"
    if low > 0:
        return f"{names[1]} is better: {interval}"
    if high < 0:
        return f"{names[1]} is worse: {interval}"
    if error == 0:
        return f"{names[0]} and {names[1]} score the same on every image"
    apart = f"{names[0]} and {names[1]} cannot be told apart at this size: {interval}"
    needed = images_needed(difference, error, images)
    if needed is None:
        return f"{apart}; so small a difference would need more than a million images"
    return f"{apart}; about {needed:,} images would be needed"


def images_needed(difference: float, error: float, images: int) -> int | None:
    """Images at which a difference of this size would show in four of five samples; None above a million.

    `error` is the standard error of the difference on `images` images; it falls with their square root.
    """
    if difference == 0:
        return None
    exact = images * ((_NORMAL_95 + _NORMAL_80) * error / difference) ** 2
    if exact > 1e6:
        return None
    digits = max(0, math.floor(math.log10(max(exact, 1))) - 1)
    return max(int(math.ceil(exact / 10**digits) * 10**digits), images + 1)
