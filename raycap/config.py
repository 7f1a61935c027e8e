"""The one tree of settings: presets, a user's own YAML, `key=value` overrides, all checked before anything is loaded.

A value is parsed by the declared type of its field (`train.lr=1e-3` is a number). What is unknown, of the wrong type or
without effect raises a ConfigError that names the key, the value and the nearest valid one.
"""

from __future__ import annotations

import dataclasses
import os
import types
import typing
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from raycap.errors import ConfigError, did_you_mean
from raycap.settings import (
    DataSettings,
    DecodeSettings,
    EvaluateSettings,
    ExportSettings,
    LoraSettings,
    ModelSettings,
    RunSettings,
    ServeSettings,
    TrainSettings,
    TuneSettings,
)

__all__ = [
    "Config",
    "DataSettings",
    "DecodeSettings",
    "EvaluateSettings",
    "ExportSettings",
    "LoraSettings",
    "ModelSettings",
    "RunSettings",
    "ServeSettings",
    "TrainSettings",
    "TuneSettings",
    "all_keys",
    "check",
    "check_decode",
    "from_dict",
    "load_config",
    "parse_value",
    "preset_names",
    "put_settings",
    "setting_kind",
    "trains_alone",
    "variants",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    run: RunSettings = field(default_factory=RunSettings)
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    tune: TuneSettings = field(default_factory=TuneSettings)
    decode: DecodeSettings = field(default_factory=DecodeSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    export: ExportSettings = field(default_factory=ExportSettings)
    serve: ServeSettings = field(default_factory=ServeSettings)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain values, ready for YAML or JSON; `from_dict` reads them back equal."""
        return {s.name: _plain_section(getattr(self, s.name)) for s in dataclasses.fields(self)}

    @property
    def cache_dir(self) -> Path:
        return Path(
            self.run.cache_dir or os.environ.get("RAYCAP_CACHE") or Path.home() / ".cache" / "raycap"
        ).expanduser()


def preset_names() -> list[str]:
    """Names of the presets that ship in the package."""
    return sorted(
        p.name.removesuffix(".yaml") for p in resources.files("raycap.presets").iterdir() if p.name.endswith(".yaml")
    )


def load_config(preset: str, overrides: Sequence[str] = ()) -> Config:
    """Resolve a preset's name (or the path of one's own YAML) and `key=value` overrides into a checked tree.

    Raises:
        ConfigError: no such preset; a key, value or type that does not fit; settings that contradict each other.
    """
    config = from_dict(put_settings(_read_preset(preset), overrides))
    if config.model.trust_remote_code:
        warnings.warn(
            f"WARNING: model.trust_remote_code=true runs the code that came with {config.model.path}, as you, here and on "
            "every node. Read it first",
            stacklevel=2,
        )
    return config


def put_settings(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`tree` (as `Config.to_dict` gives) with `key=value` overrides in it; changed in place, checked by `from_dict`."""
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"'{override}' is not a setting: write key=value, for example train.lr=1e-3")
        _override(tree, key.strip(), text)
    return tree


def from_dict(tree: Mapping[str, Any]) -> Config:
    """Build the checked tree from nested mappings; the inverse of `Config.to_dict`."""
    hints = typing.get_type_hints(Config)
    sections = {}
    for name, values in tree.items():
        if name not in hints:
            raise ConfigError(f"unknown section '{name}'; {did_you_mean(str(name), hints)}")
        if not isinstance(values, Mapping):
            raise ConfigError(f"section '{name}' is {values!r}, expected settings below it")
        kinds = typing.get_type_hints(hints[name])
        sections[name] = hints[name](**{k: _parse(f"{name}.{k}", v, _kind(name, k, kinds)) for k, v in values.items()})
    config = Config(**sections)
    check(config)
    return config


