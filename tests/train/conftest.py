"""A random GIT, stores of a few scenes, and an engine over them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from raycap.config import from_dict
from raycap.data.shapes import generate
from raycap.data.store import Store
from raycap.models import load_model
from raycap.models.quantise import dequantise, quantised_linears
from raycap.train.engine import PackEngine
from raycap.trial import trial_spec

TARGETS = ["query", "key", "value", "dense"]


def _twin(folder, dropout):
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


@pytest.fixture(scope="session")
def twin(tmp_path_factory):
    """Folder of a GIT with random weights and no dropout in its base."""
    return _twin(tmp_path_factory.mktemp("twin"), 0.0)


@pytest.fixture(scope="session")
def dropping_twin(tmp_path_factory):
    """The same with 0.1 of dropout on hidden states and attention."""
    return _twin(tmp_path_factory.mktemp("dropping"), 0.1)


@pytest.fixture
def config(twin):
    """Settings over the random twin in fp32; keywords by `section__name`."""

    def config(**changes):
        tree = {
            "model": {"path": str(twin), "compute_dtype": "fp32"},
            "lora": {"r": 4, "targets": TARGETS},
            "train": {"steps": 40, "batch": 8, "lr": 5e-3, "warmup_steps": 2, "val_images": 6, "schedule": "linear"},
            "data": {"max_text_tokens": 32},
            "decode": {"max_new_tokens": 8, "batch": 8},
        }
        for key, value in changes.items():
            section, name = key.split("__")
            tree.setdefault(section, {})[name] = value
        return from_dict(tree)

    return config


@pytest.fixture(scope="session")
def scenes():
    return {"train": list(generate(12, seed=3)), "val": list(generate(6, seed=4))}


@pytest.fixture
def make_stores(scenes, tmp_path_factory):
    """Finished stores of 12 training and 6 validation scenes, tokenised for `cm`."""

    def make_stores(cm, finish=True):
        folder, stores = tmp_path_factory.mktemp("stores"), {}
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

    return make_stores


@pytest.fixture
def make_engine(make_stores):
    """An engine of its own model under `config`; `dtype` "fp64" computes on dequantised weights in fp64."""

    def make_engine(config, *, dtype=None, slots=16):
        if dtype == "fp64":
            cm = in_fp64(config)
        else:
            cm = load_model(config.model, config.data, compute_dtype=dtype, device="cpu")
        return PackEngine(cm, make_stores(cm), config, slots)

    return make_engine


@pytest.fixture
def specs():
    """`count` trials of different rank, alpha, lr, dropout ("as it comes" or one for all) and seed."""

    def specs(config, count=4, dropout=0.0, **overrides):
        return [
            trial_spec(
                config, f"t{k}",
                {"lora.r": [2, 4, 8, 16][k % 4], "lora.alpha_per_rank": [2, 1, 2, 1][k % 4], "lora.dropout": dropout,
                 "train.lr": [5e-3, 1e-3, 1e-2, 3e-3][k % 4], "train.schedule": ["linear", "cosine", "constant"][k % 3],
                 **overrides},
                seed=100 + k,
            )
            for k in range(count)
        ]  # fmt: skip

    return specs


@pytest.fixture
def oracle():
    """The model that an oracle trains: plain transformers, fp64 or fp32, with the dequantised weights."""

    def oracle(config, dtype):
        return with_dequantised(config, dtype).model

    return oracle


def with_dequantised(config, dtype):
    """The model of `config` without quantisation, in `dtype`, its quantised weights replaced by what they stand for."""
    packed = load_model(config.model, config.data, compute_dtype="fp32", device="cpu")
    plain = load_model(config.model, config.data, quantisation="none", compute_dtype="fp32", device="cpu")
    with torch.no_grad():
        for name, module in quantised_linears(packed.model).items():
            plain.model.get_submodule(name).weight.copy_(dequantise(module, torch.float32))
    plain.model.to(dtype)
    return plain


def in_fp64(config):
    return dataclasses.replace(with_dequantised(config, torch.float64), compute_dtype=torch.float64)


@pytest.fixture
def run():
    """Steps of all slots; returns losses {trial: [loss]}."""

    def run(engine, steps):
        found = {}
        for _ in range(steps):
            for trial_id, result in engine.step().items():
                found.setdefault(trial_id, []).append(result.loss)
        return found

    return run


@pytest.fixture
def delta():
    """||B A - B' A'|| / ||B A|| over all modules of two weights {path: (A, B)}."""

    def delta(one, other):
        assert set(one) == set(other)
        whole = [one[p][1].double() @ one[p][0].double() for p in one]
        apart = [w - other[p][1].double() @ other[p][0].double() for p, w in zip(one, whole)]
        size = sum(float((w**2).sum()) for w in whole) ** 0.5
        return np.sqrt(sum(float((a**2).sum()) for a in apart)) / size

    return delta
