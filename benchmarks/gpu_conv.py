"""gpu-check's cases of the compiled convolutions: every instance against the reference, at odd shapes and at those of
ResNets, and its speed beside cuDNN's and Triton's; the same of the compiled chains.

On a CPU, in a dry run, PyTorch's convolution stands for the instances.
"""

from __future__ import annotations

import functools
import random
import statistics
from collections.abc import Callable, Iterator

import torch

from benchmarks.caselog import Declined
from benchmarks.resnet_shapes import resnet_shapes
from fused_resnet import measure
from fused_resnet.backends import cuda_conv
from fused_resnet.engine import cases, chain_cases
from fused_resnet.engine.guard import Verifier
from fused_resnet.engine.problem import Candidate

DTYPES = ("float16", "bfloat16")
ROUNDS = 15
RANDOM_SHAPES = 24

_CONV = dict(n=2, c=64, h=7, w=9, k=72, kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), relu=True)
_CONV |= dict(residual=False, segment=None)
_POINT = _CONV | dict(kernel=(1, 1), padding=(0, 0))
ODD = {
    "3x3": _CONV,
    "3x3-residual": _CONV | dict(residual=True, n=5, k=136),
    "1x1-segment": _POINT | dict(segment=(40, 13, 17, 2), c=136),
    "3x3-stride2": _CONV | dict(stride=(2, 2), h=15, w=13, relu=False),
    "1x1-stride2": _POINT | dict(stride=(2, 2), h=9, c=72),
    "3x3-dilated": _CONV | dict(padding=(2, 2), dilation=(2, 2), h=11, c=8),
    "3x3-segment": _CONV | dict(segment=(72, 14, 18, 2)),
    "1x1-segment-512": _POINT | dict(segment=(40, 13, 17, 2), c=136, k=512),
    "1x1-one-position": _POINT | dict(n=3, h=1, w=1, c=520),
    "5x3-uneven": _CONV | dict(kernel=(5, 3), padding=(2, 0), stride=(1, 2), dilation=(2, 1), h=23, w=19),
    "3x3-many-tiles": _CONV | dict(n=9, h=33, w=29, k=264),
    "3x3-pairs-of-tiles": _CONV | dict(n=17, h=33, w=29, c=72, k=256, residual=True),  # more than a chip has at once
    "3x3-64": _CONV | dict(n=33, h=19, w=57, k=64, residual=True),
    "3x3-64-a-line": _CONV | dict(n=5, h=1, w=115, k=64),
}


def _case(facts: dict, dtype: str, device: torch.device) -> cases.ConvCase:
    return cases.ConvArgs(**facts, device=device.type, dtype=dtype, tf32=False).problem().build()


def instances(case: cases.ConvCase) -> list[Candidate]:
    """All instances that can run it."""
    return case.compiled() if case.device.type == "cuda" else [cases.CUDNN]


@torch.no_grad()
def _parity(facts: dict, dtype: str, device: torch.device) -> dict:
    """Every instance between guard zones, twice."""
    case = _case(facts, dtype, device)
    candidates = instances(case)
    assert candidates, "no instance can run it"
    verifier = Verifier(case, device, 0)
    found = {str(candidate): verifier.objection(candidate) for candidate in candidates}
    wrong = {name: reason for name, reason in found.items() if reason}
    assert not wrong, wrong
    return {"instances": list(found)}


def odd_cases(device: torch.device) -> Iterator[tuple[str, Callable[[], dict]]]:
    for dtype in DTYPES if device.type == "cuda" else ("float32",):
        for name, facts in ODD.items():
            yield f"conv/{name}/{dtype}", functools.partial(_parity, facts, dtype, device)
        if device.type == "cuda":
            for images, channels in ((32, 64), (1, 128), (300, 256)):
                yield f"conv-overlap/{channels}/{dtype}", functools.partial(_overlap, dtype, images, channels, device)
    yield from chains(device)


