"""A decoding grid on the shipped tiny GIT: captioned once, kept, gone on with, scored into one table."""

from __future__ import annotations

import csv
import dataclasses
import io

import pytest

from raycap.config import from_dict
from raycap.data.shards import open_shards, prepare
from raycap.errors import ConfigError
from raycap.evaluate.grid import cells
from raycap.export import grid as module
from raycap.export.captioner import Captioner
from raycap.export.stage import caption_split
from raycap.files import read_jsonl, write_jsonl
from raycap.models.git import Git
from raycap.pipeline.grid import grid_rows, named
from raycap.report.grid import figures, table_text, write_grid

pytestmark = pytest.mark.filterwarnings("ignore:CIDEr takes its document frequencies")
HOT = {"num_beams": 3, "do_sample": True, "temperature": 4.0}
AXES = {"prompts": ("none", "B"), "decode": ("greedy", "sample", "beam-sample")}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return from_dict({
        "run": {"name": "t", "cache_dir": str(tmp_path_factory.mktemp("cache"))},
        "data": {"source": "shapes", "shapes_images": [8, 6, 10]},
        "decode": {"max_new_tokens": 10, "batch": 4},
        "evaluate": {"metrics": ["rouge_l", "cider"], "prompts": {"B": "a small"}, "decodings": {"hot": HOT}},
    })  # fmt: skip


@pytest.fixture(scope="module")
def shards(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "out"
    prepare(config, folder)
    return open_shards(folder)


@pytest.fixture(autouse=True)
def chunks_of_six(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_IMAGES", 6)


@pytest.fixture
def stage(config, shards, base):
    def stage(folder, axes=AXES):
        wanted = cells(config, axes)
        return module.grid_stage(
            config.to_dict(), str(shards.folder), "test", str(base), [c.to_dict() for c in wanted], str(folder)
        )

    return stage


def captions(found):
    return {name: {r["image_id"]: r["caption"] for r in read_jsonl(f["file"])} for name, f in found.items()}


def test_the_grid_end_to_end(config, shards, base, stage, tmp_path, monkeypatch):
    runs = []
    encode = Git.encode_images
    monkeypatch.setattr(Git, "encode_images", lambda self, cm, values: runs.append(1) or encode(self, cm, values))
    found = stage(tmp_path / "kept")
    assert len(found) == 6 and len(runs) == 2  # one run of the tower a chunk, whatever the number of cells
    said = captions(found)
    ids = list(shards.references("test"))
    assert all(list(of) == ids for of in said.values())
    assert len({tuple(of.values()) for of in said.values()}) == 6
    assert said["none-greedy"] == caption_split(Captioner.load(config, base), shards, "test")

    # Stored captions are used again, without the model.
    monkeypatch.setattr(Captioner, "load", lambda *a, **k: pytest.fail("the model was loaded"))
    again = stage(tmp_path / "kept")
    assert {name: f["reused"] for name, f in again.items()} == dict.fromkeys(said, 10) and captions(again) == said

    rows = grid_rows(config, shards, "test", cells(config, AXES), {"tiny": found}, tmp_path / "out")
    assert [(r["prompt"], r["decode"], r["seed"]) for r in rows][:3] == [
        ("none", "greedy", None), ("none", "sample", 0), ("none", "beam-sample", 0),
    ]  # fmt: skip
    assert set(rows[0]["metrics"]) == {"rouge_l", "cider"} and rows[2]["decoding"].endswith("order:split|batch:4")
    write_grid(tmp_path / "out", rows)
    table = list(csv.DictReader(io.StringIO((tmp_path / "out" / "grid.csv").read_text())))
    assert [float(row["cider"]) for row in table] == [r["metrics"]["cider"]["score"] for r in rows]
    assert table[3]["prompt_text"] == "a small" and len({row["captions"] for row in table}) == 6
    names = sorted(p.name for p in (tmp_path / "out" / "plots").iterdir())
    assert names == ["grid-cider.svg", "grid-rouge_l.svg"]
    assert "beam-sample" in figures(rows)["grid-cider"][1]
    assert len(table_text(rows).splitlines()) == 7
    files = sorted(p.name for p in (tmp_path / "out" / "captions").iterdir())
    assert len(files) == 6 and "B-beam-sample-s0.jsonl" in files


def test_a_killed_grid_goes_on_with_the_same_captions(stage, tmp_path):
    axes = {"decode": ("hot", "sample")}
    found = stage(tmp_path, axes)
    said = captions(found)
    for of in found.values():
        write_jsonl(of["file"], read_jsonl(of["file"])[:6])  # the first chunk
    again = stage(tmp_path, axes)
    assert {f["reused"] for f in again.values()} == {6} and captions(again) == said
    for of in again.values():  # cut in the middle of a line
        with open(of["file"], "a", encoding="utf-8") as file:
            file.write('{"image_id": "x')
    third = stage(tmp_path, axes)
    assert {f["reused"] for f in third.values()} == {0} and captions(third) == said


def test_seeds_and_batches_in_the_key(config, shards, stage, tmp_path):
    axes = {"decode": ("greedy", "sample", "hot"), "seeds": ("0", "1")}
    found = stage(tmp_path / "one", axes)
    assert len({f["key"] for f in found.values()}) == 5
    said = captions(found)
    assert captions(stage(tmp_path / "two", axes)) == said  # generated anew
    for kind in ("sample", "hot"):
        assert said[f"default-{kind}-s0"] != said[f"default-{kind}-s1"]
    wanted = cells(config, {"decode": ("greedy", "sample", "beam-sample")})
    for cell in wanted:
        other = dataclasses.replace(cell, decode=dataclasses.replace(cell.decode, batch=5))
        keys = {module._key(config, shards, "test", "w", c) for c in (cell, other)}
        assert len(keys) == (2 if cell.fixed_order else 1)


def test_a_prompt_that_leaves_no_room(config, stage, tmp_path):
    with pytest.raises(ConfigError, match="text positions: shorten one of them"):
        stage(tmp_path, {"prompts": ("a red square " * 60,)})


def test_names_of_models(tmp_path):
    models = [tmp_path / "one" / "best" / "merged", tmp_path / "two", tmp_path / "x" / "two"]
    assert list(named(models)) == ["one", "two", "two-2"]
