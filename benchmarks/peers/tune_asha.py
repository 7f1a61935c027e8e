"""Peer 2: Ray Tune's ASHA over function trainables that call `transformers.Trainer`, as the libraries' guides write it.

python -m benchmarks.peers.tune_asha JOB.json             (written and called by benchmarks/sweep_vs_trainer.py)

`reuse_actors` keeps a trial's process and its imports for the next one, `tune.with_parameters` shares the decoded
images through the object store, rungs report the CIDEr of generated captions with the adapter as checkpoint, and as
many trials run side by side as the machine has room for.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.peers import common

for name, value in {
    # Nobody reads what these write; each costs the peer time.
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}.items():
    os.environ.setdefault(name, value)

_CAPTIONS: dict[str, Any] = {}
"""The scorer of this process, kept while its actor goes from trial to trial."""


def trainable(config: dict[str, Any], job: common.Job, data: dict[str, Any]) -> None:
    from ray import tune

    trial = config["trial"]
    with common.noting(job, trial) as notes:
        import torch

        torch.set_num_threads(max(1, int(job["asha_cpus"])))
        if "captions" not in _CAPTIONS:
            _CAPTIONS["captions"] = common.Captions(job, data)

        def report(step: int, cider: float, texts: dict[str, str], model: Any) -> None:
            with tempfile.TemporaryDirectory() as folder:
                common.save_best(Path(folder), model, texts)
                tune.report({"step": step, "cider": cider}, checkpoint=tune.Checkpoint.from_directory(folder))

        common.train_one(job, trial, data, _CAPTIONS["captions"], job["rungs"], report, notes)


def main(job_file: str) -> None:
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    job = common.read_job(job_file)
    work = Path(job["work"])
    gpus = job["asha_gpus"] if job["device"].startswith("cuda") else 0
    ray.init(address="local", num_cpus=job["cores"], include_dashboard=False, log_to_driver=False)
    data = common.prepare_data(job)
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(trainable, job=job, data=data), {"cpu": job["asha_cpus"], "gpu": gpus}
        ),
        param_space={"trial": tune.grid_search(job["trials"])},
        tune_config=tune.TuneConfig(
            metric="cider",
            mode="max",
            scheduler=ASHAScheduler(
                time_attr="step", grace_period=job["rungs"][0], max_t=job["steps"], reduction_factor=job["eta"]
            ),
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="asha",
            storage_path=str(work),
            verbose=0,
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1, checkpoint_score_attribute="cider"),
        ),
    )
    results = tuner.fit()
    for error in results.errors:
        raise error
    chosen = results.get_best_result("cider", "max", scope="all")
    checkpoint, metrics = max(chosen.best_checkpoints, key=lambda pair: pair[1]["cider"])
    best = {
        "cider": metrics["cider"],
        "trial_id": metrics["config"]["trial"]["trial_id"],
        "step": metrics["step"],
        "adapter": checkpoint.path,
    }
    lanes = int(job["cores"] // job["asha_cpus"]) if not gpus else int(job["gpus"] / gpus)
    lanes = min(lanes, len(job["trials"]))
    (work / "result.json").write_text(json.dumps({"best": best, "lanes": lanes}), encoding="utf-8")
    ray.shutdown()


if __name__ == "__main__":
    # Under its importable name, so that Ray's workers import this module instead of unpickling it.
    from benchmarks.peers.tune_asha import main as run

    run(sys.argv[1])
