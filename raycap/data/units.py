"""`prepare` in pieces: each piece of work is done once, by whatever process, and leaves its result as a file.

A piece (a unit) reads what the driver spooled, writes its outputs whole under their final names, then its result. What
has a result is not done again: so a killed `prepare` goes on where it was, and pieces may run in any order, in this
process or in Ray's, on any node that sees the folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from raycap.data.parquet import ROW_GROUP_ROWS, schema
from raycap.data.pixels import encode_stored
from raycap.errors import DataError
from raycap.files import read_json, sha256_file, sha256_json, write_json

if TYPE_CHECKING:
    from PIL import Image

UNIT_ROWS = 256
"""Rows that one piece of the checking takes."""

SHARE = "give `prepare` a folder (--out, or run.cache_dir) that all nodes of the cluster share"

Unit = dict[str, Any]
"""{"number": its name, "rows": how many, ...}: what JSON can carry."""
Runner = Callable[["Work", list[Unit]], Iterable[int]]
"""Does the work of all units, in any order, and yields the rows of each as it is done."""
Progress = Callable[[int, int | None, str], None]
"""Called as progress(done, total, message)."""


class Resizer(Protocol):
    """An image as one model's processor resizes it; picklable."""

    def __call__(self, image: Image.Image) -> np.ndarray:
        """uint8 [C, H, W] of an RGB image."""

    def describe(self) -> dict[str, Any]:
        """For the manifest: {"processor": hash of what the pixels depend on, "shape": [C, H, W], ...}."""


class Scorer(Protocol):
    """CLIPScores; picklable, and light until it is called."""

    def __call__(self, images: list[bytes], captions: list[list[str]]) -> list[list[float]]:
        """The score of every caption with its image."""

    def describe(self) -> dict[str, Any]:
        """For the manifest: {"model": ...}, what the scores depend on."""


def run_here(work: Work, units: list[Unit]) -> Iterator[int]:
    """The plain runner: in this process, one after the other."""
    for unit in units:
        yield work(unit)


@dataclass(frozen=True, slots=True)
class Tools:
    """What `prepare` is given from the rooms above: who does the work, the model's resizing, the scores."""

    run: Runner = run_here
    resize: Resizer | None = None
    score: Scorer | None = None

    def describe(self) -> dict[str, Any]:
        """What the shards depend on."""
        found = {}
        if self.resize is not None:
            found["resize"] = self.resize.describe()
        if self.score is not None:
            found["clip_score"] = self.score.describe()
        return found


class Work(ABC):
    """One kind of piece; subclasses say what it does. `folder` is the working folder inside the shards' one."""

    kind = ""
    actors = False
    """Whether what a process loads for it is heavy, so that few processes should, and on a GPU where there is one."""

    def __init__(self, folder: Path):
        self.folder = str(Path(folder).absolute())  # Ray's workers stand in other folders

    def __call__(self, unit: Unit) -> int:
        """Do the unit, leave its result, and return its number of rows.

        Raises:
            DataError: this node does not see the working folder.
        """
        if not Path(self.folder).is_dir():
            raise DataError(f"node {socket.gethostname()} does not see {self.folder}: {SHARE}")
        write_json(self.result_file(unit), self.work(unit))
        return unit["rows"]

    @abstractmethod
    def work(self, unit: Unit) -> dict[str, Any]:
        """What is kept of the unit."""

    def result_file(self, unit: Unit) -> Path:
        return Path(self.folder) / f"{self.kind}-{unit['number']}.json"

    def done(self, unit: Unit) -> bool:
        return self.result_file(unit).is_file()


def run_units(
    work: Work, units: list[Unit], run: Runner, progress: Progress | None, what: str
) -> Iterator[dict[str, Any]]:
    """Results of all units in order, those that an earlier `prepare` left included.

    Raises:
        DataError: a unit's result is missing after the work: its node does not share the folder.
    """
    left = [unit for unit in units if not work.done(unit)]
    total = sum(unit["rows"] for unit in units)
    done = total - sum(unit["rows"] for unit in left)
    rate = Rate(progress, done, total, what)
    if left:
        for rows in run(work, left):
            rate.add(rows)
    for unit in units:
        try:
            yield read_json(work.result_file(unit))
        except FileNotFoundError as error:
            raise DataError(f"{work.result_file(unit)} was written on another node and is not here: {SHARE}") from error


class Rate:
    """Says how fast rows go, and how long the rest takes."""

    def __init__(self, progress: Progress | None, done: int, total: int, what: str, clock=time.monotonic):
        self.progress, self.done, self.total, self.what, self.clock = progress, done, total, what, clock
        self.before, self.began = done, clock()

    def add(self, rows: int) -> None:
        self.done += rows
        if self.progress:
            rate = (self.done - self.before) / max(self.clock() - self.began, 1e-9)
            left_s = (self.total - self.done) / max(rate, 1e-9)
            self.progress(self.done, self.total, f"{self.what}, {rate:,.0f} rows/s, {left_s:,.0f} s left")


# --- the pieces -------------------------------------------------------------------------------------------------------


