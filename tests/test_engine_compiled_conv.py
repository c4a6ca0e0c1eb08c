"""The compiled convolutions as candidates of the engine, their launches replaced: there is no GPU here."""

from __future__ import annotations

import types
from dataclasses import replace

import pytest
import torch
from torch import nn

from fused_resnet.backends import cuda, cuda_conv, library
from fused_resnet.engine import cases, chain_cases, compiled_chain, compiled_conv, compiled_pool, gpu, reference
from fused_resnet.engine.guard import Verifier
from fused_resnet.engine.problem import Candidate

pytestmark = pytest.mark.skipif(not cuda_conv.instances(), reason=f"{library.build_facts().get('cuda_missing')}")

ARGS = cases.ConvArgs(
    n=8, c=64, h=14, w=14, k=128, kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), relu=True,
    residual=False, segment=None, device="cpu", dtype="float16", tf32=False,
)  # fmt: skip


def names(args, arch, dtype=torch.float16):
    return [c["instance"] for c in compiled_conv.configs(args.shape, dtype, arch, 132)]


@pytest.mark.parametrize("arch, kind", [(80, "sm80"), (86, "sm80"), (89, "sm80"), (90, "sm90"), (120, "sm80")])
def test_the_instances_of_the_chip_are_candidates(arch, kind):
    if not any(i.name.startswith(kind) for i in cuda_conv.instances()):
        pytest.skip(f"built without {kind}")
    for args in (ARGS, replace(ARGS, residual=True), replace(ARGS, segment=(64, 14, 14, 1))):
        found = names(args, arch)
        assert len(found) >= 4 and all(name.startswith(kind) for name in found)


@pytest.mark.parametrize(
    "args, arch, dtype",
    [
        (ARGS, 75, torch.float16),
        (ARGS, 90, torch.float32),
        (replace(ARGS, c=3), 90, torch.float16),
        (replace(ARGS, k=12), 80, torch.bfloat16),
        (replace(ARGS, residual=True, segment=(64, 14, 14, 1)), 90, torch.float16),
    ],
    ids=["old", "float32", "3-channels", "12-channels", "residual-and-segment"],
)
def test_what_none_can_run_has_no_candidate(args, arch, dtype):
    assert names(args, arch, dtype) == []


def test_they_stand_behind_the_others_and_on_a_gpu_only(monkeypatch):
    case = cases.ConvCase(ARGS)
    assert not any(c.backend == "cuda" for c in case.candidates())
    case.device, case.arch, case.sms = torch.device("cuda", 0), 80, 108
    monkeypatch.setattr(cases, "_fuses", lambda *args: True)
    found = case.candidates()
    backends = [c.backend for c in found]
    assert found[0] is cases.CUDNN and backends == sorted(backends, key=["cudnn", "triton", "cuda"].index)
    assert backends.count("cuda") == 4
    assert not any(case.compiles(c) for c in found if c.backend == "cuda")


def launch(instance, x, weight, bias, residual, segment, out, workspace, *, constant_weights, **options):
    assert constant_weights  # the engine's are
    assert out.is_contiguous(memory_format=torch.channels_last) and weight.is_contiguous(
        memory_format=torch.channels_last
    )
    out.copy_(reference.conv_bias_act(x, weight, bias, residual, segment=segment, **options))


@pytest.mark.parametrize("right", [True, False])
def test_the_verifier_judges_them_like_all_others(right, monkeypatch):
    def run(instance, x, weight, bias, residual, segment, out, workspace, **options):
        assert instance.dtype is torch.float16 and instance.name == "sm80 64x64x32"
        launch(instance, x, weight, bias, residual, segment, out, workspace, **options)
        if not right:
            out.mul_(1.01)

    monkeypatch.setattr(cuda_conv, "conv_bias_act_out", run)
    case = cases.ConvCase(replace(ARGS, segment=(32, 27, 28, 2)))
    candidate = Candidate("cuda", "x", {"instance": "sm80 64x64x32"})
    objection = Verifier(case, torch.device("cpu"), 0).objection(candidate)
    assert (objection is None) == right


needs_splits = pytest.mark.skipif(not any(i.parts for i in cuda_conv.instances()), reason="built without sm_90a")


