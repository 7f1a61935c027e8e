"""METEOR through one Java process: alive after anything, gone at the end. Equality is in test_metrics.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from raycap.errors import RunError
from raycap.evaluate.java import AHEAD, LineServer, package_file
from raycap.evaluate.meteor import MAX_TOKENS, shared

pytestmark = pytest.mark.usefixtures("needs_java")

TRAPS = [
    "",
    " ",
    "|||",
    "a ||| b ||| c",
    "EVAL ||| 1 2",
    "a\nb",
    "a\rb",
    "a\u2028b",
    "😀",
    "x" * 10_000,
    "\x00",
    "\ud83d",
    "日本 語",
]


def test_identical_and_unlike():
    corpus, each = shared().score(
        ["a man rides a horse", "purple dreams"], [["a man rides a horse"], ["a bowl of rice"]]
    )
    assert each == [1.0, 0.0]
    assert 0 < corpus < 1


def test_one_process_for_all_calls():
    shared().score(["a"], [["a"]])
    first = shared().pid
    shared().score(["b"], [["b"]])
    assert shared().pid == first


@pytest.mark.parametrize("trap", TRAPS)
def test_traps_do_not_touch_their_neighbours(trap):
    _, each = shared().score(["a man", trap, "a man"], [["a man"], ["a dog", trap], ["a man"]])
    assert each[0] == each[2] == 1.0
    _, each = shared().score(["a man", "a dog", "a man"], [["a man"], [trap, "a dog"], ["a man"]])
    assert each == [1.0, 1.0, 1.0]


def test_very_long_captions_are_cut_and_said():
    with pytest.warns(UserWarning, match=f"cut to {MAX_TOKENS}"):
        _, each = shared().score(["a b c " * 700], [["a b d " * 700]])
    assert 0 < each[0] < 1


def test_nothing_to_score():
    assert shared().score([], []) == (0.0, [])


def test_a_killed_process_is_started_anew():
    shared().score(["a"], [["a"]])
    first = shared().pid
    os.kill(first, signal.SIGKILL)
    assert shared().score(["a dog sleeps", "x"], [["a dog sleeps"], ["y"]])[1] == [1.0, 0.0]
    assert shared().pid != first


def test_threads_do_not_mix_their_answers():
    texts = [f"number {n} of many" for n in range(8)]
    found: dict[int, list[float]] = {}

    def ask(n):
        found[n] = shared().score([texts[n], "zzz"], [[texts[n]], ["a"]])[1]

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(each == [1.0, 0.0] for each in found.values()) and len(found) == 8


def gone(pid, wait_s=20):
    import time

    until = time.monotonic() + wait_s
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
            with open(f"/proc/{pid}/stat") as file:
                if file.read().split(")")[-1].split()[0] == "Z":
                    return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


ECHO = "import sys\nfor line in sys.stdin:\n    print(line, end='', flush=True)\n"


@pytest.mark.parametrize(
    "end", ["pass", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "raise SystemExit(3)"]
)
def test_no_process_is_left_behind(end, tmp_path):
    """Whether Python ends well or is killed; a small program in Java's place, the handling is the same."""
    program = tmp_path / "echo.py"
    program.write_text(ECHO)
    code = f"""
        import sys
        from pathlib import Path
        from raycap.evaluate.java import LineServer
        server = LineServer([sys.executable, {str(program)!r}], Path("."), "echo")
        assert server.ask("hello") == ["hello"]
        print(server.pid, flush=True)
        {end}
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    assert gone(int(done.stdout))


def test_a_program_that_fills_its_standard_error_does_not_hang(tmp_path):
    program = tmp_path / "loud.py"
    program.write_text(
        "import sys\nfor line in sys.stdin:\n    sys.stderr.write('x' * 200_000 + '\\n')\n    print('ok', flush=True)\n"
    )
    server = LineServer([sys.executable, str(program)], tmp_path, "loud")
    assert [server.ask("a") for _ in range(5)] == [["ok"]] * 5
    server.close()


def test_a_program_that_ends_twice_says_why(tmp_path):
    program = tmp_path / "bad.py"
    program.write_text("import sys\nsys.stdin.readline()\nsys.exit('no paraphrases')\n")
    with pytest.raises(RunError, match="ended twice"):
        LineServer([sys.executable, str(program)], tmp_path, "METEOR").ask("a")
    with pytest.raises(RunError, match="cannot be started"):
        LineServer(["/nowhere/java"], tmp_path, "METEOR").ask("a")


UPPER = """
import sys
for line in sys.stdin:
    if "end" in line:
        sys.exit("that was enough")
    print(line[:9].strip().upper(), flush=True)
"""


def test_many_lines_are_answered_in_order_and_the_one_that_ends_the_program_is_found(tmp_path):
    program = tmp_path / "upper.py"
    program.write_text(UPPER)
    server = LineServer([sys.executable, str(program)], tmp_path, "upper")
    lines = [f"line {n} " + "x" * (n % 7) * 5_000 for n in range(2 * AHEAD + 3)]
    assert server.ask_each(lines) == [line[:9].strip().upper() for line in lines]
    first = server.pid
    server._process.kill()  # between two calls, and unseen until it is asked
    assert server.ask_each(["a", "b"]) == ["A", "B"] and server.pid != first
    with pytest.raises(RunError, match=r"ended twice at the same line, with code 1\. It said: .*that was enough"):
        server.ask_each(["a", "b", "the end", "c"])
    assert server.ask_each(["c"]) == ["C"]
    server.close()
    server._over = True
    with pytest.raises(RunError, match="Python ends"):
        server.ask("d")


def test_what_is_remembered_has_a_limit(monkeypatch):
    from raycap.evaluate import meteor

    monkeypatch.setattr(meteor, "_KEPT", 3)
    texts = ["a dog", "a cat", "a bus"]
    assert shared().score(texts, [[t] for t in texts])[1] == [1.0, 1.0, 1.0]
    assert shared().score([*texts, "a car", "a car"], [[t] for t in [*texts, "a car", "x"]])[1] == [1.0] * 4 + [0.0]


def test_a_missing_jar_is_named():
    with pytest.raises(RunError, match="meteor-2"):
        package_file("meteor", "meteor-2.jar")
