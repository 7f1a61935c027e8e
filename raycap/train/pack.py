"""The pack's loop: one base, many trials. Plain Python; what it talks to (engine, board, checkpoints) is passed in.

Between two changes of who is in a slot, every slot takes one step after the other. At a rung the pack scores the slots
that reached it together, and holds all of its slots until the verdicts are in and the freed slots are filled again: so
which trials train side by side, and at which step, depends on scores alone, and a run that was killed and resumed
repeats the undisturbed one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from raycap.errors import RunError
from raycap.files import atomic_folder, unwritten, write_json
from raycap.train.record import TrialRecord, read_ended, write_ended
from raycap.trial import TrialSpec

EXCHANGE_S = 1.0
"""Time between two words with the board while all slots train."""
HOLD_WAIT_S = 2.0
"""How long one question to the board may wait for its answer to change."""
MAX_SKIPS = 50
"""Steps in a row without a finite gradient (loss scaling may skip a few) after which a trial has diverged."""


class Engine(Protocol):
    """What trains; raycap.train.engine.PackEngine is one."""

    def admit(self, spec: TrialSpec, state: Any | None = None) -> None: ...
    def release(self, trial_id: str) -> None: ...
    def pause(self, trial_id: str) -> None: ...
    def resume(self, trial_id: str) -> None: ...
    def step(self) -> Mapping[str, Any]: ...
    def evaluate(self, trial_ids: list[str]) -> Mapping[str, Any]: ...
    def state(self, trial_id: str) -> Any: ...
    def export(self, trial_id: str, folder: Path, which: str = "best") -> Any: ...


class Link(Protocol):
    """The way to the board."""

    def register(self, report: dict[str, Any]) -> dict[str, Any]: ...
    def exchange(self, report: dict[str, Any], wait_s: float) -> dict[str, Any]: ...
    def goodbye(self) -> None: ...


class Keeper(Protocol):
    """Checkpoints of the whole pack."""

    def restore(self) -> tuple[dict[str, Any], dict[str, Any]]: ...
    def save(self, meta: dict[str, Any], states: dict[str, Any]) -> None: ...
    def adopt(self, pack: str, trial_id: str) -> tuple[dict[str, Any], Any] | None: ...


@dataclass(slots=True)
class Slot:
    """What the pack knows of a trial beside the engine's tensors."""

    spec: TrialSpec
    record: TrialRecord
    captions: dict[str, str] = field(default_factory=dict)
    cohort: dict[str, Any] | None = None
    """{step, scores} of the rung at which the slot waits for its verdict."""
    skips: int = 0
    collapsed: str | None = None
    """Why its captions count as collapsed, where that ends it."""

    def to_meta(self) -> dict[str, Any]:
        return {"spec": self.spec.to_dict(), "record": self.record.to_dict(), "captions": self.captions,
                "cohort": self.cohort, "skips": self.skips, "collapsed": self.collapsed}  # fmt: skip

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> Slot:
        spec, record = TrialSpec.from_dict(meta["spec"]), TrialRecord.from_dict(meta["record"])
        return cls(spec, record, dict(meta["captions"]), meta["cohort"], meta["skips"], meta.get("collapsed"))