@needs_splits
def test_few_positions_are_for_blocks_that_share_a_reduction():
    """Where there are many, what is for few is not tried; where there are few, the order is that of the blocks that
    find work."""

    def parts(args):
        return [i.parts for i in cuda_conv.candidates(compiled_conv.sizes(args.shape), torch.float16, 90, 132)]

    assert not any(parts(replace(ARGS, n=128)))
    late = replace(ARGS, n=1, c=512, k=512, h=7, w=7)
    assert parts(late)[:3] == [8, 4, 2] and set(parts(late)) >= {0, 1}
    early = replace(ARGS, n=1, c=64, k=64, h=56, w=56)
    assert parts(early)[0] == 2 and 8 not in parts(early)
    reduce = replace(ARGS, n=1, c=64, k=64, kernel=(1, 1), padding=(0, 0), h=56, w=56)
    assert parts(reduce)[0] == 1 and set(parts(reduce)) <= {0, 1}


@needs_splits
def test_without_cutlass_a_hopper_has_those_of_ampere_for_many_positions(monkeypatch):
    listed = tuple(i for i in cuda_conv.instances() if not i.general or i.arch == 80)
    monkeypatch.setattr(cuda_conv, "instances", lambda: listed)
    monkeypatch.setattr(cuda_conv.library, "build_facts", lambda: {"archs": ["sm_80", "compute_80", "sm_90a"]})
    cuda_conv.runs_on.cache_clear()
    try:
        assert {i.arch for i in cuda_conv.runs_on(90)} == {80, 90}
        assert {(i.arch, i.parts) for i in cuda_conv.runs_on(89)} == {(80, 0)}
    finally:
        cuda_conv.runs_on.cache_clear()


def test_an_instance_that_this_build_lacks_is_an_error():
    with pytest.raises(RuntimeError, match="this build has no convolution 'sm70 1x1' for torch.float16"):
        compiled_conv.workspace({"instance": "sm70 1x1"}, ARGS.shape, torch.float16, 132)


def test_workspace_of_stream_k():
    stream_k = [i.name for i in cuda_conv.instances() if i.splits]
    for name in stream_k:
        assert compiled_conv.workspace({"instance": name}, ARGS.shape, torch.float16, 132) > 0
        assert cases.conv_workspace(Candidate("cuda", name, {"instance": name}), ARGS.shape, torch.float16, 132) > 0


def program_of(model, x, instance, monkeypatch):
    """(program whose convolutions and classifiers are all this instance's, what is launched: names, workspaces)"""
    from fused_resnet.engine.eager import EagerExecutor
    from fused_resnet.engine.graph import capture, propagate
    from fused_resnet.engine.pieces import Pieces
    from fused_resnet.engine.steps import match
    from fused_resnet.engine.tune import Result, Results

    launched = []

    def run(instance, x, weight, bias, residual, segment, out, workspace, **options):
        launched.append((instance.name, None if workspace is None else workspace.numel()))
        launch(instance, x, weight, bias, residual, segment, out, workspace, **options)

    monkeypatch.setattr(cuda_conv, "conv_bias_act_out", run)
    monkeypatch.setattr(cases.compiled_conv, "workspace", lambda config, shape, dtype, sms: 128)
    graph = capture(model)
    propagate(graph, (x,))
    network = match(graph)
    executor = EagerExecutor(model, torch.float16)
    pieces = [p for p in Pieces(network, torch.float16, x.device, False, {}).all() if len(p.steps) == 1]
    chosen = Candidate("cuda", instance, {"instance": instance})
    results = Results({p.key: Result(p.key, chosen, "measured", True) for p in pieces if p.args is not None})
    return gpu.Program(network, pieces, results, gpu.Packed(executor.eager), executor.eager, x.device), launched


def close(y, model, x):
    expected = model.float()(x.float())
    return y.shape == expected.shape and ((y.float() - expected).norm() / expected.norm()).item() < 2e-3


