"""Who goes on: rungs, a record of them that outlives the driver, and the Ray Tune schedulers that follow it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from raycap.config import Config
from raycap.errors import RunError
from raycap.files import read_whole, set_aside, write_json
from raycap.train.record import TrialRecord

Verdict = dict[str, str]
"""{"action": "go" | "stop", "state": "" | "finished" | "stopped" | "diverged", "reason": a clause for people}"""


def rungs(steps: int, grace_steps: int, eta: int) -> list[int]:
    """Steps at which trials are scored: grace, grace*eta, ..., and the full budget last. Grace 0 is steps / eta^2."""
    rung = grace_steps or max(1, steps // eta**2)
    found = []
    while rung < steps:
        found.append(rung)
        rung *= eta
    return [*found, steps]


def planned_rungs(config: Config) -> list[int]:
    """The rungs of a sweep. With val trained on its score says nothing: no checkpoint is chosen, the last is exported."""
    if "val" in config.data.train_splits:
        return [config.train.steps]
    return rungs(config.train.steps, config.tune.grace_steps, config.tune.eta)


class RungLedger:
    """Scores and verdicts of every rung, on disk before anybody acts on them.

    Ray forgets its rungs when a driver dies, so a resumed run reads them here. What was judged once keeps its verdict:
    a pack that repeats some steps after a crash, or a trial that Tune retries, hears the same again.
    """

    def __init__(
        self,
        path: Path | str | None,
        *,
        steps: list[int],
        eta: int,
        select_by: Literal["cider", "val_loss"],
        halving: bool = True,
        records: Mapping[str, TrialRecord] | None = None,
        exempt: Collection[str] = (),
        apart: Collection[str] = (),
    ):
        self.exempt = frozenset(exempt)
        """Trials that are scored at every rung, never stopped for it, and not counted among those that others are
        compared with."""
        self.apart = frozenset(apart)
        """Trials that cannot win. They are compared among themselves, so that none takes a place of one that can; one in
        eta goes on here too, and of fewer than eta none."""
        self.path = Path(path) if path else None
        self.rungs = list(steps)
        self.eta = eta
        self.sign = 1.0 if select_by == "cider" else -1.0
        self.halving = halving
        self.select_by = select_by
        self.scores: dict[int, dict[str, float | None]] = {}
        self.verdicts: dict[int, dict[str, Verdict]] = {}
        self.notes: list[str] = []
        self.written: Callable[[Path], None] | None = None
        """Called with the file after each change, before anybody acts on it."""
        if self.path:
            self._read(records or {})

    def judge(self, step: int, cohort: Mapping[str, float | None]) -> dict[str, Verdict]:
        """Verdicts for trials that reached `step` together.

        All their scores are recorded before any is compared, so that the order in which results arrive decides nothing.
        One in eta of those recorded at the rung goes on (rounded down as in Hyperband, but never none; equal scores share
        a place). A score that is
        missing or NaN stops its trial and takes no part in the comparison.
        """
        known = self.verdicts.get(step, {})
        fresh = {trial: score for trial, score in cohort.items() if trial not in known}
        if fresh:
            found = {t: None if s is None or not math.isfinite(s) else float(s) for t, s in fresh.items()}
            scores = {**self.scores.get(step, {}), **found}
            known = {**known, **{trial: self._verdict(step, trial, scores) for trial in fresh}}
            # Ours only once they are on disk: a full one must not leave a verdict that nobody will find again.
            self._write({**self.scores, step: scores}, {**self.verdicts, step: known})
            self.scores[step], self.verdicts[step] = scores, known
        return {trial: known[trial] for trial in cohort}

    def _verdict(self, step: int, trial: str, scores: Mapping[str, float | None]) -> Verdict:
        score = scores[trial]
        if score is None:
            return {"action": "stop", "state": "diverged", "reason": f"no finite score at step {step}"}
        if step >= self.rungs[-1]:
            return {"action": "stop", "state": "finished", "reason": ""}
        if not self.halving or step not in self.rungs:
            return {"action": "go", "state": "", "reason": ""}
        if trial in self.exempt:
            return {"action": "go", "state": "", "reason": ""}
        apart = trial in self.apart
        others = [s for t, s in scores.items() if s is not None and t not in self.exempt and (t in self.apart) == apart]
        place = 1 + sum(self.sign * s > self.sign * score for s in others)
        if place <= max(0 if apart else 1, len(others) // self.eta):
            return {"action": "go", "state": "", "reason": ""}
        among = f"{len(others)} that cannot win" if apart else f"{len(others)}"
        reason = f"{self.select_by} {score:.4g} at step {step}: place {place} of {among}, one in {self.eta} goes on"
        return {"action": "stop", "state": "stopped", "reason": reason}

    def _settings(self) -> dict[str, Any]:
        return {"rungs": self.rungs, "eta": self.eta, "select_by": self.select_by, "halving": self.halving}

    def _write(self, scores: Mapping[int, Any], verdicts: Mapping[int, Any]) -> None:
        if self.path:
            write_json(self.path, {**self._settings(), "scores": scores, "verdicts": verdicts})
            if self.written:
                self.written(self.path)

    def _read(self, records: Mapping[str, TrialRecord]) -> None:
        found = read_whole(self.path)
        try:
            scores = {int(step): dict(scores) for step, scores in found["scores"].items()}
            verdicts = {int(step): dict(verdicts) for step, verdicts in found["verdicts"].items()}
        except (TypeError, KeyError, ValueError, AttributeError):
            self._rebuild(records)
            return
        for key, wanted in self._settings().items():
            if found.get(key) != wanted:
                raise RunError(
                    f"{self.path} was written with {key}={found.get(key)}, this run has {wanted}. "
                    "Resume with the settings of the interrupted run, or choose another run.dir."
                )
        self.scores, self.verdicts = scores, verdicts

    def _rebuild(self, records: Mapping[str, TrialRecord]) -> None:
        """The file is gone or damaged: read the rungs out of the trials' own learning curves."""
        if any(record.curve for record in records.values()):
            set_aside(self.path)
            self.notes.append(f"{self.path.name} was gone or damaged: the rungs were read from the trials' records")
            self.learn(records.values())

    def learn(self, records: Iterable[TrialRecord]) -> None:
        """After the loss of the file: verdicts that trials acted on. Does nothing while the file was never lost.

        A trial that has left a rung behind had the verdict to go; one that ended there was stopped. One that waits at a
        rung is left out: its pack reports the cohort again, and the same scores give the same verdict.
        """
        if not self.notes:
            return
        news = False
        for record in sorted(records, key=lambda r: r.trial_id):
            for point in record.curve:
                step = int(point["step"])
                if record.trial_id in self.verdicts.get(step, {}):
                    continue
                if record.steps > step or (record.steps == step and record.state == "running"):
                    verdict = {"action": "go", "state": "", "reason": ""}
                elif record.ended:
                    verdict = {"action": "stop", "state": record.state, "reason": record.reason}
                else:
                    continue
                self.scores.setdefault(step, {})[record.trial_id] = point.get(self.select_by)
                self.verdicts.setdefault(step, {})[record.trial_id] = verdict
                news = True
        if news:
            self._write(self.scores, self.verdicts)


