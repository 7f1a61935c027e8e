from __future__ import annotations

import io

import pytest

from raycap.report.live import Progress
from raycap.report.livetable import clock, duration, sci, setting


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def snapshot(trials, **more):
    ended = sum(t["state"] in ("finished", "stopped", "diverged", "failed") for t in trials)
    totals = {"done": ended, "total": len(trials), "rate": 50.0, "steps_left": 100, "eta": 90}
    return {"trials": trials, **totals, "notes": [], **more}


def test_plain_says_phases_ends_and_totals_and_nothing_twice(trials):
    now = [0.0]
    out = io.StringIO()
    progress = Progress("shapes-git", plain=True, stream=out, clock=lambda: now[0])
    progress.phase("prepare", "images")
    progress.phase("sweep")
    running = [{**t, "state": "running"} for t in trials]
    progress.trials(snapshot(running))
    progress.trials(snapshot(running))
    now[0] = 4
    tokens = {"val": {"captions": 9, "captions_cut": 2, "limit": 7, "tokens": 40, "unknown_share": 0.05}}
    for _ in range(2):
        progress.trials(snapshot(trials, notes=["pack-0: restarted"], tokens=tokens))
    now[0] = 11
    progress.trials(snapshot(trials, notes=["pack-0: restarted"]))
    progress.done("all done")
    lines = out.getvalue().splitlines()
    assert lines[0] == "[0:00] prepare: images"
    assert sum("restarted" in line for line in lines) == 1
    (cut,) = [line for line in lines if "captions cut" in line]
    assert cut.endswith("val: 2 of 9 captions cut at 7 tokens; 40 tokens, 5.00% of them unknown")
    for trial in trials:
        said = [line for line in lines if f" {trial['trial_id']} {trial['state']}" in line]
        assert len(said) == 1 and sci(trial["lr"]) in said[0]
    assert sum("of 4 trials done" in line for line in lines) == 2, "once at the start, once ten seconds later"
    assert lines[-1] == "[0:11] all done"
    assert "\x1b" not in out.getvalue()


def test_plain_counts_now_and_then_and_at_the_end():
    now = [0.0]
    out = io.StringIO()
    progress = Progress(plain=True, stream=out, clock=lambda: now[0])
    progress.phase("prepare")
    for done in range(101):
        now[0] = done / 10
        progress.count(done, 100, "rows")
    counted = [line for line in out.getvalue().splitlines() if "of 100" in line]
    assert len(counted) == 2 and counted[-1].endswith("100 of 100 · rows")


def test_no_terminal_means_plain(trials):
    progress = Progress(stream=io.StringIO())
    assert progress.plain
    progress.done()
    progress.done()


def test_a_terminal_gets_the_table_and_keeps_the_last_one(trials, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "110")
    monkeypatch.setenv("LINES", "40")
    out = Terminal()
    with Progress("shapes-git", stream=out, steps=90) as progress:
        assert not progress.plain
        progress.phase("sweep")
        progress.trials(snapshot(trials))
        progress.line("pack-0: restarted [not markup]")
    text = out.getvalue()
    for expected in ("t00", "t03", "diverged", "★ best", "collapsed", "2.15e-3", "0.900 ± 0.050"):
        plain = _without_escapes(text)
        assert expected in plain, expected
    assert "[not markup]" in plain
    assert text.rstrip().endswith("\x1b[?25h") or "\x1b[?25h" in text, "the cursor comes back"


def test_a_small_terminal_shows_those_that_matter(trials):
    from rich.console import Console

    from raycap.report.livetable import draw

    many = [{**trials[n % 4], "trial_id": f"t{n:03d}", "state": "waiting", "cider": None} for n in range(200)]
    many[150]["state"], many[160] = "running", {**trials[1], "trial_id": "t160"}
    progress = Progress(plain=True, stream=io.StringIO())
    progress.trials(snapshot(many))
    console = Console(file=io.StringIO(), width=80, height=20, force_terminal=True)
    console.print(draw(progress, console))
    lines = _without_escapes(console.file.getvalue()).splitlines()
    text = "\n".join(lines)
    assert len(lines) <= 20
    assert "t150" in text and "t160" in text and "and 190 more: 190 waiting" in text
    assert max(map(len, lines)) <= 80


def test_without_utf8_everything_is_ascii(trials):
    from rich.console import Console

    from raycap.report.livetable import draw

    class Latin(io.StringIO):
        encoding = "ascii"

    progress = Progress(plain=True, stream=io.StringIO())
    progress.phase("sweep")
    progress.trials(snapshot(trials))
    console = Console(file=Latin(), width=110, height=40, force_terminal=True)
    console.print(draw(progress, console))
    console.file.getvalue().encode("ascii")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.6, "1 min 00 s"), (125, "2 min 05 s"), (7260, "2 h 01 min"), (None, "?")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_learning_rate_keeps_its_digits():
    assert [sci(v) for v in (1e-3, 2.15e-3, 1.5e-4, 20.0)] == ["1e-3", "2.15e-3", "1.5e-4", "2e1"]
    assert clock(3725) == "1:02:05"


def _without_escapes(text: str) -> str:
    import re

    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_a_trial_is_named_by_the_kind_of_its_adapter():
    trial = {"rank": 8, "alpha": 16.0, "lr": 2e-3, "dropout": 0.1, "variant": "lora", "prompt_tokens": 0}
    assert setting(trial) == "rank 8, alpha 16, lr 2e-3, dropout 0.1"
    assert setting({k: trial[k] for k in ("rank", "alpha", "lr", "dropout")}) == setting(trial)  # of an earlier version
    assert setting({**trial, "variant": "dora"}) == "DoRA of rank 8, alpha 16, lr 2e-3, dropout 0.1"
    assert setting({**trial, "variant": "prompt", "prompt_tokens": 20}) == "prompt of 20 tokens, lr 2e-3"