def test_a_program_launches_them(monkeypatch):
    """A network whose convolutions are all compiled: weights packed, places in the arena, workspace given."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(16, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 32, 1), nn.ReLU()
    ).eval().half()  # fmt: skip
    x = torch.randn(2, 16, 9, 11).half()
    program, launched = program_of(model, x, "sm80 64x64x32", monkeypatch)
    assert program.is_ours and {g.backend for g in program.groups()} == {"cuda"}
    assert {g.config for g in program.groups()} == {"sm80 64x64x32"}
    assert not program.begins_alone((x,))  # a convolution takes x in one layout only
    y = program.run((x,))
    assert launched == [("sm80 64x64x32", 128)] * 2 and close(y, model, x)


def test_pools_and_classifiers_are_kernels_like_others(monkeypatch):
    """Values of two dimensions, in the arena and as the network's result."""

    class Ops:
        @staticmethod
        def avg_pool_out(x, y):
            y.copy_(x.float().mean((2, 3), keepdim=True))

    monkeypatch.setattr(torch.ops, "fused_resnet_cuda", Ops, raising=False)
    torch.manual_seed(0)
    pool = [nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*pool, nn.Linear(24, 40), nn.Sigmoid(), nn.Linear(40, 16), nn.Linear(16, 8)).eval().half()
    x = torch.randn(3, 16, 5, 4).half()
    program, launched = program_of(model, x, "sm80 64x64x32", monkeypatch)
    assert [g.backend for g in program.groups()] == ["cuda"] * 3 + ["traced"] + ["cuda"] * 2
    y = program.run((x,))
    assert len(launched) == 4 and close(y, model, x)
    program.run((torch.randn_like(x),))
    assert program.run((x,)).tolist() == y.tolist()


def test_a_linear_layer_reads_maps_as_pytorch_flattens_them(monkeypatch):
    model = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.Flatten(), nn.Linear(24 * 6, 8)).eval().half()
    x = torch.randn(3, 16, 2, 3).half()
    program, launched = program_of(model, x, "sm80 64x64x32", monkeypatch)
    assert close(program.run((x,)), model, x) and len(launched) == 2


@pytest.mark.parametrize("right", [True, False])
def test_the_verifier_judges_classifiers_and_pools(right, monkeypatch):
    def run(instance, x, weight, bias, residual, segment, out, workspace, **options):
        launch(instance, x, weight, bias, residual, segment, out, workspace, **options)
        if not right:
            out.mul_(1.01)

    class Ops:
        @staticmethod
        def avg_pool_out(x, y):
            y.copy_(x.float().mean((2, 3), keepdim=True).mul(1.0 if right else 1.01))

    monkeypatch.setattr(cuda_conv, "conv_bias_act_out", run)
    monkeypatch.setattr(cases.compiled_conv, "workspace", lambda config, shape, dtype, sms: 0)
    monkeypatch.setattr(torch.ops, "fused_resnet_cuda", Ops, raising=False)
    facts = dict(n=3, c=64, h=1, w=1, k=40, kernel=(1, 1), padding=(0, 0), relu=False)
    linear = cases.LinearArgs(**ARGS.__dict__ | facts).problem()
    pool = cases.PoolArgs(n=3, c=66, h=7, w=9, device="cpu", dtype="float16").problem()
    for problem, candidate in (
        (linear, Candidate("cuda", "x", {"instance": "sm80 64x64x32"})),
        (pool, Candidate("cuda", "avg_pool")),
    ):
        case = problem.build()
        for judged in (candidate, cases.CUDNN):
            objection = Verifier(case, torch.device("cpu"), 0).objection(judged)
            assert (objection is None) == (right or judged is cases.CUDNN), (problem.key, objection)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(), None),
        (dict(shape=(1, 2047, 7, 7)), "needs an even number of channels, got 2047"),
        (dict(shape=(65536, 8, 7, 7)), "needs 1 to 65535 images"),
        (dict(dtype=torch.float64), "needs float32, float16 or bfloat16, got torch.float64"),
        (dict(arch=75), "was not compiled for sm_75"),
    ],
)
def test_what_the_pool_declines(changes, sentence):
    reason = compiled_pool.declines(**dict(shape=(1, 2048, 7, 7), dtype=torch.float16, arch=90) | changes)
    assert reason is None if sentence is None else sentence in reason


# The block path


def call(x=None, weight=None, residual=None, groups=1, **changes):
    x = torch.zeros(2, 64, 7, 7, dtype=torch.float16) if x is None else x
    weight = torch.zeros(64, 64, 3, 3, dtype=torch.float16) if weight is None else weight
    return (x, weight, *[None] * 4, 1e-5, residual, [1, 1], [1, 1], [1, 1], groups, True)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (call(), None),
        (call(groups=2), "has conv_bn_act for groups == 1, got 2"),
        (call(x=torch.zeros(2, 64, 7, 7)), "needs weight in torch.float32, got torch.float16"),
        (call(x=torch.zeros(2, 64, 7, 7), weight=torch.zeros(64, 64, 3, 3)), "needs float16 or bfloat16"),
        (
            call(x=torch.zeros(2 * 64 * 49 + 1, dtype=torch.float16)[1:].view(2, 64, 7, 7)),
            "x at a multiple of 16 bytes",
        ),
        (call(weight=torch.zeros(20, 64, 3, 3, dtype=torch.float16)), "a multiple of 8, got K = 20"),
        (call(residual=torch.zeros(2, 64, 7, 7)), "needs residual in torch.float16, got torch.float32"),
    ],
    ids=["fine", "groups", "mixed", "float32", "misaligned", "channels", "residual"],
)
def test_what_the_cuda_backend_declines(arguments, sentence, monkeypatch):
    monkeypatch.setattr(cuda, "chip", lambda device: (80, 108))
    reason = cuda._declines_conv(*arguments)
    assert reason is None if sentence is None else sentence in reason


