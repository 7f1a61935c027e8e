"""Predicted memory against what is there: weights of each tiny twin to the byte, what autograd keeps to a tenth."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from raycap.config import load_config
from raycap.models import load_model
from raycap.models.rehearsal import Rehearsal, saved_for_backward
from raycap.models.tiny import TWINS, build_twin
from raycap.train.engine import PackEngine
from raycap.train.loss import slot_losses
from raycap.train.memory import Predictor, plan, stand_alone
from raycap.trial import trial_spec

TARGETS = {
    "git": "query,value,dense", "blip": "query,value,dense", "generic": "q_proj,v_proj", "clip_llama": "q_proj,v_proj",
    "paligemma": "q_proj,o_proj", "paligemma:2": "q_proj,o_proj", "qwen2_vl": "q_proj,down_proj",
    "qwen2_vl:2.5": "q_proj,down_proj",
}  # fmt: skip


@pytest.fixture(scope="module", params=sorted(TWINS))
def named(request, tmp_path_factory):
    return request.param, build_twin(request.param, tmp_path_factory.mktemp("twin"), dropout=0.1)


def settings(named, *more):
    name, folder = named
    return load_config("shapes-git", [
        f"model.family={name.partition(':')[0]}", f"model.path={folder}", "model.materialise=false",
        f"lora.targets={TARGETS[name]}", "lora.r=4", "data.max_text_tokens=48", "train.batch=4", "tune.slots=3",
        "decode.batch=12", "decode.max_new_tokens=8", "model.compute_dtype=fp32",
        *(["model.max_pixels=4096"] if name.startswith("qwen") else []), *more,
    ])  # fmt: skip


def held(model):
    """Bytes of a loaded model's parameters, buffers and quantisation states, each storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            tensors += [state.absmax, state.code]
            if state.nested:
                tensors += [state.offset, state.state2.absmax, state.state2.code]
        if (scales := getattr(parameter, "SCB", None)) is not None:
            tensors.append(scales)
    tensors += [m.dense for m in model.modules() if hasattr(m, "dense") and isinstance(m.dense, torch.Tensor)]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize(
    "more",
    [(), ("model.double_quantisation=true",), ("model.quantisation=none",), ("model.quantisation=int8",),
     ("model.quantisation=int8", "model.materialise=true")],
)  # fmt: skip
def test_weights_are_what_loading_takes(named, more):
    config = settings(named, *more)
    cm = load_model(config.model, config.data, device="cpu")
    predictor = Predictor(config, dtype=torch.float32)
    assert predictor.weights(predictor.base(config.model.quantisation)) == held(cm.model)


def test_activations_are_what_autograd_keeps(named):
    """A step of the real engine on the CPU, at the longest texts, with dropout in base and adapters."""
    config = settings(named, "lora.dropout=0.1")
    predictor = Predictor(config, dtype=torch.float32)
    told = [predictor.training(1), predictor.training(3)]
    cm = load_model(config.model, config.data, device="cpu")
    engine = PackEngine(cm, {}, config, 3)
    spec = trial_spec(config, "any")
    for found in told:
        kept = saved_by_a_step(engine, predictor, spec, found.slots, config)
        assert found.activations + found.logits == pytest.approx(kept, rel=0.1)
        assert found.step > found.activations + found.logits


def saved_by_a_step(engine, predictor, spec, slots, config):
    cm = engine.cm
    engine.samplers["all"] = None  # there is no data
    for trial in list(engine.slots):
        engine.release(trial)
    for n in range(slots):
        engine.admit(dataclasses.replace(spec, trial_id=f"t{n}", seed=n))
    engine._stack(list(engine.slots))
    rows, stacks = config.train.batch, engine.stacks
    own = {
        t.untyped_storage()._cdata
        for t in (*cm.model.parameters(), *cm.model.buffers(), stacks._work, *stacks._work_grads)
    }
    stacks.refresh()
    cm.model.train()
    pixels = cm.family.blank_images(predictor.described, rows)
    images = cm.family.encode_images(cm, pixels)
    text = predictor._text(cm, rows * slots)
    with saved_for_backward() as saved:
        engine.keys.set([0] * slots, [0] * slots, cm.device, 0, rows)
        output = cm.family.label_logits(cm, text, images)
    kept = sum(size for key, size in saved.items() if key not in own)
    slot_losses(output.logits.detach(), output.labels, output.rows, rows, torch.ones(slots), gradient=True)
    engine.keys.clear()
    return kept + output.logits.numel() * 4


@pytest.mark.slow
def test_decoding_takes_what_generate_takes(named):
    """The real generate on the CPU, measured by the same counter; the prediction computes the prompt's length at once."""
    config = settings(named, "model.quantisation=none")
    predictor = Predictor(config, dtype=torch.float32)
    told = predictor.serving("merged")
    cm = load_model(config.model, config.data, device="cpu")
    images = cm.family.blank_images(predictor.described, told.rows)
    with torch.no_grad(), Rehearsal() as watch:
        cm.family.generate(cm, images, config.decode)
    assert watch.peak <= told.decoding * 1.1


def test_checkpoint_is_what_is_saved(named, tmp_path):
    config = settings(named, "model.compute_dtype=bf16")
    cm = load_model(config.model, config.data, device="cpu")
    cm.model.save_pretrained(tmp_path)
    there = sum(p.stat().st_size for p in tmp_path.glob("*.safetensors"))
    predictor = Predictor(config)
    told = predictor.weights(predictor.base("nf4"), stored=True)
    names = sum(1 for m in cm.model.modules() if hasattr(m, "compute_dtype")) * 1200  # a tensor's name and its state
    assert told <= there <= told + names + 40_000


def test_checkpointing_and_pieces_take_less(named):
    if named[0] != "git":
        pytest.skip("one family is enough: what is less is the engine's doing")
    whole, pieces, again = (
        Predictor(settings(named, *more)).training(2)
        for more in ((), ("train.accumulation=4",), ("train.gradient_checkpointing=true",))
    )
    assert pieces.activations < whole.activations / 3
    assert again.activations < whole.activations / 2 and again.step > again.activations + again.logits


def test_001_stays_inside_its_gigabytes():
    """What 001 needed 3.9, 1.5 and 0.9 GB for: predicted, bf16 on a GPU, for its own architecture."""
    predictor = Predictor(load_config("iu-xray-blip"))
    assert predictor.training(1).total < 3.5e9
    served = predictor.serving("merged-nf4")
    assert served.total < 1e9 and served.checkpoint < 0.45e9


def test_memory_grows_with_rank_slots_and_text():
    config = load_config("pokemon-git")
    specs = [trial_spec(config, f"t{r}", {"lora.r": r}) for r in (8, 16, 32)]
    found = stand_alone(config, specs)
    assert found["t8"] < found["t16"] < found["t32"]
    predictor = Predictor(config)
    one, six = predictor.training(1), predictor.training(6)
    assert six.weights == one.weights and six.adapters == 6 * one.adapters
    assert five_times(six.step, one.step)


def five_times(large, small):
    return 5 * small < large < 6.5 * small


def test_what_cannot_be_reached_is_said(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    config = load_config("shapes-git", [f"model.path={tmp_path}"])
    assert str(tmp_path) in plan(config, [trial_spec(config, "t0")])["unknown"]
