"""Rows come through Ray Data whole, also into a Train worker; a poisoned shard is told in one clear sentence.

What runs in Ray's workers is made inside functions, so that it travels by value: they do not have this file.
"""

import shutil
import time

import numpy as np
import pytest

from raycap.config import from_dict
from raycap.data.shards import open_shards, prepare
from raycap.data.store import Store
from raycap.data.stream import data_error, fill, local_batches, prepared_table, stream
from raycap.errors import DataError

ROWS_PER_SHARD = 100


@pytest.fixture(scope="module")
def shards_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream") / "shards"
    data = {"source": "shapes", "shapes_images": [300, 20, 10], "rows_per_shard": ROWS_PER_SHARD}
    prepare(from_dict({"data": data}), folder)
    return folder


@pytest.fixture
def poisoned(shards_folder, tmp_path):
    """A copy in which the pictures of one row group are overwritten; footer, captions and sizes are as they were."""
    import pyarrow.parquet as pq

    folder = tmp_path / "poisoned"
    shutil.copytree(shards_folder, folder)
    file = folder / "train-00001.parquet"
    group = pq.read_metadata(file).row_group(1)
    column = next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == "image.bytes")
    start = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(file.read_bytes())
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    file.write_bytes(data)
    return folder


def open_store(folder, cache, split="train"):
    return Store.for_shards(open_shards(folder), split, cache, (3, 64, 64), 40)


def assert_same(a, b):
    every = np.arange(a.count)
    pairs = np.array([[i, j] for i in every for j in range(a.captions_per_image[i])])
    assert np.array_equal(a.pixels(every), b.pixels(every))
    assert [t.tolist() for t in a.tokens(pairs)] == [t.tolist() for t in b.tokens(pairs)]
    assert a.stats == b.stats


POISON = r"shard .*train-00001\.parquet, row group 1, is damaged \(.*\)\. Remove the folder and prepare again\."


def test_local_poison_is_told(poisoned, prepare_row, tmp_path):
    store = open_store(poisoned, tmp_path)
    with pytest.raises(DataError, match=POISON):
        fill(store, local_batches(poisoned, "train", prepare_row))
    assert store.ready.sum() == ROWS_PER_SHARD + 64  # what came before it is in
    store.wait([0, 5], timeout_s=0)
    with pytest.raises(DataError, match=POISON):  # and who waits for the rest hears why
        store.wait([0, 250], timeout_s=60)
    assert open_store(poisoned, tmp_path).owner  # the next one may try again


def test_a_row_that_cannot_be_prepared_is_told(shards_folder, tmp_path):
    def broken(row):
        if row["row"] == 130:
            raise ValueError("no such token")
        return {"pixels": np.zeros((3, 64, 64), np.uint8), "token_ids": [[1]] * 5, "prompt_lens": [0] * 5}

    with pytest.raises(DataError, match=r"train-00001.*row group 0, row 130, image .*ValueError: no such token"):
        fill(open_store(shards_folder, tmp_path), local_batches(shards_folder, "train", broken))


def test_pixels_of_the_wrong_kind_are_told(shards_folder, tmp_path):
    def floats(row):
        return {"pixels": np.zeros((3, 64, 64), np.float32), "token_ids": [[1]] * 5, "prompt_lens": [0] * 5}

    with pytest.raises(DataError, match="float32"):
        fill(open_store(shards_folder, tmp_path), local_batches(shards_folder, "train", floats))


def test_fill_passes_other_errors_on(shards_folder, tmp_path):
    def interrupted():
        yield from ()
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fill(open_store(shards_folder, tmp_path), interrupted())
    assert data_error(KeyError("mine")) is None


def test_a_full_store_is_left_as_it_is(shards_folder, prepare_row, tmp_path):
    fill(open_store(shards_folder, tmp_path), local_batches(shards_folder, "train", prepare_row))

    def untouched():
        raise AssertionError("drained")
        yield

    assert fill(open_store(shards_folder, tmp_path), untouched()).complete


@pytest.fixture
def ray_data(monkeypatch):
    """In place of Ray Data: reads as it does, and keeps what it was asked for: [row groups of a call]."""
    asked = []

    def reader(groups, prepare_row):
        asked.append([g["offset"] for g in groups])
        return [prepared_table(group, prepare_row) for group in reversed(groups)]

    monkeypatch.setattr("raycap.data.stream.group_dataset", reader)
    return asked


def test_a_small_set_is_read_in_the_worker(ray_data, shards_folder, prepare_row, tmp_path):
    here = fill(open_store(shards_folder, tmp_path / "a"), local_batches(shards_folder, "train", prepare_row))
    said = []
    rows = stream(shards_folder, "train", prepare_row, say=said.append)
    assert_same(here, fill(open_store(shards_folder, tmp_path / "b"), rows))
    assert not ray_data and said == ["train: 300 images read here, sooner than Ray Data starts"]


def test_a_set_that_takes_longer_than_ray_data_is_handed_to_it_after_two_row_groups(
    ray_data, shards_folder, prepare_row, tmp_path, monkeypatch
):
    here = fill(open_store(shards_folder, tmp_path / "a"), local_batches(shards_folder, "train", prepare_row))
    monkeypatch.setattr("raycap.data.stream.START_S", 0.0)
    said = []
    rows = stream(shards_folder, "train", prepare_row, say=said.append)
    assert_same(here, fill(open_store(shards_folder, tmp_path / "b"), rows))
    offsets = [g["offset"] for g in open_shards(shards_folder).row_groups("train")]
    assert ray_data == [offsets[2:]] and "200 by Ray Data" in said[0]