def test_the_variant_is_the_instance(monkeypatch):
    monkeypatch.setattr(cuda, "chip", lambda device: (80, 108))
    few, many = call(), call(x=torch.zeros(128, 64, 56, 56, dtype=torch.float16, device="meta"))
    assert cuda.variant("conv_bn_act", *few) == ("sm80 64x64x32", False)
    assert cuda.variant("conv_bn_act", *many) == ("sm80 128x64x32", False)
    assert cuda.variant("bn_stats", few[0]) is None


def test_an_automatic_choice_leaves_convolutions_to_the_next_backend():
    """Until a GPU has run them: a kernel that hangs would hang the user's process."""
    assert "tuner" in cuda.defers("conv_bn_act", *call()) and cuda.defers("bn_act") is None


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_conv_bn_act_of_the_cuda_backend(layout, monkeypatch):
    """Layouts in and out, and vectors in any dtype, around the op."""
    from fused_resnet.backends import reference as blocks
    from fused_resnet.backends.layout import output_format

    monkeypatch.setattr(cuda, "chip", lambda device: (80, 108))

    def op(index, x, weight, gamma, beta, mean, var, eps, residual, stride, padding, dilation, relu):
        for t in (x, weight, residual):
            assert t.is_contiguous(memory_format=torch.channels_last)
        assert all(v.dtype is torch.float32 for v in (gamma, beta, mean, var))
        y = blocks.conv_bn_act(x, weight, gamma, beta, mean, var, eps, residual, stride, padding, dilation, 1, relu)
        return y.contiguous(memory_format=torch.channels_last)

    class Ops:
        conv_bn_act = staticmethod(op)

    torch.manual_seed(0)
    x, weight, residual = (
        torch.randn(size).half().contiguous(memory_format=layout)
        for size in ((2, 64, 7, 7), (24, 64, 3, 3), (2, 24, 7, 7))
    )
    bn = [torch.rand(24).add(0.5).half() for _ in range(4)]
    args = (x, weight, *bn, 1e-5, residual, [1, 1], [1, 1], [1, 1], 1, True)
    expected = blocks.conv_bn_act(*args)
    monkeypatch.setattr(torch.ops, "fused_resnet_cuda", Ops, raising=False)
    monkeypatch.setattr(cuda_conv, "plan", lambda *args: 0)
    for y in (cuda.conv_bn_act(*args), cuda.prepare("conv_bn_act", *args)(*args)):
        assert (y - expected).float().norm() < 1e-3 * expected.float().norm()
        assert y.is_contiguous(memory_format=output_format(x, weight))


