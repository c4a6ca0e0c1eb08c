"""optimize_for_inference and the module it returns."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from . import cpu, gpu
from .captured import Captured
from .eager import EagerExecutor
from .graph import TRACED, Graph, TracedNorm, capture, propagate, words_of
from .plan import Plan, describe
from .steps import Network, match

logger = logging.getLogger("fused_resnet")

TUNE = ("full", "cached", "off")
NEW_SHAPES = ("plan", "eager")
SHAPES = 16  # plans kept; the least recently used goes
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float64: 1e-12}


def optimize_for_inference(
    model: nn.Module,
    example_input: Tensor | tuple[Tensor, ...],
    *,
    dtype: torch.dtype | None = None,
    tune: str = "full",
    new_shapes: str = "plan",
) -> OptimizedModel:
    """The whole network as one planned program for inference: `fast = optimize_for_inference(model, x); y = fast(x)`.

    The model is traced and copied; it stays what it is, and what happens to it later does not reach the result until
    `fast.refresh(model)`. In the copy, in evaluation mode, BN is folded into the convolutions (in float64 from the
    parameters as given, cast once), the ReLU, the shortcut's add and its projection join the convolution before them,
    and the stem its max-pool. What matches nothing runs as it was traced; `print(fast.plan)` lists all of it.

    model: torchvision's ResNets, swapped by `swap_blocks` or not, modules with ResNets in them (`detector.backbone`,
        segmentation models, feature extractors), any model that torch.fx can trace, all on one device. Running
        statistics are used, whatever the mode it is in.
    example_input: a tensor like those it will get, or a tuple of them: [N, C, H, W] on the model's device. Other sizes
        are welcome later, see new_shapes.
    dtype: of weights, activations and floating-point results; default the model's own. Inputs are converted.
    tune: 'full' measures how to compute each step here and now, unless that was measured before, and on a GPU races
        whole networks; 'cached' measures nothing and uses what was measured of steps, here or, by the package's tables,
        on this GPU, or what is forecast of that for other batches and other GPUs of the generation; 'off' uses the
        built-in choice, which on a GPU is PyTorch's kernels, in a graph.
    new_shapes: what a call with sizes not seen before does. 'plan' plans for them (at most 16 plans are kept, the one
        not used for longest goes); 'eager' runs the same steps by PyTorch's own operators.

    Returns an OptimizedModel. Raises TypeError or ValueError naming the argument; ValueError also for a model that
    cannot be traced. What the plan computes is compared with PyTorch's own operators on the example before it is
    trusted.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, OptimizedModel):
        raise TypeError("model: is optimized already; give the model it was made from")
    inputs = tuple(example_input) if isinstance(example_input, (tuple, list)) else (example_input,)
    for i, x in enumerate(inputs):
        if not isinstance(x, Tensor):
            raise TypeError(f"example_input: expected tensors, got {type(x).__name__} at place {i}")
    if tune not in TUNE:
        raise ValueError(f"tune: expected one of {', '.join(map(repr, TUNE))}, got {tune!r}")
    if new_shapes not in NEW_SHAPES:
        raise ValueError(f"new_shapes: expected one of {', '.join(map(repr, NEW_SHAPES))}, got {new_shapes!r}")
    tensors = [*model.parameters(), *model.buffers()]
    own = next((t for t in tensors if t.is_floating_point()), None)
    if own is None:
        raise ValueError(f"model: {type(model).__name__} has no floating-point parameters to plan for")
    dtype = own.dtype if dtype is None else dtype
    if dtype not in TOLERANCE:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, TOLERANCE))}, got {dtype}")
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if t.device != own.device:
            raise ValueError(f"model: all of it must be on one device; {name} is on {t.device}, others on {own.device}")
    with torch.inference_mode(False), torch.no_grad():
        return OptimizedModel(type(model).__name__, capture(model, inputs), inputs, dtype, own.device, tune, new_shapes)


