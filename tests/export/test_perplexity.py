"""Perplexity of references: token-weighted, whatever is batched with what, and that of plain transformers."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from raycap.data.shapes import generate
from raycap.export import perplexity as module
from raycap.export.captioner import Captioner
from raycap.export.perplexity import reference_perplexity


class Rows:
    """As many of a set's rows as a test needs, in the shards' shape."""

    def __init__(self, scenes):
        self.scenes = scenes

    def speaking(self, lang, splits):
        return self

    def iter_rows(self, split, columns):
        import io

        for n, scene in enumerate(self.scenes):
            out = io.BytesIO()
            scene.image.save(out, "PNG")
            yield {
                "image_id": f"i{n}",
                "image": {"bytes": out.getvalue()},
                "captions": list(scene.captions)[: 1 + n % 3],
            }


@pytest.fixture(scope="module")
def captioner(config, base):
    return Captioner.load(config, base, device="cpu")


@pytest.fixture(scope="module")
def rows():
    return Rows(list(generate(5, seed=3)))


def test_as_plain_transformers(captioner, rows):
    """Each reference alone through the model's own forward with labels; sums of token losses, not means of captions."""
    import torch

    cm = captioner.model
    total, tokens = 0.0, 0
    for row, scene in zip(rows.iter_rows("val", ()), rows.scenes):
        pixels = torch.from_numpy(captioner.prepare(scene.image.convert("RGB")))[None]
        values = cm.family.pixel_values(cm.processor, pixels)
        for caption in row["captions"]:
            ids = torch.tensor([cm.family.encode(cm.processor, caption, cm.prompt, cm.max_text_tokens)[0]])
            with torch.no_grad():
                logits = cm.model(input_ids=ids, pixel_values=values).logits[0, -ids.shape[1] : -1]
            losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
            total, tokens = total + float(losses.sum()), tokens + len(losses)
    found = reference_perplexity(captioner, rows, "val")
    assert found["tokens"] == tokens and found["score"] == pytest.approx(math.exp(total / tokens), rel=1e-4)
    assert set(found["per_image"]) == {f"i{n}" for n in range(5)} and found["cut"] == 0
    assert found["signature"].startswith("perplexity|variant:token-weighted|tok:model@")
    assert "|refs:1-3|n:5|" in found["signature"]


def test_batches_change_nothing(captioner, rows, monkeypatch):
    whole = reference_perplexity(captioner, rows, "val")
    monkeypatch.setattr(module, "BATCH_ROWS", 1)
    alone = reference_perplexity(captioner, rows, "val")
    assert alone["score"] == pytest.approx(whole["score"], rel=1e-5)
    assert alone["per_image"] == pytest.approx(whole["per_image"], rel=1e-4)


def test_references_that_are_cut_are_counted(captioner, rows):
    class Long(Rows):
        def iter_rows(self, split, columns):
            for row in super().iter_rows(split, columns):
                yield {**row, "captions": ["a red square " * 40]}

    assert reference_perplexity(captioner, Long(rows.scenes), "val")["cut"] == 5


def test_from_a_folder(config, base, monkeypatch, rows):
    monkeypatch.setattr(module, "open_shards", lambda folder: rows)
    said = []
    found = module.perplexity_task(config.to_dict(), "shards", "val", str(base), say=said.append)
    assert found["score"] > 1 and isinstance(SimpleNamespace(**found).tokens, int)
