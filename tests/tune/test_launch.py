"""Train's own list of checkpoints, as crashes leave it."""

from __future__ import annotations

import json

from raycap.storage import Storage
from raycap.tune.launch import Worker, mend_snapshot

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
