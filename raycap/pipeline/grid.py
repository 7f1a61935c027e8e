"""`raycap evaluate --grid`: every prompt with every decoding over a split, captioned once, scored, in one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raycap.cluster import connect
from raycap.config import Config
from raycap.pipeline.remote import in_worker
from raycap.pipeline.tools import prepare_tools
from raycap.pipeline.verbs import pictures

if TYPE_CHECKING:
    from raycap.data.shards import Shards
    from raycap.evaluate.grid import Cell


def evaluate_grid(
    config: Config, models: Sequence[Path], cells: Sequence[Cell], *, split: str, out: Path, plain: bool = False
) -> dict[str, Any]:
    """Caption `split` with every model and cell, then score; captions that a former grid stored are used again.

    Writes grid.json, grid.csv, captions/<cell>.jsonl and plots/ into `out`. Returns what grid.json holds: split, images,
    rows (a model and cell each: model, prompt, prompt_text, decode, seed, images, metrics {name: {score, signature}},
    collapse, decoding, key, captions).
    """
    from raycap.data.shards import open_shards, prepare_if_needed
    from raycap.evaluate.metrics import check_metrics
    from raycap.export.grid import grid_stage
    from raycap.files import write_json
    from raycap.report.grid import write_grid
    from raycap.report.live import Progress

    check_metrics(config.evaluate.metrics)
    title = f"evaluate · {len(models) * len(cells)} combinations"
    with Progress(title, plain=plain, phases=("prepare", "caption", "score")) as progress:
        progress.phase("prepare", f"images of '{config.data.source}'")
        folder = prepare_if_needed(config, progress.count, prepare_tools(config))
        shards = open_shards(folder).speaking(config.evaluate.lang, (split,))
        shards.references(split)  # a split without rows is told before a worker starts
        place = config.cache_dir / "captions"
        found: dict[str, dict[str, Any]] = {}
        with connect(config) as ray:
            for name, model in named(models).items():
                progress.phase("caption", name)

                def say(said: str, name: str = name) -> None:
                    progress.phase("caption", f"{name} · {said}")

                found[name] = in_worker(
                    ray, grid_stage, config.to_dict(), str(shards.folder), split, str(Path(model).absolute()),
                    [cell.to_dict() for cell in cells], str(place.absolute()),
                    log=config.cache_dir / "logs" / "grid.log", say=say,
                )  # fmt: skip
        rows = grid_rows(config, shards, split, cells, found, out, say=lambda said: progress.phase("score", said))
    table = {"split": split, "images": rows[0]["images"], "rows": rows}
    write_json(out / "grid.json", table)
    write_grid(out, rows)
    return table


def grid_rows(
    config: Config,
    shards: Shards,
    split: str,
    cells: Sequence[Cell],
    found: dict[str, dict[str, Any]],
    out: Path,
    *,
    say: Callable[[str], None] = lambda message: None,
) -> list[dict[str, Any]]:
    """Score what `grid_stage` found for each model; copies of the captions, with references, go to `out`/captions."""
    from raycap.evaluate import detect_collapse, score
    from raycap.files import read_jsonl, write_jsonl

    references = shards.references(split)
    images = pictures(config, shards, split)
    rows = []
    for model, stored in found.items():
        for cell in cells:
            say(f"{model} · {cell.name}")
            captions = {row["image_id"]: row["caption"] for row in read_jsonl(stored[cell.name]["file"])}
            prefix = f"{model.replace('/', '-')}." if len(found) > 1 else ""
            kept = [{"image_id": i, "caption": c, "references": references[i]} for i, c in captions.items()]
            file = write_jsonl(out / "captions" / f"{prefix}{cell.name}.jsonl", kept)
            scores = score(
                captions, references, config.evaluate.metrics, lang=config.evaluate.lang,
                images=images, clip=config.evaluate.clip,
            )  # fmt: skip
            told = detect_collapse(
                list(captions.values()), [references[i] for i in captions],
                prompt=cell.prompt, lang=config.evaluate.lang,
            )  # fmt: skip
            rows.append({
                "model": model, "prompt": cell.prompt_name, "prompt_text": cell.prompt, "decode": cell.decode_name,
                "seed": cell.seed, "images": len(captions),
                "metrics": {name: {"score": s.score, "signature": s.signature} for name, s in scores.items()},
                "collapse": told, "decoding": cell.signature(), "key": stored[cell.name]["key"], "captions": str(file),
                "reused": stored[cell.name]["reused"],
            })  # fmt: skip
    return rows


def named(models: Sequence[Path]) -> dict[str, Path]:
    """Models by a short name; a run's best/merged goes by the run's, with a number where two are called the same."""
    found: dict[str, Path] = {}
    for model in models:
        model = Path(model)
        short = model.parent.parent.name if model.parent.name == "best" else model.name
        name, number = short, 2
        while name in found:
            name, number = f"{short}-{number}", number + 1
        found[name] = model
    return found
