"""docs/runbook.md: every command in it is one that raycap takes, with settings that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from raycap.cli import load_verb, main
from raycap.cli.common import Parser
from raycap.config import load_config, preset_names

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
FIVE = ("pokemon-git", "iu-xray-blip", "stair-qwen2vl", "flickr30k-clip-tinyllama", "risc-paligemma")


def commands():
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    inline = re.findall(r"`(raycap [^`]+)`", PAGE)
    return list(dict.fromkeys(c.replace("PRESET", "shapes-git") for c in (*lines, *inline) if c.startswith("raycap ")))


def read(words):
    verb = load_verb(words[1])
    parser = Parser(prog=f"raycap {verb.NAME}")
    verb.add_arguments(parser)
    return parser.read(words[2:])


@pytest.mark.parametrize("command", [c for c in commands() if len(c.split()) > 2])
def test_a_command_of_the_page_is_one_that_raycap_takes(command):
    args = read(shlex.split(command))
    preset = next(
        (getattr(args, n) for n in ("preset", "source") if getattr(args, n, "") in preset_names()), "shapes-git"
    )
    load_config(preset, getattr(args, "settings", []))  # settings that do not exist are refused


@pytest.mark.parametrize("preset", FIVE)
def test_every_preset_goes_from_files_to_a_report(preset, tmp_path, monkeypatch, capsys):
    section = next(s for s in PAGE.split("\n## ") if f"(`{preset}`)" in s.splitlines()[0])
    shards = re.search(rf"raycap prepare {preset} --out (\S+)", section)[1]
    assert f"raycap explore {shards}" in section and f"raycap sweep {preset} data.source={shards}\n" in section
    dry = re.search(rf"^raycap (sweep {preset} .*--dry-run)$", section, re.MULTILINE)[1]
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(dry)) == 0
    assert f"source: {shards}" in capsys.readouterr().out


def test_the_pages_are_linked_and_their_links_lead_somewhere():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("runbook.md", "ethics.md"):
        assert f"(docs/{name})" in readme
        text = (ROOT / "docs" / name).read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            assert (ROOT / "docs" / link).is_file(), link


def test_ethics_names_each_risk_with_what_is_not_measured():
    text = (ROOT / "docs" / "ethics.md").read_text(encoding="utf-8")
    for risk in ("Hallucination", "Bias", "Privacy", "Clinical use"):
        section = text.split(f"\n## {risk}\n")[1].split("\n## ")[0]
        assert re.search(r"^(Measured|Done):", section, re.MULTILINE), risk
        assert re.search(r"^Not (measured|done):", section, re.MULTILINE), risk
