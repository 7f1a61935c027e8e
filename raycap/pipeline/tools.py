"""What `prepare` is given from the rooms above it: Ray for the work, a model's resizing, CLIP's scores."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from raycap.cluster import connect
from raycap.config import Config

if TYPE_CHECKING:
    from raycap.data.shards import Tools

PARALLEL_ROWS = 4000
"""Rows from which Ray's workers save more than the seconds that they take to start."""


def prepare_tools(config: Config) -> Tools:
    """The tools that `config` asks for; light, nothing is loaded before it is used."""
    from raycap.data.shards import Tools, needs_clip_scores

    resize = score = None
    if config.data.store != "original":
        from raycap.models import Resizer

        resize = Resizer(config.model.family, config.model.path, config.model)
    if needs_clip_scores(config):
        from raycap.models.caption_scores import CaptionScorer

        score = CaptionScorer(config.data.clip_model)
    return Tools(run=partial(_run, config), resize=resize, score=score)


def _run(config: Config, work: Any, units: list[dict[str, Any]]) -> Iterator[int]:
    from raycap.data.units import run_here

    if not work.actors and sum(unit["rows"] for unit in units) < PARALLEL_ROWS:
        yield from run_here(work, units)
        return
    from raycap.data.stream import run_units

    with connect(config):
        yield from run_units(work, units)
