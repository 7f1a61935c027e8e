"""Scores of captions against references, each with the signature that says how it came about."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import Any

import numpy as np

from raycap.errors import ConfigError, DataError, did_you_mean
from raycap.evaluate.cider import CiderScorer
from raycap.evaluate.java import NO_JAVA, java
from raycap.evaluate.signature import references_per_image, signature
from raycap.evaluate.tokenise import LANGUAGES, TOKENISERS, default_tokeniser, load_tokeniser

METRICS: dict[str, str] = {
    "bleu": "raycap.evaluate.overlap:bleu",
    "meteor": "raycap.evaluate.metrics:_meteor",
    "rouge_l": "raycap.evaluate.overlap:rouge_l",
    "cider": "raycap.evaluate.metrics:_cider",
    "rouge_1": "raycap.evaluate.overlap:rouge_1",
    "token_f1": "raycap.evaluate.overlap:token_f1",
    "distinct": "raycap.evaluate.overlap:distinct",
    "length_ratio": "raycap.evaluate.overlap:length_ratio",
    "clipscore": "raycap.models.clip_score:clipscore",
    "spice": "raycap.evaluate.spice:spice",
    "perplexity": "raycap.evaluate.metrics:_perplexity",
}
"""Each gives one score or several: `bleu` gives bleu1 to bleu4, `clipscore` clip_cosine, clipscore and refclipscore."""
OTHER_PROGRAMS = ("meteor", "spice")
"""Metrics that wait for Java."""
DEFAULT_METRICS = ("bleu", "meteor", "rouge_l", "cider")


@dataclass(frozen=True, slots=True)
class Score:
    """One figure over a set of images."""

    name: str
    score: float
    signature: str
    per_image: dict[Any, float] = field(default_factory=dict)
    """Empty for figures that only a whole set has. The corpus score is their mean for cider and rouge_l, not for
    bleu and meteor."""


class Scores(dict[str, Score]):
    """Scores by name, and `notes`: what was left out or looks odd."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.notes: list[str] = []


@dataclass(frozen=True, slots=True)
class Result:
    """What a metric hands back: figure, figure per image in the order of `Prepared.ids`, own parts of the signature."""

    name: str
    score: float
    per_image: np.ndarray | None
    parts: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """What a reader should know: captions cut, and the like."""


@dataclass(frozen=True)
class Prepared:
    """Captions and references of the same images, in the same order, tokenised once for all metrics."""

    ids: list[Any]
    captions: list[str]
    raw_references: list[list[str]]
    hypotheses: list[str]
    references: list[list[str]]
    tokeniser: str
    lang: str
    all_references: Mapping[Any, Sequence[str]]
    """Those of images without a caption too; CIDEr's document frequencies come from them."""
    all_tokenised: dict[Any, list[str]]
    corpus: Mapping[Any, Sequence[str]] | None = None
    """Where CIDEr's document frequencies come from; the references when None."""
    kept: _Kept | None = None
    images: Mapping[Any, Any] | None = None
    """Pictures by image id, for the metrics that look at them."""
    clip: str = ""

    @cached_property
    def cider(self) -> CiderScorer:
        if self.corpus is not None or self.kept is None:
            return self._cider()
        if self.kept.cider is None:
            self.kept.cider = self._cider()
        elif self.kept.cider.warning:
            warnings.warn(self.kept.cider.warning, stacklevel=2)
        return self.kept.cider

    def _cider(self) -> CiderScorer:
        known = {r: t for i, refs in self.all_references.items() for r, t in zip(refs, self.all_tokenised[i])}
        tokenise = load_tokeniser(self.tokeniser)

        def tokenised(captions: Sequence[str]) -> list[str]:
            fresh = [caption for caption in dict.fromkeys(captions) if caption not in known]
            known.update(zip(fresh, tokenise(fresh)) if fresh else ())
            return [known[caption] for caption in captions]

        return CiderScorer(self.all_references, tokenised, corpus=self.corpus, lang=self.lang)


def register(name: str, target: str) -> None:
    """Add a metric, "module:attribute" of a function from `Prepared` to a list of `Result`."""
    if name in METRICS:
        raise ConfigError(f"the metric '{name}' is registered already, as {METRICS[name]}")
    METRICS[name] = target


