"""capture_training: a model's forward and backward as two CUDA graphs, for steps that launch faster than a host can.

A training step of ResNet-50 launches more than a thousand kernels; at small batches, or on a slow host, the GPU waits
for them. A graph launches them at once. Graphs work at fixed places in memory: what a call gets is copied there, what
it returns is copied from there, so that nothing a caller holds is written to by a later call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .kernels.tiles import ceil_div

WARM_UP = 3  # steps before the capture: kernels are verified, timed and compiled in the first


def capture_training(model: nn.Module, x: Tensor) -> CapturedTraining:
    """A function that computes what `model` computes in training, by CUDA graphs, for inputs like x.

        step = fused_resnet.capture_training(model.train(), x)
        loss = criterion(step(x), target)
        loss.backward()
        optimizer.step()

    model: a module on one GPU, in the modes that it will train in; it stays as it is, and running statistics are not
    changed here. x: [N, C, H, W] on that GPU, of the shape, dtype and layout of a batch; its values do not matter.
    Capture under the autocast under which you train, and before a DataLoader with pin_memory is under way, whose calls
    of CUDA would end the capture.

    The function takes one tensor and returns what model(tensor) returns; gradients reach the parameters (and the input,
    if x requires one) as usual, and accumulate as usual. Any other call goes to the model itself: another shape, dtype
    or layout, other modes, requires_grad or numbers (momentum and eps of a norm, p of a dropout), another autocast, no
    gradients wanted, torch.compile. Hooks on modules inside are not called by a graph, and each result can be
    differentiated once, before the next call and before parameters change.

    It is a module around the model, so that a process of several wraps it as it would the model:

        step = fused_resnet.capture_training(model.train(), x)
        step = nn.parallel.DistributedDataParallel(step, device_ids=[x.device.index])

    All gradients are there at once, at the end of the graph: they are exchanged after the backward, not beside it.

    Raises TypeError if model is no module; ValueError if x is not a plain CUDA tensor, nothing in the model is in
    training or a part cannot be captured (SyncBatchNorm, cumulative running statistics, modules of several processes:
    those come around a captured model, not into one); RuntimeError later on, if a parameter or buffer is another or no
    longer lies where it was (FSDP puts others in their place), or a result is differentiated after another call or
    after parameters have changed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(x, Tensor) or not x.is_cuda:
        what = str(x.device) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x: expected a CUDA tensor, got {what}: graphs are captured on a GPU")
    if type(x) is not Tensor:
        raise ValueError(f"x: expected a torch.Tensor itself, got {type(x).__name__}")
    if elsewhere := {str(t.device) for t in (*model.parameters(), *model.buffers()) if t.device != x.device}:
        raise ValueError(f"model: expected all of it on {x.device}, as x is, got {', '.join(sorted(elsewhere))}")
    return CapturedTraining(model, x)


