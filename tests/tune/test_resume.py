"""Drivers that die at any moment, and files that a power cut took: the next driver comes to the same end."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import toy_engine
from simulation import Killed, Link, MemoryKeeper, Tune, kill_one, settings, simulate

from raycap.errors import Interrupted, RunError
from raycap.files import read_json, write_json
from raycap.train.pack import Pack
from raycap.train.record import read_ended, read_records
from raycap.tune.board import Board
from raycap.tune.schedule import RungLedger, rungs
from raycap.tune.space import sample_trials
from raycap.tune.sweep import _free_name as free_name
from raycap.tune.sweep import run_sweep

TOY = f"{toy_engine.__file__}:build_slow"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run = simulate(toy_engine.ToyEngine, tmp_path_factory.mktemp("undisturbed"))
    return outcome(run.board, run.folder / "adapters"), run.calls


def outcome(board, folder, *, company=True):
    """State, steps and best adapter of every trial, with what was trained beside it at each step unless not asked for."""
    found = {}
    for trial, seat in board.seats.items():
        file = folder / trial / "adapter.json"
        adapter = read_json(file) if file.is_file() else {}
        if not company:
            adapter.pop("mates", None)
        found[trial] = (seat.record.state, seat.record.steps, adapter)
    return found


class Run:
    """A run folder over which drivers come and go; the packs' checkpoints outlive them, the rest is read from disk."""

    def __init__(self, folder: Path):
        self.folder, self.keeper, self.calls, self.drivers = folder, MemoryKeeper(), 0, 0
        self.checkpoints = folder / "checkpoints"

    def drive(self, kill_at: int | None = None) -> Board | None:
        """One driver with its board and pack, from what is on disk; None when it was killed at that engine call."""
        self.drivers += 1
        config = settings()
        trials, steps = sample_trials(config), rungs(config.train.steps, 0, config.tune.eta)
        records = read_records(self.folder)
        ledger = RungLedger(
            self.checkpoints / "rungs.json", steps=steps, eta=config.tune.eta, select_by="cider", records=records
        )
        self.notes = ledger.notes
        clock = SimpleNamespace(now=0.0)
        board = Board(
            trials, rungs=steps, slots=config.tune.slots, packs=1, verdicts=ledger.verdicts, records=records,
            clock=lambda: clock.now,
        )  # fmt: skip
        left = [t for t, seat in board.seats.items() if not seat.record.ended]
        tune = Tune(board, ledger, left, clients=config.tune.slots, shuffle=self.drivers)
        link = Link(board, tune, "pack-0", f"driver {self.drivers}")
        exchange, register = link.exchange, link.register

        def registering(report):
            orders = register(report)
            ledger.learn(seat.record for seat in board.seats.values())
            return orders

        def noting(report, wait_s):
            orders = exchange(report, wait_s)
            write_json(self.checkpoints / "trials.json", {"trials": board.snapshot()["trials"]})
            return orders

        link.exchange, link.register = noting, registering

        def tick():
            clock.now += 0.01
            self.calls += 1
            if kill_at is not None and self.calls >= kill_at:
                raise Killed
            return clock.now

        try:
            pack = Pack(
                toy_engine.ToyEngine(), link, self.keeper, rungs=steps, select_by="cider",
                adapters=self.checkpoints / "adapters", checkpoint_every_s=0.5, clock=tick,
            )  # fmt: skip
            assert pack.run() == "done"
        except Killed:
            return None
        return board


def remove(file: Path) -> None:
    file.unlink()


def empty(file: Path) -> None:
    file.write_bytes(b"")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("at", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("damage", [None, remove, empty, cut])
@pytest.mark.parametrize("names", [["rungs.json"], ["trials.json"], ["rungs.json", "trials.json"]])
def test_the_record_of_the_rungs_survives_its_files(undisturbed, tmp_path, names, damage, at):
    expected, calls = undisturbed
    run = Run(tmp_path)
    assert run.drive(kill_at=int(at * calls)) is None
    judged = read_json(run.checkpoints / "rungs.json")["verdicts"]
    if damage:
        for name in names:
            damage(run.checkpoints / name)
    board = run.drive()
    assert outcome(board, run.checkpoints / "adapters") == expected
    # What was judged keeps its verdict, in words too, and is there again for the next one who resumes.
    again = read_json(run.checkpoints / "rungs.json")["verdicts"]
    for step, verdicts in judged.items():
        assert {t: v["action"] for t, v in verdicts.items()} == {t: again[step][t]["action"] for t in verdicts}


@pytest.mark.parametrize("damage", [remove, empty, cut])
@pytest.mark.parametrize("name", ["trial.json", "adapter.json", "val_captions.json"])
def test_an_ended_trial_whose_folder_is_damaged_is_trained_again_to_the_same_end(undisturbed, tmp_path, name, damage):
    expected, calls = undisturbed
    run = Run(tmp_path)
    assert run.drive(kill_at=int(0.8 * calls)) is None
    hurt = sorted(t for t, r in read_ended(run.checkpoints / "adapters").items() if r.best_step)[0]
    damage(run.checkpoints / "adapters" / hurt / name)
    assert hurt not in read_records(tmp_path)
    board = run.drive()
    found = outcome(board, run.checkpoints / "adapters", company=False)
    for trial, (state, steps, adapter) in expected.items():
        assert found[trial] == (state, steps, {k: v for k, v in adapter.items() if k != "mates"})
    assert set(read_ended(run.checkpoints / "adapters")) == set(expected)


def test_a_full_disk_leaves_no_verdict_that_nobody_finds_again(tmp_path, monkeypatch):
    path = tmp_path / "rungs.json"
    ledger = RungLedger(path, steps=[10, 30], eta=3, select_by="cider")
    ledger.judge(10, {"a": 0.1})
    before = path.read_bytes()

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match=r"rungs\.json: No space left on device\. Make room.*--resume"):
            ledger.judge(10, {"b": 0.2})
    assert path.read_bytes() == before and "b" not in ledger.verdicts[10]
    assert ledger.judge(10, {"b": 0.2})["b"]["action"] == "go"
    assert set(RungLedger(path, steps=[10, 30], eta=3, select_by="cider").verdicts[10]) == {"a", "b"}


