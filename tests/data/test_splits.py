from collections import Counter

import pytest

from raycap.data.splits import assign_splits, draw_splits, fill_missing, resampling_groups
from raycap.errors import DataError

SHARES = (0.8, 0.1, 0.1)


@pytest.mark.parametrize(("count", "wanted"), [(700, (560, 70, 70)), (10, (8, 1, 1)), (5, (3, 1, 1)), (3, (1, 1, 1))])
def test_shares_are_met(count, wanted):
    counts = Counter(draw_splits([f"g{i}" for i in range(count)], SHARES, seed=0).values())
    assert (counts["train"], counts["val"], counts["test"]) == wanted


def test_drawn_by_seed_and_not_by_order():
    groups = [f"g{i}" for i in range(200)]
    drawn = draw_splits(groups, SHARES, seed=5)
    assert draw_splits(groups[::-1], SHARES, seed=5) == drawn
    assert draw_splits(groups, SHARES, seed=6) != drawn


def test_more_rows_move_few_of_the_old():
    old = draw_splits([f"g{i}" for i in range(1000)], SHARES, seed=5)
    new = draw_splits([f"g{i}" for i in range(1010)], SHARES, seed=5)
    assert sum(old[g] != new[g] for g in old) < 30


def test_groups_stay_whole_and_a_huge_one_goes_to_train():
    groups = ["huge"] * 90 + [f"s{i % 5}" for i in range(10)]
    for seed in range(20):
        drawn = draw_splits(groups, SHARES, seed)
        assert drawn["huge"] == "train" and set(drawn.values()) == {"train", "val", "test"}


def test_a_share_of_nothing_gets_nothing():
    assert set(draw_splits([f"g{i}" for i in range(50)], (0.5, 0.5, 0.0), seed=0).values()) == {"train", "val"}


def test_official_splits_stand_and_their_groups_follow():
    rows = [("a", "s1", "test"), ("b", "s1", ""), ("c", "", "train"), *((f"x{i}", "", "") for i in range(10))]
    splits = assign_splits(rows, SHARES, seed=0)
    assert splits[:3] == ["test", "test", "train"]
    assert Counter(splits[3:]) == {"train": 8, "val": 1, "test": 1}


def test_a_group_never_bears_an_image_id_of_another():
    rows = [("a", "b", ""), ("b", "", ""), *((f"x{i}", "", "") for i in range(30))]
    drawn = {assign_splits(rows, SHARES, seed)[0] == assign_splits(rows, SHARES, seed)[1] for seed in range(40)}
    assert drawn == {True, False}  # row "b" is not of group "b"


def test_rows_that_say_the_same_are_resampled_together():
    rows = [
        ("a", "", ["A plane .", "one plane"]),
        ("b", "", ["one plane", "a plane"]),
        ("c", "", ["one plane"]),
        ("d", "s", ["other"]),
        ("e", "s", ["words"]),
        ("f", "", ["words"]),
    ]
    assert resampling_groups(rows, ["test"] * 6) == ["a", "a", "c", "s", "s", "s"]


def test_resampling_groups_do_not_cross_splits():
    rows = [("a", "", ["same"]), ("b", "", ["same"]), ("c", "", ["same"])]
    assert resampling_groups(rows, ["train", "test", "test"]) == ["a", "b", "b"]


def test_counts_take_that_many_rows_and_leave_the_rest():
    groups = [f"g{i}" for i in range(833)]
    drawn = draw_splits(groups, (560, 70, 70), seed=0)
    assert Counter(drawn.values()) == {"train": 560, "val": 70, "test": 70, "": 133}
    assert draw_splits(groups[::-1], (560, 70, 70), seed=0) == drawn != draw_splits(groups, (560, 70, 70), seed=1)
    with pytest.raises(DataError, match=r"asks for 700 rows, and 600 rows"):
        draw_splits(groups[:600], (560, 70, 70), seed=0)


def test_counts_keep_groups_whole():
    groups = [f"g{i // 3}" for i in range(60)]
    drawn = draw_splits(groups, (30, 9, 10), seed=0)
    assert Counter(drawn[g] for g in groups) == {"train": 30, "val": 9, "test": 9, "": 12}


def test_a_missing_test_is_half_of_val():
    rows = [(f"i{i}", f"s{i // 2}" if i >= 20 else "") for i in range(60)]
    splits = ["train"] * 20 + ["val"] * 40
    found = fill_missing(rows, splits, SHARES, seed=0)
    assert found[:20] == ["train"] * 20 and Counter(found) == {"train": 20, "val": 20, "test": 20}
    assert all(found[i] == found[i + 1] for i in range(20, 60, 2))  # by whole groups
    assert fill_missing(rows, splits, SHARES, seed=0) == found != fill_missing(rows, splits, SHARES, seed=1)


def test_a_missing_val_comes_from_train():
    rows = [(f"i{i}", "") for i in range(100)]
    found = fill_missing(rows, ["train"] * 90 + ["test"] * 10, (0.8, 0.1, 0.1), seed=0)
    assert Counter(found) == {"train": 80, "val": 10, "test": 10} and found[90:] == ["test"] * 10
    assert Counter(fill_missing(rows, ["train"] * 100, (0.8, 0.1, 0.1), seed=0)) == {"train": 80, "val": 10, "test": 10}
