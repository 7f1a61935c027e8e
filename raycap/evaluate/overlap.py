"""Metrics of words in common: BLEU and ROUGE-L by pycocoevalcap's own code, ROUGE-1, token F1, length and variety."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from raycap.evaluate.metrics import Prepared, Result

_ALPHANUMERIC = re.compile(r"[a-z0-9]+")


def bleu(data: Prepared) -> list[Result]:
    """BLEU-1 to -4 with the closest reference length; the corpus figure comes from summed counts, not from a mean."""
    from pycocoevalcap.bleu.bleu import Bleu

    from raycap.evaluate.metrics import Result

    corpus, each = Bleu(4).compute_score(data.tokenised_references(), data.tokenised_predictions(), verbose=0)
    return [Result(f"bleu{n + 1}", float(corpus[n]), np.array(each[n]), {"len": "closest"}) for n in range(4)]


def rouge_l(data: Prepared) -> list[Result]:
    """ROUGE-L F with beta 1.2 of the best precision and the best recall over the references."""
    from pycocoevalcap.rouge.rouge import Rouge

    from raycap.evaluate.metrics import Result

    corpus, each = Rouge().compute_score(data.tokenised_references(), data.tokenised_predictions())
    return [Result("rouge_l", float(corpus), np.asarray(each), {"beta": "1.2"})]


def rouge_1(data: Prepared) -> list[Result]:
    """ROUGE-1 F of the best reference, on runs of a-z and 0-9 in lower case as in the rouge_score package, unstemmed."""

    def words(caption: str) -> list[str]:
        return _ALPHANUMERIC.findall(caption.lower())

    from raycap.evaluate.metrics import Result

    each = _best_f1([words(c) for c in data.captions], [[words(r) for r in refs] for refs in data.raw_references])
    return [Result("rouge_1", float(each.mean()), each, {"variant": "F1", "tok": "alnum"})]


def token_f1(data: Prepared) -> list[Result]:
    """F1 of the tokens shared with the best reference, counted with repetitions."""
    from raycap.evaluate.metrics import Result

    each = _best_f1([h.split() for h in data.hypotheses], [[r.split() for r in refs] for refs in data.references])
    return [Result("token_f1", float(each.mean()), each, {"variant": "best-reference"})]


def distinct(data: Prepared) -> list[Result]:
    """distinct-1 and -2: distinct n-grams of all captions together over their number."""
    from raycap.evaluate.metrics import Result

    found = []
    for n in (1, 2):
        grams = Counter(g for h in data.hypotheses for g in _ngrams(h.split(), n))
        total = sum(grams.values())
        found.append(Result(f"distinct{n}", len(grams) / total if total else 0.0, None, {}))
    return found


def length_ratio(data: Prepared) -> list[Result]:
    """Tokens of the captions over tokens of the references closest in length."""
    from raycap.evaluate.metrics import Result

    ours = np.array([len(h.split()) for h in data.hypotheses])
    theirs = np.array([closest_length(n, [len(r.split()) for r in refs]) for n, refs in zip(ours, data.references)])
    each = ours / np.maximum(theirs, 1)
    return [Result("length_ratio", float(ours.sum() / max(theirs.sum(), 1)), each, {"len": "closest"})]


def closest_length(length: int, lengths: Sequence[int]) -> int:
    """The reference length nearest to `length`, the shorter of two equally near, as in BLEU."""
    return min((abs(n - length), n) for n in lengths)[1]


def _best_f1(captions: list[list[str]], references: list[list[list[str]]]) -> np.ndarray:
    return np.array([max(_f1(caption, ref) for ref in refs) for caption, refs in zip(captions, references)])


def _f1(caption: list[str], reference: list[str]) -> float:
    shared = sum((Counter(caption) & Counter(reference)).values())
    return 2 * shared / (len(caption) + len(reference)) if shared else 0.0


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


Metric = Callable[["Prepared"], "list[Result]"]
