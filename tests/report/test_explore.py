import html.parser
import io
import json
import math

import numpy as np
import pytest
from PIL import Image

from raycap.cli import main
from raycap.config import from_dict
from raycap.data.shards import open_shards, prepare
from raycap.evaluate import metrics
from raycap.report import explore as module
from raycap.report.explore import explore, leave_one_out_bleu4, sample_rows, table, tfidf_cosines, words_of
from raycap.report.explore_page import bars, random_pictures, render
from raycap.report.spread import histogram, spread
from raycap.report.tokens import ModelTokens, token_line, tokens_of_shards


def picture(number, fmt="PNG"):
    coarse = Image.fromarray(np.random.default_rng(number).integers(0, 255, (6, 8, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((64, 48), Image.Resampling.BICUBIC).save(buffer, format=fmt)
    return buffer.getvalue()


ROWS = [
    ("train", "en", ["A dog runs on the grass .", "A dog runs on the grass .", "two <b>brown</b> dogs"]),
    ("train", "en", ["a cat sleeps", "the cat is asleep on a red mat"]),
    ("train", "en", ["A dog runs on the grass .", "a zebra"]),
    ("val", "en", ["a cat sleeps", "one cat"]),
    ("test", "en", ["a cat sleeps", "a giraffe eats leaves"]),
    ("train", "ja", ["犬が走る。", "犬が草の上を走っている"]),
    ("val", "ja", ["猫が寝ている"]),
    ("test", "ja", ["猫が寝ている", "赤い鳥"]),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explored")
    lines = []
    for n, (split, lang, captions) in enumerate(ROWS):
        (folder / f"{n}.png").write_bytes(picture(n))
        lines.append({"image": f"{n}.png", "captions": captions, "split": split, "lang": lang})
    (folder / "leak.bmp").write_bytes(picture(0, "BMP"))
    lines.append({"image": "leak.bmp", "captions": ["a leak"], "split": "test", "lang": "en"})
    (folder / "captions.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return folder


@pytest.fixture(scope="module")
def shards(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "out"
    prepare(from_dict({"data": {"source": str(source), "leaks": "allow"}}), out)
    return open_shards(out)


@pytest.fixture(scope="module")
def found(shards):
    """With Java's METEOR where there is Java."""
    tokens = ModelTokens("words", lambda captions: [[len(w) for w in c.split()] for c in captions], 3, 5, extra=1)

    def clip(captions):
        vectors = np.array([[len(c), 1.0 + c.count("a")] for c in captions])
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    return explore(shards, model=lambda lang: tokens, clip=clip, clip_name="toy")


def test_counts_and_repetition_by_hand(found):
    english, japanese = found["captions"]["en"], found["captions"]["ja"]
    assert found["splits"] == {"train": 4, "val": 2, "test": 3} and found["images"]["images"] == 9
    assert (english["images"], english["captions"]) == (6, 12) and (japanese["images"], japanese["captions"]) == (3, 5)
    assert english["captions_per_image"]["max"] == 3 and english["characters"]["max"] == 30
    repeated = english["repeated"]
    assert repeated["exact"] == 4 and repeated["inside_an_image"] == 1 and repeated["distinct"] == 8
    assert repeated["distinct_sets"] == 6
    assert (repeated["test_captions_in_train"], repeated["test_captions"]) == (1, 3)
    assert repeated["frequent"][0] == ["A dog runs on the grass.", 3]
    assert japanese["repeated"]["exact"] == 1 and japanese["characters"]["min"] == 3


def test_vocabulary(found):
    vocabulary = found["captions"]["en"]["vocabulary"]
    assert dict(vocabulary["frequent"])["cat"] == 5 and "zebra" in vocabulary["rare"]
    assert vocabulary["test_words_unseen_in_train"] == 4  # giraffe, eats, leaves, leak
    assert vocabulary["test_share_unseen"] == pytest.approx(4 / 9)


def test_tokens_of_a_model_are_counted_cut_and_unknown_ones_told(found):
    tokens = found["captions"]["en"]["tokens"]
    lengths = [6, 6, 3, 3, 8, 6, 2, 3, 2, 3, 4, 2]
    assert tokens["mean"] == pytest.approx(np.mean(lengths)) and tokens["captions_cut"] == sum(n > 4 for n in lengths)
    # dog and the, three times; cat in three; the, cat, red, mat; two; one, cat
    assert tokens["unknown"] == 6 + 3 + 4 + 1 + 2 and tokens["unknown_share"] == pytest.approx(16 / sum(lengths))


def test_tokens_by_language_without_the_rest_of_explore(shards, found):
    tokens = ModelTokens("words", lambda captions: [[len(w) for w in c.split()] for c in captions], 3, 5, extra=1)
    asked = []
    counts = tokens_of_shards(shards, lambda lang: asked.append(lang) or tokens)
    assert counts == {lang: found["captions"][lang]["tokens"] for lang in ("en", "ja")} and sorted(asked) == [
        "en",
        "ja",
    ]
    assert counts["en"]["captions"] == 12 and counts["en"]["tokens"] == 48
    assert token_line(counts["en"]) == "4 of 12 captions cut at 5 tokens; 48 tokens, 33.33% of them unknown"
    assert "the tokeniser knows all of them" in token_line({**counts["en"], "unknown_share": None})


def test_leaks_are_told_and_stop_nothing(found):
    assert found["leaks"] == {"train-test": {"exact": 1}} and found["duplicates"] == {"exact": 1, "near": 0}
    assert ("pictures in two splits", "1 train-test") in table(found)


def test_likeness(found):
    likeness = found["captions"]["en"]["likeness"]
    assert likeness["images"] == 5 and likeness["of"] == 6  # one image has one caption
    assert 0 < likeness["bleu4"]["mean"] < 1 and likeness["bleu4"]["se"] > 0
    assert 0 < likeness["clip_cosine"]["mean"] < 1 and likeness["clip_cosine"]["model"] == "toy"
    assert ("meteor" in likeness) == (not metrics._no_meteor("en"))
    assert "meteor" not in found["captions"]["ja"]["likeness"] and any("lang=ja" in note for note in found["notes"])


def test_the_table_has_every_figure_that_004_gives(found):
    """Counts, splits, lengths in words, tokens and characters, duplicates, likeness: of one language and of another."""
    rows = dict(table(found))
    wanted = ["images", "size, px", "train / val / test", "pictures again", "pictures in two splits"]
    likeness = ["BLEU-4", "cosine, TF-IDF", "cosine, CLIP"]
    of_each = [
        "captions", "words a caption", "tokens a caption", "tokens unknown", "characters a caption", "vocabulary",
        "exact duplicates", "sets of captions", *(f"inside an image, {name}" for name in likeness),
    ]  # fmt: skip
    meteor = [] if metrics._no_meteor("en") else ["inside an image, METEOR (en)"]
    assert set(rows) == {*wanted, *(f"{name} ({lang})" for name in of_each for lang in ("en", "ja")), *meteor}
    assert rows["images"] == "9" and rows["size, px"] == "64 x 48" and rows["train / val / test"] == "4 / 2 / 3"
    assert rows["captions (en)"] == "12, 2.00 an image" and rows["exact duplicates (en)"] == "4, 1 inside an image"
    assert rows["words a caption (en)"] == "2-8, mean 4.17" and rows["characters a caption (ja)"].startswith("3-")
    assert all(" ± 0." in rows[f"inside an image, {name} (en)"] for name in likeness)


def test_leave_one_out_of_equal_and_of_different_captions():
    same, other = ["a", "b", "c", "d", "e"], ["v", "w", "x", "y", "z"]
    first, second, third = leave_one_out_bleu4([[same, same], [same, other], [same, same, other]])
    assert first == pytest.approx(1) and second == pytest.approx(0, abs=1e-6) and third == pytest.approx(2 / 3)


def test_tfidf_cosine_by_hand():
    images = [[["a", "b"], ["a", "c"]], [["d"], ["d"]]]
    documents = [c for image in images for c in image]
    rare, common = math.log(5 / 2) + 1, math.log(5 / 3) + 1
    assert tfidf_cosines(images, documents) == pytest.approx([common**2 / (common**2 + rare**2), 1])
    assert tfidf_cosines([[[], ["a"]]], documents) == [0]


def test_the_sample_is_seeded_and_of_images_with_two_captions():
    captions = [["a"] * (1 + n % 3) for n in range(300)]
    chosen = sample_rows(captions, 1, 50)
    assert chosen == sample_rows(captions, 1, 50) == sorted(set(chosen)) != sample_rows(captions, 2, 50)
    assert len(chosen) == 50 and all(len(captions[i]) > 1 for i in chosen)
    assert len(sample_rows(captions, 1, 1000)) == 200


def test_japanese_words_without_fugashi_are_characters(monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "fugashi" else find(name, *a))
    notes = []
    assert words_of(["犬が走る。"], "ja", notes) == ([["犬", "が", "走", "る"]], "char")
    assert "fugashi" in notes[0] and "characters" in notes[0]


def test_a_language_without_tokeniser_is_cut_at_letters():
    notes = []
    assert words_of(["Un chat, l'été !"], "fr", notes) == ([["un", "chat", "l'été"]], "letters") and notes


class Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.links, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_loads_nothing_and_is_well_formed(found, shards):
    pictures = random_pictures(shards, 0)
    text = render(found, pictures, "a <set>")
    page = Page()
    page.feed(text)
    assert page.open == [] and all(link.startswith(("#", "data:image/")) for link in page.links)
    assert "://" not in text and "<b>brown" not in text and "&lt;b&gt;brown" in text and "a &lt;set&gt;" in text
    assert page.tags.count("img") == len(pictures) == 9 and 'lang="ja"' in text and "犬が走る。" in text
    assert text == render(found, random_pictures(shards, 0), "a <set>")


def test_random_pictures_are_of_all_splits_by_the_seed(shards):
    chosen = [p["image_id"] for p in random_pictures(shards, 3, 4)]
    assert len(chosen) == 4 and chosen == [p["image_id"] for p in random_pictures(shards, 3, 4)]
    assert any(chosen != [p["image_id"] for p in random_pictures(shards, s, 4)] for s in range(4, 9))


def test_a_histogram_counts_every_value():
    for values in ([1, 1, 2, 9], list(range(500)), [0.5, 0.25], [7], np.array([0.1] * 3)):
        counted = histogram(values)
        assert sum(counted["counts"]) == len(values) and len(counted["edges"]) == len(counted["counts"]) + 1
        assert bars(counted, "x").count("<rect") == len(counted["counts"])
    assert bars(histogram([]), "x") == ""


def test_clip_scores_in_the_shards_get_a_histogram(found, shards):
    own = {
        **found["captions"]["en"],
        "clip_scores": {**spread([0.2, 0.3]), "histogram": histogram([0.2, 0.3])},
    }
    text = render({**found, "captions": {"en": own}}, [], "x")
    assert "0.200 to 0.300" in text and "captions by CLIPScore" in text


def test_the_verb_writes_page_and_figures(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "leave_one_out_meteor", lambda images, said: [0.5] * len(images))
    out = tmp_path / "about"
    arguments = ["explore", str(source), "--out", str(out), "--plain", f"run.cache_dir={tmp_path / 'cache'}"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "exact duplicates" in printed and "1 train-test" in printed and str(out / "explore.html") in printed
    assert "tokens a caption" not in printed  # no model was named
    assert main([*arguments, "--json", "model.path=builtin:tiny-git"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["captions"]["en"]["tokens"]["captions_cut"] == 0
    saved = json.loads((out / "explore.json").read_text())
    assert {k: v for k, v in figures.items() if k != "folder"} == saved
    assert main([*arguments, "data.leaks=fail"]) == 1 and "data.leaks=drop" in capsys.readouterr().err
    assert main([*arguments, "--sample", "0"]) == 2
