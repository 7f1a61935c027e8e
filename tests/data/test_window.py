"""A set larger than its disk: the same rows in a bounded file, each group read once an epoch."""

import threading

import numpy as np
import pytest

from raycap.data.order import Sampler
from raycap.data.parquet import open_shards
from raycap.data.shards import prepare
from raycap.data.store import Store
from raycap.data.stream import fill, local_batches, local_reader, ray_reader
from raycap.data.window import WindowStore, open_store, room_for
from raycap.errors import ConfigError, DataError

SHAPE, GROUP_BYTES = (3, 64, 64), 64 * 3 * 64 * 64


@pytest.fixture
def shards(settings, make_set, tmp_path):
    lines = [
        {"image": f"{i}.png", "captions": [f"c {i}", "x" * (i % 30 + 1)][: 1 + i % 2], "split": "train"}
        for i in range(600)
    ]
    lines += [{"image": f"{s}.png", "captions": [s], "split": s} for s in ("val", "test")]
    prepare(settings(make_set(lines), rows_per_shard=100), tmp_path / "out")
    return open_shards(tmp_path / "out")


@pytest.fixture
def whole(shards, prepare_row, tmp_path):
    store = Store.for_shards(shards, "train", tmp_path / "whole", SHAPE, 40)
    return fill(store, local_batches(shards.folder, "train", prepare_row))


@pytest.fixture
def window(shards, prepare_row, tmp_path):
    made = []

    def make(groups=4, read=None):
        read = read or local_reader(prepare_row)
        made.append(WindowStore(shards, "train", tmp_path / "cache", SHAPE, read, groups * GROUP_BYTES))
        return made[-1]

    yield make
    for store in made:
        store.close()


def same(window, whole, pairs):
    rows = pairs[:, 0]
    window.wait(rows)
    assert np.array_equal(window.pixels(rows), whole.pixels(rows))
    assert all(np.array_equal(a, b) for a, b in zip(window.tokens(pairs), whole.tokens(pairs), strict=True))
    assert window.token_lens(pairs).tolist() == whole.token_lens(pairs).tolist()
    assert window.prompt_lens(pairs).tolist() == whole.prompt_lens(pairs).tolist()


def sampler(store, batch=16, captions="first"):
    options = {"row_groups": store.row_groups, "window_groups": store.window_groups}
    return Sampler(store.captions_per_image, captions, batch, 3, **options)


