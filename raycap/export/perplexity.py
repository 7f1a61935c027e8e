"""Perplexity of the references under a model: how surprised it is by what people wrote of each picture.

Shapes: R references of a batch of images, M labelled tokens of them.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from raycap.config import from_dict
from raycap.data.shards import Shards, open_shards
from raycap.export.captioner import Captioner

BATCH_ROWS = 64
"""Captions of one forward pass."""


def perplexity_task(
    settings: dict[str, Any],
    shards_folder: str,
    split: str,
    model: str,
    *,
    threads: int = 0,
    say: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """`reference_perplexity` of a model folder, from plain values to plain values, to run in another process."""
    config = from_dict(settings)
    captioner = Captioner.load(config, Path(model), threads=threads)
    shards = open_shards(shards_folder).speaking(config.evaluate.lang, (split,))
    return reference_perplexity(captioner, shards, split, say)


def reference_perplexity(
    captioner: Captioner, shards: Shards, split: str, say: Callable[[str], None] = lambda message: None
) -> dict[str, Any]:
    """exp(summed negative log-likelihood / tokens) over all references of a split: every token counts the same.

    A mean of the captions' own perplexities would let short captions speak louder, and one odd one rule all. Tokens are the
    model's own, the end token among them, so models with other tokenisers do not compare; the signature names the tokeniser.

    Returns: score, signature, tokens, cut (references longer than data.max_text_tokens), per_image {id: perplexity}.
    """
    import torch
    from PIL import Image

    from raycap.evaluate.signature import references_per_image, signature

    cm = captioner.model
    total, tokens, cut = 0.0, 0, 0
    per_image: dict[str, float] = {}
    counts: list[list[str]] = []
    pending: list[tuple[str, np.ndarray, list[str]]] = []

    def flush() -> None:
        nonlocal total, tokens, cut
        said = [caption for _, _, own in pending for caption in own]
        coded = cm.family.encode_all(cm.processor, said, cm.prompt, cm.max_text_tokens)
        cut += sum(bool(c[2]) for c in coded)
        batch = cm.family.collate([c[0] for c in coded], [c[1] for c in coded], cm.family.pad_token(cm.processor))
        pixels = torch.from_numpy(np.stack([p for _, p, _ in pending]))
        owner = np.repeat(np.arange(len(pending)), [len(own) for _, _, own in pending])
        with torch.inference_mode():
            values = cm.family.pixel_values(cm.processor, pixels).to(cm.device)[torch.from_numpy(owner).to(cm.device)]
            found = cm.family.label_logits(cm, {k: v.to(cm.device) for k, v in batch.items()}, values)
            losses = torch.nn.functional.cross_entropy(found.logits.float(), found.labels, reduction="none")
        image = owner[found.rows.cpu().numpy()]
        summed = np.bincount(image, losses.double().cpu().numpy(), minlength=len(pending))
        many = np.bincount(image, minlength=len(pending))
        total, tokens = total + float(summed.sum()), tokens + int(many.sum())
        per_image.update((row[0], _exp(s / max(n, 1))) for row, s, n in zip(pending, summed, many))
        pending.clear()

    for row in shards.iter_rows(split, ("image_id", "image", "captions")):
        own = list(row["captions"])
        counts.append(own)
        pixels = captioner.prepare(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB"))
        pending.append((row["image_id"], pixels, own))
        if sum(len(o) for _, _, o in pending) >= BATCH_ROWS:
            flush()
            say(f"perplexity: {len(per_image):,} images")
    if pending:
        flush()
    parts = {
        "tok": f"model@{cm.family.fingerprint(cm.processor)[:8]}",
        "refs": references_per_image(counts),
        "n": len(counts),
    }
    return {
        "score": _exp(total / max(tokens, 1)),
        "signature": signature("perplexity", variant="token-weighted", **parts),
        "tokens": tokens,
        "cut": cut,
        "per_image": per_image,
    }


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
