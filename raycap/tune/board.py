"""The lease board: who trains where, what was scored, what was decided. Plain logic, no Ray, no torch.

    Tune trial (client)          board                        pack
    lease(t03)          ->       queue     -> admit(t03) ->   trains to a rung, pauses, scores
    next_event          <-       rung      <- exchange   <-   reports the cohort that reached it
    tune.report -> PackAsha ->   judge     -> verdict    ->   goes on, or exports, lets go, reports the end

Every call may be repeated: what a caller says is what holds (its active trials, its waiting rungs), so a pack or a
client that died and came back, or a board that lost its memory, ends up in the same place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from raycap.train.record import TrialRecord
from raycap.trial import TrialSpec

LEASE_S = 20.0
"""A lease whose client was silent for longer lapses: a queued trial is passed over, one in a slot trains on, and the
driver judges it in its client's place. Tune restarts a dead client within seconds."""
UNLEASED_S = 1.0
"""How long a cohort waits for a first client. Clients are fewer than slots and come in the trials' order, so one may be
busy elsewhere while a trial that it will take later has reached a rung; then the driver judges in its place."""
AWAY_S = 45.0
"""Silence of a pack after which other packs go on with its trials. A worker says that it lives every few seconds,
whatever it computes; one that died is back within this time where its node lives."""
RETURN_S = 60.0
"""How long a resumed sweep keeps the trials of a pack's checkpoint for that pack."""


@dataclass(slots=True)
class Seat:
    """One trial on the board."""

    spec: TrialSpec
    record: TrialRecord
    pack: str = ""
    holder: str = ""
    """The pack that has it or had it last, whose checkpoint may hold it."""
    origin: str = ""
    """The pack whose checkpoint the present one shall take it from."""
    client: str = ""
    leased: bool = False
    """Whether a client has ever asked for it."""
    seen: float = 0.0
    events: list[dict[str, Any]] = field(default_factory=list)


@dataclass(slots=True)
class PackSeat:
    """One pack on the board."""

    nonce: str
    pid: int
    lives: int = 1
    active: dict[str, int] = field(default_factory=dict)
    cohorts: list[dict[str, Any]] = field(default_factory=list)
    waiting: dict[str, int] = field(default_factory=dict)
    waiting_since: float = 0.0
    rate: float = 0.0
    memory_bytes: int = 0
    phase: str = "starting"
    said_bye: bool = False
    seen: float = 0.0


