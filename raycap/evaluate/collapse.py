"""Signs that a model has stopped looking at its pictures: the same caption for all, loops, nothing, the prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from raycap.errors import DataError
from raycap.evaluate.overlap import closest_length

ENOUGH = 8
"""Fewer captions say nothing about variety."""
TOP_SHARE, EMPTY_SHARE, REPETITION_SHARE, ECHO_SHARE = 0.5, 0.2, 0.3, 0.3
"""Flagged above these shares of the captions."""
VARIETY = 0.2
"""Flagged below this part of the references' own share of distinct captions."""
LENGTH_RATIO = (1 / 3, 3.0)


def collapse(
    captions: Sequence[str],
    references: Sequence[Sequence[str]] | None = None,
    *,
    prompt: str = "",
    lang: str = "en",
) -> dict[str, Any]:
    """Shares between 0 and 1 over the captions, `collapsed`, and the `reasons` for it in words.

    `references` are in the order of `captions`; with them variety, length, repetition and echoes are set against what
    people wrote, so that a set whose pictures are all alike is not flagged. `length_ratio` is None without them. Lengths
    and repetition are counted in words, in Japanese in characters.
    """
    plain = [" ".join(caption.lower().split()) for caption in captions]
    count = len(plain)
    often = Counter(plain)
    top, top_count = often.most_common(1)[0] if often else ("", 0)
    start = " ".join(prompt.lower().split())
    found: dict[str, Any] = {
        "distinct_share": len(often) / count if count else 0.0,
        "top_caption": next((c for c, p in zip(captions, plain) if p == top), ""),
        "top_share": top_count / count if count else 0.0,
        "empty_share": _share(not p for p in plain),
        "repetition_share": _share(repeats(p, lang) for p in plain),
        "echo_share": _share(bool(start) and p.startswith(start) for p in plain),
        "length_ratio": None,
    }
    variety, usual_top, usual_echo, usual_repetition = 1.0, 0.0, 0.0, 0.0
    if references:
        ours = [len(_words(p, lang)) for p in plain]
        theirs = [closest_length(n, [len(_words(r, lang)) for r in refs]) for n, refs in zip(ours, references) if refs]
        found["length_ratio"] = sum(ours) / max(sum(theirs), 1)
        first = Counter(" ".join(refs[0].lower().split()) for refs in references if refs)
        if first:
            variety = len(first) / first.total()
            usual_top = first.most_common(1)[0][1] / first.total()
            usual_echo = sum(n for text, n in first.items() if start and text.startswith(start)) / first.total()
            usual_repetition = sum(n for text, n in first.items() if repeats(text, lang)) / first.total()
    reasons = []
    if count >= ENOUGH:
        if found["top_share"] > max(TOP_SHARE, 1.5 * usual_top):
            reasons.append(f"{found['top_share']:.0%} of the captions are the same")
        if references and found["distinct_share"] < VARIETY * variety:
            reasons.append(f"{found['distinct_share']:.0%} distinct captions where people wrote {variety:.0%}")
    if found["empty_share"] > EMPTY_SHARE:
        reasons.append(f"{found['empty_share']:.0%} are empty")
    if found["repetition_share"] > REPETITION_SHARE + usual_repetition:
        reasons.append(f"{found['repetition_share']:.0%} repeat themselves")
    if found["echo_share"] > ECHO_SHARE + usual_echo:
        reasons.append(f"{found['echo_share']:.0%} begin with the prompt")
    ratio = found["length_ratio"]
    if count and ratio is not None and not LENGTH_RATIO[0] <= ratio <= LENGTH_RATIO[1]:
        reasons.append(f"{ratio:.1f} times the references' length")
    return {**found, "collapsed": bool(reasons), "reasons": reasons}


def repeats(caption: str, lang: str = "en") -> bool:
    """A word three times running, or two to six words said twice running ("a man on a man on").

    In Japanese, where words double by nature (いろいろ), up to three characters three times, or four to twelve twice.
    """
    words = _words(caption, lang)
    short, longest = (3, 12) if lang == "ja" else (1, 6)
    for size in range(1, longest + 1):
        times = 3 if size <= short else 2
        for at in range(len(words) - size * times + 1):
            block = words[at : at + size]
            if all(words[at + k * size : at + (k + 1) * size] == block for k in range(1, times)):
                return True
    return False


def _words(text: str, lang: str) -> list[str]:
    return list("".join(text.split())) if lang == "ja" else text.split()


def _share(flags: Any) -> float:
    values = list(flags)
    return sum(values) / len(values) if values else 0.0


def flagged(
    captions: Mapping[Any, str],
    references: Mapping[Any, Sequence[str]] | None = None,
    *,
    prompt: str = "",
    lang: str = "en",
) -> list[dict[str, Any]]:
    """Captions that a person should look at: {"image_id", "caption", "references", "reasons", "exclude": True} each.

    Empty, repeating itself, echoing the prompt, said of more than TOP_SHARE of the images, or of a length far from every
    reference's. Whoever reviews them sets "exclude" to false, or takes the line out, where a caption is fine;
    `raycap evaluate --exclude` reads the file.
    """
    plain = {i: " ".join(c.lower().split()) for i, c in captions.items()}
    often = Counter(plain.values())
    start = " ".join(prompt.lower().split())
    found = []
    for image, text in plain.items():
        reasons = []
        if not text:
            reasons.append("empty")
        elif repeats(text, lang):
            reasons.append("repeats itself")
        if start and text.startswith(start):
            reasons.append("begins with the prompt")
        if len(plain) >= ENOUGH and often[text] > TOP_SHARE * len(plain):
            reasons.append(f"said of {often[text]} of {len(plain)} images")
        own = list((references or {}).get(image, []))
        length = len(_words(text, lang))
        if own and text:
            ratio = length / max(closest_length(length, [len(_words(r, lang)) for r in own]), 1)
            if not LENGTH_RATIO[0] <= ratio <= LENGTH_RATIO[1]:
                reasons.append(f"{ratio:.1f} times the length of its closest reference")
        if reasons:
            found.append({"image_id": image, "caption": captions[image], "references": own, "reasons": reasons,
                          "exclude": True})  # fmt: skip
    return found


def excluded(rows: Sequence[Mapping[str, Any]], place: str = "the file") -> set[str]:
    """Ids of the images that a reviewed file of `flagged` still leaves out.

    Raises:
        DataError: a row without image_id, or whose "exclude" is neither true nor false.
    """
    found = set()
    for number, row in enumerate(rows, start=1):
        if "image_id" not in row or not isinstance(row.get("exclude", True), bool):
            raise DataError(
                f'{place}:{number}: expected "image_id" and "exclude": true or false, found {dict(row)!r:.200}'
            )
        if row.get("exclude", True):
            found.add(str(row["image_id"]))
    return found
