import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raycap.data.shards import is_shards_folder, open_shards, prepare, prepare_if_needed
from raycap.errors import ConfigError, DataError, RunError
from raycap.files import read_json, read_jsonl

COLUMNS = ["image_id", "image", "captions", "split", "group", "lang", "source", "width", "height", "sha256"]


def contents(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.name != ".lock"}


def adds_up(manifest, out):
    rows = manifest["rows"]
    lines = read_jsonl(out / "rejected.jsonl")
    assert rows["read"] == rows["kept"] + rows["rejected"] + rows["beyond_limit"]
    assert rows["kept"] == sum(manifest["counts"].values()) == sum(f["rows"] for f in manifest["files"])
    assert rows["rejected"] == sum(manifest["rejected"].values()) == sum(r["what"] == "row" for r in lines)
    assert sum(manifest["captions_dropped"].values()) == sum(r["what"] == "caption" for r in lines)
    assert all(r["reason"] and r["error"] and r["where"] for r in lines)
    return lines


def test_schema_and_content(settings, mini, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    manifest = prepare(settings(mini), tmp_path / "out")
    assert manifest == read_json(tmp_path / "out" / "manifest.json")
    shards = open_shards(tmp_path / "out")
    assert shards.splits == ("train", "val", "test") and shards.counts == {"train": 6, "val": 3, "test": 3}
    kept = pq.read_schema(shards.files("train")[0])
    assert kept.names == COLUMNS
    assert kept.field("image").type == pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    assert kept.field("captions").type.value_type == pa.string()
    assert {kept.field(n).type for n in ("image_id", "split", "group", "lang", "source", "sha256")} == {pa.string()}
    assert kept.field("width").type == kept.field("height").type == pa.int32()
    rows = shards.read_rows("val")
    assert [r["row"] for r in rows] == [0, 1, 2] and {r["split"] for r in rows} == {"val"}
    assert rows[0]["image"] == {"bytes": (mini / "images" / "06.png").read_bytes(), "path": "images/06.png"}
    assert (rows[0]["width"], rows[0]["height"], rows[0]["source"]) == (64, 64, "mini")
    assert manifest["source"] == {"kind": "captions_jsonl", "title": "mini", "licence": "Apache-2.0"}
    assert manifest["pyarrow"] == pa.__version__
    adds_up(manifest, tmp_path / "out")


def test_loads_in_datasets_with_pictures(settings, mini, tmp_path):
    datasets = pytest.importorskip("datasets")
    prepare(settings(mini), tmp_path / "out")
    files = {s: [str(f) for f in open_shards(tmp_path / "out").files(s)] for s in ("train", "val", "test")}
    loaded = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "hf"))
    assert {s: len(d) for s, d in loaded.items()} == {"train": 6, "val": 3, "test": 3}
    assert isinstance(loaded["train"].features["image"], datasets.Image)
    for table in (loaded["test"], loaded["test"].cast_column("image", datasets.Image())):
        picture = table[0]["image"]
        assert np.array_equal(np.asarray(picture), np.asarray(Image.open(mini / "images" / "09.png")))
        assert table[0]["captions"] == open_shards(tmp_path / "out").read_rows("test")[0]["captions"]


def test_same_input_same_bytes(settings, mini, tmp_path):
    prepare(settings(mini), tmp_path / "a")
    elsewhere = shutil.copytree(mini, tmp_path / "other" / "mini")
    prepare(settings(elsewhere), tmp_path / "b")
    prepare(settings(mini), tmp_path / "a")  # over itself
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert str(tmp_path) not in (tmp_path / "a" / "manifest.json").read_text()


def test_content_hash_is_of_the_rows_and_not_of_the_files(settings, mini, tmp_path):
    one = prepare(settings(mini), tmp_path / "a")
    two = prepare(settings(mini, rows_per_shard=2), tmp_path / "b")
    assert one["content_sha256"] == two["content_sha256"] and len(two["files"]) == 7
    table = mini / "captions.jsonl"
    table.write_text(table.read_text().replace("heart", "disc"))
    assert prepare(settings(mini), tmp_path / "c")["content_sha256"] != one["content_sha256"]


def test_rows_are_numbered_through_files_and_row_groups(settings, make_set, tmp_path):
    lines = [{"image": f"{i}.png", "captions": [f"c {i}"], "split": "train"} for i in range(150)]
    lines += [{"image": f"{s}.png", "captions": [s], "split": s} for s in ("val", "test")]
    prepare(settings(make_set(lines), rows_per_shard=100), tmp_path / "out")
    shards = open_shards(tmp_path / "out")
    groups = shards.row_groups("train")
    assert [(g["offset"], g["rows"]) for g in groups] == [(0, 64), (64, 36), (100, 50)]
    rows = shards.read_rows("train", ["image_id"])
    assert [(r["row"], r["image_id"]) for r in rows] == [(i, f"{i}.png") for i in range(150)]


