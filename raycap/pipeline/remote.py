"""Work that holds a model, run in a Ray worker."""

from __future__ import annotations

import secrets
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raycap.cluster import beside_driver, usable_cores
from raycap.errors import RaycapError, RunError
from raycap.files import write_atomic
from raycap.train.sight import require, sight

_SHARE = (
    "Export runs beside the driver where its node has what it takes: start the driver on a node with a GPU, or put "
    "run.dir in a folder that all nodes mount."
)


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
    here = beside_driver(ray, {"CPU": 1, "GPU": gpus})
    task = ray.remote(_logged).options(num_cpus=1, num_gpus=gpus, max_retries=1, label_selector=here or None)
    write_atomic(log.with_suffix(".check"), secrets.token_hex(16))
    seen = [sight("run.dir (logs)", log.parent, log.with_suffix(".check").name, _SHARE)]
    future = task.remote(work, str(log.absolute()), seen, arguments, options)
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


def _logged(
    work: Callable[..., Any],
    log: str,
    seen: list[dict[str, str]],
    arguments: tuple[Any, ...],
    options: dict[str, Any],
) -> Any:
    """In the worker: `work` with a `say` that appends to `log`, and threads for all cores (Ray would give it one)."""

    require(seen)

    def say(message: str) -> None:
        with open(log, "a", encoding="utf-8") as file:
            file.write(message + "\n")

    try:
        return work(*arguments, **options, threads=usable_cores(), say=say)
    except Exception:
        say(traceback.format_exc())
        raise
