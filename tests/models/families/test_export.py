"""An adapter of every family on its way out: merged, quantised again, loaded without raycap, asked over HTTP."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from raycap.export.captioner import Captioner
from raycap.export.folder import verify
from raycap.models import load_model
from raycap.models.lora import export_adapter, start
from raycap.models.quantise import quantised_linears
from raycap.trial import trial_spec

CAPTIONS = ["a red ring", "two blue stars above a green cross", "a ring", "one small yellow heart on the left"]


@pytest.fixture(scope="module")
def config(case, settings):
    full = {"lora__full": ["projector"]} if case.family in ("clip_llama", "qwen2_vl") else {}
    return settings(case, **full)


@pytest.fixture(scope="module")
def base(config):
    """What trains: NF4, in fp32."""
    return load_model(config.model, config.data, compute_dtype="fp32", device="cpu")


@pytest.fixture(scope="module")
def adapter(case, config, base, tmp_path_factory):
    """Every target moved by some percent, and the projector too where the case trains it in full."""
    family, model = base.family, base.model
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    paths = family.lora_targets(model, "language", case.targets)
    spec = trial_spec(config, "t00")
    generator = torch.Generator().manual_seed(5)
    weights = dict(start(spec, {p: (linears[p].in_features, linears[p].out_features) for p in paths}))
    weights = {p: (a, 0.05 * torch.randn(b.shape, generator=generator)) for p, (a, b) in weights.items()}
    whole = list(family.linear_paths(model, "projector")) if config.lora.full else []
    for path in whole:
        weight, bias = linears[path].weight.float(), linears[path].bias
        moved = weight + 0.05 * torch.randn(weight.shape, generator=generator)
        weights[path] = (moved, weight.new_empty(len(weight), 0) if bias is None else bias.float()[:, None] + 0.05)
    return export_adapter(
        tmp_path_factory.mktemp("adapter"), weights, spec, config.model.path, family.task_type,
        full=whole, full_file=family.full_file,
    )  # fmt: skip


@pytest.fixture(scope="module")
def logits(config, pixel_values, texts):
    def logits(cm):
        with torch.no_grad():
            return cm.family.label_logits(cm, texts(cm, CAPTIONS), pixel_values(cm)).logits.float()

    return logits


def load(config, path=None, **options):
    return load_model(config.model, config.data, path=path, compute_dtype="fp32", device="cpu", **options)


def with_adapter(cm, adapter):
    """By plain peft, and what stands beside the adapter by the family's own reader."""
    from peft import PeftModel

    PeftModel.from_pretrained(cm.model, str(adapter))
    if cm.family.full_file and (adapter / cm.family.full_file).is_file():
        from raycap.models.clip_llama import read_graft

        read_graft(cm.model, adapter)
    cm.model.eval()
    return cm


def test_merged_is_the_adapter_on_its_base(config, adapter, merged, logits):
    """On the original weights it equals the adapter there; on the dequantised ones it equals what trained in NF4."""
    start = logits(load(config, quantisation="none"))
    for onto, quantisation in (("original", "none"), ("dequantised", "nf4")):
        trained = logits(with_adapter(load(config, quantisation=quantisation), adapter))
        found = logits(load(config, merged[onto], quantisation="none"))
        change = (trained - start).abs().max()
        assert change > 0.05
        assert (found - trained).abs().max() < 0.03 * change, onto  # fp16's rounding of the merged weights


def test_folders_are_whole_and_nf4_where_training_had_it(case, merged, nf4, config, logits):
    for folder, variant in ((merged["original"], "merged"), (nf4, "merged-nf4")):
        assert verify(folder)["variant"] == variant
    packed = load(config, nf4)
    linears = {n for n, m in packed.model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert packed.quantisation == "nf4"
    assert set(quantised_linears(packed.model)) == case.quantised_paths() & linears
    assert sum(f.stat().st_size for f in nf4.glob("*.safetensors")) < sum(
        f.stat().st_size for f in merged["dequantised"].glob("*.safetensors")
    )
    # Saved and read again it is the model that was quantised in memory.
    memory = load(config, merged["dequantised"], quantisation="nf4")
    assert torch.equal(logits(packed), logits(memory))


def test_folders_load_in_plain_transformers(case, config, merged, nf4):
    """The same weights by transformers' own class of the family."""
    import transformers
    from transformers import AutoConfig

    for folder in (merged["dequantised"], nf4):
        (name,) = AutoConfig.from_pretrained(folder).architectures
        model = getattr(transformers, name).from_pretrained(folder)
        state, ours = model.state_dict(), load(config, folder, quantisation="none").model.state_dict()
        assert set(state) <= set(ours) and len(state) > 20
        # What a packed weight says of itself names the dtype it is read in.
        kept = {key: weight for key, weight in state.items() if not key.endswith("bitsandbytes__nf4")}
        assert not [key for key, weight in kept.items() if not torch.equal(weight, ours[key].to(weight.dtype))]
        if case.family == "clip_llama":
            transformers.AutoTokenizer.from_pretrained(folder)
        else:
            transformers.AutoProcessor.from_pretrained(folder)


def test_served_captions_are_the_local_ones(config, merged, nf4, scenes):
    """The endpoints over the exported model, in batches of other sizes than the local ones."""
    from starlette.testclient import TestClient

    from raycap.serve.endpoints import build_app
    from raycap.serve.meter import Meter

    pictures = [scene.image for scene in (*scenes["val"], *scenes["train"][:3])]
    for folder in (merged["dequantised"], nf4):
        captioner = Captioner.load(config, folder, device="cpu")
        local = captioner.caption([captioner.prepare(p) for p in pictures])

        class Service:
            name = "t"

            async def caption(self, images, captioner=captioner):
                return captioner.caption(np.stack([captioner.prepare(image) for image in images]))

        with TestClient(build_app(Service(), config, Meter(model="t", replica="r0"))) as client:
            served = []
            for part in (pictures[:1], pictures[1:3], pictures[3:]):
                files = [("images", (f"{n}.png", png(p), "image/png")) for n, p in enumerate(part)]
                answer = client.post("/v1/captions", files=files)
                assert answer.status_code == 200, answer.text
                served += [item["caption"] for item in answer.json()["captions"]]
        assert served == local
        assert len(set(local)) > 1


def png(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
