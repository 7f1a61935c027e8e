"""The thin Ray Tune trial: leases a slot on the board, and tells Tune what its slot reports. No torch in here."""

from __future__ import annotations

import json
import math
import uuid
from typing import Any

POLL_S = 2.0
"""How long one question for news may wait at the board; each is a sign of life too."""


def trial_client(config: dict[str, Any]) -> None:
    """The trainable. config: trial (its id), board and namespace (of the actor).

    ASHA's stop ends the thread inside `tune.report`, and `finally` gives the lease back. A client that was killed is
    started anew by Tune, leases the same trial, and reports its rungs again; those that were judged keep their verdict.
    """
    import ray
    from ray import tune

    from raycap.cluster import title

    title(f"client for {config['trial']}")
    board = ray.get_actor(config["board"], namespace=config["namespace"])
    trial, me, seen = config["trial"], uuid.uuid4().hex, 0
    ray.get(board.lease.remote(trial, me))
    try:
        while True:
            event = ray.get(board.next_event.remote(trial, me, seen, POLL_S))
            if event is None:
                continue
            if event["kind"] == "lost":
                ray.get(board.lease.remote(trial, me))
                seen = 0  # rungs that were judged keep their verdict, so saying them again is harmless
                continue
            if event["kind"] in ("end", "interrupted"):
                return
            seen += 1
            if event["kind"] == "diverged":
                nothing = {"cider": math.nan, "val_loss": math.nan, "cohort": json.dumps({trial: None})}
                tune.report({"trial": trial, "step": event["step"], **nothing, "diverged": True})
                return
            # As text, because Tune hands schedulers a flattened result.
            cohort = json.dumps(event["cohort"])
            tune.report({"trial": trial, **event["metrics"], "step": event["step"], "cohort": cohort})
            ray.get(board.proceed.remote(trial, event["step"]))
    finally:
        board.release.remote(trial, me)
