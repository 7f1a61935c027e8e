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

from raycap.checks import check
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
    "from_dict",
    "load_config",
    "parse_value",
    "preset_names",
    "put_settings",
    "setting_kind",
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
