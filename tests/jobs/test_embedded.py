"""`python jobs/sweep.py` alone, raycap not installed: a Ray of its own, the winner's server kept until a signal."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import requests
from heads import JOB_S, ROOT, TINY, bare_python, clean_environment

from raycap.files import read_json

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def kept(folder):
    """A sweep with --keep-serving, started from elsewhere, once it serves: (process, its stderr file, url)."""
    home = folder / "home"
    home.mkdir()
    log = folder / "stderr.txt"
    command = [
        bare_python(folder / "venv"), ROOT / "jobs/sweep.py", "shapes-git", *TINY, "run.dir=here", "serve.port=0", "--keep-serving",
    ]  # fmt: skip
    # As a shell would start it: Ctrl-C goes to the group in the foreground, which is its own here.
    with open(folder / "stdout.txt", "w") as stdout, open(log, "w") as stderr:
        process = subprocess.Popen(
            command, cwd=folder, env=clean_environment(home), stdout=stdout, stderr=stderr, start_new_session=True
        )
    deadline = time.monotonic() + JOB_S
    while not (found := re.search(r"serving \S+ at (http://\S+) until Ctrl-C", log.read_text())):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.3)
    yield process, log, found.group(1)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def test_the_run_is_whole_before_it_serves(kept, folder):
    entry = read_json(folder / "here" / "run.json")
    assert entry["status"] == "finished" and (folder / "here" / "report.html").is_file()
    assert entry["sentence"] in kept[1].read_text(), "what it came to is said before the wait"


def test_the_winner_answers(kept):
    picture = next((ROOT / "tests/fixtures/mini/images").glob("*.png"))
    answer = requests.post(f"{kept[2]}/v1/captions", files={"images": picture.read_bytes()}, timeout=60).json()
    assert answer["captions"][0]["caption"]
    assert requests.get(f"{kept[2]}/v1/models", timeout=30).json()["data"][0]["id"] == "shapes-git-merged"


def test_what_raycap_chooses_listens_on_the_loopback(kept):
    """Serve does; Ray's own ports do not have a setting for it (docs/operations.md), and ask for a token."""
    port = int(kept[2].rpartition(":")[2])
    family = [psutil.Process(kept[0].pid), *psutil.Process(kept[0].pid).children(recursive=True)]
    listening = [c.laddr for p in family for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert {a.ip for a in listening if a.port == port} == {"127.0.0.1"}


def test_rays_words_are_in_the_runs_log_and_not_on_the_terminal(kept, folder):
    shown = kept[1].read_text() + (folder / "stdout.txt").read_text()
    assert not re.search(r"\(raylet\)|Token authentication is|INFO worker\.py|core_worker\.cc", shown), shown
    assert "Token authentication is enabled" in (folder / "here" / "logs" / "ray.log").read_text()


def test_no_token_is_written_to_the_home_folder(kept, folder):
    assert not (folder / "home" / ".ray" / "auth_token").exists()


def test_ctrl_c_ends_it_cleanly(kept, folder):
    process, log, url = kept
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 0, log.read_text()
    shown = log.read_text().partition("until Ctrl-C")[2]
    assert "Traceback" not in shown and "rror" not in shown, shown
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{url}/healthz", timeout=5)
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive, [p.cmdline() for p in alive]
    assert read_json(folder / "here" / "run.json")["status"] == "finished"


def test_keep_serving_of_a_finished_run_names_the_verb_for_it(kept, folder):
    done = subprocess.run(
        [sys.executable, ROOT / "jobs/sweep.py", "--resume", "here", "--keep-serving"], cwd=folder,
        env={**clean_environment(folder / "home"), "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "raycap serve here" in done.stderr
