"""Merged and re-quantised folders: the right weights, in plain transformers, without raycap."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoProcessor

from raycap.errors import ModelError
from raycap.export.folder import MANIFEST, read_manifest, verify
from raycap.export.merge import dequantised_weights, merge
from raycap.export.requantise import requantise
from raycap.files import write_json
from raycap.models import load_model


@pytest.fixture(scope="module")
def quantised_base(config):
    """Module path -> weight as training saw it."""
    return dequantised_weights(load_model(config.model, config.data, quantisation="nf4", compute_dtype="fp32").model)


def updates(adapter) -> dict[str, torch.Tensor]:
    """Module path -> (alpha / r) B A, from the file."""
    from safetensors.torch import load_file

    stored = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.{}.lora_{}.weight"
    modules = {key.split(".lora_")[0].removeprefix("base_model.model.") for key in stored}
    return {m: 2.0 * stored[name.format(m, "B")] @ stored[name.format(m, "A")] for m in modules}


def plain(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def logits(model, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(2, 3, 64, 64, generator=generator).to(dtype)
    with torch.no_grad():
        return model(input_ids=torch.tensor([[1, 40, 50, 60]] * 2), pixel_values=pixels).logits.float()


def unpacked(model):
    """Keep this CPU's kernels from repacking NF4 weights at the first evaluation."""
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


def test_merged_weights_are_base_plus_update_and_nothing_else(merged, base, adapter, quantised_base):
    start, update = plain(base, dtype=torch.float32).state_dict(), updates(adapter)
    assert len(update) == 24
    for onto, folder in merged.items():
        for name, weight in plain(folder).state_dict().items():
            module = name.removesuffix(".weight")
            expected = start[name]
            if onto == "dequantised" and module in quantised_base:
                expected = quantised_base[module]
            if module in update:
                expected = expected + update[module]
            assert weight.dtype == torch.float16
            # One unit in the last place: peft and this test add up in another order.
            torch.testing.assert_close(weight.float(), expected.half().float(), rtol=2e-3, atol=1e-6, msg=name)


def test_merged_equals_the_adapter_and_differs_from_the_base(merged, base, adapter):
    from peft import PeftModel

    start = logits(plain(base, dtype=torch.float32))
    trained = logits(PeftModel.from_pretrained(plain(base, dtype=torch.float32), adapter))
    found = logits(plain(merged["original"], dtype=torch.float32))
    error, change = (found - trained).abs().max(), (trained - start).abs().max()
    assert change > 0.05
    assert error < 0.02 * change
    assert not torch.equal(found, logits(plain(merged["dequantised"], dtype=torch.float32)))


def test_original_is_exact_but_for_rounding_where_dequantised_is_the_trained_model(merged, config, adapter):
    """What trained was NF4 + adapter: merged on the dequantised weights it is the same function, up to rounding."""
    from peft import PeftModel

    trained = logits(
        PeftModel.from_pretrained(load_model(config.model, config.data, compute_dtype="fp32").model, adapter).eval()
    )
    error = {
        onto: (logits(plain(folder, dtype=torch.float32)) - trained).abs().max() for onto, folder in merged.items()
    }
    assert error["dequantised"] < 0.1 * error["original"]


def test_the_codes_do_not_depend_on_what_is_computed_in(config):
    """Trained in bf16, scored in fp32, saved in fp16: one NF4 model, up to the rounding of its dequantised weights."""
    half = {d: load_model(config.model, config.data, compute_dtype=d).model for d in ("fp32", "bf16", "fp16")}
    for name, module in half["fp32"].named_modules():
        if hasattr(module, "quant_state"):
            for other in ("bf16", "fp16"):
                assert torch.equal(module.weight, half[other].get_submodule(name).weight)


def test_folders_are_whole(merged, nf4, adapter):
    for folder, variant in ((merged["original"], "merged"), (merged["dequantised"], "merged"), (nf4, "merged-nf4")):
        manifest = verify(folder)
        assert manifest["variant"] == variant
        assert set(manifest["files"]) == {p.name for p in folder.iterdir()} - {MANIFEST}
        assert "model.safetensors" in manifest["files"]
    assert read_manifest(nf4)["onto"] == "dequantised"
    assert read_manifest(nf4)["adapter_sha256"] == read_manifest(merged["original"])["adapter_sha256"]


