"""What one family has and no other: the graft's files, PaliGemma's prefix, Qwen's sizes of images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from raycap.config import DecodeSettings, from_dict
from raycap.errors import ConfigError, ModelError
from raycap.models import load_family, load_model


@pytest.fixture
def twin(twins):
    """Loads a twin by name, in fp32 and unquantised; keywords are settings of model.*."""

    def twin(name, **model):
        config = from_dict(
            {"model": {"family": name.partition(":")[0], "path": str(twins(name)), "quantisation": "none", **model}}
        )
        return load_model(config.model, config.data, compute_dtype="fp32", device="cpu")

    return twin


def test_graft_reads_older_files_of_its_shapes_alone(twin, tmp_path):
    cm = twin("clip_llama")
    weights = {part: {n: torch.randn_like(t) for n, t in getattr(cm.model, part).state_dict().items()}
               for part in ("projector", "gate")}  # fmt: skip
    torch.save({n: t.half() for n, t in weights["projector"].items()}, tmp_path / "proj_final.pt")
    torch.save(weights["gate"], tmp_path / "gate_final.pt")
    read = twin("clip_llama", graft_path=str(tmp_path)).model
    assert torch.equal(read.gate.weight, weights["gate"]["weight"])
    assert torch.equal(read.projector.weight, weights["projector"]["weight"].half().float())  # cast
    torch.save({"weight": torch.zeros(4096, 512), "bias": torch.zeros(4096)}, tmp_path / "gate_final.pt")
    with pytest.raises(ModelError, match=r"gate has .*4096, 512"):
        twin("clip_llama", graft_path=str(tmp_path))
    torch.save({"weight": print}, tmp_path / "gate_final.pt")  # code in a pickle is not run
    with pytest.raises(ModelError, match="no readable"):
        twin("clip_llama", graft_path=str(tmp_path))


def test_grafts_cls_is_taken_before_or_after_the_norm(twin):
    pixels = torch.randn(2, 3, 64, 64)
    after, before = (twin("clip_llama", vision_cls=where) for where in ("after-norm", "before-norm"))
    one, other = after.family.encode_images(after, pixels), before.family.encode_images(before, pixels)
    assert one.shape == other.shape == (2, 1, 32)
    assert torch.allclose(before.model.vision_tower.post_layernorm(other), one, atol=1e-5)
    assert not torch.allclose(one, other)


def test_grafts_pad_token_is_its_end_and_the_end_is_learnt(twin):
    cm = twin("clip_llama")
    family, tokenizer = cm.family, cm.processor.tokenizer
    assert family.pad_token(cm.processor) == family.end_token(cm.processor) == tokenizer.eos_token_id
    coded = [family.encode(cm.processor, c, "", 48) for c in ("a ring", "two blue stars above a ring")]
    batch = family.collate([c[0] for c in coded], [c[1] for c in coded], family.pad_token(cm.processor))
    assert [int((row == tokenizer.eos_token_id).sum()) for row in batch["labels"]] == [1, 1]


def test_grafts_adapter_folder_stands_alone(load, settings, make_engine, trials, tmp_path, twins):
    """The folder has adapter, projector and gate, tokeniser; plain peft and AutoTokenizer read it."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    from raycap.models.clip_llama import read_graft

    config = from_dict({"model": {"family": "clip_llama", "path": str(twins("clip_llama"))},
                        "lora": {"targets": ["q_proj", "v_proj"], "full": ["projector"]},
                        "train": {"batch": 4, "steps": 4}})  # fmt: skip
    cm = load_model(config.model, config.data, compute_dtype="fp32", device="cpu")
    engine = make_engine(cm, config)
    engine.admit(trials(config, 1)[0])
    engine.step()
    folder = engine.export("t0", tmp_path / "adapter", which="last")
    assert {"adapter_config.json", "adapter_model.safetensors", "graft.safetensors"} <= {
        p.name for p in folder.iterdir()
    }
    plain = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(twins("clip_llama")), str(folder))
    assert any("lora_A" in name for name, _ in plain.named_parameters())
    assert len(AutoTokenizer.from_pretrained(folder)) == len(cm.processor.tokenizer)
    value = engine.state("t0")["value"]
    assert set(engine.full) == {"projector", "gate"}
    engine.close()
    read_graft(cm.model, folder)
    assert torch.allclose(cm.model.gate.weight, value["gate"][0])


