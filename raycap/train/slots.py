"""The slots of a pack: who has one, what it adapts, and its weights on their way in and out. Plain torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from raycap.config import Config
from raycap.errors import ConfigError, ModelError, RunError
from raycap.models.base import CaptionModel, checkpoint_layers
from raycap.models.dropout import Keys, SharedKeys, key_base_dropout
from raycap.models.lora import Weights, export_adapter, import_adapter, start
from raycap.models.stacked import KINDS, Stacks
from raycap.train.lanes import Lanes, lanes_for, like_ranks
from raycap.train.optim import FIRST_LOSS_SCALE, LossScale, StackedAdamW
from raycap.trial import TrialSpec, values_of


@dataclass
class Slot:
    """A trial's place in the pack."""

    spec: TrialSpec
    targets: list[str]
    tensors: dict[str, Weights]
    """value, m, v by module path; while the slot is in the stacks, those are newer."""
    step: int = 0
    updates: int = 0
    """Steps that changed the weights: AdamW's own count."""
    paused: bool = False
    best: Weights | None = None
    best_score: float = -math.inf
    """Larger is better, whatever it is that selects."""
    loss_scale: LossScale = field(default_factory=LossScale)


class Slots:
    """Up to `count` adapters on one frozen base. What trains and scores them is raycap.train.engine."""

    def __init__(self, cm: CaptionModel, config: Config, count: int):
        self.cm, self.config, self.max_slots = cm, config, count
        self.device = cm.device
        self.lanes = self._make_lanes()
        self.keys = Keys() if self.lanes.count > 1 else SharedKeys()
        # Trials of a sweep may differ in what they adapt: the pack is made for all of it.
        self.full_parts = sorted({part for value in values_of(config, "lora.full") for part in value})
        self.full = [p for part in self.full_parts for p in cm.family.linear_paths(cm.model, part)]
        """Linears that every slot has a copy of its own of, bias included; those whose trial says so train it."""
        self.scoped = {
            scope: [p for p in cm.family.linear_paths(cm.model, scope) if p not in self.full]
            for scope in values_of(config, "lora.scope")
        }
        """Linears that may get adapters, by the trial's lora.scope."""
        self.linears = list(dict.fromkeys(p for paths in self.scoped.values() for p in paths))
        if "lora.targets" not in config.tune.space:
            for scope, paths in self.scoped.items():  # a bad name is told at once
                cm.family.match_targets(paths, scope, config.lora.targets)
        self.shapes = {}
        for path in [*self.linears, *self.full]:
            linear = cm.model.get_submodule(path)
            self.shapes[path] = (linear.in_features, linear.out_features)
        self.linear_size = sum(i * o for i, o in self.shapes.values()) / max(1, len(self.shapes))
        """Mean number of weights in an adapted linear."""
        key_base_dropout(cm.model, self.keys, on=config.train.base_dropout)
        if config.train.gradient_checkpointing:
            checkpoint_layers(cm)
        self.stacks = self._make_stacks()
        self.stacks.full.update(self.full)
        self.slots: dict[str, Slot] = {}
        self.stacked: list[str] = []
        """Trials in the stacks, in their order there."""
        self.optimiser: StackedAdamW | None = None
        self.scaled = cm.compute_dtype == torch.float16

    # What another kind of adapter does differently (raycap.train.alone).
    def _make_lanes(self) -> Lanes:
        return lanes_for(self.device)

    def _make_stacks(self) -> Stacks:
        cm = self.cm
        return Stacks(cm.model, self.keys, compute_dtype=cm.compute_dtype, device=cm.device, lanes=self.lanes.count)

    def _make_optimiser(self, slots: list[Slot]) -> StackedAdamW:
        return StackedAdamW([s.spec for s in slots], self.device, self.stacks.dtype)

    def _check(self, spec: TrialSpec) -> None:
        """Raise ConfigError for a trial that could not be trained, before it has a slot."""

    # --- coming and going ---------------------------------------------------------------------------------------------

    @property
    def active(self) -> list[str]:
        return list(self.slots)

    def admit(
        self, spec: TrialSpec, state: Mapping[str, Any] | None = None, *, adapter: Path | str | None = None
    ) -> None:
        """Give a trial a slot: at its seed's start, at `adapter` (else lora.init_from), or where `state` left it.

        Raises:
            ConfigError: a rank of 0, or a target that matches no module.
            RunError: no slot is free.
            ModelError: `state` belongs to other modules or another rank.
        """
        if spec.trial_id in self.slots:
            raise RunError(f"trial {spec.trial_id} has a slot already")
        if len(self.slots) >= self.max_slots:
            raise RunError(f"trial {spec.trial_id} finds no slot: tune.slots={self.max_slots} are taken")
        targets = self._targets(spec)
        self._check(spec)
        if state is None:
            adapter = adapter or self.config.lora.init_from
            if adapter:
                trained = [*targets, *self.full] if spec.full else targets
                value = {**self._full_start(), **self._read(spec, trained, adapter)}
            else:
                value = {**self._start(spec, targets), **self._full_start()}
            targets = [*targets, *self.full]
            slot = Slot(spec, targets, {"value": value, "m": {}, "v": {}})
            slot.loss_scale = LossScale(FIRST_LOSS_SCALE if self.scaled else 1.0)
        else:
            targets = [*targets, *self.full]
            self._check_fits(spec, targets, state["value"])
            slot = Slot(spec, targets, {kind: state[kind] for kind in KINDS}, state["step"], state["updates"])
            slot.best = state["best"] or None
            slot.best_score = -math.inf if state["best_score"] is None else state["best_score"]
            slot.loss_scale = LossScale(**state["loss_scale"])
        self.slots[spec.trial_id] = slot

    def _start(self, spec: TrialSpec, targets: list[str]) -> Weights:
        """What the trial begins with at `targets`."""
        return start(spec, {t: self.shapes[t] for t in targets}, self.stacks.dtype)

    def admit_adapter(self, spec: TrialSpec, folder: Path | str) -> None:
        """Give a trial a slot that begins with the PEFT adapter in `folder` and fresh moments."""
        self.admit(spec, adapter=folder)

    def _read(self, spec: TrialSpec, targets: list[str], folder: Path | str) -> Weights:
        """The adapter in `folder`, checked to be of the trial's modules, rank and scale."""
        config, weights = import_adapter(Path(folder).expanduser(), self.cm.family.full_file)
        if bool(config.get("use_dora")) != (spec.variant == "dora"):
            kind = "a DoRA adapter" if config.get("use_dora") else "an adapter without DoRA's magnitudes"
            raise ModelError(f"{folder} is {kind}, the trial's lora.variant is {spec.variant}")
        self._check_fits(spec, targets, weights)
        if config["lora_alpha"] != spec.alpha or bool(config.get("use_rslora")) != spec.rslora:
            raise ModelError(
                f"{folder} has lora_alpha {config['lora_alpha']} and use_rslora {bool(config.get('use_rslora'))}, "
                f"the trial {spec.alpha:g} and {spec.rslora}"
            )
        return {t: weights[t] for t in targets}

    def _targets(self, spec: TrialSpec) -> list[str]:
        """Linears that the trial adapts."""
        family = self.cm.family
        if spec.scope not in self.scoped:
            raise ConfigError(
                f"trial {spec.trial_id}: lora.scope={spec.scope} is none of this pack's ({', '.join(self.scoped)})"
            )
        paths = self.scoped[spec.scope]
        found = family.match_targets(paths, spec.scope, spec.targets)
        return family.in_layers(found, spec.layers, paths)

    def _check_fits(self, spec: TrialSpec, targets: list[str], weights: Weights) -> None:
        if set(weights) != set(targets):
            raise ModelError(f"trial {spec.trial_id}: weights of {len(weights)} modules for {len(targets)} targets")
        for path, (a, b) in weights.items():
            inputs, outputs = self.shapes[path]
            high, wide = spec.r, spec.r
            if path in self.full:
                high, wide = outputs, int(self.cm.model.get_submodule(path).bias is not None)
            if tuple(a.shape) != (high, inputs) or tuple(b.shape) != (outputs, wide):
                raise ModelError(
                    f"trial {spec.trial_id}: {path} has {list(a.shape)} and {list(b.shape)}, "
                    f"expected {[high, inputs]} and {[outputs, wide]}"
                )

    def _full_start(self) -> Weights:
        """The base's own weight [O, I] and bias [O, 1] (or [O, 0]) of every linear that is trained in full."""
        found = {}
        for path in self.full:
            linear = self.cm.model.get_submodule(path)
            if not linear.weight.is_floating_point():
                raise ConfigError(f"lora.full: {path} is quantised; only what family.skip_modules names trains in full")
            weight = linear.weight.detach().to(self.stacks.dtype)
            bias = weight.new_empty(len(weight), 0) if linear.bias is None else linear.bias.detach().to(weight)[:, None]
            found[path] = (weight.clone(), bias.clone())
        return found

    def release(self, trial_id: str) -> None:
        self._slot(trial_id)
        self._unstack()
        del self.slots[trial_id]

    def pause(self, trial_id: str) -> None:
        """Leave the slot out of `step` until `resume`."""
        self._slot(trial_id).paused = True

    def resume(self, trial_id: str) -> None:
        self._slot(trial_id).paused = False

    def close(self) -> None:
        """Let go of all slots and give the model its plain modules back."""
        self.slots.clear()
        self.stacked = []
        self.stacks.unwrap()
        self.lanes.close()

    def _slot(self, trial_id: str) -> Slot:
        if trial_id not in self.slots:
            raise RunError(f"trial {trial_id} has no slot; those that have: {', '.join(self.slots) or 'none'}")
        return self.slots[trial_id]

    def _stack(self, trial_ids: list[str]) -> None:
        """Put exactly these slots into the stacks; nothing happens while they are the same."""
        groups = self._groups(trial_ids)
        wanted = [t for group in groups for t in group]
        if wanted == self.stacked:
            return
        self._unstack()
        chosen = [self.slots[t] for t in wanted]
        spans = [len(group) for group in groups] if len(groups) > 1 else []
        self.stacks.rebuild([s.spec for s in chosen], [s.tensors for s in chosen], spans)
        self.optimiser = self._make_optimiser(chosen)
        self.stacked = wanted

    def _groups(self, trial_ids: list[str]) -> list[list[str]]:
        """Which slots go through a step together: one group for each lane, or all of them in one.

        In each those with dropout come first, because masks are drawn for a leading part of it. Who goes with whom
        depends on the trials alone, not on the order in which they came.
        """
        trial_ids = sorted(trial_ids)
        ranks = [self.slots[t].spec.r for t in trial_ids]
        lanes = self._lanes_for(len(trial_ids))
        groups = like_ranks(ranks, lanes) if lanes > 1 else [list(range(len(trial_ids)))]
        return [sorted((trial_ids[i] for i in g), key=lambda t: self.slots[t].spec.dropout == 0) for g in groups]

    def _lanes_for(self, slots: int) -> int:
        """Lanes that take slots of a step, each its own; one where lanes take rows instead, or there is only one."""
        return 1

    def _unstack(self) -> None:
        """Cut the stacks back into the slots that they were made from."""
        for trial_id in self.stacked:
            self.slots[trial_id].tensors = self._cut(trial_id)
        self.stacked = []

    def _cut(self, trial_id: str) -> dict[str, Weights]:
        """value, m and v of a slot that is in the stacks."""
        k, targets = self.stacked.index(trial_id), self.slots[trial_id].targets
        return {kind: self.stacks.cut(k, kind, targets) for kind in KINDS}

    # --- out ----------------------------------------------------------------------------------------------------------

    def _weights(self, trial_id: str) -> Weights:
        slot = self.slots[trial_id]
        if trial_id in self.stacked:
            return self.stacks.cut(self.stacked.index(trial_id), "value", slot.targets)
        return slot.tensors["value"]

    def state(self, trial_id: str) -> dict[str, Any]:
        """All that `admit` needs to go on as if nothing had happened: plain values, and tensors by module path."""
        slot = self._slot(trial_id)
        tensors = self._cut(trial_id) if trial_id in self.stacked else slot.tensors
        return {
            "spec": slot.spec.to_dict(),
            "step": slot.step,
            "updates": slot.updates,
            "loss_scale": dataclasses.asdict(slot.loss_scale),
            "best_score": None if slot.best is None else slot.best_score,
            "best": slot.best,
            **{kind: dict(tensors.get(kind, {})) for kind in KINDS},
        }

    def export(self, trial_id: str, folder: Path | str, which: str = "best") -> Path:
        """Write a slot as a PEFT adapter of its own rank: as it was at its best rung, or as it is ("last").

        Raises:
            RunError: the slot was never scored, so that there is no best.
        """
        slot, weights = self._slot(trial_id), self._kept(trial_id, which)
        full = self.full if slot.spec.full else []
        weights = {path: pair for path, pair in weights.items() if path in full or path not in self.full}
        if self.cm.family.full_file:  # such a folder is used by itself, with the tokeniser in it
            self.cm.processor.tokenizer.save_pretrained(folder)
        return export_adapter(
            folder, weights, slot.spec, self.config.model.path, self.cm.family.task_type,
            full=full, full_file=self.cm.family.full_file,
        )  # fmt: skip

    def _kept(self, trial_id: str, which: str) -> Weights:
        """A slot's weights at its best rung, or as they are ("last")."""
        slot = self._slot(trial_id)
        if which == "best" and slot.best is None:
            raise RunError(f"trial {trial_id} has no best adapter: it was never scored with a finite {self._selects}")
        return slot.best if which == "best" else self._weights(trial_id)

    @property
    def _selects(self) -> str:
        return self.config.train.select_by
