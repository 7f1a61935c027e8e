"""The board as a Ray actor: the same calls, with waiting where a caller would have to ask again and again."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from raycap.cluster import title
from raycap.files import read_whole
from raycap.train.record import read_records
from raycap.trial import TrialSpec
from raycap.tune.board import Board
from raycap.tune.gauges import Gauges


class BoardActor:
    """One a run, without CPUs, on the driver's node. When it dies Ray starts it anew: it reads the rungs' record, and
    packs and clients tell it the rest."""

    def __init__(self, plan: dict[str, Any]):
        title(f"board of {plan['run']}")
        run_dir = Path(plan["run_dir"])
        ledger = run_dir / "checkpoints" / "rungs.json"
        verdicts = (read_whole(ledger) or {}).get("verdicts", {})
        self.board = Board(
            [TrialSpec.from_dict(values) for values in plan["trials"]],
            rungs=plan["rungs"],
            slots=plan["slots"],
            packs=plan["packs"],
            thinning=plan["thinning"],
            verdicts=verdicts,
            records=read_records(run_dir),
            holders=plan.get("holders"),
        )
        self._driver = plan["driver"]
        self._gauges = Gauges(plan["run"])
        self._changed = asyncio.Event()

    async def driver(self) -> str:
        """Whose board it is: a worker of an earlier driver finds it under the same name, and leaves."""
        return self._driver

    async def arrive(self, pack: str) -> None:
        self.board.arrive(pack)

    async def lease(self, trial_id: str, client: str) -> None:
        self.board.lease(trial_id, client)
        self._wake()

    async def next_event(self, trial_id: str, client: str, after: int, wait_s: float) -> dict[str, Any] | None:
        return await self._until(lambda: self.board.next_event(trial_id, client, after), wait_s)

    async def proceed(self, trial_id: str, step: int) -> None:
        self.board.proceed(trial_id, step)
        self._wake()

    async def release(self, trial_id: str, client: str) -> None:
        self.board.release(trial_id, client)
        self._wake()

    async def judge(self, step: int, verdicts: dict[str, dict[str, str]]) -> None:
        self.board.judge(step, verdicts)
        self._wake()

    async def register(self, pack: str, nonce: str, pid: int, report: dict[str, Any]) -> dict[str, Any]:
        orders = self.board.register(pack, nonce, pid, report)
        self._wake()
        return orders

    async def exchange(self, pack: str, nonce: str, report: dict[str, Any], wait_s: float) -> dict[str, Any]:
        orders = self.board.exchange(pack, nonce, report)
        self._wake()

        def ready() -> dict[str, Any] | None:
            found = self.board.orders(pack, nonce)
            return None if found.get("hold") and not found.get("stop") else found

        if wait_s and orders.get("hold") and not orders.get("stop"):
            orders = await self._until(ready, wait_s) or self.board.orders(pack, nonce)
        return orders

    async def goodbye(self, pack: str, nonce: str) -> None:
        self.board.goodbye(pack, nonce)
        self._wake()

    async def alive(self, pack: str, nonce: str) -> bool:
        return self.board.alive(pack, nonce)

    async def evict(self, pack: str) -> None:
        self.board.evict(pack)
        self._wake()

    async def fail(self, kind: str, message: str) -> None:
        self.board.fail(kind, message)
        self._wake()

    async def pack_lost(self, pack: str) -> bool:
        left = self.board.pack_lost(pack)
        self._wake()
        return left

    async def note(self, text: str) -> None:
        self.board.note(text)

    async def stop(self) -> None:
        self.board.stop()
        self._wake()

    async def snapshot(self) -> dict[str, Any]:
        found = self.board.snapshot()
        self._gauges.set(found)
        return found

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _until(self, found: Any, wait_s: float) -> Any:
        """The first value of `found()` that is not None, asked again whenever the board changes; None after wait_s."""
        deadline = time.monotonic() + wait_s
        while True:
            value = found()
            left = deadline - time.monotonic()
            if value is not None or left <= 0:
                return value
            try:
                await asyncio.wait_for(self._changed.wait(), min(left, 1.0))
            except TimeoutError:
                pass
