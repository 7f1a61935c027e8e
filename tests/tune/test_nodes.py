"""A sweep over several nodes: packs on each, things in `run.storage`, and nodes that do not see what the driver sees."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import toy_engine
from PIL import Image
from s3_server import s3_server
from several_nodes import several_nodes
from simulation import settings, simulate

from raycap.config import from_dict
from raycap.train.sight import missing, sight
from raycap.tune.nodes import fits, seats, without_room

TOY = f"{toy_engine.__file__}:build_slow"
HERE = [str(Path(__file__).parent), str(Path(toy_engine.__file__).parent)]
DRIVER = """
import json, sys
sys.path[:0] = {here!r}
from raycap.config import from_dict
from raycap.errors import RaycapError
from raycap.tune.sweep import run_sweep
try:
    found = run_sweep(from_dict({tree!r}), {folder!r}, None, resume={resume!r}, engine={engine!r})
except RaycapError as error:
    print(error)
    raise SystemExit(error.exit_code)
print(json.dumps({{"states": {{r.trial_id: r.state for r in found.trials}}, "notes": found.notes}}))
"""


def plan(*, packs: int = 2, trials: int = 6, **run) -> dict:
    # Every trial to its end: with halving, who goes on depends on which pack is first.
    tree = settings(packs=packs, scheduler="none", slots=3, trials=trials).to_dict()
    tree["run"].update(run)
    tree["train"].update(checkpoint_every_s=0.3)
    return tree


def drive(nodes, tree: dict, folder: Path, *, resume: bool = False, engine: str = TOY) -> subprocess.Popen:
    code = DRIVER.format(here=HERE, tree=tree, folder=str(folder), resume=resume, engine=engine)
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=nodes.environment()
    )


def ended(driver: subprocess.Popen, timeout_s: float = 240) -> tuple[int, str]:
    try:
        said, complaints = driver.communicate(timeout=timeout_s)
    finally:
        driver.kill()
    return driver.returncode, said or complaints


def weights(adapters: Path) -> dict[str, float]:
    """What each trial came to, whatever was trained beside it."""
    return {f.parent.name: json.loads(f.read_text())["weight"] for f in sorted(adapters.glob("*/adapter.json"))}


@pytest.fixture(scope="module")
def secluded(tmp_path_factory):
    """A folder that the driver sees and the workers do not."""
    return tmp_path_factory.mktemp("secluded")


@pytest.fixture(scope="module")
def nodes(secluded):
    with several_nodes(secluded) as found:
        yield found


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same trials as one pack in one process."""
    run = simulate(toy_engine.ToyEngine, tmp_path_factory.mktemp("alone"), from_dict(plan(packs=1)))
    return weights(run.folder / "adapters")


def pack_nodes(folder: Path) -> set[str]:
    """The nodes that packs ran on, by the first line of each one's log."""
    return {
        log.read_text().split(" on ", 1)[1].split("(")[1].split(")")[0] for log in (folder / "logs").glob("pack-*.log")
    }


@pytest.mark.ray
def test_packs_spread_over_nodes_that_do_not_see_the_run_folder(nodes, secluded, tmp_path, alone):
    folder = secluded / "spread"
    code, said = ended(drive(nodes, plan(storage=str(tmp_path / "store")), folder))
    assert code == 0, said
    assert weights(folder / "checkpoints" / "adapters") == alone and len(alone) == 6
    assert set(json.loads(said.strip().splitlines()[-1])["states"].values()) == {"finished"}
    assert len(pack_nodes(folder)) == 2
    log = "".join(f.read_text() for f in (folder / "logs").glob("pack-*.log"))
    assert all(f"{trial} finished" in log for trial in alone)


@pytest.mark.ray
def test_a_node_without_the_run_folder_is_named_and_the_remedy_too(nodes, secluded):
    if not nodes.hidden:
        pytest.skip("this system does not let a test give processes another view of the disk")
    code, said = ended(drive(nodes, plan(), secluded / "unseen"))
    assert code == 1
    assert f"does not see run.dir={secluded / 'unseen'}" in said and "run.storage" in said and said.count("node ") >= 2


