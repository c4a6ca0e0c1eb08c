"""benchmarks/peers.py: its statistics on planted data, the order of rounds, processes that fail, and its file."""

import importlib
import json
import os
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
import torchvision

from fused_resnet import measure
from fused_resnet.engine import machine

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
peers = importlib.import_module("benchmarks.peers")
peer_layers = importlib.import_module("benchmarks.peer_layers")
peer_systems = importlib.import_module("benchmarks.peer_systems")
peer_worker = importlib.import_module("benchmarks.peer_worker")
plot_peers = importlib.import_module("benchmarks.plot_peers")

CELL = peer_systems.Cell("resnet18", 2, "float32", 32, "cpu", 1)


# --- statistics -------------------------------------------------------------------------------------------------------


def planted(a: list[float], b: list[float]) -> dict:
    return {"systems": {"a": {"times_s": a}, "b": {"times_s": b}}}


def test_equal_times_have_a_ratio_of_one_and_no_width():
    assert peers.interval([1.0] * 21) == {"ratio": 1.0, "low": 1.0, "high": 1.0}


def test_the_ratio_is_of_speed_and_taken_round_by_round():
    # The machine is ten times as slow in every other round: the ratio does not see it.
    b = [1.0, 10.0] * 10
    found = peers.speed_over(planted([t / 2 for t in b], b), "a", "b")
    assert found == {"ratio": 2.0, "low": 2.0, "high": 2.0}
    assert peers.speed_over(planted(b, b), "a", "absent") is None


def test_the_interval_is_the_same_each_time_and_holds_the_median():
    ratios = numpy.random.default_rng(1).lognormal(0.1, 0.2, 21).tolist()
    first = peers.interval(ratios)
    assert first == peers.interval(ratios)
    assert first["low"] < first["ratio"] < first["high"]
    assert min(ratios) <= first["low"] and first["high"] <= max(ratios)


def test_the_interval_covers_the_true_median_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(peers, "RESAMPLES", 500)
    rng = numpy.random.default_rng(0)
    samples = [rng.lognormal(0.0, 0.3, 21).tolist() for _ in range(300)]
    covered = sum(found["low"] <= 1.0 <= found["high"] for found in map(peers.interval, samples))
    assert 0.91 <= covered / 300 <= 0.99


def test_every_round_runs_each_system_once_and_each_one_comes_first():
    names = ["a", "b", "c"]
    rounds = [peers.turns(names, r) for r in range(6)]
    assert all(sorted(order) == names for order in rounds)
    assert [order[0] for order in rounds] == ["a", "b", "c", "a", "b", "c"]


def test_the_faster_of_the_two():
    cell = {"systems": {"openvino": {"p50_ms": 2.0}, "onnxruntime": {"p50_ms": 1.0}, "eager": {"p50_ms": 0.5}}}
    assert peers.fastest_peer(cell) == "onnxruntime"
    assert peers.fastest_peer({"systems": {"eager": {"p50_ms": 0.5}}}) is None


# --- systems ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_layers_compute_the_model(name):
    model = measure.build_model(name)
    x = torch.randn(2, 3, 41, 35)

    def conv(layer, v, residual):
        y = torch.conv2d(v, layer.weight, layer.bias, *peer_layers.geometry(layer))
        y = y if residual is None else y + residual
        return y.relu() if layer.relu else y

    with torch.no_grad():
        y, expected = peer_layers.run_layers(peer_layers.layers(model, 41), x, conv), model(x)
    assert measure.error(y, expected.double()) < 1e-5


@pytest.mark.parametrize("name", ["eager", "channels_last", "swap_blocks", "timm", "jax", "onnxruntime", "openvino"])
def test_a_system_computes_the_model(name, tmp_path):
    system = peer_systems.SYSTEMS[name]
    if reason := system.declines("cpu", "float32"):
        pytest.skip(reason)
    cell = peer_systems.Cell("resnet18", 2, "float32", 40, "cpu", 1, str(tmp_path))
    model, x = cell.untouched(), cell.input()
    if system.export:
        system.export(cell, model, x)
    found = peer_worker.ends(system.build(cell, model, x)())
    truth, own = peers.judge(cell)
    assert measure.verdict({"output": measure.error(found, truth)}, {"output": own}, torch.float32)["ok"]