def test_paligemmas_prefix_sees_itself_whole(twin):
    """A later token of the prompt changes what an earlier one sees: not so where token_type_ids are forgotten."""
    cm = twin("paligemma")
    pixels, seen = torch.randn(1, 3, 64, 64), []
    for prompt in ("Describe it", "Describe me"):
        ids, length, _ = cm.family.encode(cm.processor, "a ring", prompt, 48)
        batch = cm.family.collate([ids], [length], 0)
        hook = cm.model.model.language_model.register_forward_hook(lambda m, a, out: seen.append(out.last_hidden_state))
        with torch.no_grad():
            cm.family.label_logits(cm, batch, pixels)
        hook.remove()
    assert not torch.allclose(seen[0][:, 0], seen[1][:, 0], atol=1e-4)


def test_paligemmas_inputs_are_those_of_its_processor(twin, scenes):
    cm = twin("paligemma")
    prompt, caption = "Describe this image:", "a red ring"
    made = cm.processor(images=scenes["val"][0].image, text=f"<image>{prompt}", suffix=caption, return_tensors="pt")
    ids, length, _ = cm.family.encode(cm.processor, caption, prompt, 64)
    assert made["input_ids"][0, -len(ids) :].tolist() == ids
    assert (made["labels"][0] != -100).sum() == len(ids) - length
    pixels = torch.from_numpy(cm.family.resize(cm.processor, scenes["val"][0].image)[None])
    batch = cm.family.collate([ids], [length], 0)
    with torch.no_grad():
        mine = cm.family.label_logits(cm, batch, cm.family.pixel_values(cm.processor, pixels)).logits
        whole = cm.model(**{k: v for k, v in made.items() if k != "labels"}).logits[0]
    assert torch.allclose(mine, whole[-len(mine) - 1 : -1], atol=2e-2)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_vl:2.5"])
def test_qwens_images_keep_their_aspect(twin, scenes, name):
    """Images of different sizes in one batch: as alone, as with stored features, as transformers' own forward."""
    cm = twin(name, max_pixels=64 * 64, min_pixels=16 * 16 * 4)
    family, image = cm.family, scenes["val"][0].image
    pictures = [image, image.resize((120, 40)), image.resize((30, 90)), image.resize((20, 20))]
    pixels = family.pixel_values(
        cm.processor, torch.from_numpy(np.stack([family.resize(cm.processor, p) for p in pictures]))
    )
    captions = ["a red ring", "two blue stars above a ring", "a ring", "one heart"]
    coded = [family.encode(cm.processor, c, "Describe:", 96) for c in captions]
    batch = family.collate([c[0] for c in coded], [c[1] for c in coded], 0)
    with torch.no_grad():
        found = family.label_logits(cm, batch, pixels)
        stored = family.label_logits(cm, batch, family.encode_images(cm, pixels))
    assert torch.allclose(found.logits, stored.logits, atol=1e-5)
    for row, (picture, caption) in enumerate(zip(pictures, captions)):
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe:"}]}]
        text = cm.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        made = cm.processor(images=picture, text=f"{text}{caption}<|im_end|>", return_tensors="pt")
        with torch.no_grad():
            whole = cm.model(**made).logits[0]
        mine = found.logits[found.rows == row]
        assert torch.allclose(mine, whole[-len(mine) - 1 : -1], atol=2e-2)
    for decode in (DecodeSettings(max_new_tokens=5), DecodeSettings(max_new_tokens=5, num_beams=2)):
        assert family.generate(cm, pixels, decode) == [family.generate(cm, p[None], decode)[0] for p in pixels]


def test_settings_of_other_families_are_refused():
    config = from_dict({"model": {"max_pixels": 1000}})
    with pytest.raises(ConfigError, match=r"model.max_pixels=1000 has no effect on family git"):
        load_family("git", config.model)


def test_qwens_tower_trains_alone(load, make_engine, twins):
    config = from_dict({"model": {"family": "qwen2_vl", "path": str(twins("qwen2_vl"))},
                        "lora": {"targets": ["qkv"], "scope": "vision"}, "train": {"batch": 4},
                        "data": {"max_text_tokens": 96}})  # fmt: skip
    cm = load_model(config.model, config.data, compute_dtype="fp32", device="cpu")
    with pytest.raises(ConfigError, match=r"Set tune\.slots=1"):
        make_engine(cm, config, slots=2)
