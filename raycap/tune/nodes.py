"""The nodes of a cluster: whether each sees what a sweep needs, which packs find a place, and where the next one goes."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from raycap.config import Config
from raycap.errors import RunError
from raycap.files import write_atomic
from raycap.storage import is_url
from raycap.train.sight import missing, sight

LOOK_TIMEOUT_S = 60.0
"""How long a node may take to start the process that looks."""
_SHARE = (
    "Put it in a folder that all nodes mount under the same path, or set run.storage (a mounted path, s3://, gs://)."
)


def things_to_see(config: Config, run_dir: Path, shards: str, storage_path: Path | None) -> list[dict[str, str]]:
    """What every node that works for this sweep must see, as raycap.train.sight looks for it.

    `shards` is where the packs read them, `storage_path` the run's place in the storage where that is a path.
    """
    from raycap.data.parquet import MANIFEST

    wanted = []
    if not config.run.storage:
        write_atomic(run_dir / "checkpoints" / "node-check", secrets.token_hex(16))
        wanted.append(sight("run.dir", run_dir, "checkpoints/node-check", _SHARE))
    elif storage_path is not None:
        write_atomic(storage_path / "node-check", secrets.token_hex(16))
        remedy = "Mount it there too, or use an object store (s3://, gs://)."
        wanted.append(sight("run.storage", storage_path, "node-check", remedy))
    if shards and not is_url(shards) and not config.run.storage:
        wanted.append(sight("the shards", shards, MANIFEST, _SHARE))
    base = Path(config.model.path).expanduser()
    if base.is_dir() and (base / "config.json").is_file():
        remedy = "Put the base in a folder that all nodes mount under the same path, or give a hub id."
        wanted.append(sight("model.path", base.absolute(), "config.json", remedy))
    return wanted


def working_nodes(ray: Any) -> list[dict[str, Any]]:
    """The nodes that may be given work, {NodeID, NodeManagerHostname, NodeManagerAddress, Resources, ...} each."""
    return [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU", 0) > 0]


def check_nodes(ray: Any, wanted: list[dict[str, str]]) -> None:
    """Let each node but the driver's look for what it must see.

    Raises:
        RunError: a node does not see something, or does not answer; node, path and remedy are named.
    """
    here = ray.get_runtime_context().get_node_id()
    pin = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    look = ray.remote(num_cpus=0, max_retries=0)(missing)
    asked = {
        look.options(scheduling_strategy=pin(n["NodeID"], soft=False)).remote(wanted, _name(n)): n
        for n in working_nodes(ray)
        if n["NodeID"] != here
    }
    said: list[str] = []
    for reference, node in asked.items():
        try:
            said += ray.get(reference, timeout=LOOK_TIMEOUT_S)
        except ray.exceptions.GetTimeoutError as error:
            raise RunError(
                f"node {_name(node)} has not started a process within {LOOK_TIMEOUT_S:.0f} s. Look at it with "
                "`ray status`, or take it out of the cluster."
            ) from error
        except ray.exceptions.NodeDiedError:
            continue  # it has left meanwhile: nothing will be sent there
        except ray.exceptions.RayError as error:
            text = str(error).strip().splitlines()[-1]
            raise RunError(
                f"node {_name(node)} cannot run raycap: {text}. Install the same version there, or submit the job with "
                "--working-dir."
            ) from error
    if said:
        raise RunError("\n".join(dict.fromkeys(said)))


def fits(resources: Mapping[str, float], want: Mapping[str, float]) -> int:
    """How many packs that ask for `want` find room in `resources`."""
    return int(min((resources.get(name, 0.0) + 1e-6) // amount for name, amount in want.items()))


def without_room(ray: Any, packs: int, want: Mapping[str, float], workers: int = 1) -> int:
    """How many of the packs, of `workers` that ask for `want` each, find no room on the nodes there are, were these empty."""
    return max(0, packs - sum(fits(n["Resources"], want) for n in working_nodes(ray)) // workers)


def seats(nodes: Iterable[Mapping[str, Any]], want: Mapping[str, float], driver: str = "") -> list[str]:
    """Node ids in the order in which packs take them: one on each node, then a second one, ..., the driver's last."""
    room = {n["NodeID"]: fits(n["Resources"], want) for n in nodes}
    order = sorted(room, key=lambda node: (node == driver, node))
    return [node for turn in range(max(room.values(), default=0)) for node in order if room[node] > turn]


def spread(pack: int, want: dict[str, float], driver: str, workers: int = 1) -> Any:
    """A callback of Ray Train that picks a node for the pack's workers whenever they are started.

    Ray fills one node before the next, and a label that Train is given once would be waited for after its node's death.
    """
    from ray.train.v2._internal.execution.callback import ControllerCallback

    class Spread(ControllerCallback):
        def on_controller_start_worker_group(self, *, scaling_config: Any, num_workers: int) -> dict[str, str] | None:
            try:
                node = pick(pack, {name: amount * workers for name, amount in want.items()}, driver)
            except Exception:  # placing is a favour; Ray finds a place by itself
                node = ""
            return {"ray.io/node-id": node} if node else None

    return Spread()


def pick(pack: int, want: Mapping[str, float], driver: str) -> str:
    """The node for a pack that wants so much in all: its own seat, else one with room; empty leaves it to Ray, which
    waits for one to join, and puts several workers on several nodes where none has room for all."""
    import ray
    from ray._private.state import available_resources_per_node

    nodes = working_nodes(ray)
    if len(nodes) < 2:
        return ""
    free = available_resources_per_node()
    order = seats(nodes, want, driver)
    first = order[pack : pack + 1]
    return next((node for node in [*first, *order] if fits(free.get(node, {}), want)), "")


def _name(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {node['NodeID'][:8]})"
