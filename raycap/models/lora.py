"""Adapters as PEFT writes and reads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from raycap.errors import ModelError
from raycap.files import write_json
from raycap.trial import TrialSpec

Weights = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""Module path -> (A [r, I], B [O, r])."""


def write_adapter(folder: Path, weights: Weights, spec: TrialSpec, base: str, *, task_type: str | None = None) -> Path:
    """Write adapter_model.safetensors, then adapter_config.json, so that plain `peft` loads the folder on the base."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, (a, b) in weights.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.detach().cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.detach().cpu().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": task_type,
            "base_model_name_or_path": base,
            "r": spec.r,
            "lora_alpha": spec.alpha if spec.alpha != int(spec.alpha) else int(spec.alpha),
            "lora_dropout": spec.dropout,
            "target_modules": sorted(weights),
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "inference_mode": True,
            "use_rslora": False,
            "use_dora": False,
        },
    )
    return folder


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """(adapter_config, weights by module path) of a PEFT folder.

    Raises:
        ModelError: the folder holds no LoRA adapter.
    """
    from safetensors.torch import load_file

    from raycap.files import read_json

    try:
        config = read_json(folder / "adapter_config.json")
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} holds no readable PEFT adapter: {error}") from error
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{folder} is a {config.get('peft_type')} adapter; only LORA can be put into a slot")
    weights = {}
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            weights[name] = (a, tensors[key.replace(".lora_A.", ".lora_B.")])
    return config, weights
