import json

import pytest

from raycap.data import sources
from raycap.data.sources import SOURCES, Rejected, SourceRow, detect, load_source, open_source, register
from raycap.errors import ConfigError, DataError


def read(settings, folder, **data):
    return list(open_source(settings(folder, **data).data, 0))


def test_every_registered_source_loads_and_has_the_parts():
    for name in SOURCES:
        source = load_source(name)
        assert callable(source.detect) and source.layout


def test_a_taken_name_is_refused(monkeypatch):
    monkeypatch.setattr(sources, "SOURCES", dict(SOURCES))
    register("mine", "raycap.data.sources.shapes:Shapes")
    with pytest.raises(ConfigError, match="shapes"):
        register("shapes", "elsewhere:Thing")


def test_unknown_source_names_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'shapes'"):
        detect("shaps")
    with pytest.raises(ConfigError, match="check the path"):
        detect(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"captions\.jsonl.*metadata\.csv"):
        detect(tmp_path)


def test_shapes(settings):
    source = open_source(settings("shapes", shapes_images=[5, 2, 2]).data, 7)
    rows = list(source)
    assert len(source) == len(rows) == 9
    assert [r.split for r in rows] == ["train"] * 5 + ["val"] * 2 + ["test"] * 2
    assert all(isinstance(r, SourceRow) and r.image and len(r.captions) == 5 and r.group for r in rows)
    assert len({r.image_id for r in rows}) == 9
    other = open_source(settings("shapes", shapes_images=[5, 2, 2]).data, 8)
    assert source.fingerprint() != other.fingerprint()


def test_the_committed_set(settings, mini):
    assert detect(mini) == "captions_jsonl"
    source = open_source(settings(mini).data, 0)
    rows = list(source)
    assert len(rows) == len(source) == 12 and source.title == "mini" and source.licence == "Apache-2.0"
    assert rows[0].path == "images/00.png" and rows[0].image == (mini / "images" / "00.png").read_bytes()
    assert rows[0].where == "captions.jsonl:1" and rows[0].source == "mini" and rows[0].lang == "en"


def test_paths_may_be_relative_to_the_folder_too(settings, mini):
    (mini / "images" / "00.png").rename(mini / "00.png")
    assert read(settings, mini)[0].path == "00.png"


def test_optional_keys(settings, make_set):
    folder = make_set(
        [
            {"image": "a.png", "captions": ["x"], "image_id": 0, "group": 12, "lang": "ja", "split": "Validation"},
            {"image": "b.png", "caption": "one"},
            {"image": "c.png", "text": "one", "split": None, "id": "c-7"},
        ]
    )
    a, b, c = read(settings, folder)
    assert (a.image_id, a.group, a.lang, a.split) == ("0", "12", "ja", "val")
    assert (b.image_id, b.captions, b.split, b.group) == ("b.png", ["one"], "", "")
    assert c.image_id == "c-7" and c.split == ""


def test_lines_of_one_image_are_joined(settings, make_set):
    folder = make_set(
        [
            {"image": "a.png", "caption": "one", "split": "train"},
            {"image": "b.png", "caption": "other", "split": "train"},
            {"image": "a.png", "caption": "two", "split": "train"},
            {"image": "a.png", "caption": "three", "split": "test"},
        ]
    )
    a, b, odd = read(settings, folder)
    assert (a.captions, b.captions) == (["one", "two"], ["other"])
    assert odd.reason == "image-conflict" and odd.where == "captions.jsonl:4" and "captions.jsonl:1" in odd.error


LINE_SEPARATOR = {"image": "sep.png", "captions": ["first\u2028second"]}


@pytest.mark.parametrize(
    ("line", "reason", "said"),
    [
        ('{"image": "x.png", "captions": [', "not-json", "Expecting"),
        ("[1, 2]", "not-an-object", "list"),
        ("[" * 100_000, "not-json", ""),
        (b'{"image": "\xff\xfe.png", "captions": ["a"]}', "not-utf8", "byte 11"),
        ('{"image": "\\ud800.png", "captions": ["a"]}', "not-utf8", ""),
        ({"captions": ["a"]}, "image-not-named", "missing"),
        ({"image": 5, "captions": ["a"]}, "image-not-named", "5"),
        ({"image": "", "captions": ["a"]}, "image-not-named", "''"),
        ({"image": "gone.png", "captions": ["a"], "_image": None}, "image-missing", "images/gone.png"),
        ({"image": "x" * 5000, "captions": ["a"], "_image": None}, "image-missing", "xxx"),
        ({"image": "nul\0.png", "captions": ["a"], "_image": None}, "image-missing", ""),
        ({"image": "../secret.png", "captions": ["a"], "_image": None}, "image-outside", "relative"),
        ({"image": "/etc/passwd", "captions": ["a"], "_image": None}, "image-outside", "relative"),
        ({"image": "x.png"}, "no-captions", "missing"),
        ({"image": "x.png", "captions": []}, "no-captions", "empty"),
        ({"image": "x.png", "captions": None}, "no-captions", "missing"),
        ({"image": "x.png", "captions": ["a", 3]}, "captions-not-text", "3"),
        ({"image": "x.png", "captions": {"en": "a"}}, "captions-not-text", "en"),
        ({"image": "x.png", "captions": ["a"], "split": "none"}, "split-unknown", "'none'"),
    ],
)
def test_a_bad_line_is_rejected_with_its_place(settings, make_set, line, reason, said):
    folder = make_set([{"image": "a.png", "captions": ["fine"]}, line, LINE_SEPARATOR])
    first, bad, last = read(settings, folder)
    assert isinstance(first, SourceRow) and last.captions == LINE_SEPARATOR["captions"]
    assert isinstance(bad, Rejected) and (bad.reason, bad.where) == (reason, "captions.jsonl:2")
    assert said in bad.error


