"""The engine of a pack of one whose adapter or optimiser cannot be stacked: DoRA and 8-bit AdamW, through peft and
bitsandbytes.

Loss, keyed dropout, sample order, schedule, clipping, validation and checkpoints are those of every pack. One trial at a
time is in it; the next one begins when it has left.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raycap.config import Config, trains_alone
from raycap.errors import ModelError
from raycap.models.alone import AloneStack
from raycap.models.lora import Weights
from raycap.train.engine import PackEngine, Slot
from raycap.train.lanes import Lanes
from raycap.train.optim import StackedAdamW
from raycap.train.optim8 import PagedAdamW8bit
from raycap.trial import TrialSpec


def engine_class(config: Config) -> type[PackEngine]:
    """What trains the trials of `config`."""
    return AloneEngine if trains_alone(config) else PackEngine


class AloneEngine(PackEngine):
    """PackEngine for one slot, whose adapter is peft's own module."""

    def _make_lanes(self) -> Lanes:
        return Lanes()  # peft's parameters add their gradients up in one place

    def _make_stacks(self) -> AloneStack:
        cm = self.cm
        moments = self.config.train.optimiser == "adamw"
        return AloneStack(cm.model, self.keys, compute_dtype=cm.compute_dtype, device=cm.device, moments=moments)

    def _make_optimiser(self, slots: list[Slot]) -> StackedAdamW | PagedAdamW8bit:
        if self.config.train.optimiser == "adamw":
            return super()._make_optimiser(slots)
        (slot,) = slots
        return PagedAdamW8bit(slot.spec, self.stacks.parameters, slot.tensors)

    def _cut(self, trial_id: str) -> dict[str, Weights]:
        if not isinstance(self.optimiser, PagedAdamW8bit):
            return super()._cut(trial_id)
        value = self.stacks.cut(0, "value", self.slots[trial_id].targets)
        return {"value": value, **{kind: self.optimiser.moments(kind) for kind in ("m", "v")}}

    def admit(
        self, spec: TrialSpec, state: Mapping[str, Any] | None = None, *, adapter: Path | str | None = None
    ) -> None:
        """As PackEngine.admit. The adapter is built at once, so that what begins as the base has it (DoRA's
        magnitude) is part of the first state."""
        super().admit(spec, state, adapter=adapter)
        self._stack([spec.trial_id])

    def _check_fits(self, spec: TrialSpec, targets: list[str], weights: Weights) -> None:
        pairs = {path: tensors[:2] for path, tensors in weights.items()}
        super()._check_fits(spec, targets, pairs)
        wanted = 3 if spec.variant == "dora" else 2
        for path, tensors in weights.items():
            outputs = self.shapes[path][1]
            if len(tensors) != wanted or any(tuple(t.shape) != (outputs,) for t in tensors[2:]):
                raise ModelError(
                    f"trial {spec.trial_id}: {path} has tensors of {[list(t.shape) for t in tensors]}, and "
                    f"lora.variant={spec.variant} has {wanted}, the third of [{outputs}] where there is one"
                )
