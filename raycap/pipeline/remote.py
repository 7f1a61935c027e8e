"""Work that holds a model, run in a Ray worker."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raycap.cluster import usable_cores
from raycap.errors import RaycapError, RunError


def in_worker(
    ray: Any,
    work: Callable[..., dict[str, Any]],
    *arguments: Any,
    log: Path,
    say: Callable[[str], None],
    **options: Any,
) -> dict[str, Any]:
    """Run `work` in a Ray worker with all of a node's cores (and a GPU where there is one); what it says reaches `say`.

    Raises what `work` raised where that is an error of ours, and RunError with the end of its traceback otherwise.
    """
    gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("", encoding="utf-8")
    task = ray.remote(_logged).options(num_cpus=1, num_gpus=gpus, max_retries=1)
    future = task.remote(work, str(log.absolute()), arguments, options)
    last = ""
    while not ray.wait([future], timeout=0.5)[0]:
        lines = log.read_text(encoding="utf-8").splitlines()
        if lines and lines[-1] != last:
            last = lines[-1]
            say(last)
    try:
        return ray.get(future)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, RaycapError):
            raise cause from error
        raise RunError(f"{work.__name__} failed with {type(cause).__name__}: {cause}. Its log is {log}.") from error


def _logged(work: Callable[..., Any], log: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """In the worker: `work` with a `say` that appends to `log`, and threads for all cores (Ray would give it one)."""

    def say(message: str) -> None:
        with open(log, "a", encoding="utf-8") as file:
            file.write(message + "\n")

    try:
        return work(*arguments, **options, threads=usable_cores(), say=say)
    except Exception:
        say(traceback.format_exc())
        raise
