"""Comparisons beyond one pair of captions: settings over seeds, the best of many trials, corpus BLEU, several tests.

Shapes: S seeds, N images, G groups of images, K trials, B resamples. Every resample draws whole groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raycap.errors import DataError
from raycap.evaluate.overlap import bleu_of, bleu_statistics
from raycap.evaluate.significance import Verdict, by_group, verdict_of

_BLOCK = 2_000_000


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values by Holm's step-down rule (1979): below 0.05 after it, at most 5 % of such families err at all."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, floor = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = floor
    return adjusted


def setting_bootstrap(
    a: Sequence[Sequence[float]] | np.ndarray,
    b: Sequence[Sequence[float]] | np.ndarray,
    groups: Sequence[Any] | np.ndarray | None = None,
    resamples: int = 10000,
    seed: int = 0,
    *,
    names: tuple[str, str] = ("A", "B"),
    metric: str = "CIDEr",
) -> Verdict:
    """Is setting B better than setting A? Scores [S, N] of the same images under each setting's seeds.

    A hierarchical bootstrap: seeds are drawn, then groups of images. Three seeds drawn with replacement spread too
    little, and their spread is itself hardly known, so a resample's deviation by seeds is widened by sqrt(S / (S - 1))
    and divided by a draw of sqrt(chi2 / degrees): what Student's t does for a mean. benchmarks/null_sweep.py measures
    that the verdict keeps its 5 %.

    Raises:
        DataError: fewer than two seeds a setting, other images, a score that is not a number.
    """
    a, b = _matrix(a), _matrix(b)
    if a.shape[1] != b.shape[1]:
        raise DataError(f"settings were scored on different numbers of images: {a.shape[1]} and {b.shape[1]}")
    if min(len(a), len(b)) < 2:
        raise DataError(f"a setting's verdict needs at least 2 seeds each, got {len(a)} and {len(b)}")
    sums_a, counts = _group_matrix(a, groups)
    sums_b, _ = _group_matrix(b, groups)
    rng = np.random.default_rng(seed)
    total = counts.sum()
    difference = float((sums_b.mean(axis=1) - sums_a.mean(axis=1)).sum() / total)
    # Images: the seeds' mean resampled by groups. Seeds: each seed's own mean resampled around the mean of all.
    by_images = np.concatenate(
        [
            weights @ (sums_b.mean(axis=1) - sums_a.mean(axis=1)) / (weights @ counts)
            for weights in _weights(len(counts), resamples, rng)
        ]
    )
    degrees = len(a) + len(b) - 2
    student = np.sqrt(degrees / rng.chisquare(degrees, resamples))
    by_seeds = _seed_part(sums_b.sum(axis=0) / total, resamples, rng)
    by_seeds -= _seed_part(sums_a.sum(axis=0) / total, resamples, rng)
    drawn = by_images + by_seeds * student
    return verdict_of(drawn, difference, a.shape[1], len(counts), names, metric, symmetric=True)


@dataclass(frozen=True, slots=True)
class Separation:
    """Of K trials scored on the same images, which may still be the best."""

    best: str
    together: list[str]
    """Trials that cannot be told apart from the best, by falling score; the best is the first."""
    p: dict[str, float]
    """Per trial, adjusted over all others: small where some other trial is surely better."""


def not_separable(
    scores: Mapping[str, Sequence[float] | np.ndarray],
    groups: Sequence[Any] | np.ndarray | None = None,
    resamples: int = 10000,
    seed: int = 0,
    *,
    level: float = 0.05,
) -> Separation:
    """The trials that may be the best: all but those that another one beats by more than chance allows.

    Multiple comparisons with the best (Hsu 1984) by a max-T bootstrap on shared resamples: trial k leaves when the largest
    of its standardised gaps to the others exceeds the 95 % point of that maximum under no difference. Whichever trial
    is truly best, it stays with 95 % probability, although the best was picked by these very scores.
    """
    names = list(scores)
    if not names:
        raise DataError("there is no trial to compare")
    matrix = _matrix([scores[name] for name in names])
    means = matrix.mean(axis=1)
    best = int(np.argmax(means))
    if len(names) == 1:
        return Separation(names[0], [names[0]], {names[0]: 1.0})
    sums, counts = _group_matrix(matrix, groups)
    rng = np.random.default_rng(seed)
    drawn = np.concatenate(
        [weights @ sums / (weights @ counts)[:, None] for weights in _weights(len(counts), resamples, rng)]
    )  # [B, K]
    drawn -= means
    p = {}
    for k, name in enumerate(names):
        gaps = means - means[k]
        moved = np.delete(drawn - drawn[:, [k]], k, axis=1)
        error = moved.std(axis=0)
        known = error > 1e-12 * max(1.0, float(np.abs(means).max()))
        if not known.any():
            p[name] = 1.0
            continue
        largest = (np.delete(gaps, k)[known] / error[known]).max()
        p[name] = (1 + int(((moved[:, known] / error[known]).max(axis=1) >= largest).sum())) / (resamples + 1)
    order = sorted(range(len(names)), key=lambda k: (-means[k], k))
    together = [names[k] for k in order if k == best or p[names[k]] > level]
    return Separation(names[best], together, p)


def bleu_bootstrap(
    a: Sequence[str],
    b: Sequence[str],
    references: Sequence[Sequence[str]],
    groups: Sequence[Any] | np.ndarray | None = None,
    resamples: int = 10000,
    seed: int = 0,
    *,
    order: int = 4,
    names: tuple[str, str] = ("A", "B"),
) -> Verdict:
    """Corpus BLEU of tokenised captions B against A: each resample's from its own summed counts, not a mean of scores."""
    one, other = bleu_statistics(a, references), bleu_statistics(b, references)
    sums_a, counts = _group_matrix(one.T, groups)
    sums_b, _ = _group_matrix(other.T, groups)
    rng = np.random.default_rng(seed)
    drawn = np.concatenate(
        [
            bleu_of(weights @ sums_b)[:, order - 1] - bleu_of(weights @ sums_a)[:, order - 1]
            for weights in _weights(len(counts), resamples, rng)
        ]
    )
    whole = bleu_of(other.sum(axis=0)[None]) - bleu_of(one.sum(axis=0)[None])
    return verdict_of(drawn, float(whole[0, order - 1]), len(a), len(counts), names, f"BLEU-{order}")


