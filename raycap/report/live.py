"""What a person sees while a run works: a live table in a terminal, a line now and then anywhere else.

Everything goes to stderr; stdout is kept for results, so that `--json` stays clean.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import IO, Any

from raycap.report.livetable import clock as _stamp
from raycap.report.livetable import draw, end_line, totals_line
from raycap.report.tokens import token_line

PHASES = ("prepare", "sweep", "export", "serve", "score", "report")
LINE_EVERY_S = 10.0
REFRESH_PER_S = 2


class Progress:
    """Phases, counts and trials of one run. A context; `done` may be called more than once.

    `steps` is a trial's full budget, for the bars. `count` has the shape that raycap.data wants of a progress callback:
    (done, total or None, message).
    """

    def __init__(
        self,
        title: str = "",
        *,
        steps: int = 0,
        plain: bool = False,
        phases: tuple[str, ...] = PHASES,
        stream: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.title = title
        self.steps = steps
        self.phases = phases
        self.stream = stream or sys.stderr
        self.clock = clock
        self.began = self.clock()
        self.phase_name = ""
        self.message = ""
        self.counted: tuple[int, int | None] | None = None
        self.snapshot: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self._phase_began = self.began
        self._said: dict[str, str] = {}
        self._notes = 0
        self._tokens: set[str] = set()
        self._last_line = -LINE_EVERY_S
        self._lock = threading.RLock()
        self._live: Any = None
        self.ended = False
        self.plain = plain or not _is_terminal(self.stream)
        if not self.plain:
            self._start()

    def phase(self, name: str, message: str = "") -> None:
        """Enter a phase, or say more about the one that runs."""
        with self._lock:
            if name != self.phase_name:
                self._close_phase()
                self.phase_name, self._phase_began, self.counted = name, self.clock(), None
                self._last_line = -LINE_EVERY_S
            self.message = message
            if self.plain:
                self._write(f"{name}: {message}" if message else name)

    def count(self, done: int, total: int | None, message: str = "") -> None:
        """How far the phase is, in whatever it counts."""
        with self._lock:
            self.counted, self.message = (done, total), message or self.message
            if self.plain and (self._due() or (total is not None and done == total)):
                of = f"{done:,} of {total:,}" if total else f"{done:,}"
                self._write(f"{self.phase_name}: {of}{' · ' + message if message else ''}")

    def trials(self, snapshot: Mapping[str, Any]) -> None:
        """The sweep's state: see raycap.tune.board.Board.snapshot. Trials that end, notes and tokens are said once."""
        with self._lock:
            self.snapshot = dict(snapshot)
            for note in snapshot.get("notes", [])[self._notes :]:
                self.line(note)
            self._notes = len(snapshot.get("notes", []))
            for split, counts in snapshot.get("tokens", {}).items():
                if split not in self._tokens:
                    self.line(f"{split}: {token_line(counts)}")
                    self._tokens.add(split)
            for trial in snapshot.get("trials", []):
                state = trial["state"]
                if state != self._said.get(trial["trial_id"]) and state in (
                    "finished",
                    "stopped",
                    "diverged",
                    "failed",
                ):
                    if self.plain:
                        self._write(end_line(trial))
                    self._said[trial["trial_id"]] = state
            if self.plain and self._due():
                self._write(f"sweep: {totals_line(snapshot)}")

    def line(self, text: str) -> None:
        """Say something that stays on the screen."""
        with self._lock:
            if self._live is not None:
                self._live.console.print(f"[dim]{_stamp(self.elapsed)}[/dim]  ", _text(text), sep="")
            else:
                self._write(text)

    def done(self, message: str = "") -> None:
        """End the display: the last table stays on the screen."""
        with self._lock:
            self._close_phase()
            if self._live is not None:
                live, self._live = self._live, None
                self.ended = True
                live.stop()  # draws once more
                self.plain = True
            if message:
                self._write(message)

    @property
    def elapsed(self) -> float:
        return self.clock() - self.began

    @property
    def phase_elapsed(self) -> float:
        return self.clock() - self._phase_began

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.done()

    def _start(self) -> None:
        from rich.console import Console
        from rich.live import Live

        console = Console(file=self.stream)
        self._live = Live(
            console=console,
            get_renderable=lambda: draw(self, console, final=self.ended),
            refresh_per_second=REFRESH_PER_S,
            redirect_stdout=False,  # results on stdout are not this display's to move
            redirect_stderr=self.stream is sys.stderr,
            vertical_overflow="crop",
        )
        self._live.start()

    def _close_phase(self) -> None:
        if self.phase_name:
            now = self.clock()
            self.seconds[self.phase_name] = self.seconds.get(self.phase_name, 0.0) + now - self._phase_began
            self._phase_began = now
            self.phase_name = ""

    def _due(self) -> bool:
        if self.clock() - self._last_line < LINE_EVERY_S:
            return False
        self._last_line = self.clock()
        return True

    def _write(self, text: str) -> None:
        print(f"[{_stamp(self.elapsed)}] {text}", file=self.stream, flush=True)


def _is_terminal(stream: IO[str]) -> bool:
    import os

    return bool(getattr(stream, "isatty", lambda: False)()) and os.environ.get("TERM", "dumb") != "dumb"


def _text(text: str) -> Any:
    from rich.text import Text

    return Text(text)
