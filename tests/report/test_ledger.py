from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import threading

import pytest

from raycap.config import load_config
from raycap.errors import RunError
from raycap.report import ledger as ledger_module
from raycap.report.ledger import METRIC_COLUMNS, TRIAL_COLUMNS, Ledger, choose_run_dir
from raycap.report.provenance import MemoryMeter, commit, versions
from raycap.report.runs import load_run

ENTRY_KEYS = {
    "name", "status", "command", "seed", "seconds", "peak_memory_bytes", "versions", "commit", "data_sha256",
    "base_sha256", "best_trial", "metrics",
}  # fmt: skip


def test_a_run_folder_reads_back_as_it_was_written(run_folder, config, trials):
    run = load_run(run_folder)
    assert run.config == config.to_dict()
    assert run.finished and run.name == "shapes-git" and run.best["rank"] == 8
    assert set(run.entry) >= ENTRY_KEYS
    assert run.entry["command"] == "raycap sweep shapes-git train.steps=90"
    for read, written in zip(run.trials, trials, strict=True):
        for column in TRIAL_COLUMNS:
            assert read[column] == written[column], column
        assert read["curve"] == written["curve"]
    assert run.metrics["test"]["served"]["cider"] == {"score": 1.3579, "signature": "cider|served"}
    assert run.gate["passed"] is True
    assert run.variants("test") == ["constant", "zero-shot", "adapter", "served"]
    assert run.predictions("test", "served")[0] == {
        "image_id": "a",
        "caption": "served of a",
        "references": ["a <b>red</b> square", "赤い四角形"],
    }


def test_the_tables_have_the_columns_of_the_contract(run_folder):
    with open(run_folder / "trials.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == list(TRIAL_COLUMNS) and len(rows) == 5
    assert rows[1][TRIAL_COLUMNS.index("targets")] == "query value"
    assert rows[4][TRIAL_COLUMNS.index("cider")] == "", "a trial without a score has an empty cell"
    with open(run_folder / "metrics.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == list(METRIC_COLUMNS) and len(rows) == 1 + 4 * 2


def test_an_entry_is_never_overwritten(run_folder, config):
    before = (run_folder / "run.json").read_bytes()
    with pytest.raises(RunError, match="finished"):
        Ledger.reopen(run_folder, config)
    with pytest.raises(RunError, match=r"finished run.*run\.dir"):
        choose_run_dir(config)
    with pytest.raises(RunError, match="never overwritten"):
        ledger_module.write_new(run_folder / "run.json", {"status": "failed"})
    assert (run_folder / "run.json").read_bytes() == before
    assert not list(run_folder.glob(".run.json*"))


def test_where_the_file_system_has_no_links_an_entry_is_not_overwritten_either(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError("not supported")

    monkeypatch.setattr(ledger_module.os, "link", no_links)
    path = tmp_path / "run.json"
    ledger_module.write_new(path, {"n": 1})
    with pytest.raises(RunError, match="never overwritten"):
        ledger_module.write_new(path, {"n": 2})
    assert json.loads(path.read_text()) == {"n": 1}


def test_an_interrupted_run_goes_on_and_keeps_its_first_entry(config):
    with Ledger.create(config) as first:
        with first.phase("sweep"):
            pass
        first.add_metrics("val", "zero-shot", {"cider": {"score": 0.5, "signature": "s"}})
        first.finish("interrupted", reason="Ctrl-C")
    with pytest.raises(RunError, match="--resume"):
        choose_run_dir(config)
    with Ledger.reopen(first.folder, config) as again:
        assert again.seconds_by_phase.keys() == {"sweep"}, "time before the interruption counts"
        assert again.metrics["val"]["zero-shot"]["cider"]["score"] == 0.5
        again.finish("finished")
    kept = json.loads((first.folder / "run.1.json").read_text())
    assert (kept["status"], kept["reason"]) == ("interrupted", "Ctrl-C")
    assert load_run(first.folder).finished


def test_two_processes_never_work_on_one_folder(config):
    with Ledger.create(config) as ledger:
        with pytest.raises(RunError, match=f"in use by process {os.getpid()} on"):
            Ledger.reopen(ledger.folder, config)
    Ledger.reopen(ledger.folder, config).close()


def test_folders_are_numbered_and_claimed(tmp_path):
    config = load_config("shapes-git")
    found = []

    def claim():
        found.append(choose_run_dir(config, root=tmp_path).name)

    threads = [threading.Thread(target=claim) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == ["shapes-git", *(f"shapes-git-{n}" for n in range(2, 7))]
    assert choose_run_dir(config, root=tmp_path, claim=False).name != "shapes-git-7", "an empty folder is free"
    for name in found:
        Ledger.create(config, tmp_path / name).close()
    assert choose_run_dir(config, root=tmp_path, claim=False).name == "shapes-git-7"
    assert not (tmp_path / "shapes-git-7").exists()


def test_a_folder_of_other_files_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(RunError, match="not empty and holds no run"):
        choose_run_dir(load_config("shapes-git", [f"run.dir={tmp_path}"]))


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match=r"cannot make the run folder .*run\.dir"):
        choose_run_dir(load_config("shapes-git", [f"run.dir={tmp_path / 'file' / 'run'}"]))


def test_reading_what_is_no_run_is_told(tmp_path):
    with pytest.raises(RunError, match="no run folder"):
        load_run(tmp_path)


def test_predictions_that_are_not_there_name_those_that_are(run_folder):
    with pytest.raises(RunError, match="constant, zero-shot, adapter, served"):
        load_run(run_folder).predictions("test", "merged")


def test_versions_and_commit_import_nothing():
    assert {"python", "raycap", "torch", "ray"} <= set(versions())
    revision, dirty = commit()
    assert revision == "" or len(revision) == 40
    assert isinstance(dirty, bool)
    code = (
        "import sys; from raycap.report.provenance import versions; versions();"
        "print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_meter_sees_memory_of_a_child():
    code = "import sys; data = bytearray(120 * 2**20); print('ready', flush=True); sys.stdin.read()"
    with MemoryMeter(every_s=60) as meter:
        alone = meter.peak_bytes
        child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            child.stdout.readline()
            assert meter.sample() > alone + 100 * 2**20
        finally:
            child.communicate()
    assert meter.peak_bytes > alone + 100 * 2**20
