"""Do the best settings hold with other seeds? Each is trained again, and the settings, not the adapters, are compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raycap.config import Config
from raycap.files import read_json

if TYPE_CHECKING:
    from raycap.data.shards import Shards

FOLDER = "confirm"
STRIDE = 1_000
"""Distance of a seed from the run's: far from those of an empty space's trials, which count up from it."""


def settings_to_confirm(config: Config, found: Any, order: Sequence[str]) -> list[Any]:
    """The specs of the best `tune.confirm_top` trials by validation, and of the default trial where there is one."""
    from raycap.tune.space import DEFAULT, sweep_trials

    specs = {t.trial_id: t for t in sweep_trials(config)}
    chosen = list(order[: config.tune.confirm_top])
    if DEFAULT in specs and DEFAULT not in chosen:
        chosen.append(DEFAULT)
    return [specs[t] for t in chosen]


def confirm(
    config: Config,
    run_dir: Path,
    shards: Shards,
    found: Any,
    order: Sequence[str],
    say: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Train the best settings with `tune.confirm_seeds` other seeds, one pack a seed, and compare them on validation.

    The sweep's own adapters take no part: the best of many is lucky by choice. A seed changes the adapters' start, dropout
    and the order of samples. Returns: settings [ids], seeds, cider {id: [score a seed]}, verdicts {id: verdict of the first
    setting against it}, sentence.
    """
    from raycap.tune.sweep import run_sweep

    specs = settings_to_confirm(config, found, order)
    seeds = [config.run.seed + STRIDE * n for n in range(1, config.tune.confirm_seeds + 1)]
    captions: dict[str, list[dict[str, str]]] = {s.trial_id: [] for s in specs}
    for n, seed in enumerate(seeds, start=1):
        say(f"seed {n} of {len(seeds)}: {len(specs)} settings")
        folder = run_dir / FOLDER / f"{run_dir.name}-seed-{n}"  # the name is its place on run.storage too
        again = dataclasses.replace(
            config,
            run=dataclasses.replace(config.run, seed=seed, name=f"{config.run.name or run_dir.name}-confirm-{n}"),
            tune=dataclasses.replace(
                config.tune, trials=len(specs), slots=len(specs), packs=1, scheduler="none", grace_steps=0,
                default_trial=False, prune_collapsed=False, confirm_seeds=0,
            ),
        )  # fmt: skip
        trials = [dataclasses.replace(spec, seed=seed) for spec in specs]
        plan = folder / "checkpoints" / "plan.json"
        done = run_sweep(again, folder, shards.folder, resume=plan.is_file(), trials=trials)
        for spec in specs:
            if spec.trial_id in done.adapters:
                captions[spec.trial_id].append(read_json(done.adapters[spec.trial_id] / "val_captions.json"))
    return compare_settings(config, shards, captions)


def compare_settings(config: Config, shards: Shards, captions: dict[str, list[dict[str, str]]]) -> dict[str, Any]:
    """The first setting against each other one, by a bootstrap over seeds and groups; Holm over the others."""
    import numpy as np

    from raycap.evaluate.cider import CiderScorer
    from raycap.evaluate.comparisons import holm, setting_bootstrap
    from raycap.evaluate.tokenise import quick_tokeniser

    ids = list(next(said for runs in captions.values() for said in runs))
    references, groups = shards.references("val"), shards.groups("val")
    lang = config.evaluate.lang
    scorer = CiderScorer({i: references[i] for i in ids}, quick_tokeniser(lang), lang=lang)
    scores = {t: np.array([scorer.score(said)[1] for said in runs]) for t, runs in captions.items() if len(runs) > 1}
    left = [t for t in captions if t not in scores]
    first, *others = scores or [""]
    told: dict[str, Any] = {
        "settings": list(scores), "split": "val", "images": len(ids), "signature": scorer.signature,
        "cider": {t: [float(s) for s in each.mean(axis=1)] for t, each in scores.items()},
        "left_out": left, "verdicts": {},
    }  # fmt: skip
    for other in others:
        verdict = setting_bootstrap(
            scores[other], scores[first], [groups[i] for i in ids], config.evaluate.resamples, config.run.seed,
            names=(f"the setting of {other}", f"the setting of {first}"),
        )  # fmt: skip
        told["verdicts"][other] = {
            name: getattr(verdict, name) for name in ("difference", "low", "high", "p", "images", "sentence")
        }
    for other, p in zip(others, holm([v["p"] for v in told["verdicts"].values()])):
        told["verdicts"][other]["p_holm"] = p
    told["sentence"] = setting_sentence(told)
    return told


def setting_sentence(told: dict[str, Any]) -> str:
    """The settings in words, each with its seeds."""
    if not told["verdicts"]:
        return "Too few seeds ended with a score to compare settings."
    first, parts = told["settings"][0], []
    for other, found in told["verdicts"].items():
        interval = f"CIDEr {found['difference']:+.3f} [{found['low']:.3f}, {found['high']:.3f}]"
        if found["p_holm"] > 0.05:
            parts.append(f"cannot be told apart from that of {other} ({interval})")
        else:
            parts.append(f"{'beats' if found['difference'] > 0 else 'is worse than'} that of {other}: {interval}")
    seeds = len(told["cider"][first])
    return f"Over {seeds} other seeds, on validation, the setting of {first} " + "; it ".join(parts) + "."
