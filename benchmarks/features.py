"""Are vision features worth keeping on disk? A pack's steps and rungs with and without, taking turns; prints JSON.

    python benchmarks/features.py                                      shapes-git, some minutes on two cores
    python benchmarks/features.py iu-xray-blip --tiny train.batch=4    any preset whose weights are here, or its tiny twin

`foreseen` is what a run would decide (`train.features=auto`), by figures taken at its start. `measured` is both sides: seconds of
storing (once), of a step and of a rung (medians), and the whole run by them. `right` says whether the decision was the cheaper one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from raycap.cluster import usable_cores
from raycap.config import Config, from_dict, load_config
from raycap.data.parquet import open_shards
from raycap.data.shards import prepare_if_needed
from raycap.data.store import Store
from raycap.data.stream import fill, local_batches
from raycap.errors import RaycapError
from raycap.models import load_model, row_preparer
from raycap.pipeline.tiny import tiny_plan
from raycap.storage import Storage
from raycap.train.choice import looks
from raycap.train.engine import PackEngine
from raycap.train.keeping import keep_or_not
from raycap.tune.schedule import planned_rungs
from raycap.tune.space import sweep_trials


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="shapes-git")
    parser.add_argument("settings", metavar="key=value", nargs="*")
    parser.add_argument("--tiny", action="store_true", help="the preset's tiny random twin")
    parser.add_argument("--steps", type=int, default=10, help="optimiser steps timed in each turn")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_intermixed_args(arguments)
    torch.set_num_threads(usable_cores())
    try:
        config = chosen(args)
    except RaycapError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="raycap-features-") as folder:
        print(json.dumps({"preset": args.preset, **compare(config, Path(folder), args.steps, args.rounds)}, indent=2))
    return 0


def chosen(args: argparse.Namespace) -> Config:
    if not args.tiny:
        return load_config(args.preset, args.settings)
    plan = tiny_plan(load_config(args.preset), args.settings)
    plan.make(lambda said: print(said, file=sys.stderr))
    return plan.config


def compare(config: Config, folder: Path, steps: int, rounds: int) -> dict[str, Any]:
    """Both sides of a pack of `tune.slots` trials of `config`; stores lie in `folder`."""
    cm = load_model(config.model, config.data, lang=config.evaluate.lang)
    stores = made_stores(config, cm, folder)
    found: dict[str, Any] = {
        "device": cm.device.type,
        "compute_dtype": str(cm.compute_dtype),
        "slots": config.tune.slots,
    }
    trials, rungs = sweep_trials(config), planned_rungs(config)
    engine = PackEngine(cm, stores, with_features(config, "auto"), config.tune.slots)
    choices = keep_or_not(
        engine.images, stores, with_features(config, "auto"), Storage.open(folder / "run"), rungs=rungs,
        trials=len(trials), packs=config.tune.packs, piece=engine.images_at_once(),
    )  # fmt: skip
    found["foreseen"] = {split: dataclasses.asdict(choice) for split, choice in choices.items()}
    began = time.perf_counter()
    for store in stores.values():
        engine.images.store_features(store)
    stored_s = time.perf_counter() - began
    engine.close()
    spent: dict[str, dict[str, list[float]]] = {side: {"step": [], "rung": []} for side in ("on", "off")}
    for turn in range(rounds):
        for side in ("on", "off") if turn % 2 == 0 else ("off", "on"):
            engine = PackEngine(cm, stores, with_features(config, side), config.tune.slots)
            for spec in trials[: config.tune.slots]:
                engine.admit(spec)
            engine.step()
            spent[side]["step"].append(timed(lambda e=engine: [e.step() for _ in range(steps)]) / steps)
            spent[side]["rung"].append(timed(lambda e=engine: e.evaluate(e.active)))
            engine.close()
    sides = {side: {f"{what}_s": statistics.median(s) for what, s in took.items()} for side, took in spent.items()}
    ahead = looks(config, True, rungs, len(trials), config.tune.packs)
    turns = ahead["train"] // config.train.batch, math.ceil(ahead["val"] / (2 * config.train.val_images))
    for side, took in sides.items():
        took["run_s"] = turns[0] * took["step_s"] + turns[1] * took["rung_s"] + (stored_s if side == "on" else 0.0)
    found["measured"] = {"store_s": stored_s, "kept": sides["on"], "at_each_look": sides["off"],
                         "steps": turns[0], "rungs": turns[1],
                         "ratio": sides["off"]["run_s"] / sides["on"]["run_s"]}  # fmt: skip
    found["right"] = choices["train"].kept == (sides["on"]["run_s"] <= sides["off"]["run_s"]) if choices else None
    return found


def made_stores(config: Config, cm: Any, folder: Path) -> dict[str, Store]:
    shards = open_shards(prepare_if_needed(config))
    prepare = row_preparer(
        config.model.family, config.model.path, config.data.prompt, config.data.max_text_tokens, config.model
    )
    size = cm.family.image_size(cm.processor)
    return {
        split: fill(
            Store.for_shards(shards, split, folder, size, config.data.max_text_tokens),
            local_batches(shards.folder, split, prepare),
        )
        for split in ("train", "val")
    }


def with_features(config: Config, features: str) -> Config:
    tree = config.to_dict()
    tree["train"]["features"] = features
    return from_dict(tree)


def timed(act: Callable[[], Any]) -> float:
    began = time.perf_counter()
    act()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
