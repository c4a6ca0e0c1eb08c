"""The engine's ops as problems to tune: each at one shape, with the candidates of every backend."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import cudnn
from ..backends.library import chip as gpu_chip
from ..backends.triton import unavailable as triton_unavailable
from . import compiled_conv, compiled_pool, compiled_stem, reference, triton_conv, triton_grouped, triton_stem
from .problem import TOLERANCE, Candidate, Case, Problem, Work

CUDNN = Candidate("cudnn", "PyTorch's convolution, and kernels of their own for what follows")
FUSED = Candidate("cudnn", "cuDNN's convolution with add and ReLU", {"fused": True})
OWN = ("triton", "cuda")  # backends whose kernels are ours: they write into memory that is given to them
TF32_TOLERANCE = 2e-3  # 10 bits of mantissa in the operands


def chip(device: torch.device) -> tuple[int, int]:
    """(compute capability times ten, SMs) of a GPU; elsewhere, in Triton's interpreter, of an imagined one."""
    return gpu_chip(device) if device.type == "cuda" else (80, 4)


def label(config: dict) -> str:
    """A config in a few characters."""
    tile = "x".join(str(config[k]) for k in ("block_m", "block_n", "block_k"))
    more = f" split {config['splits']}" if config.get("splits", 1) > 1 else ""
    kind = {"tma": "tma ", "grouped": f"{config.get('bundle')} groups "}.get(config.get("kernel"), "")
    stages = config.get("num_stages", config.get("stages_conv"))
    return f"{kind}{tile} w{config['num_warps']} s{stages}{more}"


def empty(shape, dtype, device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)


class Random:
    """Random tensors as a network has them: activations of unit size, filters that keep it."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int):
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)

    def _normal(self, shape) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def map(self, *shape) -> Tensor:
        return self._normal(shape).to(self.dtype, memory_format=torch.channels_last)

    def filter(self, *shape) -> Tensor:
        weight = self._normal(shape) / math.sqrt(math.prod(shape[1:]))
        return weight.to(self.dtype, memory_format=torch.channels_last)

    def bias(self, channels: int) -> Tensor:
        return self._normal((channels,))


class EngineCase(Case):
    def __init__(self, args):
        self.args, self.work = args, args.work()
        self.device, self.dtype = torch.device(args.device), getattr(torch, args.dtype)
        self.tf32 = getattr(args, "tf32", False)
        self.arch, self.sms = chip(self.device)
        if self.dtype is torch.float32 and self.tf32:
            self.tolerance = TOLERANCE | {torch.float32: TF32_TOLERANCE}

    def triton(self) -> list[dict]:
        raise NotImplementedError

    def candidates(self) -> list[Candidate]:
        configs = [] if triton_unavailable() else self.triton()
        return [CUDNN, *(Candidate("triton", label(c), c) for c in configs)]

    def prepare(self, candidate: Candidate) -> None:
        if candidate.backend == "triton":
            inputs = self.pack(candidate, self.inputs(self.device, 0))
            self.run(candidate, inputs, self.outputs(self.device))

    def compile(self, candidate: Candidate) -> None:
        """Many processes do it at a time, so with few images: kernels are specialised on whether 16 divides a size."""
        few = self.args.n > 16 and self.args.n % 16 == 0
        (type(self)(replace(self.args, n=16)) if few else self).prepare(candidate)

    def reference(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        with library(benchmark=False, exact=True):
            return self.exactly({k: v.float() for k, v in inputs.items()})


@contextlib.contextmanager
def library(*, benchmark: bool = True, exact: bool = False):
    """cuDNN measures its algorithms once a shape, and takes none whose result depends on luck. exact: float32 is no
    TF32; else it is what the user has it."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision
    cudnn.benchmark, cudnn.deterministic = benchmark, True
    if exact:
        cudnn.conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before[:2]
        if exact:
            cudnn.conv.fp32_precision = before[2]


