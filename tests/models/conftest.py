"""A random GIT of the same classes as the shipped one, smaller and with dropout in its base."""

from __future__ import annotations

import pytest
import torch
from tiny_models import random_git

from raycap.config import from_dict
from raycap.models import load_model


@pytest.fixture(scope="session")
def twin(tmp_path_factory):
    """Folder of a GIT with random weights."""
    return random_git(tmp_path_factory.mktemp("twin"), 0.1)


@pytest.fixture
def load(twin):
    """Loads the twin (or the model in `path`), in fp32 on the CPU unless told otherwise."""

    def load(path=twin, prompt="", max_text_tokens=32, **settings):
        settings = {"compute_dtype": "fp32", **settings}
        config = from_dict(
            {"model": {"path": str(path), **settings}, "data": {"prompt": prompt, "max_text_tokens": max_text_tokens}}
        )
        return load_model(config.model, config.data, device="cpu")

    return load


@pytest.fixture(scope="session")
def images():
    """Six scenes as PIL images."""
    from raycap.data.shapes import generate

    return [scene.image for scene in generate(6, seed=5)]


@pytest.fixture
def pixel_values(images):
    """The six scenes as a loaded model takes them."""

    def pixel_values(cm):
        import numpy as np

        pixels = torch.from_numpy(np.stack([cm.family.resize(cm.processor, image) for image in images]))
        return cm.family.pixel_values(cm.processor, pixels)

    return pixel_values
