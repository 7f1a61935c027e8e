"""Each published image set in its exact layout, made small: what is read, and what a fault in it is called."""

import csv
import json

import pytest

from raycap.data.shards import open_shards, prepare
from raycap.data.sources import Rejected, SourceRow, detect, open_source
from raycap.errors import ConfigError, DataError


@pytest.fixture
def put(png):
    """put(folder, "a.png", ...): pictures, each unlike the others."""
    made = []

    def write(folder, *names):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(png(len(made)))
            made.append(name)
        return folder

    return write


@pytest.fixture
def read(settings):
    def rows(source, **data):
        return list(open_source(settings(source, **data).data, 0))

    return rows


def write_json(file, value):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return file


# --- COCO, STAIR, YJ --------------------------------------------------------------------------------------------------


def coco_image(number, split="train"):
    return {
        "license": 3,
        "file_name": f"COCO_{split}2014_{number:012d}.jpg",
        "coco_url": f"http://images.cocodataset.org/{split}2014/COCO_{split}2014_{number:012d}.jpg",
        "height": 12,
        "width": 16,
        "date_captured": "2013-11-14 11:18:45",
        "flickr_url": "http://farm9.staticflickr.com/8186/8119368305_4e622c8349_z.jpg",
        "id": number,
    }


def coco_json(captions, split="train", **more):
    """COCO's captions_<split>2014.json: captions is {image number: [text, ...]}."""
    notes = [(n, text) for n, texts in captions.items() for text in texts]
    return {
        "info": {"description": "COCO 2014 Dataset", "version": "1.0", "year": 2014},
        "images": [coco_image(n, split) for n in captions],
        "licenses": [{"url": "http://creativecommons.org/licenses/by/2.0/", "id": 4, "name": "Attribution License"}],
        "annotations": [{"image_id": n, "id": 10 + i, "caption": text, **more} for i, (n, text) in enumerate(notes)],
    }


@pytest.fixture
def coco(tmp_path, put):
    folder = tmp_path / "coco"
    train = {9: ["Girl eating.", "A girl at a table."], 25: ["A giraffe."], 30: ["A vase."], 34: ["A zebra."]}
    val = {42: ["A dog in shoes."], 73: ["A motorcycle."], 74: ["A bicycle."], 133: ["A bedroom."]}
    write_json(folder / "annotations" / "captions_train2014.json", coco_json(train))
    write_json(folder / "annotations" / "captions_val2014.json", coco_json(val, "val"))
    write_json(
        folder / "annotations" / "instances_val2014.json", {"images": [], "annotations": [{"image_id": 1, "bbox": []}]}
    )
    put(folder, *[f"train2014/{coco_image(n)['file_name']}" for n in train])
    return put(folder, *[f"val2014/{coco_image(n, 'val')['file_name']}" for n in val])


def test_coco(coco, read):
    assert detect(coco) == "coco"
    rows = read(coco)
    assert [r.image_id for r in rows] == ["9", "25", "30", "34", "42", "73", "74", "133"]
    first, last = rows[0], rows[-1]
    assert first.captions == ["Girl eating.", "A girl at a table."] and first.lang == "en" and first.group == "coco-9"
    assert (first.split, last.split) == ("train", "val")
    assert first.path == "train2014/COCO_train2014_000000000009.jpg"
    assert first.where == "annotations/captions_train2014.json: annotations[0]"


def test_coco_has_no_test_split_until_one_is_drawn(coco, settings, tmp_path):
    with pytest.raises(DataError, match=r"split 'test' of coco has no rows.*data\.missing_splits=draw"):
        prepare(settings(coco), tmp_path / "out")
    manifest = prepare(settings(coco, missing_splits="draw"), tmp_path / "out")
    assert manifest["counts"] == {"train": 4, "val": 2, "test": 2}


def test_drawing_what_is_missing_suits_a_set_that_names_no_split(tmp_path, put, settings):
    """As when a run on STAIR, whose test split was drawn, is evaluated on YJ, which has none of its own."""
    folder = write_json(tmp_path / "yj" / "yj.json", coco_json({n: [f"写真の{n}"] for n in range(1, 11)})).parent
    put(folder, *[f"train2014/{coco_image(n)['file_name']}" for n in range(1, 11)])
    manifest = prepare(settings(folder, missing_splits="draw", duplicates="keep", leaks="allow"), tmp_path / "out")
    assert manifest["counts"] == {"train": 8, "val": 1, "test": 1}


