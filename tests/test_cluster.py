"""Reaching Ray: clear words instead of long waits."""

from __future__ import annotations

import socket
import time
from types import SimpleNamespace

import pytest

from raycap import cluster
from raycap.config import from_dict
from raycap.errors import RunError


def test_an_address_where_nothing_listens_is_refused_at_once(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"  # bound, not listening
        monkeypatch.setenv("RAY_ADDRESS", address)
        began = time.monotonic()
        with pytest.raises(RunError, match=f"RAY_ADDRESS={address}.*ray start --head"):
            cluster.probe(address)
        assert time.monotonic() - began < cluster.PROBE_TIMEOUT_S + 1


def test_an_address_that_is_none_is_refused():
    with pytest.raises(RunError, match="not host:port"):
        cluster.probe("my-cluster")


def test_an_address_that_listens_passes():
    with socket.create_server(("127.0.0.1", 0)) as server:
        cluster.probe(f"127.0.0.1:{server.getsockname()[1]}")
        cluster.probe(f"ray://127.0.0.1:{server.getsockname()[1]}")
    cluster.probe("auto")


def fake(**resources):
    return SimpleNamespace(cluster_resources=lambda: resources)


def test_a_pack_takes_a_cpu_and_a_gpu_where_there_are_any():
    assert cluster.pack_resources(fake(CPU=2), 1, 6) == {"CPU": 1.0}
    assert cluster.pack_resources(fake(CPU=2, GPU=1), 1, 6) == {"CPU": 1.0, "GPU": 1.0}


@pytest.mark.parametrize(
    ("have", "packs", "said"),
    [({"CPU": 2}, 2, "needs 2.85 CPUs"), ({"CPU": 64, "GPU": 2}, 3, "asks for 3 GPUs, the cluster has 2")],
)
def test_packs_that_cannot_all_run_are_refused_before_train_waits_for_ever(monkeypatch, have, packs, said):
    monkeypatch.setattr(cluster, "_private", True)
    with pytest.raises(RunError, match=said):
        cluster.pack_resources(fake(**have), packs, 12)


def test_every_worker_of_a_pack_takes_what_a_pack_of_one_takes(monkeypatch):
    monkeypatch.setattr(cluster, "_private", True)
    assert cluster.pack_resources(fake(CPU=64, GPU=4), 2, 4, 2) == {"CPU": 1.0, "GPU": 1.0}
    with pytest.raises(
        RunError, match=r"packs=2 x train.workers=3 asks for 6 GPUs, the cluster has 4 .* Lower train.w"
    ):
        cluster.pack_resources(fake(CPU=64, GPU=4), 2, 4, 3)
    with pytest.raises(RunError, match=r"needs 3.35 CPUs \(3 workers of packs, 1 each, 2 trial clients"):
        cluster.pack_resources(fake(CPU=3), 1, 2, 3)
    config = from_dict({"tune": {"packs": 2}, "train": {"workers": 3}})
    assert cluster.pack_resources(fake(CPU=cluster._embedded_cpus(config)), 2, 2 * cluster.CLIENTS, 3)


def test_on_a_cluster_packs_wait_for_nodes_unless_its_autoscaler_says_that_none_will_come(monkeypatch):
    assert cluster.pack_resources(fake(CPU=2), 3, 12) == {"CPU": 1.0}
    assert cluster.pack_resources(fake(CPU=64, GPU=2), 3, 12)["GPU"] == 1
    monkeypatch.setattr(cluster, "autoscaled", lambda ray: {"CPU": 24, "GPU": 3})
    assert cluster.pack_resources(fake(CPU=2), 3, 12)["GPU"] == 1  # none is up yet
    with pytest.raises(RunError, match=r"asks for 4 GPUs, the cluster has 0 and its autoscaler brings it to 3 at most"):
        cluster.pack_resources(fake(CPU=2), 4, 12)


def test_work_on_the_run_folder_stays_on_the_drivers_node_where_that_can_do_it():
    def ray(*nodes):
        alive = [{"NodeID": name, "Alive": True, "Resources": resources} for name, resources in nodes]
        context = SimpleNamespace(get_node_id=lambda: "head")
        return SimpleNamespace(nodes=lambda: alive, get_runtime_context=lambda: context)

    head, worker = ("head", {"CPU": 4.0}), ("worker", {"CPU": 8.0, "GPU": 1.0})
    assert cluster.beside_driver(ray(head), {"CPU": 1}) == {}
    assert cluster.beside_driver(ray(head, worker), {"CPU": 1, "GPU": 0}) == {"ray.io/node-id": "head"}
    assert cluster.beside_driver(ray(head, worker), {"CPU": 1, "GPU": 1}) == {}


def test_a_private_ray_has_room_for_what_the_sweep_books(monkeypatch):
    monkeypatch.setattr(cluster, "usable_cores", lambda: 1)
    for packs in (1, 2, 4):
        config = from_dict({"tune": {"packs": packs, "slots": 8}})
        cpus = cluster._embedded_cpus(config)
        assert cluster.pack_resources(fake(CPU=cpus), packs, packs * cluster.CLIENTS)


def test_a_private_ray_gets_a_token_that_is_written_nowhere(monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster._own_token()
    assert "RAY_AUTH_TOKEN" not in cluster.os.environ
    monkeypatch.delenv("RAY_AUTH_MODE")
    cluster._own_token()
    token = cluster.os.environ["RAY_AUTH_TOKEN"]
    assert len(token) == 64
    cluster._own_token()
    assert cluster.os.environ["RAY_AUTH_TOKEN"] == token
    monkeypatch.delenv("RAY_AUTH_TOKEN")


@pytest.mark.ray
def test_what_ray_says_goes_to_the_runs_log(ray_session, tmp_path, capfd):
    """Its logger and the raylet's messages, which Ray prints to stdout; afterwards all is as it was."""
    import logging

    from ray._private import worker

    before = worker.print_to_stdstream, logging.getLogger("ray").handlers[:]
    raylet = {"lines": ["WARNING: 8 PYTHON worker processes have been started"], "pid": "raylet", "is_err": False}
    with cluster._chatter(tmp_path / "logs" / "ray.log"):
        worker.print_to_stdstream(raylet, ignore_prefix=False)
        logging.getLogger("ray._private.somewhere").warning("a word of Ray's")
    said = (tmp_path / "logs" / "ray.log").read_text()
    assert "(raylet) WARNING: 8 PYTHON worker processes" in said and "a word of Ray's" in said
    with cluster._chatter(None):
        worker.print_to_stdstream(raylet, ignore_prefix=False)
    shown = capfd.readouterr()
    assert "PYTHON worker" not in shown.out + shown.err and "a word of" not in shown.err
    assert (worker.print_to_stdstream, logging.getLogger("ray").handlers[:]) == before


@pytest.mark.ray
def test_the_raylets_messages_take_the_way_that_is_turned(ray_session):
    """The name in Ray that `_chatter` replaces is the one that its listener calls."""
    import inspect

    from ray._private import worker

    assert "print_to_stdstream(" in inspect.getsource(worker.listen_error_messages)


def test_a_cluster_that_does_not_let_us_in_is_explained(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "no token is sent, because RAY_AUTH_MODE is disabled" in cluster._not_let_in("h:1")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    assert "RAY_AUTH_TOKEN;" in cluster._not_let_in("h:1") and "secret" not in cluster._not_let_in("h:1")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/etc/token")
    assert "RAY_AUTH_MODE=disabled" not in cluster._not_let_in("h:1") and "/etc/token" in cluster._not_let_in("h:1")


@pytest.mark.ray
def test_a_private_ray_leaves_the_agents_usual_port_to_a_cluster_head(ray_session):
    from ray._private import parameter, ray_constants, worker

    assert worker._global_node.dashboard_agent_listen_port != ray_constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
    assert isinstance(parameter.RayParams, type)


def test_a_run_says_what_it_computed_on(monkeypatch):
    def ray(nodes, **have):
        return SimpleNamespace(cluster_resources=lambda: have, nodes=lambda: [{"Alive": True}] * nodes)

    monkeypatch.setattr(cluster, "usable_cores", lambda: 4)
    assert (
        cluster.devices(ray(1, CPU=9.0)) == "CPU, 4 cores"
    )  # of the machine, whatever its private Ray pretends to have
    assert cluster.devices(ray(3, CPU=24.0)) == "CPU, 24 cores on 3 nodes"
    assert cluster.devices(ray(1, CPU=16.0, GPU=1.0, **{"accelerator_type:H200": 1.0})) == "1 GPU (H200)"
    assert cluster.devices(ray(2, CPU=32.0, GPU=2.0)) == "2 GPUs"
