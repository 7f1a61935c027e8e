"""One way to Ray: attach to the cluster that RAY_ADDRESS names, or start a private one that ends with us."""

from __future__ import annotations

import functools
import logging
import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from raycap.config import Config
from raycap.errors import RunError
from raycap.stop import hold_signals

NAMESPACE = "raycap"
"""Ray namespace of the named actors, so that tools can find them by name."""
PROBE_TIMEOUT_S = 5.0
"""ray.init waits for minutes on an address where nothing listens; a TCP connect knows at once."""
PACK_CPUS = 1.0
CLIENTS = 2
"""Tune trials alive at a time, for each pack. Each is a process of its own that costs a second of a core to start and
150 MB; a trial trains without its client, which only has to be there by its turn to tell Tune of its rungs."""
CLIENT_CPUS = 0.05
"""CPUs that one thin Tune trial asks for: it waits nearly all of its life."""
DATA_CPUS = 0.25
"""CPUs that one Ray Data task asks for."""

_QUIET = {
    # Read when Ray, Tune or Train are imported or start, so they are set before that.
    "RAY_USAGE_STATS_ENABLED": "0",
    # Threads that wait for each other look for some 30 us and then sleep: packs, data tasks and clients share the cores.
    # Sleeping at once (OMP_WAIT_POLICY=PASSIVE) doubles a small pack's step, which meets at hundreds of barriers.
    "GOMP_SPINCOUNT": "10000",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # Train's default of 2 s makes every report wait as long
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # the sweep keeps its own record; Tune's is never read back
    # A client that finds its trial ended, after a board's death, has nothing to report: no reason to end the sweep.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

_private = False


@contextmanager
def connect(
    config: Config | None = None,
    *,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    dashboard: bool = False,
    log: Path | None = None,
) -> Iterator[ModuleType]:
    """Yield the connected `ray` module; shut down on the way out what was started here, and nothing else.

    Inside another `connect` the running instance is used as it is. What Ray says goes to the file `log`; without one
    its errors go to stderr and the rest nowhere. Raises RunError when the cluster that RAY_ADDRESS names does not
    answer or does not let us in, or when no local one can be started.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield ray
        return
    address = os.environ.get("RAY_ADDRESS", "")
    if address and address != "local":
        probe(address)
        options = {"address": address}
        # Refused by a token, Ray's client prints a warning a second for twenty seconds. It is read at ray.init.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")
    else:
        _own_token()
        options = {
            "address": "local",
            "num_cpus": num_cpus or _embedded_cpus(config),
            "include_dashboard": dashboard,
        }
        if num_gpus is not None:
            options["num_gpus"] = num_gpus
    with _chatter(log):
        try:
            with _any_agent_port():
                level = logging.getLogger("ray").level
                ray.init(**options, namespace=NAMESPACE, log_to_driver=False, logging_level=level)
        except (ConnectionError, RuntimeError, OSError, ValueError) as error:
            if "address" in options and options["address"] != "local":
                raise RunError(f"{_not_let_in(address)} Ray says: {error}") from error
            raise RunError(f"cannot start a local Ray: {error}") from error
        except KeyboardInterrupt:
            ray.shutdown()  # what has started of it
            raise
        hold_signals()  # ray.init set a SIGTERM handler that ends the process before a run can note why
        for name in ("ray.tune", "ray.train", "ray.data", "ray.air"):
            logging.getLogger(name).setLevel(logging.ERROR)
        global _private
        _private = address in ("", "local")
        try:
            yield ray
        finally:
            _private = False
            ray.shutdown()


@contextmanager
def _chatter(log: Path | None) -> Iterator[None]:
    """Keep what Ray says in this process off the terminal, and stdout above all, which is for results.

    Two ways lead there: the logger `ray`, and the raylet's messages, which Ray prints to stdout and has no setting for.
    """
    import ray

    logger, worker = logging.getLogger("ray"), ray._private.worker
    before = logger.handlers[:], logger.level, worker.print_to_stdstream
    if log is not None:
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            file = logging.FileHandler(log, encoding="utf-8", delay=True)
        except OSError as error:
            raise RunError(f"cannot write {log}: {error.strerror}. Choose another run.dir.") from error
        logger.handlers[:] = [file]
    logger.setLevel(logging.ERROR if log is None else logging.INFO)

    def raylet_said(data: dict[str, Any], ignore_prefix: bool = False) -> None:
        for line in data["lines"]:
            logger.warning("(%s) %s", data.get("pid"), str(line).strip())

    worker.print_to_stdstream = raylet_said
    try:
        yield
    finally:
        logger.handlers[:], worker.print_to_stdstream = before[0], before[2]
        logger.setLevel(before[1])


@contextmanager
def _any_agent_port() -> Iterator[None]:
    """A Ray that starts meanwhile takes any free port for its agent, which `ray.init` has no setting for.

    With Ray's fixed one a cluster head that is started on this machine later finds no port for its own agent, and
    answers every `ray job submit` with "No available agent to submit job".
    """
    from ray._private import parameter

    usual = parameter.RayParams
    parameter.RayParams = functools.partial(usual, dashboard_agent_listen_port=0)
    try:
        yield
    finally:
        parameter.RayParams = usual


def _not_let_in(address: str) -> str:
    """Why a cluster that listens did not take us: nearly always the token."""
    mode = os.environ.get("RAY_AUTH_MODE", "")
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"
    token = "the one in RAY_AUTH_TOKEN" if os.environ.get("RAY_AUTH_TOKEN") else f"the one in {path}"
    if mode.lower() == "token":
        held = f"the token here is {token}"
    else:
        held = f"no token is sent, because RAY_AUTH_MODE is {mode or 'not set'}"
    return (
        f"the Ray cluster at RAY_ADDRESS={address} listens but did not let us join. If it asks for a token: {held}; set "
        "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN to the cluster's own token."
    )


def private() -> bool:
    """Whether the connected Ray was started by `connect` for this process alone."""
    return _private


def title(name: str) -> None:
    """Call this Ray worker `name` where a person lists processes: `ps`, `top`, the dashboard's page of a node."""
    import ray

    ray._raylet.setproctitle(f"ray::raycap {name}")


def probe(address: str, timeout_s: float = PROBE_TIMEOUT_S) -> None:
    """Raise RunError unless something accepts TCP connections at `address` (host:port or ray://host:port)."""
    if address == "auto":
        return  # Ray looks in its own files and fails fast
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator or not port.isdigit():
        raise RunError(f"RAY_ADDRESS={address!r} is not host:port. Unset it to use a private local Ray.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s).close()
    except OSError as error:
        raise RunError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({error.strerror or error}). "
            "Start it with `ray start --head`, or unset RAY_ADDRESS to use a private local Ray."
        ) from error


def usable_cores() -> int:
    """Cores this process may run on, which a container or `taskset` can make fewer than the machine has."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def pack_resources(ray: ModuleType, packs: int, clients: int, workers: int = 1) -> dict[str, float]:
    """What each of a pack's workers asks for on this cluster: a CPU, and a GPU where there are any or an autoscaler brings
    some.

    Raises RunError for packs that can never all run, because Train would wait for ever. On a cluster that nodes may
    still join, that is only where its autoscaler says how much it can bring.
    """
    have, most = ray.cluster_resources(), autoscaled(ray)
    want = {"CPU": PACK_CPUS}
    if max(have.get("GPU", 0), most.get("GPU", 0)) >= 1:
        want["GPU"] = 1.0
    if not (private() or most):
        return want
    limit = {name: max(have.get(name, 0), most.get(name, 0)) for name in want}
    can = f"and its autoscaler brings it to {most.get('GPU', 0):g} at most" if most else "and no node can join it"
    asked, lower, each = f"tune.packs={packs}", "Lower tune.packs.", f"{packs} packs of {PACK_CPUS:g}"
    if workers > 1:
        asked, lower = f"{asked} x train.workers={workers}", "Lower train.workers or tune.packs."
        each = f"{packs * workers} workers of packs, {PACK_CPUS:g} each"
    if want.get("GPU") and packs * workers > limit["GPU"]:
        raise RunError(
            f"{asked} asks for {packs * workers} GPUs, the cluster has {have.get('GPU', 0):g} {can}. {lower}"
        )
    need = packs * workers * PACK_CPUS + clients * CLIENT_CPUS + DATA_CPUS
    if need > limit["CPU"]:
        raise RunError(
            f"the sweep needs {need:g} CPUs ({each}, {clients} trial clients of {CLIENT_CPUS}, "
            f"{DATA_CPUS} for reading), the cluster has {have.get('CPU', 0):g}. {lower}"
        )
    return want


def devices(ray: ModuleType) -> str:
    """What a run computes on, in words."""
    have = ray.cluster_resources()
    if count := have.get("GPU", 0):
        kinds = sorted(name.partition(":")[2] for name in have if name.startswith("accelerator_type:"))
        return f"{count:g} GPU{'s' if count > 1 else ''}" + (f" ({', '.join(kinds)})" if kinds else "")
    nodes = sum(node["Alive"] for node in ray.nodes())
    return f"CPU, {have.get('CPU', 0):g} cores on {nodes} nodes" if nodes > 1 else f"CPU, {usable_cores()} cores"


def autoscaled(ray: ModuleType) -> dict[str, float]:
    """What the cluster's autoscaler can bring it to, by resource; empty where there is none, or it does not say."""
    state = getattr(getattr(ray, "_private", None), "state", None)
    try:
        return dict(state.state.get_max_resources_from_cluster_config() or {})
    except Exception:  # a private call of Ray's: without its answer the sweep waits for nodes, and says so
        return {}


def beside_driver(ray: ModuleType, want: Mapping[str, float]) -> dict[str, str]:
    """A label selector that keeps work on the driver's node, whose run folder it reads and writes.

    Empty on a single node, and where the driver's node lacks what the work wants: then another one must see the folder.
    """
    nodes = [n for n in ray.nodes() if n["Alive"]]
    here = ray.get_runtime_context().get_node_id()
    mine = next((n["Resources"] for n in nodes if n["NodeID"] == here), {})
    enough = all(mine.get(name, 0) >= amount for name, amount in want.items())
    return {"ray.io/node-id": here} if len(nodes) > 1 and enough else {}


def _embedded_cpus(config: Config | None) -> int:
    """Logical CPUs of a private Ray: the machine's, and never fewer than the sweep's own processes book."""
    packs = config.tune.packs if config else 1
    workers = packs * config.train.workers if config else 1
    booked = workers * PACK_CPUS + packs * CLIENTS * CLIENT_CPUS + 2 * DATA_CPUS
    return max(2, usable_cores(), int(-(-booked // 1)))


def _own_token() -> None:
    """Protect a private Ray by a token that lives in this process's environment alone.

    A local ray.init turns token mode on (its ports listen on every interface), and would write a token it has to make
    itself to ~/.ray/auth_token. RAY_AUTH_MODE is left to the user and to Ray, which reads it only when it is imported.
    """
    given = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ)
    if not given and os.environ.get("RAY_AUTH_MODE", "token").lower() == "token":
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
