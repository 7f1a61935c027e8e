"""What every test shares: caches of its own, no hub, one Ray instance a session."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# Before anything imports ray or transformers: both read these once.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads that wait for work sleep: spinning, those of two processes on two cores slow each other down tenfold.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

ROOT = Path(__file__).resolve().parents[1]
SUPPORT = str(ROOT / "tests" / "support")
if SUPPORT not in sys.path:
    sys.path.insert(0, SUPPORT)  # helpers that several rooms' tests share


def pytest_collection_modifyitems(items):
    """Ray tests last, so that a failure of the core shows before Ray has started."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is not None)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """No test reads or fills the user's cache."""
    os.environ["RAYCAP_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real image sets, or a skip that says where it was looked for."""
    folder = Path(os.environ.get("RAYCAP_SHARED_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real image sets at {folder}; set RAYCAP_SHARED_DATA to a folder that has them")
    return folder


@pytest.fixture(scope="session")
def ray_session():
    """One local Ray with two CPUs for all tests that are marked `ray`."""
    from raycap.cluster import connect

    with connect(num_cpus=2) as ray:
        yield ray
