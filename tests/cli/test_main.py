from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import raycap.cli as cli
from raycap.errors import DataError, GateError, Interrupted, RaycapError

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "ray", "transformers", "peft", "matplotlib", "rich", "numpy", "PIL")


def run(*arguments, cwd=ROOT, **environment):
    return subprocess.run(
        [sys.executable, "-m", "raycap", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
        timeout=120,
    )


def test_help_is_light():
    code = (
        "import sys; from raycap.cli import main, VERBS\n"
        "assert main(['--help']) == 0\n"
        "for verb in VERBS: assert main([verb, '--help']) == 0\n"
        f"print('HEAVY', [m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help_with_an_example_that_parses(verb, capsys):
    assert cli.main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"usage: raycap {verb}" in text and "examples:" in text
    examples = [line.strip() for line in text.splitlines() if line.strip().startswith(f"raycap {verb}")]
    assert examples
    module = cli.load_verb(verb)
    for example in examples:
        parser = cli.Parser(prog=f"raycap {verb}")
        module.add_arguments(parser)
        parser.read(example.split("   ")[0].split()[2:])


def test_the_root_help_lists_every_verb(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for verb in cli.VERBS:
        assert f"  {verb} " in text and cli.load_verb(verb).HELP in text
    assert "examples:" in text


def test_no_verb_and_version(capsys):
    assert cli.main([]) == 2
    assert "verbs:" in capsys.readouterr().err
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("raycap 0")


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["swep", "shapes-git"], "did you mean 'sweep'"),
        (["sweep", "shapes-gti"], "did you mean 'shapes-git'"),
        (["sweep", "shapes-git", "train.stepz=3"], "did you mean 'train.steps'"),
        (["sweep", "shapes-git", "lora.r=0"], "lora.r=0 must be above 0"),
        (["sweep", "shapes-git", "train.lr=fast"], "train.lr='fast' is not a finite number"),
        (["sweep", "shapes-git", "steps"], "'steps' is not a setting: write key=value"),
        (["sweep", "shapes-git", "--plian"], "did you mean '--plain'"),
        (["sweep"], "PRESET"),
        (["sweep", "shapes-git", "--resume"], "--resume needs to know which run"),
        (["sweep", "no-such.yaml"], "no settings file no-such.yaml"),
        (["sweep", "shapes-git", "--json", "--keep-serving"], "give one of them"),
        (["prepare", "no-such-folder", "--out", "x"], "neither a folder nor a preset"),
        (["prepare", "shapes-git"], "--out"),
        (["caption", "no-such-folder", "a.png"], "there is no folder no-such-folder"),
        (["serve", "tests"], "neither a run folder (no config.yaml) nor a model (no config.json)"),
        (["compare", "one"], "at least two"),
    ],
)
def test_misuse_is_one_line_with_the_remedy_and_exit_code_2(arguments, hint, capsys):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and len(captured.err.strip().splitlines()) == 1
    assert hint in captured.err
    assert captured.out == ""


class Verb:
    """A verb whose run does what a test wants."""

    NAME, HELP, EXAMPLES = "try", "for a test", "examples:\n  raycap try"

    def __init__(self, action):
        self.run = action

    @staticmethod
    def add_arguments(parser):
        pass


@pytest.fixture
def verb(monkeypatch):
    def install(action):
        monkeypatch.setitem(cli.VERBS, "try", "made:up")
        load = cli.load_verb
        monkeypatch.setattr(cli, "load_verb", lambda name: Verb(action) if name == "try" else load(name))

    return install


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("row 3 is cut"), 1),
        (GateError("too low"), 1),
        (Interrupted("stopped"), 130),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(verb, error, code, capsys):
    def action(args):
        raise error

    verb(action)
    assert cli.main(["try"]) == code
    captured = capsys.readouterr()
    if isinstance(error, RaycapError):
        assert captured.err == f"error: {error.message}\n"
    assert "Traceback" not in captured.err


def test_an_error_of_ours_is_found_inside_one_from_a_worker(verb, capsys):
    class TaskError(Exception):
        cause = DataError("shard 2 is damaged")

    def action(args):
        raise RuntimeError("outer") from TaskError("a long remote traceback")

    verb(action)
    assert cli.main(["try"]) == 1
    assert capsys.readouterr().err == "error: shard 2 is damaged\n"


def test_a_fault_of_ours_is_one_line_and_its_traceback_is_kept(verb, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("RAYCAP_DEBUG", raising=False)

    def action(args):
        raise ZeroDivisionError("by\nzero")

    verb(action)
    assert cli.main(["try"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: unexpected ZeroDivisionError: by zero\n") and "Traceback" not in message
    (kept,) = tmp_path.iterdir()
    assert str(kept) in message and "raise ZeroDivisionError" in kept.read_text()

    monkeypatch.setenv("RAYCAP_DEBUG", "1")
    assert cli.main(["try"]) == 1
    assert "raise ZeroDivisionError" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-m", "raycap", "sweep", "shapes-git", "tune.trials=3000", "--dry-run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    process.stdout.readline()
    process.stdout.close()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and errors == b""


def test_a_verb_is_refused_twice():
    with pytest.raises(ValueError, match="already"):
        cli.register("sweep", "elsewhere")


def test_from_the_shell():
    done = run("sweep", "shapes-gti")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no preset 'shapes-gti'")


@pytest.mark.parametrize("job", ["prepare", "train", "sweep", "evaluate", "serve"])
def test_jobs_are_thin_and_run_where_raycap_is_not_installed(job, tmp_path):
    path = ROOT / "jobs" / f"{job}.py"
    assert len(path.read_text().splitlines()) < 40
    assert f"python jobs/{job}.py" in path.read_text()
    code = (
        "import runpy, sys\n"
        "class Hide:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == 'raycap' and {str(ROOT)!r} not in sys.path:\n"
        "            raise ModuleNotFoundError('hidden', name='raycap')\n"
        "sys.meta_path.insert(0, Hide())\n"
        f"sys.argv = [{str(path)!r}, '--help']\n"
        f"sys.path.insert(0, {str(path.parent)!r})\n"  # as `python jobs/...` has it
        f"runpy.run_path({str(path)!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"usage: raycap {job}" in done.stdout
