"""Chained convolutions (rungs 4 and 5) as problems to tune."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.triton import unavailable as triton_unavailable
from . import compiled_chain, reference, triton_chain
from .cases import CUDNN, OWN, EngineCase, Random, chip, empty, jsonable, numbers, settle, tuples
from .problem import Candidate, Problem, Work


@dataclass(frozen=True)
class ChainArgs:
    """chain at one shape: C -> middle (3x3, stride) -> K (1x1) -> following (1x1), 0 for none."""

    n: int
    c: int
    h: int
    w: int
    middle: int
    k: int
    following: int
    stride: int
    relu: bool
    residual: bool
    segment: tuple[int, int, int, int] | None
    quarter: bool
    pool: bool
    device: str
    dtype: str

    def size(self) -> tuple[int, int]:
        return (self.h - 1) // self.stride + 1, (self.w - 1) // self.stride + 1

    def problem(self) -> Problem:
        parts = [
            f"chain {self.n}x{self.c}x{self.h}x{self.w}/{self.stride} -> {self.middle} -> {self.k}",
            f"-> {self.following}" if self.following else "",
            "+ residual" if self.residual else "",
            "+ {}x{}x{}/{}".format(*self.segment) if self.segment else "",
            "quarter" if self.quarter else "",
            "pool" if self.pool else "",
            "relu" if self.relu else "",
            self.dtype,
        ]
        return Problem(" ".join(p for p in parts if p), f"{__name__}:chain", jsonable(self))

    def work(self) -> Work:
        p, q = self.size()
        positions, c2 = self.n * p * q, self.segment[0] if self.segment else 0
        weights = 9 * self.c * self.middle + (self.middle + c2) * self.k + self.k * self.following
        stored = 1 if self.pool else ((p + 1) // 2) * ((q + 1) // 2) if self.quarter else p * q
        elements = self.n * self.c * self.h * self.w + weights + self.n * self.k * stored
        elements += positions * (self.following + c2 + self.residual * self.k)
        channels = [self.c, self.middle, self.k, *(["more"] if self.following else [])]
        return Work(
            f"chain {' -> '.join(map(str, channels))} {numbers(self.dtype)}",
            {"positions": positions, "channels": self.k} | ({"following": self.following} if self.following else {}),
            {
                "stride": str(self.stride),
                "residual": self.residual,
                "segment": self.segment is not None,
                "quarter": self.quarter,
                "pool": self.pool,
            },
            2 * positions * weights,
            elements * getattr(torch, self.dtype).itemsize,
        )

    def tensors(self, make_map, make_filter, make_bias) -> dict[str, Tensor]:
        tensors = {
            "x": make_map(self.n, self.c, self.h, self.w),
            "weight": make_filter(self.middle, self.c, 3, 3),
            "bias": make_bias(self.middle),
            "weight2": make_filter(self.k, self.middle, 1, 1),
            "bias2": make_bias(self.k),
        }
        if self.residual:
            tensors["residual"] = make_map(self.n, self.k, *self.size())
        if self.segment:
            c2, h2, w2, _ = self.segment
            tensors |= {"x2": make_map(self.n, c2, h2, w2), "projection": make_filter(self.k, c2, 1, 1)}
        if self.following:
            tensors |= {"weight3": make_filter(self.following, self.k, 1, 1), "bias3": make_bias(self.following)}
        return tensors

    def call(self, t: dict[str, Tensor]) -> tuple[tuple, dict]:
        """Arguments and options of reference.chain and of triton_chain's functions."""
        options = dict(
            residual=t.get("residual"),
            segment=(t["x2"], t["projection"], self.segment[3]) if self.segment else None,
            stride=self.stride,
            relu=self.relu,
            next=(t["weight3"], t["bias3"]) if self.following else None,
            quarter=self.quarter,
            pool=self.pool,
        )
        return (t["x"], t["weight"], t["bias"], t["weight2"], t["bias2"]), options

    def _call_on_meta(self) -> tuple[tuple, dict]:
        meta, dtype = torch.device("meta"), getattr(torch, self.dtype)
        return self.call(
            self.tensors(
                lambda *s: empty(s, dtype, meta),
                lambda *s: empty(s, dtype, meta),
                lambda k: torch.empty(k, device=meta),
            )
        )

    def configs(self) -> list[dict]:
        """Triton's."""
        args, options = self._call_on_meta()
        if triton_unavailable():
            return []
        return triton_chain.configs(chip(torch.device(self.device))[0], *args, **options)

    def compiled(self) -> list[Candidate]:
        device = torch.device(self.device)
        if device.type != "cuda":
            return []
        args, options = self._call_on_meta()
        configs = compiled_chain.configs(*chip(device), *args, **options)
        return [Candidate("cuda", c["instance"], c) for c in configs]


def launch_chain(candidate: Candidate, *args, **options) -> None:
    """triton_chain.launch, or its like, with the candidate's config."""
    kernels = compiled_chain if candidate.backend == "cuda" else triton_chain
    kernels.launch(candidate.config, *args, **options)


def chain(**args) -> ChainCase:
    return ChainCase(ChainArgs(**tuples(args)))


class ChainCase(EngineCase):
    # Its layers one by one are other pieces of the network, and measured there.
    fallback = CUDNN

    def candidates(self) -> list[Candidate]:
        return super().candidates()[1:] + self.args.compiled()

    def triton(self) -> list[dict]:
        return self.args.configs()

    def inputs(self, device, seed):
        random = Random(device, self.dtype, seed)
        return self.args.tensors(random.map, random.filter, random.bias)

    def outputs(self, device):
        a = self.args
        p, q = a.size()
        size = (1, 1) if a.pool else ((p + 1) // 2, (q + 1) // 2) if a.quarter else (p, q)
        outputs = {"y": empty((a.n, a.k, *size), self.dtype, device)}
        if a.following:
            outputs["z"] = empty((a.n, a.following, p, q), self.dtype, device)
        return outputs

    def exactly(self, inputs):
        args, options = self.args.call(inputs)
        y, z = reference.chain(*args, **options)
        return {"y": y} if z is None else {"y": y, "z": z}

    def pack(self, candidate, inputs):
        if candidate.backend not in OWN:
            return inputs
        args, options = self.args.call(inputs)
        size = 0 if candidate.backend == "cuda" else triton_chain.workspace(candidate.config, *args, **options)
        workspace = torch.empty(size, dtype=torch.uint8, device=inputs["x"].device) if size else None
        settle(self.device)
        return inputs | {"workspace": workspace}

    def run(self, candidate, inputs, outputs):
        args, options = self.args.call(inputs)
        if candidate.backend in OWN:
            written = dict(y=outputs["y"], z=outputs.get("z"), workspace=inputs.get("workspace"))
            return launch_chain(candidate, *args, **options, **written)
        y, z = reference.chain(*args, **options)
        outputs["y"].copy_(y)
        if z is not None:
            outputs["z"].copy_(z)
