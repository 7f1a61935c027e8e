"""The engine of a pack of one whose adapter or optimiser cannot be stacked: DoRA, prompt tuning, 8-bit AdamW.

Loss, keyed dropout, sample order, schedule, clipping, validation and checkpoints are those of every pack. One trial at a
time is in it; the next one begins when it has left.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raycap.checks import trains_alone, variants
from raycap.config import Config
from raycap.errors import ConfigError, ModelError
from raycap.models import load_family
from raycap.models.alone import AloneStack
from raycap.models.lora import Weights
from raycap.models.prompt import PROMPT, export_prompt, import_prompt, require_prompts, start_prompt
from raycap.train.engine import PackEngine
from raycap.train.lanes import Lanes
from raycap.train.optim import StackedAdamW
from raycap.train.optim8 import PagedAdamW8bit
from raycap.train.slots import Slot
from raycap.trial import TrialSpec


def engine_class(config: Config) -> type[PackEngine]:
    """What trains the trials of `config`.

    Raises:
        ConfigError: an adapter of a kind that the model's family cannot have.
    """
    if "prompt" in variants(config):
        require_prompts(load_family(config.model.family, config.model))
    return AloneEngine if trains_alone(config) else PackEngine


class AloneEngine(PackEngine):
    """PackEngine for one slot, whose adapter is applied by raycap.models.alone."""

    def _make_lanes(self) -> Lanes:
        return Lanes()  # peft's parameters add their gradients up in one place

    def _make_stacks(self) -> AloneStack:
        cm = self.cm
        moments = self.config.train.optimiser == "adamw"
        return AloneStack(
            cm.model, self.keys, cm.family, compute_dtype=cm.compute_dtype, device=cm.device, moments=moments
        )

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

    def _targets(self, spec: TrialSpec) -> list[str]:
        if spec.variant != "prompt":
            return super()._targets(spec)
        positions = self.cm.family.max_positions(self.cm.model)
        text = max(self.cm.max_text_tokens, self.config.decode.max_new_tokens + 1)
        if positions is not None and text + spec.prompt_tokens > positions:
            raise ConfigError(
                f"lora.prompt_tokens={spec.prompt_tokens} before texts of {text} tokens: {self.cm.path} has {positions} text "
                "positions. Lower it, data.max_text_tokens or decode.max_new_tokens"
            )
        return [PROMPT]

    def _start(self, spec: TrialSpec, targets: list[str]) -> Weights:
        if spec.variant != "prompt":
            return super()._start(spec, targets)
        words = self.cm.model.get_input_embeddings().weight
        return {PROMPT: (start_prompt(spec, words, self.stacks.dtype),)}

    def _read(self, spec: TrialSpec, targets: list[str], folder: Path | str) -> Weights:
        if spec.variant != "prompt":
            return super()._read(spec, targets, folder)
        weights = {PROMPT: (import_prompt(Path(folder).expanduser()),)}
        self._check_fits(spec, targets, weights)
        return weights

    def export(self, trial_id: str, folder: Path | str, which: str = "best") -> Path:
        if self._slot(trial_id).spec.variant != "prompt":
            return super().export(trial_id, folder, which)
        (vectors,) = self._kept(trial_id, which)[PROMPT]
        return export_prompt(folder, vectors, self.config.model.path, self.cm.family.task_type)

    def _check_fits(self, spec: TrialSpec, targets: list[str], weights: Weights) -> None:
        if spec.variant == "prompt":
            wanted = [spec.prompt_tokens, self.cm.model.get_input_embeddings().weight.shape[1]]
            found = {path: [list(t.shape) for t in tensors] for path, tensors in weights.items()}
            if found != {PROMPT: [wanted]}:
                raise ModelError(f"trial {spec.trial_id}: weights of {found}, expected a prompt of {wanted}")
            return
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