class Pack:
    """One pack from its start (or restart) to its end; `run` is the whole of it."""

    def __init__(
        self,
        engine: Engine,
        link: Link,
        keeper: Keeper,
        *,
        rungs: list[int],
        select_by: str,
        adapters: Path,
        publish: Callable[[str], None] = lambda trial_id: None,
        checkpoint_every_s: float,
        prune_collapsed: bool = False,
        log: Callable[[str], None] = lambda line: None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.engine, self.link, self.keeper = engine, link, keeper
        self.rungs, self.select_by, self.adapters, self.publish = set(rungs), select_by, adapters, publish
        self.prune_collapsed = prune_collapsed
        self.checkpoint_every_s, self.log, self.clock = checkpoint_every_s, log, clock
        self.slots: dict[str, Slot] = {}
        self.ended: dict[str, dict[str, Any]] = {}
        self.began: float | None = None
        self.slot_steps = 0
        self.unsaved = False
        """Whether a trial came or left since the last checkpoint. Saved before the next step, so that a restart
        finds the same trials side by side."""
        self.saved_at = clock()

    def run(self) -> str:
        """Train until the board says `done` (all trials ended) or `stop` (checkpointed, to be resumed)."""
        self._restore()
        orders = self.link.register(self._report())
        while True:
            if orders.get("stale"):
                self.log("another worker has taken this pack's place: leaving")
                return "stale"
            if orders.get("unknown"):
                self.log("the board has lost its memory: registering anew")
                orders = self.link.register(self._report())
                continue
            if self._leave(orders):
                orders = self._exchange()
                continue
            if orders["stop"]:
                self._save("asked to stop")
                self.link.goodbye()
                return "stopped"
            self._come(orders)
            if orders["done"]:
                self.link.goodbye()
                return "done"
            if orders["hold"] or not self.slots:
                orders = self._exchange(wait_s=HOLD_WAIT_S)
                continue
            if self.unsaved:
                self._save("trials changed")
            self._train()
            orders = self._exchange(wait_s=HOLD_WAIT_S if self._waiting() else 0.0)

    # Coming and going ------------------------------------------------------------------------------------------

    def _restore(self) -> None:
        """Put the trials of the last checkpoint back, and remember those that ended without the board's hearing of it."""
        meta, states = self.keeper.restore()
        for trial_id, saved in meta.get("slots", {}).items():
            slot = self.slots[trial_id] = Slot.from_meta(saved)
            self.engine.admit(slot.spec, states[trial_id])
            if slot.cohort:
                self.engine.pause(trial_id)
        ended = read_ended(self.adapters)
        self.ended = {t: record.to_dict() for t, record in ended.items() if t not in self.slots}
        if self.slots:
            self.log("resumed " + ", ".join(f"{t} at step {s.record.steps}" for t, s in self.slots.items()))

    def _come(self, orders: Mapping[str, Any]) -> None:
        for trial_id, slot in self.slots.items():
            verdict = orders["verdicts"].get(trial_id)
            if slot.cohort and verdict and verdict["action"] == "go":
                slot.cohort = None
                slot.record.state = "running"
                self.engine.resume(trial_id)
        for values in orders["admit"]:
            values = dict(values)
            before = values.pop("from", "")
            spec = TrialSpec.from_dict(values)
            if before and self._adopt(spec, before):
                continue
            self.engine.admit(spec)
            record = TrialRecord.of(spec)
            record.state = "running"
            self.slots[spec.trial_id] = Slot(spec, record)
            self.unsaved = True
            self.log(
                f"admitted {spec.trial_id}: r={spec.r} alpha={spec.alpha:g} lr={spec.lr:g} dropout={spec.dropout:g}"
            )

    def _adopt(self, spec: TrialSpec, before: str) -> bool:
        """Go on with a trial where the last checkpoint of the pack that had it left it; False when it is in none."""
        found = self.keeper.adopt(before, spec.trial_id)
        if found is None:
            return False
        slot = self.slots[spec.trial_id] = Slot.from_meta(found[0])
        self.engine.admit(spec, found[1])
        if slot.cohort:
            self.engine.pause(spec.trial_id)
        self.unsaved = True
        self.log(f"took {spec.trial_id} over from {before} at step {slot.record.steps}")
        return True

    def _leave(self, orders: Mapping[str, Any]) -> bool:
        """Let go of the trials that shall leave; True when there were any."""
        leaving = {t: v for t, v in orders["verdicts"].items() if t in self.slots and v["action"] == "stop"}
        for trial_id, verdict in leaving.items():
            self._end(trial_id, verdict["state"] or "stopped", verdict["reason"])
        for trial_id in orders["drop"]:
            self.log(f"dropped {trial_id}")
            self.engine.release(trial_id)
            del self.slots[trial_id]
            self.unsaved = True
        return bool(leaving or orders["drop"])

    def _end(self, trial_id: str, state: str, reason: str) -> None:
        """Put a trial's record, best adapter and captions on disk as one folder, then free its slot.

        The folder comes before any checkpoint without the trial: at each moment one of the two holds it.
        """
        slot = self.slots[trial_id]
        if slot.collapsed is not None and state == "diverged":
            state, reason = "stopped", f"at step {slot.record.steps} {slot.collapsed or 'its captions said nothing'}"
        elif slot.record.collapse.get("collapsed") and state in ("finished", "stopped"):
            signs = ", ".join(slot.record.collapse.get("reasons", []))
            told = f"its captions have collapsed ({signs})" if signs else "its captions have collapsed"
            reason = "; ".join(filter(None, [reason, told]))
        slot.record.state = state
        slot.record.reason = reason
        with atomic_folder(self.adapters / trial_id) as folder:
            if slot.record.best_step:
                self.engine.export(trial_id, folder, which="best")
                write_json(folder / "val_captions.json", slot.captions)
            write_ended(folder, slot.record)
        self.publish(trial_id)
        self.engine.release(trial_id)
        self.ended[trial_id] = slot.record.to_dict()
        del self.slots[trial_id]
        self.unsaved = True
        self.log(
            f"{trial_id} {state} at step {slot.record.steps}"
            + (f": {slot.record.reason}" if slot.record.reason else "")
        )

    # Steps and rungs -------------------------------------------------------------------------------------------

    def _train(self) -> None:
        """Steps of all slots until it is time to talk: a rung, a divergence, or EXCHANGE_S."""
        began = self.clock()
        self.began = began if self.began is None else self.began
        while True:
            before = self.clock()
            results = self.engine.step()
            now = self.clock()
            self.slot_steps += len(results)
            diverged = [t for t, result in results.items() if self._note_step(t, result, (now - before) / len(results))]
            for trial_id in diverged:
                reason = f"loss or gradients not finite at step {self.slots[trial_id].record.steps}"
                self._end(trial_id, "diverged", reason)
            reached = [t for t, s in self.slots.items() if t in results and s.record.steps in self.rungs]
            if reached:
                self._score(reached)
            if now - self.saved_at >= self.checkpoint_every_s and not diverged:
                self._save("it was time")
            if reached or diverged or now - began >= EXCHANGE_S:
                return

    def _note_step(self, trial_id: str, result: Any, seconds: float) -> bool:
        """Take in one step of one slot; True when it has diverged."""
        slot = self.slots[trial_id]
        slot.record.steps, slot.record.loss = int(result.step), float(result.loss)
        slot.record.seconds += seconds
        slot.skips = 0 if result.finite else slot.skips + 1
        return not math.isfinite(slot.record.loss) or slot.skips >= MAX_SKIPS

    def _score(self, reached: list[str]) -> None:
        """Validate the slots that reached a rung together; they wait for their verdicts from here."""
        before = self.clock()
        for trial_id in reached:
            self.engine.pause(trial_id)
        results = self.engine.evaluate(reached)
        seconds = self.clock() - before
        scores: dict[int, dict[str, float | None]] = {}
        for trial_id in reached:
            slot, found = self.slots[trial_id], results[trial_id]
            record, step = slot.record, slot.record.steps
            point = {"step": step, "loss": record.loss, "val_loss": _finite(found.val_loss),
                     "cider": _finite(found.cider), "cider_se": _finite(found.cider_se)}  # fmt: skip
            score = point[self.select_by]
            record.curve = [p for p in record.curve if p["step"] != step] + [point]
            record.state, record.rung = "judged", step
            record.seconds += seconds / len(reached)
            best, sign = record.score(self.select_by), 1 if self.select_by == "cider" else -1
            if score is not None and (best is None or sign * score > best):
                record.best_step, record.collapse = step, dict(found.collapse)
                record.val_loss, record.cider, record.cider_se = point["val_loss"], point["cider"], point["cider_se"]
                slot.captions = dict(found.captions)
            if self.prune_collapsed and found.collapse.get("collapsed"):
                score = None  # no score stops a trial, whatever the others have
                slot.collapsed = "; ".join(found.collapse.get("reasons", []))
            scores.setdefault(step, {})[trial_id] = score
        for step, cohort in scores.items():
            for trial_id in cohort:
                self.slots[trial_id].cohort = {"step": step, "scores": cohort}
        table = ", ".join(
            f"{t} {s:.4g}" if s is not None else f"{t} none" for c in scores.values() for t, s in c.items()
        )
        self.log(f"scored {self.select_by} in {seconds:.2f} s: {table}")

    # Board and checkpoints -------------------------------------------------------------------------------------

    def _waiting(self) -> bool:
        return any(slot.cohort for slot in self.slots.values())

    def _exchange(self, wait_s: float = 0.0) -> dict[str, Any]:
        orders = self.link.exchange(self._report(), wait_s)
        if not orders.get("unknown"):
            self.ended.clear()
        return orders

    def _report(self) -> dict[str, Any]:
        cohorts: dict[int, dict[str, Any]] = {}
        for trial_id, slot in self.slots.items():
            if slot.cohort:
                step = slot.cohort["step"]
                cohort = cohorts.setdefault(step, {"step": step, "scores": slot.cohort["scores"], "metrics": {}})
                cohort["metrics"][trial_id] = dict(slot.record.curve[-1])
        return {
            "active": {t: s.record.steps for t, s in self.slots.items()},
            "records": {t: s.record.to_dict() for t, s in self.slots.items()},
            "ended": dict(self.ended),
            "cohorts": list(cohorts.values()),
            "rate": 0.0 if self.began is None else self.slot_steps / max(self.clock() - self.began, 1e-9),
            "phase": "at a rung" if cohorts else "training" if self.slots else "idle",
        }

    def _save(self, why: str) -> None:
        before = self.clock()
        meta = {"slots": {t: s.to_meta() for t, s in self.slots.items()}}
        try:
            self.keeper.save(meta, {t: self.engine.state(t) for t in self.slots})
        except OSError as error:
            where = error.filename or "the run folder or the temporary folder"
            raise RunError(
                f"cannot write a checkpoint to {where}: {unwritten(error)} The last checkpoint is unchanged."
            ) from error
        self.saved_at, self.unsaved = self.clock(), False
        self.log(f"checkpoint ({why}) in {self.saved_at - before:.2f} s: " + (_positions(self.slots) or "no trial"))


def _positions(slots: Mapping[str, Slot]) -> str:
    return " ".join(f"{t}@{s.record.steps}" for t, s in slots.items())


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
