"""The one way a person stops a run: Ctrl-C or SIGTERM. Once ends it in order, twice at once; both can be resumed.

`stoppable()` stands around a run. In it a signal raises `Stopped` in the main thread, and the run unwinds. A stage that
has something to finish first stands in `Stop.gently()`: there the first signal is only counted, and the stage looks at
`count`; the second raises. Blocks may be nested: the outermost owns the signals.
"""

from __future__ import annotations

import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_POLL_S = 0.05


class Stopped(KeyboardInterrupt):
    """A signal, in the main thread. No Exception, so that no `except Exception` on its way takes it for a failure."""

    def __init__(self, name: str):
        super().__init__(f"stopped by {name}")
        self.name = name


class Stop:
    """The signals so far."""

    def __init__(self) -> None:
        self.count = 0
        self.name = ""
        """What people call the last signal: Ctrl-C, SIGTERM."""
        self._gentle = 0

    def take(self, number: int, frame: Any = None) -> None:
        """The handler. It takes no lock: it runs between two instructions of the thread that might hold it."""
        self.count += 1
        self.name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        if self.count > 1 or not self._gentle:
            raise Stopped(self.name)

    @contextmanager
    def gently(self) -> Iterator[Stop]:
        """Here the first signal only counts: the stage finishes what it must and leaves on its own."""
        self._gentle += 1
        try:
            yield self
        finally:
            self._gentle -= 1

    def wait(self, seconds: float) -> None:
        """Sleep, but not past the next signal."""
        seen, deadline = self.count, time.monotonic() + seconds
        while self.count == seen and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, _POLL_S))


_current: Stop | None = None


@contextmanager
def stoppable() -> Iterator[Stop]:
    """SIGINT and SIGTERM are this block's; outside the main thread, which alone gets signals, there are none to count."""
    global _current
    if threading.current_thread() is not threading.main_thread():
        yield Stop()
        return
    if _current is not None:
        yield _current
        return
    stop = Stop()
    before = {number: signal.signal(number, stop.take) for number in SIGNALS}
    _current = stop
    try:
        yield stop
    finally:
        _current = None
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def hold_signals() -> None:
    """Take the signals back from a library that set handlers of its own (ray.init does, for SIGTERM)."""
    if _current is not None and threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, _current.take)


def resume_command(folder: Path | str) -> str:
    """What a person types to go on with a run, in the way in which this process was started."""
    verb = next((word for word in sys.argv[1:2] if word in ("sweep", "train")), "sweep")
    program = Path(sys.argv[0])
    if program.suffix == ".py" and program.parent.name == "jobs":
        words = ["python", str(program)]
    elif program.name == "__main__.py":
        words = ["python", "-m", "raycap", verb]
    else:
        words = ["raycap", verb]
    return shlex.join([*words, "--resume", str(folder)])
