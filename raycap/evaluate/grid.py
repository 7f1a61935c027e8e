"""What a decoding grid consists of: every prompt with every decoding and, where tokens are drawn, every seed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raycap.checks import check_decode
from raycap.config import Config, DecodeSettings, parse_value
from raycap.errors import ConfigError, UsageError, did_you_mean
from raycap.settings import prompt_for

DECODINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam": {"num_beams": 4},
    "sample": {"do_sample": True, "top_p": 0.9, "top_k": 50, "temperature": 0.8},
    "beam-sample": {
        "num_beams": 4, "do_sample": True, "top_p": 0.9, "top_k": 50, "temperature": 0.8, "early_stopping": True,
        "no_repeat_ngram_size": 2,
    },
}  # fmt: skip
"""Name -> settings of `decode`; `evaluate.decodings` adds to them. Length, batch and bad words are those of `decode`."""
AXES = ("prompts", "decode", "seeds", "models")
DEFAULT = "default"
"""The prompt of `data.prompt`, the decoding of `decode`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One way of captioning: a prompt, a decoding, and its seed (part of `decode`)."""

    prompt_name: str
    prompt: str
    decode_name: str
    decode: DecodeSettings

    @property
    def seed(self) -> int | None:
        """None where nothing is drawn."""
        return self.decode.seed if self.decode.do_sample else None

    @property
    def fixed_order(self) -> bool:
        """Whether captions depend on what is decoded together: beams that are sampled."""
        return self.decode.do_sample and self.decode.num_beams > 1

    @property
    def name(self) -> str:
        """A part of a file's name."""
        seed = "" if self.seed is None else f"-s{self.seed}"
        return f"{_plain(self.prompt_name)}-{_plain(self.decode_name)}{seed}"

    def signature(self) -> str:
        """`decode|setting:value|...`: what departs from greedy search, and for sampled beams the order of the batches."""
        greedy = DecodeSettings()
        parts = {"prompt": repr(self.prompt), "max_new_tokens": self.decode.max_new_tokens}
        for field in dataclasses.fields(DecodeSettings):
            value = getattr(self.decode, field.name)
            if field.name not in ("max_new_tokens", "batch") and value != getattr(greedy, field.name):
                parts[field.name] = ",".join(value) if isinstance(value, tuple) else value
        if self.seed is not None:
            parts |= {"seed": self.seed, "draws": "batch" if self.fixed_order else "image"}
        if self.fixed_order:
            parts |= {"order": "split", "batch": self.decode.batch}
        return "|".join(["decode", *(f"{k}:{v}" for k, v in parts.items())])

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Cell:
        decode = {**values["decode"], "bad_words": tuple(values["decode"]["bad_words"])}
        return cls(**{**values, "decode": DecodeSettings(**decode)})


def read_axes(words: Sequence[str]) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """(axis -> its values, settings) of the words `prompts=A,B decode=greedy train.x=y` after --grid."""
    axes: dict[str, tuple[str, ...]] = {}
    settings = []
    for word in words:
        key, equals, text = word.partition("=")
        if "." in key and equals:
            settings.append(word)
            continue
        if key not in AXES:
            raise UsageError(f"--grid {word}: there is no axis '{key}'; {did_you_mean(key, AXES)}")
        values = tuple(v.strip() for v in text.split(",") if v.strip())
        if not values or key in axes or len(set(values)) < len(values):
            raise UsageError(f"--grid {word}: write each axis once, as {key}=ONE,OTHER, and each of its values once")
        axes[key] = values
    return axes, settings


def cells(config: Config, axes: Mapping[str, Sequence[str]]) -> list[Cell]:
    """All combinations, prompts outermost; what is not named is `config`'s own. A seed multiplies only what is drawn.

    Raises:
        ConfigError: a name that is neither set nor built in; a decoding that contradicts itself; seeds without draws.
    """
    prompts = {name: prompt(config, name) for name in axes.get("prompts", (DEFAULT,))}
    decodings = {name: decoding(config, name) for name in axes.get("decode", (DEFAULT,))}
    seeds = [parse_value("decode.seed", s) for s in axes.get("seeds", ())]
    if seeds and not any(d.do_sample for d in decodings.values()):
        raise ConfigError(f"--grid seeds={','.join(map(str, seeds))} has no effect: nothing is sampled")
    found = []
    for prompt_name, text in prompts.items():
        for decode_name, decode in decodings.items():
            for seed in seeds if seeds and decode.do_sample else [decode.seed]:
                own = dataclasses.replace(decode, seed=seed)
                check_decode(own, f"evaluate.decodings.{decode_name}")
                found.append(Cell(prompt_name=prompt_name, prompt=text, decode_name=decode_name, decode=own))
    names = [cell.name for cell in found]
    if double := {n for n in names if names.count(n) > 1}:
        raise ConfigError(f"--grid: two combinations would be called {sorted(double)[0]}; rename a prompt or decoding")
    return found


def prompt(config: Config, name: str) -> str:
    """The prompt of that name: `evaluate.prompts`, `default`, `none`, or a text of several words itself."""
    if name in config.evaluate.prompts:
        text = config.evaluate.prompts[name]
        if not isinstance(text, str):
            raise ConfigError(f"evaluate.prompts.{name}={text!r} is not text")
        return text
    if name == DEFAULT:
        return prompt_for(config.data.prompt, config.evaluate.lang)
    if name == "none":
        return ""
    if " " in name:
        return name
    known = [*config.evaluate.prompts, DEFAULT, "none"]
    raise ConfigError(
        f"--grid prompts={name}: evaluate.prompts has no '{name}'; {did_you_mean(name, known)} Name it there: "
        f"evaluate.prompts='{{{name}: Describe this image}}'"
    )


def decoding(config: Config, name: str) -> DecodeSettings:
    """The decoding of that name: of `evaluate.decodings`, built in, or `default`."""
    known = {**DECODINGS, **config.evaluate.decodings}
    if name not in known:
        if name == DEFAULT:
            return config.decode
        raise ConfigError(f"--grid decode={name}: there is no such decoding; {did_you_mean(name, [*known, DEFAULT])}")
    values = known[name]
    if not isinstance(values, Mapping):
        raise ConfigError(f"evaluate.decodings.{name}={values!r} is not a mapping, such as {{num_beams: 4}}")
    parsed = {key: parse_value(f"decode.{key}", value) for key, value in values.items()}
    common = {key: getattr(config.decode, key) for key in ("max_new_tokens", "batch", "bad_words")}
    found = DecodeSettings(**{**common, **parsed})
    check_decode(found, f"evaluate.decodings.{name}")
    return found


def _plain(text: str) -> str:
    return re.sub(r"[^\w.]+", "-", text).strip("-")[:40] or "prompt"
