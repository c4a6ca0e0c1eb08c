"""Compile every Triton kernel ahead of time, as the host would launch it, for GPUs that need not be there.

    python tests/aot.py [--arch 80 89 90 100] [--only REGEX]

The backend is called on meta tensors with its kernels replaced by recorders, so what is compiled is what a launch would
compile: the same tiles, constants and specialisations. Prints one JSON object a line: registers, spills (local loads
and stores in the SASS), shared memory, tensor-core instructions, asynchronous copies.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import json
import re
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SMS = {80: 108, 89: 128, 90: 132, 100: 148}
CL = torch.channels_last
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32}
TYPE_NAMES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.uint8: "*u8"}
INSTRUCTIONS = {
    "hmma": r"\bHMMA\.",
    "wgmma": r"\b[HQ]GMMA\.",
    "tcgen05": r"\bUTC[A-Z]*MMA\b",
    "async_copy": r"\bLDGSTS\b",
    "tma_load": r"\bUTMALDG\b",
    "tma_store": r"\bUTMASTG\b",
    "load": r"\bLDG\.",
    "load_16_bytes": r"\bLDG\.[A-Z0-9.]*128\b",
    "store": r"\bSTG\.",
    "store_16_bytes": r"\bSTG\.[A-Z0-9.]*128\b",
    "spill_load": r"\bLDL\b",
    "spill_store": r"\bSTL\b",
}


def backend(host: str = "backends.triton") -> types.ModuleType:
    """fused_resnet.<host> without the packages' __init__: kernels and their host need nothing else."""
    for name in ("fused_resnet", "fused_resnet.backends", "fused_resnet.engine"):
        if name not in sys.modules:
            package = types.ModuleType(name)
            package.__path__ = [str(ROOT.joinpath(*name.split(".")))]
            sys.modules[name] = package
    return importlib.import_module(f"fused_resnet.{host}")


def meta(*shape: int, dtype: torch.dtype = torch.float32, format=CL) -> torch.Tensor:
    format = format if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=format)


