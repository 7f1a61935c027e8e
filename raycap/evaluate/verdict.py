"""The model verdict: are these captions better than those, on this population of images?"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from raycap.errors import ConfigError, DataError, did_you_mean
from raycap.evaluate.comparisons import bleu_bootstrap, holm
from raycap.evaluate.metrics import score
from raycap.evaluate.signature import require_same
from raycap.evaluate.significance import paired_bootstrap
from raycap.evaluate.tokenise import load_tokeniser, quick_tokeniser

COMPARED = {
    "cider": ("cider", "CIDEr"),
    "rouge_l": ("rouge_l", "ROUGE-L"),
    "meteor": ("meteor", "METEOR segment mean"),
    **{f"bleu{n}": ("bleu", f"BLEU-{n}") for n in (1, 2, 3, 4)},
}
"""Name -> (metric that gives it, what a verdict calls it). METEOR's corpus figure is no mean of its segments; the verdict
is on their mean, and says so."""
LEVEL = 0.05


def model_verdicts(
    candidates: Mapping[str, Mapping[Any, str]],
    references: Mapping[Any, Sequence[str]],
    *,
    metric: str = "cider",
    groups: Mapping[Any, Any] | None = None,
    lang: str = "en",
    resamples: int = 10_000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Every candidate's captions against the first's: a paired bootstrap over groups of images, Holm over the candidates.

    CIDEr's document frequencies come from the whole of `references` and stay fixed; a resample's CIDEr, ROUGE-L and METEOR
    are means of image scores, its BLEU comes from summed counts.

    Returns a row a candidate: name, score (the corpus figure), signature; of all but the first also difference, low, high,
    p, p_holm, verdict ("better", "worse", "cannot be told apart at this size"), sentence.

    Raises:
        ConfigError: a metric that cannot be compared.
        DataError: candidates that caption different images, or whose scores were not computed alike.
    """
    if metric not in COMPARED:
        raise ConfigError(f"'{metric}' has no verdict; {did_you_mean(metric, COMPARED)}")
    family, title = COMPARED[metric]
    names = list(candidates)
    first = names[0]
    ids = list(candidates[first])
    for name in names[1:]:
        if set(candidates[name]) != set(ids):
            raise DataError(f"{first} and {name} caption different images: a paired comparison needs the same")
    tokeniser = None if family == "meteor" else quick_tokeniser(lang)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the scorer, once a candidate; the caller speaks of the set
        scored = {
            name: score({i: said[i] for i in ids}, references, (family,), lang, tokeniser=tokeniser)[metric]
            for name, said in candidates.items()
        }
    grouped = None if groups is None else [groups[i] for i in ids]
    rows: list[dict[str, Any]] = [{"name": n, "score": s.score, "signature": s.signature} for n, s in scored.items()]
    split: list[list[str]] = []
    ours: list[str] = []
    for row in rows[1:]:
        require_same(scored[first].signature, row["signature"], (first, row["name"]))
        options: dict[str, Any] = {"resamples": resamples, "seed": seed, "names": (first, row["name"])}
        if family == "bleu":
            tokenise = load_tokeniser(row["signature"].split("|tok:")[1].split("|")[0])
            if not split:
                own = tokenise([r for i in ids for r in references[i]])
                cuts = np.cumsum([0, *(len(references[i]) for i in ids)])
                split = [own[a:b] for a, b in itertools.pairwise(cuts)]
                ours = tokenise([candidates[first][i] for i in ids])
            pair = [ours, tokenise([candidates[row["name"]][i] for i in ids])]
            verdict = bleu_bootstrap(*pair, split, grouped, order=int(metric[-1]), **options)
        else:
            pair = [np.array([scored[n].per_image[i] for i in ids]) for n in (first, row["name"])]
            verdict = paired_bootstrap(*pair, grouped, metric=title, **options)
        row |= {k: getattr(verdict, k) for k in ("difference", "low", "high", "p", "sentence")}
    for row, adjusted in zip(rows[1:], holm([r["p"] for r in rows[1:]])):
        row["p_holm"] = adjusted
        apart = row["low"] > 0 or row["high"] < 0
        if apart and adjusted <= LEVEL:
            row["verdict"] = "better" if row["difference"] > 0 else "worse"
            continue
        row["verdict"] = "cannot be told apart at this size"
        if apart:  # alone it would be told apart; the sentence must not say more than the verdict
            row["sentence"] = (
                f"{first} and {row['name']} cannot be told apart once all {len(rows) - 1} comparisons are counted (Holm): "
                f"{title} {row['difference']:+.3f} [{row['low']:.3f}, {row['high']:.3f}]"
            )
    return rows