def test_every_bad_input_is_counted(settings, make_set, good_lines, png, tmp_path):
    bad = [
        ("not json at all", "not-json"),
        ({"captions": ["a"]}, "image-not-named"),
        ({"image": "gone.png", "captions": ["a"], "_image": None}, "image-missing"),
        ({"image": "cut.png", "captions": ["a"], "_image": png(50)[:300]}, "image-damaged"),
        ({"image": "zero.png", "captions": ["a"], "_image": b""}, "image-damaged"),
        ({"image": "thin.png", "captions": ["a"], "_image": png(51, size=(400, 2))}, "image-size"),
        ({"image": "e1.png", "captions": []}, "no-captions"),
        ({"image": "e2.png", "captions": ["", " \n"]}, "no-captions"),
        ({"image": "s.png", "captions": ["a"], "split": "tset"}, "split-unknown"),
        ({"image": "dup.png", "captions": ["a"], "image_id": "g0.png", "split": "train"}, "image-conflict"),
    ]
    half = {"image": "half.png", "captions": ["kept", "\u2028"], "split": "train"}
    folder = make_set([*good_lines, *(line for line, _ in bad), half])
    said = []
    manifest = prepare(settings(folder), tmp_path / "out", lambda *a: said.append(a))
    lines = adds_up(manifest, tmp_path / "out")
    assert [(r["where"], r["reason"]) for r in lines if r["what"] == "row"] == [
        (f"captions.jsonl:{11 + i}", reason) for i, (_, reason) in enumerate(bad)
    ]
    assert manifest["rows"] == {"read": 21, "kept": 11, "rejected": 10, "beyond_limit": 0}
    assert manifest["captions_dropped"] == {"caption-empty": 3}
    assert open_shards(tmp_path / "out").read_rows("train")[-1]["captions"] == ["kept"]
    assert said[-1] == (21, 21, "11 rows kept (train 7, val 2, test 2), 10 rejected")


def test_an_image_id_that_comes_twice_is_rejected(settings, png, tmp_path, monkeypatch):
    from raycap.data import shards
    from raycap.data.sources import SourceRow

    rows = [SourceRow(f"i{n % 8}", png(n), [f"c{n}"], where=f"rows:{n}") for n in range(9)]

    class Rows(list):
        title, licence = "rows", "none"

        def fingerprint(self):
            return "rows"

    monkeypatch.setattr(shards, "open_source", lambda data, seed: Rows(rows))
    manifest = prepare(settings("shapes"), tmp_path / "out")
    (line,) = adds_up(manifest, tmp_path / "out")
    assert line["reason"] == "duplicate-id" and line["where"] == "rows:8" and "rows:0" in line["error"]