@pytest.mark.parametrize("projection", [False, True], ids=["expand", "projection"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pointwise_bn_act_of_the_cuda_backend(layout, projection, monkeypatch):
    """One compiled convolution behind the statistics of its input; those are Triton's, and stand-ins here."""
    from fused_resnet.backends import composed, triton
    from fused_resnet.backends import reference as blocks
    from fused_resnet.backends.layout import output_format

    def op(index, x, weight, bias, scale, residual, x2, weight2, stride2, stride, padding, dilation, relu):
        assert x2 is None and weight2 is None and all(t.dtype is torch.float32 for t in (bias, scale))
        for t in (x, weight, *([] if residual is None else [residual])):
            assert t.is_contiguous(memory_format=torch.channels_last)
        y = torch.conv2d(x.float(), weight.float(), None, stride, padding, dilation)
        y = y * scale.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1) + (0 if residual is None else residual)
        return (y.relu() if relu else y).to(x.dtype).contiguous(memory_format=torch.channels_last)

    def bn_act(x, mean, var, weight, bias, eps, residual, relu):
        return blocks.bn_act(x, mean, var, weight, bias, eps, residual, relu, True)

    def gram(a, mean, var, weight, bias, eps, relu, stride):
        assert mean is None
        return composed.covariance(blocks.rows_of(a, stride))

    def statistics(weight, a_mean, a_cov, out_weight, out_bias, eps):
        mean, var = composed.statistics_of_product(weight, a_mean, a_cov)
        scale = out_weight.float() / (var + eps).sqrt()
        return mean, var, scale, out_bias.float() - mean * scale

    torch.manual_seed(0)
    size = (2, 32, 7, 9) if projection else (2, 64, 7, 9)
    x, weight, residual = (
        torch.randn(size).bfloat16().contiguous(memory_format=layout)
        for size in (size, (96, size[1], 1, 1), (2, 96, 7, 9))
    )
    bn, out = ([torch.rand(n).add(0.5).bfloat16() for _ in range(2)] for n in (size[1], 96))
    if projection:
        args = (x, weight, *[None] * 4, 0.0, True, *out, 1e-5, None, [2, 2], False)
    else:
        args = (x, weight, *blocks.bn_stats(x), *bn, 1e-5, True, *out, 1e-5, residual, [1, 1], True)
    expected = blocks.pointwise_bn_act(*args)
    monkeypatch.setattr(cuda, "chip", lambda device: (90, 132))
    monkeypatch.setattr(triton, "unavailable", lambda: None)
    monkeypatch.setattr(triton, "launches", lambda device: True)
    monkeypatch.setattr(triton, "prepared_training", {"gram": gram, "product_statistics": statistics}.get)
    instance = cuda.variant("conv_bn_act", *_as_convolution(args))
    assert cuda.variant("pointwise_bn_act", *args) == (*instance, triton.gram_variant(x, args[12]))
    serve = cuda.prepare("pointwise_bn_act", *args)
    monkeypatch.setattr(torch.ops, "fused_resnet_cuda", types.SimpleNamespace(conv_bias_act=op, bn_act=bn_act))
    for found in (serve(*args), serve(*args)):
        for v, e in zip(found, expected, strict=True):
            assert (v - e).float().norm() < 1e-2 * e.float().norm()
        assert found[0].is_contiguous(memory_format=output_format(x, weight))


def _as_convolution(args):
    """The call of conv_bn_act that runs the same convolution."""
    x, weight, residual, stride = *args[:2], args[11], args[12]
    return (x, weight, *[None] * 4, 1e-5, residual, stride, [0, 0], [1, 1], 1, True)


def test_what_falls_back_to_passes_around_a_convolution(monkeypatch, caplog):
    """Without Triton, in float32, or where no convolution was compiled for the channels."""
    from fused_resnet.backends import triton

    def args(dtype=torch.float16, k=96):
        x, weight = torch.zeros(2, 64, 7, 9, dtype=dtype), torch.zeros(k, 64, 1, 1, dtype=dtype)
        return (x, weight, *[None] * 4, 0.0, True, *[None] * 2, 1e-5, None, [1, 1], False)

    monkeypatch.setattr(cuda, "chip", lambda device: (90, 132))
    assert not cuda._compiles_pointwise(*args())  # this machine has no GPU for Triton
    monkeypatch.setattr(triton, "unavailable", lambda: None)
    triton.launches.cache_clear()
    with caplog.at_level("WARNING", "fused_resnet"):
        assert not cuda._compiles_pointwise(*args())  # as where it finds no C compiler: a launch fails
    assert "triton: cannot launch" in caplog.text
    triton.launches.cache_clear()
    monkeypatch.setattr(triton, "launches", lambda device: True)
    assert cuda._compiles_pointwise(*args())
    assert not cuda._compiles_pointwise(*args(torch.float32)) and not cuda._compiles_pointwise(*args(k=20))
    assert cuda.variant("pointwise_bn_act", *args(k=20)) is None


# Chains

CHAIN = dict(n=128, c=64, h=56, w=56, middle=64, k=256, following=64, stride=1, relu=True, residual=True, segment=None)
CHAIN |= dict(quarter=False, pool=False, device="cpu", dtype="float16")


def chain_configs(arch=90, **changes):
    args, options = chain_cases.ChainArgs(**CHAIN | changes)._call_on_meta()
    return compiled_chain.configs(arch, 132, *args, **options), compiled_chain.declines(arch, 132, *args, **options)


needs_chains = pytest.mark.skipif(not cuda_conv.chains(), reason="built without chains for sm_90a")
STAGE_END = dict(following=128, quarter=True)
PROJECTED = dict(residual=False, segment=(64, 56, 56, 1))
LAYER2 = dict(c=128, h=28, w=28, middle=128, k=512, following=128)


@needs_chains
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("changes", [{}, STAGE_END, PROJECTED], ids=["middle", "stage-end", "first"])
def test_layer1_of_every_bottleneck_resnet_has_a_chain(changes, dtype):
    configs, reason = chain_configs(**changes, dtype=dtype)
    kernels = [config["instance"].split(" -> ")[0] for config in configs]
    assert reason is None and kernels == ["sm90 chain 64", "sm90 chain by lines 64"]


@needs_chains
def test_layer2_has_one_for_blocks_inside_a_stage():
    (config,), reason = chain_configs(**LAYER2)
    assert reason is None and config["instance"] == "sm90 chain by lines 128 -> 512 -> 128"


@needs_chains
@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(arch=80), "needs sm_90, got sm_80"),
        (dict(dtype="float32"), "needs float16 or bfloat16"),
        (dict(middle=128), "needs a 3x3 of 64 or of 128 channels on either side, got a weight [128, 64, 3, 3]"),
        (dict(c=128), "needs a 3x3 of 64 or of 128 channels on either side"),
        (dict(c=128, middle=128), "needs 128 -> 128 -> 512 channels, got a weight [256, 128, 1, 1]"),
        (dict(LAYER2, following=256), "has next convolutions of 128 channels for 128 in the middle, got 256"),
        (dict(LAYER2, quarter=True), "stores all of y for 128 channels in the middle"),
        (dict(LAYER2, **PROJECTED), "got 128 beside a projection"),
        (dict(stride=2), "has neither a stride nor a pool, got stride 2"),
        (dict(following=0), "has next convolutions of 128, 64, 64 beside a projection channels for 64 in the middle"),
        (dict(following=0, pool=True), "pool True"),
        (dict(PROJECTED, segment=(256, 56, 56, 1)), "needs a projection of 64 channels"),
        (dict(PROJECTED, following=128), "got 128"),
        (dict(n=8), "needs at least 33792 positions to be worth it, got 25088"),
        (dict(LAYER2, n=16), "needs at least 14784 positions to be worth it, got 12544"),
    ],
    ids=["sm80", "float32", "middle", "input", "output", "layer2-end", "layer2-quarter", "layer2-first", "stride"]
    + ["no-next", "pool", "wide", "end", "few", "layer2-few"],
)
def test_other_chains_are_declined(changes, sentence):
    configs, reason = chain_configs(**changes)
    assert configs == [] and sentence in reason


