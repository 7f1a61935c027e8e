"""explore.html: what an image set holds, as one offline page."""

from __future__ import annotations

import base64
import random
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import raycap
from raycap.data.parquet import Shards
from raycap.report.explore import PICTURES, table
from raycap.report.page import page
from raycap.report.pictures import thumbnail
from raycap.report.tables import pairs, scrolled

LIKENESS = {
    "bleu4": "BLEU-4",
    "meteor": "METEOR",
    "tfidf_cosine": "cosine of TF-IDF",
    "clip_cosine": "cosine of CLIP texts",
}
_WIDE, _HIGH = 480, 150


def render(found: Mapping[str, Any], pictures: Sequence[Mapping[str, Any]], name: str) -> str:
    """The page as text, from what `explore` found and `random_pictures` drew."""
    parts = [("figures", "Figures", _figures(found))]
    for lang, own in found["captions"].items():
        mark = f" ({lang})" if len(found["captions"]) > 1 else ""
        parts += [
            (f"lengths-{lang}", f"Lengths{mark}", _lengths(own)),
            (f"words-{lang}", f"Words{mark}", _words(own["vocabulary"], lang)),
            (f"repetition-{lang}", f"Repetition{mark}", _repetition(own, lang)),
            (f"likeness-{lang}", f"Likeness inside an image{mark}", _likeness(own["likeness"])),
            (f"clip-{lang}", f"CLIPScore{mark}", _clip(own.get("clip_scores"))),
        ]
    parts += [
        ("images", "Images", _images(found)),
        ("leaks", "Copies and leaks", _leaks(found)),
        ("pictures", "Pictures", _pictures(pictures)),
        ("notes", "Notes", "".join(f'<p class="note">{escape(note)}</p>' for note in found["notes"])),
    ]
    shown = [(key, title, body) for key, title, body in parts if body]
    links = "".join(f'<a href="#{key}">{escape(title)}</a>' for key, title, _ in shown)
    body = "\n".join(f'<section id="{key}"><h2>{escape(title)}</h2>{text}</section>' for key, title, text in shown)
    captions = sum(own["captions"] for own in found["captions"].values())
    tiles = {"images": f"{found['images']['images']:,}", "captions": f"{captions:,}"}
    tiles |= {split: f"{n:,}" for split, n in found["splits"].items()}
    facts = "".join(f"<div><dt>{escape(k)}</dt><dd>{v}</dd></div>" for k, v in tiles.items())
    header = (
        f'<p class="kicker">raycap explore</p><h1>{escape(name)}</h1><dl class="facts">{facts}</dl><nav>{links}</nav>'
    )
    footer = f"Made by raycap {escape(raycap.__version__)}. Loads nothing from outside."
    return page(f"{name} · raycap explore", header, body, footer)


def random_pictures(shards: Shards, seed: int, count: int = PICTURES) -> list[dict[str, Any]]:
    """`count` rows of all splits by the seed: image_id, split, lang, captions, and `image`, a small encoded picture."""
    places = [(split, row) for split in shards.splits for row in range(shards.counts[split])]
    chosen = set(random.Random(seed).sample(places, min(count, len(places))))
    found = []
    for split in shards.splits:
        wanted = {row for s, row in chosen if s == split}
        for group in shards.row_groups(split):
            inside = [r for r in wanted if group["offset"] <= r < group["offset"] + group["rows"]]
            if not inside:
                continue
            for row in _group_rows(group):
                if row["row"] in wanted:
                    found.append({"image_id": row["image_id"], "split": split, "lang": row["lang"], "captions": row["captions"],
                                  "image": thumbnail(row["image"]["bytes"])})  # fmt: skip
    return found


def _group_rows(group: Mapping[str, Any]) -> list[dict[str, Any]]:
    from raycap.data.parquet import read_row_group

    return read_row_group(dict(group), ["image_id", "image", "captions", "lang"])