def test_nothing_left_is_an_error_that_says_why(settings, make_set, tmp_path):
    folder = make_set(
        ["{", {"image": "a.png", "captions": []}, {"image": "b.png", "captions": ["x"], "_image": b"junk"}]
    )
    with pytest.raises(DataError, match=r"nothing is left of set0: 3 rows read.*1 not-json.*captions\.jsonl:1"):
        prepare(settings(folder), tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert len(read_jsonl(tmp_path / "out" / "rejected.jsonl")) == 3
    with pytest.raises(DataError, match="it has no rows"):
        prepare(settings(make_set([])), tmp_path / "empty")


def test_a_split_without_rows_is_an_error(settings, make_set, good_lines, tmp_path):
    with pytest.raises(
        DataError, match=r"split 'test'.*has no rows \(train 6, val 2, test 0\); every row names its split"
    ):
        prepare(settings(make_set(good_lines[:8])), tmp_path / "a")
    two = [{"image": f"{i}.png", "captions": ["x"]} for i in range(2)]
    with pytest.raises(DataError, match=r"split '.*2 rows were drawn by data.splits=\[0.8, 0.1, 0.1\]"):
        prepare(settings(make_set(two)), tmp_path / "b")
    assert not (tmp_path / "b" / "manifest.json").exists()


def test_rows_without_a_split_get_one_by_seed_and_group(settings, make_set, tmp_path):
    lines = [{"image": f"{i}.png", "captions": [f"c {i}"], "group": f"study {i // 2}"} for i in range(60)]
    folder = make_set(lines)
    split_of = {}
    for seed in (0, 1):
        manifest = prepare(settings(folder, seed=seed), tmp_path / f"s{seed}")
        assert manifest["counts"] == {"train": 48, "val": 6, "test": 6}
        shards = open_shards(tmp_path / f"s{seed}")
        split_of[seed] = {i: s for s in shards.splits for i in shards.references(s)}
        assert len(split_of[seed]) == 60
        assert all(split_of[seed][f"{i}.png"] == split_of[seed][f"{i + 1}.png"] for i in range(0, 60, 2))
        assert set(shards.groups("val").values()) == {g for g in shards.groups("val").values() if g.startswith("study")}
    assert split_of[0] != split_of[1]


def test_limit_takes_the_first_of_each_split(settings, make_set, good_lines, tmp_path):
    manifest = prepare(settings(make_set(good_lines), limit=2), tmp_path / "a")
    assert manifest["counts"] == {"train": 2, "val": 2, "test": 2} and manifest["rows"]["beyond_limit"] == 4
    assert list(open_shards(tmp_path / "a").references("train")) == ["g0.png", "g1.png"]
    unsplit = [{k: v for k, v in line.items() if k != "split"} for line in good_lines]
    manifest = prepare(settings(make_set(unsplit), limit=3), tmp_path / "b")
    assert manifest["counts"] == {"train": 3, "val": 1, "test": 1}
    adds_up(manifest, tmp_path / "b")


def test_constant_caption_is_the_most_frequent_of_training(settings, make_set, good_lines, tmp_path):
    good_lines[2]["captions"] = ["often", "rare"]
    good_lines[4]["captions"] = ["often\n", "thing 0"]
    good_lines[9]["captions"] = ["elsewhere"] * 9
    prepare(settings(make_set(good_lines)), tmp_path / "a")
    assert open_shards(tmp_path / "a").constant_caption() == "often"
    good_lines[2]["captions"] = ["thing 0"]
    good_lines[4]["captions"] = ["b", "b", "b", "thing 0", "a", "a", "a"]
    prepare(settings(make_set(good_lines)), tmp_path / "b")
    assert open_shards(tmp_path / "b").constant_caption() == "a"


def test_changed_images_are_stored_without_loss(settings, make_set, good_lines, png, tmp_path):
    good_lines[0]["_image"] = png(3, mode="L")
    manifest = prepare(settings(make_set(good_lines)), tmp_path / "out")
    assert manifest["images_changed"] == {"L to RGB": 1}
    import io

    stored = Image.open(io.BytesIO(open_shards(tmp_path / "out").read_rows("train")[0]["image"]["bytes"]))
    assert stored.mode == "RGB" and stored.format == "PNG"


KILLED = """
import os, signal, sys
from raycap.config import from_dict
from raycap.data import shards, units
write, calls = units.ShardWork.work, []
def dying(*args):
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*args)
units.ShardWork.work = dying
config = from_dict({"data": {"source": sys.argv[1]}, "run": {"cache_dir": sys.argv[3]}})
shards.prepare(config, sys.argv[2]) if sys.argv[2] else shards.prepare_if_needed(config)
"""


def test_a_killed_prepare_leaves_no_manifest_and_is_redone(settings, mini, tmp_path):
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, str(mini), str(out), str(tmp_path)], check=False)
    assert done.returncode == -9
    assert (out / "train-00000.parquet").is_file() and not (out / "manifest.json").exists()
    assert not is_shards_folder(out)
    with pytest.raises(DataError, match="did not finish"):
        open_shards(out)
    prepare(settings(mini), out)
    prepare(settings(mini), tmp_path / "undisturbed")
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_the_cache_is_keyed_by_content_and_settings(mini, settings, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYCAP_CACHE", str(tmp_path / "cache"))
    killed = subprocess.run([sys.executable, "-c", KILLED, str(mini), "", str(tmp_path / "cache")], check=False)
    assert killed.returncode == -9
    (unfinished,) = (tmp_path / "cache" / "data").iterdir()
    first = prepare_if_needed(settings(mini))
    assert first == unfinished and is_shards_folder(first)
    manifest_time = (first / "manifest.json").stat().st_mtime_ns
    assert prepare_if_needed(settings(mini)) == first
    assert (first / "manifest.json").stat().st_mtime_ns == manifest_time
    assert prepare_if_needed(settings(first)) == first  # a shards folder is used as it is
    assert prepare_if_needed(settings(mini, limit=1)) != first
    assert prepare_if_needed(settings(mini, seed=1)) != first
    assert prepare_if_needed(settings(mini, max_text_tokens=9)) == first  # nothing that shards depend on
    os.utime(mini / "images" / "00.png", (1, 1))
    assert prepare_if_needed(settings(mini)) != first


def test_two_processes_prepare_one_set_once(mini, tmp_path):
    code = """
import sys
from raycap.config import from_dict
from raycap.data import shards
real = shards._prepare
def told(*args):
    print("prepared")
    return real(*args)
shards._prepare = told
print(shards.prepare_if_needed(from_dict({"data": {"source": sys.argv[1]}, "run": {"cache_dir": sys.argv[2]}})))
"""
    command = [sys.executable, "-c", code, str(mini), str(tmp_path / "cache")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [p.communicate(timeout=60)[0].split() for p in both]
    assert sum("prepared" in s for s in said) == 1 and said[0][-1] == said[1][-1]
    assert is_shards_folder(said[0][-1])


def test_a_prepared_or_unfinished_folder_as_the_source(settings, mini, tmp_path):
    prepare(settings(mini), tmp_path / "out")
    assert prepare_if_needed(settings(tmp_path / "out", limit=6)) == tmp_path / "out"
    with pytest.raises(ConfigError, match=r"data\.limit=5 has no effect on .*out"):
        prepare_if_needed(settings(tmp_path / "out", limit=5))
    (tmp_path / "out" / "manifest.json").unlink()
    with pytest.raises(DataError, match="did not finish"):
        prepare_if_needed(settings(tmp_path / "out"))


def test_damaged_shards_are_told(settings, mini, tmp_path):
    prepare(settings(mini), tmp_path / "out")
    file = tmp_path / "out" / "val-00000.parquet"
    data = bytearray(file.read_bytes())
    data[40:3000] = b"\xff" * 2960
    file.write_bytes(data)
    shards = open_shards(tmp_path / "out")
    with pytest.raises(DataError, match=r"val-00000\.parquet, row group 0, is damaged"):
        shards.read_rows("val")
    with pytest.raises(DataError, match=r"val-00000\.parquet.*hash differs"):
        shards.verify()
    file.write_bytes(data[:2000])
    with pytest.raises(DataError, match=r"val-00000\.parquet has 2000 bytes"):
        open_shards(tmp_path / "out")
    file.unlink()
    with pytest.raises(DataError, match=r"val-00000\.parquet is missing"):
        open_shards(tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "cannot be read"), ('{"schema_version": 99}', "schema version 99"), ("[]", "schema version")],
)
def test_a_strange_manifest_is_told(tmp_path, text, said):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=said):
        open_shards(tmp_path)


