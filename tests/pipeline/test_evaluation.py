"""Evaluate without a server: sets and models in one table, captions to review and back, perplexity and parameters."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest

from raycap.cli.evaluate import sets_table
from raycap.config import load_config
from raycap.errors import DataError
from raycap.files import read_jsonl, write_jsonl
from raycap.pipeline import evaluation as module

pytestmark = pytest.mark.filterwarnings("ignore:CIDEr takes its document frequencies")
THINGS = ("car", "dog", "cat", "bus", "tree", "house", "bird", "boat", "lamp", "cup")


class Shards:
    def __init__(self, source):
        self.folder = source
        self.rows = {
            f"{source}{n}": [f"a red {t} stands here", f"one {t} in the picture"] for n, t in enumerate(THINGS)
        }

    def references(self, split):
        return self.rows


@pytest.fixture
def served(monkeypatch):
    """Serves captions that depend on the model's folder; notes what was asked for."""
    asked = []

    @contextmanager
    def serving(config, folder, port):
        asked.append(folder.name)
        yield SimpleNamespace(url=folder.name)

    def caption_through(url, shards, split, batch):
        good = url == "winner"
        said = {i: refs[0] if good else "a thing" for i, refs in shards.rows.items()}
        return {**said, next(iter(said)): ""}

    monkeypatch.setattr("raycap.serve.app.serving", serving)
    monkeypatch.setattr(module, "connect", lambda config: nullcontext(None))
    monkeypatch.setattr(module, "caption_through", caption_through)
    monkeypatch.setattr(module, "_open", lambda config, split, progress: Shards(config.data.source))
    return asked


def config(*settings):
    return load_config("shapes-git", ["data.source=in", "evaluate.metrics=[bleu,cider]", *settings])


def test_domains_and_the_base_in_one_run(served, tmp_path):
    found = module.evaluate(
        config(), tmp_path / "winner", split="test", out=tmp_path / "out", plain=True, also=["out"], zero_shot=True
    )
    rows = {(r["model"], r["source"]): r for r in found["sets"]}
    assert list(rows) == [("zero-shot", "in"), ("zero-shot", "out"), ("winner", "in"), ("winner", "out")]
    assert found["metrics"] == rows["winner", "in"]["metrics"] and "source" not in found
    for source in ("in", "out"):
        scores = [rows[model, source]["metrics"]["cider"]["score"] for model in ("zero-shot", "winner")]
        assert scores[1] > scores[0]
    assert rows["zero-shot", "in"]["parameters"] > 1e6 and rows["winner", "in"]["parameters"] is None
    assert all(r["peak_memory_bytes"] > 0 for r in found["sets"])
    table = sets_table(found["sets"]).splitlines()
    assert len(table) == 5 and "bleu4" in table[0] and "zero-shot" in table[1] and " M " in table[1]
    names = sorted(p.name for p in (tmp_path / "out").glob("*.jsonl"))
    assert len(names) == 8 and {"test.jsonl", "winner.1.test.jsonl", "zero-shot.0.test.jsonl"} <= set(names)


def test_a_reviewed_file_takes_images_out_and_both_figures_are_told(served, tmp_path):
    found = module.evaluate(config(), tmp_path / "winner", split="test", out=tmp_path / "out", plain=True)
    assert "sets" not in found
    rows = read_jsonl(found["flagged"])
    assert [r["image_id"] for r in rows] == ["in0"] and rows[0]["reasons"] == ["empty"] and rows[0]["exclude"] is True
    again = module.evaluate(
        config(), tmp_path / "winner", split="test", plain=True, exclude=tmp_path / "out" / "test.flagged.jsonl"
    )
    assert again["images"] == 9 and again["excluded"]["images"] == 1 and again["excluded"]["unknown"] == []
    assert again["excluded"]["whole"]["metrics"] == found["metrics"]
    assert again["metrics"]["cider"]["score"] > found["metrics"]["cider"]["score"]
    df = [m["cider"]["signature"].split("|df:")[1].split("|")[0] for m in (again["metrics"], found["metrics"])]
    assert df[0] == df[1]  # one scale with and without them
    write_jsonl(tmp_path / "kept.jsonl", [{**rows[0], "exclude": False}, {"image_id": "zz"}])
    kept = module.evaluate(config(), tmp_path / "winner", split="test", plain=True, exclude=tmp_path / "kept.jsonl")
    assert kept["metrics"] == found["metrics"] and kept["excluded"]["unknown"] == ["zz"]
    write_jsonl(tmp_path / "all.jsonl", [{"image_id": f"in{n}"} for n in range(10)])
    with pytest.raises(DataError, match="all 10 images"):
        module.evaluate(config(), tmp_path / "winner", split="test", plain=True, exclude=tmp_path / "all.jsonl")


def test_perplexity_goes_to_a_worker(served, tmp_path, monkeypatch):
    asked = []

    def in_worker(ray, work, *arguments, log, say):
        asked.append((work.__name__, arguments[1:]))
        return {"score": 7.5, "signature": "perplexity|x"}

    monkeypatch.setattr(module, "in_worker", in_worker)
    settings = config("evaluate.metrics=[cider,perplexity]")
    found = module.evaluate(settings, tmp_path / "winner", split="val", plain=True)
    assert found["metrics"]["perplexity"] == {"score": 7.5, "signature": "perplexity|x"} and "cider" in found["metrics"]
    assert asked == [("perplexity_task", ("in", "val", str(tmp_path / "winner")))]


def test_the_same_set_twice_is_a_slip(served, tmp_path):
    with pytest.raises(DataError, match="first set already"):
        module.evaluate(config(), tmp_path / "winner", split="test", plain=True, also=["in"])


def test_parameters_of_the_tiny_git():
    from pathlib import Path

    import torch
    from transformers import AutoModelForCausalLM

    from raycap.models import resolve_path

    folder = Path(resolve_path("builtin:tiny-git"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wanted = {p.data_ptr(): p.numel() for p in model.parameters()}
    assert module.parameter_count(folder) == pytest.approx(sum(wanted.values()), rel=0.02)
