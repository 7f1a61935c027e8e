"""Families and models by name: every entry loads, what is unknown is answered with the nearest, what is taken is kept."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import pytest

from raycap.config import from_dict
from raycap.errors import ConfigError, ModelError
from raycap.models import BUILTIN, FAMILIES, load_family, load_model, register_family, resolve_path, row_preparer
from raycap.models.base import Family


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_loads_and_keeps_the_contract(name):
    family = load_family(name)
    assert isinstance(family, Family)
    assert family.name == name
    assert set(family.scopes()) >= {"language", "vision"}


def test_a_family_is_one_file_of_under_150_lines_and_one_line_of_the_registry():
    """generic, the last one to be written, is what docs/models.md shows to who writes their own."""
    import importlib

    module, _, attribute = FAMILIES["generic"].partition(":")
    file = Path(importlib.import_module(module).__file__)
    assert len(file.read_text(encoding="utf-8").splitlines()) < 150
    own = [f.name for f in (file.parents[1]).rglob("*.py") if attribute in f.read_text(encoding="utf-8") and f != file]
    assert own == ["__init__.py"], "nobody else knows of it"


def test_an_unknown_family_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'git'"):
        load_family("gitt")


def test_a_second_entry_of_a_name_is_refused():
    with pytest.raises(ConfigError, match="registered already"):
        register_family("git", "elsewhere:Git")


def test_paths(tmp_path):
    for name in BUILTIN:
        assert (Path(resolve_path(name)) / "config.json").is_file()
    assert resolve_path(tmp_path) == str(tmp_path)
    assert resolve_path("microsoft/git-base") == "microsoft/git-base"
    with pytest.raises(ConfigError, match="builtin:tiny-git"):
        resolve_path("builtin:tiny-gitt")
    for missing in (tmp_path / "none", "none", "a/b/c"):
        with pytest.raises(ModelError, match="no such folder"):
            resolve_path(missing)


def test_a_folder_without_a_model_says_so(tmp_path):
    settings = from_dict({"model": {"path": str(tmp_path)}})
    with pytest.raises(ModelError, match="cannot be loaded as a model of family git"):
        load_model(settings.model, settings.data)


def test_captions_longer_than_the_model_are_refused(load):
    with pytest.raises(ConfigError, match="max_text_tokens=1000"):
        load(max_text_tokens=1000)


def test_the_model_arrives_frozen_and_in_eval_mode(load):
    cm = load()
    assert not any(p.requires_grad for p in cm.model.parameters())
    assert not any(m.training for m in cm.model.modules())


def test_row_preparer_survives_pickling_and_prepares_a_row(twin, images, load):
    prepare = pickle.loads(pickle.dumps(row_preparer("git", twin, "a", 8)))
    raw = io.BytesIO()
    images[0].save(raw, "PNG")
    row = {"row": 3, "image_id": "x", "image": {"bytes": raw.getvalue()}, "captions": ["red ring", "a " * 30]}
    made = prepare(row)
    cm = load()
    assert (made["row"], made["image_id"]) == (3, "x")
    assert made["pixels"].shape == cm.family.image_size(cm.processor) == (3, 64, 64)
    assert made["truncated"] == [0, 1]
    assert made["unknown"] == [0, 0]
    assert made["prompt_lens"] == [2, 2]  # start token and prompt
    assert len(made["token_ids"][1]) == 8
    assert all(ids[0] == 1 and ids[-1] == 2 for ids in made["token_ids"])
