"""Compile the chained bottleneck ahead of time, in every configuration that is offered for a network's layers.

    python tests/aot_chain.py [--arch 80 89 90 100] [--few] [--only REGEX]

Prints one JSON object a line, as tests/aot.py does; `--few`: every layer once, and every configuration once.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import time

import aot
import torch
import triton
from triton.backends.compiler import GPUTarget


def bottleneck(
    n, mid, size, stride=1, projected=0, following=0, quarter=False, pool=False, k=None, dtype=torch.float16
) -> tuple[tuple, dict]:
    """Arguments and options of one chain: `size` is the 3x3's input map."""
    k = k or 4 * mid
    out = (size - 1) // stride + 1

    def empty(*shape):
        return aot.meta(*shape, dtype=dtype)

    args = empty(n, mid, size, size), empty(mid, mid, 3, 3), aot.meta(mid), empty(k, mid, 1, 1), aot.meta(k)
    options = {"stride": stride, "quarter": quarter, "pool": pool}
    if projected:
        options["segment"] = empty(n, projected, size, size), empty(k, projected, 1, 1), stride
    else:
        options["residual"] = empty(n, k, out, out)
    if following:
        options["next"] = empty(following, k, 1, 1), aot.meta(following)
    return args, options


def instances() -> dict[str, tuple[tuple, dict]]:
    """Every chain of ResNet-50 at 224x224 and batch 32; then widths, a type and maps that compile something else."""
    every = {}
    for layer, (mid, size, stride, inputs) in enumerate(
        [(64, 56, 1, 64), (128, 56, 2, 256), (256, 28, 2, 512), (512, 14, 2, 1024)], 1
    ):
        out = size // stride
        every[f"layer{layer}.first_rung4"] = bottleneck(32, mid, size, stride, inputs)
        every[f"layer{layer}.middle_rung4"] = bottleneck(32, mid, out)
        if layer < 4:
            every[f"layer{layer}.first_rung5"] = bottleneck(32, mid, size, stride, inputs, mid)
            every[f"layer{layer}.middle_rung5"] = bottleneck(32, mid, out, following=mid)
            every[f"layer{layer}.last_rung5"] = bottleneck(32, mid, out, following=2 * mid, quarter=True)
        else:
            every[f"layer{layer}.last_pool"] = bottleneck(32, mid, out, pool=True)
    return every | {
        "wide_layer1.first_rung5": bottleneck(32, 128, 56, 1, 64, 128, k=256),
        "narrow_rung5": bottleneck(32, 16, 32, following=16),
        "layer3.middle_rung5_bf16": bottleneck(32, 256, 14, following=256, dtype=torch.bfloat16),
        "pool_of_several_tiles": bottleneck(32, 64, 28, pool=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="*", default=sorted(aot.SMS))
    parser.add_argument("--few", action="store_true", help="every layer once, and every configuration once")
    parser.add_argument("--only", default="", help="regular expression on the instance's name")
    chosen = parser.parse_args()
    aot.backend()
    host = importlib.import_module("fused_resnet.engine.triton_chain")
    launches: list = []
    for name, kernel in list(vars(host._chain).items()):
        if name.endswith("_kernel"):
            setattr(host._chain, name, aot.Recorder(kernel, launches))
    for arch in chosen.arch:
        met = set()
        for name, (args, options) in instances().items():
            if not re.search(chosen.only, name):
                continue
            for i, config in enumerate(host.configs(arch, *args, **options)):
                if chosen.few and i and repr(config) in met:
                    continue
                met.add(repr(config))
                launches.clear()
                outputs = {"y": args[0], "z": args[0] if "next" in options else None}
                scratch = torch.empty(host.workspace(config, *args, **options), dtype=torch.uint8, device="meta")
                host.launch(config, *args, **options, **outputs, workspace=scratch)
                for kernel, grid, positional, keywords in launches:
                    started = time.perf_counter()
                    ast, launch = aot.source(kernel, positional, keywords)
                    compiled = triton.compile(ast, target=GPUTarget("cuda", arch, 32), options=launch)
                    line = {
                        "arch": arch,
                        "instance": name,
                        "config": config,
                        "kernel": kernel.__name__,
                        "triton": triton.__version__,
                        "programs": list(grid),
                        "shared": compiled.metadata.shared,
                        "tensor_memory": getattr(compiled.metadata, "tmem_size", 0),
                        **aot.inspect(compiled.asm["cubin"]),
                        "seconds": round(time.perf_counter() - started, 2),
                    }
                    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())
