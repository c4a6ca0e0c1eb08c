"""From a model to steps: each layer in one step, once, whatever the model calls its parts; and the steps' numbers."""

from __future__ import annotations

import collections
import copy
import operator

import pytest
import torch
import torch.nn.functional as F
import torchvision
from engine_cases import Net, agree, conv, network_of, ops, randomized, resnet
from torch import nn
from torch.nn.utils import parametrizations
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from fused_resnet import models, optimize_for_inference, swap_blocks
from fused_resnet.engine.graph import capture
from fused_resnet.engine.plan import alone, describe

X = (5, 3, 11, 13)


def accounted(network) -> None:
    """Nothing is computed twice, nothing is lost, and all that a step reads is there when it runs."""
    nodes = [n.name for n in network.graph.nodes if n.op not in ("placeholder", "output")]
    layers = [name for step in network.steps for name in step.layers]
    assert sorted([*layers, *network.alias, *network.constants]) == sorted(nodes)
    there = {n.name for n in network.graph.nodes if n.op == "placeholder"} | set(network.constants)
    for step in network.steps:
        missing = [name for name in step.reads if network.source(name) not in there]
        assert not missing, f"{step.output} runs before {missing}"
        there.add(step.output)
    output = next(n for n in network.graph.nodes if n.op == "output")
    assert {network.source(n.name) for n in output.all_input_nodes} <= there


def proven(model, *inputs, expected=None, notes=False):
    """(network, fast), every layer accounted for, results judged on two different inputs."""
    inputs = inputs or (torch.randn(X),)
    network = network_of(model, *inputs)
    accounted(network)
    if expected is not None:
        assert ops(network) == expected, [(s.op, s.layers, s.why) for s in network.steps]
    before = [x.clone() for x in inputs]
    fast = optimize_for_inference(model, inputs, tune="off")
    assert bool(fast.plan.notes) == notes, fast.plan.notes
    agree(fast(*inputs), model, *(x.clone() for x in inputs))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True)), "the input was changed"
    others = tuple(x * 0.7 + 0.1 for x in inputs)
    first = fast(*others)
    fast(*inputs)  # results live on after a later call
    agree(first, model, *(x.clone() for x in others))
    return network, fast


# --- whole models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(2, 3, 224, 224), (1, 3, 97, 161), (7, 3, 33, 33)], ids=str)
@pytest.mark.parametrize("name", models.TORCHVISION)
def test_the_ten_models_are_planned_whole(name, size):
    with torch.device("meta"):
        model = getattr(torchvision.models, name)().eval()
        network = network_of(model, torch.empty(size))
    accounted(network)
    convs = sum(type(m) is nn.Conv2d for m in model.modules())
    joined = sum(s.segment is not None for s in network.steps)
    assert ops(network).count("conv") == convs - 1 - joined
    assert [s.op for s in network.steps if s.op not in ("conv", "stem")] == ["avg_pool", "linear"]
    assert joined == (4 if any(isinstance(m, Bottleneck) for m in model.modules()) else 3)
    planned = describe(network, torch.float32, [alone(step, "any") for step in network.steps])
    assert sum(s.flops for s in planned if s.op != "traced") == sum(s.flops for s in planned) > 0
    assert sum(network.graph.flops.values()) == sum(s.flops for s in planned)


class WithDropout(torchvision.models.ResNet):
    """A subclass that changes the head: dropout before fc, functional pooling."""

    def __init__(self):
        super().__init__(BasicBlock, [1, 1, 1, 1], num_classes=6)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.drop(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1)))


def test_subclass_with_dropout():
    network, fast = proven(randomized(WithDropout()), torch.randn(2, 3, 35, 41))
    assert ops(network) == ["stem", *["conv"] * 8, "avg_pool", "linear"]
    assert fast.plan.flop_share == 1.0 and not fast.plan.traced


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck], ids=lambda b: b.__name__)
@pytest.mark.parametrize("swapped", [False, True], ids=["plain", "swapped"])
def test_resnet(block, swapped):
    model = resnet(block)
    if swapped:
        swap_blocks(model)
    network, fast = proven(model, torch.randn(3, 3, 45, 33))
    assert fast.plan.flop_share == 1.0
    assert sum(s.segment is not None for s in network.steps) == (4 if block is Bottleneck else 3)
    assert "100.0 %" in str(fast.plan)


