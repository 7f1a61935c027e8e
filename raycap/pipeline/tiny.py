"""`raycap sweep PRESET --tiny`: a preset's whole way with its family's tiny twin, on a drawn set of its own layout.

A person sees that the preset works before a GPU is paid for and a set fetched. What the preset is about stays: family,
quantisation, adapters, scope, projector, schedule, search space, decoding, metrics, gate. Model, set and sizes are small,
learning rates fit the twin. The scores mean nothing, which whatever shows them says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raycap.cluster import connect
from raycap.config import Config, from_dict, put_settings
from raycap.errors import ConfigError
from raycap.files import atomic_folder, sha256_json
from raycap.settings import prompt_for

STEPS = 54
TRIALS = 4
LR, LRS = 2e-3, [5e-4, 5e-3]
MAX_DROP = 0.5
"""A twin of 64 dimensions loses more to NF4 than a real model, and few images tell less: a wreck still does not pass."""
CONFIGURATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "risc-paligemma": {
        "configuration-1": {},
        "configuration-2": {"lora.r": 64, "lora.alpha": 256, "lora.dropout": 0.0, "train.warmup_steps": 4},
    }
}
"""Preset -> settings of the models that its grid compares, by name; docs/seeds.md has their sources."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyPlan:
    """What a tiny run will use; `make` writes it, once, into the cache."""

    preset: str
    config: Config
    base: str
    """The model that the twin stands in for."""
    set_name: str
    place: Path
    clip: Path | None
    fitted: bool
    """Whether the model is the twin made here, and not one that the user named."""

    @property
    def outside(self) -> str:
        """The set out of the domain; empty where there is none."""
        from raycap.data.drawn.sets import SETS, set_folder

        outside = SETS[self.set_name].outside
        return str(set_folder(self.set_name, self.place) / outside) if outside else ""

    def make(self, say: Callable[[str], None]) -> None:
        """Draw the set, fit the twin, write the CLIP, whichever are not there yet."""
        from raycap.data.drawn.sets import training_rows, write_set
        from raycap.models.tiny import build_twin
        from raycap.models.tiny.clip import build_clip
        from raycap.models.tiny.fit import FIT_STEPS, fit_twin, write_note

        say(f"drawing a small set in the layout of {self.set_name}")
        write_set(self.set_name, self.place)
        if self.clip and not self.clip.is_dir():
            with atomic_folder(self.clip) as folder:
                build_clip(folder)
        model = Path(self.config.model.path)
        if not self.fitted or model.is_dir():
            return
        c, rows = self.config, list(training_rows(self.set_name))
        prompt = prompt_for(c.data.prompt, c.evaluate.lang)
        from transformers.utils import logging

        logging.disable_progress_bar()  # of files that take no time
        words = [caption for _, captions in rows for caption in captions]
        with atomic_folder(model) as folder:
            build_twin(c.model.family, folder, captions=[*words, prompt, *CHAT_WORDS])
            fit_twin(
                folder, c.model.family, rows, prompt=prompt, max_text_tokens=c.data.max_text_tokens,
                say=lambda said: say(f"fitting a tiny random twin of {self.base}: {said}"),
            )  # fmt: skip
            write_note(folder, self.base, FIT_STEPS)


CHAT_WORDS = ("You are a helpful assistant.", "system", "user", "assistant")
"""Part of each prompt of a chat model: whole tokens in a twin's small vocabulary, or they fill its context."""


def tiny_plan(preset: Config, settings: Sequence[str] = ()) -> TinyPlan:
    """The tiny form of `preset`, with `settings` (key=value) put in last; nothing is written.

    Raises:
        ConfigError: the family has no twin; the model is tiny as it is; a setting that does not fit.
    """
    from raycap.data.drawn.sets import SETS, set_folder
    from raycap.models import BUILTIN
    from raycap.models.tiny import TWINS
    from raycap.models.tiny.fit import FIT_STEPS

    family = preset.model.family
    if preset.model.path in BUILTIN:
        raise ConfigError(
            f"--tiny has no effect: model.path={preset.model.path} is tiny as it is, leave the option away"
        )
    if family not in TWINS:
        raise ConfigError(f"--tiny: there is no tiny model of model.family={family}; there are {', '.join(TWINS)}")
    place = preset.cache_dir / "tiny"
    name = preset.data.source.partition("@")[0].rpartition("/")[2]
    known = name in SETS
    if not known:  # a user's own preset: photographs in its language stand in for its set
        name = "stair" if preset.evaluate.lang == "ja" else "flickr30k"
    folder = set_folder(name, place)
    prompt = prompt_for(preset.data.prompt, preset.evaluate.lang)
    key = sha256_json([folder.name, family, prompt, FIT_STEPS])[:8]
    model = place / f"tiny-random-{family}-{name}-{key}"
    scored = "clipscore" in preset.evaluate.metrics
    chosen = "clipscore" in preset.data.captions
    clip = place / "tiny-random-clip" if scored or chosen else None
    tree = preset.to_dict()
    tree["run"]["name"] = f"{preset.run.name}-tiny"
    if not known:
        tree["data"] |= {"images": "", "columns": {}, "report": "auto", "missing_splits": "draw", "lang": ""}
    tree["data"] |= {key: str(folder / path) for key, path in SETS[name].settings.items()}
    _shrink(tree, preset)
    tree["model"] |= {"path": str(model), "vision_path": "", "graft_path": "", "min_pixels": 0, "max_pixels": 0,
                      "materialise": False, "trust_remote_code": False}  # fmt: skip
    if chosen:
        tree["data"]["clip_model"] = str(clip)
    if scored:
        tree["evaluate"]["clip"] = str(clip)
    config = from_dict(put_settings(tree, settings))
    return TinyPlan(
        preset=preset.run.name, config=config, base=preset.model.path, set_name=name, place=place, clip=clip,
        fitted=config.model.path == str(model),
    )  # fmt: skip


