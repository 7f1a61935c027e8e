"""The pack's engine: one frozen base, K adapter slots, one optimiser step of all of them at a time. Plain torch.

Shapes: K slots, b rows a slot and micro-batch, T text positions, N visual tokens, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from raycap.config import Config
from raycap.data.order import SampleOrder, samples
from raycap.data.store import Store
from raycap.evaluate.cider import CiderScorer
from raycap.evaluate.collapse import collapse
from raycap.models.base import CaptionModel, targets_among
from raycap.models.dropout import KeyedDropout, Keys
from raycap.models.lora import write_adapter
from raycap.models.stacked import Stacks
from raycap.train.features import frozen_features
from raycap.train.loss import slot_loss
from raycap.train.optim import StackedAdamW
from raycap.trial import TrialSpec


@dataclass(frozen=True, slots=True)
class StepResult:
    step: int
    loss: float
    grad_norm: float
    lr: float
    finite: bool


@dataclass(frozen=True, slots=True)
class EvalResult:
    step: int
    val_loss: float
    cider: float
    cider_se: float
    captions: dict[str, str]
    collapse: dict[str, Any]


@dataclass
class Slot:
    spec: TrialSpec
    targets: set[str]
    tensors: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]]
    """value, m, v by site; current only while the slot is not in the stacks."""
    step: int = 0
    paused: bool = False
    best: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = None
    best_score: float = -math.inf
    skipped: int = 0
    loss_scale: float = 1.0


class PackEngine:
    """Trains and decodes adapter slots on one frozen base."""

    def __init__(self, cm: CaptionModel, stores: Mapping[str, Store], config: Config, slots: int):
        self.cm, self.stores, self.config, self.slots_allowed = cm, dict(stores), config, slots
        self.device = cm.device
        self.keys = Keys()
        names = config.lora.targets
        paths = cm.family.lora_targets(cm.model, config.lora.scope, names)
        swept = config.tune.space.get("lora.targets", {}).get("choice", [])
        for option in swept:
            paths = sorted(set(paths) | set(cm.family.lora_targets(cm.model, config.lora.scope, tuple(option))))
        self.stacks = Stacks(cm.model, paths, self.keys)
        self._own_dropout()
        self.slots: dict[str, Slot] = {}
        self.moments = [torch.zeros(0, 0), torch.zeros(0, 0)]
        self.stacked: list[str] = []
        self.optimiser: StackedAdamW | None = None
        train = self.stores["train"]
        self.samples = samples(train.captions_per_image, config.data.captions)
        self.order = SampleOrder(len(self.samples), config.train.batch, config.run.seed)
        self.frozen_tower = config.lora.scope in ("language",)
        if self.frozen_tower:
            cm.family.wrap_tower(cm.model)
        self._scorer: CiderScorer | None = None
        val = self.stores["val"]
        self.val_rows = np.arange(min(val.count, config.train.val_images))

    # Coming and going ------------------------------------------------------------------------------------------

    def admit(self, spec: TrialSpec, state: Mapping[str, Any] | None = None) -> None:
        """Give a trial a slot, from its seed's start or from a `state`."""
        if spec.trial_id in self.slots:
            raise ValueError(f"{spec.trial_id} has a slot already")
        targets = set(targets_among(list(self.stacks.sites), spec.targets))
        if state is None:
            slot = Slot(spec, targets, {"value": self.stacks.fresh(spec, targets)})
        else:
            slot = Slot(spec, targets, {k: dict(state[k]) for k in ("value", "m", "v")}, int(state["step"]))
            slot.best = dict(state["best"]) if state.get("best") else None
            slot.best_score = float(state["best_score"])
        self._sync()
        self.slots[spec.trial_id] = slot
        self.stacked = []

    def release(self, trial_id: str) -> None:
        self._sync()
        del self.slots[trial_id]
        self.stacked = []

    @property
    def active(self) -> list[str]:
        return list(self.slots)

    def pause(self, trial_id: str) -> None:
        self.slots[trial_id].paused = True

    def resume(self, trial_id: str) -> None:
        self.slots[trial_id].paused = False

    def _sync(self) -> None:
        """Copy the stacks back into the slots they were made from."""
        for k, trial_id in enumerate(self.stacked):
            kinds = {"value": self.stacks.values, "m": self.moments[0], "v": self.moments[1]}
            self.slots[trial_id].tensors = {name: self.stacks.cut(k, tensor) for name, tensor in kinds.items()}

    def _stack(self, trial_ids: list[str]) -> None:
        if self.stacked == trial_ids:
            return
        self._sync()
        chosen = [self.slots[t] for t in trial_ids]
        specs = [s.spec for s in chosen]
        self.moments = self.stacks.rebuild(specs, [s.targets for s in chosen], [s.tensors for s in chosen])
        self.optimiser = StackedAdamW(specs, self.device)
        self.stacked = list(trial_ids)

    # Steps -----------------------------------------------------------------------------------------------------

    def step(self) -> dict[str, StepResult]:
        """One optimiser step of every slot that is not paused."""
        trial_ids = [t for t, s in self.slots.items() if not s.paused]
        if not trial_ids:
            return {}
        self._stack(trial_ids)
        chosen = [self.slots[t] for t in trial_ids]
        self.cm.model.train()
        rows = [self.samples[self.order.rows(s.step)] for s in chosen]
        train = self.stores["train"]
        needed = np.unique(np.concatenate([r[:, 0] for r in rows]))
        train.wait(needed)
        tokens = torch.tensor(
            [float((train.token_lens(r) - train.prompt_lens(r)).sum()) for r in rows], device=self.device
        )
        pieces = self.config.train.accumulation
        width = len(rows[0]) // pieces
        seeds = torch.tensor([s.spec.seed for s in chosen], device=self.device, dtype=torch.int64)
        steps = torch.tensor([s.step for s in chosen], device=self.device, dtype=torch.int64)
        losses = torch.zeros(len(chosen), device=self.device)
        for piece in range(pieces):
            part = np.concatenate([r[piece * width : (piece + 1) * width] for r in rows])
            self.keys.set(seeds, steps, piece * width)
            loss = slot_loss(*self._forward(train, part), tokens, width)
            loss.sum().backward()
            losses += loss.detach()
        self.keys.clear()
        norm, taken, lrs = self.optimiser.step(
            self.stacks.values,
            self.stacks.grads,
            *self.moments,
            [s.step for s in chosen],
            torch.isfinite(losses).tolist(),
        )
        found = {}
        for k, (trial_id, loss, size, ok) in enumerate(zip(trial_ids, losses.tolist(), norm.tolist(), taken.tolist())):
            self.slots[trial_id].step += 1
            found[trial_id] = StepResult(self.slots[trial_id].step, loss, size, lrs[k], bool(ok))
        return found

    def _forward(self, store: Store, pairs: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        cm = self.cm
        ids = store.tokens(pairs)
        batch = collate(ids, store.prompt_lens(pairs), cm.processor.tokenizer.pad_token_id, self.device)
        return cm.family.label_logits(cm, batch, **self._images(store, pairs[:, 0]))

    def _images(self, store: Store, rows: np.ndarray) -> dict[str, torch.Tensor]:
        if self.frozen_tower:
            if store.features is None:
                frozen_features(self.cm, store)
            return {
                "features": torch.from_numpy(np.asarray(store.features[rows])).to(self.device, self.cm.compute_dtype)
            }
        pixels = torch.from_numpy(store.pixels(rows)).to(self.device)
        return {"pixel_values": self.cm.family.pixel_values(self.cm.processor, pixels).to(self.cm.compute_dtype)}

    def _own_dropout(self) -> None:
        """The base's own dropout, keyed; switched off where the settings say so."""
        for name, module in list(self.cm.model.named_modules()):
            if isinstance(module, nn.Dropout) and module.p > 0:
                parent, _, leaf = name.rpartition(".")
                p = module.p if self.config.train.base_dropout else 0.0
                setattr(self.cm.model.get_submodule(parent), leaf, KeyedDropout(name, self.keys, p))

    # Scores ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, trial_ids: list[str]) -> dict[str, EvalResult]:
        """Validation loss and CIDEr of generated captions, all of `trial_ids` decoded together."""
        store = self.stores["val"]
        store.wait(self.val_rows)
        self._stack([t for t in self.slots if t in set(trial_ids)])
        order = list(self.stacked)
        self.cm.model.eval()
        losses = self._val_losses(store, len(order))
        captions = self._decode(store, self.val_rows, len(order))
        ids = [store.image_ids[i] for i in self.val_rows]
        if self._scorer is None:
            self._scorer = CiderScorer({i: store.references[i] for i in ids})
        found = {}
        for k, trial_id in enumerate(order):
            slot = self.slots[trial_id]
            named = dict(zip(ids, captions[k]))
            cider, each = self._scorer.score(named)
            error = float(np.std(each, ddof=1) / math.sqrt(len(each))) if len(each) > 1 else math.nan
            flags = collapse(captions[k], [store.references[i] for i in ids])
            found[trial_id] = EvalResult(slot.step, losses[k], float(cider), error, named, flags)
            score = float(cider) if self.config.train.select_by == "cider" else -losses[k]
            if math.isfinite(score) and score > slot.best_score:
                slot.best_score, slot.best = score, self.stacks.cut(k, self.stacks.values)
        return found

    def _val_losses(self, store: Store, slots: int) -> list[float]:
        """Mean loss a token over all captions of the validation images."""
        pairs = np.array([(i, j) for i in self.val_rows for j in range(store.captions_per_image[i])])
        totals, count = torch.zeros(slots, device=self.device), 0
        width = max(1, self.config.decode.batch)
        for begin in range(0, len(pairs), width):
            part = pairs[begin : begin + width]
            found = self._forward(store, np.tile(part, (slots, 1)))
            totals += slot_loss(*found, torch.ones(slots, device=self.device), len(part))
            count += int((store.token_lens(part) - store.prompt_lens(part)).sum())
        return (totals / max(count, 1)).tolist()

    def _decode(self, store: Store, rows: np.ndarray, slots: int) -> list[list[str]]:
        captions: list[list[str]] = [[] for _ in range(slots)]
        width = max(1, self.config.decode.batch)
        for begin in range(0, len(rows), width):
            part = rows[begin : begin + width]
            images = self._images(store, np.tile(part, slots))
            texts = self.cm.family.generate(self.cm, next(iter(images.values())), self.config.decode)
            for k in range(slots):
                captions[k] += texts[k * len(part) : (k + 1) * len(part)]
        return captions

    # Out -------------------------------------------------------------------------------------------------------

    def state(self, trial_id: str) -> dict[str, Any]:
        """Everything that `admit` needs to go on as if nothing had happened."""
        self._sync()
        slot = self.slots[trial_id]
        return {
            "spec": slot.spec.to_dict(), "step": slot.step, "best_score": slot.best_score, "best": slot.best,
            **{kind: slot.tensors.get(kind, {}) for kind in ("value", "m", "v")},
        }  # fmt: skip

    def export(self, trial_id: str, folder: Path, which: str = "best") -> Path:
        """Write a slot as a PEFT adapter: at its best rung, or as it is."""
        self._sync()
        slot = self.slots[trial_id]
        weights = slot.best if which == "best" and slot.best is not None else slot.tensors["value"]
        return write_adapter(Path(folder), weights, slot.spec, self.config.model.path)


def collate(ids: list[np.ndarray], prompt_lens: np.ndarray, pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Padded input_ids, attention_mask and labels (-100 on the prompt and on padding) [B, T]."""
    width = max(len(i) for i in ids)
    input_ids = np.full((len(ids), width), pad, dtype=np.int64)
    labels = np.full((len(ids), width), -100, dtype=np.int64)
    for row, (tokens, prompt) in enumerate(zip(ids, prompt_lens)):
        input_ids[row, : len(tokens)] = tokens
        labels[row, prompt : len(tokens)] = tokens[prompt:]
    mask = np.arange(width)[None] < np.array([len(i) for i in ids])[:, None]
    return {
        "input_ids": torch.from_numpy(input_ids).to(device),
        "attention_mask": torch.from_numpy(mask.astype(np.int64)).to(device),
        "labels": torch.from_numpy(labels).to(device),
    }
