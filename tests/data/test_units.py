"""`prepare` in pieces: gone on with after a kill, the same on Ray, resized as the model's processor does it."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from raycap.data import shards as module
from raycap.data import units
from raycap.data.pixels import decode_stored, to_ppm
from raycap.data.shards import Tools, open_shards, prepare, prepare_if_needed
from raycap.data.units import Rate, choose_best
from raycap.errors import ConfigError, DataError, RunError

LINES = [
    {"image": f"{i}.png", "captions": [f"thing {i}", f"a thing {i} of many"], "split": s}
    for s, numbers in (("train", range(600)), ("val", range(600, 610)), ("test", range(610, 620)))
    for i in numbers
]


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


class Halves:
    """Stands in for a model's resizing: half the size, the first pixel of four."""

    def __call__(self, image):
        return np.ascontiguousarray(np.asarray(image)[::2, ::2].transpose(2, 0, 1))

    def describe(self):
        return {"processor": "halves", "shape": [3, 6, 8]}


class Lengths:
    """Stands in for CLIP: a caption's score is its number of letters."""

    def __call__(self, images, captions):
        assert all(Image.open(io.BytesIO(image)).size == (16, 12) for image in images)
        return [[float(len(c)) for c in row] for row in captions]

    def describe(self):
        return {"model": "lengths"}


KILLED = """
import json, os, signal, sys
from raycap.config import from_dict
from raycap.data import shards, units
where, nth, calls = sys.argv[3], int(sys.argv[4]), []
kind = getattr(units, where)
real = kind.work
def work(self, unit):
    calls.append(1)
    if len(calls) == nth:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, unit)
kind.work = work
shards.prepare(from_dict({"data": {"source": sys.argv[1], "rows_per_shard": 200}}), sys.argv[2])
"""


@pytest.mark.parametrize(("where", "nth", "again"), [("CheckWork", 2, (2, 5)), ("ShardWork", 3, (0, 3))])
def test_a_killed_prepare_goes_on_where_it_was(settings, make_set, tmp_path, monkeypatch, where, nth, again):
    folder, out = make_set(LINES), tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(out), where, str(nth)], check=False)
    assert done.returncode == -9 and not (out / "manifest.json").exists()
    counts = {"CheckWork": 0, "ShardWork": 0}
    for name in counts:
        kind = getattr(units, name)

        def work(self, unit, name=name, real=kind.work):
            counts[name] += 1
            return real(self, unit)

        monkeypatch.setattr(kind, "work", work)
    opened = []
    real_source = module.open_source
    monkeypatch.setattr(module, "open_source", lambda *a: opened.append(NotRead(real_source(*a))) or opened[-1])
    prepare(settings(folder, rows_per_shard=200), out)
    assert (counts["CheckWork"], counts["ShardWork"]) == again  # of 3 pieces checked and 5 shards
    monkeypatch.undo()
    prepare(settings(folder, rows_per_shard=200), tmp_path / "undisturbed")
    assert contents(out) == contents(tmp_path / "undisturbed")
    assert not (out / ".work").exists()


class NotRead:
    """A source that may be named, and not read again."""

    def __init__(self, source):
        self.title, self.licence, self.fingerprint = source.title, source.licence, source.fingerprint

    def __iter__(self):
        raise AssertionError("the source is read again")


def test_what_was_begun_with_other_settings_is_not_gone_on_with(settings, make_set, tmp_path):
    folder, out = make_set(LINES[:20] + LINES[-20:]), tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(folder), str(out), "ShardWork", "2"]
    assert subprocess.run(command, check=False).returncode == -9
    prepare(settings(folder, seed=3, rows_per_shard=7), out)
    prepare(settings(folder, seed=3, rows_per_shard=7), tmp_path / "undisturbed")
    assert contents(out) == contents(tmp_path / "undisturbed")


