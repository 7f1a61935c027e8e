"""Puts the helpers of these tests (simulation.py here, toy_engine.py of tests/train) within reach of `import`."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [path for path in (str(HERE), str(HERE.parent / "train")) if path not in sys.path]
