"""tune.memory_limit_bytes: which trials it rules out, and that a trial that it rules out is trained and does not win."""

from __future__ import annotations

import pytest

from raycap.config import load_config
from raycap.errors import ConfigError, RunError
from raycap.pipeline.verdicts import ranked
from raycap.train.record import TrialRecord
from raycap.trial import trial_spec
from raycap.tune.memory import over_limit, trial_memory
from raycap.tune.sweep import _result

MEMORY = {"t00": 4_000_000_000, "t01": 3_000_000_000, "t02": 2_000_000_000}


def settings(limit):
    return load_config("shapes-git", [f"tune.memory_limit_bytes={limit}"])


def test_trials_above_the_limit_are_told_with_both_figures():
    found = over_limit(settings("3e9"), MEMORY)
    assert list(found) == ["t00"] and "4.00 GB" in found["t00"] and "3.00" in found["t00"]
    assert over_limit(settings(0), MEMORY) == {}


def test_a_limit_that_nothing_meets_is_an_error_that_names_the_smallest():
    with pytest.raises(ConfigError, match="t02, the smallest, would take 2000000000"):
        over_limit(settings("1e9"), MEMORY)
    with pytest.raises(ConfigError, match="memory_limit_bytes=-1"):
        settings(-1)


def records():
    found = []
    for n, cider in enumerate((1.5, 1.0, 0.5)):
        record = TrialRecord.of(trial_spec(load_config("shapes-git"), f"t0{n}"))
        record.state, record.cider = "finished", cider
        found.append(record)
    return found


def test_the_best_is_the_best_of_those_that_may_win(tmp_path):
    ruled_out = over_limit(settings("3e9"), MEMORY)
    found = _result(records(), tmp_path, settings("3e9"), {}, 0.0, False, [], ruled_out)
    assert found.best == "t01" and "t00" in found.adapters, "it is scored, and shown"
    assert "cannot win" in found.trials[0].reason and found.trials[1].reason == ""
    assert ranked(found, "cider") == ["t01", "t02"]


def test_a_sweep_in_which_nobody_may_win_says_so(tmp_path):
    with pytest.raises(RunError, match="memory_limit_bytes"):
        _result(records(), tmp_path, settings("3e9"), {}, 0.0, False, [], dict.fromkeys(MEMORY, "too large"))


def test_a_trial_of_higher_rank_takes_more():
    config = load_config("shapes-git", ["tune.space={lora.r: {choice: [2, 32]}}", "tune.trials=4", "decode.batch=8"])
    found = trial_memory(config.to_dict())
    ranks = {2: set(), 32: set()}
    from raycap.tune.space import sweep_trials

    for spec in sweep_trials(config):
        if spec.trial_id != "default":
            ranks[spec.r].add(found[spec.trial_id])
    assert len(ranks[2]) == len(ranks[32]) == 1 and ranks[2].pop() < ranks[32].pop()
