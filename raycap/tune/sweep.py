"""A whole sweep: trials, board, packs and Tune started together, watched, stopped cleanly, resumed, summed up."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raycap import errors
from raycap.cluster import CLIENTS, connect, pack_resources
from raycap.config import Config
from raycap.data.lock import FileLock
from raycap.errors import Interrupted, RunError
from raycap.files import read_whole, write_json
from raycap.stop import Stop, resume_command, stoppable
from raycap.storage import is_url
from raycap.train.record import FINAL_STATES, TrialRecord, read_records
from raycap.train.shelf import FEATURES, train_storage
from raycap.trial import TrialSpec
from raycap.tune.launch import STOPPING, Worker, pack_worker, tune_worker
from raycap.tune.mirror import Mirror, holders
from raycap.tune.nodes import check_nodes, things_to_see, without_room
from raycap.tune.schedule import PackAsha, PackFifo, RungLedger, planned_rungs
from raycap.tune.space import DEFAULT, sweep_trials

WATCH_S = 0.5
"""Time between two looks at the board, each of which reaches `on_progress`."""
CALL_TIMEOUT_S = 10.0
"""How long the board may take to answer before that is taken for silence."""
SILENCE_S = 120.0
"""Silence of the board after which the sweep is given up; a board that was killed is back within seconds."""
TUNE_WAIT_S = 15.0
"""How long Tune waits for the packs to have their places, which its clients might take; while they load there is a core
to spare for it, once they train there is none."""
NODE_WAIT_S = 900.0
"""How long a sweep waits while no node of the cluster could hold a pack; an autoscaler needs some minutes for one."""
STOP_WAIT_S = 60.0
"""How long packs may take to write their last checkpoint after Ctrl-C."""
TOKENS = "checkpoints/tokens.json"
"""What a run that goes on after its sweep still wants to know."""


@dataclass(kw_only=True, slots=True)
class SweepResult:
    """What a finished sweep leaves."""

    trials: list[TrialRecord]
    best: str
    """Trial with the best score by `train.select_by`."""
    adapters: dict[str, Path]
    """PEFT folder of every trial that was scored, at its best rung; val_captions.json lies in it."""
    pids: dict[str, int]
    seconds: float
    resumed: bool = False
    notes: list[str] = field(default_factory=list)
    """What a person should know: deaths survived, leases lapsed."""
    tokens: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By split, what the model's tokeniser made of the captions (feed.Feed.tokens)."""
    ruled_out: dict[str, str] = field(default_factory=dict)
    """Trials that could not win, and why."""
    features: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By split, whether vision features were kept, and the figures of that decision (train.choice.Choice)."""


def run_sweep(
    config: Config,
    run_dir: Path | str,
    shards_folder: Path | str | None,
    resume: bool = False,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
    *,
    engine: str = "",
    trials: list[TrialSpec] | None = None,
    ruled_out: Mapping[str, str] | None = None,
) -> SweepResult:
    """Train all trials of `config` into `run_dir`, or the rest of them with `resume`.

    `on_progress` gets a snapshot (Board.snapshot) twice a second, in the calling thread. `engine` names another builder
    than the real one (raycap.train.worker.ENGINE); without `shards_folder` the packs get no data streams. `trials` takes
    the place of those that `config` describes. Trials in `ruled_out` (id -> why) are trained, and cannot be the best.

    Raises:
        ConfigError: a search space that cannot be sampled.
        Interrupted: Ctrl-C or SIGTERM; what is on disk can be resumed.
        RunError: the folder is in use or holds another sweep; Ray cannot be reached; packs died too often; no trial
            was scored.
        DataError, ModelError: what the packs met.
    """
    began = time.monotonic()
    run_dir = Path(run_dir).absolute()
    trials = sweep_trials(config) if trials is None else trials
    steps = planned_rungs(config)
    mirror = Mirror(config, run_dir) if config.run.storage else None
    with run_lock(run_dir):
        if mirror:
            mirror.begin(resume)
        resumed = _check_folder(run_dir, [t.to_dict() for t in trials], config, resume)
        for torn in (run_dir / "checkpoints" / "adapters").glob(".*"):
            shutil.rmtree(torn, ignore_errors=True)  # what a killed worker was writing
        known = read_records(run_dir)
        ledger = RungLedger(
            run_dir / "checkpoints" / "rungs.json",
            steps=steps,
            eta=config.tune.eta,
            select_by=config.train.select_by,
            halving=config.tune.scheduler == "asha",
            records=known,
            exempt=(DEFAULT,),
            apart=ruled_out or (),
        )
        ledger.written = mirror.put if mirror else None
        if all(t.trial_id in known and known[t.trial_id].ended for t in trials):
            records = [known[t.trial_id] for t in trials]
            return _result(records, run_dir, config, {}, began, resumed, ledger.notes, ruled_out)
        with connect(config) as ray:
            sweep = _Sweep(ray, config, run_dir, shards_folder, trials, steps, ledger, engine, mirror)
            last = sweep.run(on_progress)
    records = [TrialRecord.from_dict(row) for row in last["trials"]]
    pids = {name: pack["pid"] for name, pack in last["packs"].items()}
    return _result(records, run_dir, config, pids, began, resumed, [*ledger.notes, *last["notes"]], ruled_out)


class _Sweep:
    """The driver's side of one sweep, from the start of its actors to their end."""

    def __init__(self, ray, config, run_dir, shards_folder, trials, steps, ledger, engine, mirror):
        from raycap.tune.actor import BoardActor

        self.ray, self.config, self.run_dir, self.ledger, self.mirror = ray, config, run_dir, ledger, mirror
        self.signals = Stop()
        self.tokens: dict[str, Any] = {}
        self.driver = uuid.uuid4().hex
        shards = str(shards_folder) if shards_folder else ""
        if mirror and shards:
            shards = mirror.shards(shards)
        elif shards and not is_url(shards):
            shards = str(Path(shards).absolute())
        seen = things_to_see(config, run_dir, shards, mirror.place.local if mirror else None)
        check_nodes(ray, seen)
        packs = config.tune.packs
        clients = min(packs * CLIENTS, len(trials))
        self.workers = workers = config.train.workers
        resources = pack_resources(ray, packs, clients, workers)
        context = ray.get_runtime_context()
        self.name = _board_name(config, run_dir)
        _free_name(ray, self.name)
        plan = {
            "run": config.run.name or run_dir.name, "run_dir": str(run_dir), "driver": self.driver,
            "trials": [t.to_dict() for t in trials], "rungs": steps, "slots": config.tune.slots, "packs": packs,
            "holders": holders(train_storage({"storage": mirror.place.url if mirror else "", "run_dir": run_dir})),
            "thinning": float(config.tune.eta) if config.tune.scheduler == "asha" else 1.0,
        }  # fmt: skip
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(context.get_node_id(), soft=False)
        self.board = (
            ray.remote(BoardActor)
            .options(
                name=self.name, num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here,
                max_concurrency=1000,
            )
            .remote(plan)
        )  # fmt: skip
        job = {
            "config": config.to_dict(), "run_dir": str(run_dir), "board": self.name, "namespace": context.namespace,
            "rungs": steps, "trials": len(trials), "packs": packs, "engine": engine, "driver": self.driver, "shards": shards,
            "seen": seen, "storage": mirror.place.url if mirror else "", "driver_node": context.get_node_id(),
        }  # fmt: skip
        known = read_records(run_dir)
        left = [t.trial_id for t in trials if not (t.trial_id in known and known[t.trial_id].ended)]
        # Those that hold a slot in the pack's checkpoint first: the others wait for their slots.
        left.sort(key=lambda t: not (t in known and known[t].steps > 0))
        kind = PackAsha if config.tune.scheduler == "asha" else PackFifo
        board = self.board
        scheduler = kind(ledger, lambda step, verdicts: board.judge.remote(step, verdicts))
        self.resources, self.waited = resources, time.monotonic()
        if waiting := without_room(ray, packs, resources, workers):
            kind = "a GPU" if "GPU" in resources else "a free CPU"
            kind += f" for each of its {workers} workers" if workers > 1 else ""
            board.note.remote(
                f"{waiting} of {packs} packs wait for a node with {kind}; they join the sweep when one joins the cluster"
            )
        retries = config.train.max_failures
        self.tune = tune_worker(left, scheduler, job, clients=clients, retries=retries)
        self.packs = [pack_worker({**job, "pack": i}, resources, retries, workers) for i in range(packs)]

    def run(self, on_progress: Callable[[dict[str, Any]], None] | None) -> dict[str, Any]:
        """Start, watch, and end everything; the board's last snapshot."""
        for worker in self.packs:
            worker.start()
        wanted, began = len(self.packs), time.monotonic()
        last: dict[str, Any] = {}
        written = ""
        try:
            with stoppable() as self.signals, self.signals.gently() as signals:
                while True:
                    last = self._look(signals) or last
                    up = last["arrived"] >= wanted if last else False
                    if not self.tune.ident and (up or time.monotonic() - began > TUNE_WAIT_S):
                        self.tune.start()
                    written = self._write_trials(last, written)
                    if on_progress:
                        on_progress(last)
                    if signals.count:
                        self._stop(signals, last, on_progress)
                    self._check(last)
                    if last["finished"] and not any(self._at_work(pack, last) for pack in self.packs):
                        return last
                    signals.wait(WATCH_S)
        except KeyboardInterrupt:
            raise self._interrupted(whole=False) from None
        finally:
            self._end()

    def _look(self, signals: Stop) -> dict[str, Any] | None:
        """The board's snapshot; None when a signal came while it was silent.

        Every call has a time-out: a signal that takes Ray's own processes down with us must not leave us waiting.
        """
        deadline = time.monotonic() + SILENCE_S
        while time.monotonic() < deadline:
            try:
                return self.ray.get(self.board.snapshot.remote(), timeout=CALL_TIMEOUT_S)
            except self.ray.exceptions.GetTimeoutError:
                if signals.count:
                    return None
            except self.ray.exceptions.RayError as error:
                raise RunError(f"the sweep's board is gone: {_last_line(error)}. Go on with --resume.") from error
        raise RunError(f"Ray has not answered for {SILENCE_S:.0f} s. Go on with --resume once it does.")

    def _check(self, last: dict[str, Any]) -> None:
        """Raise what stopped the sweep; judge cohorts that no client can ask Tune about."""
        if last["error"]:
            kind = getattr(errors, last["error"]["kind"], RunError)
            raise kind(last["error"]["message"])
        self.ledger.learn(TrialRecord.from_dict(row) for row in last["trials"])
        for cohort in last["unclaimed"]:
            step = int(cohort["step"])
            self.ray.get(self.board.judge.remote(step, self.ledger.judge(step, cohort["scores"])))
        for pack in list(self.packs):
            if pack.error is not None:
                self.packs.remove(pack)
                if not self.ray.get(self.board.pack_lost.remote(pack.name)):
                    log = self.run_dir / "logs" / f"{pack.name}.log"
                    raise RunError(
                        f"{pack.name} died more than train.max_failures={self.config.train.max_failures} times; its log is "
                        f"{log}, the last error:\n{_last_line(pack.error)}"
                    ) from pack.error
        if without_room(self.ray, 1, self.resources, self.workers) == 0:
            self.waited = time.monotonic()
        elif time.monotonic() - self.waited > NODE_WAIT_S:
            raise RunError(
                f"no node with {' and '.join(f'{n:g} {name}' for name, n in self.resources.items())} was in the cluster for "
                f"{NODE_WAIT_S:.0f} s, and a pack needs one. Look at `ray status`, then go on with --resume."
            )
        if self.tune.error is not None and not last["finished"]:
            if isinstance(self.tune.error, errors.RaycapError):
                raise self.tune.error
            raise RunError(f"Ray Tune's loop ended: {_last_line(self.tune.error)}") from self.tune.error

    @staticmethod
    def _at_work(pack: Worker, last: dict[str, Any]) -> bool:
        """Whether a pack has still to end: not one that waits for a node, or whose node is gone."""
        known = last["packs"].get(pack.name)
        return pack.is_alive() and known is not None and known["here"]

    def _write_trials(self, last: dict[str, Any], written: str) -> str:
        if (tokens := last.get("tokens")) and tokens != self.tokens:
            self.tokens = tokens
            write_json(self.run_dir / TOKENS, tokens)
        rows = json.dumps(last.get("trials", []))
        if rows not in (written, "[]"):
            write_json(self.run_dir / "checkpoints" / "trials.json", {"trials": last["trials"]})
        if self.mirror:
            over = [t["trial_id"] for t in last.get("trials", []) if t["state"] in FINAL_STATES]
            self.mirror.follow(over, last=bool(last) and last["finished"])
        return rows

    def _stop(self, signals: Stop, last: dict[str, Any], on_progress: Callable[[dict[str, Any]], None] | None) -> None:
        """After the first signal: packs write a checkpoint and return. The second one raises from wherever we are."""
        deadline, whole = time.monotonic() + STOP_WAIT_S, False
        said = f"{signals.name}: the packs write their checkpoints; once more stops at once"
        try:
            if on_progress and last:
                on_progress({**last, "notes": [*last["notes"], said]})
            while not whole and time.monotonic() < deadline:
                # Said again each time: a board that was killed meanwhile has forgotten it.
                self.ray.get(self.board.stop.remote(), timeout=CALL_TIMEOUT_S)
                signals.wait(0.1)
                last = self.ray.get(self.board.snapshot.remote(), timeout=CALL_TIMEOUT_S)
                self._write_trials(last, "")
                whole = all(pack["bye"] for pack in last["packs"].values() if pack["here"])
        except self.ray.exceptions.RayError:
            pass  # Ray was told to end together with us; the last checkpoint is what there is
        raise self._interrupted(whole)

    def _interrupted(self, whole: bool) -> Interrupted:
        how = "every running trial is checkpointed" if whole else "what was not checkpointed yet will be trained again"
        return Interrupted(f"stopped by {self.signals.name}; {how}. Go on with: {resume_command(self.run_dir)}")

    def _end(self) -> None:
        """Take down what was started; when a person waits for it, without waiting for Ray's own housekeeping."""
        STOPPING.add(self.driver)
        try:
            if self.signals.count < 2:
                self.ray.get(self.board.stop.remote(), timeout=5)
                deadline = time.monotonic() + (1 if self.signals.count else 10)
                for worker in (self.tune, *self.packs):
                    if worker.ident:
                        worker.join(timeout=max(0.0, deadline - time.monotonic()))
            self.ray.kill(self.board)
            if self.mirror:
                self.mirror.end()
        except (Exception, KeyboardInterrupt):  # on the way out: the first error, or the result, is what counts
            pass