class CapturedTraining(nn.Module):
    """What `capture_training` returns. model: the module whose steps it runs, whose state_dict is to be saved."""

    def __init__(self, model: nn.Module, x: Tensor):
        _check(model)
        super().__init__()
        self.model = model
        names = ("momentum", "eps", "p", "memory")
        self._numbers = [(m, name) for m in model.modules() for name in names if hasattr(m, name)]
        self._like = self._signature(x)
        self._tensors = [*model.parameters(), *model.buffers()]
        self._places = [t.data_ptr() for t in self._tensors]
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(x.requires_grad)
        self._calls = 0
        buffers = [(b, b.clone()) for b in model.buffers()]
        try:
            with torch.enable_grad():
                self._record()
        finally:
            with torch.no_grad():
                for b, before in buffers:
                    b.copy_(before)

    def forward(self, x: Tensor):
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or self._signature(x) != self._like:
            return self.model(x)
        tensors = [*self.model.parameters(), *self.model.buffers()]
        same = len(tensors) == len(self._tensors) and all(t is u for t, u in zip(tensors, self._tensors, strict=True))
        if not same or [t.data_ptr() for t in tensors] != self._places:
            raise RuntimeError("model: a parameter or buffer is not where it was: capture the model again")
        self._calls += 1
        return tree_unflatten(_Step.apply(self, self._calls, x, *self._used), self._tree)

    def __repr__(self) -> str:
        shape, _, dtype = self._like[:3]
        return f"CapturedTraining({type(self.model).__name__}, {list(shape)} {dtype})"

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
        numbers = tuple(getattr(m, name, None) for m, name in self._numbers)
        return x.shape, x.stride(), x.dtype, x.device, x.requires_grad, *_autocast(), modes, wanted, numbers

    def _record(self) -> None:
        enabled, dtype = _autocast()
        # Its cache would hold casts of the weights, from another time than the graph's.
        with torch.autocast("cuda", dtype, enabled=enabled, cache_enabled=False):
            capture = self._recorder()
            self._replay, self._results = capture(self._forward)
            self._grads = [torch.empty_like(y) for y in self._results if y.requires_grad]
            self._replay_backward, self._flat = capture(self._backward)
        # Without the graph between them, which would keep the parameters' gradients on the stream of the capture.
        self._differentiable = [y.requires_grad for y in self._results]
        self._results = [y.detach() for y in self._results]

    def _recorder(self) -> Callable:
        """A function that captures a function of nothing: (replay, what the function returned)."""
        stream, pool = torch.cuda.Stream(self._x.device), torch.cuda.graph_pool_handle()
        stream.wait_stream(torch.cuda.current_stream(self._x.device))
        try:
            with torch.cuda.device(self._x.device), torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self._results = self._forward()
                    self._grads = [torch.zeros_like(y) for y in self._results if y.requires_grad]
                    self._backward()
                self._results = self._grads = None
        finally:  # whatever happened: buffers are put back as they were
            torch.cuda.current_stream(self._x.device).wait_stream(stream)

        def capture(function):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(self._x.device), torch.cuda.graph(graph, pool=pool, stream=stream):
                returned = function()
            return graph.replay, returned

        return capture

    def _forward(self) -> list[Tensor]:
        results, self._tree = tree_flatten(self.model(self._x))
        if not all(isinstance(y, Tensor) for y in results) or not any(y.requires_grad for y in results):
            raise ValueError("model: expected tensors to come out, and one at least that requires a gradient")
        return results

    def _backward(self) -> Tensor:
        """All gradients behind one another; `_wanted` tells which there are and how they lie."""
        inputs = [*[self._x] * self._x.requires_grad, *self._trained]
        results = [y for y in self._results if y.requires_grad]
        with torch.autocast("cuda", enabled=False):  # backward() is called outside of it
            found = torch.autograd.grad(results, inputs, self._grads, allow_unused=True)
        there = [g for g in found if g is not None]
        of_parameters = found[len(inputs) - len(self._trained) :]
        self._used = [p for p, g in zip(self._trained, of_parameters, strict=True) if g is not None]
        flat = torch.empty(sum(map(_bytes, there)), dtype=torch.uint8, device=self._x.device)
        self._wanted = [None if g is None else (g.dtype, g.shape, torch.empty_like(g).stride()) for g in found]
        torch._foreach_copy_([p for p in _parts(flat, self._wanted) if p is not None], there)
        return flat


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, captured: CapturedTraining, call: int, x: Tensor, *parameters: Tensor):
        ctx.captured, ctx.call = captured, call
        ctx.versions = captured.versions()
        captured._x.detach().copy_(x)
        captured._replay()
        kept = captured._results
        results = tuple(y.detach().clone(memory_format=torch.preserve_format) for y in kept)
        ctx.mark_non_differentiable(*(r for r, on in zip(results, captured._differentiable, strict=True) if not on))
        return results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        captured = ctx.captured
        if ctx.call != captured._calls:
            raise RuntimeError(
                "this result of a captured model cannot be differentiated any more: the model was called again, or its "
                "backward has run"
            )
        if ctx.versions != captured.versions():
            raise RuntimeError("a parameter was modified between a captured model's call and its backward")
        captured._calls += 1
        of_results = [g for g, on in zip(grads, captured._differentiable, strict=True) if on]
        for g, given in zip(captured._grads, of_results, strict=True):
            g.copy_(given)
        captured._replay_backward()
        # A copy: autograd may keep what it gets as a parameter's .grad.
        found = _parts(captured._flat.clone(), captured._wanted)
        of_x = found.pop(0) if captured._x.requires_grad else None
        return None, None, of_x, *(g for g in found if g is not None)


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
