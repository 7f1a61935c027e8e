import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from raycap.data.shards import open_shards, prepare
from raycap.data.store import Store
from raycap.data.stream import fill, local_batches
from raycap.errors import DataError, RunError

IDS = ["a", "b", "c"]
REFERENCES = {"a": ["one", "two"], "b": ["three"], "c": ["four", "five", "six"]}


def make(folder, **changes):
    options = {
        "image_ids": IDS,
        "references": REFERENCES,
        "groups": {"a": "g", "b": "g"},
        "max_tokens": 8,
        "split": "train",
        "count": 3,
        "image_shape": (3, 4, 5),
    } | changes
    return Store.create(folder, options.pop("split"), options.pop("count"), options.pop("image_shape"), **options)


def put(store, row):
    image = np.full((1, 3, 4, 5), 10 * row + 1, dtype=np.uint8)
    ids = [[row, j, *range(j + row)] for j in range(len(REFERENCES[IDS[row]]))]
    store.put([row], image, [ids], [[1] * len(ids)], truncated=[row], unknown=[1])


@pytest.fixture
def full(tmp_path):
    store = make(tmp_path / "s")
    for row in (2, 0, 1):
        put(store, row)
    return store.finish()


def check(store):
    assert store.complete and not store.owner
    assert store.image_ids == IDS and store.references == REFERENCES and store.split == "train"
    assert store.groups == {"a": "g", "b": "g", "c": "c"}
    assert store.captions_per_image.tolist() == [2, 1, 3]
    assert store.pixels([1, 2, 1])[:, 0, 0, 0].tolist() == [11, 21, 11]
    assert store.pixels([0]).dtype == np.uint8 and store.pixels(np.array([0, 1])).shape == (2, 3, 4, 5)
    ids = store.tokens(np.array([[2, 2], [0, 0], [1, 0]]))
    assert [i.tolist() for i in ids] == [[2, 2, 0, 1, 2, 3], [0, 0], [1, 0, 0]]
    assert store.prompt_lens(np.array([[2, 2], [0, 0]])).tolist() == [1, 1]
    assert store.token_lens(np.array([[2, 2], [0, 0]])).tolist() == [6, 2]
    store.wait([0, 1, 2], timeout_s=0)


def test_what_went_in_comes_out(full, tmp_path):
    check(full)
    check(Store.open(tmp_path / "s"))
    check(make(tmp_path / "s"))  # whoever comes later reads
    stats = full.stats
    assert (stats["images"], stats["captions"], stats["truncated"], stats["unknown"]) == (3, 6, 3, 3)
    assert stats["tokens"] == 2 + 3 + 3 + 4 + 5 + 6 - 6 and stats["unknown_share"] == 3 / stats["tokens"]
    assert not list((tmp_path / "s").glob("*.pkl"))


def test_nothing_is_pickled(full, tmp_path):
    files = list((tmp_path / "s").glob("*.npy"))
    assert files
    for file in files:
        assert np.load(file, allow_pickle=False).dtype != object


def test_a_second_opener_follows_the_first(tmp_path):
    first, second = make(tmp_path / "s"), make(tmp_path / "s")
    assert first.owner and not second.owner
    assert not second.ready.any()
    put(first, 1)
    assert second.ready.tolist() == [False, True, False]
    assert second.pixels([1])[0, 0, 0, 0] == 11 and second.tokens(np.array([[1, 0]]))[0].tolist() == [1, 0, 0]
    second.wait([1], timeout_s=0)
    with pytest.raises(DataError, match="1 of 2 rows"):
        second.wait([1, 2], timeout_s=0.1)
    with pytest.raises(RunError, match="another process"):
        put(second, 0)
    late = threading.Timer(0.2, lambda: (put(first, 0), put(first, 2), first.finish()))
    late.start()
    second.wait([0, 1, 2], timeout_s=10)
    late.join()
    check(second)