def test_two_resnets_in_one_model():
    both = Net(lambda m, x: m.left(x) + m.right(x * 0.5), left=resnet(seed=1), right=resnet(Bottleneck, seed=2))
    network, fast = proven(both, torch.randn(2, 3, 40, 35))
    assert ops(network).count("stem") == 2 and ops(network).count("traced") == 2
    assert fast.plan.flop_share == 1.0


@pytest.mark.parametrize("model", ["detector", "segmenter"])
def test_bodies(model):
    torch.manual_seed(0)
    if model == "detector":
        whole = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3)
        body = randomized(whole).backbone
    else:
        body = torchvision.models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=4)
        body = randomized(body, seed=1)
    for m in body.modules():  # deep, without calibration
        if isinstance(m, Bottleneck):
            m.bn3.weight.data.mul_(0.1)
    x = torch.randn(1, 3, 65, 97)
    network, fast = proven(body, x)
    assert type(fast(x)) is type(body(x)) and list(fast(x)) == list(body(x))
    assert fast.plan.flop_share > 0.99
    assert any(s.conv is not None and s.conv.dilation == (2, 2) for s in network.steps) == (model == "segmenter")


def test_dilated_model():
    model = resnet(Bottleneck, layers=(1, 1, 2, 2), replace_stride_with_dilation=[False, True, True])
    network, fast = proven(model, torch.randn(1, 3, 64, 49))
    assert fast.plan.flop_share == 1.0 and {s.conv.dilation for s in network.steps if s.conv} > {(1, 1), (2, 2)}


@pytest.mark.parametrize(
    "nodes", [["layer1.0.conv2"], ["layer2.0.bn2", "layer2.0.add"], ["relu", "layer3.0.downsample.0"]], ids=str
)
def test_feature_extraction(nodes):
    """What is inside of a fused step is asked for: pre-activations, BN outputs, sums."""
    from torchvision.models.feature_extraction import create_feature_extractor

    model = create_feature_extractor(resnet(), return_nodes=[*nodes, "layer4", "fc"])
    proven(model, torch.randn(2, 3, 37, 41))


# --- how a layer is written -----------------------------------------------------------------------------------------


def cnn(function, **more):
    modules = {"a": conv(), "n": nn.BatchNorm2d(16), "b": conv(16), "r": nn.ReLU(), "i": nn.ReLU(inplace=True)}
    modules |= {"p": conv(16, 16, 1), "q": conv(16, 16, 1), "d": nn.Dropout(0.3), "e": nn.Identity(), "c": conv(16)}
    return Net(function, **(modules | more))


FUSED = {
    "module relu": lambda m, x: m.r(m.n(m.a(x))),
    "in-place relu": lambda m, x: m.i(m.n(m.a(x))),
    "F.relu": lambda m, x: F.relu(m.n(m.a(x))),
    "F.relu in place": lambda m, x: F.relu(m.n(m.a(x)), inplace=True),
    "torch.relu": lambda m, x: torch.relu(m.n(m.a(x))),
    "torch.relu_": lambda m, x: torch.relu_(m.n(m.a(x))),
    "method relu": lambda m, x: m.n(m.a(x)).relu(),
    "method relu_": lambda m, x: m.n(m.a(x)).relu_(),
    "dropout and identity between": lambda m, x: m.r(m.e(m.d(m.n(m.e(m.a(x)))))),
    "identity by keyword": lambda m, x: m.r(m.e(input=m.n(m.a(x)))),
    "norm by keyword": lambda m, x: m.r(input=m.n(input=m.a(x))),
    "relu changes what nobody else names": lambda m, x: in_place_statement(m, m.n(m.a(x))),
    "module relu as a statement": lambda m, x: in_place_statement(m, m.n(m.a(x)), m.i),
}


def in_place_statement(m, y, change=lambda y: y.relu_()):
    change(y)
    return y


@pytest.mark.parametrize("how", FUSED)
def test_one_step(how):
    network, _ = proven(cnn(FUSED[how]), expected=["conv"])
    assert network.steps[0].relu and network.steps[0].conv.bn == "n"


