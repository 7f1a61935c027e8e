"""Settings: parsed by declared type, unknown and useless ones refused, presets all sound."""

from __future__ import annotations

import pytest

from raycap.config import Config, all_keys, from_dict, load_config, preset_names
from raycap.errors import ConfigError
from raycap.trial import SWEEPABLE, TrialSpec, trial_spec


@pytest.mark.parametrize("name", preset_names())
def test_preset_resolves_and_reads_back_equal(name):
    config = load_config(name)
    assert from_dict(config.to_dict()) == config
    assert config.run.name == name


@pytest.mark.parametrize("name", preset_names())
def test_preset_has_a_space_that_can_be_sampled(name):
    from raycap.tune.space import sample_trials

    config = load_config(name)
    trials = sample_trials(config)
    assert len(trials) == config.tune.trials == len({t.trial_id for t in trials})
    assert trials == sample_trials(config)


@pytest.mark.parametrize(
    ("override", "section", "name", "value"),
    [
        ("train.lr=1e-3", "train", "lr", 1e-3),
        ("train.steps=1e3", "train", "steps", 1000),
        ("lora.targets=query,value", "lora", "targets", ("query", "value")),
        ("lora.targets=[query]", "lora", "targets", ("query",)),
        ("train.base_dropout=no", "train", "base_dropout", False),
        ("data.shapes_images=30,5,5", "data", "shapes_images", (30, 5, 5)),
        ("data.prompt=a photo of", "data", "prompt", "a photo of"),
    ],
)
def test_values_are_parsed_by_declared_type(override, section, name, value):
    found = getattr(getattr(load_config("shapes-git", [override]), section), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.lrr=1e-3", ["train.lrr", "train.lr"]),
        ("trian.lr=1e-3", ["trian.lr", "train.lr"]),
        ("tune.slots=many", ["tune.slots", "many", "whole number"]),
        ("tune.slots=1.5", ["tune.slots", "1.5"]),
        ("lora.r=0", ["lora.r=0", "above 0"]),
        ("lora.r=-4", ["lora.r=-4"]),
        ("train.lr=nan", ["train.lr", "finite"]),
        ("train.lr=true", ["train.lr"]),
        ("model.quantisation=nf5", ["nf5", "nf4"]),
        ("lora.dropout=1", ["lora.dropout"]),
        ("data.splits=0.5,0.5", ["data.splits"]),
        ("train.accumulation=3", ["train.accumulation=3", "train.batch=16"]),
        ("decode.length_penalty=2", ["no effect", "decode.num_beams"]),
        ("decode.early_stopping=true", ["decode.early_stopping=True has no effect", "decode.num_beams=1"]),
        ("decode.temperature=0.7", ["decode.temperature=0.7 has no effect", "decode.do_sample=false"]),
        ("decode.top_p=1.5", ["decode.top_p=1.5", "at most 1"]),
        ("decode.top_k=5", ["no effect", "decode.do_sample=false"]),
        ("decode.seed=-1", ["decode.seed=-1", "at least 0"]),
        ("train.warmup_ratio=0.1", ["train.warmup_steps", "train.warmup_ratio"]),
        ("nonsense", ["key=value"]),
    ],
)
def test_bad_settings_are_refused_by_name(override, said):
    with pytest.raises(ConfigError) as error:
        load_config("shapes-git", [override])
    for part in said:
        assert part in error.value.message
    assert error.value.exit_code == 2


def test_sampling_with_beams_is_for_the_grid():
    assert load_config("shapes-git", ["decode.do_sample=true", "decode.temperature=0.7"]).decode.temperature == 0.7
    with pytest.raises(ConfigError, match=r"decode.num_beams=4: sampled beams.*--grid"):
        load_config("shapes-git", ["decode.do_sample=true", "decode.num_beams=4"])


def test_settings_without_effect_are_refused():
    with pytest.raises(ConfigError, match="no effect"):
        load_config("shapes-git", ["tune.scheduler=none", "tune.grace_steps=10"])
    with pytest.raises(ConfigError, match="no effect"):
        load_config("shapes-git", ["model.quantisation=none", "model.materialise=true"])
    with pytest.raises(ConfigError, match="both set the scale"):
        load_config("shapes-git", ["lora.alpha=8", "lora.alpha_per_rank=2"])


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="shapes-git"):
        load_config("shapes-gti")


def test_own_yaml_extends_a_preset_and_replaces_its_space(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("extends: shapes-git\ntrain:\n  lr: 3e-4\ntune:\n  space:\n    lora.r: {choice: [4]}\n")
    config = load_config(str(file), ["tune.space.train.lr={loguniform: [1e-4, 1e-3]}"])
    assert config.run.name == "mine" and config.train.lr == 3e-4 and config.data.source == "shapes"
    assert set(config.tune.space) == {"lora.r", "train.lr"}


@pytest.mark.parametrize("text", ["- a\n- b\n", "train: [1]\n", "nowhere:\n  a: 1\n", "a: {\n"])
def test_yaml_that_is_no_settings_is_refused(tmp_path, text):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError):
        load_config(str(file))


def test_every_setting_says_what_it_is_or_is_plain():
    assert len(all_keys()) == len(set(all_keys()))
    assert set(SWEEPABLE) <= set(all_keys())


def test_a_trial_is_the_config_with_its_overrides():
    config = load_config("shapes-git", ["run.seed=7"])
    spec = trial_spec(config, "t00", {"lora.r": 4, "lora.alpha": 8, "train.lr": "1e-2"})
    assert (spec.r, spec.alpha, spec.scale, spec.lr, spec.seed) == (4, 8.0, 2.0, 1e-2, 7)
    assert TrialSpec.from_dict(spec.to_dict()) == spec
    by_ratio = trial_spec(config, "t01", {"lora.r": 32, "lora.alpha_per_rank": 1})
    assert by_ratio.alpha == 32 and by_ratio.scale == 1
    with pytest.raises(ConfigError, match=r"train\.batch"):
        trial_spec(config, "t02", {"train.batch": 4})
    with pytest.raises(ConfigError, match=r"lora\.r=0"):
        trial_spec(config, "t03", {"lora.r": 0})


def test_defaults_are_valid():
    assert from_dict({}) == Config()
