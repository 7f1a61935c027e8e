"""What a person meets who gives each source something wrong: file, line or key are named, and where it helps the remedy."""

import json

import pytest

from raycap.data.shards import prepare
from raycap.errors import ConfigError, DataError

REPORT = """<eCitation><uId id="CXR1"/><AbstractText Label="FINDINGS">Clear lungs.</AbstractText>
<parentImage id="CXR1_1"/></eCitation>"""


def coco(**change):
    found = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "caption": "a dog"}]}
    return json.dumps(found | change)


def karpathy(**change):
    image = {"filename": "a.png", "split": "train", "sentences": [{"raw": "a dog"}]} | change
    return json.dumps({"images": [image], "dataset": "mine"})


# Files of a set, settings, and what must be said of it. Each is a slip that a person makes; "a.png" is always there.
SLIPS = {
    "an empty folder": ({"a.png": None}, {}, r"is an empty folder\. Looked for: captions_jsonl: a folder with captions"),
    "pictures alone": ({}, {}, r"it holds a\.png\. Looked for"),
    "json lines: nothing in them": ({"captions.jsonl": ""}, {}, r"nothing is left of set: 0 rows read \(it has no rows"),
    "json lines: another key": (
        {"captions.jsonl": '{"picture": "a.png", "captions": ["a"]}'},
        {},
        r"captions\.jsonl:1: 'image' is missing; the line has captions, picture",
    ),
    "json lines: cut": (
        {"captions.jsonl": '{"image": "a.png", "capt'}, {}, r"1 not-json\); the first: captions\.jsonl:1: Unterminated .* column",
    ),
    "json lines: a folder's file": (
        {"captions.jsonl": '{"image": "a.png", "captions": ["a"]}'},
        {"source": "captions.jsonl"},
        r"the folder that it lies in, .*set, is read as 'captions_jsonl': give that",
    ),
    "a column that is not there": (
        {"metadata.csv": "file_name,title\na.png,a dog"},
        {"columns": {"captions": "titel"}},
        r"metadata\.csv has no column 'titel' \(data\.columns: captions\); did you mean 'title'",
    ),
    "a csv without captions": ({"metadata.csv": "file_name\na.png"}, {}, r"metadata\.csv has the columns file_name; a col"),
    "a comma in a caption": (
        {"metadata.csv": "file_name,text\na.png,a dog, running"},
        {},
        r"metadata\.csv:2: 3 cells under 2 columns; quote a caption that holds a comma",
    ),
    "risc with one caption": (
        {"captions.csv": "source,split,image,caption\nUCM,train,a.png,a dog"},
        {},
        r"captions\.csv \(columns source, split, image, caption\).*RISC's captions\.csv \(source, split, image, caption_1",
    ),
    "coco: cut": ({"captions_train2014.json": coco()[:-9]}, {}, r"captions_train2014\.json is not JSON: .* line 1 column"),
    "coco: cut before any caption": (
        {"captions_train2014.json": coco()[:30]},
        {},
        r"captions_train2014\.json \(cannot be read as JSON: .*line 1 column",
    ),
    "coco: a list is an object": (
        {"c.json": coco(images={"image_id": 1, "caption": 2})}, {}, r"c\.json: 'images' is dict, expected a list",
    ),
    "coco: other keys": (
        {"c.json": json.dumps({"pictures": [], "texts": []})}, {}, r"c\.json \(keys pictures, texts\)",
    ),
    "coco: no such picture": (
        {"c.json": coco(images=[{"id": 1, "file_name": "b.png"}])}, {}, r"c\.json: annotations\[0\]: no file b\.png nor images/b",
    ),
    "karpathy: no text": (
        {"dataset_mine.json": karpathy(sentences=[{"tokens": ["a"], "raw": None}])},
        {},
        r"dataset_mine\.json: images\[0\]: .* in 'sentences' has no text under 'raw'",
    ),
    "karpathy: another split": (
        {"dataset_mine.json": karpathy(split="holdout")}, {}, r"images\[0\]: 'split' is 'holdout', expected train, val, test",
    ),
    "x-ray: cut": ({"ecgen-radiology/1.xml": REPORT[:80]}, {}, r"ecgen-radiology/1\.xml:1: "),
    "x-ray: no picture": (
        {"ecgen-radiology/1.xml": REPORT}, {}, r"ecgen-radiology/1\.xml: no file CXR1_1\.png nor ecgen-radiology/CXR1_1\.png",
    ),
    "x-ray: no such section": (
        {"ecgen-radiology/1.xml": REPORT}, {"report": "impression"}, r"no text under <AbstractText Label=IMPRESSION>; .*FINDINGS",
    ),
    "r2gen: a split of its own": (
        {"annotation.json": json.dumps({"train": [{"image_path": ["a.png"], "report": "x"}], "extra": []})},
        {},
        r"annotation\.json: key 'extra' holds \[\]; expected train, val and test",
    ),
    "parquet: no parquet": ({"data/train.parquet": "PAR1 and then nothing"}, {}, r"train\.parquet is not parquet, or is cut"),
    "save_to_disk: half of it": (
        {"dataset_info.json": "{}", "state.json": '{"_data_files": []'}, {}, r"set cannot be read as a data set of save_to_disk",
    ),
    "a folder of pictures that is none": (
        {"captions.jsonl": '{"image": "a.png", "captions": ["a"]}'},
        {"images": "pictures"},
        r"data\.images=pictures is not a folder",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SLIPS)
def test_a_slip_is_told(name, tmp_path, png, settings):
    files, data, said = SLIPS[name]
    folder = tmp_path / "set"
    folder.mkdir()
    for file, text in {"a.png": png(1), **files}.items():
        (folder / file).parent.mkdir(exist_ok=True)
        if text is not None:
            (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    data = dict(data)
    source = folder / data.pop("source", "")
    with pytest.raises((DataError, ConfigError), match=said):
        prepare(settings(source, **data), tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
