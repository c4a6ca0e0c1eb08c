"""Compile every config of conv_bias_act, grouped too, and stem_pool offered for ResNets and their kin, ahead of time.

    python tests/aot_conv.py --arch 90 [--few] [--only REGEX]

One JSON object a line for every kernel that differs, as in tests/aot.py; `config` is the one that was met first.
`--few`: every layer once, and every tile once, split and whole.
"""

from __future__ import annotations

import argparse
import functools
import json
import re

import aot
import torch
from aot import DTYPES, SMS, meta


def layers(host, n: int) -> dict:
    """The convolutions of the two networks behind the stem, as the ladder of fusion has them; their classifiers."""
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
    return found | {f"classifier_{c}": conv(n, c, 1, 1, 1000, 1, 1) for c in (512, 2048)}


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
    space = meta(host.workspace(config, shape) // 4)
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


def convolutions(arch: int, launches: list):
    host = aot.backend("engine.triton_conv")
    aot.recorded(launches, host._pointers, host._tma)
    for name, shape, precision in instances(host, arch):
        dtype = DTYPES[precision]
        for config in host.configs(shape, dtype, arch, SMS[arch], tf32=precision != "ieee"):
            yield name, config, functools.partial(launch, host), shape, dtype


def grouped(arch: int, launches: list):
    """The 3x3 convolutions of ResNeXts and RegNets, in fp16 at two batch sizes; a few in what else there is."""
    host = aot.backend("engine.triton_grouped")
    aot.recorded(launches, host._grouped)

    def launch(config, shape, groups, dtype):
        x, c = meta(shape.n, shape.c, shape.h, shape.w, dtype=dtype), shape.c // groups * config["bundle"]
        out = meta(shape.n, shape.k, shape.p, shape.q, dtype=dtype)
        conv = {"stride": shape.stride, "padding": shape.padding, "dilation": shape.dilation, "groups": groups}
        weight = meta(shape.k, c, shape.r, shape.s, dtype=dtype)
        host.launch(config, x, weight, meta(shape.k), out if shape.residual else None, out, **conv)

    def conv(n, channels, size, stride=1, **more):
        return host.Conv(n, channels, size, size, channels, 3, 3, (stride, stride), (1, 1), **more)

    found = {}
    for n in (1, 128):
        for channels, size in ((128, 56), (256, 28), (512, 14), (1024, 7)):
            found[f"grouped_{channels // 32}_b{n}_fp16"] = conv(n, channels, size), 32
        found[f"grouped_8_stride2_b{n}_fp16"] = conv(n, 256, 56, 2), 32
        found[f"grouped_24_b{n}_fp16"] = conv(n, 120, 28), 5
        found[f"grouped_112_b{n}_fp16"] = conv(n, 448, 28), 4
        found[f"grouped_232_b{n}_fp16"] = conv(n, 1392, 14), 6
    for precision in ("bf16", "tf32"):
        found[f"grouped_8_residual_b32_{precision}"] = conv(32, 256, 28, residual=True), 32
        found[f"grouped_112_b32_{precision}"] = conv(32, 448, 28), 4
    for name, (shape, groups) in found.items():
        dtype = DTYPES[name.rsplit("_", 1)[1]]
        for config in host.configs(shape, groups, dtype, arch, SMS[arch]):
            yield name, config, launch, shape, groups, dtype


def stems(arch: int, launches: list):
    """Every precision, both layouts, input of the compute dtype and of float32; maps that 16 does not divide."""
    host = aot.backend("engine.triton_stem")
    aot.recorded(launches, host._stem)

    def launch(config, layout, n, size, x_dtype, dtype):
        x = meta(n, 3, size, size, dtype=x_dtype, format=torch.contiguous_format if layout == "nchw" else aot.CL)
        p = host.sizes(size, size)[3]
        packed = torch.empty(64, host._SIZE, dtype=dtype, device="meta")
        host.launch(config, x, packed, meta(64), meta(n, 64, p, p, dtype=dtype))

    for layout in ("nchw", "channels_last"):
        for n, size, precision in (
            (1, 224, "fp16"),
            (128, 224, "fp16"),
            (128, 224, "bf16"),
            (128, 224, "tf32"),
            (128, 224, "ieee"),
            (32, 97, "fp16"),
        ):
            dtype = DTYPES[precision]
            for config in host.configs((n, 3, size, size), dtype, arch, SMS[arch], tf32=precision != "ieee"):
                for x_dtype in {dtype, torch.float32} if size == 224 else {dtype}:
                    yield f"stem_{layout}_{size}_b{n}_{precision}", config, launch, layout, n, size, x_dtype, dtype


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--few", action="store_true", help="every layer once, and every tile once, split and whole")
    parser.add_argument("--only", default="", help="regular expression on the instance's name")
    options = parser.parse_args()
    arch = options.arch
    launches: list = []
    seen, met = set(), set()
    for name, config, launch, *args in (
        *convolutions(arch, launches),
        *grouped(arch, launches),
        *stems(arch, launches),
    ):
        if not re.search(options.only, name):
            continue
        tile = repr({k: v > 1 if k == "splits" else v for k, v in config.items() if k != "programs"})
        if options.few and {name, tile} <= met:
            continue
        met |= {name, tile}
        launches.clear()
        launch(config, *args)
        for kernel, grid, positional, keywords in launches:
            ast, compile_options = aot.source(kernel, positional, keywords)
            key = repr((kernel.__name__, ast.signature, ast.constants, ast.attrs, compile_options))
            if key in seen:
                continue
            seen.add(key)
            line = aot.compiled_line(kernel, grid, positional, keywords, arch)
            print(json.dumps({"instance": name, "config": config, **line}), flush=True)


if __name__ == "__main__":
    main()