ADDS = {
    "operator": lambda a, b: a + b,
    "iadd": operator.iadd,
    "torch.add": torch.add,
    "method": lambda a, b: a.add(b),
    "method in place": lambda a, b: a.add_(b),
}


@pytest.mark.parametrize("how", ADDS)
@pytest.mark.parametrize("swap", [False, True], ids=["main first", "shortcut first"])
def test_add(how, swap):
    def forward(m, x):
        x = m.r(m.a(x))
        pair = (x, m.n(m.b(x))) if swap else (m.n(m.b(x)), x)
        return F.relu(ADDS[how](*pair))

    network, _ = proven(cnn(forward), expected=["conv", "conv"])
    assert network.steps[1].residual is not None and network.steps[1].relu


@pytest.mark.parametrize("shape", [(1, 3, 9, 7), (5, 3, 11, 13)], ids=str)
@pytest.mark.parametrize("which", ["conv3x3 + pointwise", "pointwise + conv3x3", "both pointwise", "strided"])
def test_projection(which, shape):
    main = {"both pointwise": conv(16, 16, 1), "strided": conv(16, 16, 3, stride=2)}.get(which, conv(16, 16, 3))
    stride = 2 if which == "strided" else 1

    def forward(m, x):
        x = m.r(m.a(x))
        if which == "pointwise + conv3x3":
            return F.relu(m.n2(m.short(x)) + m.n(m.main(x)))
        return F.relu(m.n(m.main(x)) + m.n2(m.short(x)))

    model = cnn(forward, main=main, short=conv(16, 16, 1, stride=stride), n2=nn.BatchNorm2d(16))
    network, _ = proven(model, torch.randn(shape), expected=["conv", "conv"])
    assert network.steps[1].conv.weight == "main" or which == "both pointwise"
    assert network.steps[1].segment[1].stride == (stride, stride)


def test_both_branches_pointwise_in_a_bottleneck():
    """The projection has the stride and reads the block's input, wherever it comes in the sum."""
    block = Bottleneck(12, 8, stride=2, downsample=nn.Sequential(conv(12, 32, 1, stride=2), nn.BatchNorm2d(32)))
    network, _ = proven(randomized(block), torch.randn(2, 12, 9, 7), expected=["conv", "conv", "conv"])
    assert network.steps[2].conv.weight == "conv3" and network.steps[2].segment[1].weight == "downsample.0"


def test_stem_written_by_hand():
    pools = {
        "module": lambda m, x: m.pool(m.i(m.n(m.a(x)))),
        "function": lambda m, x: F.max_pool2d(F.relu(m.n(m.a(x))), 3, 2, 1),
        "keywords": lambda m, x: F.max_pool2d(F.relu(m.n(m.a(x))), kernel_size=3, stride=2, padding=1),
        "torch": lambda m, x: torch.max_pool2d(F.relu(m.n(m.a(x))), 3, 2, 1),
    }
    for pool in pools.values():
        model = cnn(pool, a=conv(3, 16, 7, stride=2), pool=nn.MaxPool2d(3, 2, 1))
        proven(model, torch.randn(2, 3, 31, 29), expected=["stem"])


@pytest.mark.parametrize("pool", [(2, None, 0), (3, 1, 1), (2, 2, 1), (5, 3, 2)], ids=str)
def test_other_pools(pool):
    kernel, stride, padding = pool
    model = cnn(lambda m, x: F.max_pool2d(m.r(m.n(m.a(x))), kernel, stride, padding))
    proven(model, expected=["stem"])
    proven(cnn(lambda m, x: F.max_pool2d(m.n(m.a(x)), kernel, stride, padding)), expected=["conv", "max_pool"])


def test_pools_that_no_kernel_has():
    pools = [
        lambda y: F.max_pool2d(y, 3, 2, 1, ceil_mode=True),
        lambda y: F.max_pool2d(y, 3, 2, 1, dilation=2),
        lambda y: F.max_pool2d(y, (3, 2), 2),
        lambda y: F.avg_pool2d(y, 2),
        lambda y: F.adaptive_avg_pool2d(y, 2),
        lambda y: y.mean((2, 3)),
    ]
    for pool in pools:
        proven(cnn(lambda m, x, pool=pool: pool(m.r(m.a(x)))), expected=["conv", "traced"])


