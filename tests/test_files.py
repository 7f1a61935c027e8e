"""Files are whole or not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from raycap.errors import RunError
from raycap.files import (
    atomic_folder,
    read_json,
    read_jsonl,
    sha256_folder,
    sha256_json,
    write_atomic,
    write_json,
    write_jsonl,
)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    file = write_json(tmp_path / "a.json", {"old": 1})
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(RunError, match="No space left"):
        write_json(file, {"new": 2})
    assert read_json(file) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_writer_killed_in_the_middle_leaves_the_old_file(tmp_path):
    file = write_atomic(tmp_path / "a.txt", "old")
    code = (
        "import os, raycap.files as f\n"
        "f.os.replace = lambda a, b: os._exit(9)\n"
        f"f.write_atomic({str(file)!r}, 'new' * 1000)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert file.read_text() == "old"


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(ValueError), atomic_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        raise ValueError
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "b").write_text("2")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_numbers_that_json_does_not_know_become_null(tmp_path):
    file = write_json(tmp_path / "a.json", {"nan": float("nan"), "tuple": (1, 2), "path": tmp_path})
    assert json.loads(file.read_text()) == {"nan": None, "tuple": [1, 2], "path": str(tmp_path)}


def test_jsonl_keeps_every_character(tmp_path):
    rows = [{"caption": "a\u2028b 猫 \n|||"}, {"caption": ""}]
    assert read_jsonl(write_jsonl(tmp_path / "a.jsonl", rows)) == rows


def test_hashes_see_names_contents_and_not_key_order(tmp_path):
    (tmp_path / "a").write_text("1")
    first = sha256_folder(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert sha256_folder(tmp_path) != first
    assert sha256_json({"a": 1, "b": 2}) == sha256_json({"b": 2, "a": 1}) != sha256_json({"a": 1, "b": 3})


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(RunError, match="file"):
        write_atomic(blocker / "below.txt", "x")