def _figures(found: Mapping[str, Any]) -> str:
    rows = [f"<tr><th scope=row>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in table(found)]
    return scrolled('<th class="l">figure</th><th>value</th>', rows)


def _lengths(own: Mapping[str, Any]) -> str:
    head = '<th class="l">unit</th><th>least</th><th>mean</th><th>median</th><th>95 %</th><th>most</th>'
    rows = []
    for unit in ("words", "tokens", "characters"):
        if unit in own:
            spread, how = own[unit], own[unit].get("tokeniser", "")
            cells = "".join(f"<td>{_plain(spread[k])}</td>" for k in ("min", "mean", "median", "p95", "max"))
            rows.append(f"<tr><th scope=row>{unit}{f' <small>{escape(how)}</small>' if how else ''}</th>{cells}</tr>")
    tokens = own.get("tokens")
    note = ""
    if tokens:
        known = tokens["unknown_share"] is not None
        unknown = (
            f"{tokens['unknown']:,} tokens ({tokens['unknown_share']:.3%}) are unknown to it"
            if known
            else "it knows every text"
        )
        note = (f'<p class="note">Of the model\'s tokeniser: {unknown}; {tokens["captions_cut"]:,} captions are longer than '
                f"data.max_text_tokens={tokens['limit']} with prompt and end, and are cut in training.</p>")  # fmt: skip
    return note + scrolled(head, rows) + bars(own["words_histogram"], "captions by words")


def _words(vocabulary: Mapping[str, Any], lang: str) -> str:
    unseen = vocabulary["test_share_unseen"]
    missing = f"{vocabulary['test_words_unseen_in_train']:,}"
    facts = {
        "words": f"{vocabulary['words']:,}",
        "distinct": f"{vocabulary['distinct']:,}",
        "only once": f"{vocabulary['once']:,}",
        "fewer than five times": f"{vocabulary['below_5']:,}",
        "test words that train lacks": "" if unseen is None else f"{missing} ({unseen:.2%} of the test's words)",
    }
    top = max((n for _, n in vocabulary["frequent"]), default=1)
    head = '<th class="l">word</th><th>times</th>'
    rows = [f'<tr><td class="l" lang="{escape(lang)}">{escape(w)}</td><td><span class="meter"><i style="width:{n / top:.0%}">'
            f"</i></span>{n:,}</td></tr>" for w, n in vocabulary["frequent"]]  # fmt: skip
    rare = ", ".join(escape(word) for word in vocabulary["rare"])
    rare = f'<h3>Some that occur once</h3><p class="note" lang="{escape(lang)}">{rare}</p>' if rare else ""
    return f'<div class="two"><div>{pairs(facts)}{rare}</div>{scrolled(head, rows, " tall")}</div>'


def _repetition(own: Mapping[str, Any], lang: str) -> str:
    repeated = own["repeated"]
    seen = (
        f"{repeated['test_captions_in_train']:,} of {repeated['test_captions']:,}" if repeated["test_captions"] else ""
    )
    facts = {
        "captions that repeat another": f"{repeated['exact']:,} of {own['captions']:,}",
        "inside one image": f"{repeated['inside_an_image']:,}",
        "distinct captions": f"{repeated['distinct']:,}",
        "distinct sets of captions": f"{repeated['distinct_sets']:,} of {own['images']:,} images",
        "groups that a bootstrap draws": f"{repeated['groups']:,}",
        "test captions that stand in train": seen,
    }
    rows = [
        f'<tr><td class="wrap" lang="{escape(lang)}">{escape(c)}</td><td>{n:,}</td></tr>'
        for c, n in repeated["frequent"]
    ]
    often = scrolled('<th class="l">caption</th><th>times</th>', rows) if rows else ""
    return f'<div class="two"><div>{pairs(facts)}</div>{often}</div>'


def _likeness(likeness: Mapping[str, Any]) -> str:
    rows = []
    for key, name in LIKENESS.items():
        if key in likeness:
            error = likeness[key]["se"]
            spread = "" if error is None else f' <span class="se">± {error:.4f}</span>'
            rows.append(f"<tr><th scope=row>{name}</th><td>{likeness[key]['mean']:.4f}{spread}</td></tr>")
    if not rows:
        return '<p class="note">No image has two captions.</p>'
    note = (f"{likeness['images']:,} of {likeness['of']:,} images, drawn by the seed. BLEU-4 and METEOR: each caption against the "
            "others of its image. Cosines: all pairs. ± is the standard error of the mean between groups.")  # fmt: skip
    return f'<p class="note">{note}</p>' + scrolled('<th class="l">measure</th><th>mean</th>', rows)


def _clip(scores: Mapping[str, Any] | None) -> str:
    if not scores:
        return ""
    text = f"cosine of picture and caption: {scores['min']:.3f} to {scores['max']:.3f}, mean {scores['mean']:.3f}"
    return f'<p class="note">{text}</p>' + bars(scores["histogram"], "captions by CLIPScore", digits=3)


def _images(found: Mapping[str, Any]) -> str:
    images = found["images"]
    head = '<th class="l">size</th><th>images</th>'
    rows = [f'<tr><td class="l">{w} x {h}</td><td>{n:,}</td></tr>' for w, h, n in images["frequent"]]
    facts = {name: f"{_plain(images[key]['min'])} to {_plain(images[key]['max'])}, median {_plain(images[key]['median'])}"
             for key, name in (("width_px", "width, px"), ("height_px", "height, px"), ("aspect", "width / height"))}  # fmt: skip
    facts |= {f"changed: {what}": f"{n:,}" for what, n in found["images_changed"].items()}
    more = bars(images["longer_side_histogram"], "images by longer side, px") if images["distinct_sizes"] > 1 else ""
    return f'<div class="two"><div>{pairs(facts)}{more}</div>{scrolled(head, rows)}</div>'


def _leaks(found: Mapping[str, Any]) -> str:
    if found["leaks"] is None:
        return '<p class="note">Not looked for: these shards are older than the check.</p>'
    copies = found["duplicates"]
    facts = {
        "copies of a picture, pixel for pixel": f"{copies['exact']:,}",
        "nearly the same picture": f"{copies['near']:,}",
    }
    rejected = found["rows"]["rejected_by_reason"]
    facts |= {f"left out: {reason}": f"{n:,}" for reason, n in rejected.items()}
    for splits, kinds in found["leaks"].items():
        facts[f"in {splits.replace('-', ' and in ')}"] = ", ".join(f"{n:,} {kind}" for kind, n in kinds.items())
    pill = (
        '<span class="pill bad">leaks</span>'
        if found["leaks"]
        else '<span class="pill good">no picture in two splits</span>'
    )
    return f'<p class="note">{pill}</p>{pairs(facts)}'


def _pictures(pictures: Sequence[Mapping[str, Any]]) -> str:
    cards = []
    for picture in pictures:
        kind = "jpeg" if picture["image"][:2] == bytes((0xFF, 0xD8)) else "png"
        source = f"data:image/{kind};base64,{base64.b64encode(picture['image']).decode()}"
        name = escape(picture["image_id"], quote=True)
        lang = escape(picture["lang"] or "en", quote=True)
        said = "".join(f'<dd class="r" lang="{lang}">{escape(caption)}</dd>' for caption in picture["captions"])
        image = f'<img src="{source}" alt="picture {name}"><div class="id">{name}</div>'
        cards.append(
            f'<article class="card"><div>{image}</div><dl><dt>{escape(picture["split"])}</dt>{said}</dl></article>'
        )
    note = "Drawn at random by the seed."
    return f'<p class="note">{note}</p><div class="pictures">{"".join(cards)}</div>' if cards else ""


def bars(histogram: Mapping[str, Sequence[float]], caption: str, digits: int = 0) -> str:
    """A histogram as SVG in the page's colours, each bar with its range and count as tooltip."""
    counts, edges = histogram["counts"], histogram["edges"]
    if not counts:
        return ""
    top, wide = max(counts) or 1, _WIDE / len(counts)
    drawn = []
    for n, count in enumerate(counts):
        high = count / top * _HIGH
        low_edge, high_edge = edges[n], edges[n + 1]
        whole = digits == 0 and high_edge - low_edge == 1
        where = f"{low_edge:.{digits}f}" if whole else f"{low_edge:.{digits}f} to {high_edge:.{digits}f}"
        drawn.append(f'<rect x="{n * wide:.2f}" y="{_HIGH - high:.2f}" width="{max(wide - 1, 0.5):.2f}" height="{high:.2f}" '
                     f'fill="var(--finished)"><title>{where}: {count:,}</title></rect>')  # fmt: skip
    style = 'fill="var(--muted)" font-size="12"'
    ends = f'<text x="0" y="{_HIGH + 16}" {style}>{edges[0]:.{digits}f}</text>'
    ends += f'<text x="{_WIDE}" y="{_HIGH + 16}" text-anchor="end" {style}>{edges[-1]:.{digits}f}</text>'
    label = escape(caption, quote=True)
    svg = f'<svg viewBox="0 0 {_WIDE} {_HIGH + 20}" role="img" aria-label="{label}">{"".join(drawn)}{ends}</svg>'
    return f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>"


def _plain(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else f"{value:,}"
