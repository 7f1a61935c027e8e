"""LoRA adapters (Hu et al. 2021): how one starts, and PEFT's files of one.

Shapes: r rank, I inputs, O outputs of a module.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from raycap.errors import ConfigError, ModelError
from raycap.files import read_json, write_atomic, write_json
from raycap.trial import TrialSpec

Weights = Mapping[str, tuple[torch.Tensor, ...]]
"""Module path -> (A [r, I], B [O, r]); of DoRA with the magnitude [O] behind them."""
_PREFIX = "base_model.model."
_MAGNITUDE = ".lora_magnitude_vector"
"""Of DoRA (Liu et al. 2024): the length of each row of the adapted weight."""


def start(spec: TrialSpec, shapes: Mapping[str, tuple[int, int]], dtype: torch.dtype = torch.float32) -> Weights:
    """The adapter that a trial begins with, for modules of `shapes` {path: (I, O)}, on the CPU.

    A as peft draws it (kaiming_uniform with a = sqrt 5, so within 1 / sqrt I), B zero. A module's A is a function of
    (trial seed, path, r, I) alone, whatever else is adapted.
    """
    if spec.r < 1:
        raise ConfigError(f"lora.r={spec.r} of trial {spec.trial_id} must be above 0: there would be nothing to train")
    found = {}
    for path, (inputs, outputs) in shapes.items():
        digest = hashlib.sha256(f"{spec.seed}\0{path}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        bound = 1 / math.sqrt(inputs)
        a = torch.empty(spec.r, inputs).uniform_(-bound, bound, generator=generator)
        found[path] = (a.to(dtype), torch.zeros(outputs, spec.r, dtype=dtype))
    return found


def export_adapter(
    folder: Path | str,
    weights: Weights,
    spec: TrialSpec,
    base: str,
    task_type: str | None,
    *,
    full: Sequence[str] = (),
    full_file: str = "",
) -> Path:
    """Write `weights` as a PEFT adapter of rank `spec.r` for the model that peft finds at `base`.

    target_modules are full paths, so that plain peft adapts these modules and no other of the same name. Modules in
    `full` hold (weight [O, I], bias [O, 1]): peft's modules_to_save, or `full_file` beside the adapter.
    """
    from safetensors.torch import save

    folder = Path(folder)
    tensors = {}
    whole: dict[str, torch.Tensor] = {}
    for path, (a, b, *magnitude) in weights.items():
        if path in full:
            whole[f"{path}.weight"] = a.detach().cpu().contiguous()
            if b.shape[1]:
                whole[f"{path}.bias"] = b.detach().cpu()[:, 0].contiguous()
            continue
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = a.detach().cpu().contiguous()
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = b.detach().cpu().contiguous()
        if magnitude:
            tensors[f"{_PREFIX}{path}{_MAGNITUDE}"] = magnitude[0].detach().cpu().contiguous()
    if whole and full_file:
        write_atomic(folder / full_file, save(whole, metadata={"format": "pt"}))
    else:
        tensors |= {f"{_PREFIX}{name}": tensor for name, tensor in whole.items()}
    write_atomic(folder / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "r": spec.r,
        "lora_alpha": int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha,
        "lora_dropout": spec.dropout,
        "target_modules": sorted(p for p in weights if p not in full),
        "modules_to_save": sorted(p for p in weights if p in full) if whole and not full_file else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_dora": spec.variant == "dora",
        "use_rslora": spec.rslora,
    }
    # Last: a folder without it is unfinished.
    write_json(folder / "adapter_config.json", config)
    return folder


def import_adapter(folder: Path | str, full_file: str = "") -> tuple[dict[str, Any], Weights]:
    """(adapter_config, weights) of a PEFT folder; modules trained in full, there or in `full_file`, as (weight, bias).

    Raises:
        ModelError: there is no LoRA adapter that a slot can hold, and why.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        config = read_json(folder / "adapter_config.json")
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} holds no readable PEFT adapter: {error}") from error
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{folder} is a {config.get('peft_type')} adapter; a slot holds LORA only")
    for name in ("rank_pattern", "alpha_pattern", "lora_bias"):
        if config.get(name):
            raise ModelError(f"{folder}: {name}={config[name]} is nothing that a slot holds; train it alone, with peft")
    weights: dict[str, tuple[torch.Tensor, ...]] = {}
    whole = {f"{_PREFIX}{p}.{leaf}" for p in config.get("modules_to_save") or () for leaf in ("weight", "bias")}
    full = {key.removeprefix(_PREFIX): tensors.pop(key) for key in whole & set(tensors)}
    if full_file and (folder / full_file).is_file():
        full |= load_file(folder / full_file)
    for key, weight in full.items():
        path, _, leaf = key.rpartition(".")
        if leaf == "weight":
            bias = full.get(f"{path}.bias")
            weights[path] = (weight, weight.new_empty(len(weight), 0) if bias is None else bias[:, None])
    count = len(weights)
    lengths = {key: tensors.pop(key) for key in list(tensors) if key.endswith(_MAGNITUDE)}
    for key, a in tensors.items():
        path, _, kind = key.removeprefix(_PREFIX).rpartition(".lora_")
        other = f"{_PREFIX}{path}.lora_B.weight"
        if kind == "A.weight" and other in tensors:
            weights[path] = (a, tensors[other])
            if f"{_PREFIX}{path}{_MAGNITUDE}" in lengths:
                weights[path] += (lengths[f"{_PREFIX}{path}{_MAGNITUDE}"],)
    if len(lengths) != (len(weights) - count if config.get("use_dora") else 0):
        raise ModelError(
            f"{folder}: use_dora={bool(config.get('use_dora'))}, and there are {len(lengths)} magnitudes of "
            f"{len(weights) - count} modules"
        )
    if len(weights) == count or 2 * (len(weights) - count) != len(tensors):
        raise ModelError(f"{folder}: {len(tensors)} tensors are not pairs of lora_A and lora_B")
    return config, weights
