"""The engine of a pack: one frozen base, K adapter slots, one optimiser step of all of them at a time. Plain torch.

Shapes: K slots, b rows of a slot in a micro-batch, N visual tokens, D width, P parameters of a slot.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raycap.config import Config
from raycap.data.order import Sampler, WindowOrder
from raycap.data.store import Store
from raycap.errors import ConfigError, ModelError, RunError
from raycap.models.base import CaptionModel, checkpoint_layers, evaluating
from raycap.models.dropout import Keys, SharedKeys, key_base_dropout
from raycap.models.lora import Weights, export_adapter, import_adapter, start
from raycap.models.stacked import KINDS, Stacks
from raycap.train.features import Images
from raycap.train.group import Group
from raycap.train.lanes import Lanes, lanes_for
from raycap.train.loss import slot_losses
from raycap.train.optim import FIRST_LOSS_SCALE, LossScale, StackedAdamW
from raycap.train.padding import Padding, longest_captions
from raycap.train.validate import EvalResult, Validator
from raycap.trial import TrialSpec, values_of


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimiser step of one slot."""

    step: int
    """Steps done, this one included."""
    loss: float
    grad_norm: float
    """Before clipping."""
    lr: float
    finite: bool
    """False: loss or gradients were not finite, and the slot's weights and moments are as they were."""


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


