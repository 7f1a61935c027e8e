"""CIDEr-D that keeps what belongs to the references: document frequencies, tf-idf vectors, norms.

What papers and pycocoevalcap call CIDEr is CIDEr-D: counts clipped, a Gaussian penalty on length, times 10.

Shapes: W words of all captions in a row, E entries (a distinct n-gram of a caption), S captions, I images.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raycap.errors import DataError
from raycap.evaluate.signature import reference_hash, references_per_image, signature
from raycap.evaluate.tokenise import Tokenise, load_tokeniser

ORDERS = 4
SIGMA = 6.0
FEW_IMAGES = 50
"""Below it document frequencies say little: one image scores 0, two about half of what many do."""


@dataclass(frozen=True, slots=True)
class _Order:
    """The references' side of one n-gram order, entries sorted by (image, n-gram)."""

    keys: np.ndarray
    """[G] sorted (shorter n-gram, word) of the known n-grams; the place of a key is the n-gram's number."""
    idf: np.ndarray
    """[G] log of images / images that have it."""
    entry: np.ndarray
    """[E] image * G + n-gram, sorted."""
    caption: np.ndarray
    """[E] the reference caption of each entry."""
    weight: np.ndarray
    """[E] tf * idf."""
    norm: np.ndarray
    """[S] length of each reference's vector."""


