"""What may be said of a sweep's winner: paired bootstraps, and one honest sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from raycap.config import Config
from raycap.files import read_json

if TYPE_CHECKING:
    from raycap.data.shards import Shards

FAMILY = ("zero-shot", "default")
"""What the winner is tested against on the test split; their p-values are adjusted together (Holm)."""
LEVEL = 0.05


def separation(config: Config, shards: Shards, found: Any) -> dict[str, Any]:
    """The trials that cannot be told apart from the best on validation: best, together [trial ids], p {trial: p}."""
    from raycap.evaluate.comparisons import not_separable

    able = [t for t in found.adapters if t not in getattr(found, "ruled_out", {})]
    scores, groups = _validation_scores(config, shards, found, able)
    if not scores:
        return {}
    told = not_separable(scores, groups, config.evaluate.resamples, config.run.seed)
    return {"best": told.best, "together": told.together, "p": told.p, "split": "val", "images": len(groups)}


def verdicts(
    config: Config, shards: Shards, per_image: Mapping[str, Any], found: Any, settings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The winner against zero-shot, the preset's default trial and the constant caption on test, and against the runner-up
    on validation; how many trials there were, and which cannot be told apart from the best."""
    import numpy as np

    from raycap.evaluate.comparisons import holm
    from raycap.evaluate.significance import paired_bootstrap

    if "test" not in per_image:
        return {}
    test = per_image["test"]
    winner = "served" if "served" in test else "adapter"
    groups = shards.groups("test")
    told: dict[str, Any] = {"metric": "cider", "split": "test", "winner": winner, "trials": len(found.trials)}
    told["scores"] = {
        split: float(np.mean(list(of[v].values()))) for split, of in per_image.items() for v in (winner, "adapter") if v in of
    }  # fmt: skip

    def against(other: str) -> dict[str, Any]:
        ids = list(test[winner])
        verdict = paired_bootstrap(
            np.array([test[other][i] for i in ids]),
            np.array([test[winner][i] for i in ids]),
            groups=[groups[i] for i in ids],
            resamples=config.evaluate.resamples,
            seed=config.run.seed,
            names=(other, "the winner"),
        )
        return _plain_verdict(verdict)

    for other in (*FAMILY, "constant"):
        if other in test:
            told[other] = against(other)
    tested = [other for other in FAMILY if other in told]
    for other, p in zip(tested, holm([told[other]["p"] for other in tested])):
        told[other]["p_holm"] = p
    order = ranked(found, config.train.select_by)
    if len(order) > 1:
        scores, val_groups = _validation_scores(config, shards, found, order[:2])
        if len(scores) == 2:
            first, second = (scores[t] for t in order[:2])
            verdict = paired_bootstrap(
                second, first, groups=val_groups, resamples=config.evaluate.resamples, seed=config.run.seed,
                names=(order[1], order[0]),
            )  # fmt: skip
            told["runner-up"] = {"trial": order[1], "split": "val", **_plain_verdict(verdict)}
    told["separation"] = separation(config, shards, found)
    if settings:
        told["settings"] = dict(settings)
    told["sentence"] = _sentence(found.best, told)
    return told


def ranked(found: Any, select_by: str) -> list[str]:
    """Ids of the trials that were scored and could win, best first."""
    out = getattr(found, "ruled_out", {})
    scored = [
        (t.score(select_by), t.trial_id) for t in found.trials if t.trial_id in found.adapters and t.trial_id not in out
    ]
    return [trial_id for _, trial_id in sorted(scored, key=lambda s: (-s[0], s[1]))]


def _validation_scores(
    config: Config, shards: Shards, found: Any, trials: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """CIDEr of each validation image by trial, at its best rung, and the images' groups; all on the same images."""
    from raycap.evaluate.cider import CiderScorer
    from raycap.evaluate.tokenise import quick_tokeniser

    captions = {t: read_json(found.adapters[t] / "val_captions.json") for t in trials}
    if not captions:
        return {}, []
    ids = list(next(iter(captions.values())))
    captions = {t: said for t, said in captions.items() if set(said) == set(ids)}
    references, groups = shards.references("val"), shards.groups("val")
    lang = config.evaluate.lang
    scorer = CiderScorer({i: references[i] for i in ids}, quick_tokeniser(lang), lang=lang)
    return {t: scorer.score(said)[1] for t, said in captions.items()}, [groups[i] for i in ids]


def _plain_verdict(verdict: Any) -> dict[str, Any]:
    return {name: getattr(verdict, name) for name in ("difference", "low", "high", "p", "images", "sentence")}


def _sentence(best: str, told: Mapping[str, Any]) -> str:
    """One honest sentence on the winner: this adapter, never this setting, for a setting needs several seeds."""

    def clause(name: str, other: str) -> str:
        found = told[other]
        interval = f"{found['difference']:+.3f} [{found['low']:.3f}, {found['high']:.3f}]"
        sure = found.get("p_holm", 0.0) <= LEVEL
        if found["low"] > 0 and sure:
            return f"beats {name} by CIDEr {interval}"
        if found["high"] < 0 and sure:
            return f"is worse than {name}: CIDEr {interval}"
        return f"cannot be told apart from {name} (CIDEr {interval})"

    named = (
        ("zero-shot", "zero-shot"),
        ("the preset's default trial", "default"),
        ("the constant caption", "constant"),
    )
    parts = [clause(name, other) for name, other in named if other in told]
    chosen = f", the best of {told['trials']} trials on validation," if told.get("trials", 0) > 1 else ""
    text = f"On test, the adapter of {best}{chosen} " + (
        ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else "".join(parts)
    )
    if best == "default":
        text += " (the winner is the preset's default trial)"
    if "runner-up" in told:
        runner = told["runner-up"]
        second = (
            "the runner-up, the preset's default trial,"
            if runner["trial"] == "default"
            else f"the runner-up {runner['trial']}"
        )
        text += "; on validation it " + clause(second, "runner-up")
    together = (told.get("separation") or {}).get("together", [])
    if len(together) > 2:
        text += f", and {len(together) - 1} trials in all cannot be told apart from the best"
    if (told.get("settings") or {}).get("sentence"):
        return f"{text}. {told['settings']['sentence']}"
    return text + "."