def test_an_unknown_split_is_told(settings, mini, tmp_path):
    prepare(settings(mini), tmp_path / "out")
    with pytest.raises(DataError, match="no rows in split 'dev'; it has train, val, test"):
        open_shards(tmp_path / "out").files("dev")


def test_a_folder_that_cannot_be_written(settings, mini, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="cannot write"):
        prepare(settings(mini), tmp_path / "file" / "out")
    with pytest.raises(RunError, match=r"cannot write .* it is a file"):
        prepare(settings(mini), tmp_path / "file")
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(RunError, match="cannot write"):
            prepare(settings(mini), tmp_path / "locked" / "out")


def test_a_folder_with_other_files_is_left_alone(settings, mini, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.parquet").write_text("precious")
    with pytest.raises(RunError, match=r"thesis\.parquet, which is no shard"):
        prepare(settings(mini), tmp_path / "mine")
    with pytest.raises(RunError, match="which is no shard"):
        prepare(settings(mini), mini)


def test_shards_are_not_prepared_again(settings, mini, tmp_path):
    prepare(settings(mini), tmp_path / "out")
    with pytest.raises(DataError, match="prepared already"):
        prepare(settings(tmp_path / "out"), tmp_path / "again")


def test_rejected_lines_are_json_with_a_place(settings, make_set, good_lines, tmp_path):
    prepare(settings(make_set([*good_lines, "{"])), tmp_path / "out")
    (line,) = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["where"] == "captions.jsonl:11"


@pytest.mark.parametrize("keep", [0, 0.5])
@pytest.mark.parametrize("name", ["manifest.json", "train-00000.parquet"])
def test_prepared_data_in_the_cache_that_a_power_cut_damaged_is_prepared_again(tmp_path, name, keep):
    from raycap.config import load_config
    from raycap.data.shards import prepare_if_needed

    config = load_config("shapes-git", [f"run.cache_dir={tmp_path}", "data.shapes_images=6,3,3"])
    folder = prepare_if_needed(config)
    whole = open_shards(folder).content_sha256
    file = next(folder.glob(name.replace("00000", "*")))
    os.truncate(file, int(keep * file.stat().st_size))
    assert open_shards(prepare_if_needed(config)).content_sha256 == whole
