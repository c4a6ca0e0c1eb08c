"""The host's part of a training step that is not captured, measured where there is no GPU.

    python benchmarks/host.py [--rounds 25] [--json benchmarks/results/host-cpu.json]

A GPU that is fast waits for the Python that launches its kernels. Here the ops are the Triton backend's, on a CPU, and
every launch of it is left out: nothing is computed by them, and what Triton's launcher itself would take is not in the
time. The network is a ResNet-50 of a quarter of the channels at 2x32x32, in bfloat16 or under autocast, so small that
PyTorch's operators, which do run, take little. Rounds take turns: host code run at every call; ops written down
(fused_resnet/backends/straight.py); blocks written down, each a node of autograd's graph (fused_resnet/one_node.py).
The untouched network, all of whose operators run, stands beside them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

import fused_resnet
from fused_resnet import backends, doctor, measure, one_node
from fused_resnet.backends import straight, triton, triton_running

STEPS = one_node.WATCH_AT + 4  # until every call is written down
WAYS = ("eager", "run", "ops", "blocks")


class Narrow(ResNet):
    """ResNet-50 of a quarter of the channels."""

    def __init__(self):
        super().__init__(Bottleneck, [3, 4, 6, 3], num_classes=10)
        self.fc = nn.Linear(512, 10)

    def _make_layer(self, block, planes, *args, **options):
        if planes == 64:
            self.inplanes, self.conv1, self.bn1 = 16, nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16)
        return super()._make_layer(block, planes // 4, *args, **options)


class Launched:
    """What Triton's dispatch returns, with the launch left out."""

    count = 0

    def __getitem__(self, grid):
        def launch(*args):
            Launched.count += 1

        return launch


@contextlib.contextmanager
def launches_left_out():
    """The Triton backend serves on the CPU, and its kernels do not run."""
    nothing = Launched()
    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (triton, "unavailable", lambda: None),
            (triton, "interpreting", lambda: True),
            (triton, "_dispatch", lambda kernel, grid, *args, **constants: nothing),
            (backends, "TRUSTED", {triton}),
            (backends, "MEASURED", set()),
            (backends, "ORDER", {"cpu": (triton,)}),
            (straight, "_agrees", lambda v, e, limit: (v is None) == (e is None)),  # no kernel wrote them
            (triton_running, "follow", _follow),
        ):
            stack.enter_context(patch.object(target, name, value))
        yield


def _follow(*given) -> bool:
    """triton_running.follow, which asks for a GPU."""
    tensors, scalars = given[:5], given[5:]
    triton_running._run(tensors, *scalars, key=triton_running._key(tensors))
    torch.autograd.graph.increment_version(tensors[:3])
    return True


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", type=Path, help="where to put the result")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    result = {"environment": doctor.environment(), "rounds": arguments.rounds, "steps": {}}
    with launches_left_out():
        for way, dtype in (("bfloat16", torch.bfloat16), ("autocast", torch.float32)):
            result["steps"][way] = measured(dtype, way == "autocast", arguments.rounds)
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    return 0


def measured(dtype: torch.dtype, autocast: bool, rounds: int) -> dict:
    x = torch.randn(2, 3, 32, 32, dtype=dtype).contiguous(memory_format=torch.channels_last)
    models = {name: Narrow().to(dtype).to(memory_format=torch.channels_last) for name in WAYS}
    for name in WAYS[1:]:
        fused_resnet.swap_blocks(models[name])
    ready: dict = {name: {} for name in models}
    node = one_node.run

    def step(name):
        model = models[name]
        with (
            patch.object(backends, "WRITTEN_DOWN", set() if name == "run" else {"cpu"}),
            patch.object(backends, "_ready", ready[name]),
            patch.object(one_node, "run", node if name == "blocks" else lambda *args: None),
        ):
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = model(x)
            middle = time.perf_counter()
            y.float().sum().backward()
            end = time.perf_counter()
        model.zero_grad()
        return 1e3 * (middle - start), 1e3 * (end - middle)

    for name in models:
        for _ in range(STEPS):
            step(name)
    for name in WAYS[2:]:
        assert all(not isinstance(f, straight.Repeated) for f in ready[name].values()), "a call was not written down"
    kinds = [one_node._entries[m] for m in models["blocks"].modules() if isinstance(m, Bottleneck)]
    assert all(program.forward for known in kinds for program in known.values()), "a block was not written down"
    Launched.count = 0
    step("blocks")
    times: dict = {name: [] for name in models}
    launches = Launched.count
    for _ in range(rounds):
        for name in models:
            times[name].append(step(name))
    found = {"launches": launches}
    for name, each in times.items():
        forward, backward = zip(*each, strict=True)
        found[name] = {
            "forward_ms": round(statistics.median(forward), 2),
            "backward_ms": round(statistics.median(backward), 2),
            "step_ms_20_50_80": [round(q, 2) for q in measure.quantiles([f + b for f, b in each])],
        }
    for name in WAYS[2:]:
        ratios = [sum(w) / sum(r) for w, r in zip(times[name], times["run"], strict=True)]
        found[f"{name}_over_run_20_50_80"] = [round(q, 3) for q in measure.quantiles(ratios)]
    return found


if __name__ == "__main__":
    raise SystemExit(main())
