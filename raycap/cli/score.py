"""`raycap score`: predictions and references -> metrics; text alone."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from raycap.cli.common import add_json, print_json
from raycap.errors import UsageError

NAME = "score"
HELP = "score captions against references: BLEU, METEOR, ROUGE-L, CIDEr and more, each with its signature"
EXAMPLES = """\
examples:
  raycap score predictions.jsonl references.jsonl
  raycap score results.json captions_val2014.json --metrics cider,bleu --json
  raycap score mine.jsonl refs.jsonl --lang ja --metrics bleu,rouge_l,cider --per-image scores.jsonl
  raycap score results.json captions_val2014.json --metrics cider,clipscore --images val2014

predictions: {"image_id", "caption"} a line, or a COCO results file; references: {"image_id", "captions": [...]} a line,
or a COCO annotation file. A predictions file that holds "references", as a run folder's does, can stand for both.
"""
SHOWN = 3
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("predictions", metavar="PREDICTIONS", type=Path)
    parser.add_argument("references", metavar="REFERENCES", type=Path)
    parser.add_argument(
        "--metrics",
        default="bleu,meteor,rouge_l,cider",
        help="default: %(default)s; further: rouge_1, token_f1, distinct, length_ratio, clipscore, spice",
    )
    parser.add_argument("--lang", default="en", choices=("en", "ja"))
    parser.add_argument(
        "--per-image", metavar="FILE", type=Path, help="write each image's scores there, one JSON a line"
    )
    parser.add_argument(
        "--tokeniser", help="en: ptb (Java) or ptb-py; ja: unidic-lite or char; default: the first that runs here"
    )
    parser.add_argument(
        "--corpus", metavar="FILE", type=Path, help="references that CIDEr takes its document frequencies from"
    )
    parser.add_argument(
        "--images", metavar="FOLDER", type=Path, help="pictures for clipscore, named by image id or as in a COCO file"
    )
    parser.add_argument("--clip", default="", help="architecture/weights, or a folder; default: ViT-B-32/openai")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    predictions, said = read_predictions(args.predictions)
    references, more = read_references(args.references)
    notes = [*said, *more]
    both = [i for i in predictions if i in references]
    strangers = [i for i in predictions if i not in references]
    if strangers:
        shown = ", ".join(strangers[:SHOWN]) + (" ..." if len(strangers) > SHOWN else "")
        notes.append(
            f"{len(strangers)} of {len(predictions)} predictions have no references and are not scored: {shown}"
        )
    if not both:
        raise UsageError(
            f"no image id of {args.predictions} (such as {next(iter(predictions))!r}) is in {args.references} "
            f"(such as {next(iter(references))!r}): nothing to score"
        )
    from raycap.evaluate import score

    metrics = tuple(m.strip() for m in args.metrics.split(",") if m.strip())
    if not metrics:
        raise UsageError("--metrics names no metric")
    corpus = None
    if args.corpus:
        corpus, more = read_references(args.corpus)
        notes += [f"{args.corpus}: {note}" for note in more]
    images = find_pictures(args.images, both, args.references) if args.images else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        found = score(
            {i: predictions[i] for i in both}, references, metrics, args.lang,
            tokeniser=args.tokeniser, corpus=corpus, images=images, clip=args.clip,
        )  # fmt: skip
    notes += dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning))
    if args.per_image:
        from raycap.files import write_jsonl

        write_jsonl(
            args.per_image, [{"image_id": i, **{n: s.per_image.get(i) for n, s in found.items()}} for i in both]
        )
    if args.json:
        scores = {n: {"score": s.score, "signature": s.signature} for n, s in found.items()}
        print_json({"images": len(both), "metrics": scores, "notes": notes})
        return 0
    print(f"{len(both):,} images")
    for name, one in found.items():
        print(f"  {name:<12} {one.score:.4f}   {one.signature}")
    for note in notes:
        print(f"note: {note}")
    return 0


def read_predictions(path: Path) -> tuple[dict[str, str], list[str]]:
    """Image id -> caption, and what was odd: doubles (the first counts) and empty captions (scored as such)."""
    found: dict[str, str] = {}
    doubles = 0
    for where, row in _rows(path, ("annotations",)):
        image, caption = _field(row, "image_id", where), _field(row, "caption", where)
        if image in found:
            doubles += 1
        else:
            found[image] = caption
    if not found:
        raise UsageError(f"{path} holds no predictions")
    empty = sum(not c.strip() for c in found.values())
    notes = [f"left out: {_many(doubles, 'further caption')} of an image that had one"] if doubles else []
    return found, notes + ([f"{empty} of {len(found)} captions are empty; they are scored as such"] if empty else [])


def read_references(path: Path) -> tuple[dict[str, list[str]], list[str]]:
    """Image id -> references, and what was odd: empty references, which are left out."""
    found: dict[str, list[str]] = {}
    empty = 0
    for where, row in _rows(path, ("annotations",)):
        image = _field(row, "image_id", where)
        texts = row.get("captions", row.get("references", [row["caption"]] if "caption" in row else None))
        if texts is None:
            raise UsageError(f"{where} has no 'captions' and no 'caption'; {_keys(row)}")
        if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
            raise UsageError(f"{where}: 'captions' is {texts!r}, expected a list of texts")
        kept = [t for t in texts if t.strip()]
        empty += len(texts) - len(kept)
        found.setdefault(image, []).extend(kept)
    bare = [i for i, texts in found.items() if not texts]
    if len(bare) == len(found):
        raise UsageError(f"{path} holds no references")
    notes = [f"left out: {_many(empty, 'empty reference')}"] if empty else []
    if bare:
        notes.append(f"{_many(len(bare), 'image')} without any reference left: {', '.join(bare[:SHOWN])}")
    return {i: texts for i, texts in found.items() if texts}, notes


def find_pictures(folder: Path, ids: list[str], references: Path) -> dict[str, Path]:
    """Image id -> picture file: its `file_name` where the references are a COCO file, a file of that name, or of that stem.

    COCO's own names end in the id with leading zeros; those are understood too.
    """
    if not folder.is_dir():
        raise UsageError(f"--images {folder}: there is no such folder")
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.suffix.lower() in PICTURES}
    stems: dict[str, Path] = {}
    for path in files.values():
        stems.setdefault(path.stem, path)
        digits = path.stem.rsplit("_", 1)[-1]
        if digits.isdigit():
            stems.setdefault(str(int(digits)), path)
    named: dict[str, str] = {}
    if references.suffix == ".json":
        whole = json.loads(references.read_text(encoding="utf-8-sig"))
        rows = whole.get("images", []) if isinstance(whole, dict) else []
        named = {str(r["id"]): r["file_name"] for r in rows if isinstance(r, dict) and "id" in r and "file_name" in r}
    found = {i: files.get(named.get(i, i)) or stems.get(i) for i in ids}
    missing = [i for i, path in found.items() if path is None]
    if missing:
        raise UsageError(
            f"--images {folder} has no picture for {len(missing)} of {len(ids)} captions, first {missing[0]!r}: a picture is "
            f"found by its id as name or stem ({missing[0]}.jpg), or by a COCO file's file_name"
        )
    return {i: path for i, path in found.items() if path is not None}


def _rows(path: Path, lists: Iterable[str]) -> Iterable[tuple[str, dict[str, Any]]]:
    """(place, row) of a JSONL file, a JSON list, or a JSON object with one of `lists`."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors of some systems put a mark before the first line
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} cannot be read: it is no text in UTF-8 ({error.reason} at byte {error.start})"
        ) from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        whole = None
    if isinstance(whole, dict):
        whole = next((whole[k] for k in lists if isinstance(whole.get(k), list)), whole)
    if isinstance(whole, dict):
        placed = [(f"{path}:1", whole)]
    elif isinstance(whole, list):
        placed = [(f"{path}, entry {n}", row) for n, row in enumerate(whole)]
    else:
        placed = []
        for n, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    placed.append((f"{path}:{n}", json.loads(line)))
                except json.JSONDecodeError as error:
                    raise UsageError(f"{path}:{n} is not JSON: {error}") from error
    for where, row in placed:
        if not isinstance(row, dict):
            raise UsageError(f"{where} is {type(row).__name__}, expected an object with image_id")
    return placed


def _field(row: dict[str, Any], name: str, where: str) -> str:
    if name not in row:
        swapped = ". Predictions come first, then references" if name == "caption" and "captions" in row else ""
        raise UsageError(f"{where} has no '{name}'; {_keys(row)}{swapped}")
    value = row[name]
    if name == "image_id" and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(int(value) if float(value).is_integer() else value)  # a table with gaps writes 42 as 42.0
    if not isinstance(value, str):
        raise UsageError(f"{where}: '{name}' is {value!r:.80}, expected text")
    return value


def _many(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _keys(row: dict[str, Any]) -> str:
    shown = [f"'{key}'" for key in list(row)[:SHOWN]]
    return f"it has {', '.join(shown) or 'nothing'}{' ...' if len(row) > SHOWN else ''}"
