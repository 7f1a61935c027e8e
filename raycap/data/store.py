"""The store: an image set decoded, resized and tokenised once, on disk, read by row index.

Shapes: N images, S captions over all images, T tokens at most, C channels, H height, W width, L and D of the features.
Numpy files and JSON in one folder; `manifest.json` is written last, and a folder without it is unfinished.

One process of a node fills a store (it holds the folder's lock); others follow it, and see each row when it is ready.
When the filler dies the lock falls free: who opens the store next goes on filling it, over the same files, so that
followers' maps stay true. A row is written before its `ready` flag is set.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raycap.data.arrays import allocate, make_files, write_at
from raycap.data.lock import FileLock
from raycap.data.parquet import Shards
from raycap.errors import DataError, RunError
from raycap.files import read_json, sha256_json, write_json

SCHEMA_VERSION = 2
_POLL_S = 0.05


class FillerGone(DataError):
    """Another process filled the store, and died: who opens it again goes on with the filling."""


class Store:
    """One split of an image set, by row. Made by `create` or `open`, not by its constructor."""

    def __init__(self, folder: Path, layout: Mapping[str, Any], lock: FileLock | None):
        self.folder = folder
        self.split: str = layout["split"]
        self.image_ids: list[str] = layout["image_ids"]
        self.references: dict[str, list[str]] = dict(zip(self.image_ids, layout["references"]))
        self.groups: dict[str, str] = dict(zip(self.image_ids, layout["groups"]))
        self.langs: dict[str, str] = dict(zip(self.image_ids, layout.get("langs", ())))
        """Image id -> language, where the split holds several; empty else."""
        self.count = len(self.image_ids)
        self.image_shape: tuple[int, int, int] = tuple(layout["image_shape"])
        self.captions_per_image = np.array([len(r) for r in layout["references"]], dtype=np.int64)
        scores = layout.get("clip_scores")
        self.clip_scores = None if scores is None else np.array([s for row in scores for s in row], dtype=np.float32)
        """[S], where `prepare` scored the captions."""
        self.selected = None if scores is None else np.array(layout["selected"], dtype=np.int64)
        """[N]: the index of each image's caption with the highest score."""
        self.row_groups: np.ndarray | None = None
        """Every row is at hand (in a WindowStore only those of some row groups are)."""
        self.window_groups = 0
        self.features: np.ndarray | None = None
        """[N, L, D] once `attach_features` found them."""
        self._lock = lock
        self._first = np.cumsum(self.captions_per_image) - self.captions_per_image
        mode = "r+" if lock is not None else "r"
        self._pixels = np.load(folder / "pixels.npy", mmap_mode=mode)
        # Rows are written into the file: through the map each fresh page is a fault, which costs more than the copy.
        self._pixel_file = None if lock is None else open(folder / "pixels.npy", "rb+", buffering=0)  # noqa: SIM115
        self._tokens = np.load(folder / "tokens.npy", mmap_mode=mode)
        self._lengths = np.load(folder / "lengths.npy", mmap_mode=mode)
        self._prompts = np.load(folder / "prompt_lens.npy", mmap_mode=mode)
        self._ready = np.load(folder / "ready.npy", mmap_mode=mode)
        self._row_truncated = np.load(folder / "truncated.npy", mmap_mode=mode)
        self._row_unknown = np.load(folder / "unknown.npy", mmap_mode=mode)
        self._complete = False
        self._failure: BaseException | None = None

    # --- making and opening -------------------------------------------------------------------------------------------

    @staticmethod
    def key(**parts: Any) -> str:
        """Short hash of what the content depends on: shards' hash, split, processor, prompt, length, ..."""
        return sha256_json({"store": SCHEMA_VERSION, **parts})[:20]

    @classmethod
    def create(
        cls,
        folder: Path | str,
        split: str,
        count: int,
        image_shape: Sequence[int],
        *,
        image_ids: Sequence[str],
        references: Mapping[str, Sequence[str]],
        groups: Mapping[str, str] | None = None,
        max_tokens: int,
        clip_scores: Mapping[str, tuple[Sequence[float], int]] | None = None,
        langs: Mapping[str, str] | None = None,
    ) -> Store:
        """Open the store in `folder`, making it where there is none.

        The result is finished (`complete`), or this process fills it (`owner`), or another one does and this one
        follows. `image_shape` is (C, H, W); references are by image id, every caption once, in the shards' order;
        `clip_scores` are (score of each caption, index of the chosen one) by image id.

        Raises:
            DataError: the folder holds another set; the counts contradict each other.
            RunError: the folder cannot be written.
        """
        folder = Path(folder)
        if count != len(image_ids):
            raise DataError(f"a store for {count} images was given {len(image_ids)} image ids; give one for each row")
        layout = {
            "schema_version": SCHEMA_VERSION,
            "split": split,
            "image_shape": [int(n) for n in image_shape],
            "max_tokens": int(max_tokens),
            "image_ids": [str(i) for i in image_ids],
            "references": [[str(c) for c in references[i]] for i in image_ids],
            "groups": [str((groups or {}).get(i) or i) for i in image_ids],
        }
        if langs:
            layout["langs"] = [str(langs[i]) for i in image_ids]
        if clip_scores is not None:
            layout["clip_scores"] = [[float(s) for s in clip_scores[i][0]] for i in image_ids]
            layout["selected"] = [int(clip_scores[i][1]) for i in image_ids]
        if (folder / "manifest.json").is_file():
            try:
                return cls.open(folder)._check_layout(layout)
            except (OSError, ValueError, KeyError, TypeError, EOFError):  # cut short by a power loss: filled anew
                (folder / "manifest.json").unlink(missing_ok=True)
        lock = FileLock(folder / ".lock")
        began = time.monotonic()
        while True:
            if lock.try_acquire():
                if (folder / "manifest.json").is_file():  # finished while we waited for the lock
                    lock.release()
                    return cls.open(folder)._check_layout(layout)
                make_files(folder, layout)
                return cls(folder, layout, lock)
            waited_s = time.monotonic() - began
            # A follower's `wait` holds the lock for a moment to see whether it is free; only one who keeps it fills.
            if waited_s > 4 * _POLL_S and (folder / "layout.json").is_file():
                return cls(folder, read_json(folder / "layout.json"), None)._check_layout(layout)
            if waited_s > 60:
                raise RunError(f"{folder}: another process holds its lock and has not begun to fill it in 60 s")
            time.sleep(_POLL_S)

    @classmethod
    def for_shards(
        cls, shards: Shards, split: str, cache_dir: Path, image_shape: Sequence[int], max_tokens: int, **key_parts: Any
    ) -> Store:
        """`create` for a split of `shards`, in the folder under `cache_dir` that its content names.

        `key_parts` say what pixels and tokens depend on besides: the processor's hash, the prompt.
        """
        shape = [int(n) for n in image_shape]
        references = shards.references(split)
        return cls.create(
            cls.place(shards, split, cache_dir, shape, max_tokens, **key_parts),
            split,
            len(references),
            shape,
            image_ids=list(references),
            references=references,
            groups=shards.groups(split),
            max_tokens=max_tokens,
            clip_scores=shards.clip_scores(split),
            langs=shards.langs(split),
        )

    @classmethod
    def place(
        cls, shards: Shards, split: str, cache_dir: Path, image_shape: Sequence[int], max_tokens: int, **key_parts: Any
    ) -> Path:
        """The folder of `for_shards`."""
        shape = [int(n) for n in image_shape]
        key = cls.key(data=shards.content_sha256, split=split, shape=shape, max_tokens=max_tokens, **key_parts)
        return Path(cache_dir) / "store" / f"{split}-{key}"

    @classmethod
    def open(cls, folder: Path | str) -> Store:
        """Open a finished store for reading.

        Raises:
            DataError: there is none, or it is unfinished.
        """
        folder = Path(folder)
        if not (folder / "manifest.json").is_file():
            raise DataError(f"{folder} holds no finished store (no manifest.json); run again to fill it")
        store = cls(folder, read_json(folder / "layout.json"), None)
        store._complete = True
        return store

    def _check_layout(self, wanted: Mapping[str, Any]) -> Store:
        found = read_json(self.folder / "layout.json")
        for name, value in wanted.items():
            if found.get(name) != value:
                raise DataError(
                    f"{self.folder} holds another image set ('{name}' differs); remove the folder to fill it anew"
                )
        return self

    # --- filling ------------------------------------------------------------------------------------------------------

    @property
    def owner(self) -> bool:
        """Whether this process fills the store."""
        return self._lock is not None and self._lock.held

    def put(
        self,
        rows: Sequence[int] | np.ndarray,
        pixels: np.ndarray | Sequence[np.ndarray],
        token_ids: Sequence[Sequence[Sequence[int]]],
        prompt_lens: Sequence[Sequence[int]],
        truncated: Sequence[int] | None = None,
        unknown: Sequence[int] | None = None,
    ) -> None:
        """Write rows [n] with their pixels uint8 [n, C, H, W], token ids and prompt lengths per caption.

        `truncated` and `unknown` count, per row, the captions that were cut and the tokens that were unknown. A row may
        come twice (a stream that began again): the second time changes nothing.

        Raises:
            DataError: a row outside the set, or one whose pixels or captions do not fit it.
        """
        if not self.owner:
            raise RunError(f"{self.folder} is filled by another process; this one may only read it")
        for i, row in enumerate(int(r) for r in rows):
            if not 0 <= row < self.count:
                raise DataError(f"row {row} lies outside the {self.count} images of split {self.split}")
            image = np.asarray(pixels[i])
            if image.shape != self.image_shape or image.dtype != np.uint8:
                raise DataError(
                    f"image {self.image_ids[row]}: pixels are {image.dtype} {list(image.shape)}, "
                    f"expected uint8 {list(self.image_shape)}"
                )
            if len(token_ids[i]) != self.captions_per_image[row] or len(prompt_lens[i]) != len(token_ids[i]):
                raise DataError(
                    f"image {self.image_ids[row]}: {len(token_ids[i])} token lists and {len(prompt_lens[i])} prompt "
                    f"lengths came for {self.captions_per_image[row]} captions"
                )
            data = memoryview(np.ascontiguousarray(image)).cast("B")
            write_at(self._pixel_file, self._pixels.offset + row * len(data), data)
            for j, ids in enumerate(token_ids[i]):
                length = len(ids)
                if not 0 < length <= self._tokens.shape[1]:
                    raise DataError(
                        f"image {self.image_ids[row]}, caption {j}: {length} tokens, "
                        f"expected 1 to {self._tokens.shape[1]} (data.max_text_tokens)"
                    )
                sample = self._first[row] + j
                self._tokens[sample, :length] = ids
                self._lengths[sample] = length
                self._prompts[sample] = int(prompt_lens[i][j])
            self._row_truncated[row] = int(truncated[i]) if truncated is not None else 0
            self._row_unknown[row] = int(unknown[i]) if unknown is not None else 0
            self._ready[row] = 1

    def finish(self) -> Store:
        """Sync everything, write the manifest, let go of the lock. The store stays open for reading.

        Raises:
            DataError: rows are missing.
        """
        if self._complete:
            return self
        if not self.owner:
            raise RunError(f"{self.folder} is filled by another process; only that one can finish it")
        missing = np.flatnonzero(self._ready == 0)
        if len(missing):
            names = ", ".join(self.image_ids[i] for i in missing[:3])
            raise DataError(f"split {self.split}: {len(missing)} of {self.count} images never came ({names}, ...)")
        for array in (self._pixels, self._tokens, self._lengths, self._prompts, self._ready):
            array.flush()
        self._close_file()
        tokens = int(self._lengths.sum() - self._prompts.sum())
        unknown = int(self._row_unknown.sum())
        write_json(
            self.folder / "manifest.json",
            {
                "schema_version": SCHEMA_VERSION,
                "split": self.split,
                "images": self.count,
                "captions": len(self._lengths),
                "tokens": tokens,
                "longest": int(self._lengths.max()),
                "truncated": int(self._row_truncated.sum()),
                "unknown": unknown,
                "unknown_share": unknown / max(tokens, 1),
                "image_shape": list(self.image_shape),
            },
        )
        self._complete = True
        self._lock.release()
        return self

    def close(self, error: BaseException | None = None) -> None:
        """Let go of the lock; what was not finished will be filled anew. `error` is raised from `wait`."""
        self._failure = error
        self._close_file()
        if self._lock is not None:
            self._lock.release()

    def _close_file(self) -> None:
        file, self._pixel_file = self._pixel_file, None
        if file is not None:
            file.close()

    # --- reading ------------------------------------------------------------------------------------------------------

    @property
    def complete(self) -> bool:
        """Whether every row is in and the manifest written."""
        self._complete = self._complete or (self.folder / "manifest.json").is_file()
        return self._complete

    @property
    def ready(self) -> np.ndarray:
        """Live flags [N]: which rows can be read."""
        return self._ready.view(bool)

    @property
    def stats(self) -> dict[str, Any]:
        """The manifest: counts of images, captions, tokens, truncated captions, unknown tokens."""
        return read_json(self.folder / "manifest.json") if self.complete else {}

    def wait(self, rows: Sequence[int] | np.ndarray, timeout_s: float = 600.0) -> None:
        """Return once all `rows` can be read.

        Raises:
            FillerGone: the process that filled is gone.
            DataError: the filling failed (the error it failed with), or `timeout_s` have passed.
        """
        rows = np.asarray(rows, dtype=np.int64)
        deadline = time.monotonic() + timeout_s
        while not (self._complete or self._ready[rows].all()):
            if self.complete:
                return
            if self._failure is not None:
                raise self._failure
            if not self.owner:
                probe = FileLock(self.folder / ".lock")
                if probe.try_acquire():
                    probe.release()
                    if not self.complete and not self._ready[rows].all():
                        raise FillerGone(
                            f"the process that filled {self.folder} is gone; open the store again to fill it"
                        )
                    return
            if time.monotonic() > deadline:
                missing = int((self._ready[rows] == 0).sum())
                raise DataError(
                    f"{missing} of {len(rows)} rows of {self.folder} did not come in {timeout_s:g} s "
                    f"({int(self._ready.sum())} of {self.count} are in)"
                )
            time.sleep(_POLL_S)

    def pixels(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """uint8 [n, C, H, W], a copy."""
        return np.asarray(self._pixels[np.asarray(rows, dtype=np.int64)])

    def tokens(self, sample_rows: np.ndarray) -> list[np.ndarray]:
        """Token ids (int32, each of its own length) of samples [n, 2] given as (image row, caption index)."""
        index = self._samples(sample_rows)
        return [np.array(self._tokens[i, : self._lengths[i]]) for i in index]

    def prompt_lens(self, sample_rows: np.ndarray) -> np.ndarray:
        """Leading tokens without a label, int32 [n], of samples [n, 2]."""
        return np.asarray(self._prompts[self._samples(sample_rows)])

    def token_lens(self, sample_rows: np.ndarray) -> np.ndarray:
        """Lengths int32 [n] of samples [n, 2], prompt included."""
        return np.asarray(self._lengths[self._samples(sample_rows)])

    def _samples(self, sample_rows: np.ndarray) -> np.ndarray:
        pairs = np.asarray(sample_rows, dtype=np.int64).reshape(-1, 2)
        if len(pairs) and (pairs[:, 1] >= self.captions_per_image[pairs[:, 0]]).any():
            raise DataError(f"a sample of split {self.split} names a caption that its image does not have")
        return self._first[pairs[:, 0]] + pairs[:, 1]

    # --- features -----------------------------------------------------------------------------------------------------

    def attach_features(self, key: str) -> bool:
        """Map the features stored under `key` into `features`; False where there are none."""
        if not (self.folder / f"features-{key}.json").is_file():
            return False
        self.features = np.load(self.folder / f"features-{key}.npy", mmap_mode="r")
        return True

    def add_features(
        self, key: str, row_shape: Sequence[int], dtype: str, batches: Iterable[tuple[np.ndarray, np.ndarray]]
    ) -> np.ndarray:
        """Store what `batches` yields as (rows [n], values [n, *row_shape]) under `key`, and attach it.

        `batches` is drained only where the features are not stored yet; packs of one node take turns.

        Raises:
            DataError: rows are missing at the end.
        """
        with FileLock(self.folder / f".features-{key}.lock"):
            if not self.attach_features(key):
                file = self.folder / f"features-{key}.npy"
                try:
                    shape = (self.count, *(int(n) for n in row_shape))
                    values = allocate(file, shape, np.dtype(dtype))
                except OSError as error:
                    raise RunError(
                        f"cannot write {file}: {error.strerror}. Free space, choose another cache, or set train.features=off."
                    ) from error
                seen = np.zeros(self.count, dtype=bool)
                for rows, part in batches:
                    values[rows] = part
                    seen[rows] = True
                if not seen.all():
                    raise DataError(
                        f"features of {int((~seen).sum())} of {self.count} images of split {self.split} are missing"
                    )
                values.flush()
                write_json(
                    self.folder / f"features-{key}.json", {"shape": list(values.shape), "dtype": str(values.dtype)}
                )
                self.attach_features(key)
        return self.features
