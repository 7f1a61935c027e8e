"""What may be said of a sweep's winner: paired bootstraps, and one honest sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from raycap.config import Config
from raycap.files import read_json

if TYPE_CHECKING:
    from raycap.data.shards import Shards


def verdicts(config: Config, shards: Shards, per_image: Mapping[str, Any], found: Any) -> dict[str, Any]:
    """The winner against zero-shot and the constant caption on test, and against the runner-up on validation."""
    import numpy as np

    from raycap.evaluate.cider import CiderScorer
    from raycap.evaluate.significance import paired_bootstrap
    from raycap.evaluate.tokenise import quick_tokeniser

    if "test" not in per_image:
        return {}
    test = per_image["test"]
    winner = "served" if "served" in test else "adapter"
    groups = shards.groups("test")
    told: dict[str, Any] = {"metric": "cider", "split": "test", "winner": winner}

    def against(other: str) -> dict[str, Any]:
        ids = list(test[winner])
        verdict = paired_bootstrap(
            np.array([test[other][i] for i in ids]),
            np.array([test[winner][i] for i in ids]),
            groups=[groups[i] for i in ids],
            resamples=config.evaluate.resamples,
            seed=config.run.seed,
        )
        return _plain_verdict(verdict)

    for other in ("zero-shot", "constant"):
        if other in test:
            told[other] = against(other)
    order = ranked(found, config.train.select_by)
    if len(order) > 1:
        files = [found.adapters[t] / "val_captions.json" for t in order[:2]]
        first, second = (read_json(file) for file in files)
        ids = list(first)
        references = shards.references("val")
        lang = config.evaluate.lang
        scorer = CiderScorer({i: references[i] for i in ids}, quick_tokeniser(lang), lang=lang)
        val_groups = shards.groups("val")
        verdict = paired_bootstrap(
            np.asarray(scorer.score(second)[1]),
            np.asarray(scorer.score(first)[1]),
            groups=[val_groups[i] for i in ids],
            resamples=config.evaluate.resamples,
            seed=config.run.seed,
        )
        told["runner-up"] = {"trial": order[1], "split": "val", **_plain_verdict(verdict)}
    told["sentence"] = _sentence(found.best, told)
    return told


def ranked(found: Any, select_by: str) -> list[str]:
    """Ids of the trials that were scored, best first."""
    scored = [(t.score(select_by), t.trial_id) for t in found.trials if t.trial_id in found.adapters]
    return [trial_id for _, trial_id in sorted(scored, key=lambda s: (-s[0], s[1]))]


def _plain_verdict(verdict: Any) -> dict[str, Any]:
    return {name: getattr(verdict, name) for name in ("difference", "low", "high", "p", "images", "sentence")}


def _sentence(best: str, told: Mapping[str, Any]) -> str:
    """One honest sentence on the winner: this adapter, never this setting, for a setting needs several seeds."""

    def clause(name: str, other: str) -> str:
        found = told[other]
        interval = f"{found['difference']:+.3f} [{found['low']:.3f}, {found['high']:.3f}]"
        if found["low"] > 0:
            return f"beats {name} by CIDEr {interval}"
        if found["high"] < 0:
            return f"is worse than {name}: CIDEr {interval}"
        return f"cannot be told apart from {name} (CIDEr {interval})"

    parts = [clause(name, other) for name, other in (("zero-shot", "zero-shot"), ("the constant caption", "constant"))
             if other in told]  # fmt: skip
    text = f"On test, the adapter of {best} " + " and ".join(parts)
    if "runner-up" in told:
        runner = told["runner-up"]
        text += "; on validation it " + clause(f"the runner-up {runner['trial']}", "runner-up")
    return text + "."
