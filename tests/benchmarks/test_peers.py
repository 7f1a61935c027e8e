"""The peers get what raycap gets: the same base, the same pixels, the same tokens and labels at the same step."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import sweep_vs_trainer  # noqa: E402
from benchmarks.peers import common  # noqa: E402


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """(config, job, what the peers make of it) for the quick benchmark."""
    out = tmp_path_factory.mktemp("benchmark")
    options = sweep_vs_trainer.parse(["--quick", "data.prompt=a picture of"])
    config = sweep_vs_trainer.settings(options, out)
    job = sweep_vs_trainer.shared_job(config, options, out) | {"work": str(out), "device": "cpu"}
    json.dumps(job)  # it goes through a file
    return config, job, common.prepare_data(job)


def test_batches_equal_the_engines(given):
    import torch

    from raycap.data.order import SampleOrder, samples
    from raycap.data.shards import open_shards
    from raycap.models import load_family, row_preparer

    config, job, data = given
    family = load_family(config.model.family)
    processor = family.load_processor(job["model"])
    rows = [
        row_preparer(config.model.family, job["model"], job["prompt"], job["max_text_tokens"])(row)
        for row in open_shards(job["shards"]).iter_rows("train")
    ]
    pairs = samples(np.array([len(r["token_ids"]) for r in rows]), config.data.captions)
    order = SampleOrder(len(pairs), job["batch"], config.run.seed)
    items = common.Samples(data, np.load(job["order"]))
    assert len(items) == job["steps"] * job["batch"]
    for step in (0, 1, job["steps"] - 1):
        chosen = pairs[order.rows(step)]
        ids = [np.array(rows[r]["token_ids"][c]) for r, c in chosen]
        prompts = np.array([rows[r]["prompt_lens"][c] for r, c in chosen])
        ours = family.collate(ids, prompts, 0)
        theirs = common.Collate(0)([items[step * job["batch"] + k] for k in range(job["batch"])])
        for name in ("input_ids", "attention_mask", "labels"):
            assert torch.equal(ours[name], theirs[name]), (step, name)
        assert prompts.min() > 1, "the prompt is masked on both sides"
        pixels = torch.from_numpy(np.stack([rows[r]["pixels"] for r, _ in chosen]))
        # raycap keeps pixels as whole numbers, so half a level of 255 apart at most, after division by the deviation.
        apart = (family.pixel_values(processor, pixels) - theirs["pixel_values"]).abs().max()
        assert apart <= 0.51 / 255 / min(processor.image_processor.image_std)


def test_the_base_is_quantised_alike(given):
    import bitsandbytes as bnb
    import torch

    from raycap.models import load_model

    config, job, _ = given
    theirs = common.load_base(job)
    ours = load_model(config.model, config.data, device="cpu").model
    packed = {n for n, m in theirs.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert packed and packed == {n for n, m in ours.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert not any(m.support_avx512bf16_for_cpu for m in theirs.modules() if isinstance(m, bnb.nn.Linear4bit))
    name = sorted(packed)[0]
    assert torch.equal(theirs.get_submodule(name).weight.data, ours.get_submodule(name).weight.data)


def test_the_adapter_sits_where_raycaps_does(given):
    _, job, _ = given
    model = common.add_lora(common.load_base(job), job["trials"][0])
    adapted = {
        n.removeprefix("base_model.model.") for n, m in model.named_modules() if hasattr(m, "lora_A") and len(m.lora_A)
    }
    assert adapted == set(job["trials"][0]["modules"])
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable and all("lora_" in n for n in trainable)


def test_training_goes_on_as_before_after_captions_were_made(given, tmp_path):
    """The trap of NF4 on CPUs with AVX512-BF16: evaluating must not change what is trained afterwards."""
    _, job, data = given
    job = job | {"steps": 3, "work": str(tmp_path)}
    trial = job["trials"][0] | {"dropout": 0.0}
    captions = common.Captions(job, data)
    losses = {}
    for rungs in ((3,), (1, 2, 3)):
        notes: dict = {}
        seen: list[int] = []
        common.train_one(job, trial, data, captions, list(rungs), lambda step, *_, seen=seen: seen.append(step), notes)
        assert seen == list(rungs) and notes["steps"] == 3
        assert notes["vision_s"] > 0 and notes["train_s"] > 0 and notes["eval_s"] > 0
        losses[rungs] = notes["loss"]
    assert losses[(3,)] == losses[(1, 2, 3)]
