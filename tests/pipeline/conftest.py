"""One finished run for all tests of the whole way, and a second one to compare it with."""

from __future__ import annotations

import pytest

DATA = [
    "data.shapes_images=96,60,60", "train.val_images=24", "train.batch=8", "train.warmup_steps=2",
    "decode.max_new_tokens=12",
]  # fmt: skip
SETTINGS = [
    *DATA, "train.steps=18", "tune.trials=4", "tune.slots=3", "tune.grace_steps=6", "evaluate.resamples=500",
    "tune.confirm_seeds=2",
]  # fmt: skip


@pytest.fixture(scope="session")
def run_settings():
    """What was asked of `run`."""
    return SETTINGS


@pytest.fixture(scope="session")
def run(tmp_path_factory, ray_session):
    """One finished run, whose best settings were trained again with two other seeds."""
    from raycap.config import load_config
    from raycap.pipeline import sweep

    folder = tmp_path_factory.mktemp("run") / "small"
    return sweep(load_config("shapes-git", [*SETTINGS, f"run.dir={folder}"]), plain=True, command="raycap sweep small")


@pytest.fixture(scope="session")
def other(tmp_path_factory, ray_session):
    """Another run on the same pictures: one setting, trained for less, by `raycap train`."""
    from raycap.cli import main

    folder = tmp_path_factory.mktemp("other") / "one"
    few = ["train.steps=4", "lora.r=2", "evaluate.metrics=cider"]
    assert main(["train", "shapes-git", *DATA, *few, f"run.dir={folder}", "--plain"]) == 0
    return folder
