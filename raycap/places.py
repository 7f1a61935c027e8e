"""Where a relative path lies in a Ray job, which runs in an unpacked copy of the submitted folder that Ray deletes."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

HOME = "RAYCAP_HOME"
"""Variable that names the folder which relative paths of a job are taken from; without it the user's home folder."""


def in_copy() -> bool:
    """Whether the working folder is such a copy."""
    try:
        parts = Path.cwd().parts
    except FileNotFoundError:  # deleted already
        return True
    return ("runtime_resources", "working_dir_files") in pairwise(parts)


def kept(path: Path | str) -> Path:
    """Where to write what is to stay: a relative `path` of a job lies under $RAYCAP_HOME or the home folder.

    Everywhere else, and for absolute paths, it is `path` itself.
    """
    path = Path(path).expanduser()
    if path.is_absolute() or not in_copy():
        return path
    return Path(os.environ.get(HOME) or Path.home()).expanduser() / path


def found(path: Path | str) -> Path:
    """Where to read: what the job's copy holds comes first, then what an earlier job kept."""
    path = Path(path).expanduser()
    return path if path.exists() else kept(path)


def hint(path: Path | str) -> str:
    """A sentence for errors about a relative path that a job looks for in vain; empty elsewhere."""
    if Path(path).expanduser().is_absolute() or not in_copy():
        return ""
    return (
        " A job sees the folder it was submitted with, without what .rayignore leaves out: "
        "give an absolute path that all nodes see."
    )
