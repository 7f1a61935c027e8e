"""AdamW with moments in 8 bits (Dettmers et al. 2022), for the one slot of a pack: bitsandbytes' PagedAdamW8bit.

Each tensor of the adapter has its own codes and a scale for each 256 of them; tensors below 4,096 elements keep their
moments in fp32. On a GPU, moments of large tensors lie in memory that CUDA pages out to the host; a CPU has one memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from raycap.models.lora import Weights
from raycap.train.optim import EPS, lr_at
from raycap.trial import TrialSpec

STATES = {"m": ("state1", "absmax1"), "v": ("state2", "absmax2")}
"""What bitsandbytes calls a moment's codes, and the scales of their blocks."""


class PagedAdamW8bit:
    """Does what raycap.train.optim.StackedAdamW does, and keeps the moments itself."""

    def __init__(
        self,
        spec: TrialSpec,
        parameters: Mapping[str, Sequence[nn.Parameter]],
        moments: Mapping[str, Weights],
    ):
        """`parameters` by module path; `moments` as `moments()` gave them, or empty to begin anew."""
        from bitsandbytes.optim import PagedAdamW8bit

        self.spec, self.parameters = spec, parameters
        self.rates: list[float] = []
        """Learning rate of the last step."""
        tensors = [p for found in parameters.values() for p in found]
        self.inner = PagedAdamW8bit(
            tensors, lr=spec.lr, betas=(spec.beta1, spec.beta2), eps=EPS, weight_decay=spec.weight_decay
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a CPU pages nothing
            for n, tensor in enumerate(tensors):
                self.inner.init_state(self.inner.param_groups[0], tensor, 0, n)
        for kind, given in moments.items():
            if kind in STATES and given:
                self._load(kind, given)

    def _load(self, kind: str, given: Weights) -> None:
        for path, found in self.parameters.items():
            for n, parameter in enumerate(found):
                state = self.inner.state[parameter]
                for name, kept in zip(STATES[kind], given[path][2 * n : 2 * n + 2]):
                    if name in state:  # copied in, so that what is paged stays so
                        state[name].copy_(kept)

    def moments(self, kind: str) -> dict[str, tuple[torch.Tensor, ...]]:
        """Module path -> for each of its tensors a moment ("m" or "v"), and the scales of its blocks [n / 256] or []."""
        codes, scales = STATES[kind]
        found = {}
        for path, parameters in self.parameters.items():
            states = [self.inner.state[p] for p in parameters]
            pairs = [(s[codes], s.get(scales, torch.empty(0))) for s in states]
            found[path] = tuple(t.clone() for pair in pairs for t in pair)
        return found

    @torch.no_grad()
    def step(
        self,
        values: torch.Tensor,
        grads: torch.Tensor,
        m: torch.Tensor,
        v: torch.Tensor,
        *,
        steps: Sequence[int],
        updates: Sequence[int],
        losses: torch.Tensor,
        loss_scales: Sequence[float] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As StackedAdamW.step, of one slot; the parameters are views of `values` and their gradients of `grads`."""
        unscale = 1 / loss_scales[0] if loss_scales else 1.0
        norms = torch.linalg.vector_norm(grads, dim=1) * unscale
        finite = torch.isfinite(norms) & torch.isfinite(losses)
        self.rates = [lr_at(self.spec, steps[0])]
        if bool(finite):
            grads.mul_(unscale * (self.spec.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)[:, None])
            self.inner.param_groups[0]["lr"] = self.rates[0]
            for state in self.inner.state.values():
                state["step"] = updates[0]
            self.inner.step()
        return norms, finite
