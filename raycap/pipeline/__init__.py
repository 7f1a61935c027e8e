"""The main job and its parts, where the rooms of the house meet."""

from raycap.pipeline.evaluation import evaluate
from raycap.pipeline.grid import evaluate_grid
from raycap.pipeline.main_job import sweep, train
from raycap.pipeline.verbs import caption, explore, prepare, serve

__all__ = ["caption", "evaluate", "evaluate_grid", "explore", "prepare", "serve", "sweep", "train"]
