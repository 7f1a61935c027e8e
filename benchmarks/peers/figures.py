"""What the measurements mean: shares of the time, ratios, non-inferiority. Plain numbers in, plain numbers out."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

MARGIN = 0.05
"""Share of the peer's CIDEr that the lower bound of the difference may lie below zero."""
FLOORS = {"trainer": 8.0, "asha": 3.0}
AIMS = {"trainer": 15.0, "asha": 5.0}
KINDS = ("start_up", "vision", "forward_backward", "evaluation", "idle")


def peer_seconds(trials: Sequence[Mapping[str, Any]], lanes: int, began: float, wall_s: float) -> dict[str, float]:
    """Lane-seconds of a peer by kind; they sum to lanes * wall_s.

    A lane is a place where one trial trains at a time. start_up: from the start of the process to the first trial in
    each lane, and what a trial needs before it trains (imports, loading the base). forward_backward holds the optimiser
    and the data loader. idle is the rest: a lane without a trial, scheduling, saving, shutting down.
    """
    total = lanes * wall_s
    first = min((t["began"] for t in trials), default=began + wall_s)
    found = dict.fromkeys(KINDS, 0.0)
    found["start_up"] = lanes * (first - began)
    for t in trials:
        active = t["ended"] - t["began"]
        trained, scored = t.get("train_s", 0.0), t.get("eval_s", 0.0)
        found["vision"] += t.get("vision_s", 0.0)
        found["forward_backward"] += trained - t.get("vision_s", 0.0)
        found["evaluation"] += scored
        found["start_up"] += max(0.0, active - trained - scored)
    found["idle"] = total - sum(found.values())
    return found


def pack_seconds(packs: Sequence[Mapping[str, Any]], began: float, wall_s: float) -> dict[str, float]:
    """The same for the product: a lane is a pack, in which all of its slots train at a time."""
    found = dict.fromkeys(KINDS, 0.0)
    for p in packs:
        found["start_up"] += (p["first_step"] or began + wall_s) - began - p["vision_before"]
        found["vision"] += p["vision"]
        found["forward_backward"] += p["step"]
        found["evaluation"] += p["evaluate"]
    found["idle"] = len(packs) * wall_s - sum(found.values())
    return found


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    total = sum(seconds.values())
    return {kind: round(value / total, 4) if total else 0.0 for kind, value in seconds.items()}


def ratios(peer: Mapping[str, Any], ours: Mapping[str, Any], name: str) -> dict[str, Any]:
    """How many times as fast as a peer.

    total = without_halving * halving: `halving` is the peer's trained steps over ours (what stopping trials early
    saves), `without_halving` the seconds a trained step costs the peer over ours, start-up and all included.
    """
    total = peer["seconds"] / ours["seconds"]
    halving = peer["steps"] / ours["steps"]
    found = {"total": total, "halving": halving, "without_halving": total / halving}
    if name in FLOORS:
        found |= {"floor": FLOORS[name], "aim": AIMS[name], "floor_met": total >= FLOORS[name]}
    return found


def median_side(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A side's figures over its rounds: the round of the median time, with every round's seconds beside it."""
    order = sorted(rounds, key=lambda r: r["seconds"])
    middle = dict(order[(len(order) - 1) // 2])
    middle["seconds"] = statistics.median(r["seconds"] for r in rounds)
    middle["seconds_by_round"] = [r["seconds"] for r in rounds]
    middle["cider_by_round"] = [r["best"]["cider"] for r in rounds]
    return middle


def non_inferior(
    ours: Mapping[str, str],
    peer: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    groups: Mapping[str, str] | None,
    *,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Whether our captions are not worse than the peer's by more than MARGIN, by a paired bootstrap over images.

    `can_fail` says whether the images are enough for it: the interval's half width is below the margin, so that a side
    that is worse by twice the margin would be found out.
    """
    import numpy as np

    from raycap.evaluate.cider import CiderScorer
    from raycap.evaluate.significance import paired_bootstrap

    ids = list(references)
    scorer = CiderScorer(references)
    mine, each = scorer.score({i: ours[i] for i in ids})
    theirs, other = scorer.score({i: peer[i] for i in ids})
    verdict = paired_bootstrap(
        np.asarray(other),
        np.asarray(each),
        groups=[groups[i] for i in ids] if groups else None,
        resamples=resamples,
        seed=seed,
    )
    allowed = -MARGIN * theirs
    return {
        "images": len(ids),
        "cider": mine,
        "peer_cider": theirs,
        "difference": float(verdict.difference),
        "low": float(verdict.low),
        "high": float(verdict.high),
        "allowed": allowed,
        "non_inferior": bool(verdict.low > allowed),
        "can_fail": bool((verdict.high - verdict.low) / 2 < -allowed),
    }