# --- what must not be fused, or not that way ------------------------------------------------------------------------


OTHERS = {
    "twice read": (lambda m, x: (lambda y: m.r(y) + m.b(y))(m.n(m.a(x))), ["conv", "traced", "conv"]),
    "added to itself": (lambda m, x: (lambda y: y + y)(m.a(x)), ["conv", "traced"]),
    "alpha": (lambda m, x: (lambda y: torch.add(m.b(y), y, alpha=0.5))(m.a(x)), ["conv", "conv", "traced"]),
    "method alpha": (lambda m, x: (lambda y: m.b(y).add(y, alpha=2))(m.a(x)), ["conv", "conv", "traced"]),
    "scalar": (lambda m, x: m.a(x) + 1.5, ["conv", "traced"]),
    "broadcast": (
        lambda m, x: (lambda y: m.b(y) + F.adaptive_avg_pool2d(y, 1))(m.a(x)),
        ["conv", "conv", "avg_pool", "traced"],
    ),
    "relu before add": (lambda m, x: (lambda y: m.r(m.b(y)) + y)(m.a(x)), ["conv", "conv", "traced"]),
    "add of three": (lambda m, x: (lambda y: m.b(y) + y + m.c(y))(m.a(x)), ["conv", "conv", "conv"]),
    "integers": (lambda m, x: (lambda y: m.b(y) + (y > 0).long())(m.a(x)), None),
    "shared": (lambda m, x: m.r(m.b(m.r(m.b(m.a(x))))), ["conv", "conv", "conv"]),
    "shared by both sides": (lambda m, x: (lambda y: m.b(y) + m.b(m.r(y)))(m.a(x)), None),
    "shared norm": (lambda m, x: m.n(m.b(m.n(m.a(x)))), ["conv", "conv"]),
    "two norms": (lambda m, x: m.n(m.n(m.a(x))), ["conv", "norm"]),
    "norm before": (lambda m, x: m.b(m.r(m.n(F.pad(m.a(x), (1, 0, 0, 2))))), None),
    "power": (lambda m, x: operator.ipow(m.a(x), 2), ["conv", "traced"]),
    "mask": (lambda m, x: (lambda y: m.b(y * ((y > 0) & (y < 1))))(m.a(x)), None),
    "size": (lambda m, x: (lambda y: m.i(y).reshape(y.size(0), y.shape[1], -1))(m.n(m.a(x))), ["conv", "traced"]),
    "by keyword": (lambda m, x: m.b(m.a(input=x)), ["traced", "conv"]),
    "constants of forward": (lambda m, x: m.a(x * torch.tensor([1.0, 2.0, 3.0])[:, None, None] + 1), None),
    "unused": (lambda m, x: (m.b(m.a(x)), m.a(x))[1], ["conv"]),
    "the input": (lambda m, x: (x, m.a(x)), ["conv"]),
    "half a map": (lambda m, x: m.b(m.a(x)[:, :, ::2, 1:]), ["conv", "traced", "conv"]),
    "expanded": (lambda m, x: m.b(m.a(x)[:, :, :1, :].expand(-1, -1, 6, -1)), None),
    "transposed": (lambda m, x: m.b(m.a(x).transpose(2, 3)), ["conv", "traced", "conv"]),
    "concatenated": (lambda m, x: (lambda y: m.c(torch.cat([m.b(y), y], 1)[:, 8:24]))(m.a(x)), None),
    "nothing": (lambda m, x: x * 2, ["traced"]),
    "a constant": (lambda m, x: (m.a(x), x.shape[0], None, "words"), ["conv"]),
}


@pytest.mark.parametrize("how", OTHERS)
def test_others(how):
    function, expected = OTHERS[how]
    proven(cnn(function), expected=expected)


