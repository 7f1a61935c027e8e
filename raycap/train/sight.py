"""What a node of the cluster must see: files that the driver sees, found again under the same path."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterable
from pathlib import Path

from raycap.errors import RunError


def sight(what: str, path: Path | str, file: str, remedy: str) -> dict[str, str]:
    """A thing to look for: `path`, known to people as `what`, in which `file` has the content that it has here."""
    return {"what": what, "path": str(path), "file": file, "sha256": _hash(Path(path) / file), "remedy": remedy}


def missing(sights: Iterable[dict[str, str]], node: str = "") -> list[str]:
    """A sentence for each thing that this node does not see, or of which it sees another of the same name."""
    found = []
    for one in sights:
        here = _hash(Path(one["path"]) / one["file"])
        if here == one["sha256"]:
            continue
        how = "does not see" if not here else "sees another"
        found.append(f"node {node or socket.gethostname()} {how} {one['what']}={one['path']}. {one['remedy']}")
    return found


def require(sights: Iterable[dict[str, str]], node: str = "") -> None:
    """Raise RunError with what this node does not see."""
    if lacking := missing(sights, node):
        raise RunError(" ".join(lacking))


def _hash(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return ""
