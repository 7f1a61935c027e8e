"""The five systems' presets hold what docs/seeds.md says they hold, and that page holds every figure of the documents."""

from __future__ import annotations

import os
import re
import shlex
from functools import lru_cache
from pathlib import Path

import pytest

from raycap.config import all_keys, load_config, parse_value
from raycap.evaluate.grid import cells, read_axes
from raycap.tune.space import sample_trials

PAGE = Path(__file__).parents[1] / "docs" / "seeds.md"
PRESETS = {
    "000": "pokemon-git",
    "001": "iu-xray-blip",
    "002": "stair-qwen2vl",
    "003": "flickr30k-clip-tinyllama",
    "004": "risc-paligemma",
}
MARKS = ("set", "space", "chosen", "run", "done", "result", "refused")
SETTING = re.compile(r"^[a-z]+\.[a-z0-9_.]+=")


def sections(text: str) -> dict[str, str]:
    """Number of a document -> what stands under its heading."""
    found = {}
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        if number := re.match(r"\d{3}", part):
            found[number.group()] = part
    return found


@lru_cache
def rows() -> list[tuple[str, str, str, str]]:
    """(document, what it says, mark, what the preset makes of it) of each line of the page's tables."""
    found = []
    for number, text in sections(PAGE.read_text(encoding="utf-8")).items():
        lines = [line for line in text.splitlines() if line.startswith("|")][2:]
        for line in lines:
            said, mark, made = (cell.strip() for cell in line.strip("|").split("|"))
            found.append((number, said, mark, made))
    return found


def marked(*marks: str) -> list:
    return [pytest.param(n, made, id=f"{n}-{said[:40]}") for n, said, mark, made in rows() if mark in marks]


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def value_of(config, key: str):
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def test_the_page_has_a_table_for_each_document():
    assert {number for number, *_ in rows()} == set(PRESETS)
    assert {mark for _, _, mark, _ in rows()} == set(MARKS)
    for number, text in sections(PAGE.read_text(encoding="utf-8")).items():
        assert f"(`{PRESETS[number]}`)" in text.splitlines()[0]


@pytest.mark.parametrize(("number", "made"), marked("set", "chosen"))
def test_the_preset_holds_the_settings_that_the_page_names(number, made):
    config = load_config(PRESETS[number])
    # What stands behind a colon explains, and may name other values.
    named = [s for s in quoted(made.split("`: ")[0] + "`") if SETTING.match(s)]
    assert named, f"no setting in {made!r}"
    for setting in named:
        key, _, text = setting.partition("=")
        assert value_of(config, key) == parse_value(key, text), setting


@pytest.mark.parametrize(("number", "made"), marked("space"))
def test_the_space_holds_the_points_that_the_page_names(number, made):
    space = load_config(PRESETS[number]).tune.space
    named = re.findall(r"`([a-z]+\.[a-z_]+)` in ((?:[\w.]+(?:, )?)+)", made)
    assert named, f"no setting of a space in {made!r}"
    for key, values in named:
        listed = [parse_value(key, v) for v in values.rstrip(".").split(", ")]
        assert [parse_value(key, v) for v in space[key]["choice"]] == listed, key


@pytest.mark.parametrize(("number", "made"), marked("run"))
def test_commands_of_the_page_resolve(number, made):
    command, *_ = quoted(made)
    program, verb, place, *settings = shlex.split(command)
    assert program == "raycap" and verb in ("sweep", "train", "evaluate") and settings
    if settings[0] == "--grid":
        axes, settings = read_axes(settings[1:])
        combinations = cells(load_config(PRESETS[number], settings), axes)
        assert len(combinations) == len(axes.get("prompts", "-")) * len(axes.get("decode", "-"))
        return
    if verb != "evaluate":
        assert place == PRESETS[number]
    if verb == "train":
        settings += ["tune.trials=1", "tune.slots=1", "tune.scheduler=none", "tune.grace_steps=0", "tune.space={}"]
    # A model folder that stands alone begins with the default preset, a run with its own.
    config = load_config("shapes-git" if place == "FOLDER" else PRESETS[number], settings)
    assert len(sample_trials(config)) == config.tune.trials
    assert config != load_config("shapes-git" if place == "FOLDER" else PRESETS[number])


@pytest.mark.parametrize(("number", "made"), marked("refused"))
def test_what_is_refused_has_a_reason_and_is_not_there(number, made):
    assert len(made) > 20
    if setting := re.match(r"`([a-z]+\.[a-z_]+)`: ", made):
        assert setting[1] not in all_keys(), f"{setting[1]} is there: say so in docs/seeds.md"


def test_numbers_are_of_one_reading():
    assert numbers("lr 5e-5, .42 (0.42), 2,048, adamw_8bit, top_k 50, 3.9-4.0, 1.3B") == {
        "5e-5",
        "0.42",
        "2048",
        "50",
        "3.9",
        "4.0",
    }


@pytest.mark.parametrize("number", PRESETS)
def test_the_page_holds_every_figure_of_the_document(number):
    """Figures of a list kept beside the image sets, where there is one; the page is what users get."""
    places = [os.environ.get("RAYCAP_SHARED_DATA"), Path(__file__).parents[2] / "shared" / "data"]
    found = [p for p in (Path(place).parent / "SEEDS.md" for place in places if place) if p.is_file()]
    if not found:
        pytest.skip("no SEEDS.md beside the folder of image sets ($RAYCAP_SHARED_DATA, or ../shared/data)")
    document = sections(found[0].read_text(encoding="utf-8"))[number]
    page = sections(PAGE.read_text(encoding="utf-8"))[number]
    missing = numbers(document) - numbers(page)
    assert not missing, f"docs/seeds.md, {number}, leaves out {sorted(missing)}"


def numbers(text: str) -> set[str]:
    """Figures as they stand in a text, each in one spelling (.42 as 0.42, 2,048 as 2048); those inside words are names."""
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    found = re.findall(r"(?<![\w.])\d*\.?\d+(?:e-?\d+)?(?!\w|\.\d)", text)
    return {f"0{n}" if n.startswith(".") else n for n in found}


@pytest.mark.parametrize("preset", PRESETS.values())
def test_a_dry_run_needs_neither_weights_nor_images(preset, capsys, tmp_path, monkeypatch):
    from raycap.cli import main

    monkeypatch.chdir(tmp_path)
    assert main(["sweep", preset, "--dry-run"]) == 0
    said = capsys.readouterr().out
    config = load_config(preset)
    assert config.model.path in said and "predicted work" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("preset", PRESETS.values())
def test_a_preset_fits_its_family(preset):
    from raycap.models import load_family

    config = load_config(preset)
    family = load_family(config.model.family, config.model)
    assert set(config.lora.scope.split("+")) | set(config.lora.full) <= set(family.scopes())