IN_PLACE = {
    "of a view": lambda m, x: views(m.a(x), lambda v: v.relu_()),
    "of a view, out": lambda m, x: views(m.a(x), lambda v: torch.mul(v, 2, out=v)),
    "after a view was taken": lambda m, x: (lambda y: m.b(y[:, :16]) + m.i(y))(m.a(x)),
    "and the older value is read": lambda m, x: (lambda y: (m.i(y), m.b(y)))(m.a(x)),
    "of the input": lambda m, x: m.a(x.mul_(2)) + m.a(x),
    "of a view of the input": lambda m, x: (lambda v: (v.add_(1), m.a(x))[1])(x[:, :1]),
    "in a sum": lambda m, x: (lambda y, z: (operator.iadd(y, z), m.b(y), m.c(z))[1:])(m.a(x), m.r(m.a(x))),
    "copy": lambda m, x: (lambda y: (y[:, :3].copy_(x), m.b(y))[1])(m.a(x)),
    "other name": lambda m, x: in_place_statement(m, m.a(x), lambda y: operator.iadd(y, 1)),
    "of a view that alone is left": lambda m, x: m.b(operator.imul(m.a(x)[:, :, 1:], 2)),
    "of a view, and the rest is read": lambda m, x: (lambda y: (operator.imul(y[:, :, 1:], 2), m.b(y))[1])(m.a(x)),
    "of one of two views": lambda m, x: (
        lambda y: (lambda v, w: (operator.imul(w, 2), m.c(v))[1])(y[:, :16], y[:, :, 1:])
    )(m.a(x)),
    "of a flattened map": lambda m, x: (lambda y: operator.iadd(torch.flatten(y, 1), 1))(m.a(x)),
    "of sizes": lambda m, x: (lambda y, n: y.reshape(operator.ifloordiv(n, 2) * 2, -1) + n)(m.a(x), x.shape[1] + 1),
    "of what is returned": lambda m, x: (lambda y: (y, m.b(m.i(y))))(m.n(m.a(x))),
}


def views(y, change):
    change(y[:, 2:9])
    return y * 1


def test_in_place_sums_do_not_hinder_the_plan():
    """A gate on the branch, as squeeze-and-excitation has it, and `+=`."""

    def forward(m, x):
        x = m.r(m.a(x))
        y = m.n(m.b(x))
        y = y * m.gate(m.pool(y)).sigmoid()
        y += x
        return m.c(m.i(y))

    model = cnn(forward, pool=nn.AdaptiveAvgPool2d(1), gate=conv(16, 16, 1, bias=True))
    network, fast = proven(model)
    assert not network.graph.opaque and fast.plan.flop_share == 1.0


@pytest.mark.parametrize("how", IN_PLACE)
@torch.no_grad()
def test_in_place(how):
    network, _ = proven(cnn(IN_PLACE[how]))
    assert how not in ("of a view that alone is left", "of a flattened map", "of sizes") or not network.graph.opaque


@torch.no_grad()
def test_views_that_are_returned():
    """The memory of a step's result is not used again while a view of it lives, and not by the next call."""

    def forward(m, x):
        y = m.r(m.a(x))
        first, second = y.chunk(2, 1)
        deep = m.c(m.b(m.p(m.q(m.c(m.b(y))))))
        return y[:, 3:7], first, (second.flatten(2),), deep, m.a(x).split(8, 1)

    proven(cnn(forward))


LAYERS = {
    "bias": (conv(bias=True), "conv"),
    "grouped": (conv(16, 16, groups=4), "conv"),
    "depthwise": (conv(16, 16, groups=16, stride=2), "conv"),
    "grouped pointwise": (conv(16, 32, 1, groups=2), "conv"),
    "reflect": (conv(padding_mode="reflect"), "traced"),
    "circular": (conv(padding_mode="circular"), "traced"),
    "same": (conv(padding="same"), "traced"),
    "valid": (conv(padding="valid"), "traced"),
    "dilated": (conv(padding=2, dilation=2), "conv"),
    "uneven": (nn.Conv2d(3, 16, (3, 1), (1, 2), (2, 0), (2, 1)), "conv"),
    "wide padding": (conv(padding=3), "conv"),
    "no padding": (conv(padding=0), "conv"),
    "pointwise with padding": (conv(3, 16, 1, padding=1), "conv"),
    "transposed": (nn.ConvTranspose2d(3, 16, 3), "traced"),
    "weight norm": (parametrizations.weight_norm(conv()), "traced"),
    "spectral norm": (parametrizations.spectral_norm(conv()), "traced"),
}


