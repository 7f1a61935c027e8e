"""Images with captions -> checked shards.

python jobs/prepare.py my-photos --out my-shards
"""

from _verb import run

if __name__ == "__main__":
    run("prepare")
