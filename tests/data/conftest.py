"""Small image sets made on the spot, and the settings that read them."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raycap.config import from_dict

MINI = Path(__file__).resolve().parents[1] / "fixtures" / "mini"


@pytest.fixture
def mini(tmp_path):
    """A copy of the committed set of 12 drawn scenes, free to be spoiled."""
    return Path(shutil.copytree(MINI, tmp_path / "mini"))


@pytest.fixture
def settings():
    """settings(source, "data.limit"=3, ...) -> Config."""

    def build(source, seed=0, **data):
        return from_dict({"data": {"source": str(source), **data}, "run": {"seed": seed}})

    return build


@pytest.fixture
def png():
    """png(number) -> bytes of a small picture unlike that of any other number."""

    def draw(number, size=(16, 12), mode="RGB", **options):
        pixels = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(buffer, format="PNG", **options)
        return buffer.getvalue()

    return draw


@pytest.fixture
def make_set(tmp_path, png):
    """make_set(lines) -> a captions.jsonl folder; each line a dict, or text written as it is.

    Images that a line names are drawn unless the line has `_image` (bytes to write, None for no file).
    """
    made = []

    def make(lines, name=None):
        folder = tmp_path / (name or f"set{len(made)}")
        made.append(folder)
        (folder / "images").mkdir(parents=True)
        text = []
        for number, line in enumerate(lines):
            if isinstance(line, dict):
                line = dict(line)
                data = line.pop("_image", png(number))
                if data is not None and line.get("image") and isinstance(line["image"], str):
                    (folder / "images" / line["image"]).write_bytes(data)
                line = json.dumps(line, ensure_ascii=False)
            text.append(line)
        (folder / "captions.jsonl").write_bytes(
            b"\n".join(t if isinstance(t, bytes) else t.encode() for t in text) + b"\n"
        )
        return folder

    return make


@pytest.fixture
def good_lines():
    """Ten rows that nothing is wrong with: 6 train, 2 val, 2 test."""
    splits = ["train"] * 6 + ["val"] * 2 + ["test"] * 2
    return [{"image": f"g{i}.png", "captions": [f"thing {i}", f"item {i}"], "split": s} for i, s in enumerate(splits)]


@pytest.fixture
def prepare_row():
    """A stand-in for a family's row preparer: pixels as they are at 64 px, a token a character, 40 at most.

    Made inside the fixture, so that it travels to Ray's workers by value: they do not have this file.
    """

    def prepare(row):
        import io

        import numpy as np
        from PIL import Image

        image = Image.open(io.BytesIO(row["image"]["bytes"])).resize((64, 64))
        ids = [[1, *(ord(c) % 90 + 3 for c in caption)][:40] for caption in row["captions"]]
        return {
            "pixels": np.asarray(image).transpose(2, 0, 1),
            "token_ids": ids,
            "prompt_lens": [1] * len(ids),
            "truncated": [len(c) + 1 > 40 for c in row["captions"]],
            "unknown": 0,
        }

    return prepare
