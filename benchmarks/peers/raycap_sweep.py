"""The product's side: `run_sweep` in a process of its own, from the same shards, with a cache that starts empty.

python -m benchmarks.peers.raycap_sweep JOB.json          (written and called by benchmarks/sweep_vs_trainer.py)

It delivers what the peers deliver: every trial trained or stopped, the best adapter, its validation captions. The
engine is the product's own, wrapped by a stopwatch.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.peers.common import read_job


def timed_engine(config: Any, job: dict[str, Any], log: Any) -> tuple[Any, Any, Any]:
    """What raycap.train.worker.build_engine builds; the seconds of its calls go to logs/<pack>.seconds.json."""
    from raycap.train.worker import build_engine

    engine, checkpoints, feed = build_engine(config, job, log)
    watch = Stopwatch(Path(job["run_dir"]) / "logs" / f"pack-{job['pack']}.seconds.json")
    family = engine.cm.family
    family.encode_images = watch.inner("vision", family.encode_images)
    engine.step = watch.outer("step", engine.step)
    engine.evaluate = watch.outer("evaluate", engine.evaluate)
    engine.release = watch.writing(engine.release)
    return engine, checkpoints, feed


class Stopwatch:
    """Seconds by kind; the tower's are counted apart from those of the call they happen in."""

    def __init__(self, file: Path):
        self.file = file
        self.seconds = {"vision": 0.0, "step": 0.0, "evaluate": 0.0}
        self.first_step: float | None = None
        self.vision_before = 0.0

    def inner(self, kind: str, call: Any) -> Any:
        def timed(*arguments: Any, **options: Any) -> Any:
            before = time.perf_counter()
            found = call(*arguments, **options)
            if getattr(found, "is_cuda", False):
                import torch

                torch.cuda.synchronize()
            self.seconds[kind] += time.perf_counter() - before
            return found

        return timed

    def outer(self, kind: str, call: Any) -> Any:
        def timed(*arguments: Any, **options: Any) -> Any:
            if self.first_step is None:
                self.first_step, self.vision_before = time.time(), self.seconds["vision"]
            before, inside = time.perf_counter(), self.seconds["vision"]
            found = call(*arguments, **options)
            self.seconds[kind] += time.perf_counter() - before - (self.seconds["vision"] - inside)
            return found

        return timed

    def writing(self, call: Any) -> Any:
        def timed(*arguments: Any, **options: Any) -> Any:
            found = call(*arguments, **options)
            facts = {"first_step": self.first_step, "vision_before": self.vision_before, "pid": os.getpid()}
            self.file.write_text(json.dumps({**self.seconds, **facts}), encoding="utf-8")
            return found

        return timed


def main(job_file: str) -> None:
    from raycap.config import from_dict
    from raycap.tune.sweep import run_sweep

    job = read_job(job_file)
    work = Path(job["work"])
    engine = f"{Path(__file__).resolve()}:timed_engine"
    found = run_sweep(from_dict(job["config"]), work / "run", job["shards"], engine=engine)
    best = next(t for t in found.trials if t.trial_id == found.best)
    result = {
        "best": {
            "cider": best.cider,
            "trial_id": best.trial_id,
            "step": best.best_step,
            "adapter": str(found.adapters[found.best]),
        },
        "lanes": job["config"]["tune"]["packs"],
        "trials": [
            {"trial_id": t.trial_id, "state": t.state, "steps": t.steps, "curve": t.curve, "loss": t.loss}
            for t in found.trials
        ],
    }
    (work / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
