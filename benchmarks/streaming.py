"""Images into the training loop: raycap's shards and store against the usual recipes, taking turns; prints JSON.

    python benchmarks/streaming.py                       1,200 generated 640x480 JPEGs, two rounds
    python benchmarks/streaming.py --rows 300 --rounds 1

An epoch ends when every row has been handed over as a batch of pixel values (224 px, float32, as the processor makes
them) and token ids, in a seeded random order. Sides:

raycap-pixels     shards of data.store=pixels (resized once by `prepare`, with the processor itself), streamed by Ray Data
                  into the store while the loop reads from it; later epochs read the store.
raycap-original   the same from shards that hold the JPEGs: every row is decoded and resized in the first epoch.
dataloader        torch's DataLoader with a worker a core: PIL decodes, the model's processor resizes and normalises.
datasets-map      datasets.map of the same once, as uint8 pixels in an Arrow file; later epochs read it.

`rows_per_core_s` are rows by CPU-seconds of all processes that a side ran (its own, its workers', Ray's), so that they do
not depend on what else the machine does; `rows_s` are by the clock. Values are medians of the rounds; `ratio` is
raycap-pixels over the dataloader, a core. `prepare` is what the resizing cost beforehand. Every side's pixel values are
compared with the processor's on the originals.

`memory` streams the pixels once more with an object store smaller than them, and holds what Ray's object store and this
process took at most: what is its own, and what it maps of the store's files, which the system takes back when it needs to.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

SIZE_PX, BATCH = 224, 32
STORE_BYTES = 100 * 2**20
"""Of the object store in the part on memory; Ray takes no less than 75 MiB."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_200)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=3, help="epochs a round; the first is told apart")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory(prefix="raycap-streaming-") as folder:
        found = run(Path(folder), args.rows, args.rounds, args.epochs, args.seed)
    print(json.dumps(found, indent=2))
    return 0


def run(root: Path, rows: int, rounds: int, epochs: int, seed: int) -> dict[str, Any]:
    """All sides on the same images, in turns; the JSON that is printed."""
    import torch

    from raycap.cluster import connect, usable_cores

    os.environ["HF_DATASETS_CACHE"] = str(root / "hf")
    torch.set_num_threads(1)
    work = Work(root, rows, seed)
    made = {store: prepared(work, store) for store in ("pixels", "original")}
    measured: dict[str, list[dict[str, Any]]] = {}
    with connect(num_cpus=usable_cores()):
        sides: dict[str, Callable[[Path], Iterator[Any]]] = {
            "raycap-pixels": lambda cache: raycap_epochs(work, made["pixels"]["folder"], cache),
            "dataloader": lambda cache: dataloader_epochs(work),
            "raycap-original": lambda cache: raycap_epochs(work, made["original"]["folder"], cache),
            "datasets-map": lambda cache: map_epochs(work, cache),
        }
        for store in made:  # Ray's workers are started, and have imported what they need, before the clock is
            drain(raycap_epochs(work, made[store]["folder"], root / f"warm-{store}"), 1, work)
        for number in range(rounds):
            for name, side in sides.items():
                cache = root / f"{name}-{number}"
                # The loader's workers start in an epoch that is not counted, as Ray's have started before.
                measured.setdefault(name, []).append(drain(side(cache), epochs, work, warm=name == "dataloader"))
                shutil.rmtree(cache, ignore_errors=True)
    table = {name: summary(values) for name, values in measured.items()}
    ours, theirs = table["raycap-pixels"]["rows_per_core_s"], table["dataloader"]["rows_per_core_s"]
    original = table["raycap-original"]["rows_per_core_s"]
    return {
        "rows": rows, "rounds": rounds, "epochs": epochs, "image": "640x480 JPEG, quality 90", "pixels": SIZE_PX,
        "processor": type(work.processor.image_processor).__name__, "cores": usable_cores(),
        "disk_bytes": {store: one["bytes"] for store, one in made.items()},
        "prepare": {store: one["cost"] for store, one in made.items()},
        "sides": table,
        "ratio": round(ours["first"] / theirs["first"], 2),
        "ratios": {
            "pixels over dataloader, first epoch": round(ours["first"] / theirs["first"], 2),
            "pixels over dataloader, later epochs": round(ours["later"] / theirs["later"], 2),
            "pixels over datasets-map, first epoch": round(
                ours["first"] / table["datasets-map"]["rows_per_core_s"]["first"], 2
            ),
            "pixels over datasets-map, later epochs": round(
                ours["later"] / table["datasets-map"]["rows_per_core_s"]["later"], 2
            ),
            "original over dataloader, first epoch": round(original["first"] / theirs["first"], 2),
        },
        "memory": memory(work, made["pixels"]["folder"], root / "memory"),
    }  # fmt: skip


