"""Captions of several adapters on one split, all by plain transformers and peft on the same NF4 base.

python -m benchmarks.peers.score_winners JOB.json SPLIT OUT.json NAME=ADAPTER...

Neither side's own decoding is used, so that a side cannot win by it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.peers import common


def main(job_file: str, split: str, out: str, *adapters: str) -> None:
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoProcessor

    job = common.read_job(job_file)
    processor = AutoProcessor.from_pretrained(job["model"])
    rows = Dataset.from_parquet(job["files"][split], cache_dir=str(Path(job["work"]) / "arrow"))
    images = [image.convert("RGB") for image in rows["image"]]
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    found = {}
    for named in adapters:
        name, _, folder = named.partition("=")
        model = PeftModel.from_pretrained(common.load_base(job), folder)
        texts = common.generate(model, torch.as_tensor(pixels), job, processor.tokenizer)
        found[name] = dict(zip(rows["image_id"], texts))
    references = dict(zip(rows["image_id"], map(list, rows["captions"])))
    Path(out).write_text(json.dumps({"captions": found, "references": references}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
