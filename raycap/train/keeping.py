"""Whether a frozen tower's features are kept on disk or computed at each look: measured at the start, then held to.

Seconds and bytes are of one image unless said otherwise.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raycap.config import Config
from raycap.data.arrays import allocate
from raycap.data.lock import FileLock
from raycap.data.store import Store
from raycap.data.window import room_for
from raycap.errors import ConfigError
from raycap.storage import Storage
from raycap.train.choice import Choice, Speeds, judge, looks
from raycap.train.features import TOWER_BATCH, Images
from raycap.train.shelf import FEATURES

SAMPLE_BYTES = 32 << 20
"""Features that are written and read back to see how fast the disk is."""
PATIENCE_S = 2.0
"""A tower that would take longer over TOWER_BATCH images is measured on fewer."""


def keep_or_not(
    images: Images,
    stores: Mapping[str, Any],
    config: Config,
    record: Storage,
    *,
    rungs: Sequence[int],
    trials: int,
    packs: int,
    piece: int,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Choice]:
    """Decide for each split by `train.features`, once a run: what `record` holds is kept to. Sets `images.kept`.

    `piece` is the number of images that the tower would see at once in a step.

    Raises:
        ConfigError: train.features=on where there is no room.
    """
    if not images.stored:
        return {}
    with FileLock(record.local / f".{FEATURES}.lock") if record.local else nullcontext():
        found = _recorded(record)
        if not set(stores) <= set(found):
            found = _decide(images, stores, config, rungs, trials, packs, piece)
            record.put(FEATURES, json.dumps({split: dataclasses.asdict(c) for split, c in found.items()}, indent=2))
    for name, store in stores.items():
        images.kept[store.split] = found[name].kept and keepable(store)
        log(f"vision features of {name} are {found[name].line()}")
    return found


def _recorded(record: Storage) -> dict[str, Choice]:
    """What was decided before; nothing where that cannot be read."""
    try:
        return {split: Choice(**choice) for split, choice in json.loads(record.get(FEATURES) or b"{}").items()}
    except (ValueError, TypeError, AttributeError):
        return {}


def keepable(store: Any) -> bool:
    """Whether there is a place beside its pixels: not in a window of a split."""
    return isinstance(store, Store)


def _decide(
    images: Images, stores: Mapping[str, Any], config: Config, rungs: Sequence[int], trials: int, packs: int, piece: int
) -> dict[str, Choice]:
    mode = config.train.features
    if mode == "off":
        return {name: Choice(False, "train.features=off") for name in stores}
    whole = {name: store for name, store in stores.items() if keepable(store)}
    if mode == "on" and (windowed := sorted(set(stores) - set(whole))):
        raise ConfigError(
            f"train.features=on: {', '.join(windowed)} is read in windows, because run.store_gb={config.run.store_gb:g} has "
            "no room for its images. Raise it, or set train.features=auto"
        )
    there = {name for name, store in whole.items() if store.complete and store.attach_features(images.key(store))}
    found = {
        name: Choice(True, "another run has left them", store.count) for name, store in whole.items() if name in there
    }
    for name in set(stores) - set(whole):
        found[name] = Choice(False, "the split is read in windows, which have no place for them", stores[name].count)
    if not (open_ := [name for name in whole if name not in there]):
        return found
    looked = looks(config, images.shared, rungs, trials, packs)
    # Where each image is looked at again and again, it does not matter how fast the tower is in large batches.
    often = all(looked.get(name, 0) > 2 * whole[name].count for name in open_)
    speeds, row_bytes = measure(images, whole[open_[0]], piece, timed=mode == "auto", batches=not often)
    taken = 0
    for name in open_:
        store, size = whole[name], whole[name].count * row_bytes
        room = has_room(config, store, taken + size, keep=[s.folder for s in whole.values()])
        if mode == "on" and not room:
            raise ConfigError(
                f"train.features=on: features of {store.count:,} images of {name} take {size / 1e9:.3g} GB, for which "
                f"run.store_gb={config.run.store_gb:g} has no room. Raise it, or set train.features=auto"
            )
        found[name] = judge(mode, store.count, looked.get(name, store.count), row_bytes, speeds, room)
        taken += size if found[name].kept else 0
    return found


def has_room(config: Config, store: Store, size: int, keep: Collection[Path]) -> bool:
    """Whether features of `size` bytes fit beside the store's own files into `run.store_gb`."""
    own = sum(f.stat().st_size for f in store.folder.glob("*") if f.is_file())
    return room_for(config.cache_dir, store.folder, own + size, int(config.run.store_gb * 1e9), keep=keep)


def measure(
    images: Images, store: Store, piece: int, *, timed: bool = True, batches: bool = True
) -> tuple[Speeds | None, int]:
    """(Speeds, bytes of an image's features) of this tower, device and disk, on the first images of `store`.

    Without `batches` the tower counts as no faster in batches of TOWER_BATCH than in a step's pieces.
    """
    rows = np.arange(min(store.count, TOWER_BATCH))
    store.wait(rows)
    few = rows[: max(1, min(piece, len(rows)))]
    values = images.to_numpy(images.live(store, few))  # what is done once is done
    row_bytes = values.nbytes // len(values)
    if not timed:
        return None, row_bytes
    live_s = min(_seconds(lambda: images.to_numpy(images.live(store, few))) for _ in range(2)) / len(few)
    tower_s = live_s
    if batches and live_s * TOWER_BATCH < PATIENCE_S:
        whole_s = min(_seconds(lambda: images.to_numpy(images.encode(store, rows))) for _ in range(2))
        tower_s = min(live_s, whole_s / TOWER_BATCH)  # a larger batch is no slower: what says so is other work
    return Speeds(tower_s, live_s, *_disk(images, store.folder, values)), row_bytes


def _disk(images: Images, folder: Path, values: np.ndarray) -> tuple[float, float]:
    """(Seconds to write, to read) the features of an image: through a map, rows in any order, the cache of them dropped."""
    count = max(1, min(4 * TOWER_BATCH, SAMPLE_BYTES // max(1, values[:1].nbytes)))
    file = folder / f".features-{uuid.uuid4().hex[:8]}.npy"
    order = np.random.default_rng(0).permutation(count)

    def write() -> None:
        array = allocate(file, (count, *values.shape[1:]), values.dtype)
        array[:] = np.resize(values, array.shape)
        array.flush()

    def read() -> None:
        array = np.load(file, mmap_mode="r")
        for part in np.array_split(order, math.ceil(count / 16)):
            images.from_numpy(np.asarray(array[part]))
        _synchronise(images)

    try:
        write_s = _seconds(write)
        if hasattr(os, "posix_fadvise"):
            with open(file, "rb") as raw:
                os.fsync(raw.fileno())
                os.posix_fadvise(raw.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return write_s / count, _seconds(read) / count
    except OSError:
        return math.inf, math.inf
    finally:
        file.unlink(missing_ok=True)


def _seconds(act: Callable[[], Any]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def _synchronise(images: Images) -> None:
    if images.cm.device.type == "cuda":
        torch.cuda.synchronize()
