"""Caption metrics against pycocoevalcap on the same captions, the two sides taking turns; prints JSON.

    python benchmarks/metrics.py                      5,000 images of 5 references each, about a minute
    python benchmarks/metrics.py --meteor --rounds 4 --file coco_fakecap/fakecap.jsonl

`first_s` holds what is done once for fixed references (CIDEr: n-grams and document frequencies; tokenising is measured
by itself), `second_s` a further set of captions against them, as at each rung of a sweep. Both sides get captions that
are tokenised already. `ratio` is the peer's time over ours, of medians.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from raycap.evaluate.cider import CiderScorer
from raycap.evaluate.java import java
from raycap.evaluate.metrics import score
from raycap.evaluate.ptb import tokenise
from raycap.evaluate.significance import paired_bootstrap
from raycap.evaluate.tokenise import ptb_java

WORDS, LENGTH = 4_000, 11
"""Size of the invented vocabulary, drawn by Zipf's law, and mean words of a caption (RISCM's is 11.1)."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5_000)
    parser.add_argument("--references", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--resamples", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--file", type=Path, help='JSONL of {"candidate", "references_raw": [5]}: captions of people, not invented ones'
    )
    parser.add_argument("--meteor", action="store_true", help="METEOR too: about a minute of Java per 5,000 images")
    args = parser.parse_args()
    if args.rounds < (least := 4 if args.meteor else 2):
        parser.error(f"--rounds {args.rounds}: at least {least} sets of captions are compared")
    rng = random.Random(args.seed)
    if args.file:
        references, predictions = of_people(args.file, args.images, args.rounds, rng)
    else:
        references, predictions = captions(args.images, args.references, args.rounds, rng)
    found: dict[str, Any] = {
        "images": args.images, "references_per_image": len(references[0]),
        "captions": args.file.name if args.file else "invented", "rounds": args.rounds, "seed": args.seed,
        "cores": os.cpu_count(), "cider": cider(references, predictions), "tokenise": tokenising(references),
        "all": everything(references, predictions, ("bleu", "rouge_l", "cider", *(["meteor"] if args.meteor else []))),
        "bootstrap": bootstrap(args.images, args.resamples, args.seed),
    }  # fmt: skip
    if args.meteor:
        found["meteor"] = meteor(references, predictions[2:4])  # of others, or what METEOR remembers would be timed
    print(json.dumps(found, indent=2))
    return 0


def captions(
    images: int, each: int, rounds: int, rng: random.Random
) -> tuple[dict[int, list[str]], list[dict[int, str]]]:
    """References, and for every round other predictions: a reference with some of its words replaced."""
    weights = [1 / (rank + 1) for rank in range(WORDS)]

    def words(count: int) -> list[str]:
        return [f"w{n}" for n in rng.choices(range(WORDS), weights, k=count)]

    references: dict[int, list[str]] = {}
    for image in range(images):
        topic = words(6)  # what the captions of one image have in common
        references[image] = [
            " ".join(rng.sample(topic, 4) + words(max(1, round(rng.gauss(LENGTH - 4, 2))))) for _ in range(each)
        ]
    predictions = []
    for _ in range(rounds):
        said = {}
        for image, texts in references.items():
            base = rng.choice(texts).split()
            said[image] = " ".join(word if rng.random() < 0.6 else words(1)[0] for word in base)
        predictions.append(said)
    return references, predictions