@needs_chains
def test_a_chain_case_runs_it(monkeypatch):
    """Verified as any candidate, its launch by PyTorch."""
    launched = []

    class Ops:
        @staticmethod
        def chain_out(
            index, x, w1, b1, w2, b2, residual, x2, projection, stride2, w3, b3, relu, quarter, y, z, constant
        ):
            assert constant
            launched.append(index)
            segment = None if x2 is None else (x2, projection, stride2)
            options = dict(residual=residual, segment=segment, relu=relu, next=(w3, b3), quarter=quarter)
            for out, result in zip((y, z), reference.chain(x, w1, b1, w2, b2, **options), strict=True):
                out.copy_(result)

    instances = cuda_conv.chains()
    monkeypatch.setattr(torch.ops, "fused_resnet_cuda", Ops, raising=False)
    for changes in ({}, STAGE_END, PROJECTED | dict(segment=(64, 15, 13, 2)), LAYER2 | dict(h=9, w=7)):
        case = chain_cases.ChainCase(chain_cases.ChainArgs(**CHAIN | dict(n=2, h=8, w=7) | changes))
        following, segment = case.args.following, case.args.segment is not None
        kind = (torch.float16, case.args.middle, following, segment)
        wanted = [c for c in instances if (c.dtype, c.middle, c.following, c.segment) == kind]  # not by chains_of()
        assert [c.by_lines for c in wanted] == ([False, True] if case.args.middle == 64 else [True])
        for chain in wanted:
            candidate = Candidate("cuda", chain.name, {"instance": chain.name})
            assert Verifier(case, torch.device("cpu"), 0).objection(candidate) is None
            assert set(launched) == {chain.index} and launched.clear() is None
        with pytest.raises(RuntimeError, match="this build has no chain 'another' for torch.float16"):
            Verifier(case, torch.device("cpu"), 0).objection(Candidate("cuda", "x", {"instance": "another"}))
