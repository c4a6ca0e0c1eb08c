"""Compile the kernels of bn_act_conv_bwd at the layers of ResNet-50, ahead of time.

    python tests/aot_train_bwd.py --arch 90 [--only REGEX]

One JSON object a line for every kernel that differs, as in tests/aot.py.
"""

from __future__ import annotations

import argparse
import json
import re
import sys

import aot
from aot import DTYPES, SMS, meta

# name: batch, input channels, map, output channels, kernel, stride, groups if several
LAYERS = {
    "3x3_64": (32, 64, 56, 64, 3, 1),
    "3x3_128_stride2": (32, 128, 56, 128, 3, 2),
    "3x3_256": (32, 256, 14, 256, 3, 1),
    "3x3_512": (32, 512, 7, 512, 3, 1),
    "1x1_256_64": (32, 256, 56, 64, 1, 1),
    "1x1_64_256": (32, 64, 56, 256, 1, 1),
    "1x1_2048_512": (32, 2048, 7, 512, 1, 1),
    "grouped_4": (32, 128, 56, 128, 3, 1, 32),
    "grouped_8_stride2": (32, 256, 56, 256, 3, 2, 32),
    "grouped_32": (32, 1024, 7, 1024, 3, 1, 32),
}
OTHERS = {
    "1x1_256_512_stride2_fp16": (32, 256, 56, 512, 1, 2),
    "3x3_256_tf32": LAYERS["3x3_256"],
    "1x1_64_256_tf32": LAYERS["1x1_64_256"],
    "3x3_128_stride2_tf32": LAYERS["3x3_128_stride2"],
    "3x3_256_ieee": LAYERS["3x3_256"],
    "grouped_24_fp16": (32, 120, 28, 120, 3, 1, 5),
    "grouped_112_bf16": (32, 448, 28, 448, 3, 1, 4),
    "grouped_8_tf32": (32, 256, 28, 256, 3, 1, 32),
    # Multiples of 16 bytes that 16 does not divide; rows that no vector load fits.
    "3x3_72_fp16": (32, 72, 28, 72, 3, 1),
    "3x3_50_140_odd_fp16": (32, 50, 28, 140, 3, 1),
    "3x3_140_50_stride2_odd_bf16": (32, 140, 28, 50, 3, 2),
    "1x1_129_129_odd_tf32": (32, 129, 28, 129, 1, 1),
}
KERNELS = {"_bn_act_conv_bwd_input_kernel", "_bn_act_conv_bwd_weight_kernel", "_bn_act_conv_bwd_weight_finish_kernel"}


def instances():
    """(name, layer, precision, whether there is a BatchNorm)"""
    for name, layer in LAYERS.items():
        for precision in ("fp16", "bf16"):
            yield f"{name}_{precision}", layer, precision, True
    for name, layer in OTHERS.items():
        yield name, layer, name.rsplit("_", 1)[1], True
    for name in ("3x3_64", "1x1_256_64"):
        yield f"{name}_plain_fp16", LAYERS[name], "fp16", False


def launch(host, layer: tuple, precision: str, bn: bool) -> None:
    """One bn_act_conv_bwd of a square map, padded by taps // 2."""
    n, c, size, k, taps, stride, groups = (*layer, 1)[:7]
    dtype, pad = DTYPES[precision], taps // 2
    out = (size + 2 * pad - taps) // stride + 1
    grad, x = meta(n, k, out, out, dtype=dtype), meta(n, c, size, size, dtype=dtype)
    vectors = [meta(c) for _ in range(4)] if bn else [None] * 4
    conv = ([stride] * 2, [pad] * 2, [1, 1], groups)
    mask = [True, True, bn, bn]
    host.bn_act_conv_bwd(grad, x, meta(k, c // groups, taps, taps, dtype=dtype), *vectors, 1e-5, True, *conv, mask)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--only", default="", help="regular expression on the instance's name")
    options = parser.parse_args()
    arch = options.arch
    host = aot.backend("backends.triton_train_bwd")
    host._base._chip = lambda x: (arch, SMS[arch])
    launches: list = []
    aot.recorded(launches, host._conv_bwd)
    aot.recorded([], host._base._bn, aot.backend("backends.triton_groups")._conv)  # tests/aot.py and aot_train.py do
    seen = set()
    for name, layer, precision, bn in instances():
        if not re.search(options.only, name):
            continue
        host.tf32_allowed = lambda precision=precision: precision != "ieee"
        launches.clear()
        launch(host, layer, precision, bn)
        for kernel, grid, positional, keywords in launches:
            ast, compile_options = aot.source(kernel, positional, keywords)
            key = repr((kernel.__name__, ast.signature, ast.constants, ast.attrs, compile_options))
            if key in seen:
                continue
            seen.add(key)
            line = {"instance": name, **aot.compiled_line(kernel, grid, positional, keywords, arch)}
            print(json.dumps(line), flush=True)
    if not seen:
        sys.exit(f"no instance matches {options.only!r}")


if __name__ == "__main__":
    main()
