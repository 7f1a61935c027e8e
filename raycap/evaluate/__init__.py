"""Text scores of captions, without torch and without Ray; nothing is loaded before it is used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raycap.evaluate.cider import CiderScorer
    from raycap.evaluate.collapse import collapse as detect_collapse
    from raycap.evaluate.comparisons import not_separable, setting_bootstrap
    from raycap.evaluate.metrics import Score, Scores, score
    from raycap.evaluate.significance import Verdict, paired_bootstrap, standard_error

_WHERE = {
    "CiderScorer": "cider:CiderScorer",
    "Score": "metrics:Score",
    "Scores": "metrics:Scores",
    "Verdict": "significance:Verdict",
    "detect_collapse": "collapse:collapse",
    "not_separable": "comparisons:not_separable",
    "paired_bootstrap": "significance:paired_bootstrap",
    "score": "metrics:score",
    "setting_bootstrap": "comparisons:setting_bootstrap",
    "standard_error": "significance:standard_error",
}
__all__ = [
    "CiderScorer",
    "Score",
    "Scores",
    "Verdict",
    "detect_collapse",
    "not_separable",
    "paired_bootstrap",
    "score",
    "setting_bootstrap",
    "standard_error",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _WHERE[name].split(":")
    return getattr(import_module(f"{__name__}.{module}"), attribute)
