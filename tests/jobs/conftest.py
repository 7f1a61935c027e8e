"""Puts heads.py on the path, as tests/tune/conftest.py does; one short folder a module."""

import shutil
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module")
def folder():
    """Short, because Ray makes sockets below it."""
    made = Path(tempfile.mkdtemp(prefix="rc-", dir="/tmp"))
    yield made
    shutil.rmtree(made, ignore_errors=True)