def test_nf4_quantises_the_modules_that_training_had_in_nf4(nf4, merged, quantised_base):
    import bitsandbytes as bnb

    model = plain(nf4)
    names = {name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert names == set(quantised_base) and "output" not in names
    kept = plain(merged["dequantised"]).state_dict()
    for name, weight in model.state_dict().items():
        module = name.partition(".weight")[0]
        if module not in names and not name.endswith(".bias"):
            assert torch.equal(weight, kept[name]), name


def test_saved_nf4_gives_the_logits_of_the_model_in_memory(config, merged, nf4):
    memory = load_model(config.model, config.data, path=merged["dequantised"], quantisation="nf4", compute_dtype="fp16")
    assert torch.equal(logits(unpacked(plain(nf4)), torch.float16), logits(memory.model.eval(), torch.float16))


def test_plain_evaluation_repacks_on_some_cpus_and_stays_close(nf4):
    """A user who sets no flag gets this CPU's bf16 kernel where it has one: the same model, up to its rounding."""
    exact = logits(unpacked(plain(nf4)), torch.float16)
    model = plain(nf4)
    first, second = logits(model, torch.float16), logits(model, torch.float16)
    assert torch.equal(first, second)
    assert (first - exact).abs().max() < 0.02 * exact.abs().max()


def test_a_small_update_survives_quantising_unless_it_starts_on_the_grid(config, adapter, quantised_base, tmp_path):
    """Dequantised weights are NF4's own numbers, to which a small update is rounded back; others carry it on average."""
    from safetensors.torch import load_file, save_file

    small = tmp_path / "small"
    shutil.copytree(adapter, small)
    stored = load_file(small / "adapter_model.safetensors")
    save_file({k: 0.3 * v if "lora_B" in k else v for k, v in stored.items()}, small / "adapter_model.safetensors")
    update, kept = updates(small), {}
    for onto in ("original", "dequantised"):
        folder = merge(config.model, config.data, small, tmp_path / onto, onto)
        packed = requantise(config.model, config.data, folder, tmp_path / f"nf4-{onto}")
        found = dequantised_weights(load_model(config.model, config.data, path=packed, compute_dtype="fp32").model)
        along = sum(((found[m] - quantised_base[m]) * d).sum() for m, d in update.items())
        kept[onto] = float(along / sum(d.square().sum() for d in update.values()))
    print(kept)
    assert abs(kept["original"] - 1) < 0.25
    assert kept["dequantised"] < 0.5 * kept["original"]


def test_folders_load_and_caption_without_raycap(merged, nf4):
    code = """
import sys
sys.modules["raycap"] = None
import torch
from transformers import AutoModelForCausalLM, AutoProcessor
for folder in sys.argv[1:]:
    model, processor = AutoModelForCausalLM.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    from PIL import Image
    inputs = processor(images=Image.new("RGB", (90, 70), "red"), return_tensors="pt")
    ids = model.generate(pixel_values=inputs["pixel_values"].to(model.dtype), max_new_tokens=8)
    print("caption:", processor.batch_decode(ids, skip_special_tokens=True)[0])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(merged["original"]), str(nf4)], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("caption:") == 2


def test_processor_is_the_bases(merged, nf4, base):
    from PIL import Image

    image = Image.radial_gradient("L").convert("RGB")
    expected = AutoProcessor.from_pretrained(base)(images=image, text="a red dog", return_tensors="pt")
    for folder in (merged["original"], nf4):
        found = AutoProcessor.from_pretrained(folder)(images=image, text="a red dog", return_tensors="pt")
        assert all(torch.equal(found[k], expected[k]) for k in expected)


def test_what_is_no_adapter_is_refused(config, adapter, tmp_path):
    with pytest.raises(ModelError, match=r"adapter_config\.json is missing"):
        merge(config.model, config.data, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_model_is_refused(config, adapter, tmp_path):
    from safetensors.torch import load_file, save_file

    stored = load_file(adapter / "adapter_model.safetensors")
    key = min(stored)
    for change in ({key: torch.zeros(4, 77)}, {"base_model.model.git.nowhere.lora_A.weight": torch.zeros(4, 128)}):
        broken = tmp_path / "broken"
        shutil.copytree(adapter, broken, dirs_exist_ok=True)
        save_file({**stored, **change}, broken / "adapter_model.safetensors")
        with pytest.raises(ModelError, match="does not fit"):
            merge(config.model, config.data, broken, tmp_path / "out")


def test_an_adapter_that_is_not_finite_is_refused(config, adapter, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(adapter, broken)
    stored = load_file(adapter / "adapter_model.safetensors")
    for value in (float("nan"), 1e30):
        save_file({k: torch.full_like(v, value) for k, v in stored.items()}, broken / "adapter_model.safetensors")
        with pytest.raises(ModelError):
            merge(config.model, config.data, broken, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_changed_or_unfinished_folder_is_found_out(merged, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(merged["original"], copy)
    verify(copy)
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    with pytest.raises(ModelError, match=r"config\.json is not the file that was exported"):
        verify(copy)
    (copy / "config.json").unlink()
    with pytest.raises(ModelError, match=r"lacks config\.json"):
        verify(copy)
    write_json(copy / MANIFEST, {"schema": 99})
    with pytest.raises(ModelError, match="schema 99"):
        verify(copy)
    (copy / MANIFEST).unlink()
    with pytest.raises(ModelError, match="did not finish"):
        verify(copy)
    with pytest.raises(ModelError, match="no model folder"):
        verify(tmp_path / "nowhere")


def test_an_adapter_trained_on_8_bit_weights_merges_onto_what_they_stand_for(config, adapter, tmp_path):
    """Onto the dequantised weights it is the trained function, where the original ones make another."""
    from peft import PeftModel

    base = dataclasses.replace(config.model, quantisation="int8")
    trained = logits(
        PeftModel.from_pretrained(load_model(base, config.data, compute_dtype="fp32").model, adapter).eval()
    )
    error = {}
    for onto in ("original", "dequantised"):
        folder = merge(base, config.data, adapter, tmp_path / onto, onto)
        error[onto] = (logits(plain(folder, dtype=torch.float32)) - trained).abs().max()
    assert error["dequantised"] < 0.5 * error["original"]
