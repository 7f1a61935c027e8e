"""What settings may not be: out of range, at odds with each other, or without effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from raycap.errors import ConfigError
from raycap.settings import DecodeSettings, LoraSettings

if TYPE_CHECKING:
    from raycap.config import Config

_GREEDY, _LORA = DecodeSettings(), LoraSettings()


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
