"""Imports follow the way of the data: a module imports from its own layer or an earlier one, and Ray stays at the rim."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "raycap"
LAYERS = ["data", "evaluate", "models", "train", "tune", "export", "serve", "report", "pipeline", "cli"]
GROUND = {"errors", "files", "places", "storage", "config", "checks", "settings", "trial", "cluster", "presets", "stop"}
RAY_RIM = {"cluster.py", "data/stream.py", "train/worker.py", "train/keeper.py", "serve/app.py", "pipeline/remote.py"}


def imports(path: Path):
    """(line, module) of every import in a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} relative import"
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{name.name}") for name in node.names)


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def layer_of(name: str) -> int:
    room = name.split(".")[1] if "." in name else "ground"
    return LAYERS.index(room) if room in LAYERS else -1


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_never_point_back(path):
    own = path.relative_to(PACKAGE.parent).with_suffix("").as_posix().replace("/", ".")
    if own == "raycap.__main__":
        own = "raycap.cli"
    back = [
        f"{path.name}:{line} imports {name}"
        for line, name in imports(path)
        if name.startswith("raycap.") and layer_of(name) > layer_of(own)
    ]
    assert not back


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_ray_only_at_the_rim(path):
    place = path.relative_to(PACKAGE).as_posix()
    uses = [line for line, name in imports(path) if name == "ray" or name.startswith("ray.")]
    assert not uses or place in RAY_RIM or place.startswith("tune/"), f"{place} imports ray on lines {uses}"


def test_evaluate_is_pure():
    for path in (PACKAGE / "evaluate").rglob("*.py"):
        heavy = [name for _, name in imports(path) if name.split(".")[0] in ("torch", "ray", "transformers")]
        assert not heavy, f"{path.name} imports {heavy}"


def test_every_room_has_its_layer():
    rooms = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    rooms |= {p.stem for p in PACKAGE.glob("*.py") if not p.stem.startswith("__")}
    assert rooms - set(LAYERS) - GROUND == set()


def test_importing_the_cli_is_light():
    heavy = "torch ray transformers peft matplotlib pandas"
    code = f"import sys, raycap.cli; print([m for m in {heavy!r}.split() if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
