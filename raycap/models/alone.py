"""One adapter on one base: kinds that cannot be stacked, and LoRA beside them. LoRA and DoRA are peft's own modules.

It has the interface of raycap.models.stacked.Stacks, for one slot. Shapes: r rank, I inputs, O outputs of a linear, P all
parameters of the slot, which are one row of a tensor [1, P] here too: each parameter of peft's is a view of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from raycap.models.base import Family
from raycap.models.dropout import KeyedDropout, Keys
from raycap.models.prompt import PROMPT, SoftPrompt, put_prompt
from raycap.models.stacked import KINDS, Weights
from raycap.trial import TrialSpec

NAME = "default"
"""What peft calls the adapter."""


class AloneStack:
    """The parameters and moments of the one trial that trains, and the modules that use them.

    Parameters are used in fp32 whatever the base computes in, as plain peft keeps them. Without `moments`, m and v are
    left to an optimiser that has its own.
    """

    def __init__(
        self,
        model: nn.Module,
        keys: Keys,
        family: Family,
        *,
        compute_dtype: torch.dtype,
        device: torch.device,
        moments: bool = True,
    ):
        self.model, self.keys, self.family, self.device, self.moments = model, keys, family, device, moments
        self.dtype = torch.float64 if compute_dtype == torch.float64 else torch.float32
        self.full: set[str] = set()
        self.spans = [slice(0, 1)]
        self.layers: dict[str, Any] = {}
        """peft's layer by the path of the linear that it is around, or a prompt by that of the word embeddings."""
        self.parameters: dict[str, list[nn.Parameter]] = {}
        self._clear()

    def _clear(self) -> None:
        self.value = self.grads = self.m = self.v = torch.zeros(1, 0, device=self.device, dtype=self.dtype)
        self.parameters = {}

    def unwrap(self) -> None:
        """Give the model its plain modules back."""
        for path, layer in self.layers.items():
            parent, _, leaf = path.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, layer.base_layer)
            if isinstance(layer, SoftPrompt):
                layer.enable_adapters(False)
        self.layers = {}
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        self._clear()

    # --- building -----------------------------------------------------------------------------------------------------

    def rebuild(
        self, specs: Sequence[TrialSpec], slots: Sequence[Mapping[str, Weights]], spans: Sequence[int] = ()
    ) -> None:
        """Put the one slot in, {value, m, v: {path: tensors}}. Tensors that `value` lacks begin as peft has them: of
        DoRA the magnitude, which is that of the base's weight."""
        self.unwrap()
        if not specs:
            return
        ((spec,), (slot,)) = specs, slots
        made = self._inject(spec, list(slot["value"]))
        width = sum(p.numel() for found in made.values() for _, p in found)
        self.value = torch.zeros(1, width, device=self.device, dtype=self.dtype)
        self.grads = torch.zeros_like(self.value)
        begin = 0
        with torch.no_grad():
            for path, found in made.items():
                self.parameters[path] = []
                given = slot["value"][path]
                for n, (owner, parameter) in enumerate(found):
                    view = self._view(self.value, begin, parameter.shape)
                    view.copy_(given[n] if n < len(given) else parameter)
                    owner.weight = nn.Parameter(view)
                    # Backward adds up where a gradient is, so that all of them are one row too.
                    owner.weight.grad = self._view(self.grads, begin, parameter.shape)
                    self.parameters[path].append(owner.weight)
                    begin += parameter.numel()
        if self.moments:
            self.m, self.v = (self._row(slot.get(kind) or {}) for kind in ("m", "v"))

    def _inject(self, spec: TrialSpec, paths: list[str]) -> dict[str, list[tuple[nn.Module, nn.Parameter]]]:
        """Put the adapter's modules in; the parameters of each with those that own them, in the order of Weights."""
        if spec.variant == "prompt":
            path, prompt = put_prompt(self.model, self.family, spec.prompt_tokens)
            self.layers[path] = prompt
            return {PROMPT: [(prompt.soft, prompt.soft.weight)]}
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(
            r=spec.r, lora_alpha=spec.alpha, lora_dropout=spec.dropout, target_modules=paths, bias="none",
            use_rslora=spec.rslora, use_dora=spec.variant == "dora",
        )  # fmt: skip
        training = self.model.training
        inject_adapter_in_model(config, self.model, adapter_name=NAME)
        found = {}
        for path in paths:
            layer = self.layers[path] = self.model.get_submodule(path)
            if spec.dropout:  # the pack's masks, which know the trial's seed and step and no generator
                layer.lora_dropout[NAME] = KeyedDropout(f"lora:{path}", spec.dropout, self.keys)
            layer.train(training)
            owners = [layer.lora_A[NAME], layer.lora_B[NAME]]
            if NAME in layer.lora_magnitude_vector:
                owners.append(layer.lora_magnitude_vector[NAME])
            found[path] = [(owner, owner.weight) for owner in owners]
        return found

    def _view(self, row: torch.Tensor, begin: int, shape: torch.Size) -> torch.Tensor:
        return row[0, begin : begin + shape.numel()].view(shape)

    def _row(self, tensors: Weights) -> torch.Tensor:
        """[1, P] of tensors by path, zeros where there are none."""
        row, begin = torch.zeros_like(self.value), 0
        for path, parameters in self.parameters.items():
            for n, parameter in enumerate(parameters):
                if path in tensors:
                    self._view(row, begin, parameter.shape).copy_(tensors[path][n])
                begin += parameter.numel()
        return row

    # --- a step -------------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Begin a step."""
        self.grads.zero_()

    def collect(self, lanes: int = 1) -> None:
        """Nothing is left to do: backward has added up in `grads` itself."""

    def discard(self) -> None:
        """Forget the gradients of a piece that did not come to its end."""
        self.grads.zero_()

    def hold_full(self, slots: Sequence[int]) -> torch.Tensor:
        return self.value[:0]  # checks.check refuses lora.full here

    def put_full(self, slots: Sequence[int], kept: torch.Tensor) -> None:
        pass

    @contextmanager
    def applying(self, slots: Sequence[int]) -> Iterator[None]:
        """For the block: the adapter is applied, or with no slots the base alone, without gradients."""
        if not slots:
            self._enable(False)
        try:
            with torch.no_grad():
                yield
        finally:
            if not slots:
                self._enable(True)

    def _enable(self, on: bool) -> None:
        for layer in self.layers.values():
            layer.enable_adapters(on)

    # --- out ----------------------------------------------------------------------------------------------------------

    def cut(self, k: int, kind: str, names: Sequence[str]) -> dict[str, tuple[torch.Tensor, ...]]:
        """Copies of the tensors of `kind` by module path."""
        assert k == 0 and kind in KINDS
        row, begin, found = getattr(self, kind), 0, {}
        for path, parameters in self.parameters.items():
            views = []
            for parameter in parameters:
                views.append(self._view(row, begin, parameter.shape).clone())
                begin += parameter.numel()
            found[path] = tuple(views)
        return {name: found[name] for name in names}
