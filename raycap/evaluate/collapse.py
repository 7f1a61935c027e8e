"""Signs that a model says the same thing whatever it sees."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

DISTINCT_SHARE = 0.05
TOP_SHARE = 0.5
EMPTY_SHARE = 0.2
REPETITION_SHARE = 0.5
LENGTH_RATIO = 3.0
"""Limits beyond which captions count as collapsed; ordinary models stay far from each of them."""


def collapse(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Shares that tell a collapsed model, and whether any of them is beyond its limit.

    distinct_share: different captions / captions. top_caption, top_share: the most frequent one. empty_share.
    repetition_share: mean share of a caption's bigrams that it has said before. length_ratio: mean words of the
    captions / mean words of the references.
    """
    total = max(1, len(captions))
    counts = Counter(captions)
    top, times = counts.most_common(1)[0] if counts else ("", 0)
    words = [caption.split() for caption in captions]
    lengths = [len(text.split()) for texts in references for text in texts]
    mean = sum(map(len, words)) / total
    found = {
        "distinct_share": len(counts) / total,
        "top_caption": top,
        "top_share": times / total,
        "empty_share": sum(not w for w in words) / total,
        "repetition_share": sum(map(_repetition, words)) / total,
        "length_ratio": mean / (sum(lengths) / max(1, len(lengths))) if sum(lengths) else 0.0,
    }
    few = len(captions) < 20  # of a handful, half may well be alike
    found["collapsed"] = bool(
        found["empty_share"] > EMPTY_SHARE
        or found["repetition_share"] > REPETITION_SHARE
        or found["length_ratio"] > LENGTH_RATIO
        or (not few and (found["top_share"] > TOP_SHARE or found["distinct_share"] < DISTINCT_SHARE))
    )
    return found


def _repetition(words: list[str]) -> float:
    pairs = list(itertools.pairwise(words))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0
