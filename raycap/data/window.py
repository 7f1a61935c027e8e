"""A set larger than the disk may hold: row groups of the shards read when a step needs them, and a window of them kept.

Shapes: N images, G row groups, C channels, H height, W width.

The pixels of the groups at hand lie in one file of a bounded size, which has no name, so that it is gone with its
process. Who trains in step with the others finds the next window read ahead; who is elsewhere (a trial that begins while
others are half way) is served too, at the price of reading. Nothing is read from the start again after a restart: the
order (order.WindowOrder) says which groups a step needs.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raycap.data.arrays import allocate
from raycap.data.lock import FileLock
from raycap.data.parquet import ROW_GROUP_ROWS, Shards
from raycap.data.store import Store
from raycap.errors import ConfigError, DataError, RunError

Read = Callable[[list[dict[str, Any]]], Iterable[Any]]
"""Descriptors of row groups (Shards.row_groups) -> tables of their prepared rows (stream.prepared_table), any order."""
FREE_SHARE = 0.8
"""Of the free disk, what stores may take when no setting says."""
_POLL_S = 0.2
_CLOSE_S = 10.0
"""How long closing waits for the table that is being read."""


class WindowStore:
    """One split of an image set, by row, as `Store` has it, with no more than `limit_bytes` of pixels on disk.

    Raises:
        ConfigError: the limit has no room for two row groups.
    """

    complete = False
    owner = False
    features = None

    def __init__(
        self,
        shards: Shards,
        split: str,
        cache_dir: Path,
        image_shape: Sequence[int],
        read: Read,
        limit_bytes: int,
    ):
        self.split, self._read = split, read
        self.references = shards.references(split)
        self.image_ids = list(self.references)
        self.groups = shards.groups(split)
        self.langs = shards.langs(split)
        self.count = len(self.image_ids)
        self.folder = Path(cache_dir) / "store" / f"{split}-window-{shards.content_sha256[:12]}"
        self.image_shape: tuple[int, ...] = tuple(int(n) for n in image_shape)
        self.captions_per_image = np.array([len(r) for r in self.references.values()], dtype=np.int64)
        scores = shards.clip_scores(split)
        self.clip_scores = self.selected = None
        if scores is not None:
            self.clip_scores = np.array([s for i in self.image_ids for s in scores[i][0]], dtype=np.float32)
            self.selected = np.array([scores[i][1] for i in self.image_ids], dtype=np.int64)
        self._descriptors = shards.row_groups(split)
        self.row_groups = np.repeat(np.arange(len(self._descriptors)), [d["rows"] for d in self._descriptors])
        """[N]: the row group of each image."""
        self._offsets = np.array([d["offset"] for d in self._descriptors], dtype=np.int64)
        self.capacity = min(len(self._descriptors), limit_bytes // (ROW_GROUP_ROWS * int(np.prod(self.image_shape))))
        """Row groups at hand at a time."""
        if self.capacity < min(2, len(self._descriptors)):
            raise ConfigError(
                f"run.store_gb: {limit_bytes / 1e9:g} GB have no room for two row groups of {ROW_GROUP_ROWS} images of "
                f"{list(self.image_shape)}; give at least {2 * ROW_GROUP_ROWS * np.prod(self.image_shape) / 1e9:.2g}"
            )
        self.window_groups = max(1, self.capacity // 2)
        """Row groups of a window: one is in use, the next one is read ahead."""
        self.groups_read = 0
        self._counted = np.full((self.count, 3), -1, dtype=np.int64)
        """[N, (captions cut, tokens, unknown tokens)]; -1 where the row was never read."""
        self._pixels = self._nameless(self.folder.parent)
        self._places: OrderedDict[int, int] = OrderedDict()  # row group -> place in the file, least recently used first
        self._texts: dict[int, list[tuple[list[np.ndarray], list[int]]]] = {}
        self._parts: dict[int, dict[int, Any]] = {}  # groups of which some rows have come
        self._changed = threading.Condition()
        self._urgent: list[int] = []
        self._plan: list[int] = []
        self._failure: BaseException | None = None
        self._closed = False
        self._loader = threading.Thread(target=self._load, name=f"window-{split}", daemon=True)
        self._loader.start()

    def _nameless(self, folder: Path) -> np.ndarray:
        shape = (self.capacity, ROW_GROUP_ROWS, *self.image_shape)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{self.split}-window-", dir=folder)
            os.close(handle)
            try:
                return allocate(Path(name), shape, np.uint8)
            finally:
                os.unlink(name)
        except OSError as error:
            raise RunError(
                f"cannot write {folder}: {error.strerror}. Free space, or choose another run.cache_dir."
            ) from error

    @property
    def stats(self) -> dict[str, Any]:
        """Counts as in a finished Store's manifest, once every row has been read."""
        if (self._counted < 0).any():
            return {}
        truncated, tokens, unknown = (int(n) for n in self._counted.sum(axis=0))
        return {"captions": int(self.captions_per_image.sum()), "truncated": truncated, "tokens": tokens,
                "unknown": unknown, "unknown_share": unknown / max(tokens, 1)}  # fmt: skip

    # --- reading, as from a Store -------------------------------------------------------------------------------------

    def plan(self, groups: Sequence[int]) -> None:
        """Say which row groups come next, soonest first; they are read in the background."""
        with self._changed:
            self._plan = [int(g) for g in groups][: self.capacity]
            self._changed.notify_all()

    def wait(self, rows: Sequence[int] | np.ndarray, timeout_s: float = 600.0) -> None:
        """Return once all `rows` are at hand.

        Raises:
            DataError: the reading failed, or `timeout_s` have passed.
        """
        self._at_hand(np.asarray(rows, dtype=np.int64), lambda: None, timeout_s)

    def pixels(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """uint8 [n, C, H, W], a copy."""
        rows = np.asarray(rows, dtype=np.int64)
        found = np.empty((len(rows), *self.image_shape), dtype=np.uint8)
        # Group by group: rows of a whole split, or of many trials, may span more groups than there is room for.
        for part in self._by_capacity(rows):

            def take(part: np.ndarray = part) -> None:
                for i in part:
                    group = self.row_groups[rows[i]]
                    found[i] = self._pixels[self._places[group], rows[i] - self._offsets[group]]

            self._at_hand(rows[part], take)
        return found

    def tokens(self, sample_rows: np.ndarray) -> list[np.ndarray]:
        """Token ids (int32, each of its own length) of samples [n, 2] given as (image row, caption index)."""
        return [ids for ids, _ in self._text(sample_rows)]

    def prompt_lens(self, sample_rows: np.ndarray) -> np.ndarray:
        """Leading tokens without a label, int32 [n], of samples [n, 2]."""
        return np.array([length for _, length in self._text(sample_rows)], dtype=np.int32)

    def token_lens(self, sample_rows: np.ndarray) -> np.ndarray:
        """Lengths int32 [n] of samples [n, 2], prompt included."""
        return np.array([len(ids) for ids, _ in self._text(sample_rows)], dtype=np.int32)

    def _text(self, sample_rows: np.ndarray) -> list[tuple[np.ndarray, int]]:
        pairs = np.asarray(sample_rows, dtype=np.int64).reshape(-1, 2)
        if len(pairs) and (pairs[:, 1] >= self.captions_per_image[pairs[:, 0]]).any():
            raise DataError(f"a sample of split {self.split} names a caption that its image does not have")
        found: list[Any] = [None] * len(pairs)
        for part in self._by_capacity(pairs[:, 0]):

            def take(part: np.ndarray = part) -> None:
                for i in part:
                    row, caption = pairs[i]
                    group = self.row_groups[row]
                    ids, prompts = self._texts[group][row - self._offsets[group]]
                    found[i] = (ids[caption], prompts[caption])

            self._at_hand(pairs[part, 0], take)
        return found

    def _by_capacity(self, rows: np.ndarray) -> list[np.ndarray]:
        """Indices of `rows` in parts that span no more groups than fit."""
        order = np.argsort(self.row_groups[rows], kind="stable")
        ranks = np.unique(self.row_groups[rows[order]], return_inverse=True)[1]
        return (
            [order[ranks // self.capacity == p] for p in range(int(ranks.max()) // self.capacity + 1)]
            if len(rows)
            else []
        )

    def close(self, error: BaseException | None = None) -> None:
        """Stop reading; `error` is raised where rows are waited for."""
        with self._changed:
            self._failure, self._closed = error or self._failure, True
            self._changed.notify_all()
        if threading.current_thread() is not self._loader:
            self._loader.join(_CLOSE_S)  # what it reads through Ray shall have ended before Ray does

    def _at_hand(self, rows: np.ndarray, take: Callable[[], None], timeout_s: float = 600.0) -> None:
        """Call `take` at a moment when the groups of `rows` are all there, and none can leave."""
        wanted = [int(g) for g in np.unique(self.row_groups[rows])]
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                if self._failure is not None:
                    raise self._failure
                missing = [g for g in wanted if g not in self._places]
                if not missing:
                    for group in wanted:
                        self._places.move_to_end(group)
                    if self._urgent == wanted:
                        self._urgent = []
                    take()
                    return
                if len(wanted) > self.capacity:
                    raise DataError(
                        f"{len(rows)} rows of split {self.split} span {len(wanted)} row groups, {self.capacity} fit into "
                        "run.store_gb: give it more"
                    )
                if time.monotonic() > deadline:
                    raise DataError(f"row groups {missing[:5]} of split {self.split} did not come in {timeout_s:g} s")
                self._urgent = wanted
                self._changed.notify_all()
                self._changed.wait(_POLL_S)

    # --- the thread that reads ----------------------------------------------------------------------------------------

    def _load(self) -> None:
        try:
            while True:
                with self._changed:
                    while not self._closed and not self._todo():
                        self._changed.wait()
                    if self._closed:
                        return
                    todo = self._todo()
                left = set(todo)
                self._parts.clear()
                for table in self._read([self._descriptors[g] for g in todo]):
                    left -= self._take_in(table)
                    if self._interrupted(todo):
                        break
                else:
                    if left:
                        raise DataError(f"row groups {sorted(left)[:5]} of split {self.split} never came")
        except BaseException as error:  # raised where rows are waited for
            self.close(error)

    def _todo(self) -> list[int]:
        return [g for g in self._wanted() if g not in self._places]

    def _wanted(self) -> list[int]:
        """Groups that shall be at hand: what is waited for, then what is planned."""
        return list(dict.fromkeys([*self._urgent, *self._plan]))[: self.capacity]

    def _interrupted(self, todo: list[int]) -> bool:
        """Whether somebody waits for a group that is not being read."""
        with self._changed:
            return self._closed or any(g not in self._places and g not in todo for g in self._urgent)

    def _take_in(self, table: Any) -> set[int]:
        """Keep the rows of a table, which may be any part of any groups; returns the groups that are whole with it."""
        columns = table.to_pydict() if hasattr(table, "to_pydict") else table
        whole = set()
        for i, row in enumerate(int(r) for r in columns["row"]):
            shape = tuple(int(n) for n in columns["shape"][i])
            if shape != self.image_shape:
                raise DataError(
                    f"image {self.image_ids[row]}: pixels are {list(shape)}, expected {list(self.image_shape)}"
                )
            group = int(self.row_groups[row])
            part = self._parts.setdefault(group, {})
            part[row - int(self._offsets[group])] = (
                columns["pixels"][i],
                [np.array(ids, dtype=np.int32) for ids in columns["token_ids"][i]],
                [int(n) for n in columns["prompt_lens"][i]],
            )
            tokens = sum(map(len, columns["token_ids"][i])) - sum(columns["prompt_lens"][i])
            self._counted[row] = columns["truncated"][i], tokens, columns["unknown"][i]
            if len(part) == self._descriptors[group]["rows"]:
                self._place(group, self._parts.pop(group))
                whole.add(group)
        return whole

    def _place(self, group: int, part: dict[int, tuple[bytes, list[np.ndarray], list[int]]]) -> None:
        """Put a whole group into a place, that of the least recently used group when all are taken."""
        with self._changed:
            wanted = self._wanted()
            if group in self._places or group not in wanted:
                return  # the plan has changed meanwhile
            place = len(self._places)
            if place >= self.capacity:
                leaving = next(g for g in self._places if g not in wanted)
                place = self._places.pop(leaving)
                del self._texts[leaving]
        for at, (pixels, _, _) in part.items():  # nobody looks there: the place belongs to no group
            self._pixels[place, at] = np.frombuffer(pixels, dtype=np.uint8).reshape(self.image_shape)
        with self._changed:
            self._texts[group] = [part[at][1:] for at in range(len(part))]
            self._places[group] = place
            self.groups_read += 1
            self._changed.notify_all()


def open_store(
    shards: Shards,
    split: str,
    cache_dir: Path,
    image_shape: Sequence[int],
    max_tokens: int,
    *,
    read: Read,
    limit_bytes: int,
    **key_parts: Any,
) -> Store | WindowStore:
    """The whole split on disk where it fits, else a window of it. `limit_bytes` bounds all stores of the node (0: the
    free disk does); a split that does not fit gets half of it, or of what is free, for its window."""
    folder = Store.place(shards, split, cache_dir, image_shape, max_tokens, **key_parts)
    row_bytes = int(np.prod([int(n) for n in image_shape]))
    captions = sum(len(c) for c in shards.references(split).values())
    needed = len(shards.references(split)) * row_bytes + captions * 4 * (max_tokens + 2)
    whole = (folder / "manifest.json").is_file()
    if whole or room_for(cache_dir, folder, needed, limit_bytes):
        store = Store.for_shards(shards, split, cache_dir, image_shape, max_tokens, **key_parts)
        (folder / ".lock").touch()  # used just now
        return store
    limit = limit_bytes or int(FREE_SHARE * shutil.disk_usage(Path(cache_dir) / "store").free)
    return WindowStore(shards, split, cache_dir, image_shape, read, limit // 2)


def room_for(cache_dir: Path, folder: Path, needed_bytes: int, limit_bytes: int, keep: Collection[Path] = ()) -> bool:
    """Whether a store of `needed_bytes` in `folder` fits; stores that were not used for longest are removed to make room,
    but those in `keep`.

    With a limit of 0 stores may take FREE_SHARE of the free disk. A store that somebody fills stays; one that somebody
    reads loses its name, and its blocks when the reader ends.
    """
    root = Path(cache_dir) / "store"
    root.mkdir(parents=True, exist_ok=True)
    own = _size(folder)
    others = sorted((f for f in root.iterdir() if f.is_dir() and f != folder), key=_used_at)
    while True:
        if limit_bytes:
            fits = sum(_size(f) for f in others) + needed_bytes <= limit_bytes
            never = needed_bytes > limit_bytes
        else:
            fits = needed_bytes <= own + FREE_SHARE * shutil.disk_usage(root).free
            never = False
        if fits:
            return True
        old = next((f for f in others if f not in keep), None)
        if never or old is None:
            return False
        others.remove(old)
        _remove(old)


def _remove(folder: Path) -> None:
    lock = FileLock(folder / ".lock")
    if lock.try_acquire():
        try:
            (folder / "manifest.json").unlink(missing_ok=True)  # first: without it the rest is nothing
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            lock.release()


def _used_at(folder: Path) -> float:
    try:
        return (folder / ".lock").stat().st_mtime
    except OSError:
        return 0.0


def _size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.glob("*") if f.is_file()) if folder.is_dir() else 0
