"""Metrics of words in common: BLEU and ROUGE-L as pycocoevalcap has them, ROUGE-1, token F1, length and variety."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from raycap.evaluate.metrics import Prepared, Result

BLEU_ORDERS = 4
BETA = 1.2
_ALPHANUMERIC = re.compile(r"[a-z0-9]+")


def bleu(data: Prepared) -> list[Result]:
    """BLEU-1 to -4 with the closest reference length; the corpus figure comes from summed counts, not from a mean."""
    from raycap.evaluate.metrics import Result

    statistics = bleu_statistics(data.hypotheses, data.references)
    each, corpus = bleu_of(statistics), bleu_of(statistics.sum(axis=0, keepdims=True))[0]
    return [Result(f"bleu{n + 1}", float(corpus[n]), each[:, n], {"len": "closest"}) for n in range(BLEU_ORDERS)]


def rouge_l(data: Prepared) -> list[Result]:
    """ROUGE-L F with beta 1.2 of the best precision and the best recall over the references."""
    from raycap.evaluate.metrics import Result

    each = np.array([rouge_l_of(h, refs) for h, refs in zip(data.hypotheses, data.references)])
    return [Result("rouge_l", float(each.mean()), each, {"beta": "1.2"})]


def bleu_statistics(captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """[N, 10] of tokenised captions: correct and possible 1- to 4-grams, own length, closest reference length.

    The references' n-grams are counted, and only those that the caption holds looked up: several times faster than
    pycocoevalcap, which merges all of them.
    """
    found = np.zeros((len(captions), 2 * BLEU_ORDERS + 2))
    for row, caption, refs in zip(found, captions, references, strict=True):
        words, others = caption.split(), [ref.split() for ref in refs]
        row[-2:] = len(words), closest_length(len(words), [len(other) for other in others])
        for n in range(min(BLEU_ORDERS, len(words))):
            grams = Counter(zip(*(words[k:] for k in range(n + 1))))
            counts = [Counter(zip(*(other[k:] for k in range(n + 1)))) for other in others]
            row[n] = sum(min(count, max(one[gram] for one in counts)) for gram, count in grams.items())
            row[BLEU_ORDERS + n] = len(words) - n
    return found


def bleu_of(summed: np.ndarray) -> np.ndarray:
    """BLEU-1 to -4 [B, 4] of summed statistics [B, 10], with pycocoevalcap's small numbers against division by zero."""
    tiny, small = 1e-15, 1e-9
    correct, possible = summed[:, :BLEU_ORDERS], summed[:, BLEU_ORDERS:-2]
    found = np.cumprod((correct + tiny) / (possible + small), axis=1) ** (1 / np.arange(1, BLEU_ORDERS + 1))
    ratio = (summed[:, -2] + tiny) / (summed[:, -1] + small)
    return found * np.exp(np.minimum(1 - 1 / ratio, 0))[:, None]


def rouge_l_of(caption: str, references: Sequence[str]) -> float:
    """ROUGE-L of one tokenised caption. As in pycocoevalcap, an empty text is one empty word."""
    words = caption.split(" ")
    places: dict[str, int] = {}
    for at, word in enumerate(words):
        places[word] = places.get(word, 0) | 1 << at
    precision = recall = 0.0
    for reference in references:
        other = reference.split(" ")
        common = _longest_common(places, len(words), other)
        precision, recall = max(precision, common / len(words)), max(recall, common / len(other))
    if not precision:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _longest_common(places: dict[str, int], length: int, words: Sequence[str]) -> int:
    """Length of the longest common subsequence of `words` and a text of `length` words, of which `places` has a bit for
    each place of a word: a row of the table is one number (Hyyrö 2004, "Bit-parallel LCS-length computation revisited")."""
    every = row = (1 << length) - 1
    for word in words:
        shared = row & places.get(word, 0)
        row = (row + shared | row - shared) & every
    return length - row.bit_count()


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
