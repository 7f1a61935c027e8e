"""Random tiny models and stores of a few scenes, for the tests of models, packs and training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from raycap.config import Config
from raycap.data.shapes import generate
from raycap.data.store import Store
from raycap.models import load_model
from raycap.models.quantise import dequantise, quantised_linears


def random_git(folder: Path, dropout: float) -> Path:
    """A GIT of the shipped one's classes with random weights, wide enough that its modules matter: 2 + 1 layers of width
    64, `dropout` on hidden states and attention of its base."""
    from raycap.models.tiny.build import build_git, build_processor, build_tokenizer, save

    captions = [c for scene in generate(50, seed=1) for c in scene.captions]
    tokenizer = build_tokenizer(captions, vocabulary=400)
    torch.manual_seed(0)
    model = build_git(tokenizer, width=64, layers=2, vision_layers=1, dropout=dropout)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    save(folder, model, build_processor(tokenizer))
    return folder


def stores_of(cm: Any, scenes: dict[str, list[Any]], folder: Path, finish: bool = True) -> dict[str, Store]:
    """Stores in `folder` of the scenes {split: scenes}, as `cm` prepares them."""
    stores = {}
    for split, found in scenes.items():
        ids = [f"{split}{i}" for i in range(len(found))]
        stores[split] = store = Store.create(
            folder / split, split, len(ids), cm.family.image_size(cm.processor), image_ids=ids,
            references={i: s.captions for i, s in zip(ids, found)}, max_tokens=cm.max_text_tokens,
        )  # fmt: skip
        for row, scene in enumerate(found):
            coded = [cm.family.encode(cm.processor, c, cm.prompt, cm.max_text_tokens) for c in scene.captions]
            pixels = cm.family.resize(cm.processor, scene.image)[None]
            store.put([row], pixels, [[c[0] for c in coded]], [[c[1] for c in coded]])
        if finish:
            store.finish()
    return stores


def with_dequantised(config: Config, dtype: torch.dtype) -> Any:
    """The model of `config` without quantisation, in `dtype`, its quantised weights replaced by what they stand for."""
    packed = load_model(config.model, config.data, compute_dtype="fp32", device="cpu")
    plain = load_model(config.model, config.data, quantisation="none", compute_dtype="fp32", device="cpu")
    with torch.no_grad():
        for name, module in quantised_linears(packed.model).items():
            plain.model.get_submodule(name).weight.copy_(dequantise(module, torch.float32))
    plain.model.to(dtype)
    return dataclasses.replace(plain, compute_dtype=dtype)


def step_inputs(engine, step, dtype):
    """What a plain model is called with for the samples that an engine's slot sees at `step`: texts, labels, pixels."""
    store = engine.stores["train"]
    pairs = engine.pairs("all", step)
    pixels = engine.cm.family.pixel_values(engine.cm.processor, torch.from_numpy(store.pixels(pairs[:, 0])))
    return {**engine.validator.text(store, pairs), "pixel_values": pixels.to(dtype)}
