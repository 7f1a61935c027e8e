"""Whether a frozen tower's features are kept on disk or computed at each look: the decision, from figures alone.

Seconds and bytes are of one image unless said otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raycap.config import Config


@dataclass(frozen=True, slots=True)
class Speeds:
    """Seconds an image takes."""

    tower_s: float
    """In batches of TOWER_BATCH, as features that are kept are computed."""
    live_s: float
    """In batches as large as a step's pieces."""
    write_s: float
    """Infinite where the disk cannot be written."""
    read_s: float
    """From the disk, not from what the system remembers of it, to the device."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What was decided for one split."""

    kept: bool
    why: str
    images: int = 0
    looks: int = 0
    """Images that the steps or rungs ahead ask for, one more than once."""
    bytes: int = 0
    """Of all features of the split."""
    kept_s: float | None = None
    """Foreseen for the whole run: computing what is not there yet, writing it, reading it at each look."""
    live_s: float | None = None
    """Foreseen for the whole run: the tower at each look."""

    def line(self) -> str:
        said = f"{'kept on disk' if self.kept else 'computed at each look'}: {self.why}"
        if self.kept_s is None or self.live_s is None:
            return said
        return (
            f"{said} ({self.images:,} images, {self.looks:,} looks, {self.bytes / 1e6:,.1f} MB; foreseen: {self.kept_s:.3g} s "
            f"kept, {self.live_s:.3g} s at each look)"
        )


def judge(mode: str, images: int, looks: int, row_bytes: int, speeds: Speeds | None, room: bool) -> Choice:
    """The decision from figures alone."""
    figures: dict[str, Any] = {"images": images, "looks": looks, "bytes": images * row_bytes}
    if speeds is not None:
        figures["live_s"] = looks * speeds.live_s
        if not math.isfinite(speeds.write_s):
            return Choice(False, "the disk could not be written", **figures)
        figures["kept_s"] = images * (speeds.tower_s + speeds.write_s) + looks * speeds.read_s
    if mode == "on":
        return Choice(True, "train.features=on", **figures)
    if not room:
        return Choice(False, "the disk that run.store_gb allows has no room for them", **figures)
    kept = figures["kept_s"] <= figures["live_s"]
    return Choice(kept, "measured to cost less" if kept else "keeping them was measured to cost more", **figures)


def looks(config: Config, shared: bool, rungs: Sequence[int], trials: int, packs: int) -> dict[str, int]:
    """Images that one pack will ask for, by split: each rung's trials train in as many turns as the slots make of them."""
    steps, scored, before, left = 0, 0, 0, trials
    for rung in rungs:
        turns = math.ceil(left / (config.tune.slots * packs))
        steps, scored = steps + turns * (rung - before), scored + turns
        if config.tune.scheduler == "asha":
            left = max(1, left // config.tune.eta)
        before = rung
    copies = 1 if shared else min(config.tune.slots, trials)
    # At a rung an image is looked at for the loss and for the caption.
    return {"train": steps * config.train.batch * copies, "val": scored * config.train.val_images * 2}
