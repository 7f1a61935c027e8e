"""Where a pack's worker keeps things: in the run folder that it shares with the driver, or in `run.storage`."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from raycap.storage import Storage
from raycap.train.record import ENDED

FEATURES = "features.json"
"""In `run_storage`: whether vision features are kept, as train.keeping decided."""


class Shelf:
    """Log, adapters and checkpoints of one pack.

    Without a storage they lie in the run folder. With one, this worker has a folder of its own, and puts what it ends
    with on the storage before it goes on: the driver, and whoever takes its place, may be on other machines.
    """

    def __init__(self, job: dict[str, Any], pack: str):
        self.pack = pack
        self.storage = Storage.open(job["storage"]) if job.get("storage") else None
        self._own = Path(tempfile.mkdtemp(prefix="raycap-pack-")) if self.storage else None
        self.folder = self._own or Path(job["run_dir"])
        self.log_file = self.folder / "logs" / f"{pack}.log"
        self.adapters = self.folder / "checkpoints" / "adapters"
        self.checkpoints = train_storage(job)

    def fetch_ended(self) -> None:
        """Bring the trials that have ended here, as a run folder would hold them."""
        for name in self.storage.folders("adapters") if self.storage else ():
            if self.storage.has(f"adapters/{name}/{ENDED}"):
                self.storage.get_folder(f"adapters/{name}", self.adapters / name)

    def publish(self, trial_id: str) -> None:
        """A trial has ended: its folder is whole on the storage before its slot is given away."""
        if self.storage:
            self.storage.put_folder(self.adapters / trial_id, f"adapters/{trial_id}", last=ENDED)

    def publish_log(self) -> None:
        if self.storage and self.log_file.is_file():
            self.storage.put(f"logs/{self.pack}.log", self.log_file.read_bytes())

    def close(self) -> None:
        if self._own:
            shutil.rmtree(self._own, ignore_errors=True)


def train_storage(job: dict[str, Any]) -> Storage:
    """The folder that holds one folder of Train's checkpoints for each pack."""
    return run_storage(job) / "train"


def run_storage(job: dict[str, Any]) -> Storage:
    """What all packs of a run share, and a resumed run finds."""
    return Storage.open(job.get("storage") or Path(job["run_dir"]) / "checkpoints")
