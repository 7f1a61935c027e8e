"""Sources with a column of images, data.columns, and what a source is recognised by."""

import json

import pytest

from raycap.data.shards import prepare
from raycap.data.sources import detect, open_source
from raycap.errors import ConfigError, DataError


@pytest.fixture
def read(settings):
    def rows(source, **data):
        return list(open_source(settings(source, **data).data, 0))

    return rows


def write_parquet(file, **columns):
    import pyarrow as pa
    import pyarrow.parquet as pq

    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file)
    return file


@pytest.fixture
def pictures(png):
    """Count -> that many images in the `datasets.Image` layout, as parquet holds them."""
    return lambda count: [{"bytes": png(i), "path": None} for i in range(count)]


# --- Pokémon BLIP captions --------------------------------------------------------------------------------------------


@pytest.fixture
def pokemon(tmp_path, pictures):
    folder = tmp_path / "pokemon-blip-captions"
    count = 21
    write_parquet(
        folder / "data" / "train-00000-of-00001-566cc9b19d7203f8.parquet",
        image=pictures(count),
        text=[f"a drawing of creature {i}" for i in range(count)],
    )
    (folder / "README.md").write_text(
        "---\nlicense: cc-by-nc-sa-4.0\nlanguage:\n- en\n---\n# Pokémon\n", encoding="utf-8"
    )
    infos = {"features": {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}}
    (folder / "dataset_infos.json").write_text(json.dumps({"lambdalabs--pokemon-blip-captions": infos}))
    return folder


def test_pokemon(pokemon, read, settings, png):
    assert detect(pokemon) == "parquet"
    source = open_source(settings(pokemon).data, 0)
    assert (source.title, source.licence, len(source)) == ("pokemon-blip-captions", "cc-by-nc-sa-4.0", 21)
    rows = list(source)
    assert rows[3].captions == ["a drawing of creature 3"] and rows[3].image == png(3)
    assert rows[3].where == "data/train-00000-of-00001-566cc9b19d7203f8.parquet: row 3"
    assert not any(r.split for r in rows)  # "train" alone says nothing


def test_pokemon_in_shares_and_in_counts(pokemon, settings, tmp_path):
    assert prepare(settings(pokemon), tmp_path / "a")["counts"] == {"train": 17, "val": 2, "test": 2}
    manifest = prepare(settings(pokemon, splits=[12, 3, 3]), tmp_path / "b")
    assert manifest["counts"] == {"train": 12, "val": 3, "test": 3}
    assert manifest["rows"] == {"read": 21, "kept": 18, "rejected": 0, "beyond_limit": 3}
    with pytest.raises(DataError, match=r"data\.splits=\[20, 3, 3\] asks for 26 rows, and 21 rows name no split"):
        prepare(settings(pokemon, splits=[20, 3, 3]), tmp_path / "c")


# --- parquet ----------------------------------------------------------------------------------------------------------


def test_parquet_by_split_with_lists_of_captions(tmp_path, pictures, read):
    for split in ("train", "validation", "test"):
        write_parquet(
            tmp_path / "p" / f"{split}-00000-of-00001.parquet", image=pictures(2), captions=[["a", "b"], ["c"]]
        )
    rows = read(tmp_path / "p")
    assert [r.split for r in rows] == ["test", "test", "train", "train", "val", "val"]
    assert len({r.image_id for r in rows}) == 6 and rows[0].captions == ["a", "b"]


def test_parquet_with_columns_of_ones_own(tmp_path, pictures, read):
    file = write_parquet(
        tmp_path / "mine.parquet",
        picture=pictures(3),
        text=["not this"] * 3,
        en_1=["one", "two", None],
        en_2=["uno", None, None],
        number=[7, 8, 9],
        patient=["p", "p", "q"],
        part=["train", "dev", "train"],
    )
    with pytest.raises(DataError, match=r"mine\.parquet has the columns picture.*data\.columns=\{image: \.\.\.\}"):
        read(file)
    columns = {
        "image": "picture",
        "captions": ["en_1", "en_2"],
        "image_id": "number",
        "group": "patient",
        "split": "part",
    }
    a, b, bad = read(file, columns=columns)
    assert (a.image_id, a.captions, a.split, a.group) == ("7", ["one", "uno"], "train", "p")
    assert (b.captions, b.split) == (["two"], "val")
    assert (bad.image_id, bad.reason, bad.where) == ("9", "no-captions", "mine.parquet: row 2")
    with pytest.raises(DataError, match=r"no column 'en_3' \(data\.columns: captions\); did you mean 'en_"):
        read(file, columns={**columns, "captions": "en_3"})


