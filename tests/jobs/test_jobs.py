"""`ray job submit` against a head on this machine: package not installed, then installed; stopped, resumed, refused."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import requests
from heads import JOB_S, ROOT, TINY, bare_python, clean_environment, free_ports, install, start_head, stop_head

from raycap.files import read_json

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def head(folder):
    """Without a token, and where raycap is not installed."""
    python = bare_python(folder / "venv")
    bare = subprocess.run(
        [python, "-c", "import raycap"], capture_output=True, cwd=folder, env=clean_environment(folder)
    )
    assert bare.returncode, "raycap is importable where it was not installed"
    found, process = start_head(folder, python, first_worker_port=21000, RAY_AUTH_MODE="disabled")
    yield found
    stop_head(process)


@pytest.fixture(scope="module")
def first(head):
    """A whole sweep by an upload of this folder, with a relative run.dir: (its log, where the run must be)."""
    status = head.submit("first", "python", "jobs/sweep.py", "shapes-git", *TINY, "run.dir=results/first")
    assert status == "SUCCEEDED", head.logs("first")
    return head.logs("first"), head.home / "results" / "first"


@pytest.fixture(scope="module")
def installed(head, first, folder):
    """The same head, after the package was installed there."""
    install(head.python, folder / "install")
    return head


def wait_for(what: Callable[[], object], why: Callable[[], str], seconds: float = JOB_S) -> object:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, why()
        time.sleep(0.3)
    return found


def test_a_sweep_succeeds_where_raycap_is_not_installed_and_its_folder_stays(first):
    log, run = first
    entry = read_json(run / "run.json")
    assert entry["status"] == "finished" and "served" in entry["metrics"]["test"]
    assert (
        f"run folder: {run}" in log and (run / "report.html").is_file() and (run / "best/merged/config.json").is_file()
    )
    assert "_ray_pkg_" not in (run / "report.html").read_text(), "no path of a copy that Ray deletes"


def test_a_wrong_setting_fails_in_the_same_words_as_locally(head):
    wrong = ("shapes-git", "train.stepz=6")
    assert head.submit("wrong", "python", "jobs/sweep.py", *wrong) == "FAILED" and head.exit_code("wrong") == 2
    local = subprocess.run(
        [head.python, "jobs/sweep.py", *wrong],
        cwd=ROOT,
        env=clean_environment(head.home),
        capture_output=True,
        text=True,
    )
    assert local.returncode == 2 and "did you mean 'train.steps'" in local.stderr
    assert local.stderr.strip() in head.logs("wrong")


def test_a_folder_that_stayed_at_home_is_explained(head):
    assert (
        head.submit("away", "python", "jobs/sweep.py", "photos-git-tiny", "data.source=../data/my-photos") == "FAILED"
    )
    assert "data.source=../data/my-photos" in head.logs("away") and "absolute path that all nodes see" in head.logs(
        "away"
    )


def test_no_arguments_run_shapes_git_and_raycap_home_says_where(head, folder):
    kept = folder / "kept"
    head.submit("plain", "python", "jobs/sweep.py", wait=False, environment={"RAYCAP_HOME": str(kept)})
    run = kept / "results" / "shapes-git"
    wait_for((run / "config.yaml").is_file, lambda: head.logs("plain"), 90)
    assert head.stop("plain") == "STOPPED"
    assert f"python jobs/sweep.py --resume {run}" in head.logs("plain")
    assert read_json(run / "run.json")["status"] == "interrupted"


def test_prepare_evaluate_and_train_are_jobs_too(head, first):
    shards = head.home / "shards"
    prepare = ("python", "jobs/prepare.py", "shapes-git", "data.shapes_images=8,8,8", "--out", "shards")
    assert head.submit("prepare", *prepare) == "SUCCEEDED", head.logs("prepare")
    assert read_json(shards / "manifest.json")["counts"] == {"train": 8, "val": 8, "test": 8}
    evaluate = (
        "python",
        "jobs/evaluate.py",
        "results/first",
        "--split",
        "val",
        f"data.source={shards}",
        "--out",
        "scored",
    )
    assert head.submit("evaluate", *evaluate) == "SUCCEEDED", head.logs("evaluate")
    assert read_json(head.home / "scored" / "metrics.json")["images"] == 8
    train = ("python", "jobs/train.py", "shapes-git", "lora.r=4", "--dry-run")
    assert head.submit("train", *train) == "SUCCEEDED" and re.search(r"t00 +4 ", head.logs("train"))


def test_serve_answers_until_the_job_is_stopped(head, first):
    port = free_ports(1)[0]
    head.submit("serve", "python", "jobs/serve.py", "results/first", f"serve.port={port}", wait=False)
    wait_for(lambda: f"http://127.0.0.1:{port}" in head.logs("serve"), lambda: head.logs("serve"), 120)
    picture = next((ROOT / "tests/fixtures/mini/images").glob("*.png"))
    answer = requests.post(
        f"http://127.0.0.1:{port}/v1/captions", files={"images": picture.read_bytes()}, timeout=60
    ).json()
    assert answer["captions"][0]["caption"]
    assert head.stop("serve") == "STOPPED"
    with pytest.raises(requests.ConnectionError):
        requests.get(f"http://127.0.0.1:{port}/healthz", timeout=5)


def test_a_stopped_job_is_resumed_where_raycap_is_installed_and_nothing_is_uploaded(installed, folder):
    run = folder / "stopped"
    settings = [*(s for s in TINY if not s.startswith("train.steps")), "train.steps=150", "tune.scheduler=none"]
    command = ("python", "-m", "raycap", "sweep")
    installed.submit(
        "long", *command, "shapes-git", *settings, "run.name=stopped", f"run.dir={run}", upload=False, wait=False
    )

    seen = set()

    def trained() -> bool:
        scraped = requests.get(installed.metrics, timeout=10).text
        seen.update(re.findall(r'^(ray_raycap_\w+){.*run="stopped"', scraped, re.MULTILINE))
        file = run / "checkpoints" / "trials.json"
        return file.is_file() and any(0 < t["steps"] < 150 for t in read_json(file)["trials"])

    wait_for(trained, lambda: installed.logs("long"))
    assert installed.stop("long") == "STOPPED"
    assert f"raycap sweep --resume {run}" in installed.logs("long"), installed.logs("long")
    assert read_json(run / "run.json")["status"] == "interrupted"
    # Every ten seconds at most; what is known from the start has been exported by the time the first step is trained.
    assert "ray_raycap_trial_step" in seen
    before = {t["trial_id"]: t["steps"] for t in read_json(run / "checkpoints" / "trials.json")["trials"]}
    assert any(0 < steps < 150 for steps in before.values())
    assert installed.submit("resumed", *command, "--resume", str(run), upload=False) == "SUCCEEDED", installed.logs(
        "resumed"
    )
    entry = read_json(run / "run.json")
    assert entry["status"] == "finished" and (run / "run.1.json").is_file()
    log = (run / "logs" / "pack-0.log").read_text()
    assert re.search(r"resumed t0\d at step \d+", log), log


@pytest.fixture(scope="module")
def token_head():
    folder = Path(tempfile.mkdtemp(prefix="rt-", dir="/tmp"))
    (folder / "token").write_text("0123456789abcdef" * 4)
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    found, process = start_head(folder, bare_python(folder / "venv"), first_worker_port=21100, **token)
    yield found
    stop_head(process)
    shutil.rmtree(folder, ignore_errors=True)


MODEL = ("raycap/models/tiny/git", "data.shapes_images=8,8,8", "evaluate.metrics=cider")


def test_a_job_runs_where_a_token_is_asked_for(token_head):
    assert token_head.submit("token", "python", "jobs/evaluate.py", *MODEL) == "SUCCEEDED", token_head.logs("token")
    assert "on test, 8 images" in token_head.logs("token")


def test_a_wrong_token_is_told_as_such(token_head, tmp_path):
    wrong = tmp_path / "wrong"
    wrong.write_text("f" * 64)
    submitted = token_head.ray(
        "job", "submit", "--address", token_head.dashboard, "--", "true", RAY_AUTH_TOKEN_PATH=str(wrong)
    )
    assert submitted.returncode and "token" in submitted.stderr and "invalid" in submitted.stderr.lower()
    attached = subprocess.run(
        [token_head.python, "jobs/evaluate.py", *MODEL], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**token_head.environment, "RAY_ADDRESS": token_head.gcs, "RAY_AUTH_TOKEN_PATH": str(wrong)},
    )  # fmt: skip
    assert attached.returncode == 1
    told = attached.stderr.strip().splitlines()[-1]
    assert told.startswith("error:") and "token" in told and "RAY_AUTH_TOKEN_PATH" in told and os.fspath(wrong) in told