def setting_kind(key: str) -> Any:
    """Declared type of the setting `section.name`; ConfigError when there is none of that name."""
    section, _, name = key.partition(".")
    hints = typing.get_type_hints(Config)
    if section not in hints:
        raise ConfigError(f"unknown setting '{key}'; {did_you_mean(key, all_keys())}")
    return _kind(section, name, typing.get_type_hints(hints[section]))


def parse_value(key: str, value: Any) -> Any:
    """`value` as the declared type of the setting `key`."""
    return _parse(key, value, setting_kind(key))


def all_keys() -> list[str]:
    hints = typing.get_type_hints(Config)
    return [f"{s}.{f.name}" for s, kind in hints.items() for f in dataclasses.fields(kind)]


def check(config: Config) -> None:
    """Raise a ConfigError for values out of range and for settings that contradict or disable each other."""
    c = config
    _positive("lora.r", c.lora.r)
    for key in (
        "train.steps",
        "train.batch",
        "train.accumulation",
        "train.val_images",
        "train.workers",
        "tune.trials",
        "tune.slots",
        "tune.packs",
    ):
        section, name = key.split(".")
        _positive(key, getattr(getattr(c, section), name))
    _positive("train.lr", c.train.lr)
    _positive("train.max_grad_norm", c.train.max_grad_norm)
    _positive("data.max_text_tokens", c.data.max_text_tokens)
    _positive("data.rows_per_shard", c.data.rows_per_shard)
    if c.data.limit < 0:
        raise ConfigError(f"data.limit={c.data.limit} must be at least 0 (0: all images)")
    if c.lora.alpha and c.lora.alpha_per_rank:
        raise ConfigError(
            f"lora.alpha={c.lora.alpha} and lora.alpha_per_rank={c.lora.alpha_per_rank} both set the scale: give one of them"
        )
    if not 0 <= c.lora.dropout < 1:
        raise ConfigError(f"lora.dropout={c.lora.dropout} must be at least 0 and below 1")
    if c.lora.layers and not (
        c.lora.layers.startswith("top") and c.lora.layers[3:].isdecimal() and int(c.lora.layers[3:])
    ):
        raise ConfigError(f"lora.layers={c.lora.layers!r} must be empty (all) or top<n>, for example top6")
    if c.lora.layers and c.lora.scope != "all" and "language" not in c.lora.scope.split("+"):
        raise ConfigError(f"lora.layers={c.lora.layers} has no effect with lora.scope={c.lora.scope}")
    if alone := trains_alone(c):
        if c.tune.slots != 1:
            raise ConfigError(f"{alone} trains one adapter at a time: set tune.slots=1 (it is {c.tune.slots})")
        if c.train.workers > 1:
            raise ConfigError(f"{alone} trains on one worker: set train.workers=1 (it is {c.train.workers})")
        if c.lora.full or "lora.full" in c.tune.space:
            raise ConfigError(f"{alone} cannot train a part in full beside the adapter: leave lora.full out")
        if c.tune.memory_limit_bytes:
            raise ConfigError(f"{alone}: what it takes is not predicted, so tune.memory_limit_bytes must be 0")
    _positive("lora.prompt_tokens", c.lora.prompt_tokens)
    if c.lora.prompt_tokens != _LORA.prompt_tokens and "prompt" not in variants(c):
        raise ConfigError(f"lora.prompt_tokens={c.lora.prompt_tokens} has no effect with lora.variant={c.lora.variant}")
    if c.lora.variant == "prompt":
        for name in ("layers", "scope", "dropout", "rslora"):
            if getattr(c.lora, name) != getattr(_LORA, name):
                raise ConfigError(f"lora.{name}={getattr(c.lora, name)} has no effect with lora.variant=prompt")
    if not c.lora.targets:
        raise ConfigError("lora.targets is empty: no module would get an adapter")
    if c.train.warmup_steps and c.train.warmup_ratio:
        raise ConfigError(
            f"train.warmup_steps={c.train.warmup_steps} and train.warmup_ratio={c.train.warmup_ratio}: give one"
        )
    if not 0 <= c.train.warmup_ratio < 1:
        raise ConfigError(f"train.warmup_ratio={c.train.warmup_ratio} must be at least 0 and below 1")
    if c.train.schedule == "constant" and (c.train.warmup_steps >= c.train.steps):
        raise ConfigError(f"train.warmup_steps={c.train.warmup_steps} leaves nothing of train.steps={c.train.steps}")
    if c.train.batch % c.train.accumulation:
        raise ConfigError(f"train.accumulation={c.train.accumulation} does not divide train.batch={c.train.batch}")
    if c.train.workers > c.train.batch:
        raise ConfigError(
            f"train.workers={c.train.workers} leaves workers without a row of train.batch={c.train.batch}: lower train.workers"
        )
    _check_splits(c.data.splits)
    if sorted(c.data.train_splits) not in (["train"], ["train", "val"]):
        raise ConfigError(
            f"data.train_splits={list(c.data.train_splits)} must be train, or train and val; test is never seen"
        )
    if len(c.data.shapes_images) != 3 or min(c.data.shapes_images) < 1:
        raise ConfigError(
            f"data.shapes_images={list(c.data.shapes_images)} must be three counts of at least 1 (train, val, test)"
        )
    if c.run.store_gb < 0:
        raise ConfigError(f"run.store_gb={c.run.store_gb} must be at least 0 (0: four fifths of the free disk)")
    if not 0 <= c.data.quality <= 100:
        raise ConfigError(f"data.quality={c.data.quality} must lie between 0 (lossless) and 100")
    if c.data.quality and c.data.store != "resized":
        raise ConfigError(f"data.quality={c.data.quality} has no effect with data.store={c.data.store}")
    if c.tune.eta < 2:
        raise ConfigError(f"tune.eta={c.tune.eta} must be at least 2")
    if not 0 <= c.tune.grace_steps <= c.train.steps:
        raise ConfigError(f"tune.grace_steps={c.tune.grace_steps} must lie between 0 and train.steps={c.train.steps}")
    if c.evaluate.clip and "clipscore" not in c.evaluate.metrics:
        raise ConfigError(f"evaluate.clip={c.evaluate.clip!r} has no effect without clipscore in evaluate.metrics")
    if c.tune.memory_limit_bytes < 0:
        raise ConfigError(f"tune.memory_limit_bytes={c.tune.memory_limit_bytes} must be at least 0 (0: no limit)")
    if c.tune.confirm_seeds == 1 or c.tune.confirm_seeds < 0:
        raise ConfigError(
            f"tune.confirm_seeds={c.tune.confirm_seeds} must be 0, or at least 2 to show how seeds differ"
        )
    if c.tune.confirm_seeds and c.tune.confirm_top < 2:
        raise ConfigError(f"tune.confirm_top={c.tune.confirm_top} must be at least 2: settings are compared")
    if c.tune.confirm_seeds and not c.tune.space:
        raise ConfigError(
            f"tune.confirm_seeds={c.tune.confirm_seeds} has no effect: tune.space is empty, so all is one setting"
        )
    if c.tune.default_trial and not c.tune.space:
        raise ConfigError("tune.default_trial has no effect: tune.space is empty, so every trial is the default")
    if c.tune.scheduler == "none" and c.tune.grace_steps:
        raise ConfigError("tune.grace_steps has no effect with tune.scheduler=none")
    for key in ("serve.replicas", "serve.max_batch", "serve.max_queue", "serve.max_body_bytes", "serve.max_image_px",
                "serve.max_images", "decode.batch"):  # fmt: skip
        section, name = key.split(".")
        _positive(key, getattr(getattr(c, section), name))
    if not 0 <= c.serve.port <= 65535:
        raise ConfigError(f"serve.port={c.serve.port} must lie between 1 and 65535, or be 0 for a free one")
    if c.serve.batch_wait_s < 0:
        raise ConfigError(f"serve.batch_wait_s={c.serve.batch_wait_s} must be at least 0")
    if not 0 <= c.export.max_drop <= 1:
        raise ConfigError(f"export.max_drop={c.export.max_drop} is a relative drop between 0 and 1")
    check_decode(c.decode)
    if c.decode.do_sample and c.decode.num_beams > 1:
        raise ConfigError(
            f"decode.do_sample with decode.num_beams={c.decode.num_beams}: sampled beams depend on what is decoded together; "
            "take one of them, or `raycap evaluate --grid decode=beam-sample`, which decodes in a fixed order"
        )
    if c.model.double_quantisation and c.model.quantisation != "nf4":
        raise ConfigError(f"model.double_quantisation has no effect with model.quantisation={c.model.quantisation}")
    if c.model.materialise and c.model.quantisation == "none":
        raise ConfigError("model.materialise has no effect with model.quantisation=none")


