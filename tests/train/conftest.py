"""A random GIT, stores of a few scenes, and an engine over them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import random_git, stores_of, with_dequantised

from raycap.config import from_dict
from raycap.data.shapes import generate
from raycap.models import load_model
from raycap.train.alone import engine_class
from raycap.train.engine import PackEngine
from raycap.trial import trial_spec

TARGETS = ["query", "key", "value", "dense"]


@pytest.fixture(scope="session")
def twin(tmp_path_factory):
    """Folder of a GIT with random weights and no dropout in its base."""
    return random_git(tmp_path_factory.mktemp("twin"), 0.0)


@pytest.fixture(scope="session")
def dropping_twin(tmp_path_factory):
    """The same with 0.1 of dropout on hidden states and attention."""
    return random_git(tmp_path_factory.mktemp("dropping"), 0.1)


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
        return stores_of(cm, scenes, tmp_path_factory.mktemp("stores"), finish)

    return make_stores


@pytest.fixture
def make_engine(make_stores):
    """An engine of its own model under `config`; `dtype` "fp64" computes on dequantised weights in fp64."""

    def make_engine(config, *, dtype=None, slots=16):
        if dtype == "fp64":
            cm = with_dequantised(config, torch.float64)
        else:
            cm = load_model(config.model, config.data, compute_dtype=dtype, device="cpu")
        kind = engine_class(config)
        return kind(cm, make_stores(cm), config, slots if kind is PackEngine else 1)

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
