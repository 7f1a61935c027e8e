"""NF4 and 8 bits through bitsandbytes: what is quantised, and what keeps it whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from raycap.errors import ConfigError, ModelError

QUANTISATIONS = ("nf4", "int8", "none")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype to compute in. `auto`: bf16 where the device computes in it, else fp16 on a GPU and fp32 on a CPU."""
    if name != "auto":
        if name not in DTYPES:
            raise ConfigError(f"model.compute_dtype={name!r}; valid: auto, " + ", ".join(DTYPES))
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def load_weights(
    family: Any,
    path: str,
    quantisation: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    trust_remote_code: bool,
    double: bool = False,
) -> tuple[nn.Module, str]:
    """The model in `path` on `device`, computing in `dtype`, and how it is quantised, one of QUANTISATIONS.

    A folder that was saved in NF4 or in 8 bits is what it is. Other weights are quantised from the checkpoint's own dtype, never
    from `dtype`: so the 4-bit codes that an adapter trains on in bf16 are those that it is merged with in fp32.
    """
    from transformers import AutoConfig, BitsAndBytesConfig

    if quantisation not in QUANTISATIONS:
        raise ConfigError(f"model.quantisation={quantisation!r}; valid: {', '.join(QUANTISATIONS)}")
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code} if trust_remote_code else {}
    saved = getattr(config, "quantization_config", None)
    if saved is not None:
        quantisation = _saved_as(saved if isinstance(saved, dict) else saved.to_dict())
        if not quantisation:
            raise ModelError(
                f"{path} is quantised ({saved}), but not in NF4 or 8 bits of bitsandbytes, which alone load beside models "
                "that are not quantised"
            )
        model = family.load_weights(path, dtype="auto", device_map={"": str(device)}, **options)
    elif quantisation == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=double,
            # A list of one's own switches the default one off, so the family's names the head too.
            llm_int8_skip_modules=family.skip_modules(config),
        )
        model = family.load_weights(path, dtype="auto", device_map={"": str(device)}, **options)
    elif quantisation == "int8":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_skip_modules=family.skip_modules(config)
        )
        model = family.load_weights(path, dtype="auto", device_map={"": str(device)}, **options)
    else:
        return family.load_weights(path, dtype=dtype, **options).to(device), "none"
    _settle(model, dtype)
    return model, quantisation


def _saved_as(settings: dict[str, Any]) -> str:
    """How a folder with these quantisation settings is quantised; empty for a way that raycap does not load."""
    if settings.get("load_in_8bit"):
        return "int8"
    return "nf4" if settings.get("load_in_4bit", True) and settings.get("bnb_4bit_quant_type") == "nf4" else ""


def packed_paths(model: nn.Module, family: Any, config: Any, quantisation: str) -> list[str]:
    """Full paths of the linears that transformers would quantise in `model`, of whose weights nothing need be there."""
    if quantisation == "none":
        return []
    from transformers.quantizers.quantizers_utils import should_convert_module

    skipped = family.skip_modules(config)
    return [n for n, m in model.named_modules() if type(m) is nn.Linear and should_convert_module(n, skipped)]


def packed_bytes(outputs: int, inputs: int, quantisation: str, *, double: bool = False) -> list[int]:
    """Sizes of the tensors in which bitsandbytes keeps a weight [O, I].

    NF4: two codes a byte, a scale for 64 of them and the 16 values that codes stand for; with double quantisation
    (Dettmers et al. 2023) scales are bytes, with a scale of their own for 256 of them. int8: a byte, and a scale a row.
    """
    count = outputs * inputs
    if quantisation == "int8":
        return [count, 4 * outputs]
    scales = -(-count // 64)
    packed = [-(-count // 2), 64]
    return [*packed, scales, 4 * -(-scales // 256), 4 * 256, 4] if double else [*packed, 4 * scales]


def quantised_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every Linear4bit and Linear8bitLt by its full path."""
    import bitsandbytes as bnb

    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def is_packed(linear: nn.Module) -> bool:
    """Whether its weight is there in 4 or 8 bits alone."""
    weight = linear.weight
    return (hasattr(weight, "quant_state") or hasattr(weight, "SCB")) and not hasattr(linear, "dense")


def dequantise(module: nn.Module, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The weight [O, I] that a quantised linear multiplies with, in `dtype` or in what it computes in."""
    if hasattr(module, "unpack"):  # a stand-in without numbers
        return module.unpack()
    if hasattr(module.weight, "SCB"):
        from raycap.models.int8 import unpacked

        return unpacked(module.weight).to(dtype or module.compute_dtype)
    import bitsandbytes as bnb

    state = module.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        raise ModelError("a 4-bit weight was repacked by an evaluation on this CPU: load the model afresh")
    before = state.dtype
    try:
        state.dtype = dtype or module.compute_dtype
        return bnb.functional.dequantize_4bit(module.weight.data, state)
    finally:
        state.dtype = before


def _settle(model: nn.Module, dtype: torch.dtype) -> None:
    """Let a quantised model compute in `dtype`, and keep its packed weights from ever being rewritten."""
    import bitsandbytes as bnb

    for module in model.modules():
        four_bit = isinstance(module, bnb.nn.Linear4bit)
        if four_bit:
            # On CPUs with AVX512-BF16 the first eval forward repacks the weight for good: gradients and dequantisation
            # are garbage afterwards.
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype, module.compute_type_is_set = dtype, True
            module.weight.quant_state.dtype = dtype
        elif isinstance(module, bnb.nn.Linear8bitLt):
            from raycap.models.int8 import Int8Linear

            module.__class__, module.compute_dtype = Int8Linear, dtype
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and not (four_bit and name == "weight"):
                parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def materialise(model: nn.Module) -> int:
    """Keep every quantised weight dequantised beside it, in its compute dtype; how many there were.

    Bitwise the same forward and backward without unpacking at each call, for the memory that packing saves.
    """
    import bitsandbytes as bnb

    found = quantised_linears(model)
    for module in found.values():
        module.dense = dequantise(module)  # a plain attribute: it is no part of the model's state
        if isinstance(module, bnb.nn.Linear4bit):  # one in 8 bits looks for it itself
            module.__class__ = _materialised_class()
    return len(found)


def _materialised_class() -> type:
    global _Materialised
    if _Materialised is None:
        import bitsandbytes as bnb

        class Materialised(bnb.nn.Linear4bit):
            """Still a Linear4bit to whoever looks (peft, save_pretrained), with its packed weight untouched."""

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                bias = None if self.bias is None else self.bias.to(self.compute_dtype)
                return nn.functional.linear(x.to(self.compute_dtype), self.dense, bias).to(x.dtype)

        _Materialised = Materialised
    return _Materialised


_Materialised: type | None = None