def test_byte_order_mark_and_blank_lines(settings, make_set):
    folder = make_set([{"image": "a.png", "captions": ["x"]}, "", "   ", {"image": "b.png", "captions": ["y"]}])
    file = folder / "captions.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert [r.where for r in read(settings, folder)] == ["captions.jsonl:1", "captions.jsonl:4"]


def test_the_fingerprint_follows_content(settings, mini):
    def fingerprint():
        return open_source(settings(mini).data, 0).fingerprint()

    before = fingerprint()
    assert fingerprint() == before
    (mini / "notes.txt").write_text("not part of the set")
    assert fingerprint() == before
    (mini / "images" / "03.png").write_bytes((mini / "images" / "04.png").read_bytes())
    changed = fingerprint()
    assert changed != before
    (mini / "captions.jsonl").write_text((mini / "captions.jsonl").read_text().replace("heart", "Heart"))
    assert fingerprint() != changed


# --- imagefolder ------------------------------------------------------------------------------------------------------


def image_folder(folder, png, table, names=("a.png", "b.png")):
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        (folder / name).write_bytes(png(number))
    for name, text in table.items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def test_metadata_csv(settings, tmp_path, png):
    table = 'file_name,text,split\na.png,"a dog, running",train\nb.png,"two\nlines",\n'
    folder = image_folder(tmp_path / "f", png, {"metadata.csv": table})
    assert detect(folder) == "imagefolder"
    a, b = read(settings, folder)
    assert (a.captions, a.split, a.where, a.image_id) == (["a dog, running"], "train", "metadata.csv:2", "a.png")
    assert (b.captions, b.split) == (["two\nlines"], "")


def test_metadata_csv_with_several_captions(settings, tmp_path, png):
    cell = json.dumps(["one", "two"]).replace('"', '""')
    table = f'file_name,captions\na.png,"{cell}"\nb.png,[not json\nb.png,more\n'
    a, b = read(settings, image_folder(tmp_path / "f", png, {"metadata.csv": table}))
    assert a.captions == ["one", "two"] and b.captions == ["[not json", "more"]


def test_metadata_jsonl_in_folders_named_after_splits(settings, tmp_path, png):
    for split in ("train", "validation", "test"):
        line = json.dumps({"file_name": "a.png", "caption": f"of {split}"})
        image_folder(tmp_path / "f" / split, png, {"metadata.jsonl": line})
    rows = read(settings, tmp_path / "f")
    assert [(r.image_id, r.split, r.where) for r in rows] == [
        ("train/a.png", "train", "train/metadata.jsonl:1"),
        ("validation/a.png", "val", "validation/metadata.jsonl:1"),
        ("test/a.png", "test", "test/metadata.jsonl:1"),
    ]


@pytest.mark.parametrize(
    ("line", "reason", "said"),
    [
        ("b.png,a dog, running", "not-csv", "quote a caption that holds a comma"),
        ("b.png", "not-csv", "1 cells"),
        ('b.png,"a"x', "not-csv", ""),
        ("b.png,", "no-captions", "missing"),
        (",a dog", "image-not-named", "missing"),
        ("c.png,a dog", "image-missing", "c.png"),
        (b"b.png,caf\xe9", "not-utf8", ""),
    ],
)
def test_a_bad_csv_line_is_rejected_with_its_place(settings, tmp_path, png, line, reason, said):
    raw = line if isinstance(line, bytes) else line.encode()
    folder = image_folder(
        tmp_path / "f", png, {"metadata.csv": b"file_name,text\na.png,fine\n" + raw + b"\nb.png,ok\n"}
    )
    first, bad, last = read(settings, folder)
    assert first.captions == ["fine"] and last.captions == ["ok"]
    assert isinstance(bad, Rejected) and (bad.reason, bad.where) == (reason, "metadata.csv:3") and said in bad.error


@pytest.mark.parametrize("header", ["path,text", "file_name,label", ""])
def test_a_csv_without_its_columns_is_an_error(settings, tmp_path, png, header):
    folder = image_folder(tmp_path / "f", png, {"metadata.csv": f"{header}\na.png,x\n"})
    with pytest.raises(DataError, match=r"metadata\.csv.*is needed"):
        read(settings, folder)
