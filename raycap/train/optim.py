"""AdamW, clipping and schedules for K slots at once: every hyper-parameter is a column [K, 1]."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from raycap.trial import TrialSpec

EPS = 1e-8


def lr_factor(spec: TrialSpec, step: int) -> float:
    """Share of spec.lr for the optimiser's step 0, 1, ...; as transformers' get_{constant,linear,cosine}_schedule_with_warmup."""
    if step < spec.warmup_steps:
        return step / max(1, spec.warmup_steps)
    if spec.schedule == "constant":
        return 1.0
    done = (step - spec.warmup_steps) / max(1, spec.steps - spec.warmup_steps)
    if spec.schedule == "linear":
        return max(0.0, 1.0 - done)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))


class StackedAdamW:
    """torch.optim.AdamW (Loshchilov & Hutter 2019) for parameters [K, P]; a slot whose gradients are not finite stands still."""

    def __init__(self, specs: Sequence[TrialSpec], device: torch.device, dtype: torch.dtype = torch.float32):
        def column(values: list[float]) -> torch.Tensor:
            return torch.tensor(values, device=device, dtype=torch.float64)[:, None]

        self.specs = list(specs)
        self.beta1, self.beta2 = column([s.beta1 for s in specs]), column([s.beta2 for s in specs])
        self.decay = column([s.weight_decay for s in specs])
        self.limit = column([s.max_grad_norm for s in specs])
        self.dtype = dtype

    @torch.no_grad()
    def step(
        self, values, grads, m, v, updates: Sequence[int], rows: Sequence[bool]
    ) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
        """One update in place. `updates` [K]: updates done so far. `rows`: which slots take part. Returns norm [K], finite [K], lr."""
        device = values.device
        norm = grads.square().sum(1).sqrt()
        taking = torch.tensor(list(rows), device=device) & torch.isfinite(norm)
        clip = (self.limit[:, 0].to(norm.dtype) / (norm + 1e-6)).clamp(max=1.0)
        lrs = [s.lr * lr_factor(s, n) for s, n in zip(self.specs, updates)]
        lr = torch.tensor(lrs, device=device, dtype=torch.float64)[:, None]
        count = torch.tensor([n + 1 for n in updates], device=device, dtype=torch.float64)[:, None]
        one = taking[:, None]
        g = torch.where(one, grads * clip[:, None], 0.0)
        beta1, beta2 = self.beta1.to(values.dtype), self.beta2.to(values.dtype)
        new_m = torch.lerp(m, g, 1 - beta1)
        new_v = v * beta2 + g * g * (1 - beta2)
        size = (lr / (1 - self.beta1**count)).to(values.dtype)
        root = (new_v / (1 - self.beta2**count).to(values.dtype)).sqrt_().add_(EPS)
        new = values * (1 - lr * self.decay).to(values.dtype) - size * new_m / root
        if bool(taking.all()):
            values.copy_(new), m.copy_(new_m), v.copy_(new_v)
        else:
            for old, fresh in ((values, new), (m, new_m), (v, new_v)):
                old.copy_(torch.where(one, fresh, old))
        grads.zero_()
        return norm, taking, lrs
