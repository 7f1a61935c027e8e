"""What an image set holds, in figures: counts, lengths, words, repetition, likeness of an image's captions, sizes, leaks.

Everything is computed from prepared shards, so that what is described is what is trained on. Figures that need all
pairs of an image's captions come from a seeded sample of images, with a standard error between groups.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from raycap.data.parquet import Shards
from raycap.errors import ConfigError, RaycapError
from raycap.evaluate import standard_error
from raycap.report.spread import histogram, spread
from raycap.report.tokens import ModelTokens, count_tokens

SAMPLE_IMAGES = 2000
PICTURES = 12
LISTED = 30
"""Words, captions and sizes that are listed at most."""
_COLUMNS = ("image_id", "captions", "group", "lang", "width", "height")
_WORDS = re.compile(r"\w+(?:['’]\w+)*")

Progress = Callable[[int, int | None, str], None]


@dataclass(slots=True)
class _Rows:
    """The rows of one language, all splits, in the shards' order."""

    ids: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    captions: list[list[str]] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    clip_scores: list[float] = field(default_factory=list)

    def flat(self) -> list[str]:
        return [caption for captions in self.captions for caption in captions]


def explore(
    shards: Shards,
    *,
    seed: int = 0,
    sample: int = SAMPLE_IMAGES,
    model: Callable[[str], ModelTokens] | None = None,
    clip: Callable[[Sequence[str]], np.ndarray] | None = None,
    clip_name: str = "",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Describe prepared shards.

    Args:
        sample: images of each language whose captions are compared with one another.
        model: language -> its tokeniser; adds lengths in tokens, captions that are cut, the share of unknown tokens.
        clip: captions -> unit vectors [n, E]; adds the cosine of an image's captions.

    Returns: plain values, ready for JSON: `rows`, `images`, `captions` (by language), `duplicates`, `leaks`, `notes`.
    """
    say = progress or (lambda *_: None)
    manifest = shards.manifest
    total = sum(shards.counts.values())
    rows = _read(shards, total, say)
    found: dict[str, Any] = {
        "source": manifest["source"],
        "content_sha256": shards.content_sha256,
        "rows": {**manifest["rows"], "rejected_by_reason": manifest.get("rejected", {})},
        "splits": dict(shards.counts),
        "images": _sizes([size for r in rows.values() for size in r.sizes]),
        "images_changed": manifest.get("images_changed", {}),
        "duplicates": manifest.get("duplicates"),
        "leaks": manifest.get("leaks"),
        "captions": {},
        "notes": [],
    }
    for lang, own in rows.items():
        found["captions"][lang] = _captions(own, lang, seed, sample, model, clip, clip_name, found["notes"], say)
    if found["leaks"] is None:
        found["notes"].append("these shards were prepared before raycap looked for copies and leaks: prepare again")
    return found


def _read(shards: Shards, total: int, say: Progress) -> dict[str, _Rows]:
    by_lang: dict[str, _Rows] = {}
    done = 0
    for split in shards.splits:
        columns = [*_COLUMNS, *(["clip_scores"] if _has_clip_scores(shards, split) else [])]
        for row in shards.iter_rows(split, columns):
            own = by_lang.setdefault(row["lang"] or "en", _Rows())
            own.ids.append(row["image_id"])
            own.splits.append(split)
            own.groups.append(row["group"])
            own.captions.append(row["captions"])
            own.sizes.append((row["width"], row["height"]))
            own.clip_scores.extend(row.get("clip_scores") or [])
            done += 1
            if done % 1000 == 0:
                say(done, total, "rows read")
    return by_lang


def _has_clip_scores(shards: Shards, split: str) -> bool:
    import pyarrow.parquet as pq

    try:
        return "clip_scores" in pq.read_schema(shards.files(split)[0]).names
    except (OSError, ValueError):
        return False


def _captions(
    rows: _Rows,
    lang: str,
    seed: int,
    sample: int,
    model: Callable[[str], ModelTokens] | None,
    clip: Callable[[Sequence[str]], np.ndarray] | None,
    clip_name: str,
    notes: list[str],
    say: Progress,
) -> dict[str, Any]:
    flat = rows.flat()
    say(0, None, f"{lang}: words of {len(flat):,} captions")
    words, tokeniser = words_of(flat, lang, notes)
    counts = [len(c) for c in rows.captions]
    found: dict[str, Any] = {
        "images": len(rows.ids),
        "captions": len(flat),
        "captions_per_image": spread(counts),
        "words": {"tokeniser": tokeniser, **spread([len(w) for w in words])},
        "characters": spread([len(c) for c in flat]),
        "words_histogram": histogram([len(w) for w in words]),
        "vocabulary": _vocabulary(words, [s for s, c in zip(rows.splits, rows.captions) for _ in c]),
        "repeated": _repeated(rows),
    }
    if model is not None:
        say(0, None, f"{lang}: tokens of the model")
        found["tokens"] = count_tokens(flat, model(lang))
    chosen = sample_rows(rows.captions, seed, sample)
    found["likeness"] = _likeness(rows, words, chosen, lang, tokeniser, clip, clip_name, notes, say)
    if rows.clip_scores:
        scores = np.array(rows.clip_scores, dtype=float)
        found["clip_scores"] = {**spread(scores), "histogram": histogram(scores, bins=40)}
    return found


def words_of(captions: Sequence[str], lang: str, notes: list[str]) -> tuple[list[list[str]], str]:
    """(words of each caption, the tokeniser's name): the metrics' tokeniser of the language, where it runs here."""
    from raycap.evaluate.tokenise import LANGUAGES, default_tokeniser, load_tokeniser

    if lang not in LANGUAGES:
        notes.append(f"lang={lang}: no tokeniser of its own; words are runs of letters and digits in lower case")
        return [_WORDS.findall(c.casefold()) for c in captions], "letters"
    try:
        name = default_tokeniser(lang)
    except ConfigError as error:
        name = LANGUAGES[lang][-1]
        notes.append(f"{error.message} Here words are characters.")
    return [line.split() for line in load_tokeniser(name)(captions)], name


def sample_rows(captions: Sequence[Sequence[str]], seed: int, sample: int) -> list[int]:
    """Indices, in order, of at most `sample` images with two captions or more, drawn without replacement."""
    several = [i for i, own in enumerate(captions) if len(own) > 1]
    if len(several) <= sample:
        return several
    return sorted(random.Random(seed).sample(several, sample))


def _likeness(
    rows: _Rows,
    words: list[list[str]],
    chosen: list[int],
    lang: str,
    tokeniser: str,
    clip: Callable[[Sequence[str]], np.ndarray] | None,
    clip_name: str,
    notes: list[str],
    say: Progress,
) -> dict[str, Any]:
    """How alike an image's captions are: BLEU-4 and METEOR of each against the others, cosines of all pairs."""
    found: dict[str, Any] = {"images": len(chosen), "of": len(rows.ids)}
    if not chosen:
        return found
    starts = np.cumsum([0, *(len(c) for c in rows.captions)])
    of_image = [words[starts[i] : starts[i + 1]] for i in chosen]
    groups = [rows.groups[i] for i in chosen]

    def add(name: str, per_image: Sequence[float], **more: Any) -> None:
        found[name] = {"mean": float(np.mean(per_image)), "se": _number(standard_error(per_image, groups)), **more}

    say(0, None, f"{lang}: likeness of captions in {len(chosen):,} images")
    add("bleu4", leave_one_out_bleu4(of_image), tokeniser=tokeniser)
    add("tfidf_cosine", tfidf_cosines(of_image, words))
    if lang == "en":
        try:
            add("meteor", leave_one_out_meteor(of_image, lambda n: say(n, len(of_image), "METEOR inside images")))
        except RaycapError as error:
            notes.append(f"METEOR left out: {error.message}")
    else:
        notes.append(f"METEOR left out for lang={lang}: its stems, synonyms and paraphrases are English ones")
    if clip is not None:
        say(0, None, f"{lang}: CLIP embeddings")
        flat = [c for i in chosen for c in rows.captions[i]]
        vectors, at, cosines = clip(flat), 0, []
        for i in chosen:
            n = len(rows.captions[i])
            cosines.append(_mean_of_pairs(vectors[at : at + n]))
            at += n
        add("clip_cosine", cosines, model=clip_name)
    return found


def leave_one_out_bleu4(images: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """Per image the mean BLEU-4 of each caption (its words) against the image's other captions."""
    from raycap.evaluate.overlap import bleu_of, bleu_statistics

    hypotheses, references, owner = [], [], []
    for image, captions in enumerate(images):
        lines = [" ".join(words) for words in captions]
        for k, line in enumerate(lines):
            hypotheses.append(line)
            references.append(lines[:k] + lines[k + 1 :])
            owner.append(image)
    each = bleu_of(bleu_statistics(hypotheses, references))
    return list(np.bincount(owner, each[:, 3]) / np.bincount(owner))


def leave_one_out_meteor(images: Sequence[Sequence[Sequence[str]]], said: Callable[[int], None]) -> list[float]:
    """Per image the mean METEOR of each caption (its words) against the image's other captions."""
    from raycap.evaluate.meteor import shared

    found: list[float] = []
    for start in range(0, len(images), 100):
        hypotheses, references, owner = [], [], []
        for image, captions in enumerate(images[start : start + 100]):
            lines = [" ".join(words) for words in captions]
            for k, line in enumerate(lines):
                hypotheses.append(line)
                references.append(lines[:k] + lines[k + 1 :])
                owner.append(image)
        _, each = shared().score(hypotheses, references)
        found += list(np.bincount(owner, each) / np.bincount(owner))
        said(len(found))
    return found


def tfidf_cosines(images: Sequence[Sequence[Sequence[str]]], documents: Sequence[Sequence[str]]) -> list[float]:
    """Per image the mean cosine of all pairs of its captions' TF-IDF vectors.

    idf = ln((1 + N) / (1 + df)) + 1 with N captions of the whole set as documents, as scikit-learn has it by default.
    """
    df = Counter(word for words in documents for word in set(words))
    idf = {word: math.log((1 + len(documents)) / (1 + n)) + 1 for word, n in df.items()}
    found = []
    for captions in images:
        index: dict[str, int] = {}
        for words in captions:
            for word in words:
                index.setdefault(word, len(index))
        vectors = np.zeros((len(captions), max(len(index), 1)))
        for k, words in enumerate(captions):
            for word, n in Counter(words).items():
                vectors[k, index[word]] = n * idf[word]
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        found.append(_mean_of_pairs(vectors / np.where(norms == 0, 1, norms)))
    return found


def _mean_of_pairs(vectors: np.ndarray) -> float:
    return float(np.mean([vectors[a] @ vectors[b] for a, b in combinations(range(len(vectors)), 2)]))


def _vocabulary(words: list[list[str]], splits: list[str]) -> dict[str, Any]:
    counts = Counter(word for own in words for word in own)
    train = {word for own, split in zip(words, splits) for word in own if split == "train"}
    test = Counter(word for own, split in zip(words, splits) for word in own if split == "test")
    unseen = {word: n for word, n in test.items() if word not in train}
    once = sorted(word for word, n in counts.items() if n == 1)
    step = max(len(once) // LISTED, 1)
    return {
        "words": sum(counts.values()),
        "distinct": len(counts),
        "once": len(once),
        "below_5": sum(n < 5 for n in counts.values()),
        "frequent": [[w, n] for w, n in sorted(counts.items(), key=lambda x: (-x[1], x[0]))[:LISTED]],
        "rare": once[::step][:LISTED],
        "test_words_unseen_in_train": len(unseen),
        "test_share_unseen": sum(unseen.values()) / max(sum(test.values()), 1) if test else None,
    }


def _repeated(rows: _Rows) -> dict[str, Any]:
    """Captions that are letter for letter the same."""
    flat = rows.flat()
    counts = Counter(flat)
    sets = Counter(tuple(sorted(c)) for c in rows.captions)
    train = {c for own, split in zip(rows.captions, rows.splits) if split == "train" for c in own}
    test = [c for own, split in zip(rows.captions, rows.splits) if split == "test" for c in own]
    return {
        "exact": len(flat) - len(counts),
        "inside_an_image": sum(len(own) - len(set(own)) for own in rows.captions),
        "distinct": len(counts),
        "distinct_sets": len(sets),
        "groups": len(set(zip(rows.splits, rows.groups))),
        "test_captions_in_train": sum(c in train for c in test),
        "test_captions": len(test),
        "frequent": [[c, n] for c, n in sorted(counts.items(), key=lambda x: (-x[1], x[0]))[:10] if n > 1],
    }


def _sizes(sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    common = sorted(Counter(sizes).items(), key=lambda x: (-x[1], x[0]))
    return {
        "images": len(sizes),
        "width_px": spread([w for w, _ in sizes]),
        "height_px": spread([h for _, h in sizes]),
        "aspect": spread([w / h for w, h in sizes]),
        "distinct_sizes": len(common),
        "frequent": [[w, h, n] for (w, h), n in common[:10]],
        "longer_side_histogram": histogram([max(size) for size in sizes], bins=30),
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def table(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(figure, value) rows in the layout in which 004 describes RISC."""
    from raycap.report.livetable import number

    rows = []
    sizes = found["images"]["frequent"]
    some = f" ({found['images']['distinct_sizes']:,} sizes)" if found["images"]["distinct_sizes"] > 1 else ""
    rows.append(("images", f"{found['images']['images']:,}"))
    rows.append(("size, px", f"{sizes[0][0]} x {sizes[0][1]}{some}" if sizes else ""))
    rows.append(("train / val / test", " / ".join(f"{n:,}" for n in found["splits"].values())))
    several = len(found["captions"]) > 1
    for lang, own in found["captions"].items():
        mark = f" ({lang})" if several or lang != "en" else ""
        rows.append((f"captions{mark}", f"{own['captions']:,}, {own['captions_per_image']['mean']:.2f} an image"))
        for unit in ("words", "tokens", "characters"):
            if unit in own:
                rows.append((f"{unit} a caption{mark}", _range(own[unit])))
        if own.get("tokens"):
            tokens = own["tokens"]
            share = tokens["unknown_share"]
            unknown = "its tokeniser has none" if share is None else f"{share:.2%}"
            rows.append(
                (f"tokens unknown{mark}", f"{unknown}, captions cut at {tokens['limit']}: {tokens['captions_cut']:,}")
            )
        vocabulary = own["vocabulary"]
        rows.append((f"vocabulary{mark}", f"{vocabulary['distinct']:,} words, {vocabulary['once']:,} of them once"))
        repeated = own["repeated"]
        rows.append(
            (f"exact duplicates{mark}", f"{repeated['exact']:,}, {repeated['inside_an_image']:,} inside an image")
        )
        rows.append((f"sets of captions{mark}", f"{repeated['distinct_sets']:,} distinct of {own['images']:,}"))
        likeness = own["likeness"]
        for key, name in (
            ("bleu4", "BLEU-4"),
            ("meteor", "METEOR"),
            ("tfidf_cosine", "cosine, TF-IDF"),
            ("clip_cosine", "cosine, CLIP"),
        ):
            if key in likeness:
                error = likeness[key]["se"]
                plus = "" if error is None else f" ± {error:.3f}"
                rows.append((f"inside an image, {name}{mark}", f"{number(likeness[key]['mean'], 3)}{plus}"))
        if own.get("clip_scores"):
            rows.append((f"CLIPScore, cosine{mark}", _range(own["clip_scores"], 3)))
    copies = found["duplicates"] or {}
    rows.append(
        (
            "pictures again",
            f"{copies.get('exact', 0):,} exactly, {copies.get('near', 0):,} nearly" if copies else "not looked for",
        )
    )
    leaks = found["leaks"]
    told = ", ".join(f"{sum(kinds.values())} {splits}" for splits, kinds in (leaks or {}).items())
    rows.append(("pictures in two splits", told or ("not looked for" if leaks is None else "none")))
    return rows


def _range(found: Mapping[str, Any], digits: int = 2) -> str:
    ends = [f"{found[k]:.{digits}f}" if isinstance(found[k], float) else f"{found[k]}" for k in ("min", "max")]
    return f"{ends[0]}-{ends[1]}, mean {found['mean']:.{digits}f}"
