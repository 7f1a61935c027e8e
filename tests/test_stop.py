"""Ctrl-C and SIGTERM: once in order, twice at once, whoever else has set handlers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from raycap.config import load_config
from raycap.data.lock import FileLock
from raycap.errors import Interrupted
from raycap.files import read_json
from raycap.stop import Stopped, hold_signals, resume_command, stoppable


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_unwinds_the_run_past_those_who_catch_exceptions(number, name):
    with pytest.raises(Stopped, match=f"stopped by {name}"):
        with stoppable():
            try:
                send(number)
                time.sleep(5)
            except Exception:
                pytest.fail("a stop is no failure")


def test_a_gentle_stage_counts_the_first_and_the_second_raises():
    with stoppable() as stop, stop.gently():
        send(signal.SIGTERM)
        assert (stop.count, stop.name) == (1, "SIGTERM")
        with pytest.raises(Stopped, match="Ctrl-C"):
            send(signal.SIGINT)
            time.sleep(5)


def test_blocks_share_one_count_and_the_outermost_gives_the_signals_back():
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with stoppable() as outer:
        with stoppable() as inner, inner.gently():
            send(signal.SIGINT)
        assert inner is outer and outer.count == 1
        assert signal.getsignal(signal.SIGINT) == outer.take
        with pytest.raises(Stopped):
            send(signal.SIGINT)
            time.sleep(5)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_waiting_ends_with_a_signal_and_not_before():
    with stoppable() as stop, stop.gently():
        began = time.monotonic()
        stop.wait(0.2)
        assert time.monotonic() - began >= 0.2
        threading.Timer(0.1, send, [signal.SIGINT]).start()
        began = time.monotonic()
        stop.wait(10)
        assert stop.count == 1 and time.monotonic() - began < 5


def test_a_handler_that_a_library_sets_inside_is_taken_back():
    with stoppable() as stop:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # as ray.init does
        hold_signals()
        assert signal.getsignal(signal.SIGTERM) == stop.take
    hold_signals()
    assert signal.getsignal(signal.SIGTERM) != stop.take  # nobody's run: nobody's handlers


def test_outside_the_main_thread_there_are_no_signals_to_take():
    found = []

    def work():
        with stoppable() as stop, stop.gently():
            found.append(stop.count)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [0]


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["/usr/bin/raycap", "sweep", "shapes-git"], "raycap sweep --resume 'my runs/a'"),
        (["/usr/bin/raycap", "train", "shapes-git"], "raycap train --resume 'my runs/a'"),
        (["/x/raycap/__main__.py", "train", "p"], "python -m raycap train --resume 'my runs/a'"),
        (["jobs/sweep.py"], "python jobs/sweep.py --resume 'my runs/a'"),
        (["/usr/bin/pytest", "-q"], "raycap sweep --resume 'my runs/a'"),
    ],
)
def test_the_command_that_goes_on_is_the_one_that_began(monkeypatch, argv, told):
    monkeypatch.setattr(sys, "argv", argv)
    assert resume_command(Path("my runs/a")) == told


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_stopped_in_any_stage_is_noted_as_interrupted(number, tmp_path, monkeypatch):
    from raycap.pipeline import main_job

    ended = []

    def stage(self):
        send(number)
        time.sleep(5)
        ended.append("went on")

    monkeypatch.setattr(main_job._Run, "_prepare", stage)
    folder = tmp_path / "run"
    config = load_config("shapes-git", [f"run.dir={folder}"])
    with pytest.raises(Interrupted, match=f"--resume {folder}"):
        main_job.sweep(config, plain=True, command="raycap sweep shapes-git")
    entry = read_json(folder / "run.json")
    assert entry["status"] == "interrupted" and "--resume" in entry["reason"] and not ended


def test_prepare_ends_with_130_and_the_next_one_begins_anew(tmp_path):
    command = [sys.executable, "-m", "raycap", "prepare", "shapes-git", "--out", str(tmp_path / "out"), "--plain"]
    process = subprocess.Popen(
        [*command, "data.shapes_images=100000,5,5"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert any("rows/s" in line for line in process.stderr)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "stopped by SIGTERM" in said and "Traceback" not in said
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert subprocess.run([*command, "data.shapes_images=8,5,5"], capture_output=True, timeout=120).returncode == 0
    assert read_json(tmp_path / "out" / "manifest.json")["counts"] == {"train": 8, "val": 5, "test": 5}


def test_a_lock_names_who_holds_it_and_a_dead_holder_holds_nothing(tmp_path):
    code = (
        "import sys, time\nfrom raycap.data.lock import FileLock\n"
        f"lock = FileLock({str(tmp_path / 'lock')!r})\nassert lock.try_acquire()\nprint('held', flush=True)\ntime.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    mine = FileLock(tmp_path / "lock")
    try:
        assert other.stdout.readline().strip() == "held"
        assert not mine.try_acquire() and mine.holder.startswith(f"process {other.pid} on ")
    finally:
        other.kill()
        other.wait()
    assert mine.try_acquire() and mine.holder.startswith(f"process {os.getpid()} on ")
    mine.release()


def test_a_killed_run_leaves_no_java(tmp_path):
    import psutil

    code = (
        "import time\nfrom raycap.evaluate.meteor import Meteor\nmeteor = Meteor()\nmeteor.start()\n"
        "print(meteor.pid, flush=True)\ntime.sleep(60)"
    )
    driver = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    java = psutil.Process(int(driver.stdout.readline()))
    driver.kill()
    driver.wait()
    deadline = time.monotonic() + 120
    while java.is_running() and java.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "Java outlived its driver by two minutes"
        time.sleep(0.1)
