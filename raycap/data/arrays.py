"""The array files of a store: made, reserved on disk, taken over."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from raycap.errors import RunError
from raycap.files import read_whole, write_json


def make_files(folder: Path, layout: Mapping[str, Any]) -> None:
    """Make the arrays, or take those of a fill that was killed, with the rows that were ready.

    Pages of a killed process are the system's, in the order in which they were written, so that a `ready` flag is true;
    after a crash of the machine it may be on the disk before its row, and no row is taken for ready.
    """
    captions = sum(len(r) for r in layout["references"])
    arrays = {
        "pixels": ((len(layout["image_ids"]), *layout["image_shape"]), np.uint8),
        "tokens": ((captions, layout["max_tokens"]), np.int32),
        "lengths": ((captions,), np.int32),
        "prompt_lens": ((captions,), np.int32),
        "truncated": ((len(layout["image_ids"]),), np.int32),
        "unknown": ((len(layout["image_ids"]),), np.int32),
        "ready": ((len(layout["image_ids"]),), np.uint8),
    }
    try:
        if read_whole(folder / "layout.json") == layout and _whole(folder, arrays):
            if read_whole(folder / "boot.json") != boot():
                # In place, not anew: a process that followed the dead filler keeps its maps, and sees rows become ready.
                np.load(folder / "ready.npy", mmap_mode="r+")[:] = 0
                write_json(folder / "boot.json", boot())
            return
        (folder / "layout.json").unlink(missing_ok=True)
        for name, (shape, dtype) in arrays.items():
            allocate(folder / f"{name}.npy", shape, dtype)
        write_json(folder / "boot.json", boot())
        write_json(folder / "layout.json", layout)
    except OSError as error:
        raise RunError(
            f"cannot write {folder}: {error.strerror}. Free space, or choose another run.cache_dir."
        ) from error


def _whole(folder: Path, arrays: Mapping[str, Any]) -> bool:
    """Whether every array file has the size that its header promises."""
    try:
        return all(np.load(folder / f"{n}.npy", mmap_mode="r").shape == shape for n, (shape, _) in arrays.items())
    except (OSError, ValueError, EOFError):
        return False


def boot() -> dict[str, str]:
    """Names this start of this machine; a random name where the system has none."""
    try:
        return {"boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip()}
    except OSError:
        return {"boot": uuid.uuid4().hex}


def allocate(file: Path, shape: tuple[int, ...], dtype: Any) -> np.memmap:
    """A zeroed array file with its blocks reserved: on a full disk a write through a map would kill the process."""
    array = np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with open(file, "rb+") as raw:
            os.posix_fallocate(raw.fileno(), 0, file.stat().st_size)
    return array


def write_at(file: BinaryIO, place: int, data: memoryview) -> None:
    """Write all of `data` at a place of an open file; maps of it see it.

    Raises:
        RunError: the disk refuses it.
    """
    done = 0
    try:
        while done < len(data):
            done += os.pwrite(file.fileno(), data[done:], place + done)
    except OSError as error:
        raise RunError(
            f"cannot write {file.name}: {error.strerror}. Free space, or choose another run.cache_dir."
        ) from error
