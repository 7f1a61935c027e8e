import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from raycap.data.shards import open_shards, prepare
from raycap.errors import DataError
from raycap.files import read_jsonl


def scene(number, fmt="PNG", **options):
    coarse = Image.fromarray(np.random.default_rng(number).integers(0, 255, (6, 8, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((96, 72), Image.Resampling.BICUBIC).save(buffer, format=fmt, **options)
    return buffer.getvalue()


@pytest.fixture
def leaky():
    """Ten rows; a picture of train stands in test again, another nearly, and one of val nearly in test."""
    splits = ["train"] * 6 + ["val"] * 2 + ["test"] * 2
    rows = [{"image": f"g{i}.png", "captions": [f"thing {i}"], "split": s, "_image": scene(i)}
            for i, s in enumerate(splits)]  # fmt: skip
    return [
        *rows,
        {"image": "same.bmp", "captions": ["the same"], "split": "test", "_image": scene(1, "BMP")},
        {"image": "near.jpg", "captions": ["near it"], "split": "test", "_image": scene(2, "JPEG", quality=50)},
        {"image": "val.jpg", "captions": ["near val"], "split": "test", "_image": scene(6, "JPEG", quality=50)},
    ]


def test_a_leak_stops_prepare_and_says_which_and_what_to_do(settings, make_set, leaky, tmp_path):
    with pytest.raises(DataError) as caught:
        prepare(settings(make_set(leaky)), tmp_path / "out")
    said = str(caught.value)
    assert said.startswith("3 rows of") and "2 train-test" in said and "1 val-test" in said
    assert "'g1.png' is test" in said and "'g2.png' is nearly test" in said and "captions.jsonl:2" in said
    assert "data.leaks=drop" in said and "data.leaks=allow" in said
    assert not (tmp_path / "out" / "manifest.json").exists()
    found = read_jsonl(tmp_path / "out" / "leaks.jsonl")
    assert [(x["image_id"], x["other_image_id"], x["kind"]) for x in found] == [
        ("g1.png", "same.bmp", "exact"), ("g2.png", "near.jpg", "near"), ("g6.png", "val.jpg", "near")]  # fmt: skip


def test_dropped_leaks_are_rejected_rows_and_counts_add_up(settings, make_set, leaky, tmp_path):
    manifest = prepare(settings(make_set(leaky), leaks="drop"), tmp_path / "out")
    assert manifest["counts"] == {"train": 4, "val": 1, "test": 5}
    rows = manifest["rows"]
    assert rows["read"] == 13 == rows["kept"] + rows["rejected"] and manifest["rejected"] == {"image-leak": 3}
    assert manifest["leaks"] == {"train-test": {"exact": 1, "near": 1}, "val-test": {"near": 1}}
    gone = read_jsonl(tmp_path / "out" / "rejected.jsonl")
    assert [r["image_id"] for r in gone] == ["g1.png", "g2.png", "g6.png"] and "exact leak train-test" in gone[0][
        "error"
    ]


def test_allowed_leaks_are_still_told(settings, make_set, leaky, tmp_path):
    manifest = prepare(settings(make_set(leaky), leaks="allow"), tmp_path / "out")
    assert manifest["rows"]["kept"] == 13 and manifest["leaks"]["train-test"] == {"exact": 1, "near": 1}
    assert len(read_jsonl(tmp_path / "out" / "leaks.jsonl")) == 3


def test_a_set_without_leaks_has_no_list_of_them(settings, make_set, leaky, tmp_path):
    folder = make_set(leaky)
    with pytest.raises(DataError, match="leaks"):
        prepare(settings(folder), tmp_path / "out")
    manifest = prepare(settings(make_set(leaky[:10])), tmp_path / "out")  # the same folder, done anew
    assert manifest["leaks"] == {} and not (tmp_path / "out" / "leaks.jsonl").exists()


def test_where_splits_are_drawn_copies_go_to_one_split(settings, make_set, tmp_path):
    rows = []
    for i in range(12):
        rows.append({"image": f"a{i}.png", "captions": [f"thing {i}"], "_image": scene(i)})
        rows.append({"image": f"b{i}.jpg", "captions": [f"item {i}"], "_image": scene(i, "JPEG", quality=40)})
    for seed in range(4):
        prepare(settings(make_set(rows), seed=seed, splits=[0.5, 0.25, 0.25]), tmp_path / f"out{seed}")
        shards = open_shards(tmp_path / f"out{seed}")
        split_of = {i: s for s in shards.splits for i in shards.references(s)}
        assert all(split_of[f"a{i}.png"] == split_of[f"b{i}.jpg"] for i in range(12))
        group_of = {i: g for s in shards.splits for i, g in shards.groups(s).items()}
        assert all(group_of[f"a{i}.png"] == group_of[f"b{i}.jpg"] for i in range(12))


def test_a_copy_leaves_its_captions_behind(settings, make_set, good_lines, tmp_path, png):
    copy = {"image": "copy.bmp", "captions": ["thing 0", "said otherwise"], "split": "train"}
    copy["_image"] = _bmp(png(0))
    manifest = prepare(settings(make_set([*good_lines, copy])), tmp_path / "out")
    assert manifest["rejected"] == {"image-duplicate-exact": 1} and manifest["duplicates"] == {"exact": 1, "near": 0}
    assert open_shards(tmp_path / "out").references("train")["g0.png"] == ["thing 0", "item 0", "said otherwise"]
    (gone,) = read_jsonl(tmp_path / "out" / "rejected.jsonl")
    assert (
        gone["image_id"] == "copy.bmp" and "'g0.png' at captions.jsonl:1, which got 1 of its captions" in gone["error"]
    )
    kept = prepare(settings(make_set([*good_lines, copy]), duplicates="keep"), tmp_path / "kept")
    assert kept["rows"]["kept"] == 11
    groups = open_shards(tmp_path / "kept").groups("train")
    assert groups["copy.bmp"] == groups["g0.png"] and Counter(groups.values()).most_common(1)[0][1] == 2


def _bmp(data):
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).save(buffer, format="BMP")
    return buffer.getvalue()


def test_two_languages_of_one_picture_are_no_copies(settings, make_set, good_lines, tmp_path, png):
    japanese = {"image": "ja0.png", "captions": ["物 0！！"], "split": "train", "lang": "ja", "group": "g0"}
    english = {**good_lines[0], "group": "g0"}
    folder = make_set([english, *good_lines[1:], {**japanese, "_image": png(0)}])
    manifest = prepare(settings(folder), tmp_path / "out")
    assert manifest["rows"] == {"read": 11, "kept": 11, "rejected": 0, "beyond_limit": 0} and manifest["leaks"] == {}
    rows = {r["image_id"]: r for r in open_shards(tmp_path / "out").read_rows("train")}
    assert rows["ja0.png"]["group"] == rows["g0.png"]["group"] and rows["ja0.png"]["captions"] == ["物0!"]


def test_dropping_leaks_never_empties_a_split(settings, make_set, tmp_path):
    rows = [{"image": f"{s}{i}.png", "captions": [f"{s} {i}"], "split": s, "_image": scene(i if s != "val" else 9)}
            for s in ("train", "val", "test") for i in range(2 if s != "val" else 1)]  # fmt: skip
    with pytest.raises(DataError, match="leaves no row in split 'train'"):
        prepare(settings(make_set(rows), leaks="drop"), tmp_path / "out")


def test_the_same_bytes_with_findings(settings, make_set, leaky, tmp_path):
    folder = make_set(leaky)
    outs = [tmp_path / "one", tmp_path / "two"]
    for out in outs:
        prepare(settings(folder, leaks="allow"), out)
    names = sorted(f.name for f in outs[0].iterdir() if not f.name.startswith("."))
    assert "leaks.jsonl" in names
    assert all((outs[0] / n).read_bytes() == (outs[1] / n).read_bytes() for n in names)


def test_rows_that_counted_splits_leave_over_leak_nowhere(settings, make_set, tmp_path):
    rows = [{"image": f"a{i}.png", "captions": [f"thing {i}"], "_image": scene(i)} for i in range(8)]
    rows += [
        {"image": f"b{i}.jpg", "captions": [f"item {i}"], "_image": scene(i, "JPEG", quality=40)} for i in range(8)
    ]
    manifest = prepare(settings(make_set(rows), splits=[6, 2, 2]), tmp_path / "out")
    assert manifest["counts"] == {"train": 6, "val": 2, "test": 2} and manifest["leaks"] == {}
    assert manifest["rows"]["read"] == 16 == sum(v for k, v in manifest["rows"].items() if k != "read")
