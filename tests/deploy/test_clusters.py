"""The three ways to a cluster, against what Ray itself makes of them, and against this repository's pins."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
AWS, ONPREM, KUBERAY = ROOT / "cluster.yaml", ROOT / "deploy/cluster-onprem.yaml", ROOT / "deploy/kuberay.yaml"
GPU_INSTANCES = re.compile(r"^(g4dn|g5|g6|g6e|gr6|p4d|p4de|p5|p5e)\.\w+$")


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().split()
    return {name.lower().replace("_", "-"): version for name, version in (line.split("==") for line in lines)}


def image_tag() -> str:
    python = re.search(r'requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text()).group(1)
    return f"{pins()['ray']}-py3{python}-gpu"


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def ray_cluster() -> dict[str, Any]:
    return next(d for d in yaml.safe_load_all(KUBERAY.read_text()) if d["kind"] == "RayCluster")


def check(config: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` does with a file before it talks to anybody; the names are private to Ray, so only here."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(config)
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize("path", [AWS, ONPREM], ids=lambda p: p.name)
def test_launcher_files_pass_rays_own_schema(path):
    prepared = check(load(path))
    assert sum(t["max_workers"] for t in prepared["available_node_types"].values()) >= 2, "three nodes with the head"
    assert prepared["idle_timeout_minutes"] > 0


@pytest.mark.parametrize("path", [AWS, ONPREM], ids=lambda p: p.name)
def test_rays_schema_would_catch_a_typo(path):
    from jsonschema import ValidationError

    config = load(path)
    config["max_worker"] = config.pop("max_workers")
    with pytest.raises(ValidationError):
        check(config)


def test_aws_nodes_have_gpus_an_image_and_room():
    config = load(AWS)
    assert config["docker"]["image"] == f"rayproject/ray:{image_tag()}"
    types = config["available_node_types"]
    assert config["head_node_type"] in types
    for name, node in types.items():
        assert GPU_INSTANCES.match(node["node_config"]["InstanceType"]), name
        assert node["resources"]["GPU"] >= 1, name
        assert node["node_config"]["ImageId"].startswith("ami-"), name
        assert node["node_config"]["BlockDeviceMappings"][0]["Ebs"]["VolumeSize"] >= 100, name
    worker = next(node for name, node in types.items() if name != config["head_node_type"])
    assert worker["min_workers"] == 0 and worker["max_workers"] == config["max_workers"], "workers come and go"


@pytest.mark.parametrize("path", [AWS, ONPREM], ids=lambda p: p.name)
def test_every_node_installs_this_package_sees_the_storage_and_asks_for_a_token(path):
    config = load(path)
    setup = "\n".join(config["setup_commands"])
    assert "--constraint constraints.txt ." in setup
    assert "/shared" in setup
    assert "." in config["file_mounts"].values()
    assert any(remote.endswith(".ray/auth_token") for remote in config["file_mounts"])
    for kind in ("head", "worker"):
        start = "\n".join(config[f"{kind}_start_ray_commands"])
        assert "RAY_AUTH_MODE=token" in start and "RAYCAP_CACHE=/shared/cache RAYCAP_HOME=/shared" in start
    head = "\n".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head
    assert int(re.search(r"RAY_JOB_STOP_WAIT_TIME_S=(\d+)", head).group(1)) >= 60


@pytest.mark.parametrize("path", [AWS, ONPREM], ids=lambda p: p.name)
def test_nothing_of_the_package_is_left_behind_by_rsync(path):
    """A pattern without a slash in front matches at any depth: `data` would drop raycap/data."""
    names = {part for file in (ROOT / "raycap").rglob("*") for part in file.relative_to(ROOT).parts}
    names -= {"__pycache__"}
    for pattern in load(path)["rsync_exclude"]:
        if not pattern.startswith("/"):
            assert not [name for name in names if fnmatch(name, pattern)], pattern


def test_a_job_takes_the_whole_package_along_and_nothing_big():
    """What `ray job submit --working-dir .` uploads, by Ray's own reading of .rayignore and .gitignore."""
    from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

    left_behind = get_excludes_from_ignore_files(ROOT, include_gitignore=True)

    def goes(name: str) -> bool:
        path = ROOT / name
        return not any(skip(p) for skip in left_behind for p in (path, *path.parents) if p.is_relative_to(ROOT))

    modules = [f.relative_to(ROOT).as_posix() for f in (ROOT / "raycap").rglob("*.py")]
    for name in [
        "jobs/sweep.py",
        "raycap/models/tiny/git/model.safetensors",
        "raycap/presets/shapes-git.yaml",
        *modules,
    ]:
        assert goes(name), name
    for name in ("results/LOG.md", "tests/conftest.py", ".venv/bin/python"):
        assert not goes(name), name


