"""CIDEr-D (Vedantam et al. 2015) with the references' side kept between calls.

The formula, its clipping, its Gaussian length penalty and its factor ten are those of pycocoevalcap's `Cider`, which is
CIDEr-D under the name CIDEr; scores are equal to 1e-12 for the same tokens. References of a validation set do not
change over a sweep, so their n-gram vectors, norms and document frequencies are computed once.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from raycap.errors import UsageError
from raycap.evaluate.ptb import tokenise

N = 4
SIGMA = 6.0
STEADY_IMAGES = 50
"""Below this many images the document frequencies, and with them the scale of the score, are unstable."""

Tokeniser = Callable[[Sequence[str]], list[str]]
"""Captions -> token strings, tokens separated by blanks."""


class CiderScorer:
    """Scores captions against fixed references, over and over."""

    def __init__(self, references: Mapping[str, Sequence[str]], tokeniser: Tokeniser = tokenise):
        """`references` by image id. Document frequencies are taken from all of them, whatever subset is scored."""
        if not references:
            raise UsageError("CIDEr needs the references of at least one image")
        self._tokenise = tokeniser
        flat = tokeniser([text for texts in references.values() for text in texts])
        tokens = iter(flat)
        counted = {image: [_ngrams(next(tokens)) for _ in texts] for image, texts in references.items()}
        frequency: Counter[tuple[str, ...]] = Counter()
        for grams in counted.values():
            frequency.update(set().union(*grams))
        self.images = len(counted)
        self.per_image = sorted({len(texts) for texts in references.values()})
        self.df_sha256 = hashlib.sha256("\n".join(sorted(flat)).encode()).hexdigest()
        self._log_images = math.log(float(self.images))
        self._idf = {gram: self._log_images - math.log(max(1.0, count)) for gram, count in frequency.items()}
        self._vectors = {image: [self._vector(c) for c in grams] for image, grams in counted.items()}
        if self.images < STEADY_IMAGES:
            warnings.warn(
                f"CIDEr's document frequencies come from {self.images} images; below {STEADY_IMAGES} its scale is unstable",
                stacklevel=2,
            )

    @property
    def signature(self) -> str:
        """What a score depends on, apart from the captions."""
        from raycap import __version__

        references = "-".join(str(n) for n in ({self.per_image[0], self.per_image[-1]}))
        return f"cider|variant:D|tok:ptb|df:refs@{self.df_sha256[:8]}|refs:{references}|n:{self.images}|v:{__version__}"

    def score(self, predictions: Mapping[str, str]) -> tuple[float, np.ndarray]:
        """Mean over the images of `predictions`, and each image's score in their order.

        Raises:
            UsageError: an image without references.
        """
        unknown = [image for image in predictions if image not in self._vectors]
        if unknown:
            raise UsageError(
                f"{len(unknown)} of {len(predictions)} images have no references, the first is {unknown[0]!r}"
            )
        tokens = self._tokenise(list(predictions.values()))
        scores = np.array([self._one(text, self._vectors[image]) for image, text in zip(predictions, tokens)])
        return (float(np.mean(scores)) if len(scores) else math.nan), scores

    def _one(self, tokens: str, references: Sequence[_Vector]) -> float:
        weights, norms, length = self._vector(_ngrams(tokens))
        total = 0.0
        for other, other_norms, other_length in references:
            delta = float(length - other_length)
            penalty = math.e ** (-(delta**2) / (2 * SIGMA**2))
            for n in range(N):
                mine, theirs = weights[n], other[n]
                value = 0.0
                for gram, weight in mine.items():
                    there = theirs.get(gram)
                    if there is not None:
                        value += min(weight, there) * there
                if norms[n] != 0 and other_norms[n] != 0:
                    value /= norms[n] * other_norms[n]
                total += value * penalty
        return total / N / len(references) * 10.0

    def _vector(self, counts: Counter[tuple[str, ...]]) -> _Vector:
        """tf-idf weights by n-gram order, their norms, and the length (in bigrams, as the reference counts it)."""
        weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(N)]
        squares = [0.0] * N
        length = 0
        for gram, count in counts.items():
            n = len(gram) - 1
            weight = float(count) * self._idf.get(gram, self._log_images)
            weights[n][gram] = weight
            squares[n] += weight**2
            if n == 1:
                length += count
        return weights, [math.sqrt(s) for s in squares], length


_Vector = tuple[list[dict[tuple[str, ...], float]], list[float], int]


def _ngrams(tokens: str) -> Counter[tuple[str, ...]]:
    words = tokens.split()
    return Counter(tuple(words[i : i + n]) for n in range(1, N + 1) for i in range(len(words) - n + 1))
