"""The reports as a browser shows them: desktop and phone, light and dark, 12 and 200 trials, Japanese.

RAYCAP_SCREENS=FOLDER keeps the screenshots, to be looked at.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from browser import Chromium, browser

from raycap.report.data import report_data
from raycap.report.html import render
from raycap.report.pictures import Picture
from raycap.report.runs import load_run

WIDTHS = {"desktop": (1280, False), "phone": (390, True)}
OVERFLOW = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, pre, svg') &&
  e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(e => e.outerHTML.slice(0, 120))"""
OVERLAPS = """[...document.querySelectorAll('svg')].flatMap(svg => {
  const texts = [...svg.querySelectorAll('text')].filter(t => t.textContent.trim());
  const boxes = texts.map(t => t.getBoundingClientRect());
  const found = [];
  for (let a = 0; a < boxes.length; a++) for (let b = a + 1; b < boxes.length; b++) {
    const x = Math.min(boxes[a].right, boxes[b].right) - Math.max(boxes[a].left, boxes[b].left);
    const y = Math.min(boxes[a].bottom, boxes[b].bottom) - Math.max(boxes[a].top, boxes[b].top);
    if (x > 1.5 && y > 3) found.push([svg.getAttribute('aria-label'), texts[a].textContent, texts[b].textContent]);
  }
  return found;
})"""
CUT = """[...document.querySelectorAll('svg')].flatMap(svg => {
  const place = svg.getBoundingClientRect(), wide = document.documentElement.clientWidth;
  return [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()])
    .filter(([, b]) => b.right > wide || b.left < 0 || b.right > place.right + 12).map(([t]) => t);
})"""
CONTRAST = """(() => {
  const rgba = text => { const n = text.match(/[\\d.]+/g).map(Number); return n.length > 3 ? n : [...n, 1]; };
  const light = ([r, g, b]) => { const f = v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
    return .2126 * f(r) + .7152 * f(g) + .0722 * f(b); };
  const over = (top, under) => top.slice(0, 3).map((v, i) => v * top[3] + under[i] * (1 - top[3]));
  const ground = e => { const stack = []; for (; e; e = e.parentElement) stack.push(rgba(getComputedStyle(e).backgroundColor));
    return stack.reverse().reduce((under, top) => over(top, under), [255, 255, 255]); };
  const found = [];
  const walk = document.createTreeWalker(document.querySelector('body'), NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    if (!walk.currentNode.textContent.trim() || ['SCRIPT', 'STYLE', 'style', 'TITLE', 'title'].includes(e.tagName)) continue;
    const look = getComputedStyle(e), under = ground(e);
    const ink = over(rgba(e.closest('svg') ? look.fill : look.color), under);
    const [a, b] = [light(ink), light(under)].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    if (ratio < 4.5) found.push([walk.currentNode.textContent.slice(0, 40), ratio.toFixed(2)]);
  }
  return found;
})()"""
GLYPHS = """(() => {
  const draw = text => { const c = document.createElement('canvas'); c.width = 80; c.height = 40;
    const p = c.getContext('2d'); p.font = '32px ' + getComputedStyle(document.body).fontFamily;
    p.fillText(text, 2, 32); return c.toDataURL(); };
  const missing = draw('\\u{10FFFE}');
  return ['赤', '四', '角', 'の', 'カ'].filter(t => draw(t) === missing || draw(t) === draw(' '));
})()"""


@pytest.fixture(scope="module")
def chromium():
    program = browser()
    if program is None:
        pytest.skip("no browser: install Chromium, or name one in RAYCAP_BROWSER")
    with Chromium(program) as found:
        yield found


