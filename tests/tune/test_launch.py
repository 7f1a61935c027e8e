"""Train's own list of checkpoints, as crashes leave it."""

from __future__ import annotations

import json

import pytest

from raycap.storage import Storage
from raycap.tune.launch import Worker, _trainer_class, mend_snapshot

NAME = "checkpoint_manager_snapshot.json"


def test_a_whole_list_stays(tmp_path):
    (tmp_path / "pack-0" / "checkpoint_1").mkdir(parents=True)
    text = json.dumps({"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_1"}]})
    (tmp_path / "pack-0" / NAME).write_text(text)
    mend_snapshot(Storage.open(tmp_path), "pack-0")
    assert (tmp_path / "pack-0" / NAME).read_text() == text


def test_a_torn_list_or_one_that_names_what_is_gone_is_set_aside(tmp_path):
    (tmp_path / "pack-0").mkdir()
    for text in (
        "",
        '{"checkpoint_results": [{"checkp',
        json.dumps({"checkpoint_results": [{"checkpoint_dir_name": "x"}]}),
    ):
        (tmp_path / "pack-0" / NAME).write_text(text)
        mend_snapshot(Storage.open(tmp_path), "pack-0")
        assert not (tmp_path / "pack-0" / NAME).exists()
    mend_snapshot(Storage.open(tmp_path / "nothing here"), "pack-0")


def test_a_thread_keeps_its_exception():
    def fail():
        raise ValueError("no")

    worker = Worker("w", fail)
    worker.start()
    worker.join()
    assert isinstance(worker.error, ValueError)


@pytest.mark.parametrize("private", [True, False])
def test_a_pack_starts_without_the_helpers_of_ray_train_that_it_has_no_use_for(monkeypatch, private):
    """Against Ray's own list, so that a helper that gets another name there is noticed here."""
    from ray.train import ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    monkeypatch.setattr("raycap.cluster.private", lambda: private)

    def helpers(kind):
        trainer = kind(lambda: None, scaling_config=ScalingConfig(num_workers=1))
        return {type(c).__name__ for c in trainer._create_default_callbacks()}

    left_out = {"DatasetsCallback"} | ({"PlacementGroupCleanerCallback"} if private else set())
    assert helpers(DataParallelTrainer) - helpers(_trainer_class()) == left_out


@pytest.mark.parametrize("private", [True, False])
def test_a_private_ray_is_not_asked_for_nodes(monkeypatch, private):
    from ray.train import ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    monkeypatch.setattr("raycap.cluster.private", lambda: private)
    seen = {}
    monkeypatch.setattr(DataParallelTrainer, "_initialize_and_run_controller", lambda self, **given: seen.update(given))
    trainer = _trainer_class()(lambda: None, scaling_config=ScalingConfig(num_workers=1))
    trainer._initialize_and_run_controller(scaling_policy="Ray's own")
    policy = seen["scaling_policy"]
    if not private:
        assert policy == "Ray's own"
        return
    policy.after_controller_start(None)
    assert policy.make_decision_for_non_running_worker_group().num_workers == 1
    assert policy._coordinator_client is None, "nobody was asked"
