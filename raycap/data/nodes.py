"""Which nodes of a cluster see the folder that `prepare` works in. Ray is handed in."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from raycap.files import write_atomic

LOOKED_FOR = "seen"
"""A file in the working folder of `prepare` that each node looks for."""
LOOK_TIMEOUT_S = 60.0
"""How long a node may take to start the process that looks."""


def nodes_that_see(ray: Any, folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The nodes with CPUs that see a file which is now in `folder`, and those that do not, or do not answer in time."""
    working = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU", 0) > 0]
    here = ray.get_runtime_context().get_node_id()
    if [node["NodeID"] for node in working] == [here]:
        return working, []
    mark = secrets.token_hex(16)
    write_atomic(folder / LOOKED_FOR, mark)
    pin = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    look = ray.remote(num_cpus=0, max_retries=0)(_sees)
    asked = {
        node["NodeID"]: look.options(scheduling_strategy=pin(node["NodeID"], soft=False)).remote(str(folder), mark)
        for node in working
    }
    ready, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=LOOK_TIMEOUT_S)
    sees: set[str] = set()
    for node_id, reference in asked.items():
        try:
            sees |= {node_id} if reference in ready and ray.get(reference) else set()
        except ray.exceptions.RayError:
            continue  # it has left, or cannot run raycap
    return [n for n in working if n["NodeID"] in sees], [n for n in working if n["NodeID"] not in sees]


def _sees(folder: str, mark: str) -> bool:
    try:
        return Path(folder, LOOKED_FOR).read_text() == mark
    except OSError:
        return False