@pytest.fixture
def pages(run_folder, trials, tmp_path):
    """Name -> file: the made-up run with so many trials, every section there."""
    data = report_data(load_run(run_folder))
    separation = {"best": "t001", "together": ["t001", "t004", "t000"], "p": {"t004": 0.4}, "images": 128}
    settings = {"settings": ["t001", "t000"], "cider": {"t001": [1.5, 1.7], "t000": [1.0, 1.2]}, "images": 128,
                "verdicts": {"t000": {"difference": 0.5, "low": 0.2, "high": 0.8, "p": 0.01, "p_holm": 0.02}}}  # fmt: skip
    row = {"step": 111, "share": 0.111, "trials": 24, "going": 8, "kept": True, "lost": 0.0,
           "cider": {"spearman": 0.87, "low": 0.5, "high": 0.97}}  # fmt: skip
    reference = {
        "source": "results/reference-shapes-git.json",
        "own": False,
        "commit": "c" * 40,
        "steps": 333,
        "rows": [row],
    }
    weights = {"zero-shot": 3_400_000, "adapter": 4_500_000, "served": 4_600_000, "merged": 4_600_000}
    japanese = Picture(image_id="長い名前の写真-000123456789.jpg", image=data.pictures[0].image, kind="worst",
                       references=["赤い四角形の右に小さな青い円がある写真です。" * 3, "赤い四角形"],
                       captions={"served": "緑色の三角形とカメラ", "zero-shot": "a"}, scores={"served": 0.0})  # fmt: skip
    found = {}
    for count in (12, 200):
        many = [
            {**trials[n % 4], "trial_id": f"t{n:03d}", "rank": 2 ** (1 + n % 5), "lr": 10 ** (-4 + 2.3 * ((n * 0.618) % 1)),
             "curve": [{**p, "cider": p["cider"] * (1 + n / 100)} for p in trials[n % 4]["curve"]]}
            for n in range(count)
        ]  # fmt: skip
        text = render(dataclasses.replace(
            data, trials=many, best_trial="t001", worst_trial="t002", separation=separation, settings=settings,
            reference=reference, weights_bytes=weights, lang="ja", pictures=[*data.pictures, japanese] * 3, batch=16,
            sentence="テスト: " + "the winner beats zero-shot by CIDEr +0.901 [0.800, 1.000]; " * 2,
        ))  # fmt: skip
        found[f"{count}-trials"] = tmp_path / f"{count}.html"
        found[f"{count}-trials"].write_text(text, encoding="utf-8")
    return found


@pytest.fixture
def comparison(run_folder, tmp_path):
    from raycap.cli.compare import compare
    from raycap.report.comparison import write_comparison

    for n in range(4):
        shutil.copytree(run_folder, run_folder.parent / f"another-run-with-a-long-name-{n}")
    runs = [load_run(f) for f in (run_folder, *sorted(run_folder.parent.glob("another-*")))]
    return write_comparison(tmp_path / "out", runs, compare(runs, "test", None, 500, 0), "raycap compare")


def looked_at(chromium, file: Path, name: str, *, japanese: bool = False):
    """Every check on one page at each width, light and dark."""
    for device, (width, mobile) in WIDTHS.items():
        for dark in (False, True):
            what = f"{name}-{device}-{'dark' if dark else 'light'}"
            chromium.open(file, width, dark=dark, mobile=mobile)
            if folder := os.environ.get("RAYCAP_SCREENS"):
                Path(folder).mkdir(parents=True, exist_ok=True)
                chromium.screenshot(Path(folder) / f"{what}.png")
            assert chromium.run("document.documentElement.scrollWidth") <= width, what
            for check in (OVERFLOW, OVERLAPS, CUT, CONTRAST):
                assert chromium.run(check) == [], what
            assert [url for url in chromium.asked if not url.startswith(("data:", file.as_uri()))] == [], what
            assert chromium.errors == [], what
            ground = chromium.run("getComputedStyle(document.body).backgroundColor")
            assert (ground == "rgb(255, 255, 255)") is not dark, what
            if japanese:
                assert chromium.run(GLYPHS) == [], what


@pytest.mark.parametrize("count", [12, 200])
def test_a_runs_report(chromium, pages, count):
    looked_at(chromium, pages[f"{count}-trials"], f"{count}-trials")


def test_a_comparison(chromium, comparison):
    looked_at(chromium, comparison, "comparison")


def test_japanese_shows(chromium, pages):
    fonts = shutil.which("fc-list") and subprocess.run(["fc-list", ":lang=ja"], capture_output=True, text=True).stdout
    if not fonts:
        pytest.skip("no font with Japanese on this machine")
    looked_at(chromium, pages["12-trials"], "japanese", japanese=True)


def test_the_table_sorts(chromium, pages):
    chromium.open(pages["12-trials"], 1280)
    first = "document.querySelector('table.sortable tbody tr').cells[4].textContent"
    button = "[...document.querySelectorAll('table.sortable th button')].find(b => b.textContent === 'rank').click()"
    chromium.run(button)
    assert chromium.run(first) == "2"
    chromium.run(button)
    assert chromium.run(first) == "32"


def test_the_checks_see_what_is_wrong(chromium, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        '<body style="margin:0"><div style="width:2000px">wide</div><p style="color:#ccc;background:#fff">pale</p>'
        '<svg aria-label="x" width="100" height="40"><text x="0" y="20">one</text><text x="4" y="20">two</text>'
        '<text x="95" y="20">beyond the edge</text></svg></body>',
        encoding="utf-8",
    )
    chromium.open(page, 390)
    assert chromium.run(OVERFLOW) and chromium.run(OVERLAPS) == [["x", "one", "two"]]
    assert chromium.run(CUT) == ["beyond the edge"] and [t for t, _ in chromium.run(CONTRAST)] == ["pale"]
