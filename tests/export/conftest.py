"""An adapter with weights that matter, in PEFT's own format, on the tiny GIT."""

from __future__ import annotations

import pytest
from exports import merged, nf4  # noqa: F401 - fixtures

from raycap.config import from_dict


@pytest.fixture(scope="module")
def config():
    return from_dict({"run": {"name": "t"}, "decode": {"max_new_tokens": 16}})


@pytest.fixture(scope="module")
def base():
    """Folder of the tiny GIT."""
    from raycap.models import resolve_path

    return resolve_path("builtin:tiny-git")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """A rank-4 adapter on every linear of the text decoder, whose update is some percent of the weights."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=r"git\.encoder.*\.(query|key|value|dense)")
    generator = torch.Generator().manual_seed(0)
    peft_model = get_peft_model(model, settings)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp("adapter")
    peft_model.save_pretrained(folder)
    return folder
