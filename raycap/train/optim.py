"""AdamW, clipping and schedules for K slots at once: what differs between slots is a column [K, 1].

Shapes: K slots, P parameters of a slot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from raycap.errors import ConfigError
from raycap.trial import TrialSpec

EPS = 1e-8
TINY = 1e-37
"""Least second moment whose root is taken."""
BLOCK = 1 << 17
"""Elements updated at a time on a CPU: five tensors of them stay in its cache, and the update is bound by memory."""
FIRST_LOSS_SCALE = 2.0**16
"""Where fp16 begins, and by what it goes on: as torch.amp.GradScaler."""
GROWTH_STEPS = 2000


def lr_at(spec: TrialSpec, step: int) -> float:
    """Learning rate of optimiser step `step`, counted from 0, out of the trial's full budget.

    The same as transformers' get_{cosine,linear,constant}_schedule_with_warmup.
    """
    if step < spec.warmup_steps:
        return spec.lr * step / max(1, spec.warmup_steps)
    done = (step - spec.warmup_steps) / max(1, spec.steps - spec.warmup_steps)
    if spec.schedule == "constant":
        share = 1.0
    elif spec.schedule == "linear":
        share = max(0.0, 1.0 - done)
    elif spec.schedule == "cosine":
        share = max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))
    else:
        raise ConfigError(f"train.schedule={spec.schedule!r}; valid: cosine, linear, constant")
    return spec.lr * share


@dataclass
class LossScale:
    """A slot's factor on its fp16 loss: halved when its gradients overflow, doubled after GROWTH_STEPS good steps."""

    value: float = 1.0
    good: int = 0

    def update(self, finite: bool) -> None:
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.value = max(self.value / 2, 1.0)
        elif self.good >= GROWTH_STEPS:
            self.value, self.good = self.value * 2, 0


class StackedAdamW:
    """torch.optim.AdamW (Loshchilov & Hutter 2019) and clip_grad_norm_ for each row of [K, P] tensors."""

    def __init__(self, specs: Sequence[TrialSpec], device: torch.device, dtype: torch.dtype):
        self.specs, self.device, self.dtype = list(specs), device, dtype
        self.limit = self._column([s.max_grad_norm for s in specs])
        self.beta1 = self._column([s.beta1 for s in specs])
        self.beta2 = self._column([s.beta2 for s in specs])
        self.rates: list[float] = []
        """Learning rates of the last step."""
        self.decays = any(s.weight_decay for s in specs)

    def _column(self, values: Sequence[float]) -> torch.Tensor:
        """[K, 1]. Worked out in Python's doubles, so that a factor near 1 keeps its digits."""
        return torch.tensor(list(values), device=self.device, dtype=self.dtype)[:, None]

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
        """One update in place. Returns each slot's gradient norm [K] before clipping, and whether it took part [K].

        `steps` places a slot on its schedule; `updates` counts the updates it has had (fewer, where steps were
        skipped). A slot whose loss or gradients are not finite stays exactly as it is. `grads` is used up.
        """
        norms = torch.linalg.vector_norm(grads, dim=1, keepdim=True)
        unscale = 1.0
        if loss_scales is not None:
            unscale = 1 / self._column(loss_scales)
            norms = norms * unscale
        finite = torch.isfinite(norms) & torch.isfinite(losses)[:, None]
        clip = unscale * (self.limit / (norms + 1e-6)).clamp(max=1.0)
        rates = self.rates = [lr_at(spec, step) for spec, step in zip(self.specs, steps)]
        first = [1 - s.beta1 ** (n + 1) for s, n in zip(self.specs, updates)]
        second = [math.sqrt(1 - s.beta2 ** (n + 1)) for s, n in zip(self.specs, updates)]
        shrink = self._column([1 - lr * s.weight_decay for s, lr in zip(self.specs, rates)])
        size = self._column([-lr / one for lr, one in zip(rates, first)])
        root = self._column([1 / two for two in second])
        beta1, beta2 = self.beta1, self.beta2
        whole = bool(finite.all())
        if not whole:
            # The identity for the slots that stand still. Cleared before anything is multiplied: 0 * NaN is NaN.
            grads = torch.where(finite, grads, 0.0)
            clip, size = torch.where(finite, clip, 0.0), torch.where(finite, size, 0.0)
            beta1, beta2, shrink = (torch.where(finite, t, 1.0) for t in (beta1, beta2, shrink))
        gain1, gain2 = clip * (1 - beta1), clip * clip * (1 - beta2)
        width = values.shape[1]
        block = max(1, BLOCK // max(1, values.shape[0])) if self.device.type == "cpu" else max(1, width)
        for begin in range(0, width, block):
            p, g, m1, m2 = (t[:, begin : begin + block] for t in (values, grads, m, v))
            m1.mul_(beta1).addcmul_(g, gain1)
            m2.mul_(beta2).addcmul_(g.square_(), gain2)
            if self.decays:
                p.mul_(shrink)
            # A root of zero, and padded ranks are full of them, takes MKL ten times a root; EPS drowns what is added.
            p.addcdiv_(m1 * size, torch.clamp(m2, min=TINY, out=g).sqrt_().mul_(root).add_(EPS))
        return norms[:, 0], finite[:, 0]
