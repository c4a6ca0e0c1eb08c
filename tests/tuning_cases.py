"""Cases for test_tune.py, in a module that a child process can import: y = a @ b, and ways to get it wrong."""

from __future__ import annotations

import collections
import os
import signal
import time

import torch

from fused_resnet.engine.problem import Candidate, Case, Work

ROWS, COLUMNS = 37, 24
NAMES = ("plain", "transposed", "slow", "packed")


class Product(Case):
    """kind: of its work; without one nothing is forecast of it, or from it."""

    def __init__(
        self, names=NAMES, trusted=False, fallback=None, folder=None, dtype="float32", device="cpu", kind=None, size=1
    ):
        if kind is not None:
            self.work = Work(kind, {"positions": size}, {}, 2 * ROWS * COLUMNS * 16, 4 * ROWS * COLUMNS)
        self.names, self.trusted, self.folder, self.dtype = names, trusted, folder, getattr(torch, dtype)
        self.fallback = None if fallback is None else candidate(fallback)
        self.device = device
        self.calls = collections.Counter()

    def candidates(self):
        return [candidate(name) for name in self.names]

    def inputs(self, device, seed):
        g = torch.Generator().manual_seed(seed)
        shapes = {"a": (ROWS, 16), "b": (16, COLUMNS)}
        return {name: torch.randn(shape, generator=g).to(device, self.dtype) for name, shape in shapes.items()}

    def outputs(self, device):
        return {"y": torch.empty(ROWS, COLUMNS, dtype=self.dtype, device=device)}

    def reference(self, inputs):
        return {"y": inputs["a"].double() @ inputs["b"].double()}

    def prepare(self, candidate):
        if candidate.config["name"] == "does_not_compile":
            raise NotImplementedError("no such instruction\non this chip")
        self.note(f"prepare {candidate.config['name']}")

    def compiles(self, candidate):
        return self.folder is not None

    def pack(self, candidate, inputs):
        if candidate.config["name"] == "packed":
            return {**inputs, "b": inputs["b"].t().contiguous()}
        return inputs

    def run(self, candidate, inputs, outputs):
        name = candidate.config["name"]
        self.calls[name] += 1
        globals()[name](self, inputs["a"], inputs["b"], outputs["y"])

    def note(self, what):
        """Remembered across processes."""
        if self.folder is not None:
            with open(os.path.join(self.folder, f"{os.getpid()}.txt"), "a") as file:
                file.write(f"{what}\n")


def candidate(name):
    return Candidate("test", name.replace("_", " "), {"name": name})


def product(**args):
    return Product(**args)


def unbuildable():
    raise OSError("no such file")


def without_reference():
    case = Product(trusted=True)
    case.reference = lambda inputs: {}
    return case


def plain(case, a, b, y):
    torch.mm(a, b, out=y)
    case.note("plain")


def transposed(case, a, b, y):
    y.copy_(torch.mm(b.t(), a.t()).t())


def packed(case, a, b, y):
    torch.mm(a, b.t(), out=y)


def slow(case, a, b, y):
    time.sleep(0.003)
    torch.mm(a, b, out=y)


def wrong(case, a, b, y):
    torch.mm(a, 1.01 * b, out=y)


def one_element_wrong(case, a, b, y):
    torch.mm(a, b, out=y)
    y[5, 7] += 9e-4


def beyond(y, row):
    """A view of the row that many rows after the first one: of no row of y, if there are not as many."""
    return y.as_strided((1, COLUMNS), (COLUMNS, 1), y.storage_offset() + row * COLUMNS)


def one_row_too_many(case, a, b, y):
    torch.mm(a, b, out=y)
    beyond(y, ROWS).zero_()


def one_row_too_early(case, a, b, y):
    torch.mm(a, b, out=y)
    beyond(y, -1).zero_()


def reads_out_of_bounds(case, a, b, y):
    torch.mm(a, b, out=y)
    y[-1] += 0 * a.as_strided((1,), (1,), a.storage_offset() + a.numel())


def one_row_missing(case, a, b, y):
    torch.mm(a[:-1], b, out=y[:-1])


def writes_its_input(case, a, b, y):
    torch.mm(a, b, out=y)
    a[0, 0] += 1


def writes_beside_its_input(case, a, b, y):
    torch.mm(a, b, out=y)
    a.as_strided((1,), (1,), a.storage_offset() + a.numel()).zero_()


def raising(case, a, b, y):
    raise ValueError("bad launch\nand more")


def hungry(case, a, b, y):
    raise torch.OutOfMemoryError("there is no room")


def hanging(case, a, b, y):
    time.sleep(3600)


def dying(case, a, b, y):
    os.kill(os.getpid(), signal.SIGSEGV)


def exiting(case, a, b, y):
    os.write(2, b"assertion failed: k < 16\n")
    os._exit(3)


def poisoning(case, a, b, y):
    """As an illegal address does it to a context: nothing runs any more, not even what is right."""

    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, synchronize
    torch.mm = lambda *args, **kwargs: synchronize()
    synchronize()


def sabotaging(case, a, b, y):
    """The next one in this process dies."""
    torch.mm = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGBUS)
    raise ValueError("but who did it?")


def device_assert(case, a, b, y):
    a[torch.full((4,), 2**20, device=a.device)].sum()
    torch.mm(a, b, out=y)


def stuck(case, a, b, y):
    for _ in range(100):
        torch.cuda._sleep(2**34)
    torch.mm(a, b, out=y)


def waiting(case, a, b, y):
    """Right, but cannot be captured in a graph."""
    torch.mm(a, b, out=y)
    torch.cuda.current_stream().synchronize()


def differing(case, a, b, y):
    torch.mm(a, b, out=y)
    y *= 1 + 1e-7 * (case.calls["differing"] % 3)


def wearing_out(case, a, b, y):
    torch.mm(a, b, out=y)
    if case.calls["wearing_out"] > 4:
        y[0] = 0


def dying_late(case, a, b, y):
    torch.mm(a, b, out=y)
    if case.calls["dying_late"] > 4:
        os.kill(os.getpid(), signal.SIGABRT)
