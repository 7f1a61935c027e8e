"""Do the metrics agree with people on Japanese captions? Correlations with the human scores of Shichimi; prints JSON.

    python benchmarks/japanese.py FOLDER/stair_shichimi_ja

Every rated candidate of an image is scored against the image's references. Candidates that are word for word one of the
references (some are: they come from people) are left out, since any metric gives them full marks. Document frequencies
of CIDEr are those of all images. Intervals are 95 %, by resampling images.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path

import numpy as np

from raycap.evaluate import score

METRICS = ("bleu", "rouge_l", "cider", "token_f1", "length_ratio")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--resamples", type=int, default=500)
    args = parser.parse_args()
    images = [
        json.loads(line)
        for name in ("val.jsonl", "test.jsonl")
        for line in (args.folder / name).read_text(encoding="utf-8").splitlines()
    ]
    corpus = {row["group"]: row["captions"] for row in images}
    rated = [
        (row["group"], c["caption"], float(c["score"]))
        for row in images
        for c in row["candidates"]
        if c["caption"] not in row["captions"]
    ]
    people = np.array([r[2] for r in rated])
    number = {group: n for n, group in enumerate(corpus)}
    group = np.array([number[r[0]] for r in rated])
    found = {
        "images": len(images),
        "candidates": len(rated),
        "left_out": sum(len(r["candidates"]) for r in images) - len(rated),
    }
    for tokeniser in ("unidic-lite", "char"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scores = score(
                {n: r[1] for n, r in enumerate(rated)}, {n: corpus[r[0]] for n, r in enumerate(rated)}, METRICS, "ja",
                tokeniser=tokeniser, corpus=corpus,
            )  # fmt: skip
        found[tokeniser] = {
            name: correlation(np.array([s.per_image[n] for n in range(len(rated))]), people, group, args.resamples)
            for name, s in scores.items()
        }
    print(json.dumps(found, indent=2))
    return 0


def correlation(values: np.ndarray, people: np.ndarray, group: np.ndarray, resamples: int) -> dict[str, object]:
    """Pearson's and Spearman's, the latter with its interval over images."""
    a, b = ranks(values), ranks(people)
    pearson, spearman = float(np.corrcoef(values, people)[0, 1]), float(np.corrcoef(a, b)[0, 1])
    # Sums by image, so that a resample costs images and not candidates.
    columns = np.stack([np.ones_like(a), a, b, a * a, b * b, a * b], axis=1)
    sums = np.stack([np.bincount(group, c) for c in columns.T], axis=1)
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(resamples):
        n, x, y, xx, yy, xy = sums[rng.integers(0, len(sums), len(sums))].sum(axis=0)
        drawn.append((xy / n - x / n * y / n) / np.sqrt((xx / n - (x / n) ** 2) * (yy / n - (y / n) ** 2)))
    low, high = np.quantile(drawn, (0.025, 0.975))
    return {"pearson": pearson, "spearman": spearman, "interval": [float(low), float(high)]}


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks, equal values sharing the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + 1 + last) / 2)[inverse].astype(float)


if __name__ == "__main__":
    sys.exit(main())
