"""The search space: even, repeatable, and refused with a clear word where it makes no sense."""

from __future__ import annotations

import math

import pytest

from raycap.config import from_dict
from raycap.errors import ConfigError
from raycap.tune.space import DEFAULT, sample_trials, sweep_trials

SPACE = {
    "lora.r": {"choice": [2, 4, 8, 16, 32]},
    "lora.alpha_per_rank": {"choice": [1, 2]},
    "lora.dropout": {"uniform": [0.0, 0.2]},
    "train.lr": {"loguniform": [1e-4, 1e-2]},
}


def config(trials=12, seed=0, space=SPACE):
    return from_dict({"run": {"seed": seed}, "tune": {"trials": trials, "space": space}})


def test_trials_are_named_in_order_and_repeat_with_the_seed():
    trials = sample_trials(config())
    assert [t.trial_id for t in trials] == [f"t{i:02d}" for i in range(12)]
    assert trials == sample_trials(config())
    assert trials != sample_trials(config(seed=1))


def test_more_trials_leave_the_first_ones_as_they_are():
    assert sample_trials(config(12)) == sample_trials(config(40))[:12]
    assert sample_trials(config(101))[100].trial_id == "t100"


def test_a_dozen_trials_cover_every_choice_and_each_third_of_a_range():
    for seed in range(20):
        trials = sample_trials(config(12, seed))
        assert {t.r for t in trials} == {2, 4, 8, 16, 32}
        assert {t.scale for t in trials} == {1.0, 2.0}
        thirds = [int(3 * math.log10(t.lr / 1e-4) / 2) for t in trials]
        assert min(thirds.count(third) for third in range(3)) >= 3


def test_values_stay_in_their_ranges_and_show_three_digits():
    for trial in sample_trials(config(200)):
        assert 1e-4 <= trial.lr <= 1e-2 and float(f"{trial.lr:.3g}") == trial.lr
        assert 0 <= trial.dropout <= 0.2
        assert trial.alpha == trial.scale * trial.r


def test_trials_share_the_seed_unless_nothing_else_differs():
    assert {t.seed for t in sample_trials(config(seed=7))} == {7}
    assert [t.seed for t in sample_trials(config(3, seed=7, space={}))] == [7, 8, 9]


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"lora.rank": {"choice": [2]}}, "lora.r"),
        ({"train.steps": {"choice": [2]}}, "cannot be swept"),
        ({"lora.r": [2, 4]}, "choice"),
        ({"lora.r": {"choices": [2]}}, "did you mean 'choice'"),
        ({"lora.r": {"choice": []}}, "not empty"),
        ({"lora.r": {"choice": ["two"]}}, "whole number"),
        ({"lora.r": {"choice": [0]}}, "above 0"),
        ({"train.lr": {"loguniform": [0.0, 1.0]}}, "above 0"),
        ({"train.lr": {"uniform": [1.0, 0.1]}}, "higher"),
        ({"train.lr": {"uniform": [1.0]}}, "two bounds"),
        ({"train.schedule": {"uniform": ["cosine", "linear"]}}, "choice"),
        ({"lora.alpha": {"choice": [8]}, "lora.alpha_per_rank": {"choice": [2]}}, "give one"),
    ],
)
def test_a_space_that_makes_no_sense_is_refused(space, said):
    with pytest.raises(ConfigError, match=said):
        sample_trials(config(space=space))


def test_the_settings_as_they_stand_are_one_more_trial():
    from raycap.config import load_config
    from raycap.errors import ConfigError

    base = load_config("shapes-git", ["tune.trials=3", "tune.default_trial=false"])
    more = load_config("shapes-git", ["tune.trials=3"])
    assert sweep_trials(base) == sample_trials(base) == sample_trials(more)
    *sampled, default = sweep_trials(more)
    assert sampled == sample_trials(more) and default.trial_id == DEFAULT
    assert (default.r, default.alpha, default.lr) == (more.lora.r, 2 * more.lora.r, more.train.lr)
    for wrong in ("tune.default_trial=true", "tune.confirm_seeds=3"):
        with pytest.raises(ConfigError, match=r"tune\.space is empty"):
            load_config("shapes-git", ["tune.space={}", "tune.default_trial=false", wrong])
    with pytest.raises(ConfigError, match="confirm_seeds=1"):
        load_config("shapes-git", ["tune.confirm_seeds=1"])