def test_one_file_and_the_pictures_elsewhere(coco, tmp_path, read):
    file = (coco / "annotations" / "captions_train2014.json").rename(tmp_path / "captions_train2014.json")
    assert read(file)[0].reason == "image-missing"
    rows = read(file, images=str(coco))
    assert all(isinstance(r, SourceRow) for r in rows) and len(rows) == 4
    assert read(file, images=str(coco / "train2014"))[0].image == rows[0].image
    with pytest.raises(ConfigError, match=r"data\.images=.*not a folder"):
        read(file, images=str(tmp_path / "nowhere"))


def test_stair_captions_on_the_pictures_of_2017(tmp_path, put, read):
    folder, pictures = tmp_path / "stair", tmp_path / "pictures"
    texts = {9: ["テーブルの上に料理がある", "ブロッコリーと肉の弁当"], 25: ["キリンが木のそばに立っている"]}
    for name in ("stair_captions_v1.2_train.json", "stair_captions_v1.2_train_tokenized.json"):
        write_json(folder / name, coco_json(texts, tokenized_caption="テーブル の 上"))
    put(pictures, "train2017/000000000009.jpg", "train2017/000000000025.jpg")
    rows = read(folder, images=str(pictures))
    assert [(r.captions, r.lang, r.split) for r in rows] == [(t, "ja", "train") for t in texts.values()]
    (folder / "stair_captions_v1.2_train.json").unlink()
    assert [r.captions for r in read(folder, images=str(pictures))] == list(texts.values())


def test_yj_captions_name_no_files(tmp_path, put, read):
    texts = {9: ["弁当にはブロッコリーが入っている"], 71: ["黄色い電車が走っている"]}
    content = coco_json(texts)
    content["images"] = [
        {k: v for k, v in image.items() if k in ("id", "flickr_url", "license")} for image in content["images"]
    ]
    folder = write_json(tmp_path / "yj" / "yjcaptions26k_clean.json", content).parent
    put(folder, "train2014/COCO_train2014_000000000009.jpg", "images/COCO_train2014_000000000071.jpg")
    rows = read(folder)
    assert [(r.image_id, r.lang, r.split, r.captions) for r in rows] == [
        (str(n), "ja", "", captions) for n, captions in texts.items()
    ]


def test_english_and_japanese_on_the_same_pictures(coco, read):
    write_json(coco / "annotations" / "stair_captions_v1.2_train.json", coco_json({9: ["女の子が食べている"]}))
    rows = {r.image_id: r for r in read(coco)}
    assert rows["9-en"].captions[0] == "Girl eating." and rows["9-ja"].captions == ["女の子が食べている"]
    assert (rows["9-en"].lang, rows["9-ja"].lang) == ("en", "ja")
    assert rows["9-en"].group == rows["9-ja"].group and rows["9-en"].image == rows["9-ja"].image


@pytest.mark.parametrize(
    ("change", "reason", "where", "said"),
    [
        (lambda c: c["annotations"][0].pop("caption"), "captions-not-text", "annotations[0]", "'caption' is missing"),
        (lambda c: c["annotations"][0].update(caption=7), "captions-not-text", "annotations[0]", "7"),
        (lambda c: c["annotations"][0].pop("image_id"), "image-not-named", "annotations[0]", "'image_id'"),
        (lambda c: c["annotations"][0].update(image_id="x"), "image-not-named", "annotations[0]", "id x"),
        (lambda c: c["images"][0].update(file_name="../9.jpg"), "image-outside", "annotations[0]", "../9.jpg"),
        (lambda c: c["images"].append({"id": 5, "file_name": "5.jpg"}), "no-captions", "images[2]", "annotations"),
        (lambda c: c["images"].append("oops"), "image-not-named", "images[2]", "oops"),
    ],
)
def test_a_bad_entry_of_coco_is_rejected_with_its_place(tmp_path, put, read, change, reason, where, said):
    content = coco_json({9: ["one", "two"], 25: ["three"]})
    change(content)
    file = write_json(tmp_path / "c" / "captions_train2014.json", content)
    put(tmp_path / "c", *[coco_image(n)["file_name"] for n in (9, 25)])
    bad = [r for r in read(file) if isinstance(r, Rejected)]
    assert (bad[0].reason, bad[0].where) == (reason, f"captions_train2014.json: {where}") and said in bad[0].error
    assert any(isinstance(r, SourceRow) and r.captions == ["three"] for r in read(file))


def test_a_coco_file_that_is_none(tmp_path, read):
    file = write_json(tmp_path / "c.json", {"annotations": {"image_id": 1, "caption": "x"}})
    with pytest.raises(DataError, match=r"c\.json: 'annotations' is dict, expected a list"):
        read(file)
    file.write_text(file.read_text()[:-3])
    with pytest.raises(DataError, match=r"c\.json is not JSON.*line 1"):
        read(file)


