from __future__ import annotations

import itertools

import numpy as np
import pytest

from raycap.report.effects import first_rung, groups, heat, levels, t95, varied


def trial(name, cider, *, rank=4, lr=1e-3, step=10, later=(), val_loss=1.0):
    curve = [{"step": step, "cider": cider, "val_loss": val_loss}] + [{"step": s, "cider": c} for s, c in later]
    return {"trial_id": name, "rank": rank, "lr": lr, "alpha": 8.0, "scale": 8.0 / rank, "curve": curve}


def test_every_trial_counts_at_the_first_rung_and_only_there():
    trials = [trial("a", 0.1, later=[(30, 9.0)]), trial("b", 0.4), {"trial_id": "c", "curve": []}]
    found = first_rung(trials)
    assert (found.step, found.key, list(found.values), found.missing) == (10, "cider", [0.1, 0.4], 1)
    assert first_rung(trials, "val_loss").key == "val_loss"
    assert first_rung([{"trial_id": "c", "curve": []}]) is None


def test_the_interval_of_a_mean_is_students():
    # Two levels of three: the textbook's pooled interval, t(4) = 2.776.
    scores = np.array([1.0, 2.0, 3.0, 5.0, 6.0, 7.0])
    low, high = levels([1, 1, 1, 2, 2, 2], scores)
    assert (low.mean, high.mean) == (2.0, 6.0)
    assert low.half == high.half == pytest.approx(2.776445 * 1.0 / 3**0.5, rel=1e-3)
    assert [level.half for level in levels(["x", "y"], np.array([1.0, 2.0]))] == [None, None]


@pytest.mark.parametrize(("freedom", "point"), [(1, 12.7062), (3, 3.1824), (5, 2.5706), (10, 2.2281), (100, 1.9840)])
def test_points_of_students_t(freedom, point):
    assert t95(freedom) == pytest.approx(point, rel=2e-3)


def test_intervals_hold_what_they_promise():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(2_000):
        level = levels([0] * 4 + [1] * 4, rng.normal(size=8))[0]
        inside += abs(level.mean) <= level.half
    assert 0.93 < inside / 2_000 < 0.97


def test_many_values_become_ranges_of_like_size():
    values = [10.0 ** -(1 + n / 7) for n in range(24)]
    found = groups(values)
    assert [len(rows) for *_, rows in found] == [6, 6, 6, 6]
    assert sorted(r for *_, rows in found for r in rows) == list(range(24))
    assert all(a[2] < b[1] for a, b in itertools.pairwise(found))
    assert [label for label, *_ in groups([8, 2, 32, 2])] == ["2", "8", "32"]
    assert [label for label, *_ in groups([["q", "v"], ["q"]])] == ["q", "q v"]


def test_the_space_names_what_was_swept():
    trials = [trial("a", 0.1, rank=4), trial("b", 0.2, rank=8, lr=2e-3)]
    assert varied(trials, ["lora.r", "train.lr"]) == ["lr", "rank"]  # the scale only follows
    assert varied(trials) == ["lr", "rank", "scale"]
    assert varied(trials[:1], ["lora.r"]) == []


def test_a_cell_is_the_mean_of_its_trials():
    trials = [trial("a", 0.2, rank=4), trial("b", 0.4, rank=4), trial("c", 1.0, rank=8, lr=1e-2)]
    found = heat(first_rung(trials))
    assert (found.rows, found.count) == (["4", "8"], [[2, 0], [0, 1]])
    assert found.mean[0][0] == pytest.approx(0.3) and found.mean[0][1] is None and found.mean[1][1] == 1.0
    assert heat(first_rung(trials[:2])) is None