@pytest.mark.parametrize("how", LAYERS)
def test_layers(how):
    layer, op = LAYERS[how]
    layer = copy.deepcopy(layer)
    proven(Net(lambda m, x: F.relu(m.layer(x)), layer=layer), torch.randn(2, getattr(layer, "in_channels", 3), 9, 12))
    network = network_of(Net(lambda m, x: m.layer(x), layer=layer), torch.randn(2, layer.in_channels, 9, 12))
    assert ops(network) == [op]


NORMS = {
    "frozen": (lambda: FrozenBatchNorm2d(16, eps=1e-3), ["conv"]),
    "affine off": (lambda: nn.BatchNorm2d(16, affine=False, eps=0.1), ["conv"]),
    "synchronised": (lambda: nn.SyncBatchNorm(16), ["conv"]),
    "without statistics": (lambda: nn.BatchNorm2d(16, track_running_stats=False), ["conv", "traced"]),
    "group norm": (lambda: nn.GroupNorm(4, 16), ["conv", "traced"]),
    "instance norm": (lambda: nn.InstanceNorm2d(16), ["conv", "traced"]),
}


@pytest.mark.parametrize("how", NORMS)
def test_norms(how):
    """Batch statistics are those of the whole batch, though large batches are compared at two images."""
    norm, expected = NORMS[how]
    model = randomized(cnn(lambda m, x: m.n(m.a(x)), n=norm()))
    proven(model, torch.randn(7, 3, 9, 10), expected=expected)


def test_norm_after_a_bias():
    proven(cnn(lambda m, x: m.r(m.n(m.a(x))), a=conv(bias=True)), expected=["conv"])


@pytest.mark.parametrize("where", ["conv", "norm", "relu", "block", "identity"])
def test_hooks_run(where):
    """A hooked module is called, and may keep what it gets."""
    model = resnet()
    model.layer2.add_module("1", nn.Identity())
    target = {
        "conv": model.layer2[0].conv2,
        "norm": model.layer1[0].bn1,
        "relu": model.relu,
        "block": model.layer3[0],
        "identity": model.layer2[1],
    }[where]
    kept = []
    target.register_forward_hook(lambda m, args, out: kept.append((args[0], out)) or out * 1.25)
    x = torch.randn(2, 3, 40, 33)
    network, fast = proven(model, x)
    assert fast.plan.traced
    kept.clear()
    model(x)
    want = [t.clone() for t in kept[0]] if where != "relu" else [None, kept[0][1].clone()]
    kept.clear()
    fast(x)
    got = kept[0]
    fast(x * 3)
    for a, b in zip(want, got, strict=True):
        assert a is None or torch.allclose(a, b, rtol=1e-3, atol=1e-4)


def test_hooks_of_the_whole_model_are_refused():
    model = cnn(lambda m, x: m.a(x))
    model.register_forward_hook(lambda m, args, out: out * 2)
    with pytest.raises(ValueError, match="forward hooks"):
        optimize_for_inference(model, torch.randn(X))
    model = cnn(lambda m, x: m.a(x))
    model.forward = lambda x: x
    with pytest.raises(ValueError, match="a forward of its own"):
        optimize_for_inference(model, torch.randn(X))
    inside = cnn(lambda m, x: m.a(x))
    inside.register_forward_hook(lambda m, args, out: out * 2)
    proven(nn.Sequential(inside), expected=["traced"])


# --- what goes in and comes out --------------------------------------------------------------------------------------

Pair = collections.namedtuple("Pair", "left right")
RETURNS = {
    "tuple": lambda a, b: (a, b),
    "list": lambda a, b: [a, (b,)],
    "dict": lambda a, b: {"a": a, "b": [b, {"c": a}]},
    "named tuple": lambda a, b: Pair(a, b),
    "the same twice": lambda a, b: (a, a, b),
}


@pytest.mark.parametrize("how", RETURNS)
def test_returns(how):
    model = cnn(lambda m, x: RETURNS[how](m.r(m.a(x)), m.b(m.r(m.a(x)))))
    _, fast = proven(model)
    x = torch.randn(X)
    got, want = fast(x), model(x)
    assert type(got) is type(want)
    if isinstance(got, dict):
        got["more"] = None
        got["b"].append(None)
        assert type(got) is dict and type(got["b"]) is list


