"""A tiny twin that has something to say: all of its weights trained for a moment on the captions it will meet.

Random weights alone say nothing that a metric could score, so that no gate and no pruning has anything to judge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from raycap.config import DataSettings, ModelSettings
from raycap.files import write_atomic, write_json

NOTE = "twin.json"
FIT_STEPS = 120
BATCH = 32
LR = 2e-3


def fit_twin(
    folder: Path,
    family: str,
    rows: Iterable[tuple[Any, Sequence[str]]],
    *,
    prompt: str = "",
    max_text_tokens: int = 128,
    steps: int = FIT_STEPS,
    seed: int = 0,
    say: Callable[[str], None] = lambda message: None,
) -> float:
    """Train the model in `folder` in full on `rows` (picture, captions), in place; returns the last steps' mean loss.

    AdamW, a cosine after a tenth of the steps, a caption drawn for each picture; in fp32, stored as it was, in fp16.
    """
    import numpy as np
    import torch
    from torch.nn.functional import cross_entropy

    from raycap.models import load_model

    model = ModelSettings(family=family, path=str(folder), quantisation="none", compute_dtype="fp32")
    data = DataSettings(prompt=prompt, max_text_tokens=max_text_tokens)
    cm = load_model(model, data, device="cpu")
    rows = list(rows)
    pixels = torch.from_numpy(np.stack([cm.family.resize(cm.processor, image) for image, _ in rows]))
    values = cm.family.pixel_values(cm.processor, pixels)
    coded = [[cm.family.encode(cm.processor, c, prompt, max_text_tokens)[:2] for c in captions] for _, captions in rows]
    pad = cm.family.pad_token(cm.processor)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # its operations are too small to share, and threads that wait for each other cost more
    cm.model.requires_grad_(True).train()
    weights = [p for p in cm.model.parameters() if p.is_floating_point()]
    optimiser = torch.optim.AdamW(weights, lr=LR, weight_decay=0.0)
    rng, warm, losses = np.random.default_rng(seed), max(1, steps // 10), []
    for step in range(steps):
        rate = min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimiser.param_groups:
            group["lr"] = LR * rate
        chosen = rng.choice(len(rows), size=min(BATCH, len(rows)), replace=False)
        texts = [coded[i][rng.integers(len(coded[i]))] for i in chosen]
        batch = cm.family.collate([ids for ids, _ in texts], [length for _, length in texts], pad)
        found = cm.family.label_logits(cm, batch, values[torch.from_numpy(chosen)])
        loss = cross_entropy(found.logits.float(), found.labels)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in weights if p.grad is not None], 1.0)
        optimiser.step()
        losses.append(float(loss.detach()))
        if step % 50 == 0:
            say(f"step {step} of {steps}, loss {losses[-1]:.2f}")
    torch.set_num_threads(threads)
    cm.model.requires_grad_(False).eval()
    cm.model.to(torch.float16).save_pretrained(folder)
    return float(np.mean(losses[-10:]))


def write_note(folder: Path, base: str, steps: int) -> str:
    """Say in the model's folder what it is, for people and for whatever prints its scores."""
    text = (
        f"Tiny random twin of {base}, fitted for {steps} steps on drawn pictures: the way is the real one, "
        "the scores mean nothing."
    )
    write_atomic(folder / "README.md", f"# Not a model to use\n\n{text}\n")
    write_json(folder / NOTE, {"twin_of": base, "steps": steps, "note": text})
    return text
