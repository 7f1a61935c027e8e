"""One adapter, trained to the end.

python jobs/train.py shapes-git lora.r=8 train.lr=2e-3
"""

from _verb import run

if __name__ == "__main__":
    run("train")
