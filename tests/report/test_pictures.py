from __future__ import annotations

import dataclasses
import io

import pytest
from PIL import Image

from raycap.report.pictures import LONGEST_PX, choose, pictures_of, read_pictures, thumbnail, write_pictures
from raycap.report.runs import load_run


def test_best_median_and_worst_are_those_of_the_scores():
    scores = {f"p{n:02d}": float(n) for n in range(31)}
    found = choose(scores, [f"p{n:02d}" for n in range(0, 31, 2)], per_kind=3)
    assert found["best"] == ("p30", "p29", "p28")
    assert found["worst"] == ("p00", "p01", "p02")
    assert found["median"] == ("p16", "p15", "p14")
    assert len(found["even"]) == 3 and not {"p30", "p00", "p16"} & set(found["even"])
    assert len({i for ids in found.values() for i in ids}) == 12


@pytest.mark.parametrize("count", range(8))
def test_few_pictures_are_shown_once_each(count):
    found = choose({f"p{n}": -n for n in range(count)}, [f"p{n}" for n in range(count)])
    shown = [i for ids in found.values() for i in ids]
    assert len(shown) == len(set(shown)) and (not count or found["best"][0] == "p0")


def test_large_pictures_are_made_small():
    out = io.BytesIO()
    Image.effect_noise((900, 600), 80).save(out, "PNG")
    small = thumbnail(out.getvalue())
    with Image.open(io.BytesIO(small)) as image:
        assert max(image.size) == LONGEST_PX and image.format == "JPEG"
    assert thumbnail(small) == small  # not coded twice
    flat = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(flat, "PNG")
    assert thumbnail(flat.getvalue()) == flat.getvalue()


def test_pictures_of_a_run_come_from_its_shards_and_read_back(run_folder, tmp_path):
    from raycap.config import load_config
    from raycap.data.shards import prepare

    folder = tmp_path / "shards"
    prepare(load_config("shapes-git", ["data.limit=40", "data.source=shapes"]), folder)
    from raycap.data.parquet import open_shards

    shards = open_shards(folder)
    references = shards.references("test")
    run = load_run(run_folder)
    assert pictures_of(run) == []  # nobody says where the images are
    best, worst = list(references)[1], list(references)[3]
    said = {i: " ".join(r[0].split()[:2]) for i, r in references.items()}
    said |= {best: references[best][0], worst: "nothing of the kind"}
    for file in (run_folder / "predictions").glob("test.*"):
        file.unlink()
    from raycap.files import write_jsonl

    for variant in ("served", "zero-shot"):
        rows = [{"image_id": i, "caption": c if variant == "served" else "a", "references": references[i]}
                for i, c in said.items()]  # fmt: skip
        write_jsonl(run_folder / "predictions" / f"test.{variant}.jsonl", rows)
    run = dataclasses.replace(run, entry={**run.entry, "data": {"folder": str(folder)}})
    found = pictures_of(run)
    kinds = {p.image_id: p.kind for p in found}
    assert kinds[best] == "best" and kinds[worst] == "worst"
    shown = next(p for p in found if p.image_id == best)
    assert shown.captions == {"zero-shot": "a", "served": references[best][0]} and shown.scores["served"] > 5
    assert shown.references == list(references[best]) and shown.image[:4] == b"\x89PNG"
    write_pictures(tmp_path / "out", found)
    assert read_pictures(tmp_path / "out") == found