def of_people(
    file: Path, images: int, rounds: int, rng: random.Random
) -> tuple[dict[int, list[str]], list[dict[int, str]]]:
    """Images from the rows of a file, each row several times: one of its references in turn, short of a word or two, is
    the prediction, and the row's candidate takes its place, so that no two images ask METEOR the same."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    references: dict[int, list[str]] = {}
    said: list[dict[int, str]] = [{} for _ in range(rounds)]
    for image in range(images):
        row, turn = rows[image % len(rows)], image // len(rows) % 5
        own = [text.strip() for text in row["references_raw"][:5]]
        words = own[turn].split()
        references[image] = [*own[:turn], row["candidate"], *own[turn + 1 :]]
        for each in said:
            kept = sorted(rng.sample(range(len(words)), max(1, len(words) - rng.randint(1, 2))))
            each[image] = " ".join(words[n] for n in kept)
    return references, said


def cider(references: dict[int, list[str]], predictions: list[dict[int, str]]) -> dict[str, Any]:
    from pycocoevalcap.cider.cider import Cider

    first, scorer = timed(lambda: CiderScorer(references, list))
    ours, peer, apart = [], [], 0.0

    def mine(said: dict[int, str]) -> np.ndarray:
        seconds, (_, each) = timed(lambda: scorer.score(said))
        ours.append(seconds)
        return each

    def theirs(said: dict[int, str]) -> np.ndarray:
        seconds, (_, each) = timed(lambda: Cider().compute_score(references, {i: [c] for i, c in said.items()}))
        peer.append(seconds)
        return each

    for turn, said in enumerate(predictions):
        sides = (mine, theirs) if turn % 2 else (theirs, mine)
        one, other = (side(said) for side in sides)
        apart = max(apart, float(np.abs(one - other).max()))
    return {
        "first_s": first + ours[0],
        "second_s": statistics.median(ours),
        "peer_s": statistics.median(peer),
        "ratio_first": statistics.median(peer) / (first + ours[0]),
        "ratio": statistics.median(peer) / statistics.median(ours),
        "largest_difference": apart,
    }


def everything(
    references: dict[int, list[str]], predictions: list[dict[int, str]], metrics: tuple[str, ...]
) -> dict[str, Any]:
    """`score` from raw captions to signed figures, against pycocoevalcap's usual recipe: PTB in Java for both sides of
    each call, then each metric's class."""
    program = java()
    if not program:
        return {"left_out": "no Java"}
    os.environ["PATH"] = f"{Path(program).parent}{os.pathsep}{os.environ['PATH']}"
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    ours, peer, apart = [], [], 0.0

    def theirs(said: dict[int, str]) -> dict[str, float]:
        gts = PTBTokenizer().tokenize({i: [{"caption": c} for c in own] for i, own in references.items()})
        res = PTBTokenizer().tokenize({i: [{"caption": c}] for i, c in said.items()})
        found = {f"bleu{n + 1}": s for n, s in enumerate(Bleu(4).compute_score(gts, res, verbose=0)[0])}
        found |= {"rouge_l": Rouge().compute_score(gts, res)[0], "cider": Cider().compute_score(gts, res)[0]}
        return found | ({"meteor": Meteor().compute_score(gts, res)[0]} if "meteor" in metrics else {})

    for said in predictions[:2]:
        seconds, mine = timed(lambda said=said: score(said, references, metrics))
        ours.append(seconds)
        seconds, other = timed(lambda said=said: theirs(said))
        peer.append(seconds)
        apart = max(apart, *(abs(mine[name].score - value) for name, value in other.items()))
    return {"metrics": list(metrics), "first_s": ours[0], "second_s": ours[1], "peer_first_s": peer[0], "peer_second_s": peer[1],
            "ratio_first": peer[0] / ours[0], "ratio_second": peer[1] / ours[1], "largest_difference": apart}  # fmt: skip


def tokenising(references: dict[int, list[str]]) -> dict[str, Any]:
    texts = [text for each in references.values() for text in each]
    seconds, ours = timed(lambda: tokenise(texts))
    found: dict[str, Any] = {"captions": len(texts), "python_s": seconds}
    if java():
        found["java_s"], theirs = timed(lambda: ptb_java(texts))
        found |= {"ratio": found["java_s"] / seconds, "equal": ours == theirs}
    return found


def bootstrap(images: int, resamples: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    a, b = rng.gamma(2.0, 0.5, images), rng.gamma(2.0, 0.5, images)
    began = time.process_time()
    paired_bootstrap(a, b, resamples=resamples, seed=seed)
    return {"resamples": resamples, "cpu_s": time.process_time() - began}


def meteor(references: dict[int, list[str]], predictions: list[dict[int, str]]) -> dict[str, Any]:
    """Two sets of captions; pycocoevalcap with a process for each, as its users run it."""
    program = java()
    if not program:
        return {"left_out": "no Java"}
    os.environ["PATH"] = f"{Path(program).parent}{os.pathsep}{os.environ['PATH']}"
    from pycocoevalcap.meteor.meteor import Meteor

    from raycap.evaluate.meteor import shared

    ours, peer, apart = [], [], 0.0
    for said in predictions:
        seconds, (one, _) = timed(lambda said=said: shared().score(list(said.values()), list(references.values())))
        ours.append(seconds)
        seconds, (other, _) = timed(
            lambda said=said: Meteor().compute_score(references, {i: [c] for i, c in said.items()})
        )
        peer.append(seconds)
        apart = max(apart, abs(one - other))
    return {"first_s": ours[0], "second_s": ours[-1], "peer_s": peer[-1], "ratio": peer[-1] / ours[-1],
            "largest_difference": apart}  # fmt: skip


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


if __name__ == "__main__":
    sys.exit(main())