def _shrink(tree: dict[str, dict[str, Any]], preset: Config) -> None:
    """Sizes, steps and learning rates for a twin and two cores; in place."""
    from raycap.data.drawn.sets import SIZES

    tree["data"] |= {"limit": 0, "max_text_tokens": 128}
    if max(preset.data.splits) > 1:
        tree["data"]["splits"] = list(SIZES.values())
    tree["lora"]["init_from"] = ""
    tree["train"] |= {"steps": STEPS, "lr": LR, "val_images": min(SIZES["val"], preset.train.val_images)}
    if preset.train.warmup_steps:
        tree["train"]["warmup_steps"] = 2
    tree["tune"] |= {"trials": TRIALS, "slots": TRIALS, "packs": 1, "grace_steps": 0}
    space = dict(preset.tune.space)
    if "train.lr" in space:
        space["train.lr"] = {"loguniform": LRS}
    if "train.warmup_steps" in space:
        space["train.warmup_steps"] = {"choice": [2, 4]}
    if preset.lora.layers:  # a twin has two language layers
        tree["lora"]["layers"] = "top1"
        if "lora.layers" in space:
            space["lora.layers"] = {"choice": ["top1", ""]}
    tree["tune"]["space"] = space
    tree["decode"]["max_new_tokens"] = min(48, preset.decode.max_new_tokens)
    tree["evaluate"]["resamples"] = min(1000, preset.evaluate.resamples)
    tree["export"]["max_drop"] = max(MAX_DROP, preset.export.max_drop)


def tiny_sweep(plan: TinyPlan, *, plain: bool = False, command: str = "") -> Path:
    """Make what the plan needs and run the main job with it; the run folder."""
    from raycap.pipeline.main_job import sweep
    from raycap.report.live import Progress

    with Progress(f"{plan.config.run.name} · {plan.place}", plain=plain, phases=("make",)) as progress:
        plan.make(lambda said: progress.phase("make", said))
    return sweep(plan.config, plain=plain, command=command)


def beyond(plan: TinyPlan, run: Path, *, plain: bool = False) -> dict[str, Any]:
    """What the preset is for beyond a sweep: its set out of the domain, its grid of prompts and decodings.

    Returns: `outside` (what `evaluate` returns) and `grid` (what `evaluate_grid` returns), whichever the preset has. Files
    lie in the run's outside/ and grid/test/.
    """
    from raycap.evaluate.grid import cells
    from raycap.pipeline.evaluation import evaluate
    from raycap.pipeline.grid import evaluate_grid

    config, found = plan.config, {}
    if not (plan.outside or config.evaluate.prompts):
        return found
    promoted = run / "best" / config.export.promote
    with connect(config):
        if plan.outside:
            found["outside"] = evaluate(
                config, promoted, split="test", out=run / "outside", plain=plain, also=[plan.outside]
            )
        if config.evaluate.prompts:
            models = _configurations(config, run, CONFIGURATIONS.get(plan.preset, {})) or [promoted]
            wanted = cells(config, {"prompts": tuple(config.evaluate.prompts), "decode": ("greedy", "beam-sample")})
            found["grid"] = evaluate_grid(config, models, wanted, split="test", out=run / "grid" / "test", plain=plain)
    return found


def _configurations(config: Config, run: Path, wanted: Mapping[str, Mapping[str, Any]]) -> list[Path]:
    """Train settings side by side in one pack, none pruned; a merged model of each."""
    from raycap.data.shards import prepare_if_needed
    from raycap.pipeline.remote import in_worker
    from raycap.pipeline.tools import prepare_tools
    from raycap.trial import trial_spec
    from raycap.tune.sweep import run_sweep

    if not wanted:
        return []
    folder = run / "configurations"
    tune = dataclasses.replace(
        config.tune, trials=len(wanted), slots=len(wanted), scheduler="none", grace_steps=0, default_trial=False,
        confirm_seeds=0,
    )  # fmt: skip
    own = dataclasses.replace(config, tune=tune)
    trials = [trial_spec(own, name, overrides) for name, overrides in wanted.items()]
    with connect(config) as ray:
        shards = prepare_if_needed(config, tools=prepare_tools(config))
        # Its folder's name is its place on run.storage too.
        done = run_sweep(own, folder / f"{run.name}-configurations", shards, trials=trials)
        adapters = {name: str(done.adapters[name]) for name in wanted}
        made = in_worker(
            ray, merge_each, config.to_dict(), adapters, str(folder.absolute()), log=folder / "logs" / "merge.log",
            say=lambda said: None,
        )  # fmt: skip
    return [Path(place) for place in made.values()]


def merge_each(
    settings: dict[str, Any],
    adapters: Mapping[str, str],
    out: str,
    *,
    threads: int = 0,
    say: Callable[[str], None] = lambda message: None,
) -> dict[str, str]:
    """Merge each adapter onto the weights it was trained on; name -> folder."""
    from raycap.export.merge import merge

    config = from_dict(settings)
    onto = "original" if config.model.quantisation == "none" else "dequantised"
    made = {}
    for name, adapter in adapters.items():
        say(f"merging {name}")
        made[name] = str(merge(config.model, config.data, Path(adapter), Path(out) / name, onto))
    return made
