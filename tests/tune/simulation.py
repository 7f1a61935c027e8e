"""A sweep in one process: real board, ledger and pack, a stand-in for Tune that answers in any order it is told to."""

from __future__ import annotations

import copy
import random
from types import SimpleNamespace

import psutil

from raycap.config import from_dict
from raycap.train.pack import Pack
from raycap.tune.board import Board
from raycap.tune.schedule import RungLedger, rungs
from raycap.tune.space import sample_trials


class Killed(Exception):
    """What a SIGKILL is to a process: nothing after it runs."""


class Tune:
    """Thin trials in order, so many at a time, whose reports arrive in a shuffled order."""

    def __init__(self, board, ledger, trials, *, clients, shuffle):
        self.board, self.ledger = board, ledger
        self.queue, self.clients = list(trials), clients
        self.running: dict[str, int] = {}
        self.random = random.Random(shuffle)

    def turn(self):
        while self.queue and len(self.running) < self.clients:
            trial = self.queue.pop(0)
            self.running[trial] = 0
            self.board.lease(trial, f"client of {trial}")
        order = list(self.running)
        self.random.shuffle(order)
        for trial in order:
            event = self.board.next_event(trial, f"client of {trial}", self.running[trial])
            if event and event["kind"] == "lost":
                self.board.lease(trial, f"client of {trial}")
                continue
            if event is None:
                continue
            self.running[trial] += 1
            if event["kind"] == "rung":
                verdicts = self.ledger.judge(event["step"], event["cohort"])
                self.board.judge(event["step"], verdicts)
                if verdicts[trial]["action"] == "go":
                    self.board.proceed(trial, event["step"])
                    continue
            self.board.release(trial, f"client of {trial}")
            del self.running[trial]


class Link:
    def __init__(self, board, tune, name, nonce):
        self.board, self.tune, self.name, self.nonce = board, tune, name, nonce

    def register(self, report):
        return self.board.register(self.name, self.nonce, 1, copy.deepcopy(report))

    def exchange(self, report, wait_s):
        orders = self.board.exchange(self.name, self.nonce, copy.deepcopy(report))
        if orders.get("hold"):
            self.tune.turn()
            orders = self.board.orders(self.name, self.nonce)
        return orders

    def goodbye(self):
        self.board.goodbye(self.name, self.nonce)


class MemoryKeeper:
    """Checkpoints that outlive a killed pack, as deep copies."""

    def __init__(self):
        self.saved = ({}, {})

    def restore(self):
        return copy.deepcopy(self.saved)

    def save(self, meta, states):
        self.saved = copy.deepcopy((meta, states))


def settings(**tune):
    return from_dict(
        {
            "train": {"steps": 90, "max_failures": 9},
            "tune": {"trials": 12, "slots": 5, "space": {"train.lr": {"loguniform": [1e-3, 1.0]}}, **tune},
        }
    )


def simulate(engine, folder, config=None, *, shuffle=0, kills=(), clock=None, prune_collapsed=False):
    """Run a sweep to its end; at the engine calls numbered in `kills` the pack dies and starts again."""
    config = config or settings()
    trials = sample_trials(config)
    steps = rungs(config.train.steps, config.tune.grace_steps, config.tune.eta)
    halving = config.tune.scheduler == "asha"
    ledger = RungLedger(folder / "rungs.json", steps=steps, eta=config.tune.eta, select_by="cider", halving=halving)
    time = SimpleNamespace(now=0.0)
    board = Board(trials, rungs=steps, slots=config.tune.slots, packs=1, clock=lambda: time.now)
    tune = Tune(board, ledger, [t.trial_id for t in trials], clients=config.tune.slots, shuffle=shuffle)
    keeper, kills, calls, lives = MemoryKeeper(), set(kills), [0], 0

    def tick():
        time.now += 0.01
        calls[0] += 1
        if calls[0] in kills:
            raise Killed
        return time.now

    while True:
        lives += 1
        pack = Pack(
            engine(), Link(board, tune, "pack-0", f"life {lives}"), keeper, rungs=steps, select_by="cider",
            adapters=folder / "adapters", checkpoint_every_s=0.5, clock=tick, prune_collapsed=prune_collapsed,
        )  # fmt: skip
        try:
            assert pack.run() == "done"
        except Killed:
            continue
        return SimpleNamespace(board=board, ledger=ledger, calls=calls[0], lives=lives, folder=folder)


def kill_one(name: str) -> bool:
    """SIGKILL one process of our own Ray whose title starts with `name`."""
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline() and process.cmdline()[0].startswith(name):
                process.kill()
                return True
        except psutil.Error:
            pass
    return False
