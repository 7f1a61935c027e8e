"""Folds a LoRA adapter into its base: W + (alpha / r) B A, in fp32, stored in the base's own 16-bit type.

An adapter trained on NF4 has learnt against the dequantised weights. Put onto the original ones it is another model,
whose error is W - deq(W_nf4), the quantisation's, with the sign turned; so both are on offer and the gate measures.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raycap.config import DataSettings, ModelSettings
from raycap.errors import ModelError
from raycap.export.card import shown_place
from raycap.export.folder import write_manifest
from raycap.files import atomic_folder, sha256_folder

if TYPE_CHECKING:
    import torch

    from raycap.models.base import CaptionModel

Onto = Literal["original", "dequantised"]


def merge(base: ModelSettings, data: DataSettings, adapter: Path, out: Path, onto: Onto = "original") -> Path:
    """Write the merged model, processor and manifest to `out`, a folder that plain transformers loads.

    `onto` names what the adapter is added to: the checkpoint's own weights, or the dequantised ones in those modules
    that NF4 quantises (and the checkpoint's own elsewhere).

    Raises:
        ModelError: the adapter does not belong to this base, or a merged weight is not finite.
    """
    from raycap.models import load_model

    check_adapter(adapter)
    # fp32 holds every 16-bit checkpoint exactly; on the CPU, where memory is.
    cm = load_model(base, data, quantisation="none", compute_dtype="fp32", device="cpu")
    if onto == "dequantised":
        _put_dequantised(cm, base, data)
    model = _fold(cm.model, adapter, base.path)
    _put_full(cm, model, adapter)
    dtype = storage_dtype(base, cm)
    _require_finite(model, dtype)
    model.to(dtype)
    with atomic_folder(out) as folder:
        model.save_pretrained(folder)
        cm.processor.save_pretrained(folder)
        write_manifest(
            folder,
            {
                "variant": "merged",
                "onto": onto,
                "base": shown_place(base.path),
                "adapter_sha256": sha256_folder(adapter, "adapter_*"),
                "dtype": str(dtype).removeprefix("torch."),
            },
        )
    return out


def check_adapter(adapter: Path) -> None:
    """ModelError unless `adapter` is a folder in PEFT's format whose adapter changes weights."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (adapter / name).is_file():
            raise ModelError(f"{adapter} is no PEFT adapter: {name} is missing")
    from raycap.models.prompt import is_prompt

    if is_prompt(adapter):
        raise ModelError(f"{adapter} is prompt tuning, which cannot be merged: what it learnt is input and no weight")


def storage_dtype(base: ModelSettings, cm: CaptionModel) -> torch.dtype:
    """The base's own type if it has 16 bits, else bf16, whose range is that of fp32."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(cm.path, trust_remote_code=base.trust_remote_code)
    return torch.float16 if config.dtype in (torch.float16, "float16") else torch.bfloat16


def dequantised_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Full module path -> fp32 weight [out, in] of every quantised linear, exactly what its forward multiplies with.

    Raises:
        ModelError: a weight was repacked by an evaluation on this CPU.
    """
    from raycap.models.quantise import dequantise, quantised_linears

    return {name: dequantise(module).float().cpu() for name, module in quantised_linears(model).items()}


def _put_dequantised(cm: CaptionModel, base: ModelSettings, data: DataSettings) -> None:
    """Replace the weights of `cm` that training saw quantised by what quantisation made of them."""
    import torch

    from raycap.models import load_model

    # Never materialised: that is the same product, and hides the codes.
    packed = dataclasses.replace(base, materialise=False)
    quantised = load_model(packed, data, compute_dtype="fp32", device="cpu")
    weights = dequantised_weights(quantised.model)
    if not weights:
        raise ModelError(
            f"{base.path} has no module that model.quantisation={base.quantisation} quantises: there is nothing to dequantise"
        )
    with torch.no_grad():
        for name, weight in weights.items():
            cm.model.get_submodule(name).weight.copy_(weight)


def _fold(model: torch.nn.Module, adapter: Path, base: str) -> torch.nn.Module:
    """The model with the adapter in its weights, by peft's own merge."""
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    try:
        peft_model = PeftModel.from_pretrained(model, str(adapter), torch_device="cpu")
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ModelError(f"the adapter {adapter} does not fit {base}: {error}") from error
    # peft only warns of keys that find no place, and would merge what is left.
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        stored = set(file.keys())
    if differing := stored ^ set(get_peft_model_state_dict(peft_model)):
        raise ModelError(f"the adapter {adapter} does not fit {base}: {len(differing)} keys differ ({min(differing)})")
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.float32)
    try:
        return peft_model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ModelError(f"merging {adapter} into {base} failed: {error}") from error


def _put_full(cm: CaptionModel, model: torch.nn.Module, adapter: Path) -> None:
    """Put what was trained in full, and stands beside the adapter, into the model; peft does it with its own."""
    import torch
    from safetensors.torch import load_file

    file = adapter / cm.family.full_file
    if cm.family.full_file and file.is_file():
        with torch.no_grad():
            for name, tensor in load_file(file).items():
                model.get_parameter(name).copy_(tensor)


def _require_finite(model: Any, dtype: torch.dtype) -> None:
    """ModelError for a weight that the storage type cannot hold."""
    import torch

    largest = torch.finfo(dtype).max
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all() or parameter.abs().max() > largest:
            raise ModelError(f"merged weight {name} is not finite, or exceeds {largest:g}, the largest {dtype} number")
