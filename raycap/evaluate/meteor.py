"""METEOR 1.5 as pycocoevalcap computes it, from one Java process that lives as long as Python does."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Sequence

from raycap.errors import RunError
from raycap.evaluate.java import SERIAL, UTF8, LineServer, package_file, require_java
from raycap.evaluate.ptb import LINE_BREAKS

MAX_TOKENS = 500
"""Longer texts are cut: aligning two texts of 2,100 repeating tokens took Java 276 s."""
_KEPT = 200_000  # statistics remembered; variants of one model share most of their captions
_NUMBERS = re.compile(r"[0-9. E-]+")


class Meteor:
    """Segment statistics and scores; the process starts at the first call and is reused."""

    def __init__(self) -> None:
        jar = package_file("meteor", "meteor-1.5.jar")
        package_file("meteor", "data", "paraphrase-en.gz")
        options = ["-Xmx2G", *UTF8, SERIAL, "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
        self._java = LineServer([require_java(), *options], jar.parent, "METEOR")
        self._statistics: dict[tuple[str, ...], str] = {}

    @property
    def pid(self) -> int | None:
        return self._java.pid

    def start(self) -> None:
        """Start Java in the background; it reads its tables while the caller goes on."""
        self._java.start()

    def score(self, hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
        """Corpus score and the score of each segment, for tokenised captions.

        The corpus score is computed from summed statistics; it is not the mean of the segments'.
        """
        if not hypotheses:
            return 0.0, []
        keys = [
            (_field(h), *(_field(reference) for reference in r)) for h, r in zip(hypotheses, references, strict=True)
        ]
        with self._java.lock:
            # Statistics, not scores, are kept: the corpus score needs them.
            self._learn([key for key in dict.fromkeys(keys) if key not in self._statistics], keys)
            statistics = [self._statistics[key] for key in keys]
            answers = self._java.ask(" ||| ".join(["EVAL", *statistics]), len(statistics) + 1)
        scores = [float(answer) for answer in answers]
        return scores[-1], scores[:-1]

    def close(self) -> None:
        self._java.close()

    def _learn(self, fresh: list[tuple[str, ...]], wanted: list[tuple[str, ...]]) -> None:
        """Statistics of the `fresh` (hypothesis, references...) of those that are `wanted`."""
        if len(self._statistics) + len(fresh) > _KEPT:
            self._statistics.clear()
            fresh = list(dict.fromkeys(wanted))
        lines = [" ||| ".join(["SCORE", *references, hypothesis]) for hypothesis, *references in fresh]
        for key, line, answer in zip(fresh, lines, self._java.ask_each(lines)):
            if not _NUMBERS.fullmatch(answer):
                raise RunError(f"METEOR answered {answer!r} to {line[:200]!r}")
            self._statistics[key] = answer


def _field(text: str) -> str:
    """A text that cannot be taken for a line's end or for METEOR's `|||` between fields."""
    text = LINE_BREAKS.sub(" ", text).replace("|||", "").replace("  ", " ")
    words = text.split(" ")
    if len(words) > MAX_TOKENS:
        warnings.warn(f"a caption of {len(words)} tokens is cut to {MAX_TOKENS} for METEOR", stacklevel=2)
        return " ".join(words[:MAX_TOKENS])
    return text


@functools.cache
def shared() -> Meteor:
    """The METEOR of this Python process."""
    return Meteor()
