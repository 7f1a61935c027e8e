"""Scores of captions against references, each with a signature that says how it was computed."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field

import raycap
from raycap.errors import ConfigError, UsageError, did_you_mean
from raycap.evaluate import java, ptb
from raycap.evaluate.cider import CiderScorer


@dataclass(frozen=True, slots=True)
class Score:
    """A corpus figure, what it depends on, and each image's share where there is one."""

    name: str
    score: float
    signature: str
    per_image: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Predictions and references by image id as token strings, and how they came to be."""

    predictions: dict[str, str]
    references: dict[str, list[str]]
    tokeniser: str
    lang: str
    references_sha256: str

    def signature(self, metric: str, *parts: str) -> str:
        counts = sorted({len(r) for r in self.references.values()})
        refs = str(counts[0]) if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"
        return "|".join(
            [metric, *parts, f"tok:{self.tokeniser}", f"refs:{refs}", f"lang:{self.lang}", f"n:{len(self.predictions)}",
             f"v:{raycap.__version__}"]
        )  # fmt: skip


METRICS: dict[str, str] = {
    "bleu": "raycap.evaluate.metrics:bleu",
    "meteor": "raycap.evaluate.metrics:meteor",
    "rouge_l": "raycap.evaluate.metrics:rouge_l",
    "cider": "raycap.evaluate.metrics:cider",
}
ENGLISH_ONLY = {"meteor": "its stemmer and synonyms are English"}


def score(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    metrics: Sequence[str] = ("bleu", "meteor", "rouge_l", "cider"),
    lang: str = "en",
) -> dict[str, Score]:
    """Corpus scores by name (bleu1..4, meteor, rouge_l, cider), equal to pycocoevalcap's to 1e-6.

    Document frequencies of CIDEr come from `references`, all of them; the other metrics look at the images of
    `predictions`. METEOR is left out where there is no Java.

    Raises:
        ConfigError: a metric that does not exist, or not for this language.
        UsageError: nothing to score; an image without references.
    """
    for name in metrics:
        if name not in METRICS:
            raise ConfigError(f"evaluate.metrics: there is no '{name}'; {did_you_mean(name, METRICS)}")
        if lang != "en" and name in ENGLISH_ONLY:
            raise ConfigError(
                f"evaluate.metrics: '{name}' is not defined for lang={lang}: {ENGLISH_ONLY[name]}. Leave it out."
            )
    if not predictions:
        raise UsageError("there are no predictions to score")
    missing = [i for i in predictions if not references.get(i)]
    if missing:
        raise UsageError(f"{len(missing)} of {len(predictions)} images have no references, the first is {missing[0]!r}")
    tokens = tokenised(predictions, references, lang)
    found: dict[str, Score] = {}
    for name in metrics:
        if name == "meteor" and java.java() is None:
            continue
        found.update(load_metric(name)(tokens))
    return found


def load_metric(name: str) -> Callable[[Tokens], dict[str, Score]]:
    from importlib import import_module

    module, attribute = METRICS[name].split(":")
    return getattr(import_module(module), attribute)


def tokenised(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]], lang: str) -> Tokens:
    """Both sides through the tokeniser of `lang`, in one go."""
    flat = [t for texts in references.values() for t in texts]
    said = list(predictions.values())
    if lang == "ja":
        name, split = "unidic", japanese
    elif lang == "en":
        name, split = "ptb", java.ptb_tokenise if java.java() else ptb.tokenise
    else:
        name, split = "blank", lambda texts: [" ".join(java.one_line(t).lower().split()) for t in texts]
    tokens = iter(split([*flat, *said]))
    refs = {image: [next(tokens) for _ in texts] for image, texts in references.items()}
    digest = hashlib.sha256("\n".join(t for texts in refs.values() for t in texts).encode()).hexdigest()
    return Tokens({image: next(tokens) for image in predictions}, refs, name, lang, digest)


def japanese(captions: Sequence[str]) -> list[str]:
    """Words of each caption by MeCab with unidic-lite, joined by blanks; punctuation is left out."""
    try:
        import fugashi
    except ImportError as error:
        raise UsageError("lang=ja needs a segmenter: pip install 'raycap[ja]'") from error
    tagger = fugashi.Tagger("-Owakati")
    return [
        " ".join(w for w in tagger.parse(java.one_line(c)).split() if w not in "。、．，.,!?！？「」『』・")
        for c in captions
    ]


def bleu(tokens: Tokens) -> dict[str, Score]:
    """BLEU-1..4 of the corpus, brevity by the closest reference."""
    from pycocoevalcap.bleu.bleu import Bleu

    with redirect_stdout(io.StringIO()):  # it prints its lengths
        corpus, each = Bleu(4).compute_score(*_pairs(tokens), verbose=0)
    ids = list(tokens.predictions)
    return {
        f"bleu{n + 1}": Score(
            f"bleu{n + 1}", float(corpus[n]), tokens.signature(f"bleu{n + 1}", "bp:closest"), dict(zip(ids, map(float, each[n])))
        )
        for n in range(4)
    }  # fmt: skip


def rouge_l(tokens: Tokens) -> dict[str, Score]:
    """ROUGE-L with beta 1.2: the best recall and the best precision over the references, mean over images."""
    from pycocoevalcap.rouge.rouge import Rouge

    corpus, each = Rouge().compute_score(*_pairs(tokens))
    per_image = dict(zip(tokens.predictions, map(float, each)))
    return {"rouge_l": Score("rouge_l", float(corpus), tokens.signature("rouge_l", "beta:1.2"), per_image)}


def meteor(tokens: Tokens) -> dict[str, Score]:
    """METEOR 1.5, from summed statistics; segments for each image."""
    corpus, each = java.meteor().score(tokens.predictions, tokens.references)
    return {
        "meteor": Score("meteor", corpus, tokens.signature("meteor", "jar:1.5"), dict(zip(tokens.predictions, each)))
    }


def cider(tokens: Tokens) -> dict[str, Score]:
    """CIDEr-D with the document frequencies of all given references."""
    scorer = CiderScorer(tokens.references, tokeniser=list)
    corpus, each = scorer.score(tokens.predictions)
    signature = tokens.signature(
        "cider", "variant:D", f"df:refs@{tokens.references_sha256[:8]}", f"df_n:{scorer.images}"
    )
    return {"cider": Score("cider", corpus, signature, dict(zip(tokens.predictions, map(float, each))))}


def _pairs(tokens: Tokens) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    return {i: tokens.references[i] for i in tokens.predictions}, {i: [t] for i, t in tokens.predictions.items()}
