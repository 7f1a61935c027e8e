"""Caption a split with a model and score the captions.

python jobs/evaluate.py results/shapes-git --split val
"""

from _verb import run

if __name__ == "__main__":
    run("evaluate")
