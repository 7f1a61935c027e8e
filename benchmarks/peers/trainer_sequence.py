"""Peer 1: one `transformers.Trainer` + peft + bitsandbytes run a setting, in sequence, each with the full budget.

python -m benchmarks.peers.trainer_sequence JOB.json      (written and called by benchmarks/sweep_vs_trainer.py)

The settings run in one process, so that imports and the images' decoding are paid once; a script started once a
setting, which is what most people have, pays them each time.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers import common


def main(job_file: str) -> None:
    job = common.read_job(job_file)
    work = Path(job["work"])
    data = common.prepare_data(job)
    captions = common.Captions(job, data)
    rungs = job["rungs"] if job["trainer_eval"] == "rungs" else [job["steps"]]
    best: dict[str, Any] = {"cider": float("-inf")}
    for trial in job["trials"]:
        print(f"{trial['trial_id']}: r={trial['r']} alpha={trial['alpha']:g} lr={trial['lr']:g}", file=sys.stderr)

        def report(step: int, cider: float, texts: dict[str, str], model: Any, trial: dict[str, Any] = trial) -> None:
            if cider > best["cider"]:
                folder = common.save_best(work / "best" / f"{trial['trial_id']}-{step}", model, texts)
                best.update(cider=cider, trial_id=trial["trial_id"], step=step, adapter=str(folder))

        with common.noting(job, trial) as notes:
            common.train_one(job, trial, data, captions, rungs, report, notes)
    (work / "result.json").write_text(json.dumps({"best": best, "lanes": 1}), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