def test_the_zip_that_a_job_uploads_has_the_code_and_no_data(tmp_path):
    """Made by Ray's own packaging, from a checkout in which somebody has worked."""
    from ray._private.runtime_env.packaging import create_package

    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "raycap", checkout / "raycap")
    shutil.copytree(ROOT / "jobs", checkout / "jobs")
    for name in (".rayignore", ".gitignore", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, checkout / name)
    home = ["data/photos/a.jpg", "results/shapes-git/best/merged/model.safetensors", "results/LOG.md", ".venv/bin/python",
            ".git/config", "tests/test_x.py", "docs/report.png", "raycap.egg-info/PKG-INFO", ".pytest_cache/x"]  # fmt: skip
    for name in home:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("x")
    create_package(str(checkout), tmp_path / "upload.zip", include_gitignore=True, excludes=[])
    with zipfile.ZipFile(tmp_path / "upload.zip") as archive:
        uploaded = {name for name in archive.namelist() if not name.endswith("/")}
    assert not uploaded & set(home)
    code = {
        f.relative_to(ROOT).as_posix() for top in ("raycap", "jobs") for f in (ROOT / top).rglob("*") if f.is_file()
    }
    assert {name for name in code if "__pycache__" not in name} <= uploaded
    assert uploaded - code <= {".rayignore", ".gitignore", "pyproject.toml", "constraints.txt"}
    assert (tmp_path / "upload.zip").stat().st_size < 20 * 2**20, "Ray refuses 100 MiB"


def test_aws_mounts_one_file_system_in_both_places():
    systems = re.findall(r"fs-[\w-]+\.efs\.([\w-]+)\.amazonaws", AWS.read_text())
    assert systems == [load(AWS)["provider"]["region"]] * 2
    assert "--volume /shared:/shared" in load(AWS)["docker"]["run_options"]


def test_onprem_activates_its_environment_in_every_command_that_needs_it():
    config = load(ONPREM)
    assert config["max_workers"] == len(config["provider"]["worker_ips"])
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert all(command.startswith("source ~/raycap-venv/bin/activate") for command in config[key])
    for command in config["setup_commands"]:
        assert "pip" not in command or command.startswith("source ~/raycap-venv/bin/activate")


def test_kuberay_gives_rays_autoscaler_what_it_needs():
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    cluster = ray_cluster()
    derived = _derive_autoscaling_config_from_ray_cr(cluster)
    head, worker = derived["available_node_types"].values()
    assert derived["max_workers"] == 2 and derived["idle_timeout_minutes"] == 10
    for node in (head, worker):
        assert node["resources"]["GPU"] == 1 and node["resources"]["CPU"] >= 4 and node["resources"]["memory"] > 8e9
    assert cluster["spec"]["rayVersion"] == pins()["ray"]
    assert cluster["spec"]["authOptions"] == {"mode": "token"}


