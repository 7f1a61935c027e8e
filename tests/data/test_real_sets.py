"""The two real photo sets, where they are to be had: splits, counts, groups, and what the words become."""

from collections import Counter

import pytest

from raycap.data.shards import open_shards, prepare
from raycap.data.text_rules import caption_key
from raycap.files import read_jsonl


@pytest.fixture(scope="module")
def prepared(shared_data, tmp_path_factory):
    from raycap.config import from_dict

    folders = {}

    def get(name):
        if not (shared_data / name).is_dir():
            pytest.skip(f"no {name} in {shared_data}")
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name) / "shards"
            prepare(from_dict({"data": {"source": str(shared_data / name)}}), folders[name])
        return folders[name]

    return get


def test_ucm_captions(prepared):
    shards = open_shards(prepared("ucm_captions"))
    assert shards.counts == {"train": 629, "val": 210, "test": 210}
    # Of all 1,050 photos two are the same, pixel for pixel; no picture stands in two splits, not even nearly.
    assert shards.manifest["rejected"] == {"image-duplicate-exact": 1}
    assert shards.manifest["duplicates"] == {"exact": 1, "near": 0} and shards.manifest["leaks"] == {}
    (gone,) = read_jsonl(shards.folder / "rejected.jsonl")
    assert gone["image_id"] == "airplane02.jpg" and "airplane01.jpg" in gone["error"]
    assert shards.manifest["source"]["title"] == "ucm_captions"
    assert shards.constant_caption()


def test_ucm_rows_with_the_same_captions_are_resampled_together(prepared):
    shards = open_shards(prepared("ucm_captions"))
    sets_of = {
        s: {i: tuple(sorted(map(caption_key, c))) for i, c in shards.references(s).items()} for s in shards.splits
    }
    for split in shards.splits:
        group_of = shards.groups(split)
        pairs = {(sets_of[split][i], group_of[i]) for i in group_of}
        assert len(pairs) == len(set(sets_of[split].values())) == len(set(group_of.values()))  # one to one
        assert len(pairs) == shards.manifest["groups"][split] < shards.counts[split]
    # 14 sets of captions stand in several official splits; their rows keep these splits, and share no group.
    crossing = [
        s
        for s in set().union(*(v.values() for v in sets_of.values()))
        if sum(s in v.values() for v in sets_of.values()) > 1
    ]
    assert crossing
    groups = [set(shards.groups(s).values()) for s in shards.splits]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])


def test_flickr8k(prepared):
    folder = prepared("flickr8k")
    shards = open_shards(folder)
    assert shards.counts == {"train": 753, "val": 113, "test": 125}
    assert shards.manifest["rejected"] == {"split-unknown": 9}  # the nine that stand in no official list
    assert Counter(r["reason"] for r in read_jsonl(folder / "rejected.jsonl")) == {"split-unknown": 9}
    row = shards.read_rows("train", ["captions", "group", "image_id"])[0]
    assert len(row["captions"]) == 5 and row["group"] == row["image_id"]


def test_without_official_splits_they_are_drawn(shared_data, tmp_path, settings):
    import json

    source = shared_data / "ucm_captions"
    if not source.is_dir():
        pytest.skip(f"no ucm_captions in {shared_data}")
    folder = tmp_path / "unsplit"
    folder.mkdir()
    (folder / "images").symlink_to(source / "images")
    rows = [{k: v for k, v in row.items() if k != "split"} for row in read_jsonl(source / "captions.jsonl")[:200]]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    manifest = prepare(settings(folder), tmp_path / "out")
    assert manifest["counts"] == {"train": 159, "val": 20, "test": 20}  # the copy of airplane01 is left out


def test_languages_are_told_apart(shared_data):
    from raycap.data.sources.base import language_of

    japanese, english = shared_data / "stair_shichimi_ja" / "val.jsonl", shared_data / "coco_fakecap" / "fakecap.jsonl"
    if not (japanese.is_file() and english.is_file()):
        pytest.skip(f"no stair_shichimi_ja and coco_fakecap in {shared_data}")
    rows = read_jsonl(japanese)
    assert language_of(c for r in rows for c in r["captions"]) == "ja"
    assert sum(language_of(r["captions"]) == "ja" for r in rows) == len(rows)
    assert {language_of(r["references_raw"]) for r in read_jsonl(english)} == {"en"}
