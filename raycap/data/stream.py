"""The stream: shards, read, decoded, resized and tokenised by Ray Data, once, into a worker's store.

The dataset is made of descriptors of row groups, not of the rows: small tasks, so that the first rows come early, and a
damaged place in a shard is named exactly. Rows carry their number in the split, because Ray gives them in any order.
The first row groups, and all of a set that is prepared sooner than Ray Data starts, are prepared in the worker itself.
"""

from __future__ import annotations

import json
import logging
import math
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raycap.cluster import DATA_CPUS
from raycap.data.nodes import nodes_that_see
from raycap.data.parquet import open_shards, read_row_group
from raycap.data.units import SHARE, run_here
from raycap.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data

    from raycap.data.store import Store

PROCESS_ROWS = 4000
"""Rows for which one process of Ray's is started."""

START_S = 8.0
"""CPU time in which Ray Data starts: the process of its tasks and two that keep its books, all imports included."""

PrepareRow = Callable[[dict[str, Any]], Mapping[str, Any]]
"""Shard row -> {row, image_id, pixels uint8 [C, H, W], token_ids [[int]], prompt_lens [int], truncated, unknown}.

`truncated` (captions cut) and `unknown` (tokens the tokeniser does not know) may be left out; a list is summed.
"""


def dataset(
    shards_folder: Path | str, split: str, prepare_row: PrepareRow, ready: np.ndarray | None = None
) -> ray.data.Dataset | list[Any]:
    """The split as a Ray dataset of prepared rows; `prepare_row` runs in Ray's tasks and must be picklable.

    With `ready` [N] row groups whose rows are all ready are left out: they were read before a restart.

    Columns: row, image_id, pixels (bytes), shape [C, H, W], token_ids, prompt_lens, truncated, unknown. Tasks ask for a
    quarter of a CPU, so that they run beside a Train worker and Tune trials on two CPUs, where whole ones would wait
    for ever; how many run at once is bounded by the CPUs all the same. Iterating raises for a damaged shard: see
    `fill`.
    """
    groups = _missing(shards_folder, split, ready)
    return group_dataset(groups, prepare_row) if groups else []


