"""The families under test: a tiny twin of each, what is expected of it, and an engine over a few scenes."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from exports import merged, nf4  # noqa: F401 - fixtures
from tiny_models import stores_of, with_dequantised

from raycap.config import from_dict
from raycap.data.shapes import generate
from raycap.models import load_model
from raycap.models.tiny import build_twin
from raycap.train.alone import engine_class
from raycap.train.engine import PackEngine
from raycap.trial import trial_spec


@dataclass(frozen=True)
class Case:
    """A twin, and what only its family's author knows."""

    twin: str
    targets: tuple[str, ...]
    quantised: tuple[str, ...]
    """Every Linear4bit: full paths with {a,b} alternatives as in a shell."""
    prompt: str = ""
    scopes: dict[str, str] = field(default_factory=dict)
    """Scope -> a linear in it."""

    @property
    def family(self) -> str:
        return self.twin.partition(":")[0]

    def quantised_paths(self) -> set[str]:
        return {path for pattern in self.quantised for path in expand(pattern)}


LLAMA_LIKE = (
    "model.language_model.layers.{0,1}.self_attn.{q,k,v,o}_proj",
    "model.language_model.layers.{0,1}.mlp.{gate,up,down}_proj",
)
CASES = {
    "git": Case(
        "git",
        ("query", "key", "value", "dense"),
        ("git.encoder.layer.{0,1}.attention.self.{query,key,value}", "git.encoder.layer.{0,1}.attention.output.dense",
         "git.encoder.layer.{0,1}.{intermediate,output}.dense"),
        "this is",
        {"language": "git.encoder.layer.1.output.dense", "vision": "git.image_encoder.vision_model.encoder.layers.0.mlp.fc1",
         "projector": "git.visual_projection.visual_projection.0"},
    ),
    "blip": Case(
        "blip",
        ("query", "value", "dense"),
        ("text_decoder.bert.encoder.layer.{0,1}.{attention,crossattention}.self.{query,key,value}",
         "text_decoder.bert.encoder.layer.{0,1}.{attention,crossattention,intermediate,output}"
         "{.output.dense,.dense}", "vision_model.encoder.layers.0.self_attn.{qkv,projection}",
         "vision_model.encoder.layers.0.mlp.{fc1,fc2}"),
        "a picture of",
        {"language": "text_decoder.bert.encoder.layer.1.crossattention.self.key",
         "vision": "vision_model.encoder.layers.0.self_attn.qkv"},
    ),
    "generic": Case(
        "generic", ("q_proj", "v_proj"), LLAMA_LIKE, "Describe this image.",
        {"language": "model.language_model.layers.1.mlp.up_proj", "vision": "model.vision_tower.encoder.layers.0.mlp.fc1",
         "projector": "model.multi_modal_projector.linear_1"},
    ),
    "clip_llama": Case(
        "clip_llama", ("q_proj", "v_proj"),
        ("model.layers.{0,1}.self_attn.{q,k,v,o}_proj", "model.layers.{0,1}.mlp.{gate,up,down}_proj"), "",
        {"language": "model.layers.1.mlp.up_proj", "vision": "vision_tower.encoder.layers.0.mlp.fc1", "projector": "gate"},
    ),
    "paligemma": Case(
        "paligemma", ("q_proj", "k_proj", "v_proj", "o_proj"), LLAMA_LIKE, "Describe this image:",
        {"language": "model.language_model.layers.1.mlp.up_proj", "vision": "model.vision_tower.encoder.layers.0.mlp.fc1",
         "projector": "model.multi_modal_projector.linear"},
    ),
    "paligemma2": Case(
        "paligemma:2", ("q_proj", "k_proj", "v_proj", "o_proj"), LLAMA_LIKE, "Describe this image:",
        {"language": "model.language_model.layers.1.mlp.up_proj", "vision": "model.vision_tower.encoder.layers.0.mlp.fc1",
         "projector": "model.multi_modal_projector.linear"},
    ),
    "qwen2_vl": Case(
        "qwen2_vl", ("q_proj", "v_proj", "down_proj"), LLAMA_LIKE, "Describe this image:",
        {"language": "model.language_model.layers.1.mlp.up_proj", "vision": "model.visual.blocks.1.attn.qkv",
         "projector": "model.visual.merger.mlp.2"},
    ),
    "qwen2_5_vl": Case(
        "qwen2_vl:2.5", ("q_proj", "v_proj", "down_proj"), LLAMA_LIKE, "Describe this image:",
        {"language": "model.language_model.layers.1.mlp.up_proj", "vision": "model.visual.blocks.1.attn.qkv",
         "projector": "model.visual.merger.mlp.2"},
    ),
}  # fmt: skip


