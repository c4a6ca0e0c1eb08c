"""Compile the kernels that train without storing a normalised tensor, at the shapes of ResNet-50, ahead of time.

    python tests/aot_train.py --arch 90 [--few] [--only REGEX]

One JSON object a line for every kernel that differs, as in tests/aot.py; `--few`: one instance of every kind.
"""

from __future__ import annotations

import argparse
import json
import re

import aot
import torch
from aot import CL, DTYPES, SMS, meta

BATCH = 32


def normalisation(c: int, normalises: bool = True) -> list:
    """mean, var, bn_weight, bn_bias."""
    return [meta(c) for _ in range(4)] if normalises else [None] * 4


def convolution(host, c, size, k, taps, stride, precision, normalises=True, image=CL, groups=1):
    """One bn_act_conv of a square map, padded by taps // 2."""
    dtype = DTYPES[precision]
    x, weight = meta(BATCH, c, size, size, dtype=dtype, format=image), meta(k, c // groups, taps, taps, dtype=dtype)
    conv = ([stride] * 2, [taps // 2] * 2, [1, 1], groups)
    host.bn_act_conv(x, weight, *normalisation(c, normalises), 1e-5, True, *conv, True)


def pointwise(host, c, size, k, stride, precision, normalises=True, residual=True):
    dtype = DTYPES[precision]
    x, weight = meta(BATCH, c, size, size, dtype=dtype), meta(k, c, 1, 1, dtype=dtype)
    y = meta(BATCH, k, *[(size - 1) // stride + 1] * 2, dtype=dtype) if residual else None
    host.pointwise(x, weight, *normalisation(c, normalises), 1e-5, True, meta(k), meta(k), y, [stride] * 2, True)


def small(host, c, k, precision):
    """The small kernels of the pointwise convolution, forward and backward."""
    module, dtype = aot.backend("backends.triton_pointwise"), DTYPES[precision]
    weight, out = meta(k, c, 1, 1, dtype=dtype), [meta(k) for _ in range(4)]
    module.product_statistics(weight, meta(c), meta(c, c), *out[:2], 1e-5)
    y = meta(BATCH, k, 8, 8, dtype=dtype)
    module._base.bn_act = lambda x, *args, **more: x  # batch norm's own kernels are aot.py's
    module._base.bn_act_bwd = lambda grad, *args, **more: (grad, meta(grad.shape[1]), meta(grad.shape[1]), grad)
    before = (meta(BATCH, c, 8, 8, dtype=dtype), weight, *normalisation(c), 1e-5, True)
    statistics = (out[0], out[1], out[2], 1e-5, meta(c), meta(c, c))
    module._inner = lambda g, a: meta(k, c)
    module.pointwise_bn_act_bwd(y, y, *before, *statistics, [1, 1], True, [True] * 7)


def gram(host, c, size, stride, precision):
    host.gram(meta(BATCH, c, size, size, dtype=DTYPES[precision]), *normalisation(c), 1e-5, True, [stride] * 2)


def instances(few: bool) -> dict[str, tuple]:
    """name: (function, arguments)."""
    kinds = {
        "conv_3x3_64_fp16": (convolution, 64, 56, 64, 3, 1, "fp16"),
        "conv_stem_raw_fp16": (convolution, 3, 224, 64, 7, 2, "fp16", False),
        "conv_grouped_4_fp16": (convolution, 128, 56, 128, 3, 1, "fp16", True, CL, 32),
        "pointwise_64_256_tf32": (pointwise, 64, 56, 256, 1, "tf32"),
        "gram_256_bf16": (gram, 256, 56, 1, "bf16"),
        "small_64_256_bf16": (small, 64, 256, "bf16"),
    }
    if few:
        return kinds
    for precision in ("fp16", "bf16", "tf32"):
        kinds |= {
            f"conv_3x3_64_{precision}": (convolution, 64, 56, 64, 3, 1, precision),
            f"conv_3x3_128_stride2_{precision}": (convolution, 128, 56, 128, 3, 2, precision),
            f"conv_3x3_256_{precision}": (convolution, 256, 14, 256, 3, 1, precision),
            **({f"small_512_2048_{precision}": (small, 512, 2048, precision)} if precision != "tf32" else {}),
            f"conv_3x3_512_{precision}": (convolution, 512, 7, 512, 3, 1, precision),
            f"conv_1x1_64_256_{precision}": (convolution, 64, 56, 256, 1, 1, precision),
            f"conv_1x1_256_64_{precision}": (convolution, 256, 56, 64, 1, 1, precision),
            f"conv_1x1_256_64_raw_{precision}": (convolution, 256, 56, 64, 1, 1, precision, False),
            f"conv_1x1_1024_512_{precision}": (convolution, 1024, 14, 512, 1, 1, precision),
            f"conv_stem_raw_{precision}": (convolution, 3, 224, 64, 7, 2, precision, False),
            f"pointwise_64_256_{precision}": (pointwise, 64, 56, 256, 1, precision),
            f"pointwise_256_64_{precision}": (pointwise, 256, 56, 64, 1, precision, True, False),
            f"pointwise_1024_512_raw_{precision}": (pointwise, 1024, 14, 512, 1, precision, False, False),
            f"pointwise_256_512_stride2_{precision}": (pointwise, 256, 56, 512, 2, precision, True, False),
        }
    for precision in ("fp16", "bf16", "ieee"):
        kinds |= {
            f"gram_64_{precision}": (gram, 64, 56, 1, precision),
            f"gram_256_{precision}": (gram, 256, 56, 1, precision),
            f"gram_256_stride2_{precision}": (gram, 256, 56, 2, precision),
            f"gram_512_{precision}": (gram, 512, 28, 1, precision),
        }
    return kinds | {
        "conv_stem_nchw_raw_fp16": (convolution, 3, 224, 64, 7, 2, "fp16", False, torch.contiguous_format),
        **{
            f"conv_grouped_{c // groups}{'_stride2' * (stride > 1)}_{precision}": (
                convolution,
                c,
                size,
                c,
                3,
                stride,
                precision,
                True,
                CL,
                groups,
            )
            for c, size, stride, groups in (
                (128, 56, 1, 32),
                (256, 56, 2, 32),
                (512, 14, 1, 32),
                (1024, 7, 1, 32),
                (120, 28, 1, 5),
                (448, 28, 1, 4),
            )
            for precision in ("fp16", "bf16", "tf32")
        },
        "conv_grouped_4_raw_bf16": (convolution, 128, 56, 128, 3, 1, "bf16", False, CL, 32),
        "conv_3x3_64_ieee": (convolution, 64, 56, 64, 3, 1, "ieee"),
        "conv_3x3_72_fp16": (convolution, 72, 28, 72, 3, 1, "fp16"),
        "conv_3x3_72_tf32": (convolution, 72, 28, 72, 3, 1, "tf32"),
        "conv_3x3_50_140_odd_fp16": (convolution, 50, 28, 140, 3, 1, "fp16"),
        "conv_3x3_5_17_odd_fp16": (convolution, 5, 28, 17, 3, 1, "fp16"),
        "conv_1x1_1_1_odd_fp16": (convolution, 1, 1, 1, 1, 1, "fp16"),
        "pointwise_72_40_fp16": (pointwise, 72, 28, 40, 1, "fp16"),
        "gram_72_fp16": (gram, 72, 28, 1, "fp16"),
        "small_70_odd_fp16": (small, 70, 140, "fp16"),
        "gram_70_odd_fp16": (gram, 70, 28, 1, "fp16"),
        "gram_3_odd_ieee": (gram, 3, 28, 1, "ieee"),
        "gram_1_odd_fp16": (gram, 1, 1, 1, "fp16"),
    }


def record(host, arch: int, function, *args) -> list:
    """The launches of one instance on sm_<arch>."""
    launches: list = []
    base = aot.backend()
    base._chip = lambda x: (arch, SMS[arch])
    base.tf32_allowed = lambda: "ieee" not in args
    aot.recorded(launches, host._bn, host._conv, host._gram, aot.backend("backends.triton_pointwise")._pointwise)
    function(host, *args)
    return launches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--few", action="store_true", help="one instance of every kind")
    parser.add_argument("--only", default="", help="regular expression on the instance's name")
    options = parser.parse_args()
    host = aot.backend("backends.triton_train")
    seen = set()
    for name, (function, *args) in instances(options.few).items():
        if not re.search(options.only, name):
            continue
        for kernel, grid, positional, keywords in record(host, options.arch, function, *args):
            ast, compile_options = aot.source(kernel, positional, keywords)
            key = repr((kernel.__name__, ast.signature, ast.constants, ast.attrs, compile_options))
            if key in seen:
                continue
            seen.add(key)
            line = aot.compiled_line(kernel, grid, positional, keywords, options.arch)
            print(json.dumps({"instance": name, **line}), flush=True)


if __name__ == "__main__":
    main()
