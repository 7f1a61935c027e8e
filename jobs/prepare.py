"""Images with captions -> checked shards.

python jobs/prepare.py my-photos --out my-shards
"""

import sys
from pathlib import Path

try:
    from raycap.cli import main
except ModuleNotFoundError as error:
    if error.name != "raycap":
        raise
    # Not installed, as in a job's working directory: the package lies beside this folder.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from raycap.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare", *(sys.argv[1:])]))
