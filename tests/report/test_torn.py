"""A run folder after a power cut: every file of the ledger missing, empty or cut, and the run goes on."""

from __future__ import annotations

import pytest

from raycap.cli.common import is_run, run_config
from raycap.config import load_config
from raycap.files import read_json, write_json
from raycap.report.ledger import CLOCK, CONFIG, METRICS, PLAN, RUN_JSON, Ledger, run_status
from raycap.report.runs import load_run


def remove(file):
    file.unlink()


def empty(file):
    file.write_bytes(b"")


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.fixture
def config(tmp_path):
    return load_config("shapes-git", [f"run.dir={tmp_path / 'run'}", "train.steps=77", "tune.trials=5"])


@pytest.fixture
def interrupted(config):
    """A run that was interrupted while it scored."""
    with Ledger.create(config, command="raycap sweep shapes-git") as ledger:
        write_json(ledger.folder / PLAN, {"trials": [], "config": config.to_dict()})
        with ledger.phase("sweep"):
            pass
        ledger.add_metrics("val", "adapter", {"cider": {"score": 1.0, "signature": "s"}})
        ledger.finish("interrupted")
    return ledger.folder


@pytest.mark.parametrize("damage", [remove, empty, cut])
@pytest.mark.parametrize("name", [CONFIG, RUN_JSON, CLOCK, METRICS, PLAN])
def test_a_run_goes_on_whatever_file_was_lost(interrupted, config, name, damage):
    damage(interrupted / name)
    assert is_run(interrupted) and not load_run(interrupted).finished
    assert run_config(interrupted).to_dict() == config.to_dict()
    with Ledger.reopen(interrupted, run_config(interrupted)) as again:
        assert again.metrics in ({}, {"val": {"adapter": {"cider": {"score": 1.0, "signature": "s"}}}})
        with again.phase("export"):
            pass
        again.finish("finished")
    assert run_status(interrupted) == "finished"
    kept = interrupted / "run.1.json"
    assert kept.exists() == (not (name == RUN_JSON and damage is remove))  # what was there is put aside, never lost


def test_settings_that_were_cut_come_back_and_the_rest_of_them_is_kept(interrupted, config):
    text = (interrupted / CONFIG).read_text()
    half = text[: text.index("tune:")]
    (interrupted / CONFIG).write_text(half)
    assert load_config(str(interrupted / CONFIG)).tune.trials != 5  # valid, and half of it: the trap
    assert run_config(interrupted).tune.trials == 5
    assert (interrupted / CONFIG).read_text() == text
    assert (interrupted / f"{CONFIG}.damaged").read_text() == half


def test_a_persons_own_change_of_the_settings_is_no_damage(interrupted):
    file = interrupted / CONFIG
    file.write_text(file.read_text().replace("max_drop: 0.05", "max_drop: 0.5"))
    assert run_config(interrupted).export.max_drop == 0.5
    assert not (interrupted / f"{CONFIG}.damaged").exists()


def test_a_finished_entry_is_still_never_overwritten(interrupted):
    write_json(interrupted / RUN_JSON, {**read_json(interrupted / RUN_JSON), "status": "finished"})
    from raycap.errors import RunError

    with pytest.raises(RunError, match="is finished"):
        Ledger.reopen(interrupted, run_config(interrupted))
