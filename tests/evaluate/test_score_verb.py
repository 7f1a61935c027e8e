"""`raycap score`: the formats it takes, what it says of odd files, its exit codes."""

from __future__ import annotations

import json

import pytest

from raycap.cli import main
from raycap.files import read_jsonl, write_json, write_jsonl

TEXT = ["--metrics", "bleu,cider", "--tokeniser", "ptb-py"]


@pytest.fixture
def files(tmp_path, golden):
    predictions, references = golden
    write_jsonl(tmp_path / "p.jsonl", [{"image_id": i, "caption": c} for i, c in predictions.items()])
    write_jsonl(tmp_path / "r.jsonl", [{"image_id": i, "captions": c} for i, c in references.items()])
    return tmp_path


def run_json(capsys, *arguments):
    code = main(["score", *map(str, arguments), "--json"])
    out = capsys.readouterr()
    assert code == 0, out.err
    return json.loads(out.out)


def test_jsonl(files, capsys, golden):
    from raycap.evaluate import score

    found = run_json(capsys, files / "p.jsonl", files / "r.jsonl", *TEXT, "--per-image", files / "each.jsonl")
    with pytest.warns(UserWarning, match="from 12 images"):
        wanted = score(*golden, ("bleu", "cider"), tokeniser="ptb-py")
    assert found["images"] == 12
    assert {n: m["score"] for n, m in found["metrics"].items()} == {n: s.score for n, s in wanted.items()}
    assert found["metrics"]["cider"]["signature"] == wanted["cider"].signature
    assert any("from 12 images" in note for note in found["notes"])
    rows = read_jsonl(files / "each.jsonl")
    assert [row["image_id"] for row in rows] == list(golden[0])
    assert rows[0]["cider"] == wanted["cider"].per_image["g01"]


def test_coco_files_score_the_same(files, capsys, golden):
    predictions, references = golden
    ids = {name: n for n, name in enumerate(predictions)}
    write_json(files / "results.json", [{"image_id": ids[i], "caption": c} for i, c in predictions.items()])
    annotations = [{"id": 7, "image_id": ids[i], "caption": c} for i, captions in references.items() for c in captions]
    write_json(files / "captions.json", {"images": [{"id": n} for n in ids.values()], "annotations": annotations})
    coco = run_json(capsys, files / "results.json", files / "captions.json", *TEXT)
    lines = run_json(capsys, files / "p.jsonl", files / "r.jsonl", *TEXT)
    assert {n: m["score"] for n, m in coco["metrics"].items()} == {n: m["score"] for n, m in lines["metrics"].items()}


def test_published_results_file(fakecap, shared_data, tmp_path, capsys):
    write_jsonl(tmp_path / "r.jsonl", [{"image_id": r["image_id"], "captions": r["references_raw"]} for r in fakecap])
    results = shared_data / "coco_fakecap" / "captions_val2014_fakecap_results.json"
    expected = json.loads((shared_data / "coco_fakecap" / "expected_scores.json").read_text(encoding="utf-8"))
    found = run_json(capsys, results, tmp_path / "r.jsonl", *TEXT)
    assert found["metrics"]["cider"]["score"] == pytest.approx(expected["recomputed"]["CIDEr"], abs=1e-6)
    assert found["metrics"]["bleu4"]["score"] == pytest.approx(expected["recomputed"]["Bleu_4"], abs=1e-6)


def test_a_run_folders_predictions_stand_for_both(files, capsys, golden):
    predictions, references = golden
    rows = [{"image_id": i, "caption": c, "references": references[i]} for i, c in predictions.items()]
    write_jsonl(files / "test.served.jsonl", rows)
    assert run_json(capsys, files / "test.served.jsonl", files / "test.served.jsonl", *TEXT)["images"] == 12


def test_what_does_not_match_is_said_and_counted(files, capsys, golden):
    predictions, references = golden
    rows = [{"image_id": i, "caption": c} for i, c in predictions.items()][:-2]
    rows += [{"image_id": "g01", "caption": "again"}, {"image_id": "zz", "caption": "a stranger"}]
    rows[3]["caption"] = " "
    write_jsonl(files / "p.jsonl", rows)
    lines = [{"image_id": i, "captions": [*c, ""]} for i, c in references.items()]
    write_jsonl(files / "r.jsonl", lines)
    found = run_json(capsys, files / "p.jsonl", files / "r.jsonl", *TEXT)
    assert found["images"] == 10
    said = " / ".join(found["notes"])
    for part in ("left out: 1 further caption of", "1 of 11 captions are empty", "1 of 11 predictions have no references", "zz",
                 "12 empty references", "2 of 12 images with references have no prediction", "'g11'"):  # fmt: skip
        assert part in said, (part, said)


def test_document_frequencies_of_a_corpus(files, capsys, golden):
    from raycap.evaluate.cider import CiderScorer

    predictions, references = golden
    corpus = {f"c{n}": [f"a dog number {n}", "a cat"] for n in range(60)}
    write_jsonl(files / "corpus.jsonl", [{"image_id": i, "captions": [*c, " "]} for i, c in corpus.items()])
    found = run_json(capsys, files / "p.jsonl", files / "r.jsonl", *TEXT, "--corpus", files / "corpus.jsonl")
    wanted = CiderScorer(references, corpus=corpus).score(predictions)[0]
    assert found["metrics"]["cider"]["score"] == pytest.approx(wanted, abs=1e-12)
    assert "df:corpus@" in found["metrics"]["cider"]["signature"]
    assert found["notes"] == [f"{files / 'corpus.jsonl'}: left out: 60 empty references"]


