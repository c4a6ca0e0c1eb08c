"""nn.SyncBatchNorm over several processes: as one process' BatchNorm2d over their batches together.

The processes use gloo, on a CPU; dbn_weight and dbn_bias are sums over a process' own batch, so theirs add up to the
oracle's.
"""

from __future__ import annotations

import copy

import parity
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import LAYOUTS
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from fused_resnet import stem, swap_blocks
from fused_resnet.functional import batch_norm_act

C, MAP = 3, (7, 9)
Sync = nn.SyncBatchNorm


@pytest.fixture(scope="module")
def groups():
    with Ranks(2) as two, Ranks(4) as four:
        yield {2: two, 4: four}


@pytest.fixture
def two(groups):
    return groups[2]


def normal(*shape: int, seed: int, dtype=torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parts(t: Tensor, sizes) -> tuple[Tensor, ...]:
    return t.split(list(sizes))


class Steps:
    """Two training steps of one BN over batches that lie in several processes, and of the oracle over them whole."""

    def __init__(self, sizes, maps=MAP, dtype=torch.float64, layout="contiguous", relu=True, residual=True, **bn):
        self.sizes, self.layout, self.relu, self.dtype = sizes, layout, relu, dtype
        self.offset = bn.pop("offset", 0.0)
        torch.manual_seed(0)
        self.bn = nn.BatchNorm2d(C, **bn)
        if self.bn.affine:
            self.bn.weight.data.copy_(torch.tensor([0.5, -1.25, 2.0]))
            self.bn.bias.data.copy_(torch.tensor([0.5, 0.25, -0.5]))
        self.bn.to(dtype)
        # Batches that differ in mean and deviation from process to process: the merge has something to merge.
        n = torch.arange(sum(sizes)).view(-1, 1, 1, 1)
        shape = sum(sizes), C, *maps
        self.x = [((normal(*shape, seed=s) * (1 + n % 3) + n + self.offset).to(dtype)) for s in (1, 2)]
        self.residual = [normal(*shape, seed=s, dtype=dtype) if residual else None for s in (3, 4)]
        # Nothing comes in where a rounding error would decide the ReLU.
        self.grad = [normal(*shape, seed=s, dtype=dtype) for s in (5, 6)]
        exact = copy.deepcopy(self.bn).double()
        for x, residual, grad in zip(self.x, self.residual, self.grad, strict=True):
            pre = exact(x.double()) + (0 if residual is None else residual.double())
            grad.mul_(pre.detach().abs() > 0.1)

    def run(self, bn: nn.Module, rank: int | None) -> dict[str, Tensor]:
        """What a step gives, whole (rank None) or in one process: outputs, gradients, and the buffers in the end."""
        seen: dict[str, Tensor] = {}
        for step, tensors in enumerate(zip(self.x, self.residual, self.grad, strict=True)):
            mine = [t if t is None or rank is None else parts(t, self.sizes)[rank] for t in tensors]
            x, residual, grad = (
                t if t is None else t.to(bn_dtype(bn, t)).contiguous(memory_format=LAYOUTS[self.layout]) for t in mine
            )
            leaves = {"x": x.requires_grad_(), **({} if residual is None else {"residual": residual.requires_grad_()})}
            bn.zero_grad()
            if rank is None:
                y = bn(x) if residual is None else bn(x) + residual
                y = F.relu(y) if self.relu else y
            else:
                y = batch_norm_act(x, bn, residual, relu=self.relu)
            y.backward(grad)
            seen[f"output {step}"] = y.detach()
            seen |= {f"grad {step} {name}": t.grad for name, t in leaves.items()}
            seen |= {f"grad {step} bn.{name}": p.grad.clone() for name, p in bn.named_parameters()}
        return seen | {f"buffer {name}": b.clone() for name, b in bn.named_buffers()}

    def oracle(self, dtype=None) -> dict[str, Tensor]:
        return self.run(copy.deepcopy(self.bn).to(dtype or self.dtype), None)

    def over(self, ranks: Ranks) -> dict[str, Tensor]:
        """What the processes have, put together: batches in their order, BN's gradients added, buffers all equal."""
        found = ranks.run(one_process, self)
        seen = {}
        for name in found[0]:
            each = [f[name] for f in found]
            if name.startswith("buffer"):
                assert all(torch.equal(e, each[0]) for e in each), name
                seen[name] = each[0]
            else:
                seen[name] = sum(each) if ".weight" in name or ".bias" in name else torch.cat(each)
        return seen


def bn_dtype(bn: nn.Module, t: Tensor) -> torch.dtype:
    """The dtype of the oracle's run: that of its buffers or parameters, where it has some."""
    return next((v.dtype for v in (*bn.parameters(), *bn.buffers()) if v.is_floating_point()), t.dtype)


def one_process(rank: int, steps: Steps) -> dict[str, Tensor]:
    return steps.run(Sync.convert_sync_batchnorm(copy.deepcopy(steps.bn)), rank)


def same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name, e in expected.items():
        scale = max(1.0, e.abs().max().item()) if e.numel() else 1.0
        close = dict(rtol=0, atol=tolerance, check_dtype=False, msg=lambda m, name=name: f"{name}: {m}")
        torch.testing.assert_close(found[name] / scale, e / scale, **close)


# --- against one process ----------------------------------------------------------------------------------------------

KINDS = {
    "relu-residual": dict(),
    "relu": dict(residual=False),
    "residual": dict(relu=False),
    "alone": dict(relu=False, residual=False),
    "cumulative": dict(momentum=None),
    "not-affine": dict(affine=False),
    "untracked": dict(track_running_stats=False, affine=False),
    "eps": dict(eps=0.5, momentum=0.7),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_float64(kind, layout, two):
    steps = Steps((4, 1), layout=layout, **KINDS[kind])
    same(steps.over(two), steps.oracle())


SIZES = {
    "equal": (2, 2),
    "one-empty": (0, 3),
    "other-empty": (3, 0),
    "four": (2, 0, 5, 1),
    "four-one-full": (0, 0, 0, 2),
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_uneven_and_empty_batches(sizes, groups):
    steps = Steps(sizes)
    found = steps.over(groups[len(sizes)])
    same(found, steps.oracle())


def test_one_value_a_channel_in_a_process(groups):
    """What a single process may not have, a group of them may."""
    for sizes in ((1, 2), (1, 1, 0, 1)):
        steps = Steps(sizes, maps=(1, 1))
        same(steps.over(groups[len(sizes)]), steps.oracle())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32(layout, two):
    """By the rule of parity.py, BatchNorm2d in one process being the yardstick."""
    steps = Steps((4, 3), dtype=torch.float32, layout=layout)
    judge = steps.oracle(torch.float64)
    parity.check(parity.errors(steps.over(two), judge), parity.errors(steps.oracle(), judge))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32_where_the_mean_is_far_above_the_deviation(layout, two):
    """The processes exchange their means as float32 holds them, to a few eps of the mean: that bounds the rest. The
    mean of squares minus the square of the mean would leave the variance off by several per cent."""
    steps = Steps((4, 3), dtype=torch.float32, layout=layout, offset=1000.0)
    same(steps.over(two), steps.oracle(torch.float64), tolerance=8 * 1000 * torch.finfo(torch.float32).eps)


def test_a_mean_far_above_the_deviation(two):
    """1e6 and 1: the mean of squares minus the square of the mean would leave four digits of the variance."""
    steps = Steps((3, 2), offset=1e6)
    same(steps.over(two), steps.oracle(), tolerance=1e-8)


def test_bfloat16_maps_have_float32_statistics(two):
    steps = Steps((4, 3), dtype=torch.float32)
    steps.x = [x.bfloat16() for x in steps.x]
    found = two.run(autocast_step, steps)
    y, running_var = torch.cat([f[0] for f in found]), found[0][1]
    bn = copy.deepcopy(steps.bn)
    expected = F.relu(bn(steps.x[0].float()) + steps.residual[0].bfloat16())
    assert y.dtype is torch.bfloat16 and running_var.dtype is torch.float32
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=2**-7 * expected.abs().max().item())
    torch.testing.assert_close(running_var, bn.running_var, rtol=1e-5, atol=0)


def autocast_step(rank: int, steps: Steps) -> tuple[Tensor, Tensor, Tensor]:
    bn = Sync.convert_sync_batchnorm(copy.deepcopy(steps.bn))
    x = parts(steps.x[0], steps.sizes)[rank]
    residual = parts(steps.residual[0], steps.sizes)[rank].clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = batch_norm_act(x, bn, residual)
    y.sum().backward()
    assert residual.grad.dtype is torch.float32
    return y.detach(), bn.running_var


def test_nan_in_one_process_reaches_all(two):
    steps = Steps((2, 2), relu=False)
    steps.x[0][3, 1, 2, 2] = float("nan")
    steps.x[1][0, 2, 0, 0] = float("inf")
    for y, statistics in two.run(not_finite, steps):
        assert [y[:, c].isnan().all().item() for c in range(C)] == [False, True, False]
        assert y[:, (0, 2)].isfinite().all()
        assert [v.isfinite().item() for v in statistics] == [True, False, False]


def not_finite(rank: int, steps: Steps) -> tuple[Tensor, Tensor]:
    bn = Sync.convert_sync_batchnorm(copy.deepcopy(steps.bn))
    x = [parts(x, steps.sizes)[rank] for x in steps.x]
    y = batch_norm_act(x[0], bn, relu=False)
    batch_norm_act(x[1], bn, relu=False)
    return y.detach(), bn.running_var


def test_finite_differences_across_processes(two):
    """d(loss of all processes) / d(one element in one of them), by moving it: no autograd in the oracle."""
    steps = Steps((2, 1), maps=(2, 3))
    found = two.run(losses_around, steps)
    for grad, loss, (rank, at) in found[0]:
        below, above = loss
        torch.testing.assert_close(grad[rank].flatten()[at].item(), (above - below) / 2e-6, rtol=1e-6, atol=1e-7)


def losses_around(rank: int, steps: Steps) -> list:
    def loss(x):
        bn = Sync.convert_sync_batchnorm(copy.deepcopy(steps.bn))
        y = batch_norm_act(x, bn, parts(steps.residual[0], steps.sizes)[rank])
        return (y * parts(steps.grad[0], steps.sizes)[rank]).sum()

    def of_all(value) -> list:
        gathered = [None, None]
        dist.all_gather_object(gathered, value)
        return gathered

    x = parts(steps.x[0], steps.sizes)[rank].clone().requires_grad_()
    loss(x).backward()
    found = []
    for moved, at in ((0, 0), (0, 17), (1, 5)):
        around = []
        for step in (-1e-6, 1e-6):
            other = x.detach().clone()
            if rank == moved:
                other.view(-1)[at] += step
            around.append(sum(of_all(loss(other).item())))
        found.append((of_all(x.grad), around, (moved, at)))
    return found


# --- who takes part, and in what --------------------------------------------------------------------------------------


def test_two_collectives_a_step_and_none_too_many(two):
    for counts in two.run(collectives):
        assert counts == {
            "training": [1, 1],
            "frozen input": [1, 0],
            "no gradient": [1, 0],
            "empty here": [1, 1],
            "eval": [0, 0],
            "BatchNorm2d": [0, 0],
        }


def collectives(rank: int) -> dict[str, list[int]]:
    counts, found = [0, 0], {}
    gather, reduce = dist.all_gather, dist.all_reduce

    def counted(i, collective):
        def call(*args, **kwargs):
            counts[i] += 1
            return collective(*args, **kwargs)

        return call

    def step(name, bn, x, needs=True, grad=True):
        counts[:] = 0, 0
        with torch.set_grad_enabled(grad):
            y = batch_norm_act(x.requires_grad_(needs), bn)
        if grad:
            y.sum().backward()
        found[name] = list(counts)

    dist.all_gather, dist.all_reduce = counted(0, gather), counted(1, reduce)
    try:
        x = torch.randn(2, C, *MAP)
        step("training", Sync(C), x.clone())
        step("frozen input", Sync(C), x.clone(), needs=False)
        step("no gradient", Sync(C), x.clone(), grad=False)
        step("empty here", Sync(C), x[: 2 * rank].clone())
        step("eval", Sync(C).eval(), x.clone())
        step("BatchNorm2d", nn.BatchNorm2d(C), x.clone())
    finally:
        dist.all_gather, dist.all_reduce = gather, reduce
    return found


def test_one_value_in_the_whole_group_is_refused_everywhere(two):
    for error, mean, sound in two.run(too_few):
        assert error.startswith("ValueError: x: expected more than 1 value per channel when training")
        assert torch.equal(mean, torch.zeros(C)) and sound


def too_few(rank: int) -> tuple[str, Tensor, bool]:
    bn, error = Sync(C), "nothing"
    try:
        batch_norm_act(torch.ones(1 - rank, C, 1, 1), bn)
    except ValueError as e:
        error = f"{type(e).__name__}: {e}"
    mean = bn.running_mean.clone()
    return error, mean, batch_norm_act(torch.ones(1, C, 1, 1), bn).isfinite().all().item()  # the group still works


def test_nothing_in_the_whole_group(two):
    """As BatchNorm2d: counted, and no statistics."""
    for gradients, buffers in two.run(nothing):
        assert [g.shape[0] for g in gradients] == [0, C, C]
        assert not any(g.count_nonzero() for g in gradients)
        assert torch.equal(buffers["running_mean"], torch.zeros(C)) and torch.equal(
            buffers["running_var"], torch.ones(C)
        )
        assert buffers["num_batches_tracked"] == 1


def nothing(rank: int) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    bn, x = Sync(C), torch.empty(0, C, *MAP, requires_grad=True)
    y = batch_norm_act(x, bn)
    return torch.autograd.grad(y.sum(), [x, *bn.parameters()]), dict(bn.named_buffers())


def test_second_derivatives_are_refused_with_a_sentence(two):
    for first, error in two.run(twice):
        assert first and "SyncBatchNorm over several processes can be differentiated once" in error


def twice(rank: int) -> tuple[bool, str]:
    bn, x = Sync(C), torch.randn(2, C, *MAP, requires_grad=True)
    (grad,) = torch.autograd.grad(batch_norm_act(x, bn).square().sum(), x, create_graph=True)
    try:
        grad.square().sum().backward()
    except NotImplementedError as e:
        return grad.isfinite().all().item(), str(e)
    return True, "nothing"


def test_process_group_of_the_module(groups):
    """Pairs of four: each has statistics of its own. A process outside a module's group normalises by itself."""
    pairs = [Steps((2, 1)), Steps((1, 3), offset=5.0)]
    found = groups[4].run(in_pairs, pairs)
    for pair, steps in enumerate(pairs):
        expected = steps.oracle()
        mine = [f[0] for f in found[2 * pair : 2 * pair + 2]]
        for name in ("output 1", "grad 1 x"):
            torch.testing.assert_close(torch.cat([m[name] for m in mine]), expected[name], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(mine[0]["buffer running_var"], expected["buffer running_var"])
    assert [f[1] for f in found] == [False, False, True, True]


def in_pairs(rank: int, pairs: list[Steps]) -> tuple[dict[str, Tensor], bool]:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    steps = pairs[rank // 2]
    seen = steps.run(Sync.convert_sync_batchnorm(copy.deepcopy(steps.bn), groups[rank // 2]), rank % 2)
    x = torch.randn(2, C, *MAP) + rank
    alone = batch_norm_act(x, Sync.convert_sync_batchnorm(nn.BatchNorm2d(C), groups[0]), relu=False)
    dist.barrier()
    return seen, torch.allclose(alone, nn.BatchNorm2d(C)(x), atol=1e-5)


# --- whole models -----------------------------------------------------------------------------------------------------


def network(block) -> nn.Module:
    torch.manual_seed(0)
    model = parity.randomize_norms(ResNet(block, [2, 1, 1, 1], num_classes=10), 0, branch=0.3)
    return model.double().train()


def train(model: nn.Module, rank: int | None, sizes, steps: int = 3) -> dict[str, Tensor]:
    """SGD on the mean over all samples: whole (rank None) or of one process, whose gradients will be averaged."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    for step in range(steps):
        x, target = normal(sum(sizes), 3, 33, 33, seed=step), torch.arange(sum(sizes)) % 10
        if rank is not None:
            x, target = parts(x, sizes)[rank], parts(target, sizes)[rank]
        optimizer.zero_grad()
        share = 1 if rank is None else len(sizes)
        (F.cross_entropy(model(x), target, reduction="sum") * (share / sum(sizes))).backward()
        optimizer.step()
    state = model.state_dict()
    return {k.removeprefix("module."): v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state.items()}


BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}


@pytest.mark.parametrize(
    "block, sizes",
    [(BasicBlock, (3, 1)), pytest.param(Bottleneck, (2, 3, 1, 2), marks=pytest.mark.slow)],
    ids=["basic-2", "bottleneck-4"],
)
def test_distributed_data_parallel(block, sizes, groups):
    expected = train(network(block), None, sizes)
    for found in groups[len(sizes)].run(in_data_parallel, block, sizes):
        same(found, expected, 1e-8)


class Stem(nn.SyncBatchNorm):
    """The stem's, which is PyTorch's own in float64, and that refuses a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return batch_norm_act(x, self, relu=False)


def synchronised(model: nn.Module) -> nn.Module:
    model = Sync.convert_sync_batchnorm(model)
    model.bn1.__class__ = Stem
    return model


def in_data_parallel(rank: int, block, sizes) -> dict[str, Tensor]:
    model = nn.parallel.DistributedDataParallel(swap_blocks(network(block)))
    synchronised(model.module)  # DDP refuses to wrap SyncBatchNorm on a CPU, and this keeps its parameters
    return train(model, rank, sizes)


def through_the_stem(rank: int | None, sizes) -> dict[str, Tensor]:
    model = network(BasicBlock).float()
    x, cotangent = normal(sum(sizes), 3, 33, 34, seed=0), normal(sum(sizes), 64, 9, 9, seed=1)
    if rank is None:
        y = model.maxpool(model.relu(model.bn1(model.conv1(x.float()))))
    else:
        stem._PIXELS = 0  # in a process of its own
        model = Sync.convert_sync_batchnorm(swap_blocks(model))
        x, cotangent = parts(x, sizes)[rank], parts(cotangent, sizes)[rank]
        y = stem.pooled_stem(model, x.float())
    (y * cotangent.float()).sum().backward()
    return {"output": y.detach(), "grad": model.conv1.weight.grad, "running_var": model.bn1.running_var}


def test_a_fused_stem(two):
    expected = through_the_stem(None, (2, 3))
    found = two.run(through_the_stem, (2, 3))
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(torch.cat([f["output"] for f in found]), expected["output"], **close)
    torch.testing.assert_close(sum(f["grad"] for f in found), expected["grad"], rtol=1e-3, atol=1e-3)
    for f in found:
        torch.testing.assert_close(f["running_var"], expected["running_var"], **close)


@pytest.mark.parametrize("sync", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["sync", "plain"])
@pytest.mark.parametrize(
    "block", [Bottleneck, pytest.param(BasicBlock, marks=pytest.mark.slow)], ids=lambda b: b.__name__
)
def test_fully_sharded(block, sync, two):
    """FSDP2 over two processes: as one, with SyncBatchNorm; as DDP of the untouched model, with plain BatchNorm."""
    sizes = (2, 2)
    found = two.run(in_shards, block, sizes, sync)
    expected = [train(network(block), None, sizes, 2)] * 2 if sync else two.run(untouched, block, sizes)
    for f, e in zip(found, expected, strict=True):
        same(f, e, 1e-8)


def in_shards(rank: int, block, sizes, sync: bool) -> dict[str, Tensor]:
    model = swap_blocks(network(block), memory_format=torch.preserve_format)
    if sync:
        model = synchronised(model)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for m in [m for m in model.modules() if isinstance(m, block)]:
        fully_shard(m, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return train(model, rank, sizes, 2)


def untouched(rank: int, block, sizes) -> dict[str, Tensor]:
    return train(nn.parallel.DistributedDataParallel(network(block), broadcast_buffers=False), rank, sizes, 2)


# --- against PyTorch's own, which needs a GPU -------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_as_pytorchs_own(dtype, two):
    """Both processes on one GPU, with gloo, which NCCL would refuse."""
    if not torch.cuda.is_available():
        pytest.skip("PyTorch's SyncBatchNorm needs a CUDA device")
    steps = Steps((4, 3), dtype=torch.float32, relu=False)
    for found, expected in two.run(beside_pytorchs, steps, dtype):
        eps = torch.finfo(dtype).eps
        assert found.keys() == expected.keys()
        for name, e in expected.items():
            scale = e.abs().max().clamp(min=1)
            torch.testing.assert_close(found[name] / scale, e / scale, rtol=0, atol=8 * eps)


def beside_pytorchs(rank: int, steps: Steps, dtype) -> list[dict[str, Tensor]]:
    seen = []
    for ours in (True, False):
        bn = Sync.convert_sync_batchnorm(copy.deepcopy(steps.bn)).cuda()
        x, residual, grad = (
            parts(t[0], steps.sizes)[rank].cuda().to(dtype) for t in (steps.x, steps.residual, steps.grad)
        )
        x, residual = x.requires_grad_(), residual.requires_grad_()
        y = batch_norm_act(x, bn, residual, relu=False) if ours else bn(x) + residual
        y.backward(grad)
        tensors = {"y": y.detach(), "dx": x.grad, "dresidual": residual.grad, "mean": bn.running_mean}
        tensors |= {"var": bn.running_var, "dweight": bn.weight.grad, "dbias": bn.bias.grad}
        seen.append({name: t.float().cpu() for name, t in tensors.items()})
    return seen