def test_why_a_system_is_left_out(monkeypatch):
    system = peer_systems.System("a peer", None, needs=("no_such_module",), devices=("cpu",), dtypes=("float32",))
    assert system.declines("cpu", "float32") == "not installed: no_such_module"
    assert system.declines("cuda", "float32") == "runs on cpu here, not on cuda"
    assert system.declines("cpu", "float16") == "runs in float32 here, not in float16"


def test_ends_are_the_first_and_the_last_row():
    rows = torch.arange(12.0).view(4, 3)
    assert peer_worker.ends(rows).tolist() == [[0.0, 1.0, 2.0], [9.0, 10.0, 11.0]]
    assert peer_worker.ends(rows[:1].numpy()).tolist() == [[0.0, 1.0, 2.0]]


# --- processes --------------------------------------------------------------------------------------------------------


def dies(connection, name, cell):
    os._exit(3)


def hangs(connection, name, cell):
    time.sleep(60)


def fails(connection, name, cell):
    connection.send({"failed": "ValueError: no"})


@pytest.mark.parametrize(
    "serving, words",
    [(dies, "ended with exit code 3"), (hangs, "no answer in 8 s")]
    + [pytest.param(fails, "ValueError: no", marks=pytest.mark.slow)],
)
def test_a_process_that_fails_costs_its_system_only(monkeypatch, serving, words):
    monkeypatch.setattr(peer_worker, "READY_LIMIT_S", 8 if serving is hangs else 120)
    with pytest.raises(RuntimeError, match=words):
        peer_worker.Worker("eager", CELL, serving)


