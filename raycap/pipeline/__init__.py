"""The main job and its parts, where the rooms of the house meet."""

from raycap.pipeline.main_job import sweep, train
from raycap.pipeline.verbs import caption, evaluate, prepare, serve

__all__ = ["caption", "evaluate", "prepare", "serve", "sweep", "train"]