class PackEngine:
    """Trains, scores and exports adapter slots on one frozen base; on each worker of `group`, who make the same calls."""

    def __init__(
        self, cm: CaptionModel, stores: Mapping[str, Store], config: Config, slots: int, group: Group | None = None
    ):
        self.cm, self.stores, self.config, self.max_slots = cm, dict(stores), config, slots
        self.group = group or Group()
        self.device = cm.device
        self.lanes = self._make_lanes()
        self.keys = Keys() if self.lanes.count > 1 else SharedKeys()
        # Trials of a sweep may differ in what they adapt: the pack is made for all of it.
        full = sorted({part for value in values_of(config, "lora.full") for part in value})
        self.full = [p for part in full for p in cm.family.linear_paths(cm.model, part)]
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
        parts = {part for scope in self.scoped for part in cm.family.parts_of(scope)} | set(full)
        if "vision" in parts and slots > 1 and not cm.family.packs_vision:
            raise ConfigError(
                f"tune.slots={slots}: family {cm.family.name} packs the patches of all images in one row, so an adapter in "
                "its tower trains alone. Set tune.slots=1, or leave vision out of lora.scope"
            )
        # Features of a frozen tower are stored; slots share them where what follows the tower is frozen too.
        self.frozen_vision = parts == {"language"}
        needed = {"vision", "projector"} if cm.family.stores_projected else {"vision"}
        self.images = Images(cm, stored=not parts & needed, shared=self.frozen_vision)
        if config.train.features == "off":
            self.images.kept = {store.split: False for store in self.stores.values()}
        elif config.train.features == "on" and parts & needed:
            raise ConfigError(
                f"train.features=on has no effect: {' and '.join(sorted(parts & needed))} is trained here, so that what it "
                "makes of an image changes with every step. Leave it out"
            )
        self.samplers: dict[str, Sampler] = {}
        self.share = -(-config.train.batch // config.train.workers)
        """Rows of an effective batch that are this worker's, at most."""
        self.micro = min(config.train.batch // config.train.accumulation, self.share)
        """Rows of a slot computed at once; halved when memory runs out."""
        self.scaled = cm.compute_dtype == torch.float16
        self.padding = Padding()
        self.validator = Validator(cm, self.images, config, self.lanes, self.group)

    # What another kind of adapter does differently (raycap.train.alone).
    def _make_lanes(self) -> Lanes:
        return lanes_for(self.device)

    def _make_stacks(self) -> Stacks:
        cm = self.cm
        return Stacks(cm.model, self.keys, compute_dtype=cm.compute_dtype, device=cm.device, lanes=self.lanes.count)

    def _make_optimiser(self, slots: list[Slot]) -> StackedAdamW:
        return StackedAdamW([s.spec for s in slots], self.device, self.stacks.dtype)

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
        self.sampler(spec.captions)  # one that needs scores which are not there is told at once
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
        # Slots with dropout first: masks are drawn for a leading part of the stacks.
        wanted = sorted(trial_ids, key=lambda t: self.slots[t].spec.dropout == 0)
        if wanted == self.stacked:
            return
        self._unstack()
        chosen = [self.slots[t] for t in wanted]
        self.stacks.rebuild([s.spec for s in chosen], [s.tensors for s in chosen])
        self.optimiser = self._make_optimiser(chosen)
        self.stacked = wanted

    def _unstack(self) -> None:
        """Cut the stacks back into the slots that they were made from."""
        for trial_id in self.stacked:
            self.slots[trial_id].tensors = self._cut(trial_id)
        self.stacked = []

    def _cut(self, trial_id: str) -> dict[str, Weights]:
        """value, m and v of a slot that is in the stacks."""
        k, targets = self.stacked.index(trial_id), self.slots[trial_id].targets
        return {kind: self.stacks.cut(k, kind, targets) for kind in KINDS}

    # --- training -----------------------------------------------------------------------------------------------------

    def step(self) -> dict[str, StepResult]:
        """One optimiser step of every slot that is not paused."""
        running = [t for t, slot in self.slots.items() if not slot.paused]
        if not running:
            return {}
        self._stack(running)
        with self.lanes.threads(self.config.train.batch * len(running) * self.linear_size):
            found = self._step_stacked()
        return {t: found[t] for t in running}

    def _step_stacked(self) -> dict[str, StepResult]:
        slots = [self.slots[t] for t in self.stacked]
        drawn = [self.pairs(slot.spec.captions, slot.step) for slot in slots]
        batches = [self.bucketed(slot.spec.captions, pairs) for slot, pairs in zip(slots, drawn)]
        mine = [[self.group.share(pairs) for pairs in found] for found in (drawn, batches)]
        self.padding.add(self.stores["train"], *mine, self._cuts(len(mine[0][0]), len(slots)))
        if not self.cm.model.training:  # asking every module costs a small step a twentieth
            self.cm.model.train()
        while True:
            losses, why = None, ""
            try:
                losses = self._gradients(slots, batches)
            except torch.OutOfMemoryError as error:
                why = str(error)
            # Workers decide together, also where memory ran out for one of them alone.
            losses = self.group.add_step(self.stacks, losses)
            if losses is not None:
                break
            if self.micro == 1:
                raise RunError(
                    f"out of memory with one row a slot and {len(slots)} slots. Lower tune.slots, lora.r or "
                    f"data.max_text_tokens. {why}".rstrip()
                )
            # Keyed dropout and the token-exact loss make the repeated step the same step.
            self.micro = math.ceil(self.micro / 2)
            self.stacks.discard()
            torch.cuda.empty_cache()
        held = [k for k, slot in enumerate(slots) if self.full and not slot.spec.full]
        kept = self.stacks.hold_full(held)
        norms, finite = self.optimiser.step(
            self.stacks.value,
            self.stacks.grads,
            self.stacks.m,
            self.stacks.v,
            steps=[s.step for s in slots],
            updates=[s.updates for s in slots],
            losses=losses,
            loss_scales=[s.loss_scale.value for s in slots] if self.scaled else None,
        )
        self.stacks.put_full(held, kept)
        rates = self.optimiser.rates
        found = {}
        for trial_id, loss, norm, good, lr in zip(
            self.stacked, losses.tolist(), norms.tolist(), finite.tolist(), rates
        ):
            slot = self.slots[trial_id]
            slot.step += 1
            slot.updates += good
            if self.scaled and math.isfinite(loss):
                slot.loss_scale.update(good)
            found[trial_id] = StepResult(slot.step, loss, norm, lr, good)
        return found

    def sampler(self, captions: str) -> Sampler:
        """The samples of each step under this choice of captions."""
        if captions not in self.samplers:
            train, seed, batch = self.stores["train"], self.config.run.seed, self.config.train.batch
            self.samplers[captions] = Sampler(
                train.captions_per_image, captions, batch, seed, clip_scores=train.clip_scores, selected=train.selected,
                row_groups=train.row_groups, window_groups=train.window_groups,
            )  # fmt: skip
        return self.samplers[captions]

    def pairs(self, captions: str, step: int) -> np.ndarray:
        """Samples [b, 2] that a slot with this choice of captions sees at its own `step`."""
        sampler, train = self.sampler(captions), self.stores["train"]
        if isinstance(sampler.order, WindowOrder):
            train.plan(sampler.order.ahead(step))
        return sampler.pairs(step)

    def bucketed(self, captions: str, pairs: np.ndarray) -> np.ndarray:
        """Samples [b, 2] with texts of like length side by side, so that the pieces of the batch are padded less.

        The batch stays what it is. A choice of one caption an image goes by the image's longest, so that slots which
        differ in their choice keep their images in one order.
        """
        train = self.stores["train"]
        train.wait(np.unique(pairs[:, 0]))
        lengths = train.token_lens(pairs) if captions == "all" else longest_captions(train, pairs[:, 0])
        return pairs[np.argsort(lengths, kind="stable")]

    def images_at_once(self) -> int:
        """Images of a piece of a step when all slots train."""
        slots = self.max_slots
        begin, end = self._cuts(self.share, slots)[0][0]
        return (end - begin) * (1 if self.images.shared else slots)

    def _cuts(self, rows: int, slots: int) -> list[list[tuple[int, int]]]:
        """Where a batch is cut: for each micro-batch, the [begin, end) of its pieces, a lane each."""
        cuts = []
        for first in range(0, rows, self.micro):
            count = min(self.micro, rows - first)
            ends = np.linspace(first, first + count, min(count, self.lanes.worth(count * slots)) + 1).astype(int)
            cuts.append(list(zip(ends[:-1].tolist(), ends[1:].tolist())))
        return cuts

    def _gradients(self, slots: list[Slot], batches: list[np.ndarray]) -> torch.Tensor:
        """What this worker's rows of the slots' effective batches, samples [b, 2] each, add to their losses [K]; leaves
        the gradients in the stacks."""
        train = self.stores["train"]
        same_images = self.frozen_vision and all(np.array_equal(b[:, 0], batches[0][:, 0]) for b in batches[1:])
        shared = same_images and all(np.array_equal(b, batches[0]) for b in batches[1:])
        if shared:  # one copy of texts and images: every slot's rows are the same
            batches = batches[:1]
        counts = [float((train.token_lens(batch) - train.prompt_lens(batch)).sum()) for batch in batches]
        batches = [self.group.share(batch) for batch in batches]
        rank, workers = self.group.rank, self.group.size
        tokens = torch.tensor(counts, device=self.device, dtype=self.stacks.dtype).expand(len(slots))
        seeds, steps = [s.spec.seed for s in slots], [s.step for s in slots]
        scales = torch.tensor([s.loss_scale.value for s in slots], device=self.device) if self.scaled else None
        losses = torch.zeros(len(slots), device=self.device, dtype=self.stacks.dtype)
        self.stacks.refresh()

        def piece(lane: int, part: tuple[int, np.ndarray, torch.Tensor]) -> torch.Tensor:
            first, pairs, images = part
            text = self.validator.text(train, pairs, times=len(slots) if shared else 1)
            self.keys.lane = lane
            self.keys.set(seeds, steps, self.device, rank + first * workers, len(text["labels"]) // len(slots), workers)
            try:
                output = self.cm.family.label_logits(self.cm, text, images)
                gradient, rows = output.logits.detach(), len(text["labels"]) // len(slots)
                found = slot_losses(gradient, output.labels, output.rows, rows, tokens, gradient=True, scales=scales)
                output.logits.backward(gradient)
            finally:
                self.keys.clear()
            return found

        for cuts in self._cuts(len(batches[0]), len(slots)):
            parts = []
            for begin, end in cuts:
                pairs = np.concatenate([batch[begin:end] for batch in batches])
                # Slots that differ in their choice of captions still share one copy of the images.
                images = batches[0][begin:end, 0] if same_images else pairs[:, 0]
                parts.append((begin, pairs, self.images.rows(train, images)))
            for found in self.lanes.run(piece, parts):
                losses += found
            self.stacks.collect(len(parts))
        return losses

    # --- scoring ------------------------------------------------------------------------------------------------------

    def evaluate(self, trial_ids: list[str]) -> dict[str, EvalResult]:
        """Validation loss, captions and CIDEr of these slots, decoded together. Training goes on as if it had not been.

        A slot that has beaten its best by `train.select_by` keeps its weights as the ones to export.
        """
        found = {}
        with self._decoding(trial_ids) as order:
            results = self.validator.evaluate(self.stores["val"], len(order))
        for trial_id, result in zip(order, results):
            slot = self.slots[trial_id]
            score = result.cider if self.config.train.select_by == "cider" else -result.val_loss
            if math.isfinite(score) and score > slot.best_score:
                slot.best_score, slot.best = score, self._weights(trial_id)
            found[trial_id] = result.at(slot.step)
        return {t: found[t] for t in trial_ids}

    def caption(self, trial_id: str | None, split: str) -> dict[str, str]:
        """Captions of a whole split by image id, by a slot as it is now, or by the base alone for None."""
        with self._decoding([] if trial_id is None else [trial_id]):
            store = self.stores[split]
            texts = self.validator.captions(store, np.arange(store.count), 1)
        return dict(zip(store.image_ids, texts[0]))

    def zero_shot(self, split: str) -> dict[str, str]:
        """Captions of the base before any training."""
        return self.caption(None, split)

    @contextmanager
    def _decoding(self, trial_ids: list[str]) -> Iterator[list[str]]:
        """The model applies these slots alone, in eval mode and without gradients; yields them in the rows' order."""
        for trial_id in trial_ids:
            self._slot(trial_id)
        if not set(trial_ids) <= set(self.stacked):
            self._stack(list(self.slots))
        order = [t for t in self.stacked if t in trial_ids]
        with evaluating(self.cm.model), self.stacks.applying([self.stacked.index(t) for t in order]):
            yield order

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
