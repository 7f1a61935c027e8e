"""SPICE: what is missing is said; how its program is called and read, with a small program in its place."""

from __future__ import annotations

import sys

import pytest

from raycap.errors import ConfigError, RunError
from raycap.evaluate import score, spice


@pytest.fixture
def models(tmp_path, monkeypatch, needs_java):
    for name in spice.JARS:
        (tmp_path / name).touch()
    monkeypatch.setenv(spice.FOLDER, str(tmp_path))
    return tmp_path


def program(folder, monkeypatch, text):
    """A stand-in for Java that is called as Java is."""
    file = folder / "java"
    file.write_text(f"#!{sys.executable}\nimport json, sys\n{text}")
    file.chmod(0o755)
    monkeypatch.setattr(spice, "require_java", lambda: str(file))


def test_without_its_models_it_says_what_to_get(monkeypatch, tmp_path, needs_java):
    monkeypatch.setattr(spice, "_jars", lambda: [])
    with pytest.raises(ConfigError, match=r"stanford-corenlp-3\.6\.0-models\.jar.*RAYCAP_SPICE"):
        score({1: "a dog"}, {1: ["a dog"]}, ("spice",), tokeniser="ptb-py")
    with pytest.warns(UserWarning, match="SPICE left out"):
        found = score({1: "a dog"}, {1: ["a dog"]}, ("rouge_l", "spice"), tokeniser="ptb-py")
    assert "spice" not in found and any("SPICE left out" in note for note in found.notes)


def test_japanese_is_refused(models):
    with pytest.raises(ConfigError, match=r"scene graphs.*lang=ja"):
        score({1: "犬"}, {1: ["犬"]}, ("spice",), lang="ja", tokeniser="char")


def test_its_answer_in_our_order(models, monkeypatch):
    program(models, monkeypatch, """
at = sys.argv.index("edu.anu.spice.SpiceScorer")
assert "stanford-corenlp-3.6.0.jar" in sys.argv[at - 1], sys.argv
rows = json.load(open(sys.argv[at + 1]))
found = [{"image_id": r["image_id"], "scores": {"All": {"f": None if not r["test"] else len(r["refs"]) / 4}}} for r in rows]
json.dump(found[::-1], open(sys.argv[sys.argv.index("-out") + 1], "w"))
""")  # fmt: skip
    predictions = {"x": "A dog.", "y": "", "z": "a cat"}
    found = score(predictions, {"x": ["a dog", "b"], "y": ["c"], "z": ["d"]}, ("spice",), tokeniser="ptb-py")["spice"]
    assert found.per_image == {"x": 0.5, "y": 0.0, "z": 0.25} and found.score == 0.25
    assert found.signature.startswith("spice|variant:1.0|tok:ptb-py")


def test_its_failure_is_told(models, monkeypatch):
    program(models, monkeypatch, "sys.exit('no parser')")
    with pytest.raises(RunError, match="no parser"):
        spice.run([])
