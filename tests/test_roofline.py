"""The roofline: the floors of known networks, the kernels of each rung, and the command."""

import json
import sys

import pytest
import torch
import torchvision
from torch import nn

from fused_resnet import cli, roofline_cli
from fused_resnet.engine import machine, roofline

RATE, BANDWIDTH, BATCH, FP16 = 800e12, 3.0e12, 128, 2
# images/s on an H100: fp16, batch 128, 224x224. Basic blocks have no 3x3 -> 1x1 to chain.
CEILINGS = {
    "resnet18": (73295, 107200, 167383, 206765, None, None, 219556, 220498),
    "resnet34": (43731, 62331, 93361, 104458, None, None, 108946, 109177),
    "resnet50": (17785, 29370, 47352, 54639, 64452, 78741, 87413, 97819),
    "resnet101": (11449, 18590, 29378, 32028, 39248, 45495, 48261, 51273),
    "resnet152": (8025, 12986, 20481, 21735, 27137, 31487, 33332, 34741),
}
RUNGS = ("ops", "pointwise", "1", "3", "4", "5", "block", "compute")
# ResNet-50, microseconds an image: stem and pool, layer1 to layer4.
STAGES = {
    "compute": (0.30, 1.67, 2.57, 3.66, 2.02),
    "ops": (3.45, 20.67, 15.72, 12.14, 4.16),
    "1": (1.30, 6.75, 5.82, 5.05, 2.11),
    "4": (0.30, 4.82, 4.29, 4.01, 2.02),
    "block": (0.30, 2.81, 2.57, 3.66, 2.02),
}


@pytest.fixture(scope="module")
def networks():
    return {name: roofline.network(torchvision.models.get_model(name)) for name in CEILINGS}


@pytest.mark.parametrize("rung, column", [(rung, i) for i, rung in enumerate(RUNGS)], ids=RUNGS)
@pytest.mark.parametrize("name", CEILINGS)
def test_ceilings_on_an_h100(networks, name, rung, column):
    expected = CEILINGS[name][column] or CEILINGS[name][RUNGS.index("3")]
    seconds = roofline.floor_s(networks[name], rung, BATCH, FP16, RATE, BANDWIDTH)
    assert round(BATCH / seconds) == expected


@pytest.mark.parametrize("rung", STAGES)
def test_microseconds_by_stage(networks, rung):
    stages = dict.fromkeys(("stem", "layer1", "layer2", "layer3", "layer4", "head"), 0.0)
    stage = "stem"
    for kernel in roofline.kernels(networks["resnet50"], rung):
        first = kernel.ops[0]
        if first.name.startswith("layer"):
            stage = first.name.split("_")[0]
        elif first.kind in ("avg_pool", "linear"):
            stage = "head"
        stages[stage] += 1e6 * kernel.floor_s(BATCH, FP16, RATE, BANDWIDTH) / BATCH
    del stages["head"]
    assert tuple(round(v, 2) for v in stages.values()) == STAGES[rung]


# --- the kernels of a rung --------------------------------------------------------------------------------------------


def layers(ops, rung):
    return [roofline_cli.short(k.layers) for k in roofline.kernels(ops, rung)]


def test_every_rung_runs_every_op_once(networks):
    for ops in networks.values():
        for rung in roofline.RUNGS:
            names = [op.name for kernel in roofline.kernels(ops, rung) for op in kernel.ops]
            assert sorted(names) == sorted(op.name for op in ops)


def test_what_a_rung_merges(networks):
    assert layers(networks["resnet50"], "4")[:4] == [
        "conv1",
        "layer1.0.conv1",
        "layer1.0.conv2 + conv3 + layer1.0.downsample.0",
        "layer1.1.conv1",
    ]
    rotated = layers(networks["resnet50"], "5")
    assert rotated[3] == "layer1.1.conv2 + conv3 + layer1.2.conv1"
    assert rotated[-7:-2] == [  # 512 channels: no rung 5
        "layer4.0.conv2 + conv3 + layer4.0.downsample.0",
        "layer4.1.conv1",
        "layer4.1.conv2 + conv3",
        "layer4.2.conv1",
        "layer4.2.conv2 + conv3",
    ]
    assert layers(networks["resnet18"], "block")[2:4] == [
        "layer1.1.conv1 + conv2",
        "layer2.0.conv1 + conv2 + layer2.0.downsample.0",
    ]


def test_a_grouped_convolution_is_not_chained():
    ops = roofline.network(torchvision.models.resnext50_32x4d())
    assert layers(ops, "4") == layers(ops, "3")


def test_quarters_only_where_every_reader_skips(networks):
    """Of layer1's output the rotated kernel stores a quarter, as layer2's projection asks; of other blocks' all."""
    whole, part = ({k.layers[0]: k.written for k in roofline.kernels(networks["resnet50"], r)} for r in ("5", "5+"))
    y, h = 256 * 56 * 56, 128 * 56 * 56
    assert (whole["layer1.2.conv2"], part["layer1.2.conv2"]) == (y + h, y // 4 + h)
    assert whole["layer1.1.conv2"] == part["layer1.1.conv2"]


class Renamed(nn.Module):
    """A bottleneck by other names, called through a function, with dropout in the way."""

    def __init__(self):
        super().__init__()
        self.p, self.q, self.r = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 16, 1)
        self.s = nn.BatchNorm2d(16)
        self.d = nn.Dropout()

    def forward(self, x):
        x = torch.sigmoid(x)
        return (self.s(self.r(self.d(torch.relu(self.q(self.p(x)))))) + x).relu()