def trains_alone(config: Config) -> str:
    """The setting for which trials cannot be packed, as `key=value`; empty where they can."""
    for variant in variants(config):
        if variant != "lora":
            return f"lora.variant={variant}"
    return "" if config.train.optimiser == "adamw" else f"train.optimiser={config.train.optimiser}"


def variants(config: Config) -> list[str]:
    """Kinds of adapters that trials may have."""
    space = config.tune.space.get("lora.variant") or {}
    choices = space.get("choice", ()) if isinstance(space, Mapping) else ()
    return [config.lora.variant, *map(str, choices)]


_GREEDY, _LORA = DecodeSettings(), LoraSettings()


def check_decode(decode: DecodeSettings, where: str = "decode") -> None:
    """Raise a ConfigError for values out of range and without effect; `where` names the settings in the message."""
    d = decode
    _positive(f"{where}.max_new_tokens", d.max_new_tokens)
    _positive(f"{where}.num_beams", d.num_beams)
    _positive(f"{where}.temperature", d.temperature)
    if not 0 < d.top_p <= 1:
        raise ConfigError(f"{where}.top_p={d.top_p} must be above 0 and at most 1")
    for name in ("top_k", "seed", "no_repeat_ngram_size"):
        if getattr(d, name) < 0:
            raise ConfigError(f"{where}.{name}={getattr(d, name)} must be at least 0")
    for unset, off, names in (
        ("num_beams=1", d.num_beams == 1, ("length_penalty", "early_stopping")),
        ("do_sample=false", not d.do_sample, ("temperature", "top_k", "top_p", "seed")),
    ):
        for name in names:
            if off and getattr(d, name) != getattr(_GREEDY, name):
                raise ConfigError(f"{where}.{name}={getattr(d, name)} has no effect with {where}.{unset}")
    if any(not word.strip() for word in d.bad_words):
        raise ConfigError(f"{where}.bad_words holds an empty word: remove it")