def convolution(host, n, c, size, k, taps, stride, groups, precision, residual=True, backward=False, image=CL):
    """One conv_bn_act of a square map, padded by taps // 2; image: the layout of x."""
    dtype = DTYPES[precision]
    host.tf32_allowed = lambda: precision != "ieee"
    x, weight = meta(n, c, size, size, dtype=dtype, format=image), meta(k, c // groups, taps, taps, dtype=dtype)
    conv = ([stride] * 2, [taps // 2] * 2, [1, 1], groups)
    out = meta(n, k, *[(size + 2 * (taps // 2) - taps) // stride + 1] * 2, dtype=dtype)
    if backward:
        host.conv_bn_act_bwd(out, out, x, weight, meta(k), meta(k), meta(k), 1e-5, *conv, True, [True] * 5)
    else:
        bn = [meta(k) for _ in range(4)]
        host.conv_bn_act(x, weight, *bn, 1e-5, out if residual else None, *conv, True)


def batch_norm(host, n, c, size, precision):
    """Statistics, forward, and the backwards: batch statistics, frozen, with the mask of x, and from sums over several
    processes."""
    x = meta(n, c, size, size, dtype=DTYPES[precision])
    mean, var, gamma, beta = (meta(c) for _ in range(4))
    host.bn_stats(x)
    host.bn_act(x, mean, var, gamma, beta, 1e-5, x, True, True)
    host.bn_act_bwd(x, x, x, mean, var, gamma, 1e-5, True, True, [True] * 4)
    host.bn_act_bwd(x, x, x, mean, var, gamma, 1e-5, True, False, [True] * 4)
    host.bn_act_bwd(x, None, x, mean, var, gamma, 1e-5, True, True, [True, True, True, False], beta)
    host.bn_act_bwd_input(x, x, x, mean, var, gamma, beta, True)


def pool(host, n, c, size, precision):
    """Batch norm, ReLU and max-pool in one, and the backward."""
    x = meta(n, c, size, size, dtype=DTYPES[precision])
    mean, var, gamma, beta = (meta(c) for _ in range(4))
    pooled = backend("backends.triton_pool")
    y, winner = pooled.bn_act_pool(x, mean, var, gamma, beta, 1e-5)
    pooled.bn_act_pool_bwd(y, x, winner, mean, var, gamma, 1e-5, [True] * 3)


def instances() -> dict[str, tuple]:
    """name: (function, arguments): layers of ResNets and ResNeXts that between them take every kind of tile."""
    every = {}
    for precision in ("fp16", "bf16", "tf32"):
        every |= {
            f"3x3_256_b32_{precision}": (convolution, 32, 256, 14, 256, 3, 1, 1, precision),
            f"1x1_64_256_b32_{precision}": (convolution, 32, 64, 56, 256, 1, 1, 1, precision),
            f"stem_b32_{precision}": (convolution, 32, 3, 224, 64, 7, 2, 1, precision, False),
            f"resnext_4_b32_{precision}": (convolution, 32, 128, 56, 128, 3, 1, 32, precision, False),
        }
    return every | {
        "3x3_64_b32_fp16": (convolution, 32, 64, 56, 64, 3, 1, 1, "fp16"),
        "3x3_128_stride2_b32_fp16": (convolution, 32, 128, 56, 128, 3, 2, 1, "fp16", False),
        "3x3_32_b32_fp16": (convolution, 32, 64, 56, 32, 3, 1, 1, "fp16"),
        "1x1_256_1024_b1_fp16": (convolution, 1, 256, 14, 1024, 1, 1, 1, "fp16"),
        "3x3_512_b1_fp16": (convolution, 1, 512, 7, 512, 3, 1, 1, "fp16"),
        "3x3_50_odd_fp16": (convolution, 32, 50, 56, 140, 3, 1, 1, "fp16"),
        "1x1_1024_512_b32_fp16": (convolution, 32, 1024, 14, 512, 1, 1, 1, "fp16", False),
        "1x1_1024_2048_stride2_b32_fp16": (convolution, 32, 1024, 14, 2048, 1, 2, 1, "fp16", False),
        "resnext_32_b32_fp16": (convolution, 32, 1024, 14, 1024, 3, 2, 32, "fp16", False),
        "depthwise_b32_fp16": (convolution, 32, 96, 28, 96, 3, 1, 96, "fp16", False),
        "stem_nchw_b32_fp16": (convolution, 32, 3, 224, 64, 7, 2, 1, "fp16", False, False, torch.contiguous_format),
        "stem_b32_ieee": (convolution, 32, 3, 224, 64, 7, 2, 1, "ieee", False),
        "3x3_128_b32_ieee": (convolution, 32, 128, 28, 128, 3, 1, 1, "ieee"),
        # Multiples of 16 bytes that 16 does not divide; rows that no vector load fits.
        "3x3_72_b32_fp16": (convolution, 32, 72, 28, 72, 3, 1, 1, "fp16"),
        "1x1_40_160_b32_fp16": (convolution, 32, 40, 28, 160, 1, 1, 1, "fp16"),
        "3x3_36_b32_tf32": (convolution, 32, 36, 28, 36, 3, 1, 1, "tf32"),
        "3x3_24_b32_tf32": (convolution, 32, 24, 28, 24, 3, 1, 1, "tf32"),
        "5x5_72_136_b32_fp16": (convolution, 32, 72, 28, 136, 5, 1, 1, "fp16"),
        "3x3_17_200_odd_fp16": (convolution, 32, 17, 28, 200, 3, 1, 1, "fp16"),
        "1x1_8_256_odd_tf32": (convolution, 32, 8, 28, 256, 1, 1, 1, "tf32"),
        "bwd_3x3_256_b32_fp16": (convolution, 32, 256, 14, 256, 3, 1, 1, "fp16", True, True),
        "bwd_3x3_72_b32_fp16": (convolution, 32, 72, 14, 72, 3, 1, 1, "fp16", True, True),
        "bn_256_b32_fp16": (batch_norm, 32, 256, 56, "fp16"),
        "bn_256_b32_bf16": (batch_norm, 32, 256, 56, "bf16"),
        "bn_72_b32_fp16": (batch_norm, 32, 72, 28, "fp16"),
        "pool_64_b32_fp16": (pool, 32, 64, 112, "fp16"),
        "pool_72_b5_odd_fp16": (pool, 5, 72, 31, "fp16"),
        "bn_3_b5_tf32": (batch_norm, 5, 3, 9, "tf32"),
        # Every extent and stride is 1, which Triton turns into a constant.
        "ones_fp16": (convolution, 1, 1, 1, 1, 1, 1, 1, "fp16"),
        "ones_bwd_fp16": (convolution, 1, 1, 1, 1, 1, 1, 1, "fp16", True, True),
        "ones_bn_fp16": (batch_norm, 1, 1, 1, "fp16"),
    }


class Recorder:
    """Stands in for a kernel: keeps the arguments of each launch."""

    def __init__(self, kernel, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((self.kernel, grid, args, kwargs))


def recorded(launches: list, *modules) -> None:
    """Puts recorders in the place of these modules' kernels."""
    for module in modules:
        for name, value in list(vars(module).items()):
            if name.endswith("_kernel"):
                kernel = value.kernel if isinstance(value, Recorder) else value
                setattr(module, name, Recorder(kernel, launches))


def record(host, arch: int, function, *args) -> list:
    """The launches of one instance on sm_<arch>."""
    launches: list = []
    host._chip = lambda x: (arch, SMS[arch])
    recorded(launches, host._bn, host._conv, host._conv_bwd, backend("backends.triton_pool")._pool)
    function(host, *args)
    return launches


def source(kernel, args: tuple, kwargs: dict) -> tuple[ASTSource, dict]:
    """What a launch with these arguments compiles: Triton takes 1 and None as constants, and notes what 16 divides."""
    names = kernel.arg_names
    values = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
    options = {k: v for k, v in kwargs.items() if k not in names}
    constexprs = {p.name for p in kernel.params if p.is_constexpr}
    plain = {p.name for p in kernel.params if p.do_not_specialize}
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(names):
        value = values[name]
        if name in constexprs or value is None or (type(value) is int and value == 1 and name not in plain):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = TYPE_NAMES[value.dtype]
        elif hasattr(value, "block_shape"):
            block = ",".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{TYPE_NAMES[value.base.dtype][1:]}[{block}]>"
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0 and name not in plain):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes), options


def compiled_line(kernel, grid: tuple, positional: tuple, keywords: dict, arch: int) -> dict:
    """What compiling this launch for sm_<arch> says."""
    started = time.perf_counter()
    ast, launch = source(kernel, positional, keywords)
    compiled = triton.compile(ast, target=GPUTarget("cuda", arch, 32), options=launch)
    return {
        "arch": arch,
        "kernel": kernel.__name__,
        "triton": triton.__version__,
        "programs": list(grid),
        "warps": compiled.metadata.num_warps,
        "stages": compiled.metadata.num_stages,
        "tile": {k: v for k, v in keywords.items() if k.startswith("BLOCK")},
        "shared": compiled.metadata.shared,
        "rounded_to_tf32": compiled.asm["ptx"].count("cvt.rna.tf32"),
        **inspect(compiled.asm["cubin"]),
        "seconds": round(time.perf_counter() - started, 2),
    }


def inspect(cubin: bytes) -> dict:
    """Registers and instruction counts of a compiled kernel; the disassembler's analysis of dataflow (-ndf: without)
    takes a third of its time and changes nothing that is counted."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [BIN / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run(
            [BIN / "nvdisasm", "-c", "-ndf", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {name: len(re.findall(pattern, sass)) for name, pattern in INSTRUCTIONS.items()}
    return {"registers": int(re.search(r"REG:(\d+)", usage)[1]), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="*", default=sorted(SMS))
    parser.add_argument("--only", default="", help="regular expression on the instance's name")
    options = parser.parse_args()
    host = backend()
    done = collections.Counter()
    for arch in options.arch:
        for name, (function, *args) in instances().items():
            if not re.search(options.only, name):
                continue
            for kernel, grid, positional, keywords in record(host, arch, function, *args):
                done[arch] += 1
                line = {"instance": name, **compiled_line(kernel, grid, positional, keywords, arch)}
                print(json.dumps(line), flush=True)
    if not done:
        sys.exit(f"no instance matches {options.only!r}")


if __name__ == "__main__":
    main()
