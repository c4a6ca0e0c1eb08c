"""capture_training: a model's forward and backward as two CUDA graphs, for steps that launch faster than a host can.

A training step of ResNet-50 launches more than a thousand kernels; at small batches, or on a slow host, the GPU waits
for them. A graph launches them at once. Graphs work at fixed places in memory: what a call gets is copied there, what
it returns is copied from there, so that nothing a caller holds is written to by a later call. Graphs of several shapes
lie in one pool of memory: what one computes is gone when the next runs, and a result is differentiated before that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .engine.captured import graph_of
from .kernels.tiles import ceil_div

WARM_UP = 3  # steps before the capture: kernels are verified, timed and compiled in the first


def capture_training(model: nn.Module, x: Tensor, *more: Tensor) -> CapturedTraining:
    """A function that computes what `model` computes in training, by CUDA graphs, for inputs like these.

        step = fused_resnet.capture_training(model.train(), x)
        loss = criterion(step(x), target)
        loss.backward()
        optimizer.step()

    model: a module on one GPU, in the modes that it will train in; it stays as it is, and running statistics are not
    changed here. x: [N, C, H, W] on that GPU, of the shape, dtype and layout of a batch; its values do not matter.
    more: batches of other shapes that will come, for images that grow from epoch to epoch or a last batch that is
    smaller: they share memory, of which there is as much as the largest needs, beside their inputs and results.
    Capture under the autocast under which you train, and before a DataLoader with pin_memory is under way, whose calls
    of CUDA would end the capture.

    The function takes one tensor and returns what model(tensor) returns; gradients reach the parameters (and the input,
    if x requires one) as usual, and accumulate as usual. Any other call goes to the model itself: another shape, dtype
    or layout, other modes, requires_grad or numbers (momentum and eps of a norm, p of a dropout), another autocast, no
    gradients wanted, torch.compile. Hooks on modules inside are not called by a graph, what modules keep of a forward
    is the last capture's, and each result can be differentiated once, before the next call, of whatever shape, and
    before parameters change. Calls come from one thread, on one stream at a time.

    It is a module around the model, so that a process of several wraps it as it would the model:

        step = fused_resnet.capture_training(model.train(), x)
        step = nn.parallel.DistributedDataParallel(step, device_ids=[x.device.index])

    All gradients are there at once, at the end of the graph: they are exchanged after the backward, not beside it.

    Raises TypeError if model is no module; ValueError if x or one of more is not a plain CUDA tensor, nothing in the
    model is in training or a part cannot be captured (SyncBatchNorm, cumulative running statistics, modules of several
    processes: those come around a captured model, not into one); RuntimeError later on, if a parameter or buffer is
    another or no longer lies where it was (FSDP puts others in their place), or a result is differentiated after
    another call or after parameters have changed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for name, t in (("x", x), *((f"more[{i}]", t) for i, t in enumerate(more))):
        if not isinstance(t, Tensor) or not t.is_cuda:
            what = str(t.device) if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"{name}: expected a CUDA tensor, got {what}: graphs are captured on a GPU")
        if type(t) is not Tensor:
            raise ValueError(f"{name}: expected a torch.Tensor itself, got {type(t).__name__}")
        if t.device != x.device:
            raise ValueError(f"{name}: expected a tensor on {x.device}, as x is, got {t.device}")
    if elsewhere := {str(t.device) for t in (*model.parameters(), *model.buffers()) if t.device != x.device}:
        raise ValueError(f"model: expected all of it on {x.device}, as x is, got {', '.join(sorted(elsewhere))}")
    return CapturedTraining(model, x, *more)