# --- Karpathy ---------------------------------------------------------------------------------------------------------


def karpathy_image(number, name, split, texts, **more):
    ids = list(range(5 * number, 5 * number + len(texts)))
    sentences = [
        {"tokens": t.lower().strip(" .").split(), "raw": t, "imgid": number, "sentid": i} for i, t in zip(ids, texts)
    ]
    return {"sentids": ids, "imgid": number, "sentences": sentences, "split": split, "filename": name, **more}


@pytest.mark.parametrize(
    ("name", "folder", "files"),
    [
        ("flickr8k", "Flicker8k_Dataset", ["2513260012_03d33305cf.jpg", "2903617548_d3e38d7f88.jpg", "3338291921.jpg"]),
        ("flickr30k", "flickr30k-images", ["1000092795.jpg", "10002456.jpg", "1000268201.jpg"]),
        ("UCM_captions", "imgs", ["1.tif", "2.tif", "3.tif"]),
        ("rsicd", "RSICD_images", ["airport_1.jpg", "airport_10.jpg", "airport_100.jpg"]),
    ],
)
def test_karpathy(tmp_path, put, read, name, folder, files):
    splits = ["train", "val", "test"]
    images = [karpathy_image(i, f, s, [f"Thing {i} .", "x"]) for i, (f, s) in enumerate(zip(files, splits))]
    write_json(tmp_path / "set" / f"dataset_{name}.json", {"images": images, "dataset": name})
    put(tmp_path / "set", *[f"{folder}/{f}" for f in files])
    assert detect(tmp_path / "set") == "karpathy"
    rows = read(tmp_path / "set")
    assert [r.split for r in rows] == splits and [r.image_id for r in rows] == files
    assert rows[1].captions == ["Thing 1 .", "x"] and rows[1].source == name and rows[1].lang == "en"
    assert rows[1].where == f"dataset_{name}.json: images[1]" and rows[1].path == f"{folder}/{files[1]}"


def test_karpathy_coco_by_its_folder_and_restval(tmp_path, put, read):
    names = [f"COCO_val2014_{n:012d}.jpg" for n in (1, 2)]
    images = [
        karpathy_image(i, n, s, ["a"], filepath="val2014", cocoid=i) for i, (n, s) in enumerate(zip(names, ["restval", "test"]))
    ]  # fmt: skip
    write_json(tmp_path / "k" / "dataset_coco.json", {"images": images, "dataset": "coco"})
    put(tmp_path / "pictures", *[f"val2014/{n}" for n in names])
    rows = read(tmp_path / "k", images=str(tmp_path / "pictures"))
    assert [(r.split, r.path) for r in rows] == [("train", f"val2014/{names[0]}"), ("test", f"val2014/{names[1]}")]


@pytest.mark.parametrize(
    ("change", "reason", "said"),
    [
        (lambda i: i.pop("sentences"), "no-captions", "'sentences' is missing"),
        (lambda i: i["sentences"][0].pop("raw"), "captions-not-text", "'raw'"),
        (lambda i: i.pop("filename"), "image-not-named", "'filename' is missing"),
        (lambda i: i.update(split="other"), "split-unknown", "other"),
        (lambda i: i.update(filename="/etc/passwd"), "image-outside", "relative"),
        (lambda i: i.update(filename="gone.jpg"), "image-missing", "gone.jpg"),
    ],
)
def test_a_bad_entry_of_karpathy_is_rejected_with_its_place(tmp_path, put, read, change, reason, said):
    images = [karpathy_image(i, f"{i}.jpg", "train", ["one"]) for i in range(3)]
    change(images[1])
    file = write_json(tmp_path / "dataset_flickr8k.json", {"images": images, "dataset": "flickr8k"})
    put(tmp_path, "0.jpg", "1.jpg", "2.jpg")
    first, bad, last = read(file)
    assert first.captions == last.captions == ["one"]
    assert (bad.reason, bad.where) == (reason, "dataset_flickr8k.json: images[1]") and said in bad.error


def test_two_karpathy_files_in_one_folder(tmp_path, read):
    for name in ("flickr8k", "flickr30k"):
        write_json(tmp_path / f"dataset_{name}.json", {"images": [karpathy_image(0, "0.jpg", "train", ["x"])]})
    with pytest.raises(DataError, match=r"dataset_flickr30k\.json, dataset_flickr8k\.json: give one"):
        read(tmp_path)


# --- RISC -------------------------------------------------------------------------------------------------------------

RISC_HEADER = ["source", "split", "image", *[f"caption_{i}" for i in range(1, 6)]]