def stream(
    shards_folder: Path | str,
    split: str,
    prepare_row: PrepareRow,
    ready: np.ndarray | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[Any]:
    """What `dataset` yields, for `fill`; from this process as long as all is in sooner than Ray Data would have started.

    A second row group is timed for that, since the first one pays for what is loaded once. So the first rows come at
    once, and a small set needs no process beside the worker's. `say` is told who reads how much.
    """
    groups = _missing(shards_folder, split, ready)
    rows = sum(g["rows"] for g in groups)
    here = 0
    for number, group in enumerate(groups):
        began = time.thread_time()
        table = prepared_table(group, prepare_row)
        row_s = (time.thread_time() - began) / group["rows"]
        yield table
        here += group["rows"]
        if number and (rows - here) * row_s > START_S:
            say(f"{split}: {here} images read here, {rows - here} by Ray Data ({row_s * 1000:.1f} ms each)")
            yield from _iterate(group_dataset(groups[number + 1 :], prepare_row))
            return
    say(f"{split}: {rows} images read here, sooner than Ray Data starts")


def _missing(shards_folder: Path | str, split: str, ready: np.ndarray | None) -> list[dict[str, Any]]:
    """Descriptors of the split's row groups, without those whose rows are all ready."""
    groups = open_shards(shards_folder).row_groups(split)
    if ready is None:
        return groups
    return [g for g in groups if not ready[g["offset"] : g["offset"] + g["rows"]].all()]


def group_dataset(groups: list[dict[str, Any]], prepare_row: PrepareRow) -> ray.data.Dataset:
    """`dataset` of these row groups alone (descriptors of `Shards.row_groups`)."""
    import ray
    import ray.data

    # Ray Data sets its logger up when it is imported; its notes would break into the live table, its errors may.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # Each process imports torch and the processor: below so many rows that costs more than a second one saves.
    worth = math.ceil(sum(g["rows"] for g in groups) / PROCESS_ROWS)
    at_once = max(1, min(len(groups), worth, math.floor(ray.cluster_resources().get("CPU", 1))))
    # A block for each descriptor: a task reads one row group, and its rows go out when it is done.
    descriptors = ray.data.from_items(groups, override_num_blocks=len(groups))
    return descriptors.map_batches(
        _ReadDecodeTokenise(prepare_row),
        batch_size=None,
        batch_format="numpy",
        num_cpus=DATA_CPUS,
        compute=ray.data.TaskPoolStrategy(size=at_once),
    )


def local_batches(shards_folder: Path | str, split: str, prepare_row: PrepareRow) -> Iterator[pa.Table]:
    """What `dataset` streams, read in this process and in order, without Ray."""
    for group in open_shards(shards_folder).row_groups(split):
        yield prepared_table(group, prepare_row)


def fill(store: Store, batches: Any, on_rows: Callable[[int], None] | None = None) -> Store:
    """Drain `batches` into `store` and finish it; a store that is full, or filled by another process, is left as it is.

    May run in a thread beside the training, which then meets an error of the filling in `Store.wait`.
    `batches` is a Ray dataset or data iterator (such as `ray.train.get_dataset_shard` gives), or an iterable of batches
    (tables, or dicts of arrays). `on_rows` is called with the number of rows that are in.

    Raises:
        DataError: a shard or a row of it cannot be read, naming file and row group, also where that happened in a task
            of Ray on another machine; rows are missing.
    """
    if not store.owner:
        return store
    came = 0
    try:
        for batch in _iterate(batches):
            pixels, columns = _pixels(batch), _columns(batch)
            rows = columns["row"]
            store.put(
                rows, pixels, columns["token_ids"], columns["prompt_lens"], columns["truncated"], columns["unknown"]
            )
            came += len(rows)
            if on_rows:
                on_rows(came)
        return store.finish()
    except Exception as error:
        said = data_error(error) or error
        store.close(said)
        if said is error:
            raise
        raise said from None


def ray_reader(prepare_row: PrepareRow) -> Callable[[list[dict[str, Any]]], Iterable[Any]]:
    """What a WindowStore reads its row groups with: Ray Data, as `dataset` does."""
    return lambda groups: _iterate(group_dataset(groups, prepare_row))


def local_reader(prepare_row: PrepareRow) -> Callable[[list[dict[str, Any]]], Iterable[Any]]:
    """The same in this process, without Ray."""
    return lambda groups: (prepared_table(group, prepare_row) for group in groups)


def run_units(work: Any, units: list[dict[str, Any]]) -> Iterator[int]:
    """A runner for `prepare` (see units.Runner): the units as a Ray dataset, over all cores of the nodes that see the
    working folder, which is said where not all do.

    Work that loads something heavy gets actors, one a GPU or, where there is none, one for every two CPUs.

    Raises:
        DataError: a unit failed with it, on whatever node.
    """
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    nodes, blind = nodes_that_see(ray, Path(work.folder))
    if blind:
        where = f"on {len(nodes)} of {len(nodes) + len(blind)} nodes" if nodes else "in this process"
        names = ", ".join(sorted(str(node.get("NodeManagerHostname") or node["NodeID"][:8]) for node in blind))
        warnings.warn(
            f"`prepare` works {where}: {work.folder} is not seen by {names}. To use all, {SHARE}", stacklevel=2
        )
    if not nodes:
        yield from run_here(work, units)
        return
    cpus, gpus = (math.floor(sum(n["Resources"].get(name, 0) for n in nodes)) for name in ("CPU", "GPU"))
    cpus = max(1, cpus)
    options: dict[str, Any] = {"num_cpus": DATA_CPUS, "batch_size": 1, "batch_format": "numpy"}
    if blind:
        options["label_selector"] = {"ray.io/node-id": f"in({','.join(node['NodeID'] for node in nodes)})"}
    if work.actors:
        size = min(len(units), gpus or max(1, cpus // 2))
        options |= {"compute": ray.data.ActorPoolStrategy(size=size), **({"num_gpus": 1} if gpus else {})}

        class Do(_DoUnit):  # a class that knows its work: Ray warns of constructor arguments, on the terminal
            def __init__(self):
                super().__init__(work)

        do: Any = Do
    else:
        options["compute"] = ray.data.TaskPoolStrategy(size=min(len(units), cpus))
        do = _DoUnit(work)
    texts = [{"unit": json.dumps(unit)} for unit in units]
    done = ray.data.from_items(texts, override_num_blocks=len(texts)).map_batches(do, **options)
    try:
        for batch in done.iter_batches(batch_size=None, batch_format="numpy"):
            yield int(batch["rows"].sum())
    except Exception as error:
        said = data_error(error)
        if said is None:
            raise
        raise said from None


class _DoUnit:
    """The map function of `run_units`, as a class for actors and as its instance for tasks."""

    def __init__(self, work: Any):
        self.work = work

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"rows": np.array([self.work(json.loads(str(text))) for text in batch["unit"]], dtype=np.int64)}


def data_error(error: BaseException) -> DataError | None:
    """The DataError behind what Ray made of it on its way here, or None when there is none."""
    seen: set[int] = set()
    queue: list[BaseException] = [error]
    while queue:
        one = queue.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if type(one) is DataError:
            return one
        queue += [
            e for e in (one.__cause__, one.__context__, getattr(one, "cause", None)) if isinstance(e, BaseException)
        ]
    # Ray may keep of a remote error no more than its text.
    told = re.findall(r"raycap\.errors\.DataError: (.+)", str(error))
    return DataError(told[-1].strip()) if told else None


class _ReadDecodeTokenise:
    """The map function: one descriptor in, the table of its prepared rows out."""

    def __init__(self, prepare_row: PrepareRow):
        self._prepare_row = prepare_row

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        for i in range(len(batch["file"])):
            group = {
                name: values[i].item() if hasattr(values[i], "item") else values[i] for name, values in batch.items()
            }
            yield prepared_table(group, self._prepare_row)


def prepared_table(group: dict[str, Any], prepare_row: PrepareRow) -> pa.Table:
    """Read one row group and prepare its rows.

    Raises:
        DataError: the row group or one of its rows cannot be used.
    """
    prepared, pixels = [], []
    for row in read_row_group(group):
        try:
            ready = prepare_row(row)
            image = np.asarray(ready["pixels"])
            if image.dtype != np.uint8 or image.ndim != 3:
                raise ValueError(f"pixels are {image.dtype} {list(image.shape)}, expected uint8 [C, H, W]")
            pixels.append(image)
            prepared.append(
                {
                    "row": row["row"],
                    "image_id": row["image_id"],
                    "shape": list(image.shape),
                    "token_ids": [[int(t) for t in ids] for ids in ready["token_ids"]],
                    "prompt_lens": [int(n) for n in ready["prompt_lens"]],
                    "truncated": _total(ready.get("truncated")),
                    "unknown": _total(ready.get("unknown")),
                }
            )
        except Exception as error:
            place = f"shard {group['file']}, row group {group['row_group']}, row {row['row']}, image {row['image_id']}"
            raise DataError(f"{place}: cannot be prepared ({type(error).__name__}: {error})") from error
    return _table(prepared, pixels)


def _table(prepared: list[dict[str, Any]], pixels: list[np.ndarray]) -> pa.Table:
    """Rows with their pixels, each image copied once."""
    import pyarrow as pa

    columns = pa.schema(
        [
            ("row", pa.int64()),
            ("image_id", pa.string()),
            ("shape", pa.list_(pa.int32())),
            ("token_ids", pa.list_(pa.list_(pa.int32()))),
            ("prompt_lens", pa.list_(pa.int32())),
            ("truncated", pa.int32()),
            ("unknown", pa.int32()),
        ]
    )
    offsets = np.cumsum([0, *(image.size for image in pixels)], dtype=np.int64)
    data = np.empty(offsets[-1], dtype=np.uint8)
    for image, begin, end in zip(pixels, offsets[:-1], offsets[1:]):
        data[begin:end].reshape(image.shape)[...] = image
    blob = pa.Array.from_buffers(pa.large_binary(), len(pixels), [None, pa.py_buffer(offsets), pa.py_buffer(data)])
    return pa.Table.from_pylist(prepared, schema=columns).append_column("pixels", blob)


def _pixels(batch: Any) -> list[np.ndarray]:
    """The images of a batch, uint8 [C, H, W] each; of a table without a copy."""
    if not hasattr(batch, "column"):
        return [_image(raw, shape) for raw, shape in zip(batch["pixels"], batch["shape"])]
    flat = []
    for chunk in batch.column("pixels").chunks:
        _, offsets, data = chunk.buffers()
        wide = np.int64 if str(chunk.type).startswith("large") else np.int32
        ends = np.frombuffer(offsets, dtype=wide)[chunk.offset : chunk.offset + len(chunk) + 1]
        data = np.frombuffer(data, dtype=np.uint8)
        flat += [data[begin:end] for begin, end in pairwise(ends)]
    return [_image(raw, shape) for raw, shape in zip(flat, batch.column("shape").to_pylist())]


def _image(raw: Any, shape: Sequence[int]) -> np.ndarray:
    return np.frombuffer(raw, dtype=np.uint8).reshape([int(n) for n in shape])


def _total(value: Any) -> int:
    return 0 if value is None else int(np.sum(value))


def _iterate(batches: Any) -> Iterable[Any]:
    if hasattr(batches, "iter_batches"):
        # Whole blocks as they come: a fixed batch size would hold rows back until it is full.
        return batches.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
    return batches


def _columns(batch: Any) -> Mapping[str, Any]:
    """All but the pixels."""
    return batch.drop_columns(["pixels"]).to_pydict() if hasattr(batch, "to_pydict") else batch