class Board:
    """Leases of one sweep. Times are seconds of `clock`; states are those of TrialRecord."""

    def __init__(
        self,
        trials: list[TrialSpec],
        *,
        rungs: list[int],
        slots: int,
        packs: int,
        thinning: float = 1.0,
        verdicts: Mapping[int, Mapping[str, dict[str, str]]] | None = None,
        records: Mapping[str, TrialRecord] | None = None,
        holders: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.rungs = rungs
        self.slots = slots
        self.packs_wanted = packs
        self.thinning = thinning
        self.clock = clock
        self.verdicts = {int(step): dict(found) for step, found in (verdicts or {}).items()}
        self.seats = {s.trial_id: Seat(s, (records or {}).get(s.trial_id) or TrialRecord.of(s)) for s in trials}
        for seat in self.seats.values():
            seat.holder = (holders or {}).get(seat.spec.trial_id, "")
            if not seat.record.ended:
                seat.record.state = "waiting"
        self.began = clock()
        self.packs: dict[str, PackSeat] = {}
        self.arrived: set[str] = set()
        self.lost: set[str] = set()
        self.stopping = False
        self.error: dict[str, str] | None = None
        self.notes: list[str] = []
        self.tokens: dict[str, dict[str, Any]] = {}
        """By split, what the model's tokeniser made of the captions; every pack reads the same ones."""

    # Tune's side -----------------------------------------------------------------------------------------------

    def lease(self, trial_id: str, client: str) -> None:
        """A Tune trial asks for a slot, or comes back to the one it had."""
        seat = self.seats[trial_id]
        if seat.client and seat.client != client and not seat.record.ended:
            self.note(f"{trial_id}: its Tune trial was restarted")
        seat.client, seat.leased, seat.seen = client, True, self.clock()

    def next_event(self, trial_id: str, client: str, after: int) -> dict[str, Any] | None:
        """Event number `after` of a trial, or None while there is none; also the client's sign of life.

        `lost` tells a client to lease again: its lease lapsed, another client took it, or the board began anew.
        """
        seat = self.seats[trial_id]
        if seat.client != client:
            return {"kind": "lost"}
        seat.seen = self.clock()
        if after < len(seat.events):
            return seat.events[after]
        if seat.record.ended:
            return {"kind": "end", "state": seat.record.state, "step": seat.record.steps}
        return {"kind": "interrupted"} if self.stopping or self.error else None

    def proceed(self, trial_id: str, step: int) -> None:
        """The report of a rung came back to its trial: go on, unless something stricter was decided."""
        self.verdicts.setdefault(step, {}).setdefault(trial_id, {"action": "go", "state": "", "reason": ""})

    def judge(self, step: int, verdicts: Mapping[str, dict[str, str]]) -> None:
        self.verdicts.setdefault(step, {}).update(verdicts)

    def release(self, trial_id: str, client: str) -> None:
        """A client lets go: after the end of its trial, or because Tune shuts down."""
        seat = self.seats[trial_id]
        if seat.client == client:
            seat.client = ""

    # The pack's side -------------------------------------------------------------------------------------------

    def arrive(self, pack: str) -> None:
        """A pack's worker has its place, and begins to load."""
        self.arrived.add(pack)

    def register(self, pack: str, nonce: str, pid: int, report: Mapping[str, Any]) -> dict[str, Any]:
        """A pack's worker (re)starts, with the trials that its checkpoint holds."""
        known = self.packs.get(pack)
        if known is None or known.nonce != nonce:
            lives = known.lives + 1 if known else 1
            if known:
                self.note(f"{pack}: its worker died and was restarted, {_resumed(report['active'])}")
            self.packs[pack] = PackSeat(nonce, pid, lives)
            for seat in self.seats.values():
                if seat.pack == pack:
                    seat.pack = ""
                    if not seat.record.ended:
                        seat.record.state = "waiting"
        for trial_id, step in report["active"].items():
            if trial_id in self.seats:
                self._claim(trial_id, pack, step)
        return self.exchange(pack, nonce, report)

    def exchange(self, pack: str, nonce: str, report: Mapping[str, Any]) -> dict[str, Any]:
        """Take in what a pack reports, answer with its orders.

        report: active {trial: step}, records {trial: TrialRecord as dict} of the active, ended {trial: record},
        cohorts [{step, scores {trial: score}, metrics {trial: {...}}}] that wait for verdicts, rate (slot steps a
        second), phase, memory_bytes, tokens {split: counts} of the splits that are in.
        """
        me = self.packs.get(pack)
        if me is None:
            return {"unknown": True}
        if me.nonce != nonce:
            return {"stale": True}
        me.active, me.rate, me.seen = dict(report["active"]), report.get("rate", 0.0), self.clock()
        me.phase = report.get("phase", "training")
        me.memory_bytes = report.get("memory_bytes", 0)
        self.tokens.update(report.get("tokens", {}))
        for trial_id, values in {**report.get("records", {}), **report.get("ended", {})}.items():
            final = trial_id in report.get("ended", {})
            if not final and trial_id in self.seats and self.seats[trial_id].holder not in ("", pack):
                continue  # it went on in another pack while this one was away
            self._take_record(trial_id, values, final=final)
        before, me.waiting, me.cohorts = me.waiting, {}, list(report.get("cohorts", []))
        for cohort in me.cohorts:
            self._take_cohort(me, cohort)
        if me.waiting != before:
            me.waiting_since = self.clock()
        return self.orders(pack, nonce)

    def orders(self, pack: str, nonce: str) -> dict[str, Any]:
        """What a pack shall do now: admit, verdicts, drop, hold (no step until told), stop, done."""
        me = self.packs.get(pack)
        if me is None:
            return {"unknown": True}
        if me.nonce != nonce:
            return {"stale": True}
        self._lapse()
        verdicts = {t: self.verdicts.get(step, {}).get(t) for t, step in me.waiting.items()}
        undecided = any(v is None for v in verdicts.values())
        drop = [
            t
            for t in me.active
            if t not in self.seats or self.seats[t].record.state == "failed" or self.seats[t].holder not in ("", pack)
        ]
        leaving = bool(drop) or any(v and v["action"] == "stop" for v in verdicts.values())
        # New trials are counted out only after those that leave have left, so that the two never share a slot.
        if not (undecided or leaving or self.stopping):
            self._refill(pack, me)
        admit = [
            s.spec.to_dict() | ({"from": s.origin} if s.origin else {})
            for t, s in self.seats.items()
            if s.pack == pack and t not in me.active
        ]
        done = self.finished and not me.active
        return {
            "admit": [] if undecided or leaving else admit,
            "verdicts": {} if undecided else verdicts,
            "drop": drop,
            "hold": not drop and (undecided or not (me.active or admit or done)),
            "stop": self.stopping or self.error is not None,
            "done": done,
        }

    def alive(self, pack: str, nonce: str) -> bool:
        """Whether this life of a pack is still the one that counts (or the board does not know yet)."""
        me = self.packs.get(pack)
        if me is not None and me.nonce == nonce:
            me.seen = self.clock()
        return me is None or me.nonce == nonce

    def evict(self, pack: str) -> None:
        """The pack's controller died: its worker, should it live on, shall leave, and another one will come."""
        if me := self.packs.get(pack):
            me.nonce = ""

    def goodbye(self, pack: str, nonce: str) -> None:
        """A pack returned on its own: all done, or asked to stop and checkpointed."""
        if (me := self.packs.get(pack)) and me.nonce == nonce:
            me.said_bye = True

    def fail(self, kind: str, message: str) -> None:
        """The sweep cannot go on, for a reason that a restart would meet again. The first one counts."""
        self.error = self.error or {"kind": kind, "message": message}

    def pack_lost(self, pack: str) -> bool:
        """A pack will not come back: its trials go on elsewhere. False when there is no pack left for them."""
        self.packs.pop(pack, None)
        self.lost.add(pack)
        self.packs_wanted -= 1
        self._free(pack)
        self.note(f"{pack}: given up; its trials go on in the other packs, from its last checkpoint")
        return self.packs_wanted > 0

    # The driver's side -----------------------------------------------------------------------------------------

    def stop(self) -> None:
        self.stopping = True

    @property
    def finished(self) -> bool:
        return all(seat.record.ended for seat in self.seats.values())

    def snapshot(self) -> dict[str, Any]:
        """Everything a live table, trials.json or the supervisor wants to know, as plain values."""
        records = [seat.record for seat in self.seats.values()]
        rate = sum(pack.rate for pack in self.packs.values())
        left = self._steps_left()
        return {
            "trials": [r.to_dict() for r in records],
            "done": sum(r.ended for r in records),
            "total": len(records),
            "rate": rate,
            "steps_left": left,
            "eta": left / rate if rate else None,
            "packs": {name: {"pid": p.pid, "lives": p.lives, "phase": p.phase, "slots": len(p.active),
                             "rate": p.rate, "memory_bytes": p.memory_bytes, "bye": p.said_bye,
                             "here": bool(p.nonce) and self.clock() - p.seen < AWAY_S} for name, p in self.packs.items()},
            "arrived": len(self.arrived | self.packs.keys()),
            "unclaimed": self.unclaimed(),
            "leases": sum(bool(seat.client) for seat in self.seats.values()),
            "notes": list(self.notes),
            "tokens": dict(self.tokens),
            "finished": self.finished,
            "error": self.error,
        }  # fmt: skip

    def note(self, text: str) -> None:
        self.notes.append(text)

    # Inside ----------------------------------------------------------------------------------------------------

    def _take_record(self, trial_id: str, values: Mapping[str, Any], *, final: bool) -> None:
        seat = self.seats.get(trial_id)
        if seat is None:
            return
        if final:
            seat.pack = ""
        if seat.record.ended:
            return  # a pack that repeats steps after a crash changes nothing
        seat.record = TrialRecord.from_dict(values)
        if final and seat.record.state == "diverged" and not _scored_rung(seat, seat.record.steps):
            seat.events.append({"kind": "diverged", "step": seat.record.steps})

    def _take_cohort(self, me: PackSeat, cohort: Mapping[str, Any]) -> None:
        step = int(cohort["step"])
        for trial_id, metrics in cohort["metrics"].items():
            me.waiting[trial_id] = step
            seat = self.seats.get(trial_id)
            if seat is None:
                continue
            if not _scored_rung(seat, step):
                event = {"kind": "rung", "step": step, "cohort": dict(cohort["scores"]), "metrics": dict(metrics)}
                seat.events.append(event)

    def _refill(self, pack: str, me: PackSeat) -> None:
        """Give free slots to the next trials, in their order.

        A trial does not wait for its Tune client: which trials train side by side is then a matter of the scores alone,
        and no core idles while Tune starts a process. The client that comes later finds the rungs among its events.
        """
        booked = {t for t, s in self.seats.items() if s.pack == pack} | set(me.active)
        left = sum(not s.record.ended for s in self.seats.values())
        waits = self.clock() - self.began < RETURN_S
        # A pack that is up first leaves the others their share, unless they are gone or wait for a node.
        here = sum(bool(p.nonce) and self.clock() - p.seen < AWAY_S for p in self.packs.values())
        sharing = max(1, here, self.packs_wanted if waits else 0)
        free = max(0, min(self.slots, -(-left // sharing)) - len(booked))
        queue = [
            s
            for s in self.seats.values()
            if not s.pack and not s.record.ended
            and not (waits and s.holder not in ("", pack, *self.lost, *self.packs))
        ]  # fmt: skip
        for seat in queue[:free]:
            seat.origin = seat.holder if seat.holder != pack else ""
            seat.pack, seat.holder, seat.record.state = pack, pack, "running"

    def _claim(self, trial_id: str, pack: str, step: int) -> None:
        """A pack comes with a trial in its checkpoint: it keeps it, unless another pack went on with it meanwhile."""
        seat = self.seats[trial_id]
        if seat.pack and seat.pack != pack and self.packs[seat.pack].active.get(trial_id, 0) >= step:
            return
        if seat.holder not in ("", pack) and seat.record.ended:
            return
        seat.pack, seat.holder, seat.origin = pack, pack, ""

    def _free(self, pack: str) -> None:
        for seat in self.seats.values():
            if seat.pack == pack:
                seat.pack = ""
                if not seat.record.ended:
                    seat.record.state = "waiting"

    def _miss(self) -> None:
        """Hand out the trials of packs that are silent, where another pack can take them."""
        now = self.clock()
        here = [name for name, p in self.packs.items() if p.nonce and now - p.seen < AWAY_S / 2]
        for name, pack in self.packs.items():
            if pack.active and here and now - pack.seen > AWAY_S:
                # Should it live, it is told that it is no longer the one that counts, leaves, and comes back anew.
                pack.nonce, pack.active, pack.cohorts, pack.waiting, pack.rate = "", {}, [], {}, 0.0
                pack.phase = "away"
                self._free(name)
                self.note(
                    f"{name}: silent for {AWAY_S:.0f} s; its trials go on in the other packs, from its last checkpoint"
                )

    def _lapse(self) -> None:
        self._miss()
        now = self.clock()
        for trial_id, seat in self.seats.items():
            if seat.client and not seat.record.ended and now - seat.seen > LEASE_S:
                seat.client = ""
                self.note(f"{trial_id}: its Tune trial was silent for {LEASE_S:.0f} s; the lease lapsed")

    def unclaimed(self) -> list[dict[str, Any]]:
        """Cohorts that wait for a verdict while none of their trials has a client that could ask Tune for it."""
        found = []
        for pack in self.packs.values():
            waited_s = self.clock() - pack.waiting_since
            for cohort in pack.cohorts:
                seats = [self.seats[t] for t in cohort["scores"] if t in self.seats]
                judged = all(t in self.verdicts.get(int(cohort["step"]), {}) for t in cohort["scores"])
                patience_s = LEASE_S if any(seat.leased for seat in seats) else UNLEASED_S
                if not judged and waited_s > patience_s and not any(seat.client for seat in seats):
                    found.append({"step": cohort["step"], "scores": dict(cohort["scores"])})
        return found

    def _steps_left(self) -> float:
        """Slot steps still to do, if at each rung one in `thinning` goes on."""
        total = 0.0
        for seat in self.seats.values():
            if seat.record.ended:
                continue
            at, share = seat.record.steps, 1.0
            for rung in self.rungs:
                if rung > at:
                    total += share * (rung - at)
                    at, share = rung, share / self.thinning
        return total


def _scored_rung(seat: Seat, step: int) -> bool:
    return any(event["kind"] == "rung" and event["step"] == step for event in seat.events)


def _resumed(active: Mapping[str, int]) -> str:
    return f"going on with {len(active)} trials from its checkpoint" if active else "starting its trials anew"