class Work:
    """The images, their captions, the processor, and what a batch must hold."""

    def __init__(self, root: Path, rows: int, seed: int):
        self.root, self.rows, self.seed = root, rows, seed
        self.folder, self.model = root / "images", root / "model"
        self.files, self.captions = make_images(self.folder, rows, seed)
        make_model(self.model)
        from raycap.models import load_family

        self.family = load_family("git")
        self.processor = self.family.load_processor(str(self.model))

    def order(self, epoch: int) -> np.ndarray:
        from raycap.data.order import seeded_permutation

        return seeded_permutation(self.rows, self.seed, epoch)

    def wanted(self, row: int) -> Any:
        """Pixel values of a row, by the processor on the original."""
        from PIL import Image

        image = Image.open(self.files[row]).convert("RGB")
        return self.processor.image_processor(image, return_tensors="pt")["pixel_values"][0]


def make_images(folder: Path, rows: int, seed: int) -> tuple[list[str], list[str]]:
    """JPEGs with the detail of photographs: three octaves of noise; and captions.jsonl, all in `train` but two."""
    from PIL import Image

    folder.mkdir(parents=True)
    rng, files, lines = np.random.default_rng(seed), [], []
    for i in range(rows + 2):
        layers = [
            np.asarray(
                Image.fromarray(rng.integers(0, 255, (3 * n, 4 * n, 3), dtype=np.uint8)).resize((640, 480), 3)
            ).astype(np.float32)
            for n in (3, 20, 80)
        ]
        picture = (0.5 * layers[0] + 0.3 * layers[1] + 0.2 * layers[2]).clip(0, 255).astype(np.uint8)
        files.append(str(folder / f"{i:06d}.jpg"))
        Image.fromarray(picture).save(files[-1], quality=90)
        split = "train" if i < rows else ("val", "test")[i - rows]
        lines.append({"image": f"{i:06d}.jpg", "captions": [f"a generated picture, number {i}"], "split": split})
    (folder / "captions.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return files[:rows], [line["captions"][0] for line in lines[:rows]]


def make_model(folder: Path) -> None:
    """A GIT's processor at 224 px; no side needs weights."""
    from raycap.models.tiny.build import build_processor, build_tokenizer

    processor = build_processor(build_tokenizer(["a generated picture, number 0123456789"], vocabulary=400))
    processor.image_processor.size = {"shortest_edge": SIZE_PX}
    processor.image_processor.crop_size = {"height": SIZE_PX, "width": SIZE_PX}
    processor.save_pretrained(folder)


def prepared(work: Work, store: str) -> dict[str, Any]:
    """Shards of the images under one `data.store`, and what they cost."""
    from raycap.config import from_dict
    from raycap.data.shards import prepare
    from raycap.pipeline.tools import prepare_tools

    data = {"source": str(work.folder), "store": store}
    config = from_dict({"data": data, "model": {"path": str(work.model)}})
    out, began, cpu = work.root / f"shards-{store}", time.monotonic(), cpu_seconds()
    manifest = prepare(config, out, tools=prepare_tools(config))
    cost = {"wall_s": round(time.monotonic() - began, 2), "cpu_s": round(cpu_seconds() - cpu, 2)}
    return {"folder": out, "bytes": sum(f["bytes"] for f in manifest["files"]), "cost": cost}


# --- the sides: each yields, epoch after epoch, lists of (rows, pixel values) -------------------------------------------


def raycap_epochs(work: Work, shards_folder: Path, cache: Path) -> Iterator[Any]:
    import torch

    from raycap.data.parquet import open_shards
    from raycap.data.store import Store
    from raycap.data.stream import dataset, fill
    from raycap.models import row_preparer

    prepare_row = row_preparer("git", str(work.model), "", 48)
    shape = work.family.image_size(work.processor)
    store = Store.for_shards(open_shards(shards_folder), "train", cache, shape, 48)
    filler = threading.Thread(target=fill, args=(store, dataset(shards_folder, "train", prepare_row)))
    filler.start()
    epoch = 0
    while True:
        order = work.order(epoch)
        for begin in range(0, work.rows, BATCH):
            rows = order[begin : begin + BATCH]
            store.wait(rows)
            pixels = torch.from_numpy(store.pixels(rows))
            store.tokens(np.stack([rows, np.zeros_like(rows)], axis=1))
            yield rows, work.family.pixel_values(work.processor, pixels)
        filler.join()
        yield None
        epoch += 1


class Pictures:
    """The usual map-style dataset: open, decode, let the processor do the rest."""

    def __init__(self, work: Work):
        self.files, self.captions, self.model = work.files, work.captions, str(work.model)
        self._processor: Any = None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> tuple[int, Any, Any]:
        from PIL import Image

        if self._processor is None:
            from transformers import AutoProcessor

            self._processor = AutoProcessor.from_pretrained(self.model)
        image = Image.open(self.files[row]).convert("RGB")
        made = self._processor(images=image, text=self.captions[row], return_tensors="pt")
        return row, made["pixel_values"][0], made["input_ids"][0]


def collate(items: list[tuple[int, Any, Any]]) -> tuple[np.ndarray, Any, list[Any]]:
    import torch

    rows, pixels, tokens = zip(*items)
    return np.array(rows), torch.stack(pixels), list(tokens)


def dataloader_epochs(work: Work) -> Iterator[Any]:
    import torch
    from torch.utils.data import DataLoader

    from raycap.cluster import usable_cores

    loader = DataLoader(
        Pictures(work), batch_size=BATCH, shuffle=True, num_workers=usable_cores(), persistent_workers=True,
        multiprocessing_context="forkserver", collate_fn=collate, generator=torch.Generator().manual_seed(work.seed),
        worker_init_fn=one_thread,
    )  # fmt: skip
    while True:
        for rows, pixels, _ in loader:
            yield rows, pixels
        yield None


def one_thread(worker: int) -> None:
    import torch

    torch.set_num_threads(1)


def map_epochs(work: Work, cache: Path) -> Iterator[Any]:
    """datasets.map of decoding, resizing and tokenising, then batches by index; normalised as the others are."""
    import datasets
    import torch

    datasets.disable_progress_bars()
    family, processor = work.family, work.processor
    pictures = datasets.Dataset.from_dict({"image": work.files, "caption": work.captions})
    pictures = pictures.cast_column("image", datasets.Image())

    def resize(batch: dict[str, Any]) -> dict[str, Any]:
        pixels = [family.resize(processor, image.convert("RGB")) for image in batch["image"]]
        return {"pixels": pixels, "tokens": processor.tokenizer(batch["caption"])["input_ids"]}

    features = datasets.Features(
        {"pixels": datasets.Array3D((3, SIZE_PX, SIZE_PX), "uint8"), "tokens": datasets.List(datasets.Value("int32"))}
    )
    cache.mkdir(parents=True)
    mapped = pictures.map(
        resize, batched=True, batch_size=64, writer_batch_size=64, features=features,
        remove_columns=["image", "caption"], cache_file_name=str(cache / "mapped.arrow"),
    ).with_format("numpy")  # fmt: skip
    epoch = 0
    while True:
        order = work.order(epoch)
        for begin in range(0, work.rows, BATCH):
            rows = order[begin : begin + BATCH]
            pixels = torch.from_numpy(np.asarray(mapped[rows]["pixels"], dtype=np.uint8))
            yield rows, family.pixel_values(processor, pixels)
        yield None
        epoch += 1


# --- measuring --------------------------------------------------------------------------------------------------------


def drain(epochs: Iterator[Any], count: int, work: Work, *, warm: bool = False) -> dict[str, Any]:
    """Take `count` epochs; seconds by the clock and CPU-seconds of each. Some rows are compared with the processor's.

    With `warm` one more is taken before, and not counted.
    """
    import torch

    gc.collect()
    taken, checked = [], 0
    if warm:
        for found in epochs:
            if found is None:
                break
    began, cpu = time.monotonic(), cpu_seconds()
    for _ in range(count):
        seen, kept = 0, None
        for found in epochs:
            if found is None:
                break
            seen += len(found[0])
            kept = found
        now, now_cpu = time.monotonic(), cpu_seconds()
        if seen != work.rows:
            raise SystemExit(f"an epoch had {seen} rows of {work.rows}")
        taken.append({"wall_s": now - began, "cpu_s": now_cpu - cpu})
        for row, values in list(zip(*kept))[:4]:
            if not torch.equal(values, work.wanted(int(row))):
                raise SystemExit(f"row {row}: pixel values differ from the processor's")
            checked += 1
        began, cpu = time.monotonic(), cpu_seconds()
    epochs.close()
    return {"epochs": taken, "checked": checked, "rows": work.rows}


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds, of the first epoch and of the later ones."""
    found: dict[str, Any] = {"rows_s": {}, "rows_per_core_s": {}}
    for name, part in (("first", slice(0, 1)), ("later", slice(1, None))):
        epochs = [(e, r["rows"]) for r in rounds for e in r["epochs"][part]]
        if epochs:
            found["rows_s"][name] = round(statistics.median(rows / e["wall_s"] for e, rows in epochs), 1)
            found["rows_per_core_s"][name] = round(
                statistics.median(rows / max(e["cpu_s"], 1e-3) for e, rows in epochs), 1
            )
    found["rows_compared"] = sum(r["checked"] for r in rounds)
    return found


def cpu_seconds() -> float:
    """CPU time of this process and of all below it, those that have ended included; Ray's servers are below it too."""
    import psutil

    own = os.times()
    total = own.user + own.system + own.children_user + own.children_system
    for child in psutil.Process().children(recursive=True):
        try:
            used = child.cpu_times()
        except psutil.Error:
            continue
        total += used.user + used.system + used.children_user + used.children_system
    return total


def memory(work: Work, shards_folder: Path, cache: Path) -> dict[str, Any]:
    """Stream the set through an object store smaller than it is."""
    import ray

    found = {"set_bytes": work.rows * 3 * SIZE_PX * SIZE_PX, "object_store_bytes": STORE_BYTES}
    most = {"object_store_used_bytes": 0, "spilled_bytes": 0, "rss_anonymous_bytes": 0, "rss_file_bytes": 0}
    stop = threading.Event()
    ray.init(
        address="local", num_cpus=2, object_store_memory=STORE_BYTES, include_dashboard=False, log_to_driver=False,
        logging_level=logging.ERROR,
    )  # fmt: skip
    try:

        def watch() -> None:
            from ray._private.internal_api import node_stats

            node = ray.nodes()[0]
            place = (node["NodeManagerAddress"], node["NodeManagerPort"])
            while not stop.wait(0.2):
                stats = node_stats(*place, include_memory_info=False).store_stats
                for name, value in (
                    ("object_store_used_bytes", stats.object_store_bytes_used),
                    ("spilled_bytes", stats.spilled_bytes_total),
                    *((f"{name}_bytes", size) for name, size in resident().items()),
                ):
                    most[name] = max(most[name], int(value))

        watcher = threading.Thread(target=watch)
        before = resident()["rss_anonymous"]
        watcher.start()
        drain(raycap_epochs(work, shards_folder, cache), 1, work)
    finally:
        stop.set()
        watcher.join()
        ray.shutdown()
    return {**found, **most, "rss_anonymous_before_bytes": before}


def resident() -> dict[str, int]:
    """Bytes of this process in memory: its own, and those of files that it maps, which the system may take back."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {
        name: int(lines[key].split()[0]) * 1024 for name, key in (("rss_anonymous", "RssAnon"), ("rss_file", "RssFile"))
    }


if __name__ == "__main__":
    sys.exit(main())