class _FollowsLedger:
    """What both schedulers share: a result carries its cohort, the ledger judges it, the board hears of it at once."""

    ledger: RungLedger
    announce: Callable[[int, dict[str, Verdict]], None]

    def _follow(self, result: Mapping[str, Any]) -> str:
        if "cohort" not in result:
            return TrialScheduler.CONTINUE
        step, cohort = int(result["step"]), json.loads(result["cohort"])
        if result.get("diverged"):
            return TrialScheduler.STOP  # between rungs: nothing to compare, and the slot is free already
        verdicts = self.ledger.judge(step, cohort)
        self.announce(step, verdicts)
        return TrialScheduler.STOP if verdicts[result["trial"]]["action"] == "stop" else TrialScheduler.CONTINUE


class PackAsha(_FollowsLedger, AsyncHyperBandScheduler):
    """Ray's ASHA with rungs that survive the driver, and cohorts judged as one.

    Differs from its parent in three points: a trial's own score counts among those it is compared with, scores of the
    slots of a pack are recorded together before the first is judged, and a NaN stops its trial (in the parent it
    compares false, so the trial goes on).
    """

    def __init__(self, ledger: RungLedger, announce: Callable[[int, dict[str, Verdict]], None]):
        super().__init__(
            time_attr="step",
            metric=ledger.select_by,
            mode="max" if ledger.sign > 0 else "min",
            max_t=ledger.rungs[-1],
            grace_period=ledger.rungs[0],
            reduction_factor=ledger.eta,
        )
        self.ledger = ledger
        self.announce = announce

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = self._follow(result)
        self._num_stopped += decision == TrialScheduler.STOP
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self._trial_info.pop(trial.trial_id, None)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self._trial_info.pop(trial.trial_id, None)

    def debug_string(self) -> str:
        counts = ", ".join(f"step {step}: {len(scores)}" for step, scores in sorted(self.ledger.scores.items()))
        return f"PackAsha: {self._num_stopped} stopped; scored at {counts or 'no rung yet'}"


class PackFifo(_FollowsLedger, FIFOScheduler):
    """Every trial to its full budget; only one without a finite score is stopped."""

    def __init__(self, ledger: RungLedger, announce: Callable[[int, dict[str, Verdict]], None]):
        super().__init__()
        self.ledger = ledger
        self.announce = announce

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return self._follow(result)
