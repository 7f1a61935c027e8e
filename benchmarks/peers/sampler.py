"""CPU seconds and peak memory of a process and all that it started, by looking now and then."""

from __future__ import annotations

import threading
from typing import Any

LOOK_EVERY_S = 2.0
MEMORY_EVERY = 8
"""Looks between two at memory. Proportional memory costs the kernel a walk over every page of every process, in which
the process cannot map any: at each look the sides paid 8 % of a core for it."""


class TreeSampler(threading.Thread):
    """Runs until `stop`. Children are remembered once seen, so that those whose parent died first still count."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        import psutil

        self.psutil = psutil
        self.known: dict[tuple[int, float], Any] = {}
        self.cpu: dict[tuple[int, float], float] = {}
        self.peak_bytes = 0
        self.looks = 0
        self._ended = threading.Event()
        self._add(psutil.Process(pid))

    def run(self) -> None:
        while not self._ended.wait(LOOK_EVERY_S):
            self.look()

    def stop(self) -> tuple[float, int]:
        """(CPU seconds, peak bytes of proportional memory)."""
        self._ended.set()
        self.join()
        return sum(self.cpu.values()), self.peak_bytes

    def look(self) -> None:
        memory, weigh = 0, self.looks % MEMORY_EVERY == 0
        self.looks += 1
        for key, process in list(self.known.items()):
            try:
                for child in process.children():
                    self._add(child)
                used = process.cpu_times()
                self.cpu[key] = used.user + used.system
                memory += _proportional(process) if weigh else 0
            except self.psutil.Error:
                del self.known[key]  # its last CPU seconds stay counted
        self.peak_bytes = max(self.peak_bytes, memory)

    def _add(self, process: Any) -> None:
        try:
            self.known.setdefault((process.pid, process.create_time()), process)
        except self.psutil.Error:
            pass


def _proportional(process: Any) -> int:
    """Bytes a process adds: pages that it shares are split among those that share them, where the system tells."""
    try:
        full = process.memory_full_info()
        return int(getattr(full, "pss", 0) or full.uss)
    except Exception:  # another user's process, or a system that does not tell
        return int(process.memory_info().rss)
