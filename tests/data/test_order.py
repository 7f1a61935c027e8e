import numpy as np
import pytest

from raycap.data.order import CHOICES, SampleOrder, Sampler, WindowOrder, keyed_uniform, samples, seeded_permutation
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


COUNTS = np.array([3, 1, 5, 2, 4, 5, 5])
SCORES = keyed_uniform(np.arange(COUNTS.sum()), 5)
BEST = np.array([int(np.argmax(part)) for part in np.split(SCORES, np.cumsum(COUNTS)[:-1])])


def sampler(choice, batch=3, seed=7):
    return Sampler(COUNTS, choice, batch, seed, clip_scores=SCORES, selected=BEST)


def by_epoch(one, epochs):
    """epoch -> {image row: caption}, of a choice that has each image once an epoch."""
    steps = -(-epochs * len(COUNTS) // one.order.batch)
    pairs = np.concatenate([one.pairs(s) for s in range(steps)])[: epochs * len(COUNTS)]
    return [dict(part.tolist()) for part in pairs.reshape(epochs, len(COUNTS), 2)]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_image_once_an_epoch_under_every_choice(choice):
    one = sampler(choice)
    if choice == "all":
        pairs = np.concatenate([one.pairs(s) for s in range(9)])[: COUNTS.sum()]
        assert sorted(map(tuple, pairs.tolist())) == sorted(map(tuple, samples(COUNTS, "all").tolist()))
        return
    for epoch in by_epoch(one, 5):
        assert sorted(epoch) == list(range(len(COUNTS)))
        assert all(0 <= caption < COUNTS[row] for row, caption in epoch.items())


@pytest.mark.parametrize("choice", ["random-per-epoch", "weighted-clipscore"])
def test_the_caption_depends_on_seed_epoch_and_image_alone(choice):
    small, large = by_epoch(sampler(choice, batch=2), 6), by_epoch(sampler(choice, batch=5), 6)
    assert small == large
    again = sampler(choice, batch=2)
    assert [again.pairs(s).tolist() for s in reversed(range(20))][::-1] == [
        sampler(choice, batch=2).pairs(s).tolist() for s in range(20)
    ]
    assert by_epoch(sampler(choice, seed=8), 6) != small
    assert any(small[0][row] != small[1][row] for row in small[0])


def test_best_and_first_and_the_images_they_share():
    assert by_epoch(sampler("best-clipscore"), 1)[0] == dict(enumerate(BEST.tolist()))
    assert set(by_epoch(sampler("first"), 1)[0].values()) == {0}
    for step in range(6):
        rows = [sampler(choice).pairs(step)[:, 0].tolist() for choice in CHOICES if choice != "all"]
        assert all(r == rows[0] for r in rows)


def test_weights_are_the_scores():
    one = Sampler([3, 2], "weighted-clipscore", 2, 0, clip_scores=[0.6, 0.0, 0.2, 0.0, 0.0], selected=[0, 0])
    drawn = np.zeros((2, 3))
    for step in range(4000):
        for row, caption in one.pairs(step):
            drawn[row, caption] += 1
    assert drawn.sum() == 8000 and drawn[0, 1] == 0
    assert drawn[0, 0] / 4000 == pytest.approx(0.75, abs=0.03)
    assert drawn[1, 0] / 4000 == pytest.approx(0.5, abs=0.03)  # no score at all: evenly
    counts = np.bincount([int(u * 10) for u in keyed_uniform(np.arange(5000), 1, 2)], minlength=10)
    assert ((counts - 500) ** 2 / 500).sum() < 28  # 9 degrees of freedom: 27.9 at p = .001


def test_a_choice_by_scores_needs_them():
    with pytest.raises(DataError, match="prepare the source again"):
        Sampler(COUNTS, "best-clipscore", 2, 0)
    with pytest.raises(DataError, match="frist is unknown"):
        Sampler(COUNTS, "frist", 2, 0)


GROUPS = np.repeat(np.arange(9), [8, 8, 8, 3, 8, 8, 8, 8, 2])


def test_in_windows_every_sample_once_an_epoch_and_few_groups_at_a_time():
    order, count = WindowOrder(GROUPS, 4, 5, window=2), len(GROUPS)
    seen = np.concatenate([order.rows(s) for s in range(3 * count // 4 + 1)])[: 3 * count].reshape(3, count)
    for epoch in seen:
        assert sorted(epoch) == list(range(count))
        blocks = GROUPS[epoch]
        first = {g: i for i, g in reversed(list(enumerate(blocks)))}
        last = {g: i for i, g in enumerate(blocks)}
        assert all(sum(first[g] <= i <= last[g] for g in first) <= 2 for i in range(count))
        assert any(blocks[i] != blocks[i + 1] for i in range(6))  # shuffled inside a window
    assert not np.array_equal(GROUPS[seen[0]], GROUPS[seen[1]])
    for step in (0, 7, 15, 16, 31):
        again = WindowOrder(GROUPS, 4, 5, window=2)
        assert np.array_equal(again.rows(step), order.rows(step))
        ahead = again.ahead(step)
        assert set(GROUPS[order.rows(step)]) <= set(ahead) and len(ahead) <= 4


def test_in_windows_choices_share_their_images():
    counts, groups = np.array([3, 1, 5, 2, 4, 5, 5]), np.array([0, 0, 1, 1, 2, 2, 2])
    options = {"clip_scores": SCORES, "selected": BEST, "row_groups": groups, "window_groups": 1}
    rows = [Sampler(counts, c, 3, 7, **options).pairs(4)[:, 0].tolist() for c in CHOICES if c != "all"]
    assert all(r == rows[0] for r in rows)
    one = Sampler(counts, "all", 5, 7, **options)
    epoch = np.concatenate([one.pairs(s) for s in range(5)])
    assert sorted(map(tuple, epoch.tolist())) == sorted(map(tuple, samples(counts, "all").tolist()))
    assert (np.diff(groups[epoch[:, 0]]) != 0).sum() == 2


@pytest.mark.parametrize(("count", "batch", "workers"), [(50, 12, 3), (37, 8, 2), (10, 16, 4)])
def test_workers_that_take_every_nth_row_of_a_step_share_an_epoch(count, batch, workers):
    """A step is a function of seed and step alone, so each worker works its share out; together they see what one sees."""
    orders = [SampleOrder(count, batch, 7) for _ in range(workers)]
    alone, epochs, steps = SampleOrder(count, batch, 7), 3, -(-3 * count // batch)
    seen = []
    for step in range(steps):
        shares = [order.rows(step)[rank::workers] for rank, order in enumerate(orders)]
        assert sorted(np.concatenate(shares)) == sorted(alone.rows(step))
        together = np.empty(batch, dtype=np.int64)
        for rank, share in enumerate(shares):
            together[rank::workers] = share
        seen += together.tolist()
    for epoch in range(epochs):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))
