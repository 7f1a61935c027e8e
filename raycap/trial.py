"""What one trial trains with: plain values, no torch, passed between driver, trial and pack."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raycap.checks import check
from raycap.config import Config, parse_value
from raycap.errors import ConfigError, did_you_mean

SWEEPABLE = (
    "lora.r", "lora.alpha", "lora.alpha_per_rank", "lora.dropout", "lora.targets", "lora.layers", "lora.rslora",
    "lora.scope", "lora.full", "lora.variant", "lora.prompt_tokens",
    "train.lr", "train.schedule", "train.warmup_steps", "train.warmup_ratio", "train.weight_decay",
    "train.beta1", "train.beta2", "train.max_grad_norm", "data.captions",
)  # fmt: skip
"""Settings that may differ between the trials of one sweep."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialSpec:
    """Everything that distinguishes one slot of a pack from its neighbours."""

    trial_id: str
    seed: int
    """Keys the adapter's start and dropout. The sample order takes the run's seed, so that trials see the same rows."""
    steps: int
    """Full budget in optimiser steps, and the schedule's horizon; never a rung."""
    r: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    lr: float
    schedule: str
    warmup_steps: int
    weight_decay: float
    beta1: float
    beta2: float
    max_grad_norm: float
    captions: str = "all"
    """data.captions: the rule that picks the slot's captions."""
    layers: str = ""
    """lora.layers: which language layers get adapters; empty: all."""
    rslora: bool = False
    """Whether the factor is alpha / sqrt(r)."""
    scope: str = "language"
    """lora.scope: which parts of the model get adapters."""
    full: tuple[str, ...] = ()
    """lora.full: which parts are trained in full."""
    variant: str = "lora"
    """lora.variant: the kind of adapter."""
    prompt_tokens: int = 0
    """lora.prompt_tokens, where the adapter is a prompt."""

    @property
    def scale(self) -> float:
        """Factor on B A x: alpha / r (Hu et al. 2021, section 4.1), or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023)."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def to_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrialSpec:
        return cls(**{**values, **{name: tuple(values.get(name, ())) for name in ("targets", "full")}})


def apply_overrides(config: Config, overrides: Mapping[str, Any]) -> Config:
    """`config` with `section.name -> value` put in, and checked.

    A value for one of `lora.alpha` and `lora.alpha_per_rank` clears the other, and so for `train.warmup_*`, because
    each pair sets the same thing.
    """
    sections: dict[str, dict[str, Any]] = {}
    for key, value in overrides.items():
        section, _, name = key.partition(".")
        values = sections.setdefault(section, {})
        values[name] = parse_value(key, value)
        for one, other in (("alpha", "alpha_per_rank"), ("warmup_steps", "warmup_ratio")):
            for mine, theirs in ((one, other), (other, one)):
                if name == mine and f"{section}.{theirs}" not in overrides:
                    values.setdefault(theirs, 0)
    changed = dataclasses.replace(
        config, **{s: dataclasses.replace(getattr(config, s), **values) for s, values in sections.items()}
    )
    check(changed)
    return changed


def values_of(config: Config, key: str) -> list[Any]:
    """What the setting `key` may be in a trial of the sweep: its choices in tune.space, else what it is."""
    section, _, name = key.partition(".")
    own, given = getattr(getattr(config, section), name), config.tune.space.get(key)
    if not given:
        return [own]
    values = [parse_value(key, v) for v in given.get("choice", ())]
    return [*values, own] if config.tune.default_trial and own not in values else values


def trial_spec(
    config: Config, trial_id: str, overrides: Mapping[str, Any] | None = None, *, seed: int | None = None
) -> TrialSpec:
    """The trial that `config` describes once `overrides` (`section.name -> value`, of SWEEPABLE) are put in."""
    for key in overrides or {}:
        if key not in SWEEPABLE:
            raise ConfigError(f"'{key}' cannot differ between the trials of a pack; {did_you_mean(key, SWEEPABLE)}")
    c = apply_overrides(config, overrides or {})
    alpha = c.lora.alpha or (c.lora.alpha_per_rank or 2.0) * c.lora.r
    return TrialSpec(
        trial_id=trial_id,
        seed=c.run.seed if seed is None else seed,
        steps=c.train.steps,
        r=c.lora.r,
        alpha=alpha,
        dropout=c.lora.dropout,
        targets=c.lora.targets,
        lr=c.train.lr,
        schedule=c.train.schedule,
        warmup_steps=c.train.warmup_steps or round(c.train.warmup_ratio * c.train.steps),
        weight_decay=c.train.weight_decay,
        beta1=c.train.beta1,
        beta2=c.train.beta2,
        max_grad_norm=c.train.max_grad_norm,
        captions=c.data.captions,
        layers=c.lora.layers,
        rslora=c.lora.rslora,
        scope=c.lora.scope,
        full=c.lora.full,
        variant=c.lora.variant,
        prompt_tokens=c.lora.prompt_tokens if c.lora.variant == "prompt" else 0,
    )
