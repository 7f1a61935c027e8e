"""The main job: train many trials, export, gate, serve, score, report; shapes-git without arguments.

python jobs/sweep.py                                  the built-in set
python jobs/sweep.py photos-git-tiny data.source=my-photos tune.trials=16
ray job submit --working-dir . -- python jobs/sweep.py shapes-git
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
    sys.exit(main(["sweep", *(sys.argv[1:] or ["shapes-git"])]))