def test_patterns_come_from_the_graph_not_from_names():
    ops = roofline.network(Renamed(), (16, 5, 7))
    assert layers(ops, "4") == ["sigmoid", "p", "q + r"]
    assert layers(ops, "block") == ["sigmoid", "p + q + r"]
    block = roofline.kernels(ops, "block")[1]
    assert (block.read, block.written, block.weights) == (16 * 35, 16 * 35, 64 + 144 + 64)
    assert block.flops == 2 * 35 * (64 + 144 + 64)
    assert roofline.kernels(ops, "1")[0].bytes(3, 4) == 4 * 3 * 2 * 16 * 35


def test_an_unknown_rung_is_named(networks):
    with pytest.raises(ValueError, match="rung: expected one of ops, pointwise, 1.*got '7'"):
        roofline.kernels(networks["resnet18"], "7")


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(machine, "SLICE_S", 0.0)
    monkeypatch.setattr(machine, "COPY_BYTES", 2**20)
    monkeypatch.setattr(machine, "PRODUCT", {"cpu": 64, "cuda": 64})


@pytest.mark.parametrize("rung", ["ops", "1", "5+"])
def test_a_cpu_is_measured_layer_by_layer(tmp_path, capsys, quick, rung):
    path = tmp_path / "r.json"
    options = ["--device", "cpu", "--batch", "1", "--size", "40", "--rung", rung, "--json", str(path)]
    assert cli.main(["roofline", "resnet18", *options]) == 0
    found = json.loads(path.read_text())
    assert found["dtype"] == "float32" and found["device"]["source"].startswith("measured now")
    for layer in found["layers"]:
        assert layer["measured_s"] > 0
        assert layer["share"] == pytest.approx(layer["floor_s"] / layer["measured_s"])
    assert sum(layer["flops"] for layer in found["layers"]) == pytest.approx(found["batch"] * flops(40))
    assert "rung 1: per convolution" in capsys.readouterr().out


def flops(size):
    return sum(op.flops for op in roofline.network(torchvision.models.resnet18(), (3, size, size)))


def test_what_is_timed_is_the_kernel_with_batch_norm_folded(monkeypatch):
    monkeypatch.setattr(
        machine, "_random", lambda node, batch, *_: torch.ones(batch, *node.meta["tensor_meta"].shape[1:])
    )
    graph = roofline.traced(Renamed(), (16, 5, 7))
    kernel = roofline.kernels(roofline.ops_of(graph), "1")[3]
    assert [op.label for op in kernel.ops] == ["r", "s", "add", "relu_1"]
    with torch.no_grad():
        y = machine.unfused(graph, kernel, 2, torch.device("cpu"), torch.float32)()
    # Weights and biases are 0.01: four channels and the bias, and then the residual.
    torch.testing.assert_close(y, torch.full((2, 16, 5, 7), 4 * 0.01 + 0.01 + 1))


def test_a_named_device_has_floors_only(tmp_path, capsys):
    path = tmp_path / "r.json"
    assert cli.main(["roofline", "resnet50", "--device", "h100", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert {layer["measured_s"] for layer in found["layers"]} == {None}
    assert {rung: round(found["ceilings"][rung]) for rung in RUNGS} == dict(
        zip(RUNGS, CEILINGS["resnet50"], strict=True)
    )
    assert "47,352" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--device", "h100", "--dtype", "float32"], "--dtype: of h100 the rate is known for float16 and bfloat16"),
        (["--device", "abacus"], "--device: expected cpu, cuda, h100"),
        (["--device", "h100", "--png", "/nowhere/at/all.png"], "--png: cannot write"),
    ],
)
def test_wrong_arguments(capsys, options, sentence):
    assert cli.main(["roofline", "resnet18", *options]) == cli.WRONG_ARGUMENT
    assert sentence in capsys.readouterr().err


def test_without_matplotlib_the_extra_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    options = ["--device", "h100", "--png", str(tmp_path / "r.png")]
    assert cli.main(["roofline", "resnet18", *options]) == cli.WRONG_ARGUMENT
    assert "pip install 'fused_resnet[plot]'" in capsys.readouterr().err
    assert not (tmp_path / "r.png").exists()


@pytest.mark.parametrize("timed", [True, False])
def test_the_picture(tmp_path, quick, timed):
    pytest.importorskip("matplotlib")
    device = torch.device("cpu") if timed else machine.KNOWN["h100"]
    found = roofline_cli.report("resnet18", batch=1, size=40, dtype=torch.float32, rung="1", device=device)
    roofline_cli.draw(found, tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