def expand(pattern: str) -> list[str]:
    """`a.{b,c}` -> a.b, a.c."""
    begin = pattern.find("{")
    if begin < 0:
        return [pattern]
    end = pattern.index("}", begin)
    return [
        found
        for part in pattern[begin + 1 : end].split(",")
        for found in expand(pattern[:begin] + part + pattern[end + 1 :])
    ]


@pytest.fixture(scope="session", params=sorted(CASES))
def case(request):
    return CASES[request.param]


@pytest.fixture(scope="session")
def scenes():
    return {"train": list(generate(8, seed=3)), "val": list(generate(4, seed=4))}


@pytest.fixture(scope="session")
def twins(scenes, tmp_path_factory):
    """Folder of a case's twin, built once; `dropout` is the base's own."""
    captions, built = [c for s in scenes["train"] for c in s.captions], {}

    def twins(name, dropout=0.0):
        if (name, dropout) not in built:
            folder = tmp_path_factory.mktemp(name.replace(":", "-"))
            built[name, dropout] = build_twin(name, folder, captions=captions, dropout=dropout)
        return built[name, dropout]

    return twins


@pytest.fixture(scope="session")
def settings(twins):
    """The checked settings of a case; keywords by `section__name`."""

    def settings(case, **changes):
        tree = {
            "model": {"family": case.family, "path": str(twins(case.twin)), "compute_dtype": "fp32"},
            "data": {"prompt": case.prompt, "max_text_tokens": 96},
            "lora": {"r": 4, "targets": list(case.targets)},
            "train": {"steps": 20, "batch": 4, "lr": 5e-3, "warmup_steps": 1, "val_images": 4, "schedule": "linear"},
            "decode": {"max_new_tokens": 6, "batch": 8},
        }
        for key, value in changes.items():
            section, name = key.split("__")
            tree.setdefault(section, {})[name] = value
        return from_dict(tree)

    return settings


@pytest.fixture(scope="session")
def load(settings):
    def load(case, dtype="fp32", **changes):
        config = settings(case, **changes)
        return load_model(config.model, config.data, compute_dtype=dtype, device="cpu")

    return load


@pytest.fixture(scope="session")
def plain(settings):
    """The model without quantisation, in `dtype`, on the weights that NF4 made of it: a copy of one that is built once."""
    built = {}

    def plain(case, dtype=torch.float64, **changes):
        key = case.twin, dtype, repr(sorted(changes.items()))
        if key not in built:
            built[key] = with_dequantised(settings(case, **changes), dtype)
        return dataclasses.replace(built[key], model=copy.deepcopy(built[key].model))

    return plain


@pytest.fixture(scope="session")
def make_stores(scenes, tmp_path_factory):
    """Finished stores of the scenes, as `cm` prepares them."""

    def make_stores(cm):
        return stores_of(cm, scenes, tmp_path_factory.mktemp("stores"))

    return make_stores


@pytest.fixture(scope="session")
def make_engine(make_stores):
    def make_engine(cm, config, slots=8):
        kind = engine_class(config)
        return kind(cm, make_stores(cm), config, slots if kind is PackEngine else 1)

    return make_engine


@pytest.fixture(scope="session")
def trials():
    """Trials of different rank, alpha, lr, schedule and seed."""

    def trials(config, count=3, **overrides):
        return [
            trial_spec(
                config, f"t{k}",
                {"lora.r": [2, 4, 8][k], "lora.alpha_per_rank": [2, 1, 2][k], "train.lr": [5e-2, 1e-2, 1e-1][k],
                 "train.schedule": ["linear", "cosine", "constant"][k], **overrides},
                seed=100 + k,
            )
            for k in range(count)
        ]  # fmt: skip

    return trials


@pytest.fixture(scope="session")
def pixel_values(scenes):
    """The four validation scenes as a loaded model takes them."""

    def pixel_values(cm):
        pixels = torch.from_numpy(np.stack([cm.family.resize(cm.processor, s.image) for s in scenes["val"]]))
        return cm.family.pixel_values(cm.processor, pixels)

    return pixel_values


@pytest.fixture(scope="session")
def texts():
    def texts(cm, captions, prompt=None):
        coded = [cm.family.encode(cm.processor, c, cm.prompt if prompt is None else prompt, 96) for c in captions]
        return cm.family.collate([c[0] for c in coded], [c[1] for c in coded], cm.family.pad_token(cm.processor))

    return texts