def test_a_pack_on_a_full_disk_names_the_place_and_goes_on_from_the_checkpoint_before(undisturbed, tmp_path):
    expected, calls = undisturbed
    run = Run(tmp_path)
    save = run.keeper.save

    def full(meta, states):
        if run.calls > calls // 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/disk/checkpoint_3/states")
        save(meta, states)

    run.keeper.save = full
    with pytest.raises(RunError, match=r"/disk/checkpoint_3/states: No space left on device\. Make room.*unchanged"):
        run.drive()
    run.keeper.save = save
    assert outcome(run.drive(), run.checkpoints / "adapters") == expected


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_survives_the_death_of_its_board_and_of_its_controller(ray_session, tmp_path, undisturbed):
    killed = []

    def on_progress(snapshot):
        steps = sum(row["steps"] for row in snapshot["trials"])
        if steps > 20 and "board" not in killed:
            assert kill_one("ray::BoardActor")
            killed.append("board")
        elif snapshot["done"] and "controller" not in killed:
            assert kill_one("ray::TrainController")
            killed.append("controller")

    result = run_sweep(settings(), tmp_path, None, on_progress=on_progress, engine=TOY)
    assert killed == ["board", "controller"]
    found = {t: json.loads(p.read_text()) for t, p in adapter_files(tmp_path).items()}
    assert found == {t: adapter for t, (_, _, adapter) in undisturbed[0].items() if adapter}
    assert {r.trial_id: r.state for r in result.trials} == {t: state for t, (state, _, _) in undisturbed[0].items()}


@pytest.mark.ray
def test_the_board_that_a_killed_driver_left_on_a_cluster_gives_its_name_back(ray_session):
    class Left:
        def ping(self):
            return 1

    left = ray_session.remote(Left).options(name="raycap-board-left", num_cpus=0, max_restarts=-1).remote()
    assert ray_session.get(left.ping.remote()) == 1
    free_name(ray_session, "raycap-board-left")
    again = ray_session.remote(Left).options(name="raycap-board-left", num_cpus=0).remote()
    assert ray_session.get(again.ping.remote()) == 1
    ray_session.kill(again)


@pytest.mark.ray
@pytest.mark.slow
def test_once_ends_in_order_twice_at_once_and_both_are_resumed_in_the_same_process(ray_session, tmp_path, undisturbed):
    def press(number, times, after):
        pressed = []

        def on_progress(snapshot):
            if not pressed and sum(row["steps"] for row in snapshot["trials"]) > after:
                pressed.append(time.monotonic())
                for _ in range(times):
                    os.kill(os.getpid(), number)

        return on_progress, pressed

    once, _ = press(signal.SIGINT, 1, 20)
    with pytest.raises(Interrupted, match=rf"Ctrl-C; every running trial is checkpointed.*sweep --resume {tmp_path}"):
        run_sweep(settings(), tmp_path, None, on_progress=once, engine=TOY)
    twice, pressed = press(signal.SIGTERM, 2, 40)
    with pytest.raises(Interrupted, match="SIGTERM; what was not checkpointed yet will be trained again"):
        run_sweep(settings(), tmp_path, None, resume=True, on_progress=twice, engine=TOY)
    assert time.monotonic() - pressed[0] < 5
    result = run_sweep(settings(), tmp_path, None, resume=True, engine=TOY)
    assert result.resumed
    found = {t: json.loads(p.read_text()) for t, p in adapter_files(tmp_path).items()}
    assert found == {t: adapter for t, (_, _, adapter) in undisturbed[0].items() if adapter}


def adapter_files(run_dir: Path) -> dict[str, Path]:
    return {file.parent.name: file for file in (run_dir / "checkpoints" / "adapters").glob("[!.]*/adapter.json")}
