"""A disk that is full for real: a small tmpfs, where one may be mounted."""

from __future__ import annotations

import subprocess

import pytest
import torch

from raycap.errors import RunError
from raycap.files import atomic_folder, read_json, write_json
from raycap.train import checkpoint


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip(f"no tmpfs may be mounted here: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def state(kib: int) -> dict:
    pair = (torch.full((kib, 128), 0.5), torch.full((kib, 128), 0.25))  # kib/2 KiB each
    return {"step": kib, "best": None, "value": {"a.query": pair}, "m": {}, "v": {}}


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(small_disk):
    checkpoint.save(small_disk / "states", {"t0": state(64)})
    with pytest.raises(RunError, match=r"disk/states: No space left on device\. Make room on that disk.*--resume"):
        checkpoint.save(small_disk / "states", {"t0": state(64), "t1": state(128)})
    kept = checkpoint.load(small_disk / "states")
    assert list(kept) == ["t0"] and kept["t0"]["step"] == 64
    assert [p.name for p in small_disk.iterdir()] == ["states"]  # nothing half written takes the room
    (small_disk / "states" / "t0.safetensors").unlink()  # a person makes room
    checkpoint.save(small_disk / "states", {"t1": state(128)})
    assert list(checkpoint.load(small_disk / "states")) == ["t1"]


def test_files_and_folders_too(small_disk):
    write_json(small_disk / "rungs.json", {"old": 1})
    with pytest.raises(RunError, match=r"rungs\.json: No space left on device\. Make room"):
        write_json(small_disk / "rungs.json", {"new": "x" * 300_000})
    assert read_json(small_disk / "rungs.json") == {"old": 1}
    with pytest.raises(RunError, match=r"t00: No space left on device\. Make room"):
        with atomic_folder(small_disk / "t00") as folder:
            (folder / "adapter.bin").write_bytes(bytes(300_000))
    assert [p.name for p in small_disk.iterdir()] == ["rungs.json"]