class CiderScorer:
    """CIDEr against fixed references; the second score costs a small part of the first.

    Args:
        references: captions by image id, as people wrote them.
        tokeniser: a name of `TOKENISERS`, or a function from captions to tokenised captions.
        corpus: captions by image that the document frequencies come from; `references` when None.
    """

    def __init__(
        self,
        references: Mapping[Any, Sequence[str]],
        tokeniser: str | Tokenise = "ptb-py",
        *,
        corpus: Mapping[Any, Sequence[str]] | None = None,
        lang: str = "en",
    ):
        if not references:
            raise DataError("CIDEr needs references, and there is no image with any")
        bare = [image for image, captions in references.items() if not captions]
        if bare:
            raise DataError(f"{len(bare)} of {len(references)} images have no reference caption, first {bare[0]!r}")
        self.ids = list(references)
        self._index = {image: at for at, image in enumerate(self.ids)}
        self._tokenise = load_tokeniser(tokeniser) if isinstance(tokeniser, str) else tokeniser
        frequencies = references if corpus is None else corpus
        self.signature = signature(
            "cider",
            variant="D",
            tok=tokeniser if isinstance(tokeniser, str) else getattr(tokeniser, "__name__", "own"),
            df=f"{'refs' if corpus is None else 'corpus'}@{reference_hash(frequencies)}",
            refs=references_per_image(references.values()),
            lang=lang,
            n=len(references),
        )
        self.warning = ""
        """What whoever reads its scores should know; empty where there is nothing."""
        if len(frequencies) < FEW_IMAGES:
            self.warning = (
                f"CIDEr takes its document frequencies from {len(frequencies)} images; below {FEW_IMAGES} its scale is "
                "unstable, and scores compare only with scores on the same images"
            )
            warnings.warn(self.warning, stacklevel=2)
        self._learn(references, corpus)

    def score(self, predictions: Mapping[Any, str]) -> tuple[float, np.ndarray]:
        """Mean and the score of each predicted image, in the order of the references whatever that of `predictions`.

        Raises:
            DataError: a prediction for an image without references.
        """
        unknown = [image for image in predictions if image not in self._index]
        if unknown:
            raise DataError(f"{len(unknown)} predicted images have no references, first {unknown[0]!r}")
        ids = [image for image in self.ids if image in predictions]
        return self.score_tokenised(ids, self._tokenise([predictions[image] for image in ids]))

    def score_tokenised(self, ids: Sequence[Any], captions: Sequence[str]) -> tuple[float, np.ndarray]:
        """The same for tokenised captions of the images `ids`; per image in the order of `ids`."""
        image_of = np.array([self._index[image] for image in ids], dtype=np.int64)
        if not len(image_of):
            return 0.0, np.zeros(0)
        words, sentence, length = self._words(captions, learn=False)
        total_S = np.zeros(len(self._image))  # summed over the orders
        # Which of the captions is set against each reference; -1 where the image is not among them.
        against = np.full(len(self.ids), -1)
        against[image_of] = np.arange(len(ids))
        hyp_S = against[self._image]
        set_against = hyp_S >= 0
        delta = length[hyp_S] - self._length
        penalty_S = np.where(set_against, np.exp(-(delta**2.0) / (2 * SIGMA**2)), 0.0)
        gram, at = words, np.arange(len(words))
        for n, order in enumerate(self._orders):
            pair, at = _pairs(n, gram, at, words, sentence)
            gram = _numbers(pair, order.keys)
            caption_E, gram_E, count_E = _entries(sentence[at], gram)
            known = gram_E < len(order.keys)
            idf_E = np.full(len(gram_E), self._log_images)  # an n-gram of no reference counts as in one image
            idf_E[known] = order.idf[gram_E[known]]
            weight_E = count_E * idf_E
            norm_C = np.sqrt(np.bincount(caption_E, weight_E**2, minlength=len(ids)))
            # Join with the references' entries of the same image and n-gram: a run of them for each entry.
            key_E = image_of[caption_E[known]] * len(order.keys) + gram_E[known]
            first = np.searchsorted(order.entry, key_E, "left")
            run = np.searchsorted(order.entry, key_E, "right") - first
            mine = np.repeat(weight_E[known], run)
            offset = np.arange(len(mine)) - np.repeat(np.cumsum(run) - run, run)
            theirs = np.repeat(first, run) + offset
            product = np.minimum(mine, order.weight[theirs]) * order.weight[theirs]
            value_S = np.bincount(order.caption[theirs], product, minlength=len(self._image)).astype(np.float64)
            scale_S = norm_C[hyp_S] * order.norm
            np.divide(value_S, scale_S, out=value_S, where=scale_S != 0)
            total_S += value_S * penalty_S
        summed_I = np.bincount(self._image, total_S / ORDERS, minlength=len(self.ids))
        per_image = 10.0 * summed_I[image_of] / self._references_I[image_of]
        return float(per_image.mean()), per_image

    def _learn(self, references: Mapping[Any, Sequence[str]], corpus: Mapping[Any, Sequence[str]] | None) -> None:
        texts = [caption for captions in references.values() for caption in captions]
        counts = [len(captions) for captions in references.values()]
        own, images = len(texts), len(counts)
        if corpus is not None:
            texts += [caption for captions in corpus.values() for caption in captions]
            counts += [len(captions) for captions in corpus.values()]
        image_S = np.repeat(np.arange(len(counts)), counts)
        self._vocabulary: dict[str, int] = {}
        words, sentence, length = self._words(self._tokenise(texts), learn=True)
        self._log_images = float(np.log(float(len(counts) if corpus is None else len(corpus))))
        self._image, self._length = image_S[:own], length[:own]
        self._references_I = np.array(counts[:images])
        self._orders: list[_Order] = []
        gram, at = words, np.arange(len(words))
        for n in range(ORDERS):
            pair, at = _pairs(n, gram, at, words, sentence)
            keys, gram = np.unique(pair, return_inverse=True)
            caption_E, gram_E, count_E = _entries(sentence[at], gram)
            image_E = image_S[caption_E]
            counted = np.ones(len(image_E), dtype=bool) if corpus is None else image_E >= images
            pairs = np.unique(image_E[counted] * len(keys) + gram_E[counted])
            frequency = np.bincount(pairs % max(len(keys), 1), minlength=len(keys))
            idf = self._log_images - np.log(np.maximum(1.0, frequency))
            mine = caption_E < own
            caption_E, gram_E, image_E = caption_E[mine], gram_E[mine], image_E[mine]
            weight_E = count_E[mine] * idf[gram_E]
            norm = np.sqrt(np.bincount(caption_E, weight_E**2, minlength=own))
            entry = image_E * len(keys) + gram_E
            order = np.argsort(entry, kind="stable")
            self._orders.append(_Order(keys, idf, entry[order], caption_E[order], weight_E[order], norm))

    def _words(self, captions: Sequence[str], *, learn: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Numbers of the words in a row [W], the caption of each [W], and each caption's bigrams [S] as its length.

        Words that are not in the vocabulary join it, or get numbers beyond it for this call.
        """
        split = [caption.split() for caption in captions]
        sizes = np.array([len(words) for words in split], dtype=np.int64)
        vocabulary = self._vocabulary if learn else self._vocabulary.copy()
        numbers = [vocabulary.setdefault(word, len(vocabulary)) for words in split for word in words]
        sentence = np.repeat(np.arange(len(split)), sizes)
        return np.array(numbers, dtype=np.int64), sentence, np.maximum(sizes - 1, 0)


def _pairs(
    n: int, gram: np.ndarray, at: np.ndarray, words: np.ndarray, sentence: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(n-gram of the order before, next word) as one number each, and where each begins."""
    if n == 0:
        return gram, at
    fits = at + n < len(words)
    gram, at = gram[fits], at[fits]
    same = sentence[at] == sentence[at + n]
    gram, at = gram[same], at[same]
    return (gram << 32) | words[at + n], at


def _numbers(pair: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The place of each pair in the sorted `keys`; pairs that are not there get numbers beyond."""
    number = np.searchsorted(keys, pair)
    known = number < len(keys)
    known[known] = keys[number[known]] == pair[known]
    if not known.all():
        number[~known] = len(keys) + np.unique(pair[~known], return_inverse=True)[1]
    return number


def _entries(caption: np.ndarray, gram: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct (caption, n-gram) pairs and how often each occurs."""
    width = int(gram.max()) + 1 if len(gram) else 1
    pairs, count = np.unique(caption * width + gram, return_counts=True)
    return pairs // width, pairs % width, count.astype(float)