class CapturedTraining(nn.Module):
    """What `capture_training` returns. model: the module whose steps it runs, whose state_dict is to be saved."""

    def __init__(self, model: nn.Module, x: Tensor, *more: Tensor):
        _check(model)
        super().__init__()
        self.model = model
        names = ("momentum", "eps", "p", "memory", "drop_prob", "block_size", "gamma_scale")
        self._numbers = [(m, name) for m in model.modules() for name in names if hasattr(m, name)]
        self._tensors = [*model.parameters(), *model.buffers()]
        self._places = [t.data_ptr() for t in self._tensors]
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._graphs: list[_Graphs] = []
        self._calls = 0
        buffers = [(b, b.clone()) for b in model.buffers()]
        try:
            with torch.enable_grad():
                # The largest first: the others find room in what it leaves.
                self._record(sorted((x, *more), key=Tensor.numel, reverse=True))
        finally:
            with torch.no_grad():
                for b, before in buffers:
                    b.copy_(before)

    def forward(self, x: Tensor):
        graphs = None
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            graphs = self._graphs_like(self._signature(x))
        if graphs is None:
            return self.model(x)
        tensors = [*self.model.parameters(), *self.model.buffers()]
        same = len(tensors) == len(self._tensors) and all(t is u for t, u in zip(tensors, self._tensors, strict=True))
        if not same or [t.data_ptr() for t in tensors] != self._places:
            raise RuntimeError("model: a parameter or buffer is not where it was: capture the model again")
        self._calls += 1
        return tree_unflatten(_Step.apply(self, graphs, self._calls, x, *graphs.used), graphs.tree)

    def __repr__(self) -> str:
        shapes = "; ".join(f"{list(shape)} {dtype}" for shape, _, dtype, *_ in (g.like for g in self._graphs))
        return f"CapturedTraining({type(self.model).__name__}, {shapes})"

    def versions(self) -> list[int]:
        """How often each parameter that is trained has been modified; those too whose value alone is read."""
        return [p._version for p in self._trained]

    def __reduce_ex__(self, protocol):
        raise TypeError("a captured model can be neither copied nor pickled, as its graphs cannot: take its .model")

    def _signature(self, x) -> tuple | None:
        """All that the graphs depend on, beside where tensors lie."""
        if type(x) is not Tensor:
            return None
        modes = tuple(m.training for m in self.model.modules())
        wanted = tuple(p.requires_grad for p in self.model.parameters())
        numbers = tuple(_number(getattr(m, name, None)) for m, name in self._numbers)
        return x.shape, x.stride(), x.dtype, x.device, x.requires_grad, *_autocast(), modes, wanted, numbers

    def _graphs_like(self, signature: tuple | None) -> _Graphs | None:
        return next((g for g in self._graphs if g.like == signature), None)

    def _record(self, inputs: list[Tensor]) -> None:
        flats: dict[int, Tensor] = {}
        for x in inputs:
            if self._graphs_like(like := self._signature(x)) is None:
                self._graphs.append(_Graphs(self.model, self._trained, x, like, flats))
        enabled, dtype = _autocast()
        # Its cache would hold casts of the weights, from another time than the graph's.
        with torch.autocast("cuda", dtype, enabled=enabled, cache_enabled=False):
            capture = self._recorder()  # all have warmed up before the first holds memory
            for graphs in self._graphs:
                graphs.record(functools.partial(capture, graphs))

    def _recorder(self) -> Callable:
        """A function that captures a function of nothing, for these graphs: (replay, what the function returned)."""
        device = self._graphs[0].x.device
        stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        stream.wait_stream(torch.cuda.current_stream(device))
        try:
            with torch.cuda.device(device), torch.cuda.stream(stream):
                for graphs in self._graphs:
                    graphs.warm_up()
        finally:  # whatever happened: buffers are put back as they were
            torch.cuda.current_stream(device).wait_stream(stream)

        def capture(graphs, function):
            # The outer context gives the caller's stream back even where the capture's own does not.
            with torch.cuda.device(device), torch.cuda.stream(stream):
                graph, returned = graph_of(function, stream, pool, device.index, "global")
            return graph.replay, returned

        return capture


