"""Scores of a pack's slots on held-out images: loss by teacher forcing, captions, CIDEr. Nothing here trains.

Shapes: K slots, n images.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from raycap.config import Config
from raycap.data.store import Store
from raycap.models.base import CaptionModel
from raycap.models.decoding import for_batch
from raycap.train.features import Images
from raycap.train.group import Group
from raycap.train.lanes import Lanes
from raycap.train.loss import slot_losses


@dataclass(frozen=True, slots=True)
class EvalResult:
    """One slot at one rung."""

    step: int
    val_loss: float
    """Mean cross-entropy a token, of one reference an image."""
    cider: float
    cider_se: float
    captions: dict[str, str]
    """Image id -> caption."""
    collapse: dict[str, Any]

    def at(self, step: int) -> EvalResult:
        return dataclasses.replace(self, step=step)


class Validator:
    """Scores whatever slots the model applies at the moment. `decode.batch` bounds the rows, slots x images, at once.

    The workers of a `group` take a share of the images each, call it together, and have the same results.
    """

    def __init__(
        self,
        cm: CaptionModel,
        images: Images,
        config: Config,
        lanes: Lanes | None = None,
        group: Group | None = None,
    ):
        self.cm, self.images, self.config, self.lanes = cm, images, config, lanes or Lanes()
        self.group = group or Group()
        self._scorers: dict[str, Any] = {}

    def text(self, store: Store, pairs: np.ndarray, *, times: int = 1) -> dict[str, torch.Tensor]:
        """Texts of samples [n, 2] as the model takes them, `times` over: int64 [times * n, T]."""
        family, pad = self.cm.family, self.cm.family.pad_token(self.cm.processor)
        batch = family.collate(store.tokens(pairs), store.prompt_lens(pairs), pad)
        return {name: tensor.to(self.cm.device).repeat(times, 1) for name, tensor in batch.items()}

    def rows(self, store: Store) -> np.ndarray:
        """The images that rungs are scored on: `train.val_images` in evaluate.lang, evenly spread over the split."""
        lang = self.config.evaluate.lang
        rows = np.array([r for r, i in enumerate(store.image_ids) if store.langs.get(i, lang) == lang], dtype=np.int64)
        count = min(len(rows), self.config.train.val_images)
        return rows[np.arange(count) * len(rows) // max(count, 1)]

    def evaluate(self, store: Store, slots: int) -> list[EvalResult]:
        """One result a slot, its `step` left at 0."""
        from raycap.evaluate.collapse import collapse
        from raycap.evaluate.significance import standard_error

        rows = self.rows(store)
        ids = [store.image_ids[r] for r in rows]
        references = {i: store.references[i] for i in ids}
        groups = [store.groups[i] for i in ids]
        losses = self.losses(store, rows, slots)
        found = []
        for loss, texts in zip(losses, self.captions(store, rows, slots)):
            captions = dict(zip(ids, texts))
            cider, per_image = self._scorer(store, references).score(captions)
            error = standard_error(np.asarray(per_image), groups=groups)
            if not math.isfinite(loss):  # weights that are not finite speak too, but say nothing
                cider = error = math.nan
            told = collapse(
                texts, list(references.values()), prompt=self.cm.prompt, lang=self.config.evaluate.lang,
            )  # fmt: skip
            found.append(EvalResult(0, loss, float(cider), float(error), captions, told))
        return found

    def _scorer(self, store: Store, references: dict[str, list[str]]) -> Any:
        from raycap.evaluate.cider import CiderScorer
        from raycap.evaluate.tokenise import quick_tokeniser

        key = str(store.folder)
        if key not in self._scorers:
            lang = self.config.evaluate.lang
            self._scorers[key] = CiderScorer(references, quick_tokeniser(lang), lang=lang)
        return self._scorers[key]

    def losses(self, store: Store, rows: np.ndarray, slots: int) -> list[float]:
        """Mean loss a token of each slot, on one reference an image: the first of the first image, the second of the
        second, and so on around, so that every way of wording counts at the price of one."""
        pairs = np.stack([rows, np.arange(len(rows)) % store.captions_per_image[rows]], axis=1)
        one = torch.ones(slots, device=self.cm.device)

        @torch.no_grad()  # which is a matter of each thread
        def piece(lane: int, part: np.ndarray) -> tuple[torch.Tensor, int]:
            store.wait(part[:, 0])
            images = self._images(store, part[:, 0], 1 if self.images.shared else slots)
            output = self.cm.family.label_logits(self.cm, self.text(store, part, times=slots), images)
            tokens = int((store.token_lens(part) - store.prompt_lens(part)).sum())
            return slot_losses(*output, len(part), one), tokens

        total = torch.zeros(slots + 1, device=self.cm.device, dtype=torch.float64)  # tokens come last
        for summed, count in self.lanes.run(piece, self._parts(self.group.share(pairs), slots)):
            total[:-1] += summed
            total[-1] += count
        *losses, tokens = self.group.add(total).tolist()
        return [loss / max(tokens, 1) for loss in losses]

    def captions(self, store: Store, rows: np.ndarray, slots: int) -> list[list[str]]:
        """Per slot, a caption for each image of `rows`. `slots` 0 or 1: whatever the model is."""
        slots = max(1, slots)

        def piece(lane: int, part: np.ndarray) -> list[str]:
            images = self._images(store, part, slots)
            decode = for_batch(self.config.decode, self.cm.processor, lambda: store.pixels(part), times=slots)
            with torch.no_grad():
                return self.cm.family.generate(self.cm, images, decode)

        found: list[list[str]] = [[] for _ in range(slots)]
        parts = self._parts(self.group.share(rows), slots)
        for part, texts in zip(parts, self.lanes.run(piece, parts)):
            for k in range(slots):
                found[k] += texts[k * len(part) : (k + 1) * len(part)]
        return self.group.join(found)

    def _images(self, store: Store, rows: np.ndarray, times: int) -> torch.Tensor:
        """What the model takes for the images of `rows`, `times` over, slot-major."""
        images = self.images.rows(store, rows)
        return images if times == 1 else images.repeat(times, *[1] * (images.dim() - 1))

    def _parts(self, rows: np.ndarray, slots: int) -> list[np.ndarray]:
        """`rows` in parts of at most `decode.batch` rows of all slots and lanes together."""
        if not len(rows):  # fewer images than workers
            return []
        lanes = self.lanes.worth(min(len(rows) * max(1, slots), self.config.decode.batch))
        size = max(1, self.config.decode.batch // (max(1, slots) * lanes))
        count = math.ceil(len(rows) / size)
        return np.array_split(rows, min(len(rows), max(count, -(-count // lanes) * lanes)))