class Optional(Net):
    def forward(self, x, mask=None, scale=None, double: bool = False, *, name: str = ""):
        y = self.a(x)
        if mask is not None:
            y = y * mask
        if scale is not None:
            y = y * scale
        if double:
            y = y * 2
        return (y, None) if name == "pair" else self.b(y)


def test_optional_inputs():
    model = Optional(None, a=conv(), b=conv(16))
    x, mask = torch.randn(X), torch.rand(5, 16, 11, 13)
    _, fast = proven(model, x, expected=["conv", "conv"])
    with pytest.raises(TypeError, match="takes 1 tensors, got 2"):
        fast(x, mask)
    proven(model, x, mask, expected=["conv", "traced", "conv"])
    _, fast = proven(model, x, mask, torch.tensor(3.0), expected=["conv", "traced", "traced", "conv"])
    with pytest.raises((TypeError, ValueError), match="input"):
        fast(x)
    with pytest.raises(TypeError, match="example_input: Net takes 1 tensors, got 2"):
        optimize_for_inference(cnn(lambda m, x: m.a(x)), (x, x))


def test_a_default_that_is_a_tuple():
    class Shifted(Net):
        def forward(self, x, by=(0.5, 2)):
            return self.a(x * by[1]) + by[0]

    model = Shifted(None, a=conv())
    x = torch.randn(X)
    fast = optimize_for_inference(model, x, tune="off")
    agree(fast(x), model, x)
    with pytest.raises(TypeError, match="takes 1 tensors, got 2"):
        fast(x, x)


def test_two_inputs_of_different_batches():
    class Two(Net):
        def forward(self, x, v):
            return self.a(x) + self.f(v)[:, :, None, None]

    proven(Two(None, a=conv(), f=nn.Linear(6, 16)), torch.randn(X), torch.randn(5, 6))
    proven(Two(None, a=conv(), f=nn.Linear(6, 16)), torch.randn(X), torch.randn(6, 1).t())


def test_a_strided_matrix_as_input():
    model = randomized(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5)))
    proven(model, torch.randn(6, 9).t(), expected=["linear", "traced", "linear"])
    proven(model, torch.randn(9, 12)[:, ::2])


def test_flattened_inputs_and_outputs():
    model = Net(lambda m, x: (lambda y: (y, torch.flatten(y, 1), m.f(torch.flatten(y, 1))))(m.pool(m.a(x))),
                a=conv(), pool=nn.AdaptiveAvgPool2d(1), f=nn.Linear(16, 5))  # fmt: skip
    proven(model, expected=["conv", "avg_pool", "linear"])
    proven(Net(lambda m, x: m.f(x.flatten(1)), f=nn.Linear(6, 5)), torch.randn(4, 6, 1, 1), expected=["linear"])
    proven(
        Net(lambda m, x: m.f(x.flatten(1)), f=nn.Linear(24, 5)), torch.randn(4, 6, 2, 2), expected=["traced", "linear"]
    )


def test_what_cannot_be_traced_is_said():
    class Flow(Net):
        def forward(self, x):
            return self.a(x) if x.sum() > 0 else x

    class Silent(Net):
        def forward(self, x):
            raise NotImplementedError

    with pytest.raises(ValueError, match="Flow cannot be traced .*control flow"):
        capture(Flow(None, a=conv()))
    with pytest.raises(ValueError, match="Silent cannot be traced .NotImplementedError"):
        capture(Silent(None))


def test_the_copy_is_the_copy():
    """Tracing leaves the model as it was: mode, gradients' flags, swapped blocks."""
    model = swap_blocks(resnet()).train()
    before = {k: (v.clone(), v.requires_grad) for k, v in model.state_dict(keep_vars=True).items()}
    kinds = [type(m) for m in model.modules()]
    capture(model)
    assert [type(m) for m in model.modules()] == kinds and all(m.training for m in model.modules())
    for k, v in model.state_dict(keep_vars=True).items():
        assert torch.equal(v, before[k][0]) and v.requires_grad == before[k][1]


def test_what_is_asked_of_a_tensor_besides_its_size_is_answered_by_the_tensor():
    """Shapes are worked out on tensors without data, of a device of their own."""

    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv(3, 8)

        def forward(self, x):
            return self.conv(x) * (2.0 - x.is_meta) + x.ndim

    proven(Asks())