@dataclass(frozen=True)
class ConvArgs:
    """conv_bias_act at one shape. segment: (channels, height, width, stride) of the projection's input."""

    n: int
    c: int
    h: int
    w: int
    k: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    relu: bool
    residual: bool
    segment: tuple[int, int, int, int] | None
    device: str
    dtype: str
    tf32: bool

    @property
    def shape(self) -> triton_conv.Conv:
        geometry = (self.stride, self.padding, self.dilation)
        return triton_conv.Conv(
            self.n, self.c, self.h, self.w, self.k, *self.kernel, *geometry, self.residual, self.segment
        )

    def problem(self) -> Problem:
        r, s = self.kernel
        extra = "".join(
            [
                f" p{_by(self.padding)}" if self.padding != (r // 2, s // 2) else "",
                f" d{_by(self.dilation)}" if self.dilation != (1, 1) else "",
                " + residual" if self.residual else "",
                " + {}x{}x{}/{}".format(*self.segment) if self.segment else "",
                " relu" if self.relu else "",
            ]
        )
        key = (
            f"conv {r}x{s}/{_by(self.stride)} {self.n}x{self.c}x{self.h}x{self.w} -> {self.k}{extra} "
            f"{self.dtype}{' tf32' if self.tf32 else ''}"
        )
        return Problem(key, f"{__name__}:conv", jsonable(self))

    def work(self, groups: int = 1) -> Work:
        shape, (r, s) = self.shape, self.kernel
        c2, taps = shape.c2, r * s * self.c // groups
        out, read = shape.m * self.k, self.n * self.c * self.h * self.w
        if r == s == 1:
            read = min(read, shape.m * self.c)  # what a stride leaves out is not read
        elements = read + shape.m * c2 + self.k * (taps + c2) + out * (1 + self.residual)
        return Work(
            f"{'grouped ' if groups > 1 else ''}conv {r}x{s} {numbers(self.dtype, self.tf32)}",
            {"positions": shape.m, "channels": self.k, "reduction": taps + c2},
            {"stride": _by(self.stride), "residual": self.residual, "segment": self.segment is not None},
            2 * out * (taps + c2),
            elements * getattr(torch, self.dtype).itemsize,
        )


def conv(**args) -> ConvCase:
    return ConvCase(ConvArgs(**tuples(args)))


class ConvCase(EngineCase):
    def __init__(self, args: ConvArgs):
        super().__init__(args)
        self.options = dict(stride=args.stride, padding=args.padding, dilation=args.dilation, relu=args.relu)
        self.filters = (args.k, args.c, *args.kernel)

    def triton(self) -> list[dict]:
        return triton_conv.configs(self.args.shape, self.dtype, self.arch, self.sms, tf32=self.tf32)

    def compiled(self) -> list[Candidate]:
        configs = compiled_conv.configs(self.args.shape, self.dtype, self.arch, self.sms)
        return [Candidate("cuda", c["instance"], c) for c in configs] if self.device.type == "cuda" else []

    def candidates(self) -> list[Candidate]:
        found = super().candidates() + self.compiled()
        if self.args.residual and self.args.relu and _fuses(self.device, self.dtype):
            found.insert(1, FUSED)
        return found

    def inputs(self, device, seed):
        a, random = self.args, Random(device, self.dtype, seed)
        tensors = {"x": random.map(a.n, a.c, a.h, a.w), "weight": random.filter(*self.filters)}
        tensors["bias"] = random.bias(a.k)
        if a.residual:
            tensors["residual"] = random.map(a.n, a.k, a.shape.p, a.shape.q)
        if a.segment:
            c2, h2, w2, _ = a.segment
            tensors |= {"x2": random.map(a.n, c2, h2, w2), "weight2": random.filter(a.k, c2, 1, 1)}
        return tensors

    def outputs(self, device):
        return {"y": empty((self.args.n, self.args.k, self.args.shape.p, self.args.shape.q), self.dtype, device)}

    def exactly(self, inputs):
        return {"y": reference.conv_bias_act(*_conv_tensors(inputs), segment=self._segment(inputs), **self.options)}

    def pack(self, candidate, inputs):
        if candidate.backend not in OWN:
            return inputs
        pack, _ = conv_pack(candidate, self.args)
        packed = inputs | {k: pack(inputs[k]) for k in ("weight", "weight2") if k in inputs}
        size = conv_workspace(candidate, self.args.shape, self.dtype, self.sms)
        packed["workspace"] = torch.empty(size, dtype=torch.uint8, device=inputs["x"].device) if size else None
        settle(self.device)
        return packed

    def _segment(self, inputs):
        return (inputs["x2"], inputs["weight2"], self.args.segment[3]) if self.args.segment else None

    def run(self, candidate, inputs, outputs):
        x, weight, bias, residual = _conv_tensors(inputs)
        segment = self._segment(inputs)
        if candidate.backend in OWN:
            tensors = (x, weight, bias, residual, segment, outputs["y"], inputs.get("workspace"))
            launch_conv(candidate, *tensors, **self.options)
        else:
            outputs["y"].copy_(self.timed(candidate, inputs, outputs))

    def timed(self, candidate, inputs, outputs):
        if candidate.backend in OWN:
            return self.run(candidate, inputs, outputs)
        x, weight, bias, residual = _conv_tensors(inputs)
        fused = candidate.config.get("fused", False)
        with library():  # in the network its result is taken as it comes
            return pytorch_conv(x, weight, bias, residual, self._segment(inputs), **self.options, fused=fused)


@dataclass(frozen=True)
class LinearArgs(ConvArgs):
    """A classifier at one shape: a 1x1 convolution of maps of one position, which PyTorch has as a matrix product."""

    def problem(self) -> Problem:
        key = f"linear {self.n}x{self.c} -> {self.k} {self.dtype}{' tf32' if self.tf32 else ''}"
        return Problem(key, f"{__name__}:linear", jsonable(self))


def linear(**args) -> LinearCase:
    return LinearCase(LinearArgs(**tuples(args)))


class LinearCase(ConvCase):
    def timed(self, candidate, inputs, outputs):
        if candidate.backend in OWN:
            return self.run(candidate, inputs, outputs)
        x, weight, bias, _ = _conv_tensors(inputs)
        return F.linear(x.flatten(1), weight.flatten(1), bias.to(x.dtype))[..., None, None]


@dataclass(frozen=True)
class GroupedArgs(ConvArgs):
    """The same for a convolution of several groups, without a second segment."""

    groups: int

    def problem(self) -> Problem:
        key = super().problem().key.replace(f"-> {self.k}", f"-> {self.k} in {self.groups} groups", 1)
        return Problem(key, f"{__name__}:grouped", jsonable(self))

    def work(self) -> Work:
        found = super().work(self.groups)
        return replace(found, sizes=found.sizes | {"group": self.c // self.groups})


def grouped(**args) -> GroupedCase:
    return GroupedCase(GroupedArgs(**tuples(args)))


class GroupedCase(ConvCase):
    def __init__(self, args: GroupedArgs):
        super().__init__(args)
        self.options["groups"] = args.groups
        self.filters = (args.k, args.c // args.groups, *args.kernel)

    def triton(self) -> list[dict]:
        a = self.args
        return triton_grouped.configs(a.shape, a.groups, self.dtype, self.arch, self.sms, tf32=self.tf32)

    def compiled(self) -> list[Candidate]:
        return []


def conv_pack(candidate: Candidate, args: ConvArgs) -> tuple[Callable[[Tensor], Tensor], str]:
    """(what packs the weight, the name of that form)."""
    tf32 = args.tf32
    if isinstance(args, GroupedArgs):
        bundle = candidate.config["bundle"]
        return functools.partial(
            triton_grouped.pack, bundle=bundle, groups=args.groups, tf32=tf32
        ), f"grouped {bundle} {tf32}"
    return functools.partial(triton_conv.pack, tf32=tf32), f"conv {tf32}"


def settle(device: torch.device) -> None:
    """What was written so far on the current stream is there for kernels that read their weights before those before
    them have ended: this is a launch like any other, which begins after all that came before, and overlaps nothing."""
    if device.type == "cuda":
        torch.empty(1, device=device).zero_()


def launch_conv(candidate: Candidate, *tensors, groups: int = 1, **options) -> None:
    """triton_conv.launch, or its like, with the candidate's config."""
    if groups > 1:
        x, weight, bias, residual, _, out, _ = tensors
        return triton_grouped.launch(candidate.config, x, weight, bias, residual, out, groups=groups, **options)
    kernels = compiled_conv if candidate.backend == "cuda" else triton_conv
    kernels.launch(candidate.config, *tensors, **options)


def conv_workspace(candidate: Candidate, shape: triton_conv.Conv, dtype: torch.dtype, sms: int) -> int:
    """Bytes of workspace that launch_conv needs."""
    if candidate.backend == "cuda":
        return compiled_conv.workspace(candidate.config, shape, dtype, sms)
    return triton_conv.workspace(candidate.config, shape)


def _conv_tensors(inputs):
    return inputs["x"], inputs["weight"], inputs["bias"], inputs.get("residual")


def _fuses(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cuda" or cudnn.unavailable() or dtype not in cudnn.DTYPES:
        return False
    return cudnn._fuses(torch.cuda.current_device() if device.index is None else device.index, dtype)


def pytorch_conv(
    x, weight, bias, residual, segment, *, stride, padding, dilation, relu, groups=1, fused=False
) -> Tensor:
    """conv_bias_act by PyTorch's own kernels; what follows the convolution is added in place, or, fused, within it."""
    if fused:
        conv = (stride, padding, dilation, groups)
        return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias.to(x.dtype), *conv)
    y = F.conv2d(x, weight, bias.to(x.dtype), stride, padding, dilation, groups)
    if segment is not None:
        y += F.conv2d(segment[0], segment[1], None, segment[2])
    if residual is not None:
        y += residual
    return y.relu_() if relu else y


@dataclass(frozen=True)
class StemArgs:
    """stem_pool at one shape; input_dtype and channels_last: of x as it comes."""

    n: int
    h: int
    w: int
    k: int
    channels_last: bool
    input_dtype: str
    device: str
    dtype: str
    tf32: bool

    def problem(self) -> Problem:
        layout = "nhwc" if self.channels_last else "nchw"
        key = f"stem {self.n}x3x{self.h}x{self.w} -> {self.k} {layout} {self.input_dtype} {self.dtype}"
        return Problem(key + " tf32" * self.tf32, f"{__name__}:stem", jsonable(self))

    def work(self) -> Work:
        p, q, *pooled = triton_stem.sizes(self.h, self.w)
        taps, size = 3 * 7 * 7, getattr(torch, self.dtype).itemsize
        read = self.n * 3 * self.h * self.w * getattr(torch, self.input_dtype).itemsize
        return Work(
            f"stem {numbers(self.dtype, self.tf32)}",
            {"positions": self.n * p * q, "channels": self.k},
            {"channels_last": self.channels_last, "input": numbers(self.input_dtype)},
            2 * self.n * p * q * self.k * taps,
            read + (self.n * math.prod(pooled) + taps) * self.k * size,
        )


def stem(**args) -> StemCase:
    return StemCase(StemArgs(**args))


class StemCase(EngineCase):
    def triton(self) -> list[dict]:
        a = self.args
        return triton_stem.configs((a.n, 3, a.h, a.w), self.dtype, self.arch, self.sms, a.k, tf32=self.tf32)

    def compiled(self) -> list[Candidate]:
        a = self.args
        chip = (self.dtype, self.arch, self.sms, a.k)
        configs = compiled_stem.configs((a.n, 3, a.h, a.w), *chip, input_dtype=getattr(torch, a.input_dtype))
        found = [Candidate("cuda", f"sm80 stem {c['rows']} rows", c) for c in configs]
        return found if self.device.type == "cuda" else []

    def candidates(self) -> list[Candidate]:
        return super().candidates() + self.compiled()

    def inputs(self, device, seed):
        a, random = self.args, Random(device, self.dtype, seed)
        x = random.map(a.n, 3, a.h, a.w).to(getattr(torch, a.input_dtype))
        x = x.contiguous(memory_format=torch.channels_last if a.channels_last else torch.contiguous_format)
        return {"x": x, "weight": random.filter(a.k, 3, 7, 7), "bias": random.bias(a.k)}

    def outputs(self, device):
        p, q = triton_stem.sizes(self.args.h, self.args.w)[2:]
        return {"y": empty((self.args.n, self.args.k, p, q), self.dtype, device)}

    def exactly(self, inputs):
        # As the kernel reads it: in the compute dtype.
        x = inputs["x"].to(self.dtype).float()
        return {"y": reference.stem_pool(x, inputs["weight"], inputs["bias"])}

    def pack(self, candidate, inputs):
        if candidate.backend not in OWN:
            return inputs
        pack, _ = stem_pack(candidate, self.args)
        return inputs | {"weight": pack(inputs["weight"])}

    def run(self, candidate, inputs, outputs):
        if candidate.backend in OWN:
            launch_stem(candidate, inputs["x"], inputs["weight"], inputs["bias"], outputs["y"])
        else:
            outputs["y"].copy_(self.timed(candidate, inputs, outputs))

    def timed(self, candidate, inputs, outputs):
        if candidate.backend in OWN:
            return self.run(candidate, inputs, outputs)
        x = inputs["x"].to(self.dtype, memory_format=torch.channels_last)
        with library():
            y = F.conv2d(x, inputs["weight"], inputs["bias"].to(self.dtype), 2, 3).relu_()
            return F.max_pool2d(y, 3, 2, 1)


def launch_stem(candidate: Candidate, *tensors) -> None:
    """triton_stem.launch, or its like, with the candidate's config."""
    kernels = compiled_stem if candidate.backend == "cuda" else triton_stem
    kernels.launch(candidate.config, *tensors)


def stem_pack(candidate: Candidate, args: StemArgs) -> tuple[Callable[[Tensor], Tensor], str]:
    """What makes of a filter the weight that launch_stem needs, and the name of that form."""
    if candidate.backend == "cuda":
        return compiled_stem.pack, "compiled stem"
    layout = "channels_last" if args.channels_last else "nchw"
    return functools.partial(triton_stem.pack, layout=layout, tf32=args.tf32), f"stem {layout} {args.tf32}"


@dataclass(frozen=True)
class PoolArgs:
    """The average over the whole map, at one shape."""

    n: int
    c: int
    h: int
    w: int
    device: str
    dtype: str

    def problem(self) -> Problem:
        return Problem(f"avg_pool {self.n}x{self.c}x{self.h}x{self.w} {self.dtype}", f"{__name__}:pool", jsonable(self))

    def work(self) -> Work:
        elements, maps = self.n * self.c * self.h * self.w, self.n * self.c
        moved = (elements + maps) * getattr(torch, self.dtype).itemsize
        sizes = {"positions": elements // self.c, "channels": self.c}
        return Work(f"avg_pool {numbers(self.dtype)}", sizes, {}, elements, moved)


def pool(**args) -> PoolCase:
    return PoolCase(PoolArgs(**args))


class PoolCase(EngineCase):
    def triton(self) -> list[dict]:
        return []

    def candidates(self) -> list[Candidate]:
        a = self.args
        runs = self.device.type == "cuda" and not compiled_pool.declines((a.n, a.c, a.h, a.w), self.dtype, self.arch)
        return super().candidates() + [Candidate("cuda", "avg_pool")] * runs

    def inputs(self, device, seed):
        a = self.args
        return {"x": Random(device, self.dtype, seed).map(a.n, a.c, a.h, a.w)}

    def outputs(self, device):
        return {"y": empty((self.args.n, self.args.c, 1, 1), self.dtype, device)}

    def exactly(self, inputs):
        return {"y": F.adaptive_avg_pool2d(inputs["x"], 1)}

    def run(self, candidate, inputs, outputs):
        if candidate.backend in OWN:
            compiled_pool.launch(inputs["x"], outputs["y"])
        else:
            outputs["y"].copy_(self.timed(candidate, inputs, outputs))

    def timed(self, candidate, inputs, outputs):
        if candidate.backend in OWN:
            return self.run(candidate, inputs, outputs)
        return inputs["x"].mean((2, 3), keepdim=True)


def numbers(dtype: str, tf32: bool = False) -> str:
    """What a kernel's speed knows of a dtype."""
    return "16 bits" if dtype in ("float16", "bfloat16") else dtype + " tf32" * tf32


def _by(pair: tuple[int, int]) -> str:
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]},{pair[1]}"


def jsonable(args) -> dict:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(args).items()}


def tuples(args: dict) -> dict:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in args.items()}
