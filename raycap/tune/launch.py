"""The threads of a sweep's driver: one that runs Tune's loop, and one a pack that runs `TorchTrainer.fit`.

Both block for the whole run, and both may: they call Ray and wait. The main thread keeps what they must not have,
signals and the terminal. (Train registers its SIGINT handler in the main thread alone, and so does Tune.)
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raycap.storage import Storage
from raycap.train.shelf import train_storage
from raycap.tune.nodes import spread

COLLECTIVE_TIMEOUT_S = 4 * 3600
"""How long workers wait for each other: one may store the features of a whole set meanwhile. A dead one is noticed."""
STOPPING: set[str] = set()
"""Drivers whose sweep is being stopped. Tune pickles its stopper, so the flag cannot live in it."""


class Worker(threading.Thread):
    """A thread whose exception is kept."""

    def __init__(self, name: str, work: Callable[[], None]):
        super().__init__(name=name, daemon=True)
        self.work = work
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.work()
        except BaseException as error:  # handed to the main thread, which raises it
            self.error = error


def tune_worker(trials: list[str], scheduler: Any, job: dict[str, Any], *, clients: int, retries: int) -> Worker:
    """Ray Tune over thin clients, one for each trial, in order; at most `clients` at a time."""

    def work() -> None:
        from ray import tune

        from raycap.cluster import CLIENT_CPUS
        from raycap.tune.trial import trial_client

        place = {"board": job["board"], "namespace": job["namespace"]}
        tune.Tuner(
            tune.with_resources(trial_client, {"cpu": CLIENT_CPUS}),
            param_space={"trial": tune.grid_search(trials), **place},
            tune_config=tune.TuneConfig(scheduler=scheduler, max_concurrent_trials=clients, reuse_actors=True),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(Path(job["run_dir"]) / "checkpoints"),
                verbose=0,
                stop=_stopper(job["driver"]),
                failure_config=tune.FailureConfig(max_failures=retries),
            ),
        ).fit()

    return Worker("tune", work)


def pack_worker(job: dict[str, Any], resources: dict[str, float], retries: int, workers: int = 1) -> Worker:
    """Ray Train's trainer for one pack; the death of a worker is Train's matter, that of its controller is ours.

    Several workers are a process group of torch (gloo, or nccl on GPUs); when one dies, Train starts all of them anew.
    """
    name = f"pack-{job['pack']}"
    storage = train_storage(job)

    def work() -> None:
        import ray
        import ray.train

        from raycap.train.worker import pack_loop

        backend = None
        if workers > 1:
            from ray.train.torch import TorchConfig

            backend = TorchConfig(timeout_s=COLLECTIVE_TIMEOUT_S)
        others = set(ray.util.placement_group_table())
        for attempt in range(retries + 1):
            mend_snapshot(storage, name)
            trainer = _trainer_class()(
                pack_loop,
                train_loop_config=job,
                backend_config=backend,
                scaling_config=ray.train.ScalingConfig(
                    num_workers=workers, use_gpu="GPU" in resources, resources_per_worker=resources
                ),
                run_config=ray.train.RunConfig(
                    name=name,
                    storage_path=storage.root,
                    storage_filesystem=storage.filesystem,
                    callbacks=[spread(job["pack"], resources, job["driver_node"], workers)],
                    failure_config=ray.train.FailureConfig(max_failures=retries),
                    checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
                ),
            )
            try:
                trainer.fit()
                return
            except ray.exceptions.RayActorError:
                if attempt == retries:
                    raise
                board = ray.get_actor(job["board"], namespace=job["namespace"])
                ray.get(board.evict.remote(name))
                _free_group(ray, others, [resources] * workers)

    return Worker(name, work)


def _trainer_class() -> type:
    """What TorchTrainer is made of, without the helpers that a pack has no use for.

    A pack of one process has no process group to set up, so its controller does not have to import torch. Each helper
    left out is a process that imports Ray, two seconds of a core while the pack starts: the manager of the datasets,
    of which no pack has any (Feed makes its own streams); and on a private Ray, which does not grow and ends with this
    process, what asks for nodes and the cleaner that frees what a dead controller had reserved (see _free_group).
    """
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from raycap.cluster import private

    alone = private()
    unused = {"DatasetsCallback"} | ({"PlacementGroupCleanerCallback"} if alone else set())

    class AsItIs(FixedScalingPolicy):
        """Asks nobody for nodes."""

        def after_controller_start(self, train_run_context: Any) -> None:
            pass

        def _maybe_send_resource_request(self) -> None:
            pass

    class PackTrainer(DataParallelTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            return [c for c in super()._create_default_callbacks() if type(c).__name__ not in unused]

        def _initialize_and_run_controller(self, **settings: Any) -> Any:
            if alone:
                settings["scaling_policy"] = AsItIs(scaling_config=self.scaling_config)
            return super()._initialize_and_run_controller(**settings)

    return PackTrainer


def _free_group(ray: Any, others: set[str], bundles: list[dict[str, float]]) -> None:
    """Remove the reservation that a killed controller left, and with it its worker; else the next one waits for ever.

    Ray has a cleaner for it, which asks the dashboard; a private Ray runs without one. On a shared cluster it is left
    to that cleaner, because a reservation does not tell whose it is.
    """
    from ray.util.placement_group import PlacementGroup

    from raycap.cluster import private

    if not private():
        return
    for group, entry in ray.util.placement_group_table().items():
        mine = group not in others and list(entry["bundles"].values()) == bundles
        if mine and entry["state"] != "REMOVED":
            ray.util.remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group))))


def mend_snapshot(storage: Storage, pack: str) -> None:
    """Set aside Train's list of checkpoints when a crash left it torn, or when it names some that are gone.

    Train writes the list in place, and refuses to start on a damaged one; the worker finds whole checkpoints itself.
    """
    snapshot = f"{pack}/checkpoint_manager_snapshot.json"
    raw = storage.get(snapshot)
    if raw is None:
        return
    try:
        listed = {entry["checkpoint_dir_name"] for entry in json.loads(raw)["checkpoint_results"]}
        whole = listed <= set(storage.folders(pack))
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        storage.put(f"{snapshot.removesuffix('.json')}.damaged", raw)
        storage.delete(snapshot)


def _stopper(driver: str) -> Any:
    from ray.tune.stopper import Stopper

    class WhenStopping(Stopper):
        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            return driver in STOPPING

    return WhenStopping()
