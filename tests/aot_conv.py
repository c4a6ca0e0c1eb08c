"""Compile every config of conv_bias_act that is offered for the layers of ResNet-18 and -50, ahead of time.

    python tests/aot_conv.py --arch 90

One JSON object a line for every kernel that differs, as in tests/aot.py; `config` is the one that was met first.
"""

from __future__ import annotations

import argparse
import json

import aot
import torch
from aot import DTYPES, SMS, meta


def layers(host, n: int) -> dict:
    """The convolutions of the two networks behind the stem, as the ladder of fusion runs them."""
    conv, found = host.Conv, {}
    for c, size in ((64, 56), (128, 28), (256, 14), (512, 7)):
        same = {"padding": (1, 1)}
        wide = 4 * c
        found |= {
            f"3x3_{c}": conv(n, c, size, size, c, 3, 3, **same),
            f"3x3_{c}_residual": conv(n, c, size, size, c, 3, 3, **same, residual=True),
            f"reduce_{c}": conv(n, wide, size, size, c, 1, 1),
            f"expand_{c}_residual": conv(n, c, size, size, wide, 1, 1, residual=True),
        }
        if c == 64:
            found["expand_64_segment"] = conv(n, c, size, size, wide, 1, 1, segment=(c, size, size, 1))
            continue
        half, twice = c // 2, 2 * size
        found |= {
            f"3x3_{half}_{c}_stride2": conv(n, half, twice, twice, c, 3, 3, (2, 2), **same),
            f"3x3_{c}_stride2": conv(n, c, twice, twice, c, 3, 3, (2, 2), **same),
            f"3x3_{c}_segment": conv(n, c, size, size, c, 3, 3, **same, segment=(half, twice, twice, 2)),
            f"projection_{c}": conv(n, half, twice, twice, c, 1, 1, (2, 2)),
            f"expand_{c}_segment": conv(n, c, size, size, wide, 1, 1, segment=(2 * c, twice, twice, 2)),
        }
    return found


def launch(host, config: dict, shape, dtype: torch.dtype) -> None:
    x, weight = (
        meta(shape.n, shape.c, shape.h, shape.w, dtype=dtype),
        meta(shape.k, shape.c, shape.r, shape.s, dtype=dtype),
    )
    out = meta(shape.n, shape.k, shape.p, shape.q, dtype=dtype)
    segment = None
    if shape.segment:
        c2, h2, w2, stride2 = shape.segment
        segment = meta(shape.n, c2, h2, w2, dtype=dtype), meta(shape.k, c2, 1, 1, dtype=dtype), stride2
    space = meta(host.workspace(config, shape))
    conv = {"stride": shape.stride, "padding": shape.padding, "dilation": shape.dilation}
    host.launch(config, x, weight, meta(shape.k), out if shape.residual else None, segment, out, space, **conv)


def instances(host, arch: int):
    """(name, shape, precision): everything in fp16 at two batch sizes; a few layers in what else there is."""
    for n in (1, 128):
        for name, shape in layers(host, n).items():
            yield f"{name}_b{n}_fp16", shape, "fp16"
    few = ("3x3_128_segment", "expand_256_residual")
    for precision in ("bf16", "tf32", "ieee"):
        for name in few:
            yield f"{name}_b32_{precision}", layers(host, 32)[name], precision
    # Multiples of 16 bytes that 16 does not divide; rows that no vector load fits.
    yield "1x1_40_72_b32_fp16", host.Conv(32, 40, 28, 28, 72, 1, 1, residual=True), "fp16"
    yield "3x3_72_b32_fp16", host.Conv(32, 72, 28, 28, 72, 3, 3, padding=(1, 1)), "fp16"
    yield "3x3_3_b32_odd_fp16", host.Conv(32, 3, 32, 32, 64, 3, 3, padding=(1, 1)), "fp16"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, default=90)
    arch = parser.parse_args().arch
    host = aot.backend("engine.triton_conv")
    launches: list = []
    aot.recorded(launches, host._pointers, host._tma)
    seen = set()
    for name, shape, precision in instances(host, arch):
        for config in host.configs(shape, DTYPES[precision], arch, SMS[arch], tf32=precision != "ieee"):
            launches.clear()
            launch(host, config, shape, DTYPES[precision])
            for kernel, grid, positional, keywords in launches:
                ast, options = aot.source(kernel, positional, keywords)
                key = repr((kernel.__name__, ast.signature, ast.constants, ast.attrs, options))
                if key in seen:
                    continue
                seen.add(key)
                line = aot.compiled_line(kernel, grid, positional, keywords, arch)
                print(json.dumps({"instance": name, "config": config, **line}), flush=True)


if __name__ == "__main__":
    main()