def test_what_the_first_row_group_loads_once_does_not_decide(ray_data, shards_folder, prepare_row, monkeypatch):
    spent = []

    def loads_first(row):
        end = time.thread_time() + (0 if spent else 0.5)
        spent.append(row["row"])
        while time.thread_time() < end:
            pass
        return prepare_row(row)

    monkeypatch.setattr(
        "raycap.data.stream.START_S", 0.6
    )  # the other 200 rows at the first group's pace: over a second
    assert sum(len(t) for t in stream(shards_folder, "train", loads_first)) == 300 and not ray_data


def test_rows_that_are_in_are_not_read_again(ray_data, shards_folder, prepare_row):
    groups = open_shards(shards_folder).row_groups("train")
    ready = np.ones(300, dtype=bool)
    for group in groups[1:3]:
        ready[group["offset"]] = False
    came = [row for table in stream(shards_folder, "train", prepare_row, ready) for row in table["row"].to_pylist()]
    assert came == [row for g in groups[1:3] for row in range(g["offset"], g["offset"] + g["rows"])]


def test_a_data_error_is_found_under_what_wraps_it():
    inner = DataError("shard x, row group 1, is damaged")
    outer = RuntimeError("task failed")
    outer.__cause__ = ValueError("and more")
    outer.__cause__.__context__ = inner
    assert data_error(outer) is inner
    told = RuntimeError("Traceback ...\nraycap.errors.DataError: shard x is damaged\nmore lines")
    assert str(data_error(told)) == "shard x is damaged"


@pytest.mark.ray
def test_ray_data_reads_the_shards_as_they_are(ray_session, shards_folder):
    import ray.data

    rows = ray.data.read_parquet([str(f) for f in open_shards(shards_folder).files("val")]).take_all()
    assert {r["image_id"] for r in rows} == set(open_shards(shards_folder).references("val"))


@pytest.mark.ray
def test_the_stream_equals_reading_here(ray_session, shards_folder, prepare_row, tmp_path):
    from raycap.data.stream import dataset

    here = fill(open_store(shards_folder, tmp_path / "a"), local_batches(shards_folder, "train", prepare_row))
    came = []
    store = open_store(shards_folder, tmp_path / "b")
    there = fill(store, dataset(shards_folder, "train", prepare_row), came.append)
    assert_same(here, there)
    assert came[0] <= 64 and came[-1] == 300  # rows are handed on by the row group, not at the end


@pytest.mark.ray
def test_what_takes_longer_than_ray_data_comes_from_it(
    ray_session, shards_folder, poisoned, prepare_row, tmp_path, monkeypatch
):
    monkeypatch.setattr("raycap.data.stream.START_S", 0.0)
    here = fill(open_store(shards_folder, tmp_path / "a"), local_batches(shards_folder, "train", prepare_row))
    said = []
    rows = stream(shards_folder, "train", prepare_row, say=said.append)
    assert_same(here, fill(open_store(shards_folder, tmp_path / "b"), rows))
    assert "by Ray Data" in said[0]
    with pytest.raises(DataError, match=POISON):
        fill(open_store(poisoned, tmp_path / "c"), stream(poisoned, "train", prepare_row))


@pytest.mark.ray
def test_a_poisoned_shard_is_told_through_ray_data(ray_session, poisoned, prepare_row, tmp_path):
    from raycap.data.stream import dataset

    with pytest.raises(DataError, match=POISON):
        fill(open_store(poisoned, tmp_path), dataset(poisoned, "train", prepare_row))


def train_loop():
    def loop(config):
        from pathlib import Path

        import ray.train

        from raycap.data.shards import open_shards
        from raycap.data.store import Store
        from raycap.data.stream import fill

        for split in ("train", "val"):
            shards = open_shards(config["shards"])
            store = Store.for_shards(shards, split, Path(config["cache"]), (3, 64, 64), 40)
            fill(store, ray.train.get_dataset_shard(split))

    return loop


def fit(folder, cache, prepare_row, storage):
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from raycap.data.stream import dataset

    # A whole CPU for the worker, of two: the reading tasks must find room beside it.
    return TorchTrainer(
        train_loop(),
        train_loop_config={"shards": str(folder), "cache": str(cache)},
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        datasets={split: dataset(folder, split, prepare_row) for split in ("train", "val")},
        run_config=RunConfig(name="stream", storage_path=str(storage)),
    ).fit()


@pytest.mark.ray
@pytest.mark.slow
def test_a_train_worker_gets_every_row(ray_session, shards_folder, prepare_row, tmp_path):
    fit(shards_folder, tmp_path / "cache", prepare_row, tmp_path / "runs")
    for split in ("train", "val"):
        here = fill(
            open_store(shards_folder, tmp_path / split, split), local_batches(shards_folder, split, prepare_row)
        )
        there = open_store(shards_folder, tmp_path / "cache", split)
        assert there.complete
        assert_same(here, there)


@pytest.mark.ray
@pytest.mark.slow
def test_a_poisoned_shard_is_told_through_a_train_worker(ray_session, poisoned, prepare_row, tmp_path):
    with pytest.raises(Exception) as caught:
        fit(poisoned, tmp_path / "cache", prepare_row, tmp_path / "runs")
    told = data_error(caught.value)
    assert told is not None
    with pytest.raises(DataError, match=POISON):
        raise told