def risc(folder, rows, header=RISC_HEADER):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "captions.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return folder


def test_risc(tmp_path, put, read):
    five = ["Many cars, And some trees .", "a", "b", "c", "d"]
    folder = risc(
        tmp_path / "RISCM",
        [
            ["NWPU", "train", "NWPU_27985.jpg", *five],
            ["RSICD", "val", "RSICD_5849.jpg", "e", "f", "", "", ""],
            ["UCM", "test", "UCM_1499.jpg", *five],
            ["UCM", "test", "UCM_1500.jpg", "", "", "", "", ""],
        ],
    )
    put(folder, *[f"resized/{n}" for n in ("NWPU_27985.jpg", "RSICD_5849.jpg", "UCM_1499.jpg", "UCM_1500.jpg")])
    assert detect(folder) == "risc"
    a, b, c, empty = read(folder)
    assert a.captions == five and b.captions == ["e", "f"]
    assert [r.split for r in (a, b, c)] == ["train", "val", "test"]
    assert [r.source for r in (a, b, c)] == ["RISCM/NWPU", "RISCM/RSICD", "RISCM/UCM"]
    assert a.path == "resized/NWPU_27985.jpg" and a.where == "captions.csv:2"
    assert (empty.reason, empty.where) == ("no-captions", "captions.csv:5")


@pytest.mark.parametrize(
    ("row", "reason", "said"),
    [
        (["NWPU", "train", "b.jpg", "a"], "not-csv", "4 cells under 8 columns"),
        (["NWPU", "holdout", "b.jpg", *"abcde"], "split-unknown", "holdout"),
        (["NWPU", "train", "", *"abcde"], "image-not-named", "'image' is missing"),
        (["NWPU", "train", "gone.jpg", *"abcde"], "image-missing", "resized/gone.jpg"),
    ],
)
def test_a_bad_line_of_risc_is_rejected_with_its_place(tmp_path, put, read, row, reason, said):
    good = ["NWPU", "train", "a.jpg", *"abcde"]
    folder = put(risc(tmp_path / "r", [good, row]), "resized/a.jpg", "resized/b.jpg")
    first, bad = read(folder)
    assert first.captions == list("abcde")
    assert (bad.reason, bad.where) == (reason, "captions.csv:3") and said in bad.error


# --- IU X-Ray ---------------------------------------------------------------------------------------------------------


def report(study, views, findings="The lungs are clear.", impression="Normal chest."):
    """An Open-i report, as in ecgen-radiology/."""
    images = "".join(
        f'<parentImage id="{v}"><figureId>F{i}</figureId><caption>PA</caption><panel type="single"><url>/hadoop/{v}.jpg'
        "</url></panel></parentImage>"
        for i, v in enumerate(views, 1)
    )
    return f"""<?xml version="1.0" encoding="utf-8"?>
<eCitation>
  <meta type="rr"/>
  <uId id="{study}"/>
  <pmcId id="{study[3:]}"/>
  <docSource>CXR</docSource>
  <MedlineCitation><Article PubModel="Electronic"><Abstract>
    <AbstractText Label="COMPARISON">None.</AbstractText>
    <AbstractText Label="INDICATION">Positive TB test</AbstractText>
    <AbstractText Label="FINDINGS">{findings}</AbstractText>
    <AbstractText Label="IMPRESSION">{impression}</AbstractText>
  </Abstract></Article></MedlineCitation>
  <MeSH><major>normal</major></MeSH>
  {images}
</eCitation>
"""


@pytest.fixture
def openi(tmp_path, put):
    folder = tmp_path / "openi"
    (folder / "ecgen-radiology").mkdir(parents=True)
    views = {
        1: ["CXR1_1_IM-0001-3001", "CXR1_1_IM-0001-4001"],
        2: ["CXR2_IM-0652-1001"],
        10: ["CXR10_IM-0002-1001", "CXR10_IM-0002-2001"],
    }
    for number, names in views.items():
        (folder / "ecgen-radiology" / f"{number}.xml").write_text(report(f"CXR{number}", names))
        put(folder, *[f"NLMCXR_png/{n}.png" for n in names])
    return folder


def test_open_i_reports(openi, read):
    assert detect(openi) == "iu_xray"
    rows = read(openi)
    assert [(r.image_id, r.group) for r in rows] == [
        ("CXR1_1_IM-0001-3001", "CXR1"),
        ("CXR1_1_IM-0001-4001", "CXR1"),
        ("CXR2_IM-0652-1001", "CXR2"),
        ("CXR10_IM-0002-1001", "CXR10"),
        ("CXR10_IM-0002-2001", "CXR10"),
    ]
    assert all(r.captions == ["The lungs are clear. Normal chest."] and not r.split for r in rows)
    assert rows[0].path == "NLMCXR_png/CXR1_1_IM-0001-3001.png" and rows[0].where == "ecgen-radiology/1.xml"
    assert read(openi, report="findings")[0].captions == ["The lungs are clear."]
    assert read(openi, report="impression")[0].captions == ["Normal chest."]


