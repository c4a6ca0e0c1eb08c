"""Training, for gpu-check: arguments of its ops (convolutions between batch norms of the batch's own statistics), and
the speed, memory and kernels of whole steps."""

from __future__ import annotations

import functools
import statistics
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import fused_resnet
from fused_resnet import backends, measure
from fused_resnet.backends import composed, pooled, reference, stem_conv

# name: (N, C, H, W, K, kernel, stride, padding, batch norm while loading, groups if several); odd maps, ragged tiles
CONVOLUTIONS = {
    "3x3": (2, 64, 7, 9, 64, 3, 1, 1, True),
    "1x1": (3, 64, 7, 9, 96, 1, 1, 0, True),
    "3x3-stride2": (2, 32, 15, 13, 64, 3, 2, 1, True),
    "3x3-72-channels": (2, 72, 7, 9, 72, 3, 1, 1, True),
    "raw-1x1": (3, 96, 7, 9, 32, 1, 1, 0, False),
    "3x3-grouped": (2, 64, 7, 9, 64, 3, 1, 1, True, 16),
    "3x3-grouped-stride2": (2, 72, 15, 13, 72, 3, 2, 1, True, 3),
}
CONVOLUTIONS_OF_A_RESNET = {
    "layer1-3x3": (32, 64, 56, 56, 64, 3, 1, 1, True),
    "layer1-raw-1x1": (32, 256, 56, 56, 64, 1, 1, 0, False),
    "layer3-3x3-stride2": (32, 256, 28, 28, 256, 3, 2, 1, True),
    "resnext-layer1-3x3": (32, 128, 56, 56, 128, 3, 1, 1, True, 32),
    "resnext-layer3-3x3-stride2": (32, 512, 28, 28, 512, 3, 2, 1, True, 32),
}
# The same; what is not loaded through a batch norm is a projection, without residual and ReLU.
POINTWISE = {
    "expand": (2, 64, 7, 9, 256, 1, 1, 0, True),
    "expand-72-channels": (3, 72, 5, 7, 144, 1, 1, 0, True),
    "projection": (2, 64, 9, 7, 256, 1, 2, 0, False),
}
POINTWISE_OF_A_RESNET = {
    "layer1-expand": (32, 64, 56, 56, 256, 1, 1, 0, True),
    "layer4-expand": (32, 512, 7, 7, 2048, 1, 1, 0, True),
}
# The same, of a pool's input.
POOLS = {
    "pool": (2, 64, 9, 12, 64, 3, 2, 1, True),
    "pool-72-channels": (3, 72, 8, 7, 72, 3, 2, 1, True),
}
POOLS_OF_A_RESNET = {"stem-pool": (32, 64, 112, 112, 64, 3, 2, 1, True)}
# The same, of a stem: three channels, nothing to load through; tiles that are ragged, and more than one.
STEMS = {
    "stem": (2, 3, 34, 38, 64, 7, 2, 3, False),
    "stem-odd-height": (3, 3, 37, 40, 64, 7, 2, 3, False),
    "stem-128-filters": (1, 3, 33, 254, 128, 7, 2, 3, False),
}
STEMS_OF_A_RESNET = {"stem-224": (32, 3, 224, 224, 64, 7, 2, 3, False)}
OPS = (*composed.OPS, *pooled.OPS, *stem_conv.OPS)


def specs(op: str, on_gpu: bool) -> dict[str, tuple]:
    if op in pooled.OPS:
        return POOLS | (POOLS_OF_A_RESNET if on_gpu else {})
    if op in stem_conv.OPS:
        return STEMS | (STEMS_OF_A_RESNET if on_gpu else {})
    if op.startswith("pointwise"):
        return POINTWISE | (POINTWISE_OF_A_RESNET if on_gpu else {})
    return CONVOLUTIONS | (CONVOLUTIONS_OF_A_RESNET if on_gpu else {})


