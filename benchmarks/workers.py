"""Two workers that share every step of a pack (train.workers=2) against one with all of the cores, taking turns; JSON.

    python -m benchmarks.workers                              shapes-git, a minute on two cores
    python -m benchmarks.workers tune.slots=1 train.batch=64  a pack of one, a larger batch

Both sides have the same cores: N workers of cores / N threads each, connected by gloo as Ray Train connects them, and one
worker of all of them, whose pieces run side by side in lanes (raycap/train/lanes.py). `ratio` above 1: workers are faster.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

from benchmarks.features import made_stores
from raycap.cluster import usable_cores
from raycap.config import from_dict, load_config
from raycap.data.store import Store
from raycap.models import load_model
from raycap.train.engine import PackEngine
from raycap.train.group import Group, connected
from raycap.tune.space import sweep_trials

WARM_STEPS = 5


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", metavar="key=value", nargs="*")
    parser.add_argument("--preset", default="shapes-git")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20, help="optimiser steps timed in each turn")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_intermixed_args(arguments)
    config = load_config(args.preset, [*args.settings, f"train.workers={args.workers}"])
    cores = max(args.workers, usable_cores())
    seconds: dict[int, list[float]] = {1: [], args.workers: []}
    with tempfile.TemporaryDirectory(prefix="raycap-workers-") as folder:
        cm = load_model(config.model, config.data, lang=config.evaluate.lang, device="cpu")
        stores = {split: str(store.folder) for split, store in made_stores(config, cm, Path(folder)).items()}
        del cm
        for turn in range(args.rounds):
            for workers in sorted(seconds, reverse=bool(turn % 2)):
                seconds[workers].append(side(config.to_dict(), stores, workers, cores // workers, args.steps))
    medians = {workers: statistics.median(found) for workers, found in seconds.items()}
    told = {
        "preset": args.preset, "slots": config.tune.slots, "batch": config.train.batch, "cores": cores,
        "step_s": {f"{n} x {cores // n} threads": round(s, 4) for n, s in medians.items()},
        "step_s_by_round": {str(n): [round(s, 4) for s in found] for n, found in seconds.items()},
        "ratio": round(medians[1] / medians[args.workers], 3),
    }  # fmt: skip
    print(json.dumps(told, indent=2))
    return 0


def side(tree: dict[str, Any], stores: dict[str, str], workers: int, threads: int, steps: int) -> float:
    """Median seconds of a step by this many worker processes."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="raycap-workers-") as folder:
        answer = context.SimpleQueue()
        given = (f"file://{folder}/rendezvous", tree, stores, workers, threads, steps, answer)
        processes = [context.Process(target=worker, args=(rank, *given)) for rank in range(workers)]
        for process in processes:
            process.start()
        found = answer.get()
        for process in processes:
            process.join()
    return found


def worker(
    rank: int,
    place: str,
    tree: dict[str, Any],
    stores: dict[str, str],
    workers: int,
    threads: int,
    steps: int,
    answer: Any,
) -> None:
    """One worker; the first one answers."""
    torch.set_num_threads(threads)
    tree["train"]["workers"] = workers
    config, group = from_dict(tree), Group()
    if workers > 1:
        distributed.init_process_group("gloo", init_method=place, rank=rank, world_size=workers)
        group = connected()
    cm = load_model(config.model, config.data, lang=config.evaluate.lang, device="cpu")
    opened = {split: Store.open(Path(folder)) for split, folder in stores.items()}
    engine = PackEngine(cm, opened, config, config.tune.slots, group)
    for spec in sweep_trials(config)[: config.tune.slots]:
        engine.admit(spec)
    spent = []
    for _ in range(WARM_STEPS + steps):
        began = time.perf_counter()
        engine.step()
        spent.append(time.perf_counter() - began)
    if rank == 0:
        answer.put(statistics.median(spent[WARM_STEPS:]))
    engine.close()
    group.leave()


if __name__ == "__main__":
    raise SystemExit(main())
