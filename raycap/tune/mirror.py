"""The driver's part of `run.storage`: its record goes there as it is written, and what packs put there comes here.

The run's place is <run.storage>/runs/<name of the run folder>:

    config.yaml, plan.json, rungs.json, trials.json, clock.json, tokens.json    the driver's record
    features.json       what the first pack decided on the tower's features
    adapters/<trial>/   what a trial ended with, trial.json last
    train/<pack>/       Train's checkpoints
    logs/<pack>.log
    owner.json          which run it is, and when its driver was last heard of

Shards lie beside, in <run.storage>/data/<hash of their content>, and are shared by runs.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from pathlib import Path

from raycap.config import Config
from raycap.data.parquet import MANIFEST, open_shards
from raycap.errors import DataError, RunError
from raycap.files import read_json, write_atomic, write_json
from raycap.storage import Storage
from raycap.train.record import ENDED
from raycap.train.shelf import FEATURES

RECORD = ("config.yaml", "checkpoints/plan.json", "checkpoints/rungs.json", "checkpoints/trials.json",
          "checkpoints/clock.json", "checkpoints/tokens.json", "checkpoints/features.json")  # fmt: skip
BEAT_S = 10.0
"""Time between two signs of life of a driver on the storage."""
PATIENCE_S = 300.0
"""How long the driver's own traffic with the storage may fail before the sweep does."""
DEAD_S = 60.0
"""Silence after which a driver on another machine counts as dead."""


class Mirror:
    """A run folder and its place in the storage."""

    def __init__(self, config: Config, run_dir: Path):
        self.root = Storage.open(config.run.storage)
        self.place = self.root / "runs" / run_dir.name
        self.run_dir = run_dir
        self._put: dict[str, tuple[int, int]] = {}
        self._beaten = self._followed = 0.0
        self._id = ""

    def begin(self, resume: bool) -> None:
        """Take the place for this run, and bring here what its record lacks.

        Raises:
            RunError: another run has it, or its driver is at work on another machine.
        """
        mine, owner = self.run_dir / "checkpoints" / "storage.json", self.place.get("owner.json")
        known = read_json(mine)["run"] if mine.is_file() else ""
        if owner is not None:
            other = json.loads(owner)
            silent_s = time.time() - other["time"]
            if (known and known != other["run"]) or (not known and not resume):
                raise RunError(
                    f"{self.place} holds another run. Give run.dir another last part, or add --resume to go on with "
                    "that run."
                )
            if silent_s < DEAD_S and other["host"] != socket.gethostname():
                raise RunError(
                    f"{self.place} is in use by process {other['pid']} on {other['host']}, heard of {silent_s:.0f} s ago. "
                    f"Wait for it to end; a driver that was killed is given up after {DEAD_S:.0f} s."
                )
            known = other["run"]
        self._id = known or uuid.uuid4().hex
        write_json(mine, {"run": self._id, "storage": str(self.place)})
        if owner is not None and resume:
            fetch_record(self.place, self.run_dir)
        self._beat()

    def follow(self, ended: list[str], *, last: bool = False) -> None:
        """Called again and again: put what changed of the record, take the adapters of ended trials and the logs.

        Works every BEAT_S, and at the `last` call. A storage that fails for a while does not end the sweep: its packs
        train on, and rungs are recorded before anybody acts on them (`put`).
        """
        if not last and time.monotonic() - self._followed < BEAT_S:
            return
        self._followed = time.monotonic()
        try:
            for name in RECORD:
                self.put(self.run_dir / name)
            self._beat()
            self.take_logs()
            for trial_id in ended:
                folder = self.run_dir / "checkpoints" / "adapters" / trial_id
                if not (folder / ENDED).is_file() and self.place.has(f"adapters/{trial_id}/{ENDED}"):
                    self.place.get_folder(f"adapters/{trial_id}", folder)
        except RunError:
            if last or time.monotonic() - self._beaten > PATIENCE_S:
                raise

    def put(self, file: Path) -> None:
        """Put one file of the record, when it is newer than what was put."""
        try:
            now = file.stat()
        except FileNotFoundError:
            return
        if self._put.get(file.name) != (now.st_mtime_ns, now.st_ino):
            self.place.put(file.name, file.read_bytes())
            self._put[file.name] = (now.st_mtime_ns, now.st_ino)

    def take_logs(self) -> None:
        for name in self.place.files("logs"):
            raw = self.place.get(f"logs/{name}")
            if raw is not None:
                write_atomic(self.run_dir / "logs" / name, raw)

    def take_features(self) -> None:
        """Bring what a pack has decided."""
        file = self.run_dir / "checkpoints" / FEATURES
        if not file.is_file() and (raw := self.place.get(FEATURES)) is not None:
            write_atomic(file, raw)

    def end(self) -> None:
        """The driver leaves: all of the record is there, and the next driver need not wait."""
        self.take_features()
        for name in RECORD:
            self.put(self.run_dir / name)
        self.take_logs()
        self._beat(gone=True)

    def shards(self, folder: Path | str) -> str:
        """Where packs read the shards: the url they have already, or their copy in the storage, made once."""
        shards = open_shards(folder)
        if not isinstance(shards.folder, Path):
            return shards.folder
        copy = self.root / "data" / shards.content_sha256[:20]
        try:
            open_shards(copy.url)
        except DataError:
            copy.put_folder(shards.folder, ".", last=MANIFEST)
            open_shards(copy.url)
        return copy.url

    def _beat(self, *, gone: bool = False) -> None:
        sign = {"run": self._id, "host": socket.gethostname(), "pid": os.getpid(), "time": 0 if gone else time.time()}
        self.place.put("owner.json", json.dumps(sign))
        self._beaten = time.monotonic()


def fetch_record(place: Storage, run_dir: Path) -> None:
    """Bring the driver's record and the ended trials to a run folder that lacks them; files that are here stay."""
    for name in RECORD:
        file = run_dir / name
        raw = None if file.is_file() else place.get(file.name)
        if raw is not None:
            write_atomic(file, raw)
    for trial_id in place.folders("adapters"):
        folder = run_dir / "checkpoints" / "adapters" / trial_id
        if not (folder / ENDED).is_file() and place.has(f"adapters/{trial_id}/{ENDED}"):
            place.get_folder(f"adapters/{trial_id}", folder)


def holders(train: Storage) -> dict[str, str]:
    """Trial -> pack whose newest checkpoint holds it, so that a resumed sweep gives each back its own."""
    found: dict[str, str] = {}
    for pack in train.folders():
        for name in sorted((n for n in train.folders(pack) if n.startswith("checkpoint_")), reverse=True):
            raw = train.get(f"{pack}/{name}/pack.json")
            try:
                slots = json.loads(raw or b"")["slots"]
            except (ValueError, KeyError, TypeError):
                continue  # half written: the one before counts
            found.update(dict.fromkeys(slots, pack))
            break
    return found
