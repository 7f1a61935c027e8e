"""What the files of this folder share: a verb of raycap's, with the package installed or only lying beside this folder."""

import os
import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[1])


def run(verb: str, default: tuple[str, ...] = ()) -> None:
    """`raycap VERB` with this process's arguments, or `default` where there are none; ends the process."""
    try:
        from raycap.cli import main
    except ModuleNotFoundError as error:
        if error.name != "raycap":
            raise
        sys.path.insert(0, ROOT)
        # Read by the workers of a Ray that this process starts.
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))
        from raycap.cli import main
    sys.exit(main([verb, *(sys.argv[1:] or default)]))
