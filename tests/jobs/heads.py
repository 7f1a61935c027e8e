"""A Ray head as a person starts one, with its own home, ports and temporary folder, ended by its own process id."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import venv
from dataclasses import dataclass
from pathlib import Path

import requests

ROOT = Path(__file__).resolve().parents[2]
UP_S, JOB_S = 90, 420
STARTS = 3
"""Tries to start a head: its ports were free when they were asked for, and may be taken when Ray binds them."""
OTHERS_PORTS = range(22_000, 32_000)
"""Where nothing takes a port by chance: above Ray's workers' and the heads', below what the system hands out."""
TINY = [
    "data.shapes_images=64,24,24", "train.steps=6", "train.batch=4", "train.warmup_steps=1", "train.val_images=12",
    "tune.trials=2", "tune.slots=2", "tune.default_trial=false", "evaluate.resamples=100", "evaluate.metrics=cider",
    "decode.max_new_tokens=6",
]  # fmt: skip


def clean_environment(home: Path, **more: str) -> dict[str, str]:
    """This process's environment without what Ray, raycap or Python's path would take from it."""
    mine = ("RAY", "PYTHON", "OMP_", "PYTEST")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(mine)}
    return {**kept, "HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0", "RAYCAP_CACHE": str(home / "cache"), **more}


def bare_python(folder: Path) -> Path:
    """An environment with all that raycap needs, and without raycap (an editable installation is not followed)."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    inner = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    outer = [p for p in sys.path if p.endswith("site-packages")]
    (Path(inner) / "outer.pth").write_text("\n".join(outer) + "\n")
    return python


def install(python: Path, folder: Path) -> None:
    """Install this repository's raycap, and nothing else, as a wheel would be."""
    source = folder / "source"
    source.mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    shutil.copytree(ROOT / "raycap", source / "raycap", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", source],
        capture_output=True, text=True, env=clean_environment(folder), cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@dataclass(frozen=True, slots=True)
class Head:
    """A running head; `submit` is `ray job submit` from a shell, in the root of this repository."""

    python: Path
    folder: Path
    gcs: str
    dashboard: str
    metrics: str
    agent_port: int
    environment: dict[str, str]

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def words(self) -> str:
        """The ends of what the head and the parts of Ray whose end would be its own have written."""
        logs = [self.folder / "head.log"]
        for name in ("raylet.out", "raylet.err", "dashboard_agent.log", "dashboard.log", "gcs_server.out"):
            logs += (self.folder / "ray").glob(f"session_2*/logs/{name}")
        return "\n".join(f"-- {log}\n{log.read_text(errors='replace')[-1500:]}" for log in logs if log.is_file())

    def ray(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", *arguments],
            env={**self.environment, "PYTHONPATH": "", **environment}, cwd=ROOT,
            capture_output=True, text=True, timeout=JOB_S,
        )  # fmt: skip

    def submit(
        self,
        name: str,
        *entrypoint: str,
        upload: bool = True,
        wait: bool = True,
        environment: dict[str, str] | None = None,
    ) -> str:
        """Status of the job when it has ended ("" without `wait`)."""
        where = ["--working-dir", "."] if upload else []
        given = ["--runtime-env-json", json.dumps({"env_vars": environment})] if environment else []
        done = self.ray(
            "job", "submit", "--address", self.dashboard, "--submission-id", name, *where, *given,
            *([] if wait else ["--no-wait"]), "--", *entrypoint,
        )  # fmt: skip
        if not wait:
            assert done.returncode == 0, done.stdout + done.stderr
            return ""
        status = self.status(name)
        assert (done.returncode == 0) == (status == "SUCCEEDED"), done.stdout[-3000:] + done.stderr[-3000:]
        return status

    def stop(self, name: str) -> str:
        """What `ray job stop` asks the job server, without the two seconds in which its command line starts."""
        requests.post(f"{self.dashboard}/api/jobs/{name}/stop", timeout=30).raise_for_status()
        deadline = time.monotonic() + 90
        while (status := self.status(name)) in ("PENDING", "RUNNING") and time.monotonic() < deadline:
            time.sleep(0.2)
        return status

    def status(self, name: str) -> str:
        return self._get(f"/api/jobs/{name}")["status"]

    def exit_code(self, name: str) -> int | None:
        return self._get(f"/api/jobs/{name}")["driver_exit_code"]

    def logs(self, name: str) -> str:
        return self._get(f"/api/jobs/{name}/logs")["logs"]

    def _get(self, path: str) -> dict:
        token = Path(self.environment.get("RAY_AUTH_TOKEN_PATH", os.devnull)).read_text().strip()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            answer = requests.get(self.dashboard + path, headers=headers, timeout=30)
        except requests.ConnectionError as error:
            raise AssertionError(f"the head at {self.dashboard} does not answer: {error}\n{self.words()}") from error
        answer.raise_for_status()
        return answer.json()


def free_ports(count: int) -> list[int]:
    """Outside the system's own range, of which any process on the machine may be given one meanwhile."""
    found: list[int] = []
    for port in random.sample(OTHERS_PORTS, len(OTHERS_PORTS)):
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        found.append(port)
        if len(found) == count:
            return found
    raise AssertionError(f"fewer than {count} free ports in {OTHERS_PORTS}")


def start_head(
    folder: Path, python: Path, *, first_worker_port: int, **environment: str
) -> tuple[Head, subprocess.Popen]:
    """A head that takes jobs; one that dies on its way there is started again on other ports, and says why if none lives."""
    home = folder / "home"
    home.mkdir()
    path = os.pathsep.join([str(python.parent), os.environ["PATH"]])
    environment = clean_environment(home, PATH=path, RAY_JOB_STOP_WAIT_TIME_S="60", **environment)
    for _ in range(STARTS):
        head, process = _start(folder, python, first_worker_port, environment)
        if _up(head, process):
            return head, process
        stop_head(process)
    raise AssertionError(f"no head in {STARTS} tries; the last one's words:\n{head.words()}")


def _start(
    folder: Path, python: Path, first_worker_port: int, environment: dict[str, str]
) -> tuple[Head, subprocess.Popen]:
    gcs, dashboard, client, metrics, agent, agent_grpc = free_ports(6)
    command = [
        python, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=3", f"--temp-dir={folder / 'ray'}",
        f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}",
        f"--metrics-export-port={metrics}", f"--dashboard-agent-listen-port={agent}",
        f"--dashboard-agent-grpc-port={agent_grpc}", f"--min-worker-port={first_worker_port}",
        f"--max-worker-port={first_worker_port + 99}", "--object-store-memory=200000000",
    ]  # fmt: skip
    with open(folder / "head.log", "w") as log:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    at = "http://127.0.0.1"
    return Head(
        python, folder, f"127.0.0.1:{gcs}", f"{at}:{dashboard}", f"{at}:{metrics}/metrics", agent, environment
    ), process


def _up(head: Head, process: subprocess.Popen) -> bool:
    """Whether the head came to take jobs: its agent starts last, and the node ends with it."""
    deadline = time.monotonic() + UP_S
    asked = (f"{head.dashboard}/api/gcs_healthz", f"http://127.0.0.1:{head.agent_port}/api/local_raylet_healthz")
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if all(requests.get(url, timeout=2).ok for url in asked):
                return True
        except requests.RequestException:
            pass
        time.sleep(0.3)
    return False


def stop_head(process: subprocess.Popen) -> None:
    """Ends with all of its processes; what would stay is in its session, and nobody else is."""
    process.terminate()
    try:
        process.wait(60)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