def load_metric(name: str) -> Callable[[Prepared], list[Result]]:
    if name not in METRICS:
        raise ConfigError(f"metrics: there is no '{name}'; {did_you_mean(name, METRICS)}")
    module, attribute = METRICS[name].split(":")
    return getattr(import_module(module), attribute)


def score(
    predictions: Mapping[Any, str],
    references: Mapping[Any, Sequence[str]],
    metrics: Sequence[str] = DEFAULT_METRICS,
    lang: str = "en",
    *,
    tokeniser: str | None = None,
    corpus: Mapping[Any, Sequence[str]] | None = None,
    images: Mapping[Any, Any] | None = None,
    clip: str = "",
) -> Scores:
    """Score one caption an image against its references; figures equal pycocoevalcap's to 1e-6.

    `corpus` holds captions by image that CIDEr takes its document frequencies from, the references when None. `images`
    (id -> PIL image, bytes or path) and `clip` (see `raycap.models.clip_score.ClipScorer`) are for `clipscore` alone.

    Images with references and no prediction are left out, and count for CIDEr's document frequencies only. What the
    machine cannot compute (METEOR without Java) is left out with a warning, and named in `notes`.

    Raises:
        ConfigError: an unknown metric, or none left that this language or machine has.
        DataError: no prediction at all, a prediction without references, an image with an empty list of them.
    """
    computed = {name: load_metric(name) for name in metrics}
    found = Scores()
    if (clip or images is not None) and "clipscore" not in computed:
        raise ConfigError("`images` and `clip` have no effect without the metric clipscore")
    if corpus is not None and "cider" not in computed:
        raise ConfigError("`corpus` has no effect without the metric cider, whose document frequencies it gives")
    own = LANGUAGES.get(lang, ())
    if tokeniser and own and tokeniser not in own and any(tokeniser in others for others in LANGUAGES.values()):
        raise ConfigError(f"tokeniser={tokeniser} is not for lang={lang}, whose tokenisers are {' and '.join(own)}")
    for name, title, reason in (("meteor", "METEOR", _no_meteor(lang)), ("spice", "SPICE", _no_spice(lang))):
        if name in computed and reason:
            del computed[name]
            if not computed:
                raise ConfigError(f"metrics: {reason}")
            found.notes.append(f"{title} left out: {reason}")
    if "meteor" in computed:
        from raycap.evaluate.meteor import shared

        shared().start()  # its Java reads tables for seconds, meanwhile the captions are tokenised
    data = _prepare(predictions, references, lang, tokeniser or default_tokeniser(lang))
    data = dataclasses.replace(data, corpus=corpus, images=images, clip=clip)
    if data.tokeniser == "ptb-py" and tokeniser is None:
        found.notes.append("no Java: captions are tokenised by the PTB rules in Python")
    missing = [image for image in references if image not in predictions]
    if missing:
        found.notes.append(
            f"{len(missing)} of {len(references)} images with references have no prediction and are not scored, "
            f"first {missing[0]!r}"
        )
    common = {"refs": references_per_image(data.raw_references), "lang": lang, "n": len(data.ids)}
    # What another program computes goes on beside what this one does.
    awaited = {name: _beside(computed[name], data) for name in OTHER_PROGRAMS if name in computed}
    results = {name: function(data) for name, function in computed.items() if name not in awaited}
    results |= {name: wait() for name, wait in awaited.items()}
    for name in computed:
        for result in results[name]:
            found.notes += result.notes
            parts = {"tok": data.tokeniser, **result.parts, **common}
            per_image = {} if result.per_image is None else dict(zip(data.ids, map(float, result.per_image)))
            found[result.name] = Score(result.name, result.score, signature(result.name, **parts), per_image)
    for note in found.notes:
        warnings.warn(note, stacklevel=2)
    return found


def _beside(function: Callable[[Prepared], list[Result]], data: Prepared) -> Callable[[], list[Result]]:
    """Begin a metric in a thread; what is returned waits for it and gives its results, or raises its error."""
    found: Future[list[Result]] = Future()

    def work() -> None:
        try:
            found.set_result(function(data))
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=work, daemon=True).start()  # Ctrl-C does not wait for another program
    return found.result


