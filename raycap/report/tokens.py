"""What a model's tokeniser makes of captions: how long they are, which are cut, how much of them it does not know."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raycap.report.spread import spread

if TYPE_CHECKING:
    from raycap.data.parquet import Shards

Tokenise = Callable[[Sequence[str]], list[Sequence[int]]]
_BATCH = 10_000


@dataclass(slots=True)
class ModelTokens:
    """A model's tokeniser: captions -> token ids without special ones."""

    name: str
    encode: Tokenise
    unknown: int | None
    limit: int
    """Longest prompt + caption + end that is trained on (`data.max_text_tokens`)."""
    extra: int = 0
    """Tokens that prompt, start and end take of it."""


def count_tokens(captions: Sequence[str], model: ModelTokens) -> dict[str, Any]:
    """Lengths in tokens, captions that are cut at `model.limit`, and the share of tokens that are unknown.

    `unknown` and `unknown_share` are None where the tokeniser has no token for what it does not know.
    """
    lengths, unknown, cut = [], 0, 0
    for start in range(0, len(captions), _BATCH):
        for ids in model.encode(captions[start : start + _BATCH]):
            lengths.append(len(ids))
            cut += len(ids) + model.extra > model.limit
            if model.unknown is not None:
                unknown += sum(token == model.unknown for token in ids)
    known = model.unknown is not None
    return {
        "tokeniser": model.name,
        **spread(lengths),
        "limit": model.limit,
        "captions": len(lengths),
        "captions_cut": cut,
        "tokens": sum(lengths),
        "unknown": unknown if known else None,
        "unknown_share": unknown / max(sum(lengths), 1) if known else None,
    }


def tokens_of_shards(shards: Shards, model: Callable[[str], ModelTokens]) -> dict[str, dict[str, Any]]:
    """Language -> `count_tokens` of its captions in all splits; `model` gives the tokeniser under a language's prompt."""
    captions: dict[str, list[str]] = {}
    for split in shards.splits:
        for row in shards.iter_rows(split, ("captions", "lang")):
            captions.setdefault(row["lang"] or "en", []).extend(row["captions"])
    return {lang: count_tokens(own, model(lang)) for lang, own in captions.items()}


def token_line(counts: Mapping[str, Any]) -> str:
    """`captions`, `captions_cut`, `limit`, `tokens` and `unknown_share` in a sentence."""
    share = counts["unknown_share"]
    known = "the tokeniser knows all of them" if share is None else f"{share:.2%} of them unknown"
    return (
        f"{counts['captions_cut']:,} of {counts['captions']:,} captions cut at {counts['limit']} tokens; "
        f"{counts['tokens']:,} tokens, {known}"
    )