def _as_one_at_a_time(found: list, run: Callable) -> dict:
    """run(kernels, constant weights, what to do after each) overlapping, eager and in a graph, as without overlap: to
    the bit."""
    for kernels in (*([k] for k in found), found, found[::-1]):
        name = kernels[0].name if len(kernels) == 1 else "all, mixed"
        alone = run(kernels, False, torch.cuda.synchronize)
        assert alone.isfinite().all() and alone.float().norm() > 1, name
        for constant in (False, True):
            assert torch.equal(run(kernels, constant, lambda: None), alone), f"{name}, eager, {constant}"
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = run(kernels, constant, lambda: None)
            for _ in range(3):
                graph.replay()
                assert torch.equal(y, alone), f"{name}, in a graph, {constant}"
    return {"instances": [k.name for k in found]}


@torch.no_grad()
def _overlap(dtype: str, images: int, channels: int, device: torch.device) -> dict:
    """Kernels that begin while those before them run give the bits that they give one at a time, each kind by itself
    and all mixed: a convolution reads what the last two wrote, in memory that is written over and over, some have a
    batch norm whose vectors the kernel before reckons, and weights change in between."""
    arch, sms = cases.chip(device)
    random, one, size = cases.Random(device, getattr(torch, dtype), 0), (1, 1), 64 * 28 // channels
    x = random.map(images, channels, size, size)
    filters = [random.filter(channels, channels, 3, 3) for _ in range(6)]
    shape = cuda_conv.shape_of(x.shape, filters[0].shape, one, one, one)
    found = [i for i in cuda_conv.runs_on(arch) if i.arch == 90 and i.dtype is x.dtype]
    found = [i for i in found if isinstance(cuda_conv.plan(i.index, shape, sms), int)]
    if not found:
        raise Declined(f"no convolution for sm_{arch} overlaps another")
    bias, gamma, mean = (random.bias(channels) for _ in range(3))
    var = random.bias(channels).abs() + 0.5
    sizes = [cuda_conv.plan(i.index, shape, sms) for i in found]
    space = torch.empty(max(sizes), dtype=torch.uint8, device=device) if max(sizes) else None

    def run(instances, constant: bool, wait) -> torch.Tensor:
        maps, weights = [x.clone(), torch.zeros_like(x), torch.zeros_like(x)], [f.clone() for f in filters[:3]]
        for turn in range(60):
            if turn % 5 == 0:
                for i, weight in enumerate(weights):
                    weight.copy_(filters[i + turn // 5 % 4])
                for t in maps:
                    t.div_(t.float().norm().clamp(min=1.0) / 150)
                cases.settle(device)
            for i in range(3):
                instance = instances[(3 * turn + i) % len(instances)]
                source, residual, weight = maps[i - 3], maps[i - 1], weights[i]
                if (3 * turn + i) % 7 == 6:
                    bn = (gamma, bias, mean, var, 1e-5)
                    call = (instance.index, source, weight, *bn, residual, [1, 1], [1, 1], [1, 1], True)
                    maps[i - 2] = torch.ops.fused_resnet_cuda.conv_bn_act(*call)
                else:
                    cuda_conv.conv_bias_act_out(
                        instance, source, weight, bias, residual, None, maps[i - 2], space, stride=one, padding=one,
                        dilation=one, relu=True, constant_weights=constant,
                    )  # fmt: skip
                wait()
        return maps[0]

    return _as_one_at_a_time(found, run)


_CHAIN = dict(n=3, c=64, h=13, w=11, middle=64, k=256, following=64, stride=1, relu=True, residual=True, segment=None)
_CHAIN |= dict(quarter=False, pool=False)
_CHAIN128 = _CHAIN | dict(c=128, middle=128, k=512, following=128)
CHAINS = {
    "next-64": _CHAIN,
    "next-128-quarter": _CHAIN | dict(following=128, quarter=True),
    "segment-stride2": _CHAIN | dict(residual=False, segment=(64, 25, 22, 2)),
    "several-tiles": _CHAIN | dict(n=17, h=57, w=55),  # for each warp group
    "no-shortcut": _CHAIN | dict(residual=False, relu=False),
    "one-image": _CHAIN | dict(n=1, h=3, w=5),
    "many-tiles": _CHAIN | dict(n=128, h=29, w=31),
    "cut-lines": _CHAIN | dict(n=2, h=5, w=115),
    "cut-lines-quarter": _CHAIN | dict(n=2, h=5, w=61, following=128, quarter=True),
    "one-line": _CHAIN | dict(n=5, h=1, w=9),
    "layer1-first": _CHAIN | dict(n=32, h=56, w=56, residual=False, segment=(64, 56, 56, 1)),
    "layer1-middle": _CHAIN | dict(n=32, h=56, w=56),
    "layer1-last": _CHAIN | dict(n=32, h=56, w=56, following=128, quarter=True),
    "128": _CHAIN128 | dict(n=3, h=13, w=11),
    "128-cut-lines": _CHAIN128 | dict(n=2, h=6, w=61, relu=False),
    "128-one-line": _CHAIN128 | dict(n=5, h=1, w=9, residual=False),
    # Several steps for a block, with lines left over and strips that are cut.
    "128-many-steps": _CHAIN128 | dict(n=64, h=29, w=27),
    "128-many-strips": _CHAIN128 | dict(n=64, h=13, w=31),
    "128-many-images": _CHAIN128 | dict(n=300, h=5, w=9),
    "many-cut-lines": _CHAIN | dict(n=64, h=5, w=61),
    "layer2-middle": _CHAIN128 | dict(n=32, h=28, w=28),
}


def _chain(facts: dict, dtype: str, device: torch.device) -> tuple[chain_cases.ChainCase, list[Candidate]]:
    """The case, and the compiled chain for it, whatever its size."""
    case = chain_cases.ChainArgs(**facts, device=device.type, dtype=dtype).problem().build()
    if device.type != "cuda":
        return case, [cases.CUDNN]
    if case.arch != 90:
        raise Declined(f"the compiled chain needs sm_90, this is sm_{case.arch}")
    found = cuda_conv.chains_of(case.dtype, facts["middle"], facts["following"], facts["segment"] is not None)
    return case, [Candidate("cuda", c.name, {"instance": c.name}) for c in found]


@torch.no_grad()
def _chain_parity(facts: dict, dtype: str, device: torch.device) -> dict:
    case, candidates = _chain(facts, dtype, device)
    assert candidates, "no compiled chain"
    verifier = Verifier(case, device, 0)
    wrong = {str(c): reason for c in candidates if (reason := verifier.objection(c))}
    assert not wrong, wrong
    if facts["residual"] and not facts["quarter"]:
        for candidate in candidates:
            _in_place(case, candidate, device)
    return {"instances": list(map(str, candidates))}


def _in_place(case: chain_cases.ChainCase, candidate: Candidate, device: torch.device) -> None:
    """y in the residual's memory is what it is elsewhere, to the bit."""
    inputs, outputs = case.inputs(device, 0), case.outputs(device)
    case.run(candidate, case.pack(candidate, inputs), outputs)
    case.run(candidate, case.pack(candidate, inputs), outputs | {"y": inputs["residual"]})
    assert torch.equal(inputs["residual"], outputs["y"]), f"{candidate}, in place"


@torch.no_grad()
def _chain_overlap(dtype: str, middle: int, following: int, device: torch.device) -> dict:
    """As _overlap, of blocks in a row: each reads what the last one wrote, as residual and, where it has the channels
    for it, as input."""
    if cases.chip(device)[0] != 90:
        raise Declined("the compiled chain needs sm_90")
    found = cuda_conv.chains_of(getattr(torch, dtype), middle, following, False)
    random, k, size = cases.Random(device, getattr(torch, dtype), 0), 4 * middle, 64 * 56 // middle
    first = random.map(32, k, size, size), random.map(32, following, size, size)
    fixed = None if following == middle else random.map(32, middle, size, size)
    weights = random.filter(middle, middle, 3, 3), random.filter(k, middle, 1, 1), random.filter(following, k, 1, 1)
    biases = random.bias(middle), random.bias(k), random.bias(following)

    def run(chosen, constant: bool, wait) -> torch.Tensor:
        ys, zs = ([t.clone(), torch.zeros_like(t)] for t in first)
        for turn in range(20):
            y, z, residual, x = ys[turn % 2 - 1], zs[turn % 2 - 1], ys[turn % 2], zs[turn % 2]
            if turn % 5 == 0:
                for t in (residual, x):
                    t.div_(t.float().norm().clamp(min=1.0) / t.numel() ** 0.5)
                cases.settle(device)
            torch.ops.fused_resnet_cuda.chain_out(
                chosen[turn % len(chosen)].index, x if fixed is None else fixed, weights[0], biases[0], weights[1],
                biases[1], residual, None, None, 1, weights[2], biases[2], True, False, y, z, constant,
            )  # fmt: skip
            wait()
        return torch.cat([y.flatten(), z.flatten()])

    return _as_one_at_a_time(found, run)


def chains(device: torch.device) -> Iterator[tuple[str, Callable[[], dict]]]:
    """The compiled bottleneck."""
    on_gpu = device.type == "cuda"
    for dtype in DTYPES if on_gpu else ("float32",):
        if on_gpu:
            for kind in ((64, 64), (64, 128), (128, 128)):
                name = f"chain-overlap/{kind[0]}-{kind[1]}/{dtype}"
                yield name, functools.partial(_chain_overlap, dtype, *kind, device)
        for name, facts in list(CHAINS.items())[: None if on_gpu else 3]:
            yield f"chain/{name}/{dtype}", functools.partial(_chain_parity, facts, dtype, device)


def of_a_resnet(batch: int, models=("resnet50", "resnet18")) -> Iterator[tuple[str, dict]]:
    """(name, facts of a ConvArgs) of every different convolution, its epilogue as in the network; not the stem's."""
    for (c, k, kernel, stride, padding, maps), _ in resnet_shapes(models):
        if c % 8:
            continue
        facts = dict(n=batch, c=c, h=maps, w=maps, k=k, kernel=(kernel,) * 2, stride=(stride,) * 2)
        facts |= dict(padding=(padding,) * 2, dilation=(1, 1), relu=True, residual=kernel == 1 and k > c, segment=None)
        yield f"n{batch}-c{c}-{maps}x{maps}-k{k}-{kernel}x{kernel}-s{stride}", facts


def random_shape(seed: int) -> dict:
    """A convolution that nobody thought of: any kernel up to 5, maps up to 40, ragged channels, half with a segment."""
    pick = random.Random(seed)
    pairs = {name: (pick.randint(low, high), pick.randint(low, high)) for name, low, high in _RANGES}
    h, w = (d * (k - 1) + pick.randint(1, 40) for d, k in zip(pairs["dilation"], pairs["kernel"], strict=True))
    facts = dict(n=pick.randint(1, 9), c=8 * pick.randint(1, 40), h=h, w=w, k=8 * pick.randint(1, 40), **pairs)
    facts |= dict(relu=pick.random() < 0.7, residual=False, segment=None)
    shape = cases.ConvArgs(**facts, device="cpu", dtype="float16", tf32=False).shape
    if pick.random() < 0.5:
        stride = pick.randint(1, 2)
        maps = (stride * (size - 1) + pick.randint(1, stride) for size in (shape.p, shape.q))
        return facts | dict(segment=(8 * pick.randint(1, 40), *maps, stride))
    return facts | dict(residual=pick.random() < 0.5)


_RANGES = (("kernel", 1, 5), ("stride", 1, 3), ("padding", 0, 4), ("dilation", 1, 2))


def test_cases(device: torch.device) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Every ResNet's shape and random ones."""
    on_gpu = device.type == "cuda"
    yield from chains(device)
    for dtype in DTYPES if on_gpu else ("float32",):
        for batch in (2, 32) if on_gpu else (1,):
            for name, facts in list(of_a_resnet(batch))[: None if on_gpu else 2]:
                yield f"conv/{name}/{dtype}", functools.partial(_parity, facts, dtype, device)
        for seed in range(RANDOM_SHAPES if on_gpu else 2):
            yield f"conv/random-{seed}/{dtype}", functools.partial(_parity, random_shape(seed), dtype, device)


# --- speed ------------------------------------------------------------------------------------------------------------


def bench_cases(device: torch.device) -> Iterator[tuple[str, Callable[[], dict]]]:
    """ResNet-50's and ResNet-18's convolutions, the 3x3 first: TFLOP/s of each instance, of Triton's, of cuDNN's."""
    on_gpu = device.type == "cuda"
    for batch in (128, 1) if on_gpu else (1,):
        shapes = sorted(of_a_resnet(batch), key=lambda item: item[1]["kernel"] != (3, 3))
        for name, facts in shapes[: None if on_gpu else 1]:
            dtype = "float16" if on_gpu else "float32"
            yield f"conv/{name}/{dtype}", functools.partial(_speed, facts, dtype, device)
    for name, facts in CHAINS.items():
        if name.startswith("layer") and on_gpu:
            yield f"chain/{name}/float16", functools.partial(_chain_speed, facts | dict(n=128), "float16", device)
    if not on_gpu:
        yield "chain/one-image/float32", functools.partial(_chain_speed, CHAINS["one-image"], "float32", device)


def _chain_speed(facts: dict, dtype: str, device: torch.device) -> dict:
    """The whole chain by one compiled kernel, by Triton's, and by cuDNN's and PyTorch's kernels one after the other."""
    case, candidates = _chain(facts, dtype, device)
    p, q = case.args.size()
    c, k, projected = facts["middle"], facts["k"], 64 if facts["segment"] else 0
    macs = facts["n"] * p * q * (9 * c * c + k * (c + projected + facts["following"]))
    apart = {"cuDNN": lambda inputs, outputs: case.run(cases.CUDNN, inputs, outputs)}
    return _timed(case, apart, candidates, 2 * macs, device)


def _speed(facts: dict, dtype: str, device: torch.device) -> dict:
    case = _case(facts, dtype, device)
    flop = 2 * case.args.shape.m * case.args.k * case.args.c * facts["kernel"][0] * facts["kernel"][1]
    return _timed(case, {"cuDNN": lambda inputs, _: cudnn(case, inputs)}, instances(case), flop, device)


@torch.no_grad()
def _timed(case, apart: dict, candidates: list[Candidate], flop: int, device: torch.device) -> dict:
    inputs, outputs = case.inputs(device, 0), case.outputs(device)
    steps = {name: functools.partial(run, inputs, outputs) for name, run in apart.items()}
    for candidate in [*candidates, *(c for c in case.candidates() if c.backend == "triton")]:
        case.prepare(candidate)
        packed = case.pack(candidate, inputs)
        steps[str(candidate)] = functools.partial(case.timed, candidate, packed, outputs)
    captured, errors = {}, {}
    expected = case.reference(inputs)["y"]
    for name, step in steps.items():
        y = step()
        errors[name] = measure.error(outputs["y"] if y is None else y, expected)
        captured[name] = capture(step, device)
    wrong = {name: error for name, error in errors.items() if not error <= case.tolerance[case.dtype]}
    assert not wrong, wrong
    seconds: dict[str, list[float]] = {name: [] for name in captured}
    for _ in range(ROUNDS if device.type == "cuda" else 2):
        for name, (step, calls) in captured.items():
            seconds[name].append(measure.time_once(step, device, 1) / calls)
    best = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "tflops": {name: float(f"{flop / s / 1e12:.4g}") for name, s in best.items()},
        "conv_us": {name: round(1e6 * s, 2) for name, s in best.items()},
        "conv_error": errors,
    }


def cudnn(case: cases.ConvCase, inputs: dict) -> torch.Tensor:
    """cuDNN's best algorithm with as much of the epilogue in it as PyTorch binds."""
    x, weight, bias, residual = cases._conv_tensors(inputs)
    conv = (case.args.stride, case.args.padding, case.args.dilation, 1)
    if case.device.type != "cuda":
        return case.timed(cases.CUDNN, inputs, {})
    with cases.library():
        if residual is not None:
            return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias.to(x.dtype), *conv)
        return torch.cudnn_convolution_relu(x, weight, bias.to(x.dtype), *conv)


def capture(call: Callable[[], object], device: torch.device) -> tuple[Callable[[], object], int]:
    """(what to time, how many calls it makes): ten calls in a CUDA graph, so that launches on the CPU do not count."""
    if device.type != "cuda":
        return call, 1
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            call()
    graph.replay()
    return graph.replay, 10