def _matrix(values: Any) -> np.ndarray:
    try:
        found = np.asarray(values, dtype=float)
    except ValueError as error:
        raise DataError("scores of different numbers of images cannot be compared") from error
    if found.ndim != 2 or not found.size:
        raise DataError(f"expected scores of several runs on the same images, got an array of shape {found.shape}")
    bad = int((~np.isfinite(found)).any(axis=0).sum())
    if bad:
        raise DataError(f"{bad} of {found.shape[1]} images have a score that is not a number")
    return found


def _group_matrix(values: np.ndarray, groups: Any) -> tuple[np.ndarray, np.ndarray]:
    """Sums [G, K] and sizes [G] of the groups, of values [K, N]."""
    columns = [by_group(row, groups) for row in values]
    return np.stack([sums for sums, _ in columns], axis=1), columns[0][1]


def _weights(groups: int, resamples: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Blocks [rows, G] of how often each group is drawn in a resample."""
    rows = max(1, _BLOCK // groups)
    for done in range(0, resamples, rows):
        many = min(rows, resamples - done)
        draw = rng.integers(0, groups, size=(many, groups), dtype=np.int32)
        draw += np.arange(many, dtype=np.int32)[:, None] * groups
        yield np.bincount(draw.ravel(), minlength=many * groups).reshape(many, groups).astype(float)


def _seed_part(means: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """How far the mean over seeds lies from what it was, in each resample of the seeds [B]."""
    many = len(means)
    drawn = means[rng.integers(0, many, size=(resamples, many))].mean(axis=1) - means.mean()
    return drawn * math.sqrt(many / (many - 1))