class CheckWork(Work):
    """Decode and check spooled images. Result: {"found": [facts of a CheckedImage or a BadImage, in order]}.

    Images that had to be changed go into a spool of their own, named in their facts.
    """

    kind = "checked"

    def __init__(self, folder: Path, check: Callable[[bytes], Any]):
        super().__init__(folder)
        self.check = check

    def work(self, unit: Unit) -> dict[str, Any]:
        found, changed = [], io.BytesIO()
        name = f"changed-{unit['number']}.bin"
        for place in unit["places"]:
            checked, data = facts_of(self.check(read_place(self.folder, place)))
            if checked.get("changed"):
                checked["place"] = [name, changed.tell(), len(data)]
                changed.write(data)
            found.append(checked)
        if changed.tell():
            _write_whole(Path(self.folder) / name, changed.getvalue())
        return {"found": found}


class ScoreWork(Work):
    """CLIPScores of rows. Result: {"scores": [[score of each caption] of each row]}."""

    kind = "scored"
    actors = True

    def __init__(self, folder: Path, score: Scorer):
        super().__init__(folder)
        self.score = score

    def work(self, unit: Unit) -> dict[str, Any]:
        images = [read_place(self.folder, place) for place in unit["places"]]
        # As the shards will hold them: what is read back equals what was chosen by.
        scores = self.score(images, unit["captions"])
        return {"scores": [[float(np.float32(s)) for s in row] for row in scores]}


class ShardWork(Work):
    """Write one shard. Result: {"entry": its line in the manifest, "hashes": [one of each row]}."""

    kind = "shard"

    def __init__(self, folder: Path, store: str, quality: int, resize: Resizer | None, clip_scores: bool):
        super().__init__(folder)
        self.store, self.quality, self.resize, self.clip_scores = store, quality, resize, clip_scores

    def work(self, unit: Unit) -> dict[str, Any]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        name, out, hashes = f"{unit['number']}.parquet", Path(self.folder).parent, []
        columns = schema(clip_scores=self.clip_scores)
        with pq.ParquetWriter(out / f".{name}", columns) as writer:
            for start in range(0, len(unit["records"]), ROW_GROUP_ROWS):
                records = []
                for record in unit["records"][start : start + ROW_GROUP_ROWS]:
                    record = self._with_image(dict(record))
                    hashes.append(sha256_json({k: v for k, v in record.items() if k != "image"}))
                    records.append(record)
                writer.write_table(pa.Table.from_pylist(records, schema=columns), row_group_size=ROW_GROUP_ROWS)
        (out / f".{name}").replace(out / name)
        entry = {"name": name, "split": unit["split"], "rows": unit["rows"], "bytes": (out / name).stat().st_size}
        return {"entry": {**entry, "sha256": sha256_file(out / name)}, "hashes": hashes}

    def _with_image(self, record: dict[str, Any]) -> dict[str, Any]:
        data = read_place(self.folder, record.pop("place"))
        path = record.pop("path")
        if self.resize is not None:
            data, facts = encode_stored(data, self.resize, self.store, self.quality)
            record.update(facts)
        return {"image_id": record.pop("image_id"), "image": {"bytes": data, "path": path}, **record}

    def done(self, unit: Unit) -> bool:
        if not super().done(unit):
            return False
        shard = Path(self.folder).parent / f"{unit['number']}.parquet"
        return shard.is_file() and shard.stat().st_size == read_json(self.result_file(unit))["entry"]["bytes"]


def facts_of(checked: Any) -> tuple[dict[str, Any], bytes | None]:
    """A CheckedImage or BadImage as what JSON can carry, and the image's bytes."""
    facts = dataclasses.asdict(checked)
    data = facts.pop("data", None)
    if "look" in facts:
        facts["look"]["thumbnail"] = facts["look"]["thumbnail"].hex()
    return facts, data


def read_place(folder: Path | str, place: list[Any]) -> bytes:
    """The bytes at [file in the working folder, start, size]."""
    name, start, size = place
    with open(Path(folder) / name, "rb") as file:
        file.seek(start)
        return file.read(size)


class Spool:
    """Bytes put one after the other into files of UNIT_ROWS entries, at places that `read_place` reads."""

    def __init__(self, folder: Path):
        self.folder, self.count, self._file, self._name = folder, 0, None, ""

    def put(self, data: bytes) -> list[Any]:
        if self.count % UNIT_ROWS == 0:
            self.close()
            self._name = f"raw-{self.count // UNIT_ROWS:05d}.bin"
            self._file = open(self.folder / self._name, "wb")  # noqa: SIM115 - closed by the next one, or by `close`
        self.count += 1
        start = self._file.tell()
        self._file.write(data)
        return [self._name, start, len(data)]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def choose_best(scores: list[float], seed: int, image_id: str) -> int:
    """Index of the highest score; of several, one that the seed and the image's id pick."""
    best = [i for i, score in enumerate(scores) if score == max(scores)]
    return min(best, key=lambda i: hashlib.sha256(f"{seed}\0{image_id}\0{i}".encode()).digest())


def _write_whole(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(data)
    temporary.replace(path)


def parts(items: list[Any], size: int) -> list[list[Any]]:
    """`items` in pieces of `size`."""
    return [items[i : i + size] for i in range(0, len(items), size)]
