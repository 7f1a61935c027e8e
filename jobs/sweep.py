"""The main job: train many trials, export, gate, serve, score, report; shapes-git without arguments.

python jobs/sweep.py                                  the built-in set
python jobs/sweep.py photos-git-tiny data.source=my-photos tune.trials=16
ray job submit --working-dir . -- python jobs/sweep.py shapes-git
"""

from _verb import run

if __name__ == "__main__":
    run("sweep", default=("shapes-git",))
