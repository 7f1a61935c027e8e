import numpy as np
import pytest

from raycap.data.order import SampleOrder, samples, seeded_permutation
from raycap.errors import DataError


@pytest.mark.parametrize(("count", "batch"), [(100, 16), (16, 16), (7, 16), (1, 3), (50, 1)])
def test_every_sample_once_an_epoch(count, batch):
    order = SampleOrder(count, batch, seed=3)
    steps = -(-3 * count // batch)
    seen = np.concatenate([order.rows(s) for s in range(steps)])[: 3 * count].reshape(3, count)
    for epoch in seen:
        assert sorted(epoch) == list(range(count))
    if count > 4:
        assert not np.array_equal(seen[0], seen[1])


def test_a_step_depends_on_seed_and_step_alone():
    forwards, backwards = SampleOrder(37, 8, seed=1), SampleOrder(37, 8, seed=1)
    late = [backwards.rows(s) for s in reversed(range(40))][::-1]
    for step in range(40):
        assert np.array_equal(forwards.rows(step), late[step])
        assert np.array_equal(SampleOrder(37, 8, seed=1).rows(step), late[step])
    assert not np.array_equal(SampleOrder(37, 8, seed=2).rows(0), late[0])


@pytest.mark.parametrize("key", [(0, 0), (7, 3), (-1, 2**40)])
def test_the_order_is_the_published_hash(key):
    # On every machine and under every numpy: a change here changes each run that is resumed or compared.
    def splitmix64(value):
        mask = 2**64 - 1
        z = (value + 0x9E3779B97F4A7C15) & mask
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)

    state = 0x9E3779B97F4A7C15
    for part in key:
        state = splitmix64(state ^ (part % 2**64))
    assert seeded_permutation(100, *key).tolist() == sorted(range(100), key=lambda i: splitmix64(i ^ state))


def test_permutations_look_random():
    first = np.array([seeded_permutation(50, seed, epoch)[0] for seed in range(40) for epoch in range(40)])
    counts = np.bincount(first, minlength=50)
    chi2 = ((counts - 32) ** 2 / 32).sum()
    assert chi2 < 90  # 49 degrees of freedom: 85 at p = .001
    assert abs(np.corrcoef(seeded_permutation(5000, 1, 1), np.arange(5000))[0, 1]) < 0.05
    assert abs(np.corrcoef(seeded_permutation(5000, 1, 1), seeded_permutation(5000, 1, 2))[0, 1]) < 0.05


def test_samples():
    assert samples(np.array([2, 1, 3]), "all").tolist() == [[0, 0], [0, 1], [1, 0], [2, 0], [2, 1], [2, 2]]
    assert samples(np.array([2, 1, 3]), "first").tolist() == [[0, 0], [1, 0], [2, 0]]
    with pytest.raises(DataError, match="best"):
        samples(np.array([1]), "best")


def test_an_empty_order_is_refused():
    with pytest.raises(DataError, match="0 samples"):
        SampleOrder(0, 4, 0)