@contextmanager
def run_lock(run_dir: Path | str) -> Iterator[None]:
    """Hold a run folder for one driver. The system lets go of it when the driver dies, however it dies.

    Raises:
        RunError: another driver has it, or the folder cannot be written.
    """
    lock = FileLock(Path(run_dir) / "checkpoints" / "driver.lock")
    if not lock.try_acquire():
        raise RunError(f"{run_dir} is in use by {lock.holder}. Wait for it to end, or choose another run.dir.")
    try:
        yield
    finally:
        lock.release()


def _check_folder(run_dir: Path, trials: list[dict[str, Any]], config: Config, resume: bool) -> bool:
    """Write the plan of a new sweep, or compare it with the one to resume; True when there is something to resume."""
    file = run_dir / "checkpoints" / "plan.json"
    plan = json.loads(json.dumps({"trials": trials, "config": config.to_dict()}))
    if file.is_file() and not resume:
        raise RunError(f"{run_dir} already holds a sweep. Add --resume to go on with it, or choose another run.dir.")
    if not isinstance(known := read_whole(file), dict):
        write_json(file, plan)
        return bool(read_records(run_dir))
    found = {t["trial_id"]: t for t in known["trials"]}
    for trial in plan["trials"]:
        if found.get(trial["trial_id"]) != trial:
            raise RunError(
                f"trial {trial['trial_id']} differs from the one that {run_dir} began with. "
                "Resume with the settings of the interrupted run, or choose another run.dir."
            )
    return True


