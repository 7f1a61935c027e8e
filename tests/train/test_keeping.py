"""Whether features are kept on disk: measured, said, held to by who comes later; and what `off` computes is the same."""

from __future__ import annotations

import dataclasses

import pytest

from raycap.data.store import Store
from raycap.errors import ConfigError
from raycap.models import load_model
from raycap.storage import Storage
from raycap.train import keeping
from raycap.train.choice import Choice, Speeds, judge, looks
from raycap.train.features import Images
from raycap.train.keeping import keep_or_not, measure

SLOW_TOWER = Speeds(tower_s=1e-2, live_s=1e-2, write_s=1e-4, read_s=1e-4)
SLOW_DISK = Speeds(tower_s=1e-4, live_s=1e-4, write_s=1e-2, read_s=1e-2)


def test_the_cheaper_side_is_chosen_and_its_figures_are_kept():
    found = judge("auto", 1000, 5000, 4000, SLOW_TOWER, room=True)
    assert (found.kept, found.bytes) == (True, 4_000_000)
    assert found.kept_s == pytest.approx(1000 * (1e-2 + 1e-4) + 5000 * 1e-4)
    assert found.live_s == pytest.approx(50)
    assert "10.6 s kept, 50 s at each look" in found.line()
    assert not judge("auto", 1000, 5000, 4000, SLOW_DISK, room=True).kept
    # Of a large set that a short run sees a part of, the part costs less than the whole.
    assert not judge("auto", 100_000, 5000, 4000, SLOW_TOWER, room=True).kept
    assert not (full := judge("auto", 1000, 5000, 4000, SLOW_TOWER, room=False)).kept
    assert "run.store_gb" in full.why


def test_looks_follow_the_rungs(config):
    c = config(tune__slots=6, tune__eta=3, train__batch=16, train__val_images=100)
    # 12 trials in two turns to 111, 4 and then 1 in one each.
    steps = 2 * 111 + 222 + 667
    assert looks(c, True, [111, 333, 1000], 12, 1) == {"train": steps * 16, "val": 4 * 100 * 2}
    assert looks(c, False, [111, 333, 1000], 12, 1)["train"] == 6 * steps * 16
    assert looks(c, True, [111, 333, 1000], 12, 2) == {"train": 1000 * 16, "val": 3 * 100 * 2}
    none = config(tune__slots=6, tune__scheduler="none", train__batch=16)
    assert looks(none, True, [1000], 12, 1)["train"] == 2000 * 16


@pytest.fixture
def decide(config, make_stores, tmp_path, monkeypatch):
    """keep_or_not over a fresh tower; `speeds` None measures."""

    def decide(stores=None, speeds=None, **changes):
        c = config(run__cache_dir=str(tmp_path / "cache"), **changes)
        cm = load_model(c.model, c.data, compute_dtype="fp32", device="cpu")
        images, said = Images(cm, stored=True), []
        stores = stores or make_stores(cm)
        if speeds:
            real = measure(images, stores["train"], 4, timed=False)[1]
            monkeypatch.setattr(keeping, "measure", lambda *_, timed=True, **__: (speeds if timed else None, real))
        record = Storage.open(tmp_path / "run")
        found = keep_or_not(images, stores, c, record, rungs=[40], trials=4, packs=1, piece=4, log=said.append)
        return images, stores, found, said

    return decide


def test_decided_once_a_run_and_held_to(decide, tmp_path):
    images, stores, found, said = decide(speeds=SLOW_DISK)
    assert images.kept == {"train": False, "val": False} == {s: c.kept for s, c in found.items()}
    assert [line.split(":")[0] for line in said] == [
        f"vision features of {split} are computed at each look" for split in ("train", "val")
    ]
    again = decide(stores, speeds=SLOW_TOWER)  # what a resumed run, or another pack, would have measured
    assert again[2] == found
    assert again[0].kept == images.kept
    (tmp_path / "run" / "features.json").write_text("{")  # cut short by a power loss
    assert decide(stores, speeds=SLOW_TOWER)[0].kept == {"train": True, "val": True}


def test_features_that_are_there_are_used_without_measuring(decide, tmp_path, monkeypatch):
    images, stores, _, _ = decide(speeds=SLOW_TOWER)
    for store in stores.values():
        images.store_features(store)
        store.features = None
    (tmp_path / "run" / "features.json").unlink()
    monkeypatch.setattr(keeping, "measure", lambda *_, **__: pytest.fail("measured"))
    found = decide(stores)[2]
    assert all(c == Choice(True, "another run has left them", stores[s].count) for s, c in found.items())


def test_a_measurement_is_of_this_tower_and_disk(decide, monkeypatch):
    images, stores, found, _ = decide()
    calls = []
    monkeypatch.setattr(images, "encode", lambda *a, real=images.encode: calls.append(1) or real(*a))
    assert measure(images, stores["train"], 4, batches=False)[0] and not calls
    speeds, row_bytes = measure(images, stores["train"], 4)
    assert calls
    assert row_bytes == images.to_numpy(images.live(stores["train"], [0]))[0].nbytes
    assert all(0 < value < 1 for value in dataclasses.astuple(speeds))
    assert {c.bytes for c in found.values()} == {row_bytes * store.count for store in stores.values()}
    assert not list(stores["train"].folder.glob(".features-*"))  # what was written to measure is gone


def test_a_disk_that_cannot_be_written_keeps_nothing(decide, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(keeping, "allocate", full)
    images, _, found, _ = decide()
    assert images.kept == {"train": False, "val": False}
    assert found["train"].why == "the disk could not be written" and found["train"].kept_s is None


def test_no_room_is_told(decide):
    images, *_ = decide(speeds=SLOW_TOWER, run__store_gb=1e-6)
    assert images.kept == {"train": False, "val": False}


def test_on_without_room_is_refused(decide):
    with pytest.raises(ConfigError, match=r"train.features=on: features of 12 images of train take .* GB"):
        decide(run__store_gb=1e-6, train__features="on")


def test_on_and_off_do_not_measure(decide, monkeypatch):
    monkeypatch.setattr(keeping, "_disk", lambda *_: pytest.fail("measured"))
    assert decide(train__features="on")[0].kept == {"train": True, "val": True}


def test_windows_have_no_place_for_them(decide, tmp_path, monkeypatch):
    monkeypatch.setattr(keeping, "keepable", lambda store: isinstance(store, Store) and store.split == "val")
    found = decide(speeds=SLOW_TOWER)[2]
    assert not found["train"].kept and "windows" in found["train"].why and found["val"].kept
    with pytest.raises(ConfigError, match="train is read in windows"):
        (tmp_path / "run" / "features.json").unlink()
        decide(train__features="on")


def test_on_where_the_tower_is_trained_has_no_effect(make_engine, config):
    with pytest.raises(ConfigError, match=r"train.features=on has no effect: vision is trained"):
        make_engine(config(train__features="on", lora__scope="vision", lora__targets=["q_proj"]))
