"""Captions and references in, scores and verdicts out: text alone, no torch, no Ray."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    # `raycap.evaluate.score` without paying for pycocoevalcap when the package is imported.
    if name in ("score", "Score"):
        from raycap.evaluate import metrics

        return getattr(metrics, name)
    raise AttributeError(f"module 'raycap.evaluate' has no attribute {name!r}")