@pytest.mark.ray
def test_on_ray_the_bytes_are_the_same(settings, make_set, tmp_path, ray_session):
    from raycap.data.stream import run_units

    lines = LINES[:30] + LINES[-20:]
    lines[3] = {**lines[3], "_image": b"junk"}
    folder = make_set(lines)
    config = settings(folder, rows_per_shard=8, store="pixels", captions="best-clipscore")
    said, ran = [], []

    def on_ray(work, units):
        ran.append((work.kind, len(units)))
        return run_units(work, units)

    # By value: Ray's workers do not have this file.
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        one = prepare(config, tmp_path / "ray", lambda *a: said.append(a), Tools(on_ray, Halves(), Lengths()))
    finally:
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    two = prepare(config, tmp_path / "here", tools=Tools(resize=Halves(), score=Lengths()))
    assert [kind for kind, _ in ran] == ["checked", "scored", "shard"] and ran[2][1] == 8
    assert one == two and one["rejected"] == {"image-damaged": 1}
    assert contents(tmp_path / "ray") == contents(tmp_path / "here")
    assert any("rows/s" in message for _, _, message in said)


@pytest.mark.ray
def test_an_error_in_a_unit_on_ray_is_told(tmp_path, ray_session):
    from raycap.data.stream import run_units

    class Broken:
        actors, folder = True, str(tmp_path)

        def __call__(self, unit):
            from raycap.errors import DataError

            raise DataError(f"unit {unit['number']} is broken")

    with pytest.raises(DataError, match="unit 7 is broken"):
        list(run_units(Broken(), [{"number": "7", "rows": 1}]))


@pytest.mark.parametrize(
    ("store", "quality", "form"), [("resized", 0, "PNG"), ("resized", 90, "JPEG"), ("pixels", 0, "PPM")]
)
def test_images_resized_once(settings, make_set, png, tmp_path, store, quality, form):
    folder, said = make_set(LINES[:5] + LINES[-20:]), []
    config = settings(folder, store=store, quality=quality)
    manifest = prepare(config, tmp_path / "out", lambda *a: said.append(a[2]), Tools(resize=Halves()))
    assert manifest["store"] == {"kind": store, "quality": quality, "processor": "halves", "shape": [3, 6, 8]}
    row = open_shards(tmp_path / "out").read_rows("train")[2]
    stored = Image.open(io.BytesIO(row["image"]["bytes"]))
    wanted = np.asarray(Image.open(io.BytesIO(png(2))))[::2, ::2]
    assert stored.format == form and (row["width"], row["height"]) == stored.size == (8, 6)
    assert np.array_equal(decode_stored(row["image"]["bytes"]), np.asarray(stored).transpose(2, 0, 1))
    if not quality:
        assert np.array_equal(np.asarray(stored), wanted)
    assert row["resized_for"] == "halves"
    sizes = next(m for m in said if "size on disk" in m)
    assert "original" in sizes and "resized" in sizes and "pixels" in sizes and f"(here {store})" in sizes
    with pytest.raises(ConfigError, match=r"data\.store=pixels.* has no effect" if store == "resized" else "resized"):
        other = "pixels" if store == "resized" else "resized"
        prepare_if_needed(settings(tmp_path / "out", store=other))