def test_views_of_a_study_are_never_torn_apart(openi, settings, tmp_path):
    for seed in range(5):
        out = tmp_path / f"out{seed}"
        prepare(settings(openi, seed=seed, splits=[0.4, 0.3, 0.3]), out)
        shards = open_shards(out)
        found = [set(shards.groups(s).values()) for s in shards.splits]
        assert sum(map(len, found)) == len(set().union(*found)) == 3


def test_a_report_without_its_section_or_pictures(openi, read):
    folder = openi / "ecgen-radiology"
    (folder / "2.xml").write_text(report("CXR2", ["CXR2_IM-0652-1001"], findings=""))
    (folder / "3.xml").write_text(report("CXR3", []))
    (folder / "4.xml").write_text(report("CXR4", ["CXR4_IM-1"])[:-20])
    (folder / "5.xml").write_text(report("CXR5", ["../CXR5"]))
    (folder / "6.xml").write_text(report("CXR6", ["CXR6_IM-9"]))
    assert {r.image_id: r for r in read(openi)}["CXR2_IM-0652-1001"].captions == ["Normal chest."]
    bad = {r.where: r for r in read(openi, report="findings") if isinstance(r, Rejected)}
    assert {where: r.reason for where, r in bad.items()} == {
        "ecgen-radiology/2.xml": "no-captions",
        "ecgen-radiology/3.xml": "image-not-named",
        "ecgen-radiology/4.xml:14": "not-xml",
        "ecgen-radiology/5.xml": "image-outside",
        "ecgen-radiology/6.xml": "image-missing",
    }
    assert "IMPRESSION" in bad["ecgen-radiology/2.xml"].error and "CXR6_IM-9.png" in bad["ecgen-radiology/6.xml"].error


@pytest.fixture
def r2gen(tmp_path, put):
    def study(name, split, text="The heart is normal."):
        paths = [f"{name}/0.png", f"{name}/1.png"]
        put(tmp_path / "iu", *[f"images/{p}" for p in paths])
        return {"id": name, "report": text, "image_path": paths, "split": split}

    names = {"train": ["CXR2384_IM-0942", "CXR2926_IM-1328"], "val": ["CXR2056_IM-0694-1001"], "test": ["CXR9_IM-2407"]}
    content = {split: [study(n, split) for n in found] for split, found in names.items()}
    write_json(tmp_path / "iu" / "annotation.json", content)
    return tmp_path / "iu"


def test_r2gen_annotation(r2gen, read):
    assert detect(r2gen) == detect(r2gen / "annotation.json") == "iu_xray"
    rows = read(r2gen)
    assert [r.split for r in rows] == ["train"] * 4 + ["val"] * 2 + ["test"] * 2
    assert rows[0].image_id == "CXR2384_IM-0942/0.png" and rows[0].path == "images/CXR2384_IM-0942/0.png"
    assert [r.group for r in rows[:4]] == ["CXR2384", "CXR2384", "CXR2926", "CXR2926"]
    assert rows[0].captions == ["The heart is normal."] and rows[2].where == "annotation.json: train[1]"
    with pytest.raises(ConfigError, match=r"data\.report=impression.*findings alone"):
        read(r2gen, report="impression")


@pytest.mark.parametrize(
    ("change", "reason", "said"),
    [
        (lambda s: s.pop("report"), "captions-not-text", "'report' is missing"),
        (lambda s: s.pop("image_path"), "image-not-named", "'image_path' is missing"),
        (lambda s: s.update(image_path=["gone/0.png"]), "image-missing", "images/gone/0.png"),
    ],
)
def test_a_bad_study_is_rejected_with_its_place(r2gen, read, change, reason, said):
    content = json.loads((r2gen / "annotation.json").read_text())
    change(content["train"][1])
    write_json(r2gen / "annotation.json", content)
    bad = [r for r in read(r2gen) if isinstance(r, Rejected)]
    assert {(r.reason, r.where) for r in bad} == {(reason, "annotation.json: train[1]")} and said in bad[0].error
    write_json(r2gen / "annotation.json", {**content, "extra": "image_path report"})
    with pytest.raises(DataError, match="key 'extra'"):
        read(r2gen)