class OptimizedModel(nn.Module):
    """What optimize_for_inference returns: called like the model, for inference alone.

    A result is a tensor of its own: no later call changes it. Calls from several threads are served one by one.
    """

    def __init__(self, name, graph: Graph, inputs, dtype, device, tune, new_shapes):
        super().__init__()
        super().train(False)
        self._name, self._graph, self._dtype, self._device = name, graph, dtype, device
        self._tune, self._new_shapes = tune, new_shapes
        self._lock = threading.RLock()
        self._names = [n.name for n in graph.nodes if n.op == "placeholder"]
        self._dims = [x.dim() for x in inputs]
        self._channels = [x.shape[1] if x.dim() == 4 else None for x in inputs]
        self._eager = EagerExecutor(graph.module, dtype)
        with _undisturbed(device):
            self._fast, why = _executor(graph, self._eager, device)
        self._notes = [why] if why else []
        self._plans: OrderedDict[tuple, tuple[Callable, Plan]] = OrderedDict()
        inputs = self._checked(inputs, "example_input")
        with _undisturbed(device):
            self._plan = self._add(self._key(inputs), inputs, argument="example_input")[1]

    @property
    def plan(self) -> Plan:
        """The plan of the example input's shape; `plans` has all."""
        return self._plan

    @property
    def plans(self) -> list[Plan]:
        """The plans there are, the one used last at the end."""
        with self._lock:
            return [plan for _, plan in self._plans.values()]

    def forward(self, *inputs: Tensor):
        """What the model returns for these inputs. Raises RuntimeError if a gradient is asked for."""
        try:
            key = self._key(inputs)
        except AttributeError:  # not all of them are tensors
            self._checked(inputs, "input")
            raise
        if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
            self._checked(inputs, "input")
            raise RuntimeError(
                "input: requires a gradient, and a network optimized for inference has none; call it under "
                "torch.no_grad(), or the original model"
            )
        with self._lock:
            found = self._plans.get(key)  # what is there was checked when it came
            if found is not None:
                self._plans.move_to_end(key)
            else:
                found = self._new(key, self._checked(inputs, "input"))
            result = found[0](inputs)
        return result if self._graph.dress is None else self._graph.dress(result)

    def refresh(self, model: nn.Module) -> OptimizedModel:
        """Take the weights and statistics of `model`, which must be built like the original, without tuning again.

        Calls wait for it, and it for them. Replays of a CUDA graph of your own, in which you captured a call, are not
        calls: finish them before.

        Returns self. Raises TypeError or ValueError (then nothing has changed) if model does not fit.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        module = self._graph.module
        pairs = []
        for name, mine in (
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        ):
            new = _tensor_at(model, name)
            if new is None and name.startswith("_tensor_constant"):
                continue  # written in the model's forward
            if isinstance(_at(module, name.rpartition(".")[0]), TRACED):
                continue  # the same tensors have their names in the model as well
            if new is None or new.shape != mine.shape:
                what = "is missing" if new is None else f"has shape {list(new.shape)}, expected {list(mine.shape)}"
                raise ValueError(f"model: does not fit the plan: {name} {what}")
            pairs.append((mine, new))
        for name, mine in module.named_modules():
            eps = getattr(mine, "eps", None)
            if isinstance(mine, TracedNorm):
                name, eps = name.rpartition(".")[0], mine.said
            new = getattr(_at(model, name), "eps", eps)
            if eps is not None and new != eps:
                raise ValueError(f"model: does not fit the plan: {name}.eps is {new}, expected {eps}")
        with self._lock, torch.inference_mode(False), torch.no_grad(), _undisturbed(self._device):
            if self._device.type == "cuda":
                self._fast.wait()
            for mine, new in pairs:
                mine.copy_(new)
            self._eager.refresh()
            if self._fast is not None:
                self._fast.refresh()
        return self

    def train(self, mode: bool = True) -> OptimizedModel:
        """Refuses training mode."""
        if mode:
            raise RuntimeError("a network optimized for inference cannot be trained; train the original, then refresh")
        return self

    def _apply(self, fn, recurse=True):
        raise RuntimeError(
            "a network optimized for inference stays on its device and in its dtype; move the original model and call "
            "optimize_for_inference again"
        )

    def __reduce_ex__(self, protocol):
        raise TypeError("a network optimized for inference is not copied or saved; save the original model")

    def extra_repr(self) -> str:
        return f"{self._name}, {str(self._dtype).removeprefix('torch.')}, {self._device}"

    # One input after the other.

    def _checked(self, inputs: tuple, argument: str) -> tuple[Tensor, ...]:
        if len(inputs) != len(self._names):
            raise TypeError(f"{argument}: {self._name} takes {len(self._names)} tensors, got {len(inputs)}")
        for i, x in enumerate(inputs):
            name = argument if len(inputs) == 1 else f"{argument} {i}"
            if not isinstance(x, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
            if x.device != self._device:
                raise ValueError(f"{name}: expected a tensor on {self._device}, got {x.device}")
            if not x.is_floating_point():
                raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype}")
            if x.layout is not torch.strided:
                raise TypeError(f"{name}: expected a dense tensor, got {x.layout}")
            if x.dim() != self._dims[i]:
                raise ValueError(f"{name}: expected {self._dims[i]} dimensions, got shape {list(x.shape)}")
            if self._channels[i] is not None and x.shape[1] != self._channels[i]:
                raise ValueError(f"{name}: expected {self._channels[i]} channels, got shape {list(x.shape)}")
            if 0 in x.shape:
                raise ValueError(f"{name}: is empty, shape {list(x.shape)}")
        return inputs

    def _key(self, inputs: tuple[Tensor, ...]) -> tuple:
        return tuple([(x.shape, x.dtype, x.device, x.is_contiguous(), _is_nhwc(x)) for x in inputs])

    def _new(self, key: tuple, inputs: tuple[Tensor, ...]) -> tuple[Callable, Plan]:
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            shapes = ", ".join(str(list(x.shape)) for x in inputs)
            raise RuntimeError(f"input: {shapes} is new; call it once before you capture a graph with it")
        with torch.inference_mode(False), torch.no_grad(), _undisturbed(self._device):
            return self._add(key, inputs, planned=self._new_shapes == "plan")

    def _matched(self, inputs: tuple[Tensor, ...], argument: str) -> Network:
        converted = tuple(x.to(self._graph.dtype) for x in inputs)
        try:
            propagate(self._graph, converted)
        except Exception as error:  # a model may assert what it likes about its input
            shapes = ", ".join(str(list(x.shape)) for x in inputs)
            raise ValueError(f"{argument}: {self._name} cannot take {shapes}: {words_of(error)}") from error
        return match(self._graph)

    def _add(self, key: tuple, inputs: tuple[Tensor, ...], planned=True, argument="input") -> tuple[Callable, Plan]:
        """Plan for inputs like these, compare with PyTorch's operators, and keep it."""
        network = self._matched(inputs, argument)
        notes = list(self._notes)
        run, groups, given = None, [], self._converted
        if self._fast is not None and planned:
            if self._fast.converts_inputs:
                given = lambda inputs: inputs  # noqa: E731
            judge = self._judge(network, inputs)
            if not self._fast.shares_weights:
                self._eager.forget()
            run, groups, note = self._fast.plan(network, given(inputs), self._tune, judge)
            if note:
                notes.append(note)
                # On a CPU a note tells of something dropped as wrong; on a GPU also of what was measured.
                level = logging.WARNING if run is None or self._device.type == "cpu" else logging.INFO
                logger.log(level, "optimize_for_inference: %s", note)
        if run is not None:
            if not self._fast.shares_weights:
                self._eager.forget()  # it was asked for the comparison
        else:
            run, groups, given = (lambda x: self._eager.run(network, x)), self._eager.groups(network), self._converted
            if self._device.type == "cuda":
                run = self._fast.ordered(run)
        shapes = tuple(tuple(x.shape) for x in inputs)
        plan = Plan(self._name, str(self._device), self._dtype, shapes, describe(network, self._dtype, groups), notes)
        self._plans[key] = _served(run, given, self._device), plan
        while len(self._plans) > SHAPES:
            self._plans.popitem(last=False)
        return self._plans[key]

    def _converted(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # A graph that runs as it was traced may change its input in place: then it gets its own.
        copy = bool(self._graph.opaque)
        return tuple(x.to(self._dtype, copy=copy) for x in inputs)

    def _judge(self, network: Network, inputs: tuple[Tensor, ...]) -> Callable[[object], str | None]:
        """A function that says what is wrong with a result for these inputs; None if nothing is.

        Of large batches it looks at the first and the last image, whichever lie between. Where a network magnifies
        rounding errors beyond the limit, PyTorch's own among them, float64 decides: a result may be four times as far
        off as PyTorch's, whose own ways lie apart by more than twice.
        """
        # What is traced may mind how many images there are.
        rows = None if any(s.op == "traced" for s in network.steps) else _sample(inputs)
        sample = inputs if rows is None else tuple(x[rows] for x in inputs)
        expected, _ = tree_flatten(self._eager.run(network, self._converted(sample)))
        limit = TOLERANCE[self._dtype]

        @functools.cache
        def exact() -> list | None:
            doubled = tuple(x.to(torch.float64, copy=True) for x in sample)
            try:
                return tree_flatten(EagerExecutor(self._graph.module, torch.float64).run(network, doubled))[0]
            except RuntimeError:  # too little memory, or an operator that knows no float64
                return None

        def excused(i: int, a: Tensor, b: Tensor, finite: Tensor) -> bool:
            judge = exact()
            return judge is not None and bool((judge[i][finite] - a).norm() <= 4 * (judge[i][finite] - b).norm())

        def objection(result) -> str | None:
            got, _ = tree_flatten(result)
            for i, (a, b) in enumerate(zip(got, expected, strict=True)):
                if not isinstance(b, Tensor):
                    continue
                if rows is not None and b.shape[0] == 2 < a.shape[0]:
                    a = a[[0, -1]]
                if a.shape != b.shape or a.dtype != b.dtype:
                    return f"result {i} is {a.dtype} {list(a.shape)}, expected {b.dtype} {list(b.shape)}"
                finite = b.isfinite()
                if not torch.equal(a.isfinite(), finite):
                    return f"result {i} is finite in other places than PyTorch's"
                a, b = a[finite].double(), b[finite].double()
                error = ((a - b).norm() / b.norm().clamp(min=1e-30)).item()
                if error > limit and not excused(i, a, b, finite):
                    return f"result {i} differs from PyTorch's by {error:.1e} of its norm, more than {limit:.0e}"
            return None

        return objection


def _executor(graph: Graph, eager: EagerExecutor, device: torch.device):
    """(what runs plans on this device, None), or (None, why PyTorch's operators do)."""
    if device.type == "cpu":
        why = cpu.supported(eager.dtype)
        return (None, why) if why else (cpu.Cpu(graph.module), None)
    if device.type == "cuda":
        return gpu.Gpu(eager, device), None
    return None, f"no kernels of ours for {device.type}"


def _served(run: Callable, given: Callable, device: torch.device) -> Callable:
    """run(given(inputs)), whatever contexts it is called in."""
    if isinstance(run, Captured):  # copies, a replay and a kernel of ours, which no context changes
        return run

    def serve(inputs: tuple[Tensor, ...]):
        with torch.no_grad(), _undisturbed(device):
            return run(given(inputs))

    return serve


def _sample(inputs: tuple[Tensor, ...]) -> list[int] | None:
    """First and last image, where all inputs are batches of more than two."""
    sizes = {x.shape[0] if x.dim() else 0 for x in inputs}
    return [0, next(iter(sizes)) - 1] if len(sizes) == 1 and max(sizes) > 2 else None


def _tensor_at(model: nn.Module, path: str) -> Tensor | None:
    """A parameter, buffer or other tensor of a model by its path."""
    found = _at(model, path)
    return found if isinstance(found, Tensor) else None


def _at(model: nn.Module, path: str):
    found = model
    for part in path.split(".") if path else ():
        found = getattr(found, part, None)
    return found


def _is_nhwc(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


@contextlib.contextmanager
def _undisturbed(device: torch.device):
    """Neither autocast nor another current device changes what runs."""
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with torch.autocast(device.type, enabled=False), guard:
        yield
