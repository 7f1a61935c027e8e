"""The trials of a sweep: points of `tune.space`, the same for the same seed whatever the number of trials."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from raycap.config import Config, parse_value
from raycap.errors import ConfigError, did_you_mean
from raycap.trial import SWEEPABLE, TrialSpec, trial_spec

KINDS = ("choice", "uniform", "loguniform")


def sample_trials(config: Config) -> list[TrialSpec]:
    """`tune.trials` trials named t00, t01, ...: point t of a shifted low-discrepancy sequence over the space.

    A dozen independent draws leave holes and clusters in four dimensions; the additive recurrence with the roots of
    x^(d+1) = x + 1 (Roberts' R_d) fills them evenly, and its first n points stay what they are when n grows. The run's
    seed shifts it. Trials share the run's seed, so that they differ in their settings alone; in an empty space they
    differ in the seed.

    Raises:
        ConfigError: a setting that cannot be swept, a range that is none, values of the wrong type.
    """
    if "val" in config.data.train_splits and (config.tune.trials > 1 or config.tune.scheduler != "none"):
        raise ConfigError(
            f"data.train_splits={','.join(config.data.train_splits)}: with val trained on, trials cannot be told apart. Run the "
            "one setting: `raycap train`, or tune.trials=1 tune.scheduler=none"
        )
    space = {key: _dimension(key, value) for key, value in sorted(config.tune.space.items())}
    width = max(2, len(str(config.tune.trials - 1)))
    shift = np.random.default_rng([config.run.seed, 0x5EED]).random(max(1, len(space)))
    stride = _strides(len(space))
    trials = []
    for t in range(config.tune.trials):
        point = (shift + (t + 1) * stride) % 1.0
        overrides = {key: _value(dimension, float(x)) for (key, dimension), x in zip(space.items(), point)}
        seed = config.run.seed + (0 if space else t)
        trials.append(trial_spec(config, f"t{t:0{width}d}", overrides, seed=seed))
    return trials


DEFAULT = "default"
"""Id of the trial that trains the settings as they stand."""


def sweep_trials(config: Config) -> list[TrialSpec]:
    """What a sweep trains: `sample_trials`, and with `tune.default_trial` the settings as they stand."""
    trials = sample_trials(config)
    return [*trials, trial_spec(config, DEFAULT)] if config.tune.default_trial else trials


def _strides(dimensions: int) -> np.ndarray:
    root = 2.0
    for _ in range(64):
        root = (1 + root) ** (1 / (dimensions + 1))
    return root ** -np.arange(1, max(1, dimensions) + 1)


def _dimension(key: str, value: Any) -> tuple[str, list[Any]]:
    if key not in SWEEPABLE:
        raise ConfigError(f"tune.space.{key} cannot be swept; {did_you_mean(key, SWEEPABLE)}")
    if not isinstance(value, Mapping) or len(value) != 1:
        raise ConfigError(f"tune.space.{key}={value!r} must hold one of {', '.join(KINDS)}, e.g. {{choice: [1, 2]}}")
    ((kind, given),) = value.items()
    if kind not in KINDS:
        raise ConfigError(f"tune.space.{key}.{kind} is unknown; {did_you_mean(str(kind), KINDS)}")
    if not isinstance(given, (list, tuple)) or not given:
        raise ConfigError(f"tune.space.{key}.{kind}={given!r} must be a list that is not empty")
    if kind == "choice":
        return kind, [parse_value(key, v) for v in given]
    if len(given) != 2:
        raise ConfigError(f"tune.space.{key}.{kind}={list(given)} must be two bounds, [low, high]")
    low, high = (parse_value(key, v) for v in given)
    if isinstance(low, (str, tuple, bool)):
        raise ConfigError(f"tune.space.{key}.{kind}: '{key}' is no number, list its values under `choice`")
    if not low < high or (kind == "loguniform" and low <= 0):
        above = " above 0" if kind == "loguniform" else ""
        raise ConfigError(f"tune.space.{key}.{kind}={list(given)} must be a low bound{above} and a higher one")
    return kind, [low, high]


def _value(dimension: tuple[str, list[Any]], x: float) -> Any:
    kind, given = dimension
    if kind == "choice":
        return given[int(x * len(given))]
    low, high = given
    value = low * (high / low) ** x if kind == "loguniform" else low + (high - low) * x
    if isinstance(low, int) and isinstance(high, int):
        return round(value)
    # Three significant digits: what a table shows is what was trained.
    return float(f"{value:.3g}") if value else 0.0
