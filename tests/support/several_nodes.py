"""A Ray cluster of a head and two workers on this machine, whose workers may see less of the disk than the head.

Run as a program (argument: a folder to hide from the workers): prints {"address", "hidden"} as JSON, then takes
`kill NUMBER` (a worker and all its processes, as a lost machine) and `add 1` (one more) on stdin, and ends the cluster at its end.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CLONE_NEWNS = 0x00020000
QUIET = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}


class Nodes:
    """What a test holds of the cluster."""

    def __init__(self, process: subprocess.Popen):
        self.process = process
        said = process.stdout.readline()
        if not said:
            raise RuntimeError(f"the cluster did not start: {process.stderr.read()}")
        told = json.loads(said)
        self.address: str = told["address"]
        self.hidden: bool = told["hidden"]
        """Whether the workers see an empty folder in the place of the one to hide (not every system permits it)."""

    def kill(self, worker: int) -> None:
        print(f"kill {worker}", file=self.process.stdin, flush=True)
        assert self.process.stdout.readline().strip() == "killed"

    def add(self) -> None:
        print("add 1", file=self.process.stdin, flush=True)
        assert self.process.stdout.readline().strip() == "added"

    def environment(self) -> dict[str, str]:
        """For a driver on the head."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        return {**kept, **QUIET, "RAY_ADDRESS": self.address}


@contextmanager
def several_nodes(hide: Path) -> Iterator[Nodes]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | QUIET
    process = subprocess.Popen(
        [sys.executable, __file__, str(hide)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=environment,
    )  # fmt: skip
    try:
        yield Nodes(process)
    finally:
        process.stdin.close()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def hide(folder: str) -> bool:
    """Give processes that start from here on an empty folder in the place of `folder`; False where that is forbidden."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS):
        return False
    libc.mount(b"none", b"/", None, ctypes.c_ulong(0x4000 | 0x40000), None)  # private, recursively
    return libc.mount(b"none", folder.encode(), b"tmpfs", ctypes.c_ulong(0), None) == 0


def main() -> None:
    from ray.cluster_utils import Cluster

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints is not for our reader
    memory = {"object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **memory})
    try:
        hidden = hide(sys.argv[1])
        workers = [cluster.add_node(num_cpus=1, **memory) for _ in range(2)]
        print(json.dumps({"address": cluster.address, "hidden": hidden}), file=out, flush=True)
        for line in sys.stdin:
            verb, number = line.split()
            if verb == "kill":
                cluster.remove_node(workers[int(number)], allow_graceful=False)
                print("killed", file=out, flush=True)
            else:
                workers.append(cluster.add_node(num_cpus=1, **memory))
                print("added", file=out, flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
