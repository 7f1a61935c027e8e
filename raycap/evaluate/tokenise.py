"""Captions into tokens joined by spaces, as the metrics want them.

`ptb` is the Java program that pycocoevalcap runs, `ptb-py` the same in Python; `unidic-lite` and `char` are for Japanese.
"""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import tempfile
import unicodedata
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from raycap.errors import ConfigError, RunError, did_you_mean
from raycap.evaluate.java import LIGHT, UTF8, java, package_file, require_java
from raycap.evaluate.ptb import LINE_BREAKS, PUNCTUATION

Tokenise = Callable[[Sequence[str]], list[str]]

TOKENISERS: dict[str, str] = {
    "ptb": "raycap.evaluate.tokenise:ptb_java",
    "ptb-py": "raycap.evaluate.ptb:tokenise",
    "unidic-lite": "raycap.evaluate.tokenise:unidic",
    "char": "raycap.evaluate.tokenise:characters",
}
LANGUAGES = {"en": ("ptb", "ptb-py"), "ja": ("unidic-lite", "char")}
"""The tokenisers of a language, the usual one first."""


def register(name: str, target: str) -> None:
    """Add a tokeniser, "module:attribute" of a function from captions to tokenised captions."""
    if name in TOKENISERS:
        raise ConfigError(f"the tokeniser '{name}' is registered already, as {TOKENISERS[name]}")
    TOKENISERS[name] = target


def load_tokeniser(name: str) -> Tokenise:
    if name not in TOKENISERS:
        raise ConfigError(f"no tokeniser '{name}'; {did_you_mean(name, TOKENISERS)}")
    module, attribute = TOKENISERS[name].split(":")
    return getattr(import_module(module), attribute)


def quick_tokeniser(lang: str) -> str:
    """The tokeniser of a language for scores inside a run: in this process, without Java, the same on every machine."""
    return "ptb-py" if lang == "en" else default_tokeniser(lang)


def default_tokeniser(lang: str) -> str:
    """The tokeniser of a language that runs here.

    Raises:
        ConfigError: a language without tokeniser, or whose packages are not installed.
    """
    if lang not in LANGUAGES:
        raise ConfigError(f"no tokeniser for lang={lang}; {did_you_mean(lang, LANGUAGES)}")
    if lang == "ja":
        missing = [name for name in ("fugashi", "unidic_lite") if not importlib.util.find_spec(name)]
        if missing:
            raise ConfigError(
                f"Japanese captions are cut into words by fugashi and unidic-lite; {' and '.join(missing)} not found. "
                "Install them (`pip install fugashi unidic-lite`), or choose tokeniser=char."
            )
    usual, other = LANGUAGES[lang]
    return other if usual == "ptb" and java() is None else usual


def ptb_java(captions: Sequence[str]) -> list[str]:
    """Each caption as pycocoevalcap's PTBTokenizer leaves it: one call of Java for all of them.

    Unlike there, every line break becomes a space (one `\\r` or U+2028 moves all later captions to the wrong image),
    the temporary file is not written into site-packages, and the number of lines that come back is checked.
    """
    lines = [_one_line(caption) for caption in captions]
    if not any(lines):
        return [""] * len(lines)
    program = require_java("the tokeniser ptb, unlike ptb-py,")
    return [
        " ".join(word for word in line.rstrip().split(" ") if word not in PUNCTUATION)
        for line in _java_lines(lines, program, package_file("tokenizer", "stanford-corenlp-3.4.1.jar"))
    ]


def _java_lines(lines: Sequence[str], program: str, jar: Path) -> list[str]:
    command = [program, *UTF8, *LIGHT, "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    with tempfile.NamedTemporaryFile("wb", prefix="raycap-ptb-", suffix=".txt") as file:
        file.write("\n".join(lines).encode("utf-8"))
        file.flush()
        done = subprocess.run([*command, "-preserveLines", "-lowerCase", file.name], capture_output=True)
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip()[-500:]
        raise RunError(f"the PTB tokeniser ended with code {done.returncode}. It said: {said}")
    found = done.stdout.decode("utf-8").split("\n")
    if len(found) == len(lines):
        return found
    if len(lines) == 1:
        return [" ".join(found)]
    # Some caption added or swallowed a line; in halves it keeps that to itself.
    half = len(lines) // 2
    return _java_lines(lines[:half], program, jar) + _java_lines(lines[half:], program, jar)


def unidic(captions: Sequence[str]) -> list[str]:
    """Japanese words by MeCab with unidic-lite, after NFKC, without punctuation."""
    tagger = _tagger()
    found = []
    for caption in captions:
        words = tagger(unicodedata.normalize("NFKC", _one_line(caption)))
        found.append(" ".join(w.surface for w in words if w.feature.pos1 not in ("補助記号", "空白")))
    return found


@functools.cache
def _tagger():
    import fugashi
    import unidic_lite

    folder = unidic_lite.DICDIR
    return fugashi.Tagger(f'-r "{folder}/mecabrc" -d "{folder}"')


def characters(captions: Sequence[str]) -> list[str]:
    """Letters and digits one by one, after NFKC, without punctuation: for languages without spaces."""
    return [
        " ".join(char for char in unicodedata.normalize("NFKC", caption) if unicodedata.category(char)[0] in "LNMS")
        for caption in captions
    ]


def _one_line(caption: str) -> str:
    """Line breaks into spaces; half a surrogate pair, which no encoding takes, too."""
    return LINE_BREAKS.sub(" ", caption).encode("utf-8", "replace").decode("utf-8")
