"""What pycocoevalcap is given: captions and references of rows {"image_id", "caption", "references"}, tokenised by Java."""

from __future__ import annotations

from typing import Any


def tokenised(rows: list[dict[str, Any]]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """(image id -> references, image id -> [caption]); Java is started once for all of them."""
    from raycap.evaluate.tokenise import ptb_java

    found = iter(ptb_java([text for row in rows for text in (row["caption"], *row["references"])]))
    said = {}
    references = {}
    for row in rows:
        said[row["image_id"]] = [next(found)]
        references[row["image_id"]] = [next(found) for _ in row["references"]]
    return references, said


def cider(rows: list[dict[str, Any]]) -> tuple[float, dict[str, float]]:
    """pycocoevalcap's CIDEr: of all rows, and of each image."""
    from pycocoevalcap.cider.cider import Cider

    references, said = tokenised(rows)
    whole, each = Cider().compute_score(references, said)
    return whole, dict(zip(references, each))
