"""The engine of a pack: one frozen base, K adapter slots, one optimiser step of all of them at a time. Plain torch.

Shapes: K slots, b rows of a slot in a micro-batch, N visual tokens, D width, P parameters of a slot.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from raycap.config import Config
from raycap.data.order import Sampler, WindowOrder
from raycap.data.store import Store
from raycap.errors import ConfigError, RunError
from raycap.models.base import CaptionModel, evaluating
from raycap.train.features import Images
from raycap.train.group import Group
from raycap.train.loss import slot_losses
from raycap.train.padding import Padding, longest_captions
from raycap.train.slots import Slot, Slots
from raycap.train.validate import EvalResult, Validator
from raycap.trial import TrialSpec


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


class PackEngine(Slots):
    """Trains, scores and exports adapter slots on one frozen base; on each worker of `group`, who make the same calls."""

    def __init__(
        self, cm: CaptionModel, stores: Mapping[str, Store], config: Config, slots: int, group: Group | None = None
    ):
        super().__init__(cm, config, slots)
        self.stores, self.group = dict(stores), group or Group()
        parts = {part for scope in self.scoped for part in cm.family.parts_of(scope)} | set(self.full_parts)
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
        self.whole = self.micro
        """The same before any halving."""
        self.padding = Padding()
        self.validator = Validator(cm, self.images, config, self.lanes, self.group)

    def _check(self, spec: TrialSpec) -> None:
        self.sampler(spec.captions)  # one that needs scores which are not there is told at once

    # --- training -----------------------------------------------------------------------------------------------------

    def step(self) -> dict[str, StepResult]:
        """One optimiser step of every slot that is not paused."""
        running = [t for t, slot in self.slots.items() if not slot.paused]
        if not running:
            return {}
        self._stack(running)
        with self.lanes.threads(self.share * len(running) * self.linear_size):
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

    def _lanes_for(self, slots: int) -> int:
        # Handed pixels, every lane would run the tower for all images; with rows each runs it for its own.
        return self.lanes.of_slots(self.whole, slots) if self.images.stored else 1

    def _cuts(self, rows: int, slots: int) -> list[list[tuple[int, int]]]:
        """Where a batch is cut: for each micro-batch, the [begin, end) of its rows, a lane each where lanes take rows."""
        cuts, whole = [], self._lanes_for(slots) > 1
        for first in range(0, rows, self.micro):
            count = min(self.micro, rows - first)
            lanes = 1 if whole else min(count, self.lanes.worth(count * slots))
            ends = np.linspace(first, first + count, lanes + 1).astype(int)
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

        def piece(lane: int, part: tuple[slice, int, np.ndarray, torch.Tensor]) -> torch.Tensor:
            span, first, pairs, images = part
            count = len(seeds[span])
            text = self.validator.text(train, pairs, times=count if shared else 1)
            rows = len(text["labels"]) // count
            self.keys.lane = lane
            self.keys.set(seeds[span], steps[span], self.device, rank + first * workers, rows, workers)
            try:
                output = self.cm.family.label_logits(self.cm, text, images)
                gradient, scaled = output.logits.detach(), None if scales is None else scales[span]
                found = slot_losses(
                    gradient, output.labels, output.rows, rows, tokens[span], gradient=True, scales=scaled
                )
                output.logits.backward(gradient)
            finally:
                self.keys.clear()
            return found

        for cuts in self._cuts(len(batches[0]), len(slots)):
            parts = []
            for begin, end in cuts:
                # Slots that differ in their choice of captions still share one copy of the images.
                images = self.images.rows(train, batches[0][begin:end, 0]) if same_images else None
                for span in self.stacks.spans:
                    pairs = np.concatenate([batch[begin:end] for batch in (batches if shared else batches[span])])
                    looked = self.images.rows(train, pairs[:, 0]) if images is None else images
                    parts.append((span, begin, pairs, looked))
            for (span, *_), found in zip(parts, self.lanes.run(piece, parts)):
                losses[span] += found
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
