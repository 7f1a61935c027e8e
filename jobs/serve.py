"""A model behind HTTP until Ctrl-C.

python jobs/serve.py results/shapes-git serve.port=8000
"""

from _verb import run

if __name__ == "__main__":
    run("serve")
