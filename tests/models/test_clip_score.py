"""CLIPScore on a tiny CLIP against the paper's formulas, and against its published example where the weights are."""

from __future__ import annotations

import json

import numpy as np
import pytest

from raycap.errors import ConfigError, DataError, ModelError
from raycap.evaluate import score
from raycap.models.clip_score import DEFAULT_MODEL, PREFIX, ClipScorer


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """A folder in open_clip's layout with random weights."""
    from raycap.models.tiny.clip import build_clip

    return build_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def pictures():
    from PIL import Image

    rng = np.random.default_rng(0)
    return {n: Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)) for n in range(3)}


PREDICTIONS = {0: "a dog runs", 1: "", 2: "a red car on a road"}
REFERENCES = {0: ["a dog runs fast", "the dog"], 1: ["an empty street"], 2: ["a car", "red car", "a vehicle on a road"]}


def test_as_the_papers_code(tiny_clip, pictures):
    """Its formulas written out, one image at a time, on open_clip's own features."""
    import open_clip
    import torch

    found = score(
        PREDICTIONS, REFERENCES, ("clipscore",), tokeniser="ptb-py", images=pictures, clip=str(tiny_clip)
    )  # fmt: skip
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tiny_clip}")
    model.eval()
    tokenise = open_clip.get_tokenizer(f"local-dir:{tiny_clip}")

    def text(caption):
        with torch.no_grad():
            features = model.encode_text(tokenise(["A photo depicts " + caption]))[0]
        return features / features.norm()

    for n, caption in PREDICTIONS.items():
        with torch.no_grad():
            picture = model.encode_image(preprocess(pictures[n])[None])[0]
        cosine = float(picture / picture.norm() @ text(caption))
        scaled = 2.5 * max(cosine, 0)
        best = max(float(text(caption) @ text(r)) for r in REFERENCES[n])
        both = 2 * scaled * best / (scaled + best) if scaled + best > 0 else 0
        assert found["clip_cosine"].per_image[n] == pytest.approx(cosine, abs=1e-5)
        assert found["clipscore"].per_image[n] == pytest.approx(scaled, abs=1e-5)
        assert found["refclipscore"].per_image[n] == pytest.approx(both, abs=1e-5)
    assert found["clipscore"].score == pytest.approx(np.mean(list(found["clipscore"].per_image.values())))
    assert "variant:raw" in found["clip_cosine"].signature and "variant:w2.5" in found["clipscore"].signature
    assert "clip:folder@" in found["clipscore"].signature and str(tiny_clip) not in found["clipscore"].signature


def test_long_captions_are_cut_and_counted(tiny_clip, pictures):
    long = {**PREDICTIONS, 0: "dog " * 100, 1: "cat " * 70}
    with pytest.warns(UserWarning, match="1 of 3 captions are longer than CLIP's 77 tokens"):
        found = score(long, REFERENCES, ("clipscore",), tokeniser="ptb-py", images=pictures, clip=str(tiny_clip))
    assert "|cut:77|" in found["clipscore"].signature
    scorer = ClipScorer(str(tiny_clip))
    features, cut = scorer.text_features(["dog " * 74 + word for word in ("one", "two")])  # differ beyond the context
    assert cut == 2 and np.array_equal(features[0], features[1])
    assert scorer.text_features(["dog " * 72])[1] == 0  # A photo depicts + 72 + start and end = 77
    assert scorer.text_features(["dog " * 73])[1] == 1


def test_choosing_a_caption(tiny_clip, pictures):
    scorer = ClipScorer(str(tiny_clip))
    each, cut = scorer.cosines(pictures.values(), list(REFERENCES.values()))
    assert [len(e) for e in each] == [2, 1, 3] and cut == 0
    picture, texts = scorer.image_features([pictures[2]]), scorer.text_features(REFERENCES[2])[0]
    assert each[2] == pytest.approx(texts @ picture[0], abs=1e-5)
    with pytest.raises(DataError, match="3 pictures for 2"):
        scorer.cosines(pictures.values(), [["a"], ["b"]])


def test_what_is_missing_is_said(tiny_clip, pictures, tmp_path):
    with pytest.raises(ConfigError, match="--images"):
        score(PREDICTIONS, REFERENCES, ("clipscore",), tokeniser="ptb-py")
    with pytest.raises(ConfigError, match="no effect without the metric clipscore"):
        score(PREDICTIONS, REFERENCES, ("bleu",), tokeniser="ptb-py", images=pictures)
    with pytest.raises(DataError, match="1 of 3 captions have no picture, first 2"):
        few = {n: pictures[n] for n in (0, 1)}
        score(PREDICTIONS, REFERENCES, ("clipscore",), tokeniser="ptb-py", images=few, clip=str(tiny_clip))
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match="cannot read a picture"):
        ClipScorer(str(tiny_clip)).image_features([tmp_path / "bad.jpg"])
    for name, said in (
        ("ViT-B-32/nothing", "weights of ViT-B-32 are openai"),
        ("nothing", "no such model"),
        ("ViT-B-32=/nowhere.safetensors", "no file"),
        (str(tmp_path), "open_clip_config.json"),
    ):
        with pytest.raises(ModelError, match=said):
            ClipScorer(name)


def test_published_example(shared_data):
    """The paper's README: CLIPScore .8584 and RefCLIPScore .8450 of the good captions, .7153 and .7253 of the bad."""
    folder = shared_data / "clipscore_example"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    try:
        ClipScorer(device="cpu")
    except ModelError as error:
        pytest.skip(f"no weights of {DEFAULT_MODEL}: {error.message[:120]}")
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    expected = json.loads((folder / "expected_scores.json").read_text(encoding="utf-8"))
    for kind in ("good", "bad"):
        found = score(
            {r["image"]: r[f"candidate_{kind}"] for r in rows},
            {r["image"]: r["captions"] for r in rows},
            ("clipscore",),
            images={r["image"]: folder / "images" / r["image"] for r in rows},
        )
        assert found["clipscore"].score == pytest.approx(expected[kind]["CLIPScore"], abs=2e-3)
        assert found["refclipscore"].score == pytest.approx(expected[kind]["RefCLIPScore"], abs=2e-3)
    assert PREFIX == "A photo depicts "