def test_an_epoch_reads_each_group_once(window, whole, tmp_path):
    store = window(4)
    assert (store.capacity, store.window_groups, len(np.unique(store.row_groups))) == (4, 2, 12)
    assert store.image_ids == whole.image_ids and store.references == whole.references and store.groups == whole.groups
    assert not list((tmp_path / "cache" / "store").iterdir())  # its file has no name
    order, seen = sampler(store), []
    for step in range(600 // 16):
        store.plan(order.order.ahead(step))
        pairs = order.pairs(step)
        same(store, whole, pairs)
        seen += pairs[:, 0].tolist()
        assert len(store._places) <= 4
    assert len(set(seen)) == len(seen) == 592
    # 12 groups of this epoch, and what was read ahead of the next.
    assert 12 <= store.groups_read <= 14


def test_a_restart_reads_what_its_step_needs_and_no_more(window, whole):
    store = window(4)
    order = sampler(store)
    step = 25
    store.plan(order.order.ahead(step))
    same(store, whole, order.pairs(step))
    assert store.groups_read <= 4


def test_trials_at_different_steps_are_served_too(window, whole):
    store = window(3)
    order = sampler(store, captions="all")
    for step in (0, 30, 1, 31, 2, 32):
        store.plan(order.order.ahead(step))
        same(store, whole, order.pairs(step))


def test_rows_that_span_more_groups_than_fit(window, whole):
    store = window(2)
    rows = np.arange(0, 600, 7)
    assert np.array_equal(store.pixels(rows), whole.pixels(rows))
    pairs = np.stack([rows, rows % 2 * 0], axis=1)
    assert store.token_lens(pairs).tolist() == whole.token_lens(pairs).tolist()
    with pytest.raises(DataError, match=r"span 12 row groups, 2 fit into run\.store_gb"):
        store.wait(rows)
    with pytest.raises(DataError, match="a caption that its image does not have"):
        store.tokens(np.array([[0, 1]]))


def test_several_threads_read_at_once(window, whole):
    store, errors = window(3), []

    def work(seed):
        rng = np.random.default_rng(seed)
        try:
            for _ in range(6):
                rows = rng.integers(0, 600, 5)
                assert np.array_equal(store.pixels(rows), whole.pixels(rows))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors and not any(t.is_alive() for t in threads)


def test_an_error_of_the_reading_reaches_the_loop(window):
    def broken(groups):
        raise DataError("shard 7 is damaged")

    with pytest.raises(DataError, match="shard 7 is damaged"):
        window(4, broken).wait([3], timeout_s=10)
    with pytest.raises(DataError, match="never came"):
        window(4, lambda groups: []).wait([3], timeout_s=10)


def test_a_disk_without_room_for_two_groups_is_refused(window):
    with pytest.raises(ConfigError, match=r"run\.store_gb: .* two row groups"):
        window(1)


def test_a_set_that_fits_is_stored_and_a_larger_one_read_in_windows(shards, prepare_row, tmp_path):
    def opened(split, gb, cache="cache"):
        read = local_reader(prepare_row)
        return open_store(shards, split, tmp_path / cache, SHAPE, 40, read=read, limit_bytes=int(gb * 1e9))

    assert isinstance(opened("train", 0), Store)
    assert isinstance(opened("train", 0.02), Store)
    small = opened("train", 4.2 * GROUP_BYTES / 1e9, "other")
    assert isinstance(small, WindowStore) and small.capacity == 2
    small.close()


def test_stores_not_used_for_longest_make_room(tmp_path):
    import os

    for age, name in enumerate(("new", "old", "older")):
        folder = tmp_path / "store" / name
        folder.mkdir(parents=True)
        (folder / "pixels.npy").write_bytes(bytes(1000))
        (folder / "manifest.json").write_text("{}")
        (folder / ".lock").touch()
        os.utime(folder / ".lock", (1000 - age, 1000 - age))
    mine = tmp_path / "store" / "mine"
    assert room_for(tmp_path, mine, 1500, 10_000)
    assert room_for(tmp_path, mine, 1500, 3_000)
    assert sorted(p.name for p in (tmp_path / "store").iterdir()) == ["new"]
    assert not room_for(tmp_path, mine, 5_000, 3_000)
    assert (tmp_path / "store" / "new").is_dir()  # nothing is removed for what would not fit anyway


@pytest.mark.ray
def test_through_ray_data(window, whole, prepare_row, ray_session):
    store = window(4, ray_reader(prepare_row))
    order = sampler(store)
    for step in range(20):
        store.plan(order.order.ahead(step))
        same(store, whole, order.pairs(step))


def test_tokens_are_counted_once_each_row_was_read(window, whole):
    store = window(4)
    rows = np.arange(300)
    store.pixels(rows)
    assert store.stats == {}  # half a set says nothing of the whole
    store.pixels(np.arange(600))
    counts = ("captions", "truncated", "tokens", "unknown", "unknown_share")
    assert store.stats == {name: whole.stats[name] for name in counts} and store.stats["tokens"] > 600


def test_rows_keep_their_language(settings, make_set, prepare_row, tmp_path):
    lines = [{"image": f"{i}.png", "captions": ["a" if i % 2 else "犬"], "split": "train", "lang": ("ja", "en")[i % 2]}
             for i in range(6)]  # fmt: skip
    lines += [{"image": f"{s}.png", "captions": [s], "split": s, "lang": "en"} for s in ("val", "test")]
    prepare(settings(make_set(lines)), tmp_path / "mixed")
    mixed = open_shards(tmp_path / "mixed")
    store = WindowStore(mixed, "train", tmp_path / "cache", SHAPE, local_reader(prepare_row), 4 * GROUP_BYTES)
    assert store.langs == mixed.langs("train") and list(store.langs.values()) == ["ja", "en"] * 3
    store.close()
