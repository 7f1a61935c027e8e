"""Settings over seeds, the set that holds the best, BLEU from summed counts: each keeps what it promises in simulation."""

from __future__ import annotations

import time

import numpy as np
import pytest

from raycap.errors import DataError
from raycap.evaluate.comparisons import (
    bleu_bootstrap,
    holm,
    not_separable,
    setting_bootstrap,
)
from raycap.evaluate.overlap import bleu_of, bleu_statistics
from raycap.evaluate.significance import paired_bootstrap


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9]) == [0.9]
    assert holm([0.6, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def seeds_of(rng, seeds, images, spread, mean=0.0):
    """Scores [S, N]: seeds lie `spread` apart, images 1, and each seed differs a little on each image."""
    return mean + rng.normal(0, spread, (seeds, 1)) + rng.normal(0, 1, images) + rng.normal(0, 0.3, (seeds, images))


@pytest.mark.parametrize("spread", [0.02, 0.3])
def test_a_setting_verdict_keeps_its_level_with_three_seeds(spread):
    """No setting is better: at most 5 % (+ 3 % of chance in 300) are called so, whether seeds or images vary more."""
    rng = np.random.default_rng(0)
    images = rng.normal(0, 1, 60)
    called = 0
    for run in range(300):
        a, b = (rng.normal(0, spread, (3, 1)) + images + rng.normal(0, 0.5, (3, 60)) for _ in range(2))
        called += setting_bootstrap(a, b, resamples=500, seed=run).p <= 0.05
    assert called / 300 <= 0.08


def test_images_alone_would_call_a_setting_better_by_luck_of_the_seed():
    """Why seeds are needed: one adapter against one, where adapters of one setting differ, errs far too often."""
    rng = np.random.default_rng(1)
    images = rng.normal(0, 1, 200)
    called = 0
    for run in range(100):
        a, b = (rng.normal(0, 0.3) + images + rng.normal(0, 0.5, 200) for _ in range(2))
        called += paired_bootstrap(a, b, resamples=300, seed=run).p <= 0.05
    assert called > 50


def test_a_clear_setting_is_found():
    rng = np.random.default_rng(2)
    a = seeds_of(rng, 3, 200, 0.05)
    verdict = setting_bootstrap(a, a[::-1] + 1.0, np.arange(200) // 2, names=("rank 8", "rank 16"))
    assert verdict.low > 0 and verdict.p < 0.05 and verdict.groups == 100
    assert verdict.sentence.startswith("rank 16 is better: CIDEr +1.000 [")
    turned = setting_bootstrap(a[::-1] + 1.0, a, np.arange(200) // 2)
    assert turned.difference == pytest.approx(-verdict.difference)


def test_settings_need_seeds_and_the_same_images():
    one = np.zeros((1, 5))
    with pytest.raises(DataError, match="at least 2 seeds"):
        setting_bootstrap(one, np.zeros((3, 5)))
    with pytest.raises(DataError, match="5 and 6"):
        setting_bootstrap(np.zeros((2, 5)), np.zeros((2, 6)))
    with pytest.raises(DataError, match="1 of 2 images"):
        setting_bootstrap([[0.0, np.nan], [0, 1]], [[0, 1], [0, 1]])
    with pytest.raises(DataError, match="different numbers"):
        setting_bootstrap([[0.0], [0, 1]], [[0, 1], [0, 1]])


def test_the_best_stays_in_the_set():
    """Ten trials, equally good: the one that is best by a hair must stay in, 95 of 100 times; few leave at all."""
    rng = np.random.default_rng(3)
    left = 0
    for run in range(200):
        images = rng.normal(0, 1, 60)
        scores = {f"t{k}": images + rng.normal(0, 0.5, 60) for k in range(10)}
        left += "t0" not in not_separable(scores, resamples=300, seed=run).together
    assert left / 200 <= 0.08


def test_clear_losers_leave_and_equals_stay():
    rng = np.random.default_rng(4)
    images = rng.normal(0, 1, 100)
    noise = [n - n.mean() for n in rng.normal(0, 0.3, (4, 100))]  # so that the gaps are what they say
    scores = {
        "bad": images - 2 + noise[0], "best": images + 0.1 + noise[1], "close": images + 0.08 + noise[2],
        "middle": images - 0.5 + noise[3],
    }  # fmt: skip
    scores["twin"] = scores["best"] - 0.0
    found = not_separable(scores, np.arange(100) // 2, resamples=2000)
    assert found.best == "best" and set(found.together) == {"best", "close", "twin"}
    assert found.together[0] == found.best
    assert found.p["bad"] < 0.01 and found.p["middle"] < 0.01 and found.p["close"] > 0.05
    assert not_separable({"only": [1.0, 2.0]}).together == ["only"]
    same = not_separable({"a": [1.0, 2.0, 3.0], "b": [1.0, 2.0, 3.0]}, resamples=100)
    assert same.together == ["a", "b"]
    with pytest.raises(DataError, match="no trial"):
        not_separable({})


CAPTIONS = ["a dog runs on the grass", "two cats sleep", "", "a red car on a road in the rain"]
OTHERS = ["a dog is running", "two cats sleep on a bed", "a man", "a car"]
REFERENCES = [
    ["a dog runs on green grass", "the dog"],
    ["two cats sleep on a sofa"],
    ["a man eats"],
    ["a red car", "car"],
]


def test_bleu_as_pycocoevalcap():
    from pycocoevalcap.bleu.bleu import Bleu

    for captions in (CAPTIONS, OTHERS):
        wanted, each = Bleu(4).compute_score(
            dict(enumerate(REFERENCES)), {n: [c] for n, c in enumerate(captions)}, verbose=0
        )
        statistics = bleu_statistics(captions, REFERENCES)
        assert bleu_of(statistics.sum(axis=0)[None])[0] == pytest.approx(wanted, abs=1e-9)
        assert bleu_of(statistics[3:])[0] == pytest.approx([e[3] for e in each], rel=1e-6, abs=1e-12)


def test_bleu_verdict_is_of_the_corpus_score():
    many = 25
    a, b, references = CAPTIONS * many, OTHERS * many, REFERENCES * many
    verdict = bleu_bootstrap(a, b, references, order=1, resamples=500, names=("x", "y"))
    whole = [bleu_of(bleu_statistics(c, references).sum(axis=0)[None])[0, 0] for c in (a, b)]
    assert verdict.difference == pytest.approx(whole[1] - whole[0])
    assert verdict.low < verdict.difference < verdict.high and "BLEU-1" in verdict.sentence
    assert bleu_bootstrap(a, a, references, resamples=100).p == 1


def test_speed():
    rng = np.random.default_rng(5)
    began = time.process_time()
    not_separable({f"t{k}": rng.normal(size=512) for k in range(24)}, resamples=10_000)
    setting_bootstrap(rng.normal(size=(3, 512)), rng.normal(size=(3, 512)), resamples=10_000)
    assert time.process_time() - began < 10