def test_a_disk_without_room_is_told_before(settings, make_set, tmp_path, monkeypatch):
    full = type("Usage", (), {"free": 10})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: full)
    with pytest.raises(RunError, match=r"data\.store=original needs about"):
        prepare(settings(make_set(LINES[:5] + LINES[-20:])), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_a_setting_without_its_tool_is_refused(settings, mini, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.store=pixels"):
        prepare(settings(mini, store="pixels"), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"best-clipscore needs CLIPScores"):
        prepare(settings(mini, captions="best-clipscore"), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"data\.quality=80 has no effect"):
        settings(mini, quality=80)
    prepare(settings(mini), tmp_path / "plain")
    with pytest.raises(ConfigError, match="prepared without CLIPScores"):
        prepare_if_needed(settings(tmp_path / "plain", captions="weighted-clipscore"))


def test_scores_stand_in_the_shards_and_reach_the_store(settings, make_set, tmp_path):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    from raycap.data.store import Store

    folder = make_set(LINES[:6] + LINES[-20:])
    config = settings(folder, captions="best-clipscore")
    manifest = prepare(config, tmp_path / "out", tools=Tools(score=Lengths()))
    assert manifest["clip_scores"] == {"model": "lengths"}
    shards = open_shards(tmp_path / "out")
    kept = pq.read_schema(shards.files("train")[0])
    assert kept.field("clip_scores").type == pa.list_(pa.field("element", pa.float32()))
    assert kept.field("selected").type == pa.int32()
    assert shards.clip_scores("train")["2.png"] == ([7.0, 17.0], 1)
    loaded = datasets.load_dataset("parquet", data_files=str(shards.files("train")[0]), cache_dir=str(tmp_path / "hf"))
    assert loaded["train"][2]["clip_scores"] == [7.0, 17.0]
    store = Store.for_shards(shards, "train", tmp_path / "cache", (3, 4, 4), 8)
    assert store.clip_scores.tolist()[4:6] == [7.0, 17.0] and store.selected.tolist() == [1] * 6
    plain = prepare(settings(folder), tmp_path / "plain")
    assert "clip_scores" not in plain and open_shards(tmp_path / "plain").clip_scores("train") is None
    assert plain["content_sha256"] != manifest["content_sha256"]


def test_ties_are_broken_by_the_seed():
    picks = [[choose_best([0.5, 0.7, 0.7, 0.1, 0.7], seed, f"image {i}") for i in range(300)] for seed in (0, 1)]
    assert set(picks[0]) == {1, 2, 4} and picks[0] != picks[1]
    assert all(60 < picks[0].count(i) < 140 for i in (1, 2, 4))
    assert choose_best([0.5, 0.71, 0.7], 0, "a") == 1


def test_the_rate_counts_what_this_process_did():
    clock = iter([0.0, 2.0, 4.0])
    said = []
    rate = Rate(lambda *a: said.append(a), 500, 1000, "rows written", clock=lambda: next(clock))
    rate.add(100)
    rate.add(100)
    assert said == [
        (600, 1000, "rows written, 50 rows/s, 8 s left"),
        (700, 1000, "rows written, 50 rows/s, 6 s left"),
    ]


def test_ppm_is_read_by_anybody():
    array = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(to_ppm(array)))), array)
    assert np.array_equal(decode_stored(to_ppm(array)), array.transpose(2, 0, 1))


def test_a_node_that_does_not_share_the_folder_is_told(tmp_path):
    work = units.CheckWork(tmp_path, lambda data: None)
    with pytest.raises(DataError, match=r"node .* does not see .*gone: give `prepare` a folder"):
        units.CheckWork(tmp_path / "gone", lambda data: None)({"number": "00000", "rows": 3, "places": []})
    elsewhere = lambda work, left: (unit["rows"] for unit in left)  # noqa: E731 - done, and its result is not here
    with pytest.raises(DataError, match=r"checked-00000\.json was written on another node .* all nodes .* share"):
        list(units.run_units(work, [{"number": "00000", "rows": 3, "places": []}], elsewhere, None, "images"))


def test_without_a_node_that_sees_the_folder_the_work_is_done_here(tmp_path, monkeypatch):
    from raycap.data import stream

    blind = {"NodeID": "0" * 56, "NodeManagerHostname": "far", "Resources": {"CPU": 8.0}}
    monkeypatch.setattr(stream, "nodes_that_see", lambda ray, folder: ([], [blind]))
    work = units.CheckWork(tmp_path, lambda data: None)
    with pytest.warns(
        UserWarning, match=r"works in this process: .* is not seen by far\. To use all, give `prepare` a folder"
    ):
        assert list(stream.run_units(work, [{"number": "00000", "rows": 0, "places": []}])) == [0]
    assert work.result_file({"number": "00000"}).is_file()