def _prepare(
    predictions: Mapping[Any, str], references: Mapping[Any, Sequence[str]], lang: str, tokeniser: str
) -> Prepared:
    if not predictions:
        raise DataError("there is no prediction to score")
    unknown = [image for image in predictions if image not in references]
    if unknown:
        raise DataError(
            f"{len(unknown)} of {len(predictions)} predictions are for images without references, first "
            f"{unknown[0]!r}. Are the ids of one file numbers or names of another kind?"
        )
    bare = [image for image, captions in references.items() if not captions]
    if bare:
        raise DataError(f"{len(bare)} of {len(references)} images have no reference caption, first {bare[0]!r}")
    ids = list(predictions)
    captions = [predictions[image] for image in ids]
    tokenise, kept = load_tokeniser(tokeniser), _kept(references, tokeniser, lang)
    # One call for both: each starts a program where the tokeniser is one.
    known = bool(kept.tokenised)
    texts = [] if known else [caption for own in references.values() for caption in own]
    flat = iter(tokenise([*texts, *captions]))
    if not known:
        kept.tokenised = {image: [next(flat) for _ in own] for image, own in references.items()}
    tokenised, hypotheses = kept.tokenised, list(flat)
    return Prepared(
        ids=ids,
        captions=captions,
        raw_references=[list(references[image]) for image in ids],
        hypotheses=hypotheses,
        references=[tokenised[image] for image in ids],
        tokeniser=tokeniser,
        lang=lang,
        all_references=references,
        all_tokenised=tokenised,
        kept=kept,
    )


@dataclass
class _Kept:
    """What belongs to a set of references, for the next captions that are scored against it."""

    tokenised: dict[Any, list[str]] = field(default_factory=dict)
    cider: CiderScorer | None = None


_REFERENCES: OrderedDict[str, _Kept] = OrderedDict()
_SETS = 4
"""Sets of references that are kept; the variants of a run come in turn against two of them."""


def _kept(references: Mapping[Any, Sequence[str]], tokeniser: str, lang: str) -> _Kept:
    """By content: whoever changes a reference gets another one."""
    told = repr([(image, list(captions)) for image, captions in references.items()])
    key = hashlib.sha256(f"{tokeniser}|{TOKENISERS[tokeniser]}|{lang}|{told}".encode("utf-8", "replace")).hexdigest()
    found = _REFERENCES.setdefault(key, _Kept())
    _REFERENCES.move_to_end(key)
    while len(_REFERENCES) > _SETS:
        _REFERENCES.popitem(last=False)
    return found


def check_metrics(metrics: Sequence[str]) -> None:
    """Raise a ConfigError for a name that is no metric of text and pictures, before anything costly begins."""
    for name in metrics:
        load_metric(name)
    if "perplexity" in metrics:
        raise ConfigError(NEEDS_MODEL)


NEEDS_MODEL = (
    "metrics: perplexity of the references needs the model itself, not its captions: `raycap evaluate RUN "
    "evaluate.metrics=perplexity,...` computes it"
)


def _perplexity(data: Prepared) -> list[Result]:
    raise ConfigError(NEEDS_MODEL)


def _no_meteor(lang: str) -> str:
    if lang != "en":
        return f"METEOR's stems, synonyms and paraphrases are English ones; there are none for lang={lang}."
    return "" if java() else NO_JAVA


def _no_spice(lang: str) -> str:
    if lang != "en":
        return f"SPICE compares scene graphs from an English parser; there is none for lang={lang}."
    from raycap.evaluate.spice import missing

    return missing()


def _meteor(data: Prepared) -> list[Result]:
    """METEOR 1.5, its corpus figure from summed statistics."""
    from raycap.evaluate.meteor import shared

    corpus, each = shared().score(data.hypotheses, data.references)
    return [Result("meteor", corpus, np.array(each), {"variant": "1.5-norm"})]


def _cider(data: Prepared) -> list[Result]:
    """CIDEr-D."""
    corpus, each = data.cider.score_tokenised(data.ids, data.hypotheses)
    df = next(part for part in data.cider.signature.split("|") if part.startswith("df:")).removeprefix("df:")
    return [Result("cider", corpus, each, {"variant": "D", "df": df})]
