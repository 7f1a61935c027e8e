"""Paired bootstrap: its interval covers, its p-value keeps its promise, its sentence says what it may say."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from raycap.errors import DataError
from raycap.evaluate.significance import images_needed, paired_bootstrap, standard_error


def simulated(rng, groups, effect, per_group=3):
    """Scores of A and B whose differences share a part within each group; (a, b, group of each image)."""
    index = np.repeat(np.arange(groups), per_group)
    shared = rng.normal(0, 1, groups)[index]
    a = rng.gamma(2.0, 0.5, len(index))
    return a, a + effect + shared + rng.normal(0, 0.5, len(index)), index


def test_interval_covers_and_p_value_holds():
    """Over 400 simulated comparisons with 95 % intervals: 95 % +- 3 % of them cover, 5 % +- 3 % call no difference one."""
    rng = np.random.default_rng(1)
    covered = called = 0
    for run in range(400):
        a, b, groups = simulated(rng, 80, effect=0.0)
        verdict = paired_bootstrap(a, b, groups, resamples=400, seed=run)
        covered += verdict.low <= 0 <= verdict.high
        called += verdict.p <= 0.05
    assert 0.92 <= covered / 400 <= 0.98
    assert 0.02 <= called / 400 <= 0.08


def test_groups_matter():
    """Images of a group taken for independent ones give far too narrow an interval."""
    rng = np.random.default_rng(2)
    a, b, groups = simulated(rng, 40, effect=0.0, per_group=10)
    honest, naive = paired_bootstrap(a, b, groups), paired_bootstrap(a, b)
    assert (honest.high - honest.low) > 2 * (naive.high - naive.low)
    assert honest.groups == 40 and naive.groups == 400 and honest.images == 400


def test_groups_of_unlike_size_and_any_kind():
    a = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    b = np.array([1.0, 1.0, 1.0, 1.0, 1.0, 2.0])
    verdict = paired_bootstrap(a, b, ["x", "x", "x", "x", ("y", 1), None])
    assert verdict.difference == pytest.approx(7 / 6)
    assert 1.0 <= verdict.low <= verdict.high <= 2.0


def test_clear_difference():
    rng = np.random.default_rng(3)
    a = rng.gamma(2.0, 0.5, 300)
    verdict = paired_bootstrap(a, a + rng.normal(0.1, 0.2, 300), resamples=1000)
    assert verdict.low > 0
    assert verdict.p == pytest.approx(1 / 1001)
    assert verdict.sentence == f"B is better: CIDEr {verdict.difference:+.3f} [{verdict.low:.3f}, {verdict.high:.3f}]"
    turned = paired_bootstrap(a + 0.1, a + rng.normal(0, 0.01, 300), names=("rank 8", "rank 16"), metric="BLEU-4")
    assert turned.sentence.startswith("rank 16 is worse: BLEU-4 -0.09")


def test_no_difference_says_how_many_images():
    rng = np.random.default_rng(4)
    d = rng.normal(0, 1, 100)
    d += 0.1 - d.mean()
    verdict = paired_bootstrap(np.zeros(100), d)
    assert verdict.low < 0 < verdict.high and verdict.p > 0.05
    assert "cannot be told apart at this size: CIDEr +0.100 [" in verdict.sentence
    # (1.96 + .84)^2 * variance / difference^2 = 785 for variance 1
    needed = int(verdict.sentence.split("about ")[1].split(" images")[0].replace(",", ""))
    assert 500 <= needed <= 1200


def test_images_needed():
    assert images_needed(0.1, 0.1, 100) == 790
    assert images_needed(0.0, 0.1, 100) is None
    assert images_needed(1e-6, 0.1, 100) is None
    assert images_needed(1.0, 0.1, 100) == 101  # never fewer than there are, where these were not enough


def test_equal_scores():
    same = np.arange(10.0)
    verdict = paired_bootstrap(same, same)
    assert (verdict.difference, verdict.low, verdict.high, verdict.p) == (0, 0, 0, 1)
    assert verdict.sentence == "A and B score the same on every image"


def test_one_group_gives_no_verdict():
    verdict = paired_bootstrap([0.0, 0.1], [1.0, 1.2], ["study", "study"])
    assert verdict.p == 1 and math.isinf(verdict.low)
    assert "one group" in verdict.sentence


def test_seed_decides():
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=50), rng.normal(size=50)
    assert paired_bootstrap(a, b, seed=1) == paired_bootstrap(a, b, seed=1)
    assert paired_bootstrap(a, b, seed=1).low != paired_bootstrap(a, b, seed=2).low


def test_swapping_the_two_turns_the_sign():
    rng = np.random.default_rng(6)
    a, b = rng.normal(size=50), rng.normal(size=50)
    one, other = paired_bootstrap(a, b), paired_bootstrap(b, a)
    assert (one.difference, one.low, one.high) == pytest.approx((-other.difference, -other.high, -other.low))
    assert one.p == other.p


def test_ten_thousand_resamples_of_five_thousand_images():
    rng = np.random.default_rng(7)
    a, b = rng.normal(size=5000), rng.normal(size=5000)
    for groups in (None, np.arange(5000) // 2):
        began = time.process_time()
        paired_bootstrap(a, b, groups, resamples=10_000)
        assert time.process_time() - began < 10


def test_misuse():
    with pytest.raises(DataError, match="same images"):
        paired_bootstrap([1.0], [1.0, 2.0])
    with pytest.raises(DataError, match="at least one"):
        paired_bootstrap([], [])
    with pytest.raises(DataError, match="1 of 2 images"):
        paired_bootstrap([1.0, math.nan], [1.0, 2.0])
    with pytest.raises(DataError, match="1 groups for 2"):
        paired_bootstrap([1.0, 2.0], [1.0, 2.0], ["a"])
    with pytest.raises(DataError, match="resamples=0"):
        paired_bootstrap([1.0, 2.0], [1.0, 2.0], resamples=0)


def test_standard_error():
    rng = np.random.default_rng(8)
    values = rng.normal(size=400)
    assert standard_error(values) == pytest.approx(values.std(ddof=1) / 20)
    assert standard_error(values, np.arange(400)) == pytest.approx(standard_error(values))
    # Each value four times over in one group: as many groups, the same error.
    assert standard_error(np.repeat(values, 4), np.repeat(np.arange(400), 4)) == pytest.approx(standard_error(values))
    assert math.isnan(standard_error([])) and math.isnan(standard_error([1.0]))
    assert math.isnan(standard_error([1.0, 2.0], ["a", "a"]))


def test_standard_error_is_that_of_the_bootstrap():
    rng = np.random.default_rng(9)
    a, b, groups = simulated(rng, 200, effect=0.2)
    verdict = paired_bootstrap(a, b, groups)
    assert (verdict.high - verdict.low) / 3.92 == pytest.approx(standard_error(b - a, groups), rel=0.05)
