"""The checkpoints of a pack, through Ray Train, which finds them after a worker's or a driver's death."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raycap.errors import ModelError, RaycapError
from raycap.files import read_json, sha256_file, sync_tree, write_json
from raycap.storage import Storage

META = "pack.json"


class TrainKeeper:
    """Checkpoints through `ray.train.report`, so that Train finds them after a worker's or a driver's death.

    A checkpoint is a folder of the engine's states and pack.json, which holds the hash of every other file: one that a
    power cut left half written is passed over for the one before.
    """

    def __init__(
        self,
        storage: Storage,
        pack: str,
        checkpoints: Any,
        log: Callable[[str], None],
        *,
        saved: Callable[[], None] = lambda: None,
    ):
        """`storage` holds one folder a pack; `saved` is called after each checkpoint."""
        self.storage, self.pack, self.checkpoints, self.log, self.saved = storage, pack, checkpoints, log, saved
        self.saves = 0
        self.reporting: Callable[[], None] = lambda: None
        """Called just before Train is told, which waits for a word of every worker."""

    def restore(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(meta, states by trial) of the newest whole checkpoint; both empty when there is none."""
        import ray.train

        latest = ray.train.get_checkpoint()
        if latest is not None:
            with latest.as_directory() as folder:
                if (found := self._load(Path(folder))) is not None:
                    self.saves = found[0]["saves"]
                    return found
        if (found := self._newest(self.pack)) is not None:
            self.saves = found[0]["saves"]
            return found
        if count := len(self._folders(self.pack)):
            raise ModelError(
                f"none of the {count} checkpoints under {self.storage / self.pack} can be read. Remove it to start anew."
            )
        return {}, {}

    def adopt(self, pack: str, trial_id: str) -> tuple[dict[str, Any], Any] | None:
        """(slot's meta, state) of a trial in another pack's newest whole checkpoint; None where it holds none."""
        meta, states = self._newest(pack) or ({}, {})
        return (meta["slots"][trial_id], states[trial_id]) if trial_id in states else None

    def _folders(self, pack: str) -> list[str]:
        return sorted((n for n in self.storage.folders(pack) if n.startswith("checkpoint_")), reverse=True)

    def _new_here(self, before: set[str]) -> list[Path]:
        """Checkpoints of this pack that were not there before, where they lie on a disk."""
        here = self.storage.local
        return [here / self.pack / n for n in self._folders(self.pack) if n not in before] if here else []

    def _newest(self, pack: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
        for name in self._folders(pack):
            with self.storage.as_folder(f"{pack}/{name}") as folder:
                if (found := self._load(folder)) is not None:
                    return found
        return None

    def _load(self, folder: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
        try:
            meta = read_json(folder / META)
            for name, digest in meta["files"].items():
                if sha256_file(folder / name) != digest:
                    raise ValueError(f"{name} is not what was written")
            states = self.checkpoints.load(folder / "states") if meta["slots"] else {}
        except (OSError, ValueError, KeyError, TypeError, RaycapError) as error:
            self.log(f"checkpoint {folder.name} is damaged ({error}); looking for an older one")
            return None
        return meta, states

    def save(self, meta: dict[str, Any], states: dict[str, Any]) -> None:
        import ray.train

        self.saves += 1
        before = set(self._folders(self.pack))
        folder = Path(tempfile.mkdtemp(prefix="raycap-checkpoint-"))
        try:
            if states:
                self.checkpoints.save(folder / "states", states)
            files = {p.relative_to(folder).as_posix(): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}
            write_json(folder / META, {**meta, "saves": self.saves, "files": files})
            self.reporting()
            ray.train.report({"saves": self.saves}, checkpoint=ray.train.Checkpoint.from_directory(folder))
            for new in self._new_here(before):
                sync_tree(new)  # Train only copies: without this a power cut could take it and the one before
        except OSError:
            for torn in self._new_here(before):
                shutil.rmtree(torn, ignore_errors=True)  # a full disk has no room for half a checkpoint
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self.saved()
