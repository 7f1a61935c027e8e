"""The main job and its parts, where the rooms of the house meet."""

from raycap.pipeline.evaluation import evaluate
from raycap.pipeline.main_job import sweep, train
from raycap.pipeline.verbs import caption, explore, prepare, serve

__all__ = ["caption", "evaluate", "explore", "prepare", "serve", "sweep", "train"]
