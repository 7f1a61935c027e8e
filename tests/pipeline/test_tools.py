"""What `prepare` is given from the rooms above: the model's own resizing, CLIP's scores."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from raycap.config import from_dict
from raycap.data.parquet import open_shards
from raycap.data.shards import prepare, prepare_if_needed
from raycap.data.stream import local_batches
from raycap.errors import DataError
from raycap.models import load_family, resolve_path, row_preparer
from raycap.pipeline.tools import prepare_tools

SPLITS = ["train"] * 8 + ["val"] * 2 + ["test"] * 2
SIZES = [(640, 480), (97, 71), (64, 64), (64, 200), (300, 65), (50, 40), (641, 427), (224, 224)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twelve pictures with smooth and rough parts, JPEG and PNG, of many sizes; two captions each, one image has one."""
    folder, rng, lines = tmp_path_factory.mktemp("photos"), np.random.default_rng(0), []
    for i, split in enumerate(SPLITS):
        width, height = SIZES[i % len(SIZES)]
        coarse = Image.fromarray(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8)).resize((width, height))
        rough = rng.integers(-20, 20, (height, width, 3))
        picture = Image.fromarray(np.clip(np.asarray(coarse) + rough, 0, 255).astype(np.uint8))
        name = f"{i}.{'png' if i % 3 == 0 else 'jpg'}"
        picture.save(folder / name)
        captions = [f"a photo of thing {i}", "something else"][: 1 if i == 4 else 2]
        lines.append(json.dumps({"image": name, "captions": captions, "split": split}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """A CLIP of random weights in open_clip's layout."""
    import open_clip
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("clip")
    model = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    normal = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": normal}))
    torch.manual_seed(1)
    save_file(open_clip.CLIP(**model).state_dict(), folder / "open_clip_model.safetensors")
    return folder


def settings(source, **data):
    return from_dict({"data": {"source": str(source), **data}})


def pixel_values(folder, path="builtin:tiny-git"):
    """Image id -> what the model takes, from the shards through the stream."""
    family = load_family("git")
    processor = family.load_processor(resolve_path(path))
    found = {}
    for split in ("train", "val", "test"):
        for table in local_batches(folder, split, row_preparer("git", path, "", 48)):
            for row in table.to_pylist():
                pixels = np.frombuffer(row["pixels"], dtype=np.uint8).reshape(1, *row["shape"])
                found[row["image_id"]] = family.pixel_values(processor, torch.from_numpy(pixels.copy()))[0]
    return found, processor


@pytest.mark.parametrize("store", ["original", "resized", "pixels"])
def test_the_shards_give_what_the_processor_makes_of_the_original(photos, tmp_path, store):
    config = settings(photos, store=store)
    manifest = prepare(config, tmp_path / "out", tools=prepare_tools(config))
    assert ("store" in manifest) == (store != "original")
    found, processor = pixel_values(tmp_path / "out")
    assert len(found) == len(SPLITS)
    for name, mine in found.items():
        original = Image.open(photos / name).convert("RGB")
        assert torch.equal(mine, processor(images=original, return_tensors="pt")["pixel_values"][0]), name


def test_a_jpeg_of_stated_quality_is_near(photos, tmp_path):
    config = settings(photos, store="resized", quality=95)
    prepare(config, tmp_path / "out", tools=prepare_tools(config))
    prepare(settings(photos), tmp_path / "exact")
    near, exact = pixel_values(tmp_path / "out")[0], pixel_values(tmp_path / "exact")[0]
    apart = [float((near[n] - exact[n]).abs().mean()) for n in exact]
    assert 0 < max(apart) < 0.1  # of a standard deviation of a pixel


def test_images_resized_for_another_processor_are_refused(photos, tmp_path):
    from raycap.models.tiny.build import build_processor, build_tokenizer

    config = settings(photos, store="pixels")
    prepare(config, tmp_path / "out", tools=prepare_tools(config))
    other = build_processor(build_tokenizer(["a"], vocabulary=300))
    other.image_processor.crop_size = {"height": 48, "width": 48}
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(DataError, match="resized for another model's processor"):
        pixel_values(tmp_path / "out", str(tmp_path / "other"))


def test_captions_are_chosen_by_clip(photos, tiny_clip, tmp_path, monkeypatch):
    from raycap.models.clip_score import ClipScorer

    monkeypatch.setattr("raycap.data.units.UNIT_ROWS", 5)
    config = settings(photos, captions="best-clipscore", clip_model=str(tiny_clip))
    tools = prepare_tools(config)
    from dataclasses import replace

    from raycap.data.units import run_here

    manifest = prepare(config, tmp_path / "out", tools=replace(tools, run=run_here))
    assert str(tiny_clip) not in json.dumps(manifest) and manifest["clip_scores"]["weight"] == 2.5
    rows = open_shards(tmp_path / "out").read_rows("train")
    scorer = ClipScorer(str(tiny_clip))
    for row in rows:
        cosines, _ = scorer.cosines([Image.open(io.BytesIO(row["image"]["bytes"]))], [row["captions"]])
        assert row["clip_scores"] == pytest.approx([2.5 * max(c, 0) for c in cosines[0]], abs=1e-5)
        assert row["selected"] == int(np.argmax(row["clip_scores"]))
    assert len({row["selected"] for row in rows}) == 2


@pytest.mark.ray
def test_scores_come_from_ray_data_actors(photos, tiny_clip, tmp_path, ray_session):
    config = settings(photos, captions="all", clip_model=str(tiny_clip))
    tree = config.to_dict()
    tree["tune"]["space"] = {"data.captions": {"choice": ["all", "weighted-clipscore"]}}
    tree["run"]["cache_dir"] = str(tmp_path)
    config = from_dict(tree)
    shards = open_shards(prepare_if_needed(config, tools=prepare_tools(config)))
    scores = shards.clip_scores("train")
    assert [len(s) for s, _ in scores.values()] == [2, 2, 2, 2, 1, 2, 2, 2]
    from raycap.tune.space import sample_trials

    assert {spec.captions for spec in sample_trials(config)} == {"all", "weighted-clipscore"}
