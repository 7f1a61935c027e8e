"""The pack's rim: checkpoints that survive a torn write, errors that survive a trip through Ray, the log."""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from raycap.errors import DataError, ModelError, RunError
from raycap.files import read_json
from raycap.storage import Storage
from raycap.train.keeper import TrainKeeper
from raycap.train.worker import _log_file, _raycap_error, load_attribute, sole_worker

ENGINE = Path(__file__).parent / "toy_engine.py"


@pytest.fixture
def train(monkeypatch, tmp_path):
    """ray.train, as far as a keeper uses it: reports become numbered folders, the newest is Train's checkpoint."""
    import ray.train

    class Checkpoint:
        def __init__(self, path):
            self.path = path

        @classmethod
        def from_directory(cls, path):
            return cls(Path(path))

        def as_directory(self):
            from contextlib import nullcontext

            return nullcontext(self.path)

    found = SimpleNamespace(storage=tmp_path / "storage" / "pack-0", latest=None, count=0)

    def report(metrics, checkpoint):
        import shutil

        found.count += 1
        found.latest = found.storage / f"checkpoint_{found.count:04d}"
        shutil.copytree(checkpoint.path, found.latest)

    monkeypatch.setattr(ray.train, "Checkpoint", Checkpoint)
    monkeypatch.setattr(ray.train, "report", report)
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: found.latest and Checkpoint(found.latest))
    return found


@pytest.fixture
def keeper(train):
    lines = []
    made = TrainKeeper(
        Storage.open(train.storage.parent), "pack-0", load_attribute(f"{ENGINE}:ToyCheckpoints"), lines.append
    )
    made.lines = lines
    return made


def saved(keeper, step):
    keeper.save({"slots": {"t00": {"step": step}}}, {"t00": {"step": step, "weight": 0.5}})


def test_nothing_saved_restores_to_nothing(keeper):
    assert keeper.restore() == ({}, {})


def test_a_checkpoint_comes_back(keeper):
    saved(keeper, 1)
    saved(keeper, 2)
    meta, states = keeper.restore()
    assert meta["slots"] == {"t00": {"step": 2}} and states == {"t00": {"step": 2, "weight": 0.5}}


def test_a_pack_without_trials_can_be_saved(keeper):
    keeper.save({"slots": {}}, {})
    assert keeper.restore()[0]["slots"] == {}


def damage_states(folder):
    (folder / "states" / "states.json").write_text('{"t00": {"st')


def damage_meta(folder):
    (folder / "pack.json").write_text("")


def damage_all(folder):
    (folder / "pack.json").unlink()


@pytest.mark.parametrize("damage", [damage_states, damage_meta, damage_all])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(keeper, train, damage):
    saved(keeper, 1)
    saved(keeper, 2)
    damage(train.latest)
    assert keeper.restore()[1]["t00"]["step"] == 1
    assert any("damaged" in line for line in keeper.lines)


def test_train_forgot_its_list_and_the_newest_folder_is_found(keeper, train):
    saved(keeper, 1)
    saved(keeper, 2)
    train.latest = None
    assert keeper.restore()[1]["t00"]["step"] == 2


def test_nothing_but_damage_is_an_error_and_not_a_fresh_start(keeper, train):
    saved(keeper, 1)
    damage_states(train.latest)
    with pytest.raises(ModelError, match="none of the 1 checkpoints"):
        keeper.restore()


def test_attributes_are_found_in_modules_and_files():
    assert load_attribute("raycap.files:read_json") is read_json
    assert load_attribute(f"{ENGINE}:build").__name__ == "build"
    assert "raycap_extern_toy_engine" in sys.modules


def test_our_error_is_found_behind_what_others_made_of_it():
    told = DataError("shard a, row group 3: cannot be read")
    wrapped = RuntimeError("ray said something")
    wrapped.__cause__ = told
    assert _raycap_error(wrapped) is told
    task = RuntimeError("a task failed")
    task.cause = told
    assert _raycap_error(task) is told
    only_text = RuntimeError("UserCodeException\nraycap.errors.DataError: shard b, row group 1: torn\n")
    assert _raycap_error(only_text).message == "shard b, row group 1: torn"
    assert _raycap_error(RuntimeError("CUDA out of memory")) is None


def test_the_log_is_appended_with_times(tmp_path):
    for line in ("one", "two"):
        with _log_file(tmp_path / "logs" / "pack-0.log") as log:
            log(line)
    lines = (tmp_path / "logs" / "pack-0.log").read_text().splitlines()
    assert [re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} (\w+)", line)[1] for line in lines] == ["one", "two"]


def test_a_report_that_finds_the_disk_full_leaves_no_half_checkpoint(keeper, train, monkeypatch):
    import errno

    import ray.train

    saved(keeper, 1)

    def full(metrics, checkpoint):
        torn = train.storage / "checkpoint_0002"
        torn.mkdir()
        (torn / "pack.json").write_text("{")
        raise OSError(errno.ENOSPC, "No space left on device", str(torn))

    with monkeypatch.context() as patch:
        patch.setattr(ray.train, "report", full)
        with pytest.raises(OSError, match="No space left"):
            saved(keeper, 2)
    assert [p.name for p in sorted(train.storage.iterdir())] == ["checkpoint_0001"]
    assert keeper.restore()[1]["t00"]["step"] == 1


def test_a_worker_waits_for_the_one_before_and_does_not_wait_for_ever(tmp_path):
    lines = []
    first = sole_worker(tmp_path / "pack-0.lock", lines.append)
    with pytest.raises(RunError, match=r"process \d+ on .* still trains in"):
        sole_worker(tmp_path / "pack-0.lock", lines.append, patience_s=0.3)
    assert len(lines) == 1 and "an earlier worker" in lines[0]
    threading.Timer(0.3, first.release).start()
    sole_worker(tmp_path / "pack-0.lock", lines.append, patience_s=30).release()


def test_a_log_on_a_full_disk_says_nothing_and_raises_nothing(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "pack-0.log").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"), open("/dev/full", "a", buffering=1) as file:
        file.write("a line\n")
    with _log_file(tmp_path / "logs" / "pack-0.log") as log:
        log("a line")
