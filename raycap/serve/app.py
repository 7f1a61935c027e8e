"""The Ray Serve deployment: a replica holds the model, gathers images into batches, and answers the HTTP endpoints."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import serve

from raycap.cluster import beside_driver
from raycap.config import Config, from_dict
from raycap.errors import ModelError, RunError
from raycap.export.folder import MANIFEST, verify
from raycap.serve.client import wait_healthy
from raycap.serve.ports import find_port

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

APP = "raycap"
REPLICA_CPUS = 0.25
"""What a replica reserves: little, to find a place beside the rest of a run. Its threads are set apart from it."""
_LOGGING = {"log_level": "WARNING", "enable_access_log": False}
SHUTDOWN_S = 30.0
"""A replica that goes has this long to answer what it holds: more than a batch takes."""


class CaptionServer:
    """One replica: the promoted model, its batch queue, and the endpoints over both."""

    def __init__(self, settings: dict[str, Any], folder: str, name: str, threads: int):
        from raycap.export.captioner import Captioner
        from raycap.serve.meter import Meter

        self.name = name
        self._config = from_dict(settings)
        self._captioner = Captioner.load(self._config, Path(folder), threads=threads)
        self._meter = Meter(model=name, replica=serve.get_replica_context().replica_id.unique_id)
        self._run.set_max_batch_size(self._config.serve.max_batch)
        self._run.set_batch_wait_timeout_s(self._config.serve.batch_wait_s)

    def __serve_build_asgi_app__(self):
        from raycap.serve.endpoints import build_app

        return build_app(self, self._config, self._meter)

    async def caption(self, images: list[Image.Image]) -> list[str]:
        """Captions of `images`; each goes into the queue alone, so that batches fill from all requests."""
        prepared = await asyncio.to_thread(lambda: [self._captioner.prepare(image) for image in images])
        answers = await asyncio.gather(*(self._run(pixels) for pixels in prepared))
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    @serve.batch
    async def _run(self, batch: list[np.ndarray]) -> list[str | Exception]:
        """One pass of the model over uint8 images [3, H, W]; an item that fails does not fail its neighbours."""
        # In a thread, because a blocked event loop fails health checks; one at a time (max_concurrent_batches is 1).
        captions = await asyncio.to_thread(_caption_each, self._captioner, batch)
        self._meter.batch(len(batch))
        return captions


def _caption_each(captioner: Any, batch: list[np.ndarray]) -> list[str | Exception]:
    try:
        return captioner.caption(batch)
    except Exception as error:
        # Raised in here it would be every caller's error: find the one that it belongs to.
        return [error] if len(batch) == 1 else [answer for item in batch for answer in _caption_each(captioner, [item])]


@dataclass(frozen=True, slots=True)
class Served:
    """A running server."""

    url: str
    name: str
    """The model's id in /v1/models."""

    def shutdown(self) -> None:
        shutdown()


def deploy(config: Config, model_dir: Path | str, port: int | None = None) -> Served:
    """Serve the model folder on `config.serve.host` and return once it answers; `port` 0 takes a free one.

    Ray must be connected. One server at a time runs in a Ray instance.

    Raises:
        ModelError: the folder is missing, unfinished or changed.
        RunError: the port is in use, a server runs already, or the replica did not start (its own reason is named).
    """
    folder = Path(model_dir).resolve()
    name = f"{config.run.name or APP}-{_variant(folder)}"
    host = config.serve.host
    port = find_port(host, config.serve.port if port is None else port)
    if _controller():
        raise RunError("Ray Serve runs already in this Ray instance: shut it down first, or use another Ray instance")
    _quiet()
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": host, "port": port},
            logging_config=_LOGGING,
        )
        serve.run(_bind(config, folder, name), name=APP, route_prefix="/")
        served = Served(f"http://{_reachable(host)}:{port}", name)
        wait_healthy(served.url)
    except BaseException as error:
        reason = _reason(error) if isinstance(error, Exception) else ""
        shutdown()
        if not reason or isinstance(error, RunError):
            raise
        raise RunError(f"{folder} could not be served on {host}:{port}: {reason}") from error
    return served


def shutdown() -> None:
    """Stop the server: requests in work are answered, then replicas and proxy end. Nothing happens where none runs."""
    if not ray.is_initialized() or not (controller := _controller()):
        return
    try:
        # The call ends with the controller's own death. serve.shutdown() alone makes it with endless retries, and then
        # Ray prints that a task has failed.
        ray.get(controller.graceful_shutdown.options(max_task_retries=0).remote(), timeout=SHUTDOWN_S)
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
        pass
    serve.shutdown()


@contextmanager
def serving(config: Config, model_dir: Path | str, port: int | None = None) -> Iterator[Served]:
    """`deploy` for the length of a block."""
    served = deploy(config, model_dir, port)
    try:
        yield served
    finally:
        served.shutdown()


def _bind(config: Config, folder: Path, name: str):
    s = config.serve
    gpus = ray.cluster_resources().get("GPU", 0)
    share = min(1.0, gpus / s.replicas)
    here = beside_driver(ray, {"CPU": s.replicas * REPLICA_CPUS, "GPU": s.replicas * share})
    # All cores of the machine: a run serves when its training is over.
    threads = max(1, (os.cpu_count() or 1) // s.replicas)
    held = 2 * s.max_queue + s.max_batch
    deployment = serve.deployment(
        name="captioner",
        num_replicas=s.replicas,
        # On the node where the model's folder lies, when that can hold all replicas.
        ray_actor_options={"num_cpus": REPLICA_CPUS, "num_gpus": share, **({"label_selector": here} if here else {})},
        # Above our own limit, so that the replica refuses first: its 503 says when to come back, the proxy's does not.
        max_ongoing_requests=held,
        max_queued_requests=held,
        logging_config=_LOGGING,
        graceful_shutdown_timeout_s=SHUTDOWN_S,
    )(serve.ingress()(CaptionServer))
    return deployment.bind(config.to_dict(), str(folder), name, threads)


def _variant(folder: Path) -> str:
    """The folder's variant once its hashes are checked; a plain model in the hub's layout goes by its folder's name."""
    if (folder / MANIFEST).is_file():
        return str(verify(folder).get("variant") or folder.name)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is no model folder: it has neither {MANIFEST} nor config.json")
    return folder.name


def _controller() -> Any:
    """Serve's controller in this Ray instance, or None where Serve does not run."""
    try:
        return ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return None


def _reachable(host: str) -> str:
    """The address a client on this machine uses for what `host` listens on."""
    if host in ("0.0.0.0", "::", ""):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def _reason(error: Exception) -> str:
    """The replica's own error, which Serve keeps as a traceback in its status; `error`'s text when there is none."""
    messages = [str(error)]
    if _controller():
        for application in serve.status().applications.values():
            messages = [deployment.message for deployment in application.deployments.values()] + messages
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    named = [line for line in lines if line.partition(":")[0].endswith("Error")]
    return (named[-1:] or lines[-1:] or [type(error).__name__])[0]


def _quiet() -> None:
    """Keep Serve's news of each step out of the terminal; warnings and errors stay."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