def test_parquet_with_bytes_or_paths(tmp_path, png, read):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png(5))
    file = write_parquet(tmp_path / "t.parquet", image=["a.png", "b.png", "../t.parquet", None], caption=["x"] * 4)
    a, *bad = read(file, images=str(tmp_path / "images"))
    assert a.image == png(5) and a.path == "a.png"
    assert [r.reason for r in bad] == ["image-missing", "image-missing", "image-not-named"]
    assert "b.png" in bad[0].error and "relative" in bad[1].error
    (row,) = read(write_parquet(tmp_path / "u.parquet", image=[png(6)], caption=["x"]))
    assert row.image == png(6)


def test_a_damaged_parquet_file_is_named(tmp_path, pictures, read):
    file = write_parquet(tmp_path / "d.parquet", image=pictures(2), text=["a", "b"])
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"d\.parquet is not parquet, or is cut"):
        read(file)


def test_the_fingerprint_of_parquet_follows_content(pokemon, settings, pictures):
    def fingerprint():
        return open_source(settings(pokemon).data, 0).fingerprint()

    before = fingerprint()
    assert fingerprint() == before
    write_parquet(next((pokemon / "data").glob("*.parquet")), image=pictures(2), text=["a", "b"])
    assert fingerprint() != before


# --- datasets ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(png):
    """dataset(count, first) -> a datasets.Dataset of pictures with texts."""
    import datasets

    def make(count, first=0, name="image"):
        features = datasets.Features({name: datasets.Image(), "text": datasets.Value("string")})
        images = [{"bytes": png(first + i), "path": None} for i in range(count)]
        return datasets.Dataset.from_dict({name: images, "text": [f"text {first + i}" for i in range(count)]}, features)

    return make


def test_save_to_disk(tmp_path, dataset, read, png):
    dataset(3).save_to_disk(tmp_path / "one")
    assert detect(tmp_path / "one") == "hub"
    rows = read(tmp_path / "one")
    assert [(r.captions, r.split, r.image) for r in rows] == [([f"text {i}"], "", png(i)) for i in range(3)]
    assert rows[1].where == "rows: row 1" and rows[1].source == "one"


def test_save_to_disk_of_several_splits(tmp_path, dataset, read):
    import datasets

    parts = {"train": dataset(2, name="picture"), "validation": dataset(1, 2, "picture")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "d")
    rows = read(tmp_path / "d", columns={"image": "picture"})
    assert [(r.split, r.captions, r.where) for r in rows] == [
        ("train", ["text 0"], "train: row 0"),
        ("train", ["text 1"], "train: row 1"),
        ("val", ["text 2"], "validation: row 0"),
    ]
    with pytest.raises(DataError, match=r"d \(train\) has the columns picture, text.*data\.columns"):
        read(tmp_path / "d")
    datasets.DatasetDict({"train": dataset(1), "extra": dataset(1)}).save_to_disk(tmp_path / "e")
    with pytest.raises(DataError, match="splits train, extra"):
        read(tmp_path / "e")


def test_a_data_set_that_holds_paths(tmp_path, png, read, monkeypatch):
    import datasets

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(png(4))
    made = datasets.Dataset.from_dict({"image": [str(tmp_path / "photos" / "a.png")], "text": ["x"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made.cast_column("image", datasets.Image()))
    (bad,) = read("my/photos")
    assert bad.reason == "image-missing" and "as data.images" in bad.error
    (row,) = read("my/photos", images=str(tmp_path / "photos"))
    assert row.image == png(4) and row.path == "a.png"
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path)
    assert read("my/photos")[0].image == png(4)


def test_a_spoiled_save_to_disk_is_named(tmp_path, dataset, read):
    dataset(2).save_to_disk(tmp_path / "s")
    (tmp_path / "s" / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"s cannot be read as a data set of save_to_disk"):
        read(tmp_path / "s")


def test_a_hub_id_with_revision_and_configuration(monkeypatch, dataset, settings):
    import datasets

    asked = []

    def load_dataset(path, name=None, **options):
        asked.append((path, name, options))
        return datasets.DatasetDict({"train": dataset(4)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = open_source(settings("reach-vb/pokemon-blip-captions@3790f29:default").data, 0)
    rows = list(source)
    assert asked == [("reach-vb/pokemon-blip-captions", "default", {"revision": "3790f29"})]
    assert len(rows) == len(source) == 4 and source.title == rows[0].source == "reach-vb/pokemon-blip-captions"
    assert not rows[0].split and source.fingerprint() == source.fingerprint()


def test_a_hub_id_that_is_not_to_be_had(monkeypatch, settings):
    import datasets

    def load_dataset(*_, **__):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"data\.source=my/photos: there is no such folder here, and the hub.*offline"):
        list(open_source(settings("my/photos").data, 0))


# --- columns, languages, recognition ----------------------------------------------------------------------------------


def test_columns_of_a_csv_and_of_json_lines(tmp_path, png, read, make_set):
    folder = tmp_path / "csv"
    folder.mkdir()
    (folder / "a.png").write_bytes(png(1))
    (folder / "metadata.csv").write_text("path,label,text\na.png,the caption,not this\n")
    (row,) = read(folder, columns={"image": "path", "captions": "label"})
    assert row.captions == ["the caption"]
    with pytest.raises(DataError, match=r"metadata\.csv has no column 'lable'.*did you mean 'label'"):
        read(folder, columns={"image": "path", "captions": "lable"})
    lines = make_set([{"image": "b.png", "captions": ["not this"], "ja": "犬がいる", "study": 4}])
    (row,) = read(lines, columns={"captions": "ja", "group": "study"})
    assert (row.captions, row.group, row.lang) == (["犬がいる"], "4", "ja")


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"picture": "a"}, "'picture' is nothing that raycap reads"),
        ({"image": ["a", "b"]}, "name one column"),
        ({"captions": []}, "or a list of them"),
    ],
)
def test_columns_that_mean_nothing(mini, read, columns, said):
    with pytest.raises(ConfigError, match=said):
        read(mini, columns=columns)


