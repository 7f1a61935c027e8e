"""Time of `raycap explore` on a generated set of RISC's size: 45,000 images of 224 x 224 px with five captions each.

    python benchmarks/explore.py > explore.json
    python benchmarks/explore.py --images 2000 --lang ja

Prints JSON: seconds of wall clock and of CPU, with the share of `prepare` (each image is decoded once; a second call
finds the shards) and of the figures themselves; `within` says whether both together stayed under five minutes.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LIMIT_S = 300.0
ENGLISH = "a the of and with in many some green white large small near beside road building tree field river plane"
JAPANESE = "犬 猫 男性 女性 が の に を 上 中 白い 赤い 大きな 小さな 道路 建物 木 走っている 立っている 置かれている"


def make_set(folder: Path, images: int, lang: str, size_px: int, seed: int = 0) -> None:
    """A folder with captions.jsonl: pictures unlike one another, words by Zipf's law from a vocabulary of 3,000."""
    import numpy as np
    from PIL import Image

    dice, chance = random.Random(seed), np.random.default_rng(seed)
    common = (JAPANESE if lang == "ja" else ENGLISH).split()
    words = common + ([f"物{n}" for n in range(3000)] if lang == "ja" else [f"thing{n}" for n in range(3000)])
    weights = [1 / (rank + 1) for rank in range(len(words))]
    (folder / "images").mkdir(parents=True)
    with open(folder / "captions.jsonl", "w", encoding="utf-8") as file:
        for n in range(images):
            coarse = Image.fromarray(chance.integers(0, 255, (14, 14, 3), dtype=np.uint8))
            buffer = io.BytesIO()
            coarse.resize((size_px, size_px), Image.Resampling.BILINEAR).save(buffer, format="JPEG", quality=90)
            (folder / "images" / f"{n}.jpg").write_bytes(buffer.getvalue())
            captions = [
                ("" if lang == "ja" else " ").join(dice.choices(words, weights, k=dice.randrange(6, 17)))
                for _ in range(5)
            ]
            split = "train" if n % 10 < 8 else "val" if n % 10 == 8 else "test"
            row = {"image": f"{n}.jpg", "captions": captions, "split": split, "lang": lang}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def timed(command: list[str]) -> tuple[float, float, dict[str, Any]]:
    """(wall, CPU, JSON that it printed) of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    wall_s = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall_s, cpu_s, json.loads(done.stdout)


def measure(images: int, lang: str, size_px: int) -> dict[str, Any]:
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="raycap-explore-") as text:
        folder = Path(text)
        began = time.perf_counter()
        make_set(folder / "set", images, lang, size_px)
        print(f"{images:,} images made in {time.perf_counter() - began:.0f} s", file=sys.stderr)
        command = [sys.executable, "-m", "raycap", "explore", str(folder / "set"), "--out", str(folder / "out"), "--json",
                   "--plain", f"run.cache_dir={folder / 'cache'}"]  # fmt: skip
        first_s, first_cpu_s, found = timed(command)
        again_s, again_cpu_s, _ = timed(command)
    own = found["captions"][lang]
    return {
        "images": images,
        "captions": own["captions"],
        "lang": lang,
        "tokeniser": own["words"]["tokeniser"],
        "size_px": size_px,
        "first_s": round(first_s, 1),
        "first_cpu_s": round(first_cpu_s, 1),
        "prepared_s": round(again_s, 1),
        "prepared_cpu_s": round(again_cpu_s, 1),
        "limit_s": LIMIT_S,
        "within": first_s < LIMIT_S,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        "cores": os.cpu_count(),
        "load_before": round(load, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=45_000)
    parser.add_argument("--lang", choices=("en", "ja"), default="en")
    parser.add_argument("--size-px", type=int, default=224)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.images, arguments.lang, arguments.size_px), indent=2))


if __name__ == "__main__":
    main()
