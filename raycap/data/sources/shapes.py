"""The built-in set of drawn scenes, as a source."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from raycap.config import DataSettings
from raycap.data.sources.base import Rejected, SourceRow


class Shapes:
    """`data.shapes_images` scenes per split, a function of the seed."""

    layout = "built in"
    uses: frozenset[str] = frozenset()
    title = "shapes"
    licence = "drawn by raycap, under raycap's own licence"

    def __init__(self, settings: DataSettings, seed: int):
        self._sizes = tuple(settings.shapes_images)
        self._seed = seed

    @staticmethod
    def detect(path: Path) -> bool:
        return False  # named, never found in a folder

    def __iter__(self) -> Iterator[SourceRow | Rejected]:
        from raycap.data import shapes

        yield from shapes.rows(sizes=self._sizes, seed=self._seed)

    def __len__(self) -> int:
        return sum(self._sizes)

    def fingerprint(self) -> str:
        """Hash of sizes, seed and the code that draws: a changed palette is another set."""
        from raycap.data import shapes

        digest = hashlib.sha256(repr((self._sizes, self._seed)).encode())
        folder = Path(shapes.__file__).parent
        for file in sorted([*folder.glob("shapes*.py"), *folder.glob("palette*.py")]):
            digest.update(file.read_bytes())
        return digest.hexdigest()