def _check_splits(splits: Sequence[float]) -> None:
    given = [int(n) if n == int(n) else n for n in splits]
    shares = len(splits) == 3 and min(splits) >= 0 and abs(sum(splits) - 1) <= 1e-6
    counts = len(splits) == 3 and min(splits) >= 1 and max(splits) > 1 and all(n == int(n) for n in splits)
    if not shares and not counts:
        raise ConfigError(
            f"data.splits={given} must be three shares (train, val, test) that sum to 1, or three counts of rows"
        )


def _positive(key: str, value: float) -> None:
    if not value > 0:
        raise ConfigError(f"{key}={value} must be above 0")


def _kind(section: str, name: str, kinds: Mapping[str, Any]) -> Any:
    if name not in kinds:
        names = [f"{section}.{k}" for k in kinds]
        raise ConfigError(f"unknown setting '{section}.{name}'; {did_you_mean(f'{section}.{name}', names)}")
    return kinds[name]


def _read_preset(preset: str) -> dict[str, Any]:
    path = Path(preset).expanduser()
    if preset in preset_names():
        text, where = (
            (resources.files("raycap.presets") / f"{preset}.yaml").read_text(encoding="utf-8"),
            f"preset {preset}",
        )
    elif path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"no settings file {path}")
        text, where = path.read_text(encoding="utf-8"), str(path)
    else:
        raise ConfigError(
            f"no preset '{preset}'; {did_you_mean(preset, preset_names())} A path to your own .yaml works too."
        )
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{where} holds {type(tree).__name__}, expected sections such as `train:`")
    parent = tree.pop("extends", None)
    if parent is not None:
        tree = _merge(_read_preset(str(parent)), tree)
    tree.setdefault("run", {})
    if isinstance(tree["run"], dict) and (parent is not None or not tree["run"].get("name")):
        tree["run"] = {**tree["run"], "name": path.stem if path.suffix in (".yaml", ".yml") else preset}
    return tree


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        keep_whole = key == "space"  # a space replaces its parent's: half of each would be a space that nobody wrote
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping) and not keep_whole
        merged[key] = _merge(dict(merged[key]), value) if both else value
    return merged