class _Graphs:
    """A forward and a backward for inputs like x, and the memory that they read and write. flats: where all gradients
    lie, one behind the other, by how many bytes they are; graphs that run in turns share them."""

    def __init__(self, model: nn.Module, trained: list[nn.Parameter], x: Tensor, like: tuple, flats: dict[int, Tensor]):
        self.model, self.trained, self.like, self.flats = model, trained, like, flats
        self.x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(x.requires_grad)

    def warm_up(self) -> None:
        for _ in range(WARM_UP):
            self.results = self.forward()
            self.grads = [torch.zeros_like(y) for y in self.results if y.requires_grad]
            self.backward()
        self.results = self.grads = None
        self.flats.clear()  # the first capture takes it of the pool, where activations lay until then

    def record(self, capture: Callable) -> None:
        self.replay, self.results = capture(self.forward)
        self.grads = [torch.empty_like(y) for y in self.results if y.requires_grad]
        self.replay_backward, self.flat = capture(self.backward)
        # Without the graph between them, which would keep the parameters' gradients on the stream of the capture.
        self.differentiable = [y.requires_grad for y in self.results]
        self.results = [y.detach() for y in self.results]

    def forward(self) -> list[Tensor]:
        results, self.tree = tree_flatten(self.model(self.x))
        if not all(isinstance(y, Tensor) for y in results) or not any(y.requires_grad for y in results):
            raise ValueError("model: expected tensors to come out, and one at least that requires a gradient")
        return results

    def backward(self) -> Tensor:
        """All gradients behind one another; `wanted` tells which there are and how they lie."""
        inputs = [*[self.x] * self.x.requires_grad, *self.trained]
        results = [y for y in self.results if y.requires_grad]
        with torch.autocast("cuda", enabled=False):  # backward() is called outside of it
            found = torch.autograd.grad(results, inputs, self.grads, allow_unused=True)
        there = [g for g in found if g is not None]
        of_parameters = found[len(inputs) - len(self.trained) :]
        self.used = [p for p, g in zip(self.trained, of_parameters, strict=True) if g is not None]
        self.wanted = [None if g is None else (g.dtype, g.shape, torch.empty_like(g).stride()) for g in found]
        size = sum(map(_bytes, there))
        if size not in self.flats:
            self.flats[size] = torch.empty(size, dtype=torch.uint8, device=self.x.device)
        flat = self.flats[size]
        torch._foreach_copy_([p for p in _parts(flat, self.wanted) if p is not None], there)
        return flat


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, step: CapturedTraining, graphs: _Graphs, call: int, x: Tensor, *parameters: Tensor):
        ctx.step, ctx.graphs, ctx.call = step, graphs, call
        ctx.versions = step.versions()
        graphs.x.detach().copy_(x)
        graphs.replay()
        results = tuple(y.detach().clone(memory_format=torch.preserve_format) for y in graphs.results)
        ctx.mark_non_differentiable(*(r for r, on in zip(results, graphs.differentiable, strict=True) if not on))
        return results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        step, graphs = ctx.step, ctx.graphs
        if ctx.call != step._calls:
            raise RuntimeError(
                "this result of a captured model cannot be differentiated any more: the model was called again, or its "
                "backward has run"
            )
        if ctx.versions != step.versions():
            raise RuntimeError("a parameter was modified between a captured model's call and its backward")
        step._calls += 1
        of_results = [g for g, on in zip(grads, graphs.differentiable, strict=True) if on]
        for g, given in zip(graphs.grads, of_results, strict=True):
            g.copy_(given)
        graphs.replay_backward()
        # A copy: autograd may keep what it gets as a parameter's .grad.
        found = _parts(graphs.flat.clone(), graphs.wanted)
        of_x = found.pop(0) if graphs.x.requires_grad else None
        return None, None, None, of_x, *(g for g in found if g is not None)


_ALIGNED = 16  # bytes


def _bytes(g: Tensor) -> int:
    return ceil_div(g.numel() * g.element_size(), _ALIGNED) * _ALIGNED


def _parts(flat: Tensor, wanted: list) -> list[Tensor | None]:
    """The tensors that lie behind one another in these bytes."""
    found, at = [], 0
    for what in wanted:
        if what is None:
            found.append(None)
            continue
        dtype, shape, stride = what
        piece = flat[at : at + shape.numel() * dtype.itemsize].view(dtype).as_strided(shape, stride)
        found.append(piece)
        at += _bytes(piece)
    return found


def _number(value):
    """As it can be compared: a list may be changed in place, and a tensor's values are on the GPU."""
    return id(value) if isinstance(value, Tensor) else tuple(value) if isinstance(value, list) else value


def _autocast() -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")


def _check(model: nn.Module) -> None:
    over_processes = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    for m in model.modules():
        if isinstance(m, CapturedTraining):
            raise ValueError("model: is captured, or has a captured part, already")
        if isinstance(m, over_processes) or type(m).__name__.startswith(("FSDP", "FullySharded")):
            raise ValueError(f"model: {type(m).__name__} works over several processes or GPUs: capture what it wraps")
    if other := next((type(p).__name__ for p in model.parameters() if type(p) not in (nn.Parameter, Tensor)), None):
        raise ValueError(f"model: expected parameters of torch.nn.Parameter, got {other}")
    if not any(m.training for m in model.modules()):
        raise ValueError("model: expected a model in training: call model.train() first")
    for name, m in model.named_modules():
        if isinstance(m, nn.SyncBatchNorm) and m.training:
            raise ValueError(f"model: {name} is a SyncBatchNorm, whose collectives are not captured")
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training and m.momentum is None:
            raise ValueError(f"model: {name} has momentum None: a cumulative average is not captured")