def test_when_the_filler_dies_followers_hear_and_the_next_takes_over(tmp_path):
    code = """
import sys, os, signal
sys.path.insert(0, sys.argv[2])
import test_store as t
store = t.make(sys.argv[1])
t.put(store, 0)
print("half", flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "s"), os.path.dirname(__file__)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "half\n"
    follower = make(tmp_path / "s")
    assert not follower.owner and follower.ready.tolist() == [True, False, False]
    process.kill()
    process.wait()
    with pytest.raises(DataError, match="is gone"):
        follower.wait([1], timeout_s=10)
    with pytest.raises(DataError, match="no finished store"):
        Store.open(tmp_path / "s")
    heir = make(tmp_path / "s")
    assert heir.owner and heir.ready.tolist() == [True, False, False]  # what was read is not read again
    for row in range(1, 3):
        put(heir, row)
    heir.finish()
    assert heir.stats["unknown"] == 3  # counted by the dead one too
    check(heir)
    check(follower)  # its maps are of the same files


def test_after_a_crash_of_the_machine_no_row_is_trusted(tmp_path, monkeypatch):
    store = make(tmp_path / "s")
    put(store, 0)
    store.close()
    monkeypatch.setattr("raycap.data.arrays.boot", lambda: {"boot": "another start"})
    assert not make(tmp_path / "s").ready.any()


def test_finishing_needs_every_row(tmp_path):
    store = make(tmp_path / "s")
    put(store, 1)
    with pytest.raises(DataError, match=r"2 of 3 images never came \(a, c"):
        store.finish()
    assert not (tmp_path / "s" / "manifest.json").exists()
    store.close()
    assert make(tmp_path / "s").owner


@pytest.mark.parametrize(
    ("rows", "pixels", "ids", "prompts", "said"),
    [
        ([3], np.zeros((1, 3, 4, 5), np.uint8), [[[1]]], [[0]], "row 3 lies outside"),
        ([-1], np.zeros((1, 3, 4, 5), np.uint8), [[[1]]], [[0]], "row -1 lies outside"),
        ([1], np.zeros((1, 3, 5, 4), np.uint8), [[[1]]], [[0]], r"image b: pixels are uint8 \[3, 5, 4\]"),
        ([1], np.zeros((1, 3, 4, 5), np.float32), [[[1]]], [[0]], "float32"),
        ([1], np.zeros((1, 3, 4, 5), np.uint8), [[[1], [2]]], [[0, 0]], "2 token lists .* 1 captions"),
        ([1], np.zeros((1, 3, 4, 5), np.uint8), [[[1]]], [[]], "0 prompt lengths"),
        ([1], np.zeros((1, 3, 4, 5), np.uint8), [[[1] * 9]], [[0]], "9 tokens"),
        ([1], np.zeros((1, 3, 4, 5), np.uint8), [[[]]], [[0]], "0 tokens"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path, rows, pixels, ids, prompts, said):
    store = make(tmp_path / "s")
    with pytest.raises(DataError, match=said):
        store.put(rows, pixels, ids, prompts)
    assert not store.ready.any()


def test_another_set_in_the_folder_is_refused(full, tmp_path):
    with pytest.raises(DataError, match="'max_tokens' differs"):
        make(tmp_path / "s", max_tokens=9)
    with pytest.raises(DataError, match="2 image ids"):
        make(tmp_path / "t", image_ids=["a", "b"])


def test_a_sample_that_is_not_there(full):
    with pytest.raises(DataError, match="names a caption"):
        full.tokens(np.array([[1, 1]]))


def test_the_key_is_of_the_content():
    key = Store.key(data="x", split="train", prompt="", shape=[3, 4, 5])
    assert key == Store.key(split="train", shape=(3, 4, 5), prompt="", data="x")
    assert key != Store.key(data="x", split="train", prompt=" ", shape=[3, 4, 5])


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        make(tmp_path / "file" / "s")


def test_pixels_are_written_whole_whatever_their_layout_and_a_full_disk_is_told(tmp_path, monkeypatch):
    """The system may write less than it is asked to; images that are decoded lie channels last."""
    from raycap.data import arrays

    store = make(tmp_path / "s")
    image = np.random.default_rng(0).integers(0, 255, (4, 5, 3), dtype=np.uint8).transpose(2, 0, 1)
    write = os.pwrite
    monkeypatch.setattr(arrays.os, "pwrite", lambda file, data, place: write(file, data[:7], place))
    store.put([1], [image], [[[1, 2]]], [[1]])
    assert np.array_equal(store.pixels([1])[0], image) and not store.pixels([0, 2]).any()

    def full_disk(file, data, place):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(arrays.os, "pwrite", full_disk)
    with pytest.raises(RunError, match=r"cannot write .*pixels\.npy: No space left on device\. Free space"):
        store.put([0], [image], [[[1], [2]]], [[1, 1]])
    assert store.ready.tolist() == [False, True, False]


def test_features_are_stored_once(full, tmp_path):
    assert full.features is None and not full.attach_features("k")
    values = np.arange(3 * 2 * 4, dtype=np.float32).reshape(3, 2, 4)
    drained = []

    def batches():
        for rows in ([2], [0, 1]):
            drained.append(rows)
            yield np.array(rows), values[rows]

    assert np.array_equal(full.add_features("k", (2, 4), "float32", batches()), values)
    again = Store.open(tmp_path / "s")
    assert np.array_equal(again.add_features("k", (2, 4), "float32", batches()), values) and len(drained) == 2
    assert again.attach_features("k") and np.array_equal(again.features[[1, 0]], values[[1, 0]])
    with pytest.raises(DataError, match="features of 2 of 3"):
        again.add_features("other", (2, 4), "float32", iter([(np.array([0]), values[:1])]))
    assert not again.attach_features("other")


def test_shards_to_store(settings, mini, tmp_path, prepare_row):
    prepare(settings(mini), tmp_path / "shards")
    shards = open_shards(tmp_path / "shards")

    def open_store(**key):
        return Store.for_shards(shards, "train", tmp_path / "cache", (3, 64, 64), 40, **key)

    came = []
    store = fill(open_store(processor="p"), local_batches(tmp_path / "shards", "train", prepare_row), came.append)
    assert store.complete and came == [6] and store.references == shards.references("train")
    rows = shards.read_rows("train")
    for row in rows:
        wanted = prepare_row(row)
        assert np.array_equal(store.pixels([row["row"]])[0], wanted["pixels"])
        pairs = np.array([[row["row"], j] for j in range(len(row["captions"]))])
        assert [t.tolist() for t in store.tokens(pairs)] == wanted["token_ids"]
    assert store.stats["truncated"] == sum(len(c) + 1 > 40 for r in rows for c in r["captions"]) > 0
    assert open_store(processor="p").complete
    assert open_store(processor="q").owner


@pytest.mark.parametrize("keep", [0, 0.5])
@pytest.mark.parametrize("name", ["layout.json", "pixels.npy", "tokens.npy", "ready.npy", "manifest.json"])
def test_a_finished_store_that_a_power_cut_damaged_is_filled_anew(full, tmp_path, name, keep):
    file = tmp_path / "s" / name
    size = int(keep * file.stat().st_size)
    os.truncate(file, size)
    again = make(tmp_path / "s")
    if name != "manifest.json":  # whose figures are told to people, and decide nothing
        assert again.owner and not again.complete
        for row in (0, 1, 2):
            put(again, row)
        again.finish()
    check(again)