def _override(tree: dict[str, Any], key: str, text: str) -> None:
    section, _, name = key.partition(".")
    if section == "tune" and name.startswith("space."):
        setting = name.removeprefix("space.")
        value = yaml.safe_load(text)
        space = dict(tree.setdefault("tune", {}).get("space") or {})
        if value is None:
            space.pop(setting, None)
        else:
            space[setting] = {"choice": value} if isinstance(value, list) else value
        tree["tune"]["space"] = space
        return
    setting_kind(key)
    tree.setdefault(section, {})[name] = text


def _parse(key: str, value: Any, kind: Any) -> Any:
    origin = typing.get_origin(kind)
    if origin is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise ConfigError(f"{key}={value!r}; {did_you_mean(str(value), map(str, choices))}")
        return value
    if origin is tuple:
        if isinstance(value, str):
            value = [v.strip() for v in value.strip("[]() ").split(",") if v.strip()]
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{key}={value!r} is not a list")
        item = typing.get_args(kind)[0]
        return tuple(_parse(key, v, item) for v in value)
    if origin is dict or kind is dict:
        parsed = yaml.safe_load(value) if isinstance(value, str) else value
        if not isinstance(parsed, Mapping):
            raise ConfigError(f"{key}={value!r} is not a mapping")
        return dict(parsed)
    if kind == str | dict[str, str]:
        if isinstance(value, str) and not value.lstrip().startswith("{"):
            return value
        parsed = _parse(key, value, dict)
        if not parsed or not all(isinstance(t, str) for entry in parsed.items() for t in entry):
            raise ConfigError(f"{key}={value!r}; write one text, or a text for each language: {{en: ..., ja: ...}}")
        return parsed
    if origin is types.UnionType:
        return None if value in (None, "none", "") else _parse(key, value, typing.get_args(kind)[0])
    return _parse_scalar(key, value, kind)


def _parse_scalar(key: str, value: Any, kind: Any) -> Any:
    try:
        if kind is bool:
            if isinstance(value, bool):
                return value
            return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[str(value).lower()]
        if kind is int:
            number = float(value) if not isinstance(value, bool) else None
            if number is None or number != int(number):
                raise ValueError
            return int(str(value)) if str(value).lstrip("+-").isdigit() else int(number)
        if kind is float:
            if isinstance(value, bool):
                raise ValueError
            number = float(value)
            if number != number or number in (float("inf"), float("-inf")):
                raise ValueError
            return number
        if kind is str:
            if value is None or isinstance(value, (dict, list)):
                raise ValueError
            return str(value)
    except (ValueError, KeyError, TypeError, OverflowError):
        pass
    else:
        return value
    wanted = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}.get(kind, str(kind))
    raise ConfigError(f"{key}={value!r} is not {wanted}")


def _plain_section(section: Any) -> dict[str, Any]:
    values = {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
