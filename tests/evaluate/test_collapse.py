"""Collapse: what a broken model says is flagged, what people say is not."""

from __future__ import annotations

import json

import pytest

from raycap.errors import DataError
from raycap.evaluate.collapse import collapse, flagged, repeats

REFERENCES = [[f"a small thing number {n} on the left", f"thing {n}"] for n in range(20)]


def test_one_caption_for_all():
    found = collapse(["A thing"] * 20, REFERENCES)
    assert found["collapsed"] and "100% of the captions are the same" in found["reasons"][0]
    assert (found["top_caption"], found["top_share"], found["distinct_share"]) == ("A thing", 1.0, 0.05)


def test_loops():
    found = collapse([f"a red {n} a a a a a" for n in range(20)], REFERENCES)
    assert found["collapsed"] and found["repetition_share"] == 1
    assert found["distinct_share"] == 1


def test_empty_captions():
    found = collapse([""] * 5 + [f"a thing {n}" for n in range(15)], REFERENCES)
    assert found["collapsed"] and found["empty_share"] == 0.25 and "25% are empty" in found["reasons"]


def test_echoed_prompt():
    captions = [f"Describe  this image: {n}" for n in range(20)]
    assert collapse(captions, REFERENCES, prompt="describe this image:")["echo_share"] == 1
    assert collapse(captions, REFERENCES, prompt="describe this image:")["collapsed"]
    assert collapse(captions, REFERENCES)["echo_share"] == 0


def test_people_who_begin_like_the_prompt_are_not_echoed():
    references = [[f"a picture of thing {n}"] for n in range(20)]
    captions = [f"a picture of some thing {n}" for n in range(20)]
    assert not collapse(captions, references, prompt="a picture of")["collapsed"]
    assert collapse(captions, REFERENCES, prompt="a picture of")["collapsed"]


def test_people_who_say_things_twice_are_not_looping():
    references = [[f"thing {n} a b thing {n} a b"] for n in range(20)]
    captions = [f"on top thing {n} a thing {n} a" for n in range(20)]
    assert collapse(captions, references)["repetition_share"] == 1
    assert not collapse(captions, references)["collapsed"]
    assert collapse(captions, REFERENCES)["reasons"] == ["100% repeat themselves"]


def test_japanese_is_counted_in_characters():
    """Words are not set apart there: a caption is no single word, and doubled words are no loop."""
    references = [[f"赤い車が{n}台、道のそばにとまっている"] for n in range(20)]
    good = collapse([f"{n}台の車がいろいろな道をそろそろと走っている" for n in range(20)], references, lang="ja")
    assert not good["collapsed"] and good["repetition_share"] == 0 and 0.5 < good["length_ratio"] < 2
    long = collapse([f"{n}台の" + "赤い車と青い空と白い雲、" * 20 for n in range(20)], references, lang="ja")
    assert long["collapsed"] and long["length_ratio"] > 3 and long["repetition_share"] == 1
    assert repeats("車車車車", "ja") and repeats("道のそばに道のそばに", "ja") and not repeats("わくわくする", "ja")
    rows = flagged(
        {"a": "赤い車と" * 9, "b": "車", "c": references[0][0]}, dict.fromkeys("abc", references[0]), lang="ja"
    )
    assert [(r["image_id"], r["reasons"][0]) for r in rows] == [
        ("a", "repeats itself"), ("b", "0.1 times the length of its closest reference"),
    ]  # fmt: skip


def test_runaway_length():
    long = collapse([" ".join(f"w{n}x{k}" for k in range(60)) for n in range(20)], REFERENCES)
    assert long["collapsed"] and long["length_ratio"] > 7


def test_good_captions():
    found = collapse([refs[0] for refs in REFERENCES], REFERENCES)
    assert not found["collapsed"] and found["reasons"] == []
    assert found["length_ratio"] == 1


def test_alike_pictures_are_no_collapse():
    """Where people, too, write the same for most pictures, a model that does so is right."""
    references = [["there is farmland"]] * 18 + [["a river"], ["a road"]]
    captions = ["there is farmland"] * 19 + ["a road"]
    assert not collapse(captions, references)["collapsed"]
    assert collapse(captions)["collapsed"]


def test_a_handful_is_judged_by_its_captions_alone():
    assert not collapse(["a dog"], [["a dog"]])["collapsed"]
    assert not collapse(["a dog"] * 3, [["a dog"]] * 3)["collapsed"]
    assert collapse(["a a a a"] * 3, [["a dog runs"]] * 3)["collapsed"]


def test_nothing():
    assert collapse([])["collapsed"] is False


def test_as_json():
    assert json.loads(json.dumps(collapse(["a"] * 9, REFERENCES[:9])))["collapsed"] is True


@pytest.mark.parametrize(
    ("caption", "flagged"),
    [
        ("a a a", True),
        ("a man on a man on a horse", True),
        ("the red the red circle", True),
        ("one two three four five six one two three four five six", True),
        ("a red circle and a blue circle and a green circle", False),
        ("a very very small dot", False),
        ("side by side", False),
        ("", False),
    ],
)
def test_repeats(caption, flagged):
    assert repeats(caption) is flagged


def test_built_in_captions_do_not_repeat():
    from raycap.data.shapes import generate

    captions = [c for scene in generate(100, seed=2) for c in scene.captions]
    assert not [c for c in captions if repeats(c)]


def test_people_are_not_flagged(fakecap):
    found = collapse([r["references_raw"][0] for r in fakecap], [r["references_raw"][1:] for r in fakecap])
    assert not found["collapsed"], found
    assert found["repetition_share"] < 0.02
    assert not collapse([r["candidate"] for r in fakecap], [r["references_raw"] for r in fakecap])["collapsed"]


def test_captions_for_review():
    from raycap.evaluate.collapse import excluded

    captions = {f"i{n}": "a dog" for n in range(12)} | {
        "empty": " ", "loop": "a man on a man on", "echo": "Describe this: a cat", "long": "words and more words said of it here",
        "tiny": "a bird on", "x1": "one", "x2": "two", "x3": "three",
    }  # fmt: skip
    references = {i: ["a bird"] for i in captions} | {"x1": ["a very long reference of many words"]}
    found = {row["image_id"]: row["reasons"] for row in flagged(captions, references, prompt="Describe this:")}
    assert found["empty"] == ["empty"] and "repeats itself" in found["loop"]
    assert "begins with the prompt" in found["echo"] and found["i0"] == ["said of 12 of 20 images"]
    assert any("times the length" in r for r in found["x1"]) and not {"tiny", "x2", "x3"} & set(found)
    assert found["long"] == ["4.0 times the length of its closest reference"]
    rows = flagged({"a": "", "b": "", "c": ""})
    rows[1]["exclude"] = False
    assert excluded(rows) == {"a", "c"}
    with pytest.raises(DataError, match=r"file:1: expected"):
        excluded([{"image_id": "a", "exclude": "no"}])
    with pytest.raises(DataError, match="image_id"):
        excluded([{"caption": "a"}])
