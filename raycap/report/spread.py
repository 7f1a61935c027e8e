"""Numbers told in a few: least, mean, median, greatest; counts in bins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def spread(values: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """Least, mean, median, 95th percentile, greatest."""
    array = np.asarray(values)
    if not len(array):
        return {"min": None, "mean": None, "median": None, "p95": None, "max": None}
    middle, high = np.percentile(array, [50, 95])
    return {"min": array.min().item(), "mean": float(array.mean()), "median": float(middle), "p95": float(high),
            "max": array.max().item()}  # fmt: skip


def histogram(values: Sequence[float] | np.ndarray, bins: int = 40) -> dict[str, list[float]]:
    """{edges, counts}: a bin for each whole number where there are few enough, else `bins` of equal width."""
    array = np.asarray(values)
    if not len(array):
        return {"edges": [], "counts": []}
    low, high = float(array.min()), float(array.max())
    if array.dtype.kind in "iu":
        width = max(math.ceil((high - low + 1) / bins), 1)
        edges = np.arange(low, high + width + 1, width)
    else:
        edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    counts, edges = np.histogram(array, edges)
    return {"edges": [float(e) for e in edges], "counts": [int(c) for c in counts]}