def test_languages(make_set, read):
    lines = [
        {"image": "a.png", "captions": ["白い犬", "犬がいる"]},
        {"image": "b.png", "captions": ["ネコ", "走る猫"]},
        {"image": "c.png", "captions": ["a dog"], "lang": "en"},
    ]
    assert [r.lang for r in read(make_set(lines))] == ["ja", "ja", "en"]
    assert [r.lang for r in read(make_set(lines), lang="zh")] == ["zh", "zh", "en"]


@pytest.mark.parametrize(("setting", "value"), [("columns", {"image": "x"}), ("report", "findings"), ("lang", "ja")])
def test_settings_without_effect_are_refused(settings, setting, value):
    with pytest.raises(
        ConfigError, match=rf"data\.{setting}=.* has no effect: data\.source=shapes is read as 'shapes'"
    ):
        open_source(settings("shapes", **{setting: value}).data, 0)


def test_what_was_looked_for_and_found(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError) as refused:
        detect(tmp_path)
    for said in ("holds a.txt, notes/", "captions.jsonl", "COCO-style", "Karpathy", "annotation.json", "*.parquet"):
        assert said in refused.value.message
    with pytest.raises(DataError, match="is a file of 1 bytes"):
        detect(tmp_path / "a.txt")


def test_the_same_pictures_through_every_layout(tmp_path, mini, read):
    """What a source is called and how it is laid out changes neither pictures nor captions nor splits."""
    import csv

    import datasets

    rows = read(mini)
    wanted = sorted((r.image, tuple(r.captions), r.split) for r in rows)
    names = [r.path.rpartition("/")[2] for r in rows]
    pictures = [{"bytes": r.image, "path": None} for r in rows]
    found = {}
    for place in ("karpathy", "risc/resized", "r2gen", "coco"):
        (tmp_path / place).mkdir(parents=True)
        for row, name in zip(rows, names):
            (tmp_path / place / name).write_bytes(row.image)
    images = [
        {"filename": n, "split": r.split, "imgid": i, "sentences": [{"raw": c} for c in r.captions]}
        for i, (n, r) in enumerate(zip(names, rows))
    ]
    (tmp_path / "karpathy" / "dataset_mini.json").write_text(json.dumps({"images": images}))
    found["karpathy"] = read(tmp_path / "karpathy")
    columns = [f"caption_{i}" for i in range(1, 6)]
    with open(tmp_path / "risc" / "captions.csv", "w", newline="") as file:
        cells = [["X", r.split, n, *r.captions, *[""] * (5 - len(r.captions))] for n, r in zip(names, rows)]
        csv.writer(file).writerows([["source", "split", "image", *columns], *cells])
    found["risc"] = read(tmp_path / "risc")
    for split in ("train", "val", "test"):
        part = [(n, r) for n, r in zip(names, rows) if r.split == split]
        notes = [{"image_id": n, "caption": c} for n, r in part for c in r.captions]
        content = {"images": [{"id": n, "file_name": n} for n, _ in part], "annotations": notes}
        (tmp_path / "coco" / f"captions_{split}2014.json").write_text(json.dumps(content))
    found["coco"] = read(tmp_path / "coco")
    captions, splits = [r.captions for r in rows], [r.split for r in rows]
    found["parquet"] = read(write_parquet(tmp_path / "t.parquet", image=pictures, captions=captions, split=splits))
    whole = datasets.Dataset.from_dict({"image": pictures, "captions": captions, "split": splits})
    whole.save_to_disk(tmp_path / "disk")
    found["hub"] = read(tmp_path / "disk")
    for name, got in found.items():
        assert sorted((r.image, tuple(r.captions), r.split) for r in got) == wanted, name