def test_pictures_are_found_by_name_stem_or_coco_file(files):
    from raycap.cli.score import find_pictures
    from raycap.errors import UsageError

    folder = files / "pictures"
    (folder / "sub").mkdir(parents=True)
    for name in ("g01.jpg", "sub/COCO_val2014_000000000042.jpg", "photo.png"):
        (folder / name).touch()
    write_json(files / "coco.json", {"images": [{"id": 7, "file_name": "photo.png"}], "annotations": []})
    found = find_pictures(folder, ["g01", "g01.jpg", "42", "7"], files / "coco.json")
    assert {i: p.name for i, p in found.items()} == {
        "g01": "g01.jpg", "g01.jpg": "g01.jpg", "42": "COCO_val2014_000000000042.jpg", "7": "photo.png"}  # fmt: skip
    with pytest.raises(UsageError, match=r"1 of 2 captions, first 'zz'"):
        find_pictures(folder, ["g01", "zz"], files / "r.jsonl")


def test_table(files, capsys):
    assert main(["score", str(files / "p.jsonl"), str(files / "r.jsonl"), *TEXT]) == 0
    out = capsys.readouterr().out
    assert "12 images" in out and "cider|variant:D|tok:ptb-py" in out and "note: CIDEr" in out


@pytest.mark.parametrize(
    ("predictions", "references", "options", "said"),
    [
        ("nowhere.jsonl", "r.jsonl", [], "nowhere.jsonl cannot be read"),
        ("broken.jsonl", "r.jsonl", [], "broken.jsonl:2 is not JSON"),
        ("empty.jsonl", "r.jsonl", [], "holds no predictions"),
        ("r.jsonl", "p.jsonl", [], "r.jsonl:1 has no 'caption'; it has 'image_id', 'captions'. Predictions come first"),
        ("p.jsonl", "keys.jsonl", [], "keys.jsonl:1 has no 'captions' and no 'caption'; it has 'image_id', 'text'"),
        ("keys.jsonl", "r.jsonl", [], "keys.jsonl:1 has no 'caption'"),
        ("named.json", "r.jsonl", [], "named.json:1 has no 'image_id'; it has 'a', 'b', 'c' ..."),
        ("gap.jsonl", "r.jsonl", [], "gap.jsonl:1: 'caption' is nan, expected text"),
        ("latin.jsonl", "r.jsonl", [], "latin.jsonl cannot be read: it is no text in UTF-8"),
        (".", "r.jsonl", [], "cannot be read: Is a directory"),
        ("p.jsonl", "empty.jsonl", [], "holds no references"),
        ("p.jsonl", "p2.jsonl", [], "nothing to score"),
        ("p.jsonl", "r.jsonl", ["--metrics", "cidr"], "did you mean 'cider'"),
        ("p.jsonl", "r.jsonl", ["--metrics", ","], "names no metric"),
        ("p.jsonl", "r.jsonl", ["--tokeniser", "pbt"], "did you mean 'ptb'"),
        ("p.jsonl", "r.jsonl", ["--lang", "de"], "--lang"),
        ("p.jsonl", "r.jsonl", ["--lang", "ja", "--tokeniser", "ptb"], "tokeniser=ptb is not for lang=ja"),
        ("p.jsonl", "r.jsonl", ["--metrics", "clipscore"], "--images FOLDER"),
        ("p.jsonl", "r.jsonl", ["--metrics", "bleu", "--clip", "ViT-B-32/openai"], "no effect"),
        ("p.jsonl", "r.jsonl", ["--metrics", "bleu", "--corpus", "r.jsonl"], "cannot be read"),
        ("p.jsonl", "r.jsonl", ["--metrics", "meteor", "--lang", "ja"], "English"),
    ],
)
def test_misuse_ends_with_two(files, capsys, predictions, references, options, said):
    (files / "broken.jsonl").write_text('{"image_id": 1, "caption": "a"}\n{"image_id": 2,\n')
    (files / "empty.jsonl").write_text("\n")
    write_jsonl(files / "keys.jsonl", [{"image_id": "g01", "text": "a dog"}])
    write_json(files / "named.json", {"a": "a dog", "b": "a cat", "c": "a bus", "d": "a car"})
    (files / "gap.jsonl").write_text('{"image_id": "g01", "caption": NaN}')
    (files / "latin.jsonl").write_bytes('{"image_id": "g01", "caption": "café"}'.encode("latin-1"))
    write_jsonl(files / "p2.jsonl", [{"image_id": 99, "captions": ["a dog"]}])
    assert main(["score", str(files / predictions), str(files / references), *(options or TEXT)]) == 2
    assert said in capsys.readouterr().err


def test_files_as_other_programs_write_them(files, capsys, golden):
    """A byte-order mark before the first line, and numbers that a table with gaps turned into fractions."""
    predictions, references = golden
    lines = [json.dumps({"image_id": float(n), "caption": c}) for n, c in enumerate(predictions.values())]
    (files / "marked.jsonl").write_text("\n".join(lines), encoding="utf-8-sig")
    write_jsonl(files / "r.jsonl", [{"image_id": n, "captions": c} for n, c in enumerate(references.values())])
    assert run_json(capsys, files / "marked.jsonl", files / "r.jsonl", *TEXT)["images"] == 12


def test_help(capsys):
    assert main(["score", "--help"]) == 0
    assert "raycap score results.json captions_val2014.json" in capsys.readouterr().out
