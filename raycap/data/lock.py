"""A file lock between processes, let go by the system when its holder dies, however it dies."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path

from raycap.errors import RunError


class FileLock:
    """An exclusive lock on `path`; as a context it waits for its turn. The file says who holds it."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._handle: int | None = None

    @property
    def held(self) -> bool:
        return self._handle is not None

    @property
    def holder(self) -> str:
        """Who has it, or had it last: `process 123 on host`."""
        try:
            return self.path.read_text(encoding="utf-8").strip() or "another process"
        except (OSError, ValueError):
            return "another process"

    def try_acquire(self) -> bool:
        """Take the lock if nobody holds it; never waits.

        Raises:
            RunError: the folder cannot be written.
        """
        if self.held:
            return True
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise RunError(
                f"cannot write {self.path.parent}: {error.strerror}. Choose a folder you may write to."
            ) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return False
        self._handle = handle
        try:
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        except OSError:
            pass  # a full disk: the lock holds without its note
        return True

    def acquire(self, poll_s: float = 0.1) -> None:
        """Take the lock, waiting for whoever holds it."""
        while not self.try_acquire():
            time.sleep(poll_s)

    def release(self) -> None:
        """Let go. The file stays: removing it would let two processes lock two files of one name."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __enter__(self) -> FileLock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
