"""NF4 through bitsandbytes, with what was found to be needed around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from raycap.errors import ConfigError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype to compute in; `auto` is bf16 where the device has it, else fp16 on a GPU and fp32 on a CPU."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def load_options(
    family: Any,
    path: str,
    quantisation: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    trust_remote_code: bool = False,
) -> tuple[dict[str, Any], str]:
    """Keywords for from_pretrained, and the quantisation that results ("nf4" or "none")."""
    from transformers import AutoConfig, BitsAndBytesConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {"dtype": dtype}
    saved = getattr(config, "quantization_config", None)
    if saved is not None:
        options.update(device_map={"": str(device)}, dtype="auto")  # see compute_in
        # What is computed in belongs to this process, not to the file.
        values = dict(saved if isinstance(saved, dict) else saved.to_dict())
        values["bnb_4bit_compute_dtype"] = dtype
        values = {k: v for k, v in values.items() if not k.startswith("_") and k != "quant_method"}
        options["quantization_config"] = BitsAndBytesConfig(**values)
        return options, "nf4"
    if quantisation == "none":
        return options, "none"
    if quantisation != "nf4":
        raise ConfigError(f"model.quantisation={quantisation!r}; valid: nf4, none")
    options["quantization_config"] = nf4_config(family.skip_modules(config), dtype)
    options.update(device_map={"": str(device)}, dtype="auto")  # see compute_in
    return options, "nf4"


def nf4_config(skip: list[str], dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=False,
        llm_int8_skip_modules=skip,
    )


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Let an NF4 model compute in `dtype`; its codes stay those of the checkpoint's own weights.

    Loading in `dtype` instead would quantise weights that were rounded to it first: through bf16 the codes of the tiny
    GIT differ by a quarter of NF4's own error, so that training in bf16 and scoring in fp32 would see two models. And a
    folder saved in NF4 and fp16 loads in fp32 as a mixture that fails at its first forward.
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = dtype, True
            module.weight.quant_state.dtype = dtype
    for parameter in model.parameters():
        if not isinstance(parameter, bnb.nn.Params4bit) and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for buffer in model.buffers():
        if buffer.dtype in (torch.float16, torch.bfloat16):  # those in fp32, such as rotary frequencies, are meant so
            buffer.data = buffer.data.to(dtype)
    model.config.dtype = dtype


def mend(model: nn.Module, *, materialise: bool = False) -> None:
    """Keep 4-bit weights as they are on CPUs with AVX512-BF16, where the first eval forward repacks them for good."""
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    if materialise:
        for name, module in list(model.named_modules()):
            if isinstance(module, bnb.nn.Linear4bit):
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, Materialised(module))


class Materialised(nn.Linear):
    """A Linear4bit whose dequantised weight is kept: bitwise the same product, without unpacking at each call."""

    def __init__(self, packed: nn.Module):
        super().__init__(packed.in_features, packed.out_features, bias=packed.bias is not None, device="meta")
        self.weight = nn.Parameter(dequantised(packed).to(packed.compute_dtype), requires_grad=False)
        self.bias = packed.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(self.weight.dtype)
        return nn.functional.linear(x.to(self.weight.dtype), self.weight, bias).to(x.dtype)


def dequantised(module: nn.Module) -> torch.Tensor:
    """The weight [O, I] that a Linear4bit stands for."""
    import bitsandbytes.functional as bnb

    return bnb.dequantize_4bit(module.weight.data, module.weight.quant_state)
