"""What the null benchmark measures, on an invented bank of adapters of one setting, by a few repeats."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import null_sweep


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    """48 adapters that name the right thing of about half the images, some a little more often than others."""
    rng = np.random.default_rng(0)
    things = [f"{c} {t}" for c in ("red", "blue", "green", "grey") for t in ("car", "dog", "cat", "bus")]
    references = {f"i{n}": [f"a {things[n % 16]} in place {n}", f"one {things[n % 16]} stands"] for n in range(80)}
    captions = ["a picture of something", *(own[0] for own in references.values())]
    said = [[n + 1 if rng.random() < share else 0 for n in range(80)] for share in rng.normal(0.5, 0.05, 48)]
    path = tmp_path_factory.mktemp("bank") / "bank.json"
    groups = [f"g{n // 2}" for n in range(80)]
    path.write_text(json.dumps(
        {"about": {"setting": []}, "references": references, "groups": groups, "captions": captions, "said": said}
    ))  # fmt: skip
    return path


def test_the_bank_is_read_back(bank):
    scores, groups, about = null_sweep.read_bank(bank)
    assert scores.shape == (48, 80) and len(groups) == 80 and (about["adapters"], about["groups"]) == (48, 40)
    assert about["cider"]["min"] < about["cider"]["mean"] < about["cider"]["max"] and "variant:D" in about["signature"]


def test_few_repeats_speak_seldom(bank):
    scores, groups, _ = null_sweep.read_bank(bank)
    exchange = null_sweep.exchange(scores, groups, 60, 300, seed=1)
    assert exchange["share"] <= 0.15 and exchange["low"] <= exchange["share"] <= exchange["high"]
    assert exchange["unswapped_p"] < 0.05  # the best and the worst of 48 do differ until they are swapped
    seeds = null_sweep.seeds(scores, groups, 60, 300, seed=1)
    assert seeds["setting_verdict"]["share"] <= 0.15 and seeds["sd_of_seeds"] > 0


def test_a_verdict_that_speaks_too_often_fails_the_benchmark(monkeypatch, capsys, bank):
    monkeypatch.setattr(sys, "argv", ["null_sweep.py", "--bank", str(bank), "--repeats", "20", "--resamples", "100"])
    null_sweep.main()
    found = json.loads(capsys.readouterr().out)
    assert found["repeats"] == 20 and "variant:D" in found["signature"]
    # A setting verdict that ignores seeds is found out.
    monkeypatch.setattr(
        null_sweep, "setting_bootstrap",
        lambda a, b, groups, **options: null_sweep.paired_bootstrap(a[0] * 0, np.ones_like(a[0]), groups, **options),
    )  # fmt: skip
    assert null_sweep.main() == 1


def test_captions_of_ones_own(tmp_path, monkeypatch, capsys):
    rows = [{"a": f"a dog {n}", "b": "a cat", "references": [f"a dog {n} runs", "the dog"]} for n in range(40)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["null_sweep.py", "--pairs", str(tmp_path / "pairs.jsonl"), "--repeats", "60", "--resamples", "200"]
    monkeypatch.setattr(sys, "argv", arguments)
    code = null_sweep.main()
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 40 and found["exchange"]["share"] <= 0.15
    assert code == int(found["exchange"]["share"] > 0.06)


def test_wilsons_interval():
    found = null_sweep.share(100, 2000)
    assert found["share"] == 0.05 and 0.040 < found["low"] < 0.042 and 0.060 < found["high"] < 0.061
    assert null_sweep.share(0, 10)["low"] == pytest.approx(0, abs=1e-12)