def arguments(op: str, spec, device, dtype: torch.dtype, format: torch.memory_format) -> tuple:
    n, c, h, w, k, kernel, stride, padding, normalised, *several = spec
    (groups,) = several or [1]

    def maps(shape, seed: int) -> Tensor:
        return measure.random_input(shape, seed, device, dtype).contiguous(memory_format=format)

    def affine(channels: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(channels)
        weight, bias = (torch.rand(channels, generator=g).to(device) for _ in range(2))
        return weight + 0.5, bias - 0.5

    x = maps((n, c, h, w), 1)
    if op in pooled.OPS:
        bn = (*reference.bn_stats(x), *affine(c))
        if op == "bn_act_pool":
            return x, *bn, 1e-5
        _, winner = reference.bn_act_pool(x, *bn, 1e-5)
        return maps(winner.shape, 3), x, winner, *bn[:3], 1e-5, [True] * 3
    filters = (k, c // groups, kernel, kernel)
    weight = (maps(filters, 2).float() / (c // groups * kernel * kernel) ** 0.5).to(dtype)
    if op in stem_conv.OPS:  # pictures come in either layout
        weight = weight.contiguous(memory_format=torch.channels_last)
        if op == "stem_conv":
            return x, weight
        if op == "conv_bn_act_pool":
            mean, variance = affine(k)
            return x, weight, *affine(k), mean - 1, variance + 1, 1e-5
        return maps((n, k, (h + 1) // 2, (w + 1) // 2), 3).contiguous(memory_format=torch.channels_last), x, weight
    weight = weight.contiguous(memory_format=format)
    loaded = (*(reference.bn_stats(x) if normalised else (None, None)), *(affine(c) if normalised else (None, None)))
    loaded = (*loaded, 1e-5, True)
    places = ([stride] * 2, [padding] * 2, [1, 1], groups)
    if op == "bn_act_conv":
        return x, weight, *loaded, *places, True
    shape = (n, k, *((size + 2 * padding - kernel) // stride + 1 for size in (h, w)))
    grad = maps(shape, 3)
    if op == "bn_act_conv_bwd":
        return grad, x, weight, *loaded, *places, [True, True, normalised, normalised]
    out_weight, out_bias = affine(k)
    residual = maps(shape, 4) if normalised else None
    forward = (x, weight, *loaded, out_weight, out_bias, 1e-5, residual, [stride] * 2, normalised)
    if op == "pointwise_bn_act":
        return forward
    y, y_mean, y_var, a_mean, a_cov = reference.pointwise_bn_act(*forward)
    mask = [True, True, normalised, normalised, True, True, normalised]
    statistics = (out_weight, y_mean, y_var, 1e-5, a_mean, a_cov)
    return grad, y if normalised else None, x, weight, *loaded, *statistics, [stride] * 2, normalised, mask


# --- whole steps ------------------------------------------------------------------------------------------------------

SECONDS = 5  # of timing
STEPS = 4  # in a row, as in a training: the host is ahead of the GPU
KERNELS = 100  # of a profile, those that take longest


def bench_cases(device: torch.device) -> Iterator[tuple[str, Callable[[], dict]]]:
    plan = [("resnet50", "bfloat16", 256), ("resnet50", "bfloat16", 128), ("resnet18", "bfloat16", 256)]
    plan.append(("resnext50_32x4d", "bfloat16", 128))
    for name, dtype, batch in plan if device.type == "cuda" else [("resnet18", "bfloat16", 2)]:
        yield f"train/speed/{name}/{dtype}/{batch}", functools.partial(_speed, name, dtype, batch, device)


def _speed(name: str, dtype: str, batch: int, device) -> dict:
    """Images a second of whole steps (forward, cross-entropy, backward, SGD with momentum) in turns, the most memory
    that a step takes beside what it starts with, and the kernels of one of ours."""
    on_gpu = device.type == "cuda"
    steps, peak, ready = {}, {}, {}
    runs = ("eager", "channels_last", "fused", "fused lean", "fused, captured", "torch.compile")
    for how in runs if on_gpu else runs[:4]:
        step = training_step(name, how, getattr(torch, dtype), batch, 224 if on_gpu else 32, device)
        ready[how] = measure.time_once(step, device, 1)
        step()
        # A graph's activations lie in memory that was set aside before the step.
        peak[how] = None if "captured" in how else measure.peak_memory(step, device)
        steps[how] = step
    found = {"profile": profile(steps.get("fused, captured", steps["fused"]), device), "kernels": chosen()}
    seconds, _ = measure.interleave(steps, device, SECONDS if on_gpu else 0, least_calls=STEPS)
    cuts = {how: [1e3 * q for q in measure.quantiles(t)] for how, t in seconds.items()}
    speed = {how: round(batch / statistics.median(t), 1) for how, t in seconds.items()}
    return {"images_per_s": speed, "p20_p50_p80_ms": cuts, "peak_mib": peak, "ready_s": ready} | found


def training_step(name: str, how: str, dtype: torch.dtype, batch: int, size: int, device) -> Callable[[], None]:
    model = measure.build_model(name).to(device=device, dtype=dtype).train()
    format = torch.contiguous_format if how == "eager" else torch.channels_last
    model = model.to(memory_format=format)
    x = measure.random_input((batch, 3, size, size), 0, device, dtype).contiguous(memory_format=format)
    target = torch.arange(batch, device=device) % 1000
    if "fused" in how:
        fused_resnet.swap_blocks(model, memory="lean" if "lean" in how else "default")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)
    called = torch.compile(model) if how == "torch.compile" else model
    if "captured" in how:
        called = fused_resnet.capture_training(model, x)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(called(x), target).backward()
        optimizer.step()

    return step


def profile(step: Callable[[], None], device: torch.device) -> dict[str, list]:
    """Microseconds of a step by kernel, and how often it ran; {} where nothing can be traced."""
    if device.type != "cuda":
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        step()
        measure.synchronize(device)
    took, count = Counter(), Counter()
    for event in trace.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            took[event.name[:120]] += event.self_device_time_total
            count[event.name[:120]] += 1
    return {name: [round(t, 1), count[name]] for name, t in took.most_common(KERNELS)} | {
        "all": [round(took.total(), 1), count.total()]
    }


def chosen() -> dict[str, int]:
    """How many kinds of calls of the measured ops each backend serves, so far."""
    return dict(Counter(f"{key[0]} {backend.NAME}" for key, backend in backends._winners.items()))
