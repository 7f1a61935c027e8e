"""Sweeps on Ray: Tune, Train, board and packs together, with a stand-in engine and real kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toy_engine
from simulation import kill_one, settings, simulate

from raycap.errors import DataError, RunError
from raycap.tune.sweep import run_lock, run_sweep

TOY = f"{toy_engine.__file__}:build_slow"


def adapters(folder: Path) -> dict[str, str]:
    return {file.parent.name: file.read_text() for file in sorted(folder.glob("*/adapter.json"))}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What a sweep without Ray and without kills comes to; each kill below must come to the same, to the last bit."""
    run = simulate(toy_engine.ToyEngine, tmp_path_factory.mktemp("undisturbed"))
    return adapters(run.folder / "adapters"), {t: s.record.state for t, s in run.board.seats.items()}


@pytest.mark.ray
def test_a_sweep_survives_the_death_of_its_worker_and_of_a_client(ray_session, tmp_path, undisturbed):
    killed, seen = [], []

    def on_progress(snapshot):
        seen.append(snapshot)
        steps = sum(row["steps"] for row in snapshot["trials"])
        if steps > 20 and "client" not in killed:
            assert kill_one("ray::ImplicitFunc")
            killed.append("client")
        elif snapshot["done"] and "worker" not in killed:
            os.kill(snapshot["packs"]["pack-0"]["pid"], signal.SIGKILL)
            killed.append("worker")

    result = run_sweep(settings(), tmp_path, None, on_progress=on_progress, engine=TOY)
    assert killed == ["client", "worker"]
    assert adapters(tmp_path / "checkpoints" / "adapters") == undisturbed[0]
    assert {r.trial_id: r.state for r in result.trials} == undisturbed[1]
    assert result.best == max(result.trials, key=lambda r: r.cider or 0).trial_id
    assert set(result.adapters) == set(undisturbed[0])
    assert any("worker died" in note for note in result.notes)
    assert seen[-1]["finished"] and seen[-1]["packs"]["pack-0"]["lives"] == 2
    log = (tmp_path / "logs" / "pack-0.log").read_text()
    assert f"pid {result.pids['pack-0']}" in log and "resumed" in log
    assert json.loads((tmp_path / "checkpoints" / "rungs.json").read_text())["rungs"] == [10, 30, 90]
    # A finished sweep is not run again, and its folder not taken for a new one.
    assert run_sweep(settings(), tmp_path, None, resume=True, engine=TOY).best == result.best
    with pytest.raises(RunError, match="already holds a sweep"):
        run_sweep(settings(), tmp_path, None, engine=TOY)
    with pytest.raises(RunError, match="differs"):
        run_sweep(settings(space={"train.lr": {"choice": [0.1]}}), tmp_path, None, resume=True, engine=TOY)


@pytest.mark.ray
def test_what_a_restart_would_meet_again_is_raised_at_once_as_it_was(ray_session, tmp_path):
    with pytest.raises(DataError, match="row group 2: cannot be read"):
        run_sweep(settings(), tmp_path, None, engine=f"{toy_engine.__file__}:build_broken")
    assert (tmp_path / "logs" / "pack-0.log").read_text().count("starts: pid") == 1


DRIVER = """
import sys
sys.path[:0] = {paths!r}
from simulation import settings
from raycap.errors import Interrupted
from raycap.tune.sweep import run_sweep
try:
    run_sweep(settings(), {folder!r}, None, resume=True, engine={engine!r})
except Interrupted as error:
    print(error)
    raise SystemExit(error.exit_code)
"""


@pytest.mark.slow
@pytest.mark.ray
def test_a_driver_that_was_interrupted_and_then_killed_is_resumed_to_the_same_end(tmp_path, undisturbed):
    paths = [str(Path(__file__).parent), str(Path(toy_engine.__file__).parent)]
    code = DRIVER.format(paths=paths, folder=str(tmp_path), engine=TOY)
    log = tmp_path / "logs" / "pack-0.log"

    def drive(until: str, number: int) -> tuple[int, str]:
        """Start a driver, send it a signal once its pack has logged `until`."""
        before = len(log.read_text()) if log.exists() else 0
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        deadline = time.monotonic() + 150
        while process.poll() is None and time.monotonic() < deadline:
            if number and log.exists() and until in log.read_text()[before:]:
                process.send_signal(number)
                break
            time.sleep(0.05)
        output, _ = process.communicate(timeout=150)
        return process.returncode, output

    code_of, said = drive("admitted", signal.SIGINT)
    assert code_of == 130 and "every running trial is checkpointed" in said and "--resume" in said
    assert drive("stopped at step", signal.SIGKILL)[0] == -signal.SIGKILL
    code_of, said = drive("", 0)
    assert code_of == 0, said
    assert adapters(tmp_path / "checkpoints" / "adapters") == undisturbed[0]
    rows = json.loads((tmp_path / "checkpoints" / "trials.json").read_text())["trials"]
    assert {row["trial_id"]: row["state"] for row in rows} == undisturbed[1]


def test_a_second_driver_is_refused_and_a_dead_one_is_no_obstacle(tmp_path):
    hold = (
        "import time\nfrom raycap.tune.sweep import run_lock\n"
        f"with run_lock({str(tmp_path)!r}):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline().strip() == "held"
        with pytest.raises(RunError, match=f"in use by process {other.pid}"):
            with run_lock(tmp_path):
                pass
    finally:
        other.kill()
        other.wait()
    with run_lock(tmp_path):
        pass