def test_the_surroundings_are_restored(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    cores = os.sched_getaffinity(0)
    with peer_worker._surroundings(1):
        assert os.environ["OMP_NUM_THREADS"] == os.environ["MKL_NUM_THREADS"] == "1"
        assert len(os.sched_getaffinity(0)) == 1
    assert os.environ["OMP_NUM_THREADS"] == "7" and "MKL_NUM_THREADS" not in os.environ
    assert os.sched_getaffinity(0) == cores


# --- the command and its file -----------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(machine, "SLICE_S", 0.0)
    monkeypatch.setattr(machine, "COPY_BYTES", 2**20)
    monkeypatch.setattr(machine, "PRODUCT", {"cpu": 64})


@pytest.mark.slow
def test_a_cell_is_measured_written_resumed_and_drawn(tmp_path, quick, capsys, monkeypatch):
    path = tmp_path / "peers.json"
    options = ["--models", "resnet18", "--batches", "2", "--size", "32", "--rounds", "3", "--threads", "1"]
    options += ["--device", "cpu", "--systems", "eager", "swap_blocks", "cudnn_graph", "--out", str(path)]
    assert peers.main(options) == 0
    result = json.loads(path.read_text())
    assert result["schema"] == peers.SCHEMA and result["environment"]["torch"] and result["load_before"] >= 0
    assert result["rates"]["float32"]["flop_per_s"] > 0
    (name,) = result["cells"]
    assert name == "resnet18/b2/float32"
    cell = result["cells"][name]
    assert cell["skipped"] == {"cudnn_graph": "runs on cuda here, not on cpu"} and cell["failed"] == {}
    assert set(cell["systems"]) == {"eager", "swap_blocks"}
    for t in cell["systems"].values():
        assert len(t["times_s"]) == 3 and min(t["times_s"]) > 0
        assert t["p20_ms"] <= t["p50_ms"] <= t["p80_ms"]
        assert t["parity"]["ok"] and t["parity"]["error"] > 0
        assert 0 < t["built_s"] < t["ready_s"] and t["calls"] >= 1
        assert t["to_baseline"]["low"] <= t["to_baseline"]["ratio"] <= t["to_baseline"]["high"]
    assert cell["systems"]["eager"]["to_baseline"]["ratio"] == 1.0
    assert "speed / eager" in capsys.readouterr().out

    def not_again(*args):
        raise AssertionError("measured again")

    with monkeypatch.context() as m:
        m.setattr(peers, "run_cell", not_again)
        assert peers.main(options) == 0
        with pytest.raises(AssertionError, match="measured again"):
            peers.main([*options, "--cells", "resnet18/b2/float32"])
        with pytest.raises(AssertionError, match="measured again"):
            peers.main([*options, "--rounds", "4"])
        with pytest.raises(SystemExit, match="--cells: expected some of resnet18/b2/float32, got resnet18/b3"):
            peers.main([*options, "--cells", "resnet18/b3"])
    if importlib.util.find_spec("matplotlib"):
        assert plot_peers.main([str(path)]) == 0
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_failing_system_leaves_the_others(quick, monkeypatch):
    class Planted:
        """Starts unless it is timm; openvino dies in the second round."""

        calls, first = 1, {"built_s": 0.5, "ready_s": 1.0, "export_s": 0.0, "peak_mib": None, "output": [[0.0], [0.0]]}

        def __init__(self, name, cell):
            self.name, self.bursts = name, 0
            if name == "timm":
                raise RuntimeError("ValueError: no")

        def burst(self):
            ran.append(self.name)
            self.bursts += 1
            if (self.name, self.bursts) == ("openvino", 2):
                raise RuntimeError("its process ended with exit code -11")
            return {"eager": 2.0}.get(self.name, 1.0)

        def stop(self):
            stopped.append(self.name)

    ran, stopped = [], []
    monkeypatch.setattr(peers, "Worker", Planted)
    monkeypatch.setattr(peer_systems.System, "declines", lambda *_: None)
    names = ["eager", "timm", "openvino", "jax"]
    cell = peers.run_cell(CELL, names, rounds=3)
    assert ran == ["eager", "openvino", "jax", "openvino", "jax", "eager", "jax", "eager"]
    assert sorted(stopped) == ["eager", "jax", "openvino"]
    assert set(cell["systems"]) == {"eager", "jax"}
    assert cell["failed"] == {
        "timm": "ValueError: no",
        "openvino": "in round 2: its process ended with exit code -11",
    }
    assert cell["systems"]["jax"]["to_baseline"] == {"ratio": 2.0, "low": 2.0, "high": 2.0}
    assert cell["systems"]["jax"]["images_per_s"] == 2.0 and not cell["systems"]["jax"]["parity"]["ok"]


def test_a_file_of_another_machine_is_not_mixed_with(tmp_path):
    path = tmp_path / "peers.json"
    here = {"cpu": "a", "torch": "1"}
    peers.write(path, peers.opened(path, here))
    assert peers.opened(path, here)["cells"] == {}
    with pytest.raises(SystemExit, match="was measured with other torch"):
        peers.opened(path, {"cpu": "a", "torch": "2"})
    path.write_text(json.dumps({"schema": 0}))
    with pytest.raises(SystemExit, match="has schema 0, expected 1"):
        peers.opened(path, here)


def test_a_wrong_output_fails_parity(monkeypatch):
    truth, own = peers.judge(CELL)
    worker = type(
        "", (), {"calls": 1, "first": {"built_s": 1, "ready_s": 1, "export_s": 0, "peak_mib": None, "output": None}}
    )
    worker.first["output"] = truth.tolist()
    assert peers.summary(CELL, worker, [1.0], truth, own)["parity"]["ok"]
    worker.first["output"] = (1.001 * truth).tolist()
    assert not peers.summary(CELL, worker, [1.0], truth, own)["parity"]["ok"]


def test_share_is_the_floor_over_the_time():
    rates = {"float32": {"flop_per_s": 1e12, "bytes_per_s": 1e30}}
    cell = {"model": "resnet18", "size": 32, "batch": 4, "dtype": "float32", "systems": {"eager": {"p50_ms": 8.0}}}
    macs = sum(op.flops for op in peers.roofline.network(torchvision.models.resnet18(), (3, 32, 32)))
    assert peers.share({"rates": rates}, cell, "eager") == pytest.approx(1e3 * 4 * macs / 1e12 / 8.0)
    assert peers.share({"rates": {}}, cell, "eager") is None
