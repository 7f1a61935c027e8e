"""The Ray Train rim of a pack: what `TorchTrainer` runs in its worker, and how a pack reaches data, board, checkpoints."""

from __future__ import annotations

import importlib
import importlib.util
import os
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from raycap.cluster import title, usable_cores
from raycap.config import Config, from_dict
from raycap.data.lock import FileLock
from raycap.data.store import FillerGone
from raycap.errors import RaycapError, RunError
from raycap.train.keeper import TrainKeeper
from raycap.train.pack import Pack
from raycap.train.shelf import Shelf
from raycap.train.sight import require

ENGINE = "raycap.train.worker:build_engine"
"""Where a job says what builds its engine: module:attribute, or file.py:attribute."""
WATCH_S = 3.0
"""Time between a worker's questions whether its pack is still its own."""
ORPHAN_S = 60.0
"""How long a worker waits for one of the same pack that outlived its driver or controller; it leaves within WATCH_S."""


def pack_loop(job: dict[str, Any]) -> None:
    """Train one pack until its trials have ended or it is asked to stop; on each of its train.workers workers.

    job: config, pack (its number), run_dir, storage (url of the run's place, or ""), seen (what this node must see),
    board and namespace (of the actor), driver (whose board it is), rungs, packs, engine, shards. An error that a restart
    would meet again goes to the board, and the loop returns; any other is raised, so that Train starts the worker anew.
    """
    import ray

    name = f"pack-{job['pack']}"
    config = from_dict(job["config"])
    group = _group(config)
    rank = group.rank if group else 0
    title(f"{name}{f' worker {rank}' if rank else ''} of {config.run.name or Path(job['run_dir']).name}")
    try:
        board = ray.get_actor(job["board"], namespace=job["namespace"])
        mine = ray.get(board.driver.remote()) == job["driver"]
    except (ValueError, ray.exceptions.RayActorError):
        mine = False
    if not mine and job.get("storage"):
        return  # it waited for a node until the sweep was over
    node = f"{socket.gethostname()} ({ray.get_runtime_context().get_node_id()[:8]})"
    try:
        if mine:
            require(job.get("seen", []), node)
        shelf = Shelf(job, f"{name}-worker-{rank}" if rank else name)
    except RaycapError as error:
        ray.get(board.fail.remote(type(error).__name__, error.message))
        if group:
            group.leave()  # or the others would wait for this worker
        return
    if mine and not rank:
        board.arrive.remote(name)
    with closing(shelf), _log_file(shelf.log_file) as log:
        log(f"{name} starts: pid {os.getpid()} on {node}, parent {os.getppid()}")
        if not mine:
            log("the driver that it belongs to is gone: leaving")
            return
        feed = lock = None
        try:
            if not rank:
                lock = sole_worker(shelf.folder / "checkpoints" / "train" / f"{name}.lock", log)
            build = load_attribute(job.get("engine") or ENGINE)
            engine, checkpoints, feed = build(config, {**job, "group": group}, log)
            link = BoardLink(board, name, getattr(feed, "tokens", dict), log)
            if rank:
                from raycap.train.group import follow

                log(f"ends: {follow(engine, group, {'watch': link.watch_as, 'report': _report_nothing})}")
                return
            keeper = TrainKeeper(shelf.checkpoints, name, checkpoints, log, saved=shelf.publish_log)
            if group:
                from raycap.train.group import Lead

                engine = Lead(engine, group, log)
                link.registered = lambda: engine.say("watch", nonce=link.nonce)
                keeper.reporting = lambda: engine.say("report", saves=keeper.saves)
            shelf.fetch_ended()
            pack = Pack(
                engine,
                link,
                keeper,
                rungs=job["rungs"],
                select_by=config.train.select_by,
                adapters=shelf.adapters,
                publish=shelf.publish,
                checkpoint_every_s=config.train.checkpoint_every_s,
                prune_collapsed=config.tune.prune_collapsed,
                log=log,
            )
            reason = pack.run()
            if group:
                engine.say("end", reason=reason)
            log(f"ends: {reason}")
            if hasattr(engine, "padding"):
                log(engine.padding.line())
        except Exception as error:
            error = getattr(feed, "error", None) or error
            log("".join(traceback.format_exception(error)))
            said = None if isinstance(error, FillerGone) else _raycap_error(error)
            if said is not None:
                ray.get(board.fail.remote(type(said).__name__, said.message))
            if group:
                group.leave()  # or the others would wait for this worker
            if said is None and not (group and ray.get(board.snapshot.remote())["error"]):
                raise
        finally:
            if lock is not None:
                lock.release()
            shelf.publish_log()


def _group(config: Config) -> Any:
    """The workers of this pack, or None for one alone."""
    if config.train.workers == 1:
        return None
    from raycap.train.group import connected

    return connected()


def _report_nothing(saves: int) -> None:
    """A checkpoint is worker 0's; Train wants a word of all workers."""
    import ray.train

    ray.train.report({"saves": saves})


def sole_worker(path: Path, log: Callable[[str], None], patience_s: float = ORPHAN_S) -> FileLock:
    """The lock that a pack's worker holds while it lives: two of them never write the same checkpoints and adapters.

    Raises:
        RunError: another worker of this pack lives on.
    """
    lock, deadline, told = FileLock(path), time.monotonic() + patience_s, ""
    while not lock.try_acquire():
        if time.monotonic() > deadline:
            raise RunError(f"{lock.holder} still trains in {path.parent}. End it, then use --resume.")
        if not told:
            told = lock.holder
            log(f"waits for {told}, an earlier worker of this pack, to leave")
        time.sleep(0.2)
    return lock