PREPARE = """
import json, sys, time
from pathlib import Path
from raycap.cli import main
from raycap.cluster import connect
from raycap.data.stream import run_units
from raycap.data.units import Work, run_units as results_of
from raycap.pipeline import tools

class Where(Work):
    kind = "where"
    def work(self, unit):
        import ray
        time.sleep(0.3)
        return {"node": ray.get_runtime_context().get_node_id()}

tools.PARALLEL_ROWS = 0
places = {}
with connect():
    for out in sys.argv[2:]:
        assert main(["prepare", sys.argv[1], "--out", out, "--plain", "data.rows_per_shard=20"]) == 0
        units = [{"number": str(n), "rows": 1} for n in range(12)]
        (look := Path(out) / ".look").mkdir()
        places[out] = sorted({one["node"] for one in results_of(Where(look), units, run_units, None, "")})
print(json.dumps(places))
"""


@pytest.mark.ray
def test_prepare_over_nodes_writes_the_bytes_of_one_process(nodes, secluded, tmp_path):
    """Into a folder that all nodes see, named relative to the driver's; and into one that the driver's alone sees."""
    from raycap.data.shards import prepare

    source = tmp_path / "set"
    (source / "images").mkdir(parents=True)
    chance, lines = np.random.default_rng(0), []
    for n in range(280):  # two pieces to check, fourteen to write
        picture = Image.fromarray(chance.integers(0, 255, (12, 16, 3), dtype=np.uint8))
        picture.save(source / "images" / f"{n}.png")
        split = {0: "val", 1: "test"}.get(n % 10, "train")
        lines.append(json.dumps({"image": f"{n}.png", "captions": [f"thing {n}"], "split": split}))
    (source / "captions.jsonl").write_text("\n".join(lines))
    prepare(from_dict({"data": {"source": str(source), "rows_per_shard": 20}}), tmp_path / "here")

    def contents(folder: Path) -> dict[str, bytes]:
        return {f.name: f.read_bytes() for f in folder.iterdir() if not f.name.startswith(".")}

    outs = ["shards", *([str(secluded / "shards")] if nodes.hidden else [])]
    done = subprocess.run(
        [sys.executable, "-c", PREPARE, str(source), *outs], capture_output=True, text=True, timeout=240, cwd=tmp_path,
        env=nodes.environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    places = json.loads(done.stdout.strip().splitlines()[-1])
    for out in outs:
        assert contents(tmp_path / out) == contents(tmp_path / "here"), out
    assert len(contents(tmp_path / "here")) >= 16 and len(places["shards"]) > 1
    if nodes.hidden:
        assert len(places[outs[1]]) == 1
        assert "`prepare` works on 1 of 3 nodes" in done.stderr and "that all nodes of the cluster share" in done.stderr


@pytest.mark.ray
def test_a_sweep_through_an_object_store_goes_on_from_another_machine(nodes, secluded, tmp_path, alone):
    with s3_server(tmp_path) as url:
        driver = drive(nodes, plan(storage=url), secluded / "moved")
        trials = secluded / "moved" / "checkpoints" / "trials.json"
        deadline = time.monotonic() + 120
        while driver.poll() is None and time.monotonic() < deadline:
            if trials.is_file() and any(t["steps"] >= 40 for t in json.loads(trials.read_text())["trials"]):
                driver.kill()
            time.sleep(0.1)
        assert ended(driver)[0] == -9
        # Another folder, in which nothing is: what the first driver knew comes from the storage.
        other = secluded / "other machine" / "moved"
        code, said = ended(drive(nodes, plan(storage=url), other, resume=True))
        assert code == 0, said
        assert weights(other / "checkpoints" / "adapters") == alone
        logs = "".join(f.read_text() for f in (other / "logs").glob("pack-*.log"))
        assert "resumed " in logs
        code, said = ended(drive(nodes, plan(storage=url), secluded / "third" / "moved"))
        assert code == 1 and "holds another run" in said and "key:secret" not in said


@pytest.mark.slow
@pytest.mark.ray
def test_a_pack_joins_with_its_node_and_the_trials_of_a_lost_node_go_on_elsewhere(nodes, secluded, tmp_path, alone):
    """Four packs on three nodes of a CPU each: on the driver's it is the third pack, or trial clients that were first."""
    folder = secluded / "lost"
    tree = plan(packs=4, trials=6, storage=str(tmp_path / "store"))
    tree["tune"]["slots"] = 1
    driver = drive(nodes, tree, folder, engine=f"{toy_engine.__file__}:build_slower")
    trials, added = folder / "checkpoints" / "trials.json", None
    deadline = time.monotonic() + 150
    while driver.poll() is None and time.monotonic() < deadline:
        rows = json.loads(trials.read_text())["trials"] if trials.is_file() else []
        if not added and sum(row["steps"] > 0 for row in rows) >= 2:
            time.sleep(2)  # whoever finds room by itself has found it
            added = datetime.now()
            nodes.add()
        if added and any(row["state"] == "running" and 30 < row["steps"] < 70 for row in rows):
            nodes.kill(1)
            break
        time.sleep(0.1)
    code, said = ended(driver)
    assert code == 0, said
    logs = {log.stem: log.read_text() for log in (folder / "logs").glob("pack-*.log")}
    starts = {pack: datetime.fromisoformat(log[:23]) for pack, log in logs.items() if "starts: pid" in log}
    assert starts and sum(start < added for start in starts.values()) < 4, "all had room before the node came"
    assert any(start > added for start in starts.values()), "no pack joined with the node"
    notes = json.loads(said.strip().splitlines()[-1])["notes"]
    assert any("its trials go on in the other packs" in note for note in notes), notes
    assert any("over from pack-" in log for log in logs.values()), logs
    assert weights(folder / "checkpoints" / "adapters") == alone


def test_a_run_folder_that_is_not_here_is_fetched_from_the_storage(tmp_path):
    import yaml

    from raycap.cli.sweep import resumed_config
    from raycap.config import load_config
    from raycap.errors import ConfigError
    from raycap.storage import Storage

    store = f"run.storage={tmp_path / 'store'}"
    config = load_config("shapes-git", [store, "run.seed=5"])
    place = Storage.open(tmp_path / "store") / "runs" / "moved"
    place.put("config.yaml", yaml.safe_dump(config.to_dict()))
    place.put("rungs.json", "{}")
    place.put("adapters/t00/trial.json", "{}")
    place.put("adapters/t01/adapter.json", "{}")  # not whole: its last file is not there
    folder = tmp_path / "here" / "moved"
    assert resumed_config(str(folder), [store]).run.seed == 5
    assert (folder / "checkpoints" / "rungs.json").is_file()
    assert [f.name for f in (folder / "checkpoints" / "adapters").iterdir()] == ["t00"]
    with pytest.raises(ConfigError):
        resumed_config(str(tmp_path / "here" / "unknown"), [store])


def test_seats_are_one_on_each_node_before_a_second_and_the_drivers_last():
    nodes = [{"NodeID": n, "Resources": r} for n, r in {
        "a": {"CPU": 8.0, "GPU": 1.0}, "b": {"CPU": 8.0, "GPU": 2.0}, "c": {"CPU": 64.0}}.items()]  # fmt: skip
    assert seats(nodes, {"CPU": 1.0, "GPU": 1.0}, "a") == ["b", "a", "b"]
    assert seats(nodes, {"CPU": 8.0}, "c")[:3] == ["a", "b", "c"] and len(seats(nodes, {"CPU": 8.0})) == 10
    assert fits({"CPU": 2.0}, {"CPU": 1.0, "GPU": 1.0}) == 0 and fits({"CPU": 0.95}, {"CPU": 1.0}) == 0
    assert seats([], {"CPU": 1.0}) == []


def test_a_pack_waits_until_there_is_room_for_all_of_its_workers():
    from types import SimpleNamespace

    nodes = [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": float(n)}} for n in (1, 2)]
    ray, want = SimpleNamespace(nodes=lambda: nodes), {"CPU": 1.0, "GPU": 1.0}
    assert [without_room(ray, 2, want, workers) for workers in (1, 2, 3, 4)] == [0, 1, 1, 2]


def test_a_node_that_sees_another_folder_of_the_same_name_is_told_from_one_that_sees_none(tmp_path):
    (tmp_path / "check").write_text("one")
    wanted = [sight("run.dir", tmp_path, "check", "Do this.")]
    assert missing(wanted, "n1") == []
    (tmp_path / "check").write_text("two")
    assert missing(wanted, "n1") == [f"node n1 sees another run.dir={tmp_path}. Do this."]
    (tmp_path / "check").unlink()
    assert missing(wanted, "n1") == [f"node n1 does not see run.dir={tmp_path}. Do this."]