def _free_name(ray: Any, name: str, patience_s: float = 30.0) -> None:
    """End the board that a killed driver left on a shared cluster; its packs leave when they find it gone.

    We hold the run folder, so nobody else's board has this name.
    """
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        try:
            ray.kill(ray.get_actor(name))
        except ValueError:  # there is none
            return
        time.sleep(0.2)
    raise RunError(
        f"the Ray actor {name} of an earlier driver does not end. Stop that driver's job, then use --resume."
    )


def _board_name(config: Config, run_dir: Path) -> str:
    """raycap-board-<run>-<4 hex digits>: a person finds it, two users' runs of one name do not meet."""
    return f"raycap-board-{config.run.name or run_dir.name}-{hashlib.sha256(str(run_dir).encode()).hexdigest()[:4]}"


def _result(records, run_dir, config, pids, began, resumed, notes, ruled_out=None) -> SweepResult:
    ruled_out = dict(ruled_out or {})
    for record in records:
        if why := ruled_out.get(record.trial_id):
            record.reason = "; ".join(filter(None, [record.reason, why]))
    scored = {r.trial_id: r.score(config.train.select_by) for r in records}
    scored = {t: s for t, s in scored.items() if s is not None}
    if not scored:
        reasons = "; ".join(f"{r.trial_id}: {r.reason or r.state}" for r in records[:3])
        raise RunError(f"none of {len(records)} trials was scored ({reasons}). Lower train.lr or widen tune.space.")
    able = {t: s for t, s in scored.items() if t not in ruled_out}
    if not able:
        raise RunError(
            f"only trials that tune.memory_limit_bytes={config.tune.memory_limit_bytes} rules out were scored "
            f"({', '.join(scored)}). Raise it, or search smaller ranks."
        )
    return SweepResult(
        trials=records,
        best=max(able, key=able.get),
        adapters={t: run_dir / "checkpoints" / "adapters" / t for t in scored},
        pids={"driver": os.getpid(), **pids},
        seconds=time.monotonic() - began,
        resumed=resumed,
        notes=notes,
        tokens=read_whole(run_dir / TOKENS) or {},
        features=read_whole(run_dir / "checkpoints" / FEATURES) or {},
        ruled_out=ruled_out,
    )


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


__all__ = ["SweepResult", "Worker", "run_lock", "run_sweep"]