class BoardLink:
    """Calls to the board's actor. A restarted board answers `unknown`, and the pack registers anew.

    `tokens` tells of each split that is in what the tokeniser made of it (Feed.tokens).
    """

    def __init__(
        self,
        board: Any,
        pack: str,
        tokens: Callable[[], dict[str, Any]] = dict,
        log: Callable[[str], None] = lambda line: None,
    ):
        self.board, self.pack, self.nonce, self.tokens, self.log = board, pack, uuid.uuid4().hex, tokens, log
        self.registered: Callable[[], None] = lambda: None
        """Called when the board has taken this worker as the pack's."""
        self._watch: threading.Thread | None = None

    def register(self, report: dict[str, Any]) -> dict[str, Any]:
        import ray

        orders = ray.get(self.board.register.remote(self.pack, self.nonce, os.getpid(), report))
        self.watch_as(self.nonce)
        self.registered()
        return orders

    def watch_as(self, nonce: str) -> None:
        """Watch from now on whether the worker known by `nonce`, this one or the first of its group, is still its pack's.

        Not before the board knows it: until then the worker before counts.
        """
        self.nonce = nonce
        if self._watch is None:
            self._watch = threading.Thread(target=self.watch, args=(self.log,), daemon=True)
            self._watch.start()

    def exchange(self, report: dict[str, Any], wait_s: float) -> dict[str, Any]:
        import ray

        report = {**report, "memory_bytes": memory_bytes(), "tokens": self.tokens()}
        return ray.get(self.board.exchange.remote(self.pack, self.nonce, report, wait_s))

    def watch(self, log: Callable[[str], None]) -> None:
        """End this process when its pack has another worker or its board is gone, whatever the main thread waits for.

        A worker can outlive its controller, and would keep the CPU or GPU that its successor waits for.
        """
        import ray

        while True:
            time.sleep(WATCH_S)
            try:
                alive = ray.get(self.board.alive.remote(self.pack, self.nonce), timeout=60)
            except ray.exceptions.GetTimeoutError:
                continue
            except ray.exceptions.RayError as error:
                log(f"the board is gone ({type(error).__name__}): leaving")
                os._exit(1)
            if not alive:
                log("another worker takes this pack's place: leaving")
                os._exit(1)

    def goodbye(self) -> None:
        import ray

        ray.get(self.board.goodbye.remote(self.pack, self.nonce))


def memory_bytes() -> int:
    """What this worker holds: of the GPU where there is one, else of this machine's memory."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.memory_reserved()
    import psutil

    return psutil.Process().memory_info().rss


def load_attribute(place: str) -> Any:
    """`package.module:attribute` or `/path/file.py:attribute`."""
    module, _, attribute = place.rpartition(":")
    if module.endswith(".py"):
        name = f"raycap_extern_{Path(module).stem}"
        spec = importlib.util.spec_from_file_location(name, module)
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[name] = loaded
        spec.loader.exec_module(loaded)
        return getattr(loaded, attribute)
    return getattr(importlib.import_module(module), attribute)


@contextmanager
def _log_file(path: Path) -> Iterator[Callable[[str], None]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = threading.Lock()
    with open(
        path, "ab", buffering=0
    ) as file:  # unbuffered: on a full disk nothing is left over that close would raise

        def log(line: str) -> None:
            with lock:
                now = time.time()
                stamp = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(now))}.{int(now * 1000) % 1000:03d}"
                try:
                    file.write(f"{stamp} {line}\n".encode())
                except OSError:
                    pass  # a full disk: what matters is said to the board

        yield log


def _raycap_error(error: BaseException) -> RaycapError | None:
    """The error of ours behind what Ray made of it, or None."""
    from raycap.data.stream import data_error

    seen = error
    while seen is not None:
        if isinstance(seen, RaycapError):
            return seen
        seen = seen.__cause__ or getattr(seen, "cause", None)
    return data_error(error)


def build_engine(config: Config, job: dict[str, Any], log: Callable[[str], None]) -> tuple[Any, Any, Any]:
    """(engine, its checkpoints, feed): the base loaded here, rows arriving while it loads and trains."""
    import torch

    from raycap.data.parquet import open_shards
    from raycap.models import load_model
    from raycap.train import checkpoint
    from raycap.train.alone import engine_class
    from raycap.train.feed import Feed
    from raycap.train.keeping import keep_or_not
    from raycap.train.shelf import run_storage

    kind = engine_class(config)  # what cannot be is told before the base loads
    # Ray sets one thread for a worker of one CPU; the packs of a machine share all of its cores.
    torch.set_num_threads(max(1, usable_cores() // (job["packs"] * config.train.workers)))
    shards = open_shards(job["shards"])
    feed = Feed(config, shards, job["shards"], log)
    began = time.monotonic()
    cm = load_model(config.model, config.data, lang=config.evaluate.lang)
    log(
        f"base {config.model.path}: {cm.quantisation}, computes in {cm.compute_dtype}, {time.monotonic() - began:.1f} s"
    )
    engine = kind(cm, feed.stores, config, config.tune.slots, job.get("group"))
    keep_or_not(
        engine.images, feed.stores, config, run_storage(job), rungs=job["rungs"], trials=job["trials"], packs=job["packs"],
        piece=engine.images_at_once(), log=log,
    )  # fmt: skip
    return engine, checkpoint, feed