def test_kuberay_pods_share_the_image_and_the_storage():
    claim = next(d for d in yaml.safe_load_all(KUBERAY.read_text()) if d["kind"] == "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    spec = ray_cluster()["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        container = pod["containers"][0]
        assert container["image"].endswith(":" + image_tag())
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert {"name": "RAYCAP_CACHE", "value": "/shared/cache"} in container["env"]
        assert {"name": "RAYCAP_HOME", "value": "/shared"} in container["env"]
        assert "/shared" in [mount["mountPath"] for mount in container["volumeMounts"]]
        claims = [v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
        assert claims == [claim["metadata"]["name"]]


def test_dockerfile_starts_from_the_pinned_ray():
    lines = (ROOT / "deploy/Dockerfile").read_text().splitlines()
    assert f"FROM rayproject/ray:{image_tag()}" in lines
    assert any("--constraint constraints.txt ." in line for line in lines)


def test_constraints_pin_every_direct_requirement_within_its_range():
    """What the full installation below would find out in minutes: a pin that pyproject.toml forbids, or a missing one."""
    import tomllib

    from packaging.requirements import Requirement

    pinned = pins()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in project["dependencies"]:
        wanted = Requirement(text)
        name = wanted.name.lower().replace("_", "-")
        assert name in pinned, f"constraints.txt does not pin {name}"
        assert wanted.specifier.contains(pinned[name]), f"{text} forbids the pinned {pinned[name]}"


def clean_machine(tmp_path: Path) -> dict[str, str]:
    """The environment of a node after file_mounts: a home with the repository's files and a token, a storage folder."""
    home, storage = tmp_path / "home", tmp_path / "shared"
    source = home / "raycap"
    source.mkdir(parents=True)
    storage.mkdir()
    skip = shutil.ignore_patterns(".git", ".venv", "__pycache__", "results", "data", "*.egg-info", "tests")
    for entry in ("pyproject.toml", "README.md", "LICENSE", "constraints.txt", "raycap", "jobs"):
        # `data` is a package of ours too: only the folder at the root is left behind.
        ignore = shutil.ignore_patterns("__pycache__") if entry == "raycap" else skip
        if (ROOT / entry).is_dir():
            shutil.copytree(ROOT / entry, source / entry, ignore=ignore)
        else:
            shutil.copy(ROOT / entry, source / entry)
    (home / ".ray").mkdir()
    (home / ".ray/auth_token").write_text("0" * 64)
    (home / ".bashrc").touch()
    kept = {k: v for k, v in os.environ.items() if k.startswith(("LANG", "LC_", "TMP", "http", "HTTP", "PIP_", "SSL"))}
    return {**kept, "HOME": str(home), "RAYCAP_STORAGE": str(storage), "RAY_USAGE_STATS_ENABLED": "0"}


def borrow_dependencies(python: Path) -> None:
    """Let a clean environment import what this one has, but not its raycap (an editable installation's hook is not
    followed from a .pth of another environment)."""
    outer = [p for p in sys.path if p.endswith("site-packages")]
    inner = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    for old in Path(inner).glob("setuptools*"):
        shutil.rmtree(old)  # ensurepip's, too old to build this package, would be found first
    (Path(inner) / "outer.pth").write_text("\n".join(outer) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("path", [AWS, ONPREM], ids=lambda p: p.name)
def test_setup_commands_run_in_a_clean_environment(path, tmp_path):
    """Every setup command, word for word, as a node's shell would run it; afterwards the package is there and works.

    The dependencies are borrowed from this environment, so that the test takes seconds and no network.
    RAYCAP_RUN_SETUP=1 downloads and installs all of them instead: some minutes and 7 GB for each file.
    """
    full = os.environ.get("RAYCAP_RUN_SETUP") == "1"
    if not full and int(metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("building without a network needs setuptools 77 here; RAYCAP_RUN_SETUP=1 installs everything")
    environment = clean_machine(tmp_path)
    home = Path(environment["HOME"])
    # The on-premise file makes its own environment there; on AWS the image's Python stands in its place.
    folder = home / "raycap-venv"
    venv.create(folder, with_pip=True, symlinks=True)
    if not full:
        borrow_dependencies(folder / "bin/python")
        environment |= {"PIP_NO_DEPS": "1", "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}
    environment["PATH"] = os.pathsep.join([str(folder / "bin"), "/usr/local/bin", "/usr/bin", "/bin"])
    environment["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    commands = load(path)["setup_commands"]
    # `ray up` runs them again when a file has changed; the quick ones are enough to see that nothing piles up.
    for command in commands + [c for c in commands if "python" not in c and "raycap doctor" not in c]:
        done = subprocess.run(
            ["bash", "-c", command], env=environment, cwd=home, capture_output=True, text=True, timeout=3600
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    where = subprocess.run(
        [folder / "bin/python", "-c", "import raycap, raycap.presets; print(raycap.__file__)"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert Path(where.strip()).is_relative_to(folder), "the installed package answers, not this repository"
    weights = list(folder.glob("lib/python*/site-packages/raycap/models/tiny/git/*.safetensors"))
    assert weights, "the shipped model is part of the installation"
    assert list(folder.glob("lib/python*/site-packages/raycap/presets/*.yaml"))
    if path == AWS:
        assert oct((home / ".ray/auth_token").stat().st_mode)[-3:] == "600"
        assert (home / ".bashrc").read_text().count("RAY_AUTH_MODE=token") == 1


def test_a_node_without_the_storage_stops_with_the_reason(tmp_path):
    for path in (AWS, ONPREM):
        first = load(path)["setup_commands"][0]
        missing = tmp_path / "nowhere"
        done = subprocess.run(
            ["bash", "-c", first], env={"RAYCAP_STORAGE": str(missing), "PATH": "/usr/bin:/bin"},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 1
        assert f"{missing} is not mounted" in done.stdout
