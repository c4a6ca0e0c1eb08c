"""FusedBasicBlock and FusedBottleneck against torchvision's, one block at a time.

Blocks are small, so their inputs can be chosen with no pre-activation near zero: no ReLU flips, the tests are sharp.
"""

from __future__ import annotations

import copy
import itertools
import math
import warnings

import parity
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1
from torchvision.ops import FrozenBatchNorm2d

from fused_resnet import FusedBasicBlock, FusedBottleneck, backends, restore_blocks, swap_blocks, swap_report, sync

FUSED = {BasicBlock: FusedBasicBlock, Bottleneck: FusedBottleneck}
MARGIN = 1e-4


def project(inplanes, planes, stride=1, norm=nn.BatchNorm2d):
    return nn.Sequential(conv1x1(inplanes, planes, stride), norm(planes))


def basic(cls=BasicBlock, norm=nn.BatchNorm2d):
    return cls(6, 6, norm_layer=norm)


def basic_down(cls=BasicBlock, norm=nn.BatchNorm2d):
    return cls(3, 6, 2, project(3, 6, 2, norm), norm_layer=norm)


def bottleneck(cls=Bottleneck, norm=nn.BatchNorm2d):
    return cls(12, 3, norm_layer=norm)


def bottleneck_down(cls=Bottleneck, norm=nn.BatchNorm2d):
    return cls(5, 3, 2, project(5, 12, 2, norm), norm_layer=norm)


def grouped(cls=Bottleneck, norm=nn.BatchNorm2d):
    return cls(16, 4, 1, None, groups=2, base_width=96, norm_layer=norm)


def grouped_down(cls=Bottleneck, norm=nn.BatchNorm2d):
    return cls(5, 4, 2, project(5, 16, 2, norm), 3, 64, 1, norm)


def wide(cls=Bottleneck, norm=nn.BatchNorm2d):
    return cls(12, 3, base_width=128, norm_layer=norm)


def dilated(cls=Bottleneck, norm=nn.BatchNorm2d):
    return cls(12, 3, dilation=2, norm_layer=norm)


def dilated_down(cls=Bottleneck, norm=nn.BatchNorm2d):
    return cls(5, 3, 1, project(5, 12, 1, norm), dilation=3, norm_layer=norm)


MAKERS = [basic, basic_down, bottleneck, bottleneck_down, grouped, grouped_down, wide, dilated, dilated_down]
FEW = [basic_down, bottleneck_down]
LAYOUTS = ["contiguous", "channels_last"]


def named(makers):
    return [pytest.param(m, id=m.__name__) for m in makers]


def norms_of(block: nn.Module) -> list[nn.Module]:
    kinds = (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d)
    return [m for m in block.modules() if isinstance(m, kinds)]


def twin(block: nn.Module) -> nn.Module:
    """The fused block with the same parameters (copies), made by its own constructor's class."""
    ours = copy.deepcopy(block)
    ours.__class__ = FUSED[type(block)]
    return ours


def nearest_to_zero(block: nn.Module, x: torch.Tensor) -> float:
    """The smallest |pre-activation| in the block, seen in float64."""
    block, seen = copy.deepcopy(block).double(), []
    block.relu.register_forward_pre_hook(lambda m, args: seen.append(args[0].abs().min().item()))
    with torch.no_grad():
        block(x.double())
    return min(seen)


def sharp(block: nn.Module, seed: int = 0, batch: int = 5, size=(7, 9)) -> torch.Tensor:
    """An input for which no ReLU of the block is near its kink."""
    channels, device = block.conv1.in_channels, block.conv1.weight.device
    for attempt in range(1000):
        g = torch.Generator().manual_seed(1000 * seed + attempt)
        x = torch.randn(batch, channels, *size, generator=g).to(device)
        if nearest_to_zero(block, x) > MARGIN:
            return x
    raise AssertionError("no input keeps every pre-activation away from zero: make the block smaller")


def compare(block: nn.Module, dtype=torch.float32, layouts=LAYOUTS, batch: int = 5, size=(7, 9)) -> None:
    """The fused twin of a torchvision block, by the rule, in both layouts; and in float64 to eleven digits."""
    block = block.to(dtype)
    rounded = copy.deepcopy(block).double()  # a 16-bit block is judged with the weights it has
    images = [sharp(rounded, seed, batch, size).to(dtype) for seed in parity.SEEDS]
    judges = [parity.judge_of(rounded, x) for x in images]
    yardstick = parity.worst(parity.yardstick_of(block, x, judge) for x, judge in zip(images, judges, strict=True))
    for x, judge in zip(images, judges, strict=True):
        for layout in layouts:
            exact = parity.observe(*parity.as_variant(layout, twin(rounded), x.double()))
            assert max(parity.errors(exact, judge).values()) < 1e-11
            seen = parity.observe(*parity.as_variant(layout, twin(block), x))
            parity.check(parity.errors(seen, judge), yardstick, dtype)


def made(maker, seed: int = 0, norm=nn.BatchNorm2d, device="cpu", train=True) -> nn.Module:
    torch.manual_seed(seed)
    return parity.randomize_norms(maker(norm=norm), seed).to(device).train(train)


# --- parity of every constructor option -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("maker", named(MAKERS))
def test_block(maker, mode, device):
    compare(made(maker, device=device, train=mode == "train"))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("maker", named(FEW))
def test_batch_of_one(maker, mode, device):
    compare(made(maker, device=device, train=mode == "train"), batch=1)


@pytest.mark.parametrize("maker", named(FEW))
def test_one_by_one_maps(maker, device):
    """Contiguous and channels_last at once."""
    compare(made(maker, device=device, train=False), size=(1, 1))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("maker", named([basic, bottleneck_down]))
def test_bfloat16_parameters(maker, mode, device):
    compare(made(maker, device=device, train=mode == "train"), torch.bfloat16)


@pytest.mark.parametrize("cls", [BasicBlock, Bottleneck])
@pytest.mark.parametrize(
    "kwargs", [dict(groups=2), dict(base_width=128), dict(dilation=2), dict(norm_layer=3), dict(no_such=1)], ids=str
)
def test_constructor_refuses_what_torchvisions_does(cls, kwargs):
    def outcome(c):
        try:
            c(8, 8, **kwargs)
        except Exception as e:
            return type(e), str(e).replace("Fused", "")
        return None

    assert outcome(FUSED[cls]) == outcome(cls)


@pytest.mark.parametrize("maker", named(MAKERS))
def test_state_dict_both_ways(maker, device):
    theirs, ours = made(maker, 1), parity.randomize_norms(maker(FUSED[type(made(maker))]), 2)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = sharp(theirs.to(device).eval())
    torch.testing.assert_close(ours.to(device).eval()(x), theirs(x))
    fresh = made(maker, 3).to(device).eval()
    fresh.load_state_dict(ours.state_dict(), strict=True)
    assert torch.equal(fresh(x), theirs(x))
    assert isinstance(ours, type(theirs)) and type(ours).expansion == type(theirs).expansion


def test_the_rule_catches_one_percent(device):
    block = made(bottleneck_down, device=device)
    x = sharp(block)
    judge = parity.judge_of(block, x)
    yardstick = parity.yardstick_of(block, x, judge)
    seen = parity.observe(twin(block), x)
    assert not parity.violations(parity.errors(seen, judge), yardstick)
    for name, t in seen.items():
        if t.is_floating_point():
            planted = parity.errors(seen | {name: t * 1.01}, judge)
            assert [v.split(":")[0] for v in parity.violations(planted, yardstick)] == [name]
        else:
            assert parity.violations(parity.errors(seen | {name: t + 1}, judge), yardstick)


# --- each BN decides for itself ---------------------------------------------------------------------------------------


def mixes():
    for maker in (basic, basic_down, bottleneck, bottleneck_down):
        count = len(norms_of(maker()))
        for mix in itertools.product((False, True), repeat=count):
            yield pytest.param(maker, mix, id=f"{maker.__name__}-{''.join('FB'[m] for m in mix)}")


@pytest.mark.parametrize("outer", ["block_train", "block_eval"])
@pytest.mark.parametrize("maker, mix", mixes())
def test_mix_of_frozen_and_batch_statistics(maker, mix, outer, device):
    """All 2^k: B uses the batch's statistics, F is in eval mode; the mode of the block is another matter."""
    block = made(maker, device=device, train=outer == "block_train")
    for bn, training in zip(norms_of(block), mix, strict=True):
        bn.train(training)
    x = sharp(block)
    judge = parity.judge_of(block, x)
    yardstick = parity.yardstick_of(block, x, judge)
    for layout in LAYOUTS:
        exact = parity.observe(*parity.as_variant(layout, twin(block).double(), x.double()))
        assert max(parity.errors(exact, judge).values()) < 1e-11
        parity.check(parity.errors(parity.observe(*parity.as_variant(layout, twin(block), x)), judge), yardstick)


@pytest.mark.parametrize("maker, mix", mixes())
def test_mix_of_frozen_batch_norm(maker, mix, device):
    """All 2^k: F is torchvision's FrozenBatchNorm2d with the eps of detection."""
    block = made(maker, device=device)
    for i, (name, bn) in enumerate([(n, m) for n, m in block.named_modules() if isinstance(m, nn.BatchNorm2d)]):
        if not mix[i]:
            frozen = FrozenBatchNorm2d(bn.num_features, eps=0.0)
            frozen.load_state_dict(bn.state_dict())
            parent = block.get_submodule(name.rpartition(".")[0])
            parent._modules[name.rpartition(".")[2]] = frozen.to(device)
    x = sharp(block)
    judge = parity.judge_of(block, x)
    yardstick = parity.yardstick_of(block, x, judge)
    for layout in LAYOUTS:
        exact = parity.observe(*parity.as_variant(layout, twin(block).double(), x.double()))
        assert max(parity.errors(exact, judge).values()) < 1e-11
        parity.check(parity.errors(parity.observe(*parity.as_variant(layout, twin(block), x)), judge), yardstick)


# --- kinds of BN ------------------------------------------------------------------------------------------------------


class Norm:
    """norm_layer with options, as users write it with functools.partial; printable."""

    def __init__(self, cls, **options):
        self.cls, self.options = cls, options

    def __call__(self, channels):
        return self.cls(channels, **self.options)

    def __repr__(self):
        return "-".join([self.cls.__name__, *(f"{k}={v}" for k, v in self.options.items())])


KINDS = [
    Norm(nn.BatchNorm2d, eps=0.1),
    Norm(nn.BatchNorm2d, momentum=None),
    Norm(nn.BatchNorm2d, momentum=0.0),
    Norm(nn.BatchNorm2d, momentum=1.0),
    Norm(nn.BatchNorm2d, affine=False),
    Norm(nn.BatchNorm2d, track_running_stats=False),
    Norm(nn.BatchNorm2d, affine=False, track_running_stats=False),
    Norm(nn.SyncBatchNorm),
    Norm(nn.SyncBatchNorm, momentum=None, affine=False),
    Norm(FrozenBatchNorm2d),
    Norm(FrozenBatchNorm2d, eps=0.0),
]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("norm", KINDS, ids=repr)
@pytest.mark.parametrize("maker", named(FEW))
def test_kind_of_norm(maker, norm, mode, device):
    compare(made(maker, norm=norm, device=device, train=mode == "train"))


@pytest.mark.parametrize("norm", KINDS, ids=repr)
def test_running_statistics_over_steps(norm, device):
    """Several training steps, then eval: momentum=None averages over all batches, and the counter counts."""
    block = made(bottleneck_down, norm=norm, device=device)
    ours = twin(block)
    for step in range(4):
        x = torch.randn(5 + step, 5, 7, 9, device=device)
        torch.testing.assert_close(ours(x), block(x))
    for (name, a), (_, b) in zip(ours.named_buffers(), block.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
        if name.endswith("num_batches_tracked"):
            assert a == 4
    torch.testing.assert_close(ours.eval()(x), block.eval()(x))


@pytest.mark.parametrize("tracking", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_track_running_stats_switched_afterwards(mode, tracking, device):
    """The flag as some fine-tuning code flips it on a BN that has its buffers."""
    block = made(bottleneck_down, device=device, train=mode == "train")
    for bn in norms_of(block):
        bn.track_running_stats = tracking
    compare(block)


def test_counter_absent(device):
    """A BN restored from a checkpoint of before 2018 may lack num_batches_tracked."""
    block = made(basic_down, device=device)
    for bn in norms_of(block):
        bn.num_batches_tracked = None
    compare(block)


def test_mean_far_from_zero(device):
    """Statistics must not be the difference of two large numbers."""
    block = made(bottleneck_down, device=device)
    x = sharp(block)
    with torch.no_grad():
        block.conv1.weight.abs_()
    x = x.abs() * 0.01 + 300
    judge = parity.judge_of(block, x)
    yardstick = parity.yardstick_of(block, x, judge)
    for layout in LAYOUTS:
        seen = parity.observe(*parity.as_variant(layout, twin(block), x))
        parity.check(
            {k: e for k, e in parity.errors(seen, judge).items() if not k.startswith("grad")},
            yardstick,
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("maker", named([basic, basic_down, bottleneck, bottleneck_down]))
def test_sync_batch_norm_conversion(maker, layout, device):
    """convert_sync_batchnorm reaches inside a fused block, and the block stays fused."""
    block = made(maker, device=device)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(twin(block))
    assert type(converted) is FUSED[type(block)] and type(converted.bn1) is nn.SyncBatchNorm
    x = sharp(block)
    judge = parity.judge_of(block, x)
    seen = parity.observe(*parity.as_variant(layout, converted, x))
    parity.check(parity.errors(seen, judge), parity.yardstick_of(block, x, judge))


@pytest.mark.parametrize("maker", named([basic_down, bottleneck, bottleneck_down]))
def test_norm_that_collects_from_other_processes_under_a_compiler(maker, device, monkeypatch):
    """There SyncBatchNorm is called, and the rest of the block around it stays the same; tests/test_sync.py has the
    fused path."""
    monkeypatch.setattr(sync, "needs_collective", lambda bn: type(bn) is nn.SyncBatchNorm and bn.training)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    block = made(maker, norm=nn.SyncBatchNorm, device=device)
    called = []
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", lambda bn, x: called.append(bn) or nn.BatchNorm2d.forward(bn, x))
    x = sharp(block)
    judge = parity.judge_of(block, x)
    yardstick = parity.yardstick_of(block, x, judge)
    called.clear()
    parity.check(parity.errors(parity.observe(twin(block), x), judge), yardstick)
    assert len(called) == len(norms_of(block))
    assert "bn_stats" not in ops_in(twin(block), x)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("world, collects", [(0, False), (1, False), (2, True), (8, True)])
def test_a_collective_takes_several_processes(world, collects, mode, monkeypatch):
    """world 0: no process group. Only SyncBatchNorm, only in training, only where there is somebody to ask."""
    monkeypatch.setattr(sync.dist, "is_initialized", lambda: world > 0)
    monkeypatch.setattr(sync.dist, "get_world_size", lambda group=None: world)
    for norm in (nn.SyncBatchNorm(3), nn.BatchNorm2d(3)):
        expected = collects and mode == "train" and type(norm) is nn.SyncBatchNorm
        assert sync.needs_collective(norm.train(mode == "train")) is expected


# --- nothing goes stale -----------------------------------------------------------------------------------------------


def step(block):
    """One optimizer step in the mode the block is in."""
    optimizer = torch.optim.SGD(block.parameters(), lr=1e-3)
    x = torch.ones(3, block.conv1.in_channels, 7, 9, device=block.conv1.weight.device)
    x = (x * torch.linspace(-1, 1, 9, device=x.device)).to(block.conv1.weight.dtype)
    block(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def adam_in_training(block):
    block.train()
    optimizer = torch.optim.Adam(block.parameters(), lr=0.01)
    x = torch.linspace(-1, 1, 3 * block.conv1.in_channels * 63, device=block.conv1.weight.device)
    block(x.view(3, -1, 7, 9)).square().sum().backward()
    optimizer.step()
    block.eval()


def load(block):
    block.load_state_dict({k: v * 0.7 for k, v in block.state_dict().items()})


def load_assign(block):
    block.load_state_dict({k: v * 0.7 for k, v in block.state_dict().items()}, assign=True)


def ema(block):
    for p in block.parameters():
        p.data.mul_(0.9).add_(0.01)


def ema_of_buffers(block):
    for b in block.buffers():
        if b.is_floating_point():
            b.data.mul_(1.3).add_(0.1)


def one_value(block):
    block.conv1.weight.data[-1, -1, -1, -1] += 0.5


def one_bias(block):
    block.bn1.bias.data[-1] += 0.5


def through_numpy(block):
    if block.conv1.weight.is_cpu:
        block.conv1.weight.detach().numpy()[...] *= 1.5


def new_data(block):
    block.conv2.weight.data = block.conv2.weight.data * 1.2


def new_parameter(block):
    block.conv2.weight = nn.Parameter(block.conv2.weight.detach() * 1.2)


def swap_values(block):
    """Two changes that cancel in any sum."""
    w = block.conv1.weight.data
    w[0], w[1] = w[1].clone(), w[0].clone()


def eps(block):
    block.bn1.eps = 0.3


def to_double_and_back(block):
    block.double()
    block.conv1.weight.data.mul_(1.1)
    block.float()


def to_bfloat16_and_back(block):
    block.bfloat16().float()


def other_layout(block):
    block.to(memory_format=torch.contiguous_format)
    block.conv1.weight.data.mul_(1.1)
    block.to(memory_format=torch.channels_last)


def elsewhere_and_back(block):
    home = block.conv1.weight.device
    block.to("cpu")
    block.conv1.weight.data.mul_(1.1)
    block.to(home)


def train_and_back(block):
    block.train()
    with torch.no_grad():
        block(
            torch.randn(3, block.conv1.in_channels, 7, 9, generator=torch.Generator().manual_seed(7)).to(
                block.conv1.weight
            )
        )
    block.eval()


def another_norm(block):
    """The module replaced, its convolution kept."""
    new = copy.deepcopy(block.bn2)
    new.weight.data.mul_(2)
    block.bn2 = new


def stride_of_the_module(block):
    block.conv2.dilation = block.conv2.padding = (2, 2)


CHANGES = [
    step, adam_in_training, load, load_assign, ema, ema_of_buffers, one_value, one_bias, through_numpy, new_data,
    new_parameter, swap_values, eps, to_double_and_back, to_bfloat16_and_back, other_layout, elsewhere_and_back,
    train_and_back, another_norm, stride_of_the_module,
]  # fmt: skip


ONCE = [eps, stride_of_the_module]  # the second time they change nothing


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("change", named(CHANGES))
@pytest.mark.parametrize("maker", named(FEW))
def test_nothing_goes_stale(maker, change, layout, device):
    """Whatever is done to a block after it ran in eval mode, twice, it then computes what torchvision's does."""
    theirs = made(maker, device=device, train=False)
    x = sharp(theirs)
    theirs, x = parity.as_variant(layout, theirs, x)
    ours = twin(theirs)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))
    for _ in range(2):
        before = theirs(x)
        change(theirs)
        change(ours)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                torch.testing.assert_close(ours(x), theirs(x))
        rounding = change is to_bfloat16_and_back or change is through_numpy and device != "cpu"
        assert rounding or change in ONCE or not torch.allclose(theirs(x), before)


def test_weight_shared_by_blocks(device):
    """One weight tensor in two blocks with two BNs: neither gets the other's folding."""
    first, second = (made(bottleneck, seed, device=device, train=False) for seed in (0, 1))
    second.conv1.weight = first.conv1.weight
    x = sharp(first).contiguous(memory_format=torch.channels_last)
    a, b = twin(first), twin(second)
    b.conv1.weight = a.conv1.weight
    for m in (a, b, first, second):
        m.to(memory_format=torch.channels_last)
    for _ in range(2):
        torch.testing.assert_close(a(x), first(x))
        torch.testing.assert_close(b(x), second(x))


# --- what a submodule carries is respected ----------------------------------------------------------------------------


def parts_of(maker):
    names = [n for n, _ in maker().named_modules() if n]
    return [pytest.param(maker, n, id=f"{maker.__name__}-{n}") for n in names]


HOOKS = ["forward", "forward_with_kwargs", "forward_pre", "full_backward", "full_backward_pre"]


def hook(module: nn.Module, kind: str, calls: list):
    """A hook that changes what passes, so that ignoring it shows."""

    def scaled(value):
        calls.append(kind)
        return tuple(None if v is None else v * 1.5 for v in value) if isinstance(value, tuple) else value * 1.5

    return {
        "forward": lambda: module.register_forward_hook(lambda m, a, out: scaled(out)),
        "forward_with_kwargs": lambda: module.register_forward_hook(lambda m, a, k, out: scaled(out), with_kwargs=True),
        "forward_pre": lambda: module.register_forward_pre_hook(lambda m, a: scaled(a)),
        "full_backward": lambda: module.register_full_backward_hook(lambda m, gi, go: scaled(gi)),
        "full_backward_pre": lambda: module.register_full_backward_pre_hook(lambda m, go: scaled(go)),
    }[kind]()


def outplace(block: nn.Module) -> nn.Module:
    """Backward hooks do not go with a ReLU in place, fused or not."""
    block.relu.inplace = False
    return block


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("maker, part", [*parts_of(basic_down), *parts_of(bottleneck_down)])
def test_hook_on_submodule(maker, part, kind, mode, device):
    """It fires as often as in torchvision's block, and what it changes is changed."""
    theirs = outplace(made(maker, device=device, train=mode == "train"))
    ours, x = twin(theirs), sharp(theirs)

    def outcome(block):
        calls = []
        handle = hook(block.get_submodule(part), kind, calls)
        try:
            return calls, parity.observe(block, x)
        except RuntimeError as e:  # a backward hook on the last BN does not go with torchvision's `out += identity`
            assert "inplace" in str(e) and "backward" in kind
            return calls, {}
        finally:
            handle.remove()

    (called, a), (expected, b) = outcome(ours), outcome(theirs)
    assert called == expected and (called or not b)
    assert a.keys() == b.keys()
    for key in b:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5, msg=key)
    torch.testing.assert_close(parity.observe(ours, x)["output"], parity.observe(theirs, x)["output"])
    assert ops_in(ours, x)  # the hook is gone, and with it the fallback


@pytest.mark.parametrize("part", ["conv1", "bn2", "relu", "downsample", "downsample.0"])
def test_forward_replaced_on_submodule(part, device):
    """As offloading libraries do: the instance's own forward is called, not read around."""
    theirs = made(bottleneck_down, device=device, train=False)
    ours, x = twin(theirs), sharp(theirs)
    for block in (theirs, ours):
        m = block.get_submodule(part)
        m.forward = lambda a, forward=m.forward: forward(a) * 2
    torch.testing.assert_close(ours(x), theirs(x))


def test_convolution_replaced_inside_a_conv(device):
    theirs = made(bottleneck_down, device=device, train=False)
    ours, x = twin(theirs), sharp(theirs)
    for block in (theirs, ours):
        conv = block.conv2
        conv._conv_forward = lambda a, w, b, forward=conv._conv_forward: forward(a, w, b) * 2
    torch.testing.assert_close(ours(x), theirs(x))
    assert swap_report(ours).blocks[0].reason == "runs unfused: conv2: _conv_forward is overridden on the instance"


def test_relu_that_is_no_module(device):
    theirs = made(bottleneck_down, device=device, train=False)
    ours, x = twin(theirs), sharp(theirs)
    for block in (theirs, ours):
        del block.relu
        block.relu = torch.relu
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_global_hook(kind, device):
    theirs = made(bottleneck_down, device=device)
    ours, x = twin(theirs), sharp(theirs)
    register = getattr(nn.modules.module, f"register_module_{kind}_hook")

    def outcome(block):
        calls = []
        handle = register(lambda m, *a: calls.append(type(m).__name__.replace("Fused", "")))
        try:
            return calls, block(x)
        finally:
            handle.remove()

    (called, a), (expected, b) = outcome(ours), outcome(theirs)
    assert called == expected and "Conv2d" in called
    torch.testing.assert_close(a, b)
    assert ops_in(ours, x)


def spectral(block):
    parametrizations.spectral_norm(block.conv2)


def weight_norm(block):
    parametrizations.weight_norm(block.conv1)


def orthogonal(block):
    parametrizations.orthogonal(block.conv3 if hasattr(block, "conv3") else block.conv1)


def parametrized_norm(block):
    nn.utils.parametrize.register_parametrization(block.bn1, "weight", nn.Softplus())


def parametrized_projection(block):
    nn.utils.parametrize.register_parametrization(block.downsample[0], "weight", nn.Tanh())


def old_weight_norm(block):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(block.conv1)


def old_spectral_norm(block):
    nn.utils.spectral_norm(block.conv2)


def pruned(block):
    prune.l1_unstructured(block.conv1, "weight", amount=0.5)


def pruned_projection(block):
    prune.random_unstructured(block.downsample[0], "weight", amount=0.5)


ALTERATIONS = [
    spectral, weight_norm, orthogonal, parametrized_norm, parametrized_projection, old_weight_norm, old_spectral_norm,
    pruned, pruned_projection,
]  # fmt: skip


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("alter", named(ALTERATIONS))
@pytest.mark.parametrize("maker", named(FEW))
def test_altered_submodule(maker, alter, mode, device):
    """Parametrizations and pruning on a block that is fused: values and gradients of what stands behind them."""
    theirs = made(maker, device=device, train=mode == "train")
    ours, x = twin(theirs), sharp(theirs)
    for block in (theirs, ours):
        torch.manual_seed(3)
        alter(block)
    for _ in range(2):  # spectral norm iterates as it goes
        a, b = parity.observe(ours, x), parity.observe(theirs, x)
        assert a.keys() == b.keys()
        for key in b:
            torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5, msg=key)


def test_pruned_for_good_is_fused_again(device):
    theirs = made(bottleneck_down, device=device, train=False)
    ours, x = twin(theirs), sharp(theirs)
    for block in (theirs, ours):
        pruned(block)
        prune.remove(block.conv1, "weight")
    torch.testing.assert_close(ours(x), theirs(x))
    assert ops_in(ours, x)


def ops_in(block: nn.Module, x: torch.Tensor) -> list[str]:
    """Names of this package's ops that a forward runs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    with Record(), torch.no_grad():
        block(x)
    return [n.removeprefix("fused_resnet.").removesuffix(".default") for n in names if n.startswith("fused_resnet.")]


def test_what_runs_is_fused(device):
    """Parity alone would pass a block that always falls back."""
    block = twin(made(bottleneck_down, device=device))
    x = torch.randn(2, 5, 7, 9, device=device)
    convolution = ["bn_act_conv", "update_running_stats_"]
    assert ops_in(block, x) == [*convolution * 2, *convolution, "bn_act", "pointwise_bn_act", "update_running_stats_"]
    one = ["bn_stats", "update_running_stats_", "bn_act"]
    assert ops_in(block.eval(), x) == ["conv_bn_act"] * 4
    block.bn2.train()
    assert sorted(ops_in(block, x)) == sorted(["conv_bn_act"] * 3 + one)
    block.conv1.register_forward_hook(lambda *a: None)
    assert ops_in(block, x) == []
    block = twin(made(basic, device=device, train=False))
    assert ops_in(block, torch.randn(2, 6, 7, 9, device=device)) == ["conv_bn_act"] * 2


# --- layouts, inputs and memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("weights", LAYOUTS)
@pytest.mark.parametrize("input", LAYOUTS)
@pytest.mark.parametrize("maker", named([basic, basic_down, bottleneck, bottleneck_down]))
def test_layouts_in_and_out(maker, input, weights, mode, device):
    """Output and gradients have torchvision's values and its layouts, in each of the four mixtures."""
    theirs = made(maker, device=device, train=mode == "train")
    x = sharp(theirs)
    theirs, _ = parity.as_variant(weights, theirs, x)
    _, x = parity.as_variant(input, theirs, x)
    ours = twin(theirs)
    a, b = parity.observe(ours, x), parity.observe(theirs, x)
    for key in b:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5, msg=key)
    if device == "cpu" and input == weights:
        assert a["output"].stride() == b["output"].stride()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert p.grad.stride() in (p.stride(), q.grad.stride()), name


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("maker", named(FEW))
def test_input_of_odd_strides(maker, mode, device):
    theirs = made(maker, device=device, train=mode == "train")
    ours, dense = twin(theirs), sharp(theirs)
    sliced = torch.zeros(10, dense.shape[1], 9, 11, device=device)[::2, :, 1:-1, 1:-1].copy_(dense)
    assert not sliced.is_contiguous()
    torch.testing.assert_close(ours(sliced), theirs(dense))
    torch.testing.assert_close(ours(dense[:1].expand(5, -1, -1, -1)), theirs(dense[:1].repeat(5, 1, 1, 1)))


def test_input_is_left_alone(device):
    """The ReLU of torchvision works in place; nobody's input is written to."""
    for maker, mode in itertools.product(MAKERS, (True, False)):
        block = twin(made(maker, device=device, train=mode))
        x = torch.randn(2, block.conv1.in_channels, 7, 9, device=device)
        kept = x.clone()
        block(x)
        assert torch.equal(x, kept)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("maker", named([basic, basic_down, bottleneck, bottleneck_down]))
def test_saves_no_more_than_torchvision(maker, mode, device):
    """Bytes that autograd keeps for the backward, each storage counted once."""

    def saved(block, x):
        kept = {}

        def pack(t):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = block(x)
        known = {t.untyped_storage().data_ptr() for t in (*block.parameters(), *block.buffers(), x)}
        return sum(n for p, n in kept.items() if p not in known), y

    theirs = made(maker, device=device, train=mode == "train")
    x = torch.randn(4, theirs.conv1.in_channels, 28, 28, device=device, requires_grad=True)
    allowed, expected = saved(theirs, x)
    used, y = saved(twin(theirs), x)
    torch.testing.assert_close(y, expected)
    # Per BN a few vectors of C values more than torchvision's save_mean and save_invstd.
    vectors = sum(4 * 4 * bn.num_features for bn in norms_of(theirs))
    assert used <= allowed + vectors
    if mode == "eval":
        assert used < 0.75 * allowed


@pytest.mark.parametrize("frozen", ["weights", "norms", "everything", "input"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_partial_gradients(mode, frozen, device):
    """requires_grad switched off in parts, as in fine-tuning: the rest keeps its gradients, the frozen has none."""
    theirs = made(bottleneck_down, device=device, train=mode == "train")
    for p in theirs.parameters():
        is_norm = p.dim() == 1
        p.requires_grad_(not (frozen == "everything" or (frozen == "norms") == is_norm and frozen != "input"))
    ours, x = twin(theirs), sharp(theirs).requires_grad_(frozen != "input")
    for block in (theirs, ours):
        x.grad = None
        block(x).square().sum().backward()
        block.input_grad = None if x.grad is None else x.grad.clone()
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) == (not b.requires_grad), name
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4, msg=name)
    if frozen != "input":
        torch.testing.assert_close(ours.input_grad, theirs.input_grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("maker", named(FEW))
def test_gradcheck(maker, mode, device):
    """First and second derivatives against finite differences, in float64."""
    block = twin(made(maker, device=device, train=mode == "train")).double()
    for bn in norms_of(block):
        bn.momentum = 0.0  # finite differences call the block many times
    x = sharp(copy.deepcopy(block).float(), batch=2, size=(3, 2)).double().requires_grad_()
    inputs = (x, block.bn1.weight, block.bn2.bias, block.conv1.weight)
    names = ("bn1.weight", "bn2.bias", "conv1.weight")

    def run(x, *parameters):
        return torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


# --- values that are not finite ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("maker", named(FEW))
def test_nan_and_inf_travel(maker, mode, value, layout, device):
    theirs = made(maker, device=device, train=mode == "train")
    x = torch.randn(5, theirs.conv1.in_channels, 7, 9, device=device)
    x[1, 2, 3, 4] = value
    theirs, x = parity.as_variant(layout, theirs, x)
    a, b = parity.observe(twin(theirs), x), parity.observe(theirs, x)
    for key in b:
        assert torch.equal(a[key].isnan(), b[key].isnan()), key
        assert torch.equal(a[key].isinf(), b[key].isinf()), key


# --- bad input --------------------------------------------------------------------------------------------------------


def images(*shape, dtype=torch.float32):
    return lambda device: torch.zeros(shape, dtype=dtype, device=device)


BAD = {
    "channels": images(2, 4, 7, 9),
    "3-D": images(5, 7, 9),
    "2-D": images(5, 9),
    "5-D": images(2, 5, 7, 9, 1),
    "double": images(2, 5, 7, 9, dtype=torch.float64),
    "half": images(2, 5, 7, 9, dtype=torch.float16),
    "bfloat16": images(2, 5, 7, 9, dtype=torch.bfloat16),
    "int": images(2, 5, 7, 9, dtype=torch.int64),
    "bool": images(2, 5, 7, 9, dtype=torch.bool),
    "one-value": images(1, 5, 1, 1),
    "empty-batch": images(0, 5, 7, 9),
    "empty-map": images(2, 5, 0, 9),
}


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d, Norm(nn.BatchNorm2d, track_running_stats=False)], ids=["tracking", "not"]
)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("maker", named(FEW))
def test_bad_input(maker, bad, mode, norm, device):
    """What torchvision's block raises, ours does; what it computes, ours does as well."""

    def change(m):
        if maker is basic_down:
            m.conv1, m.downsample[0] = nn.Conv2d(5, 6, 3, 2, 1, bias=False), conv1x1(5, 6, 2)
        return m

    theirs = change(made(maker, norm=norm, train=mode == "train")).to(device)
    ours, x = twin(theirs), BAD[bad](device)

    def outcome(block):
        try:
            y = block(x)
            if y.requires_grad:
                y.sum().backward()
            return y, {n: b.clone() for n, b in block.named_buffers()}
        except Exception as e:
            return e

    a, b = outcome(ours), outcome(theirs)
    if isinstance(b, Exception):
        assert isinstance(a, type(b)) or isinstance(b, type(a)), (a, b)  # NotImplementedError is a RuntimeError
        assert type(a) is not Exception
        assert str(a)
    else:
        assert not isinstance(a, Exception), a
        torch.testing.assert_close(a[0], b[0], equal_nan=True)
        for key in b[1]:
            torch.testing.assert_close(a[1][key], b[1][key], equal_nan=True, msg=key)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_half_block(mode, device):
    """float16 throughout, on whatever this machine can."""
    theirs = made(bottleneck_down, device=device, train=mode == "train").half()
    x = torch.randn(3, 5, 7, 9, device=device).half()
    ours = twin(theirs)
    try:
        expected = theirs(x)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            ours(x)
        return
    torch.testing.assert_close(ours(x), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("maker", ["stride", "channels"])
def test_shortcut_that_does_not_fit(maker, mode, device):
    """No projection where one is needed: torchvision raises, and ours says what is missing."""
    make = {"stride": lambda c: c(12, 3, 2), "channels": lambda c: c(8, 3)}[maker]
    x = torch.randn(2, 12 if maker == "stride" else 8, 7, 9, device=device)
    for cls in (Bottleneck, FusedBottleneck):
        block = make(cls).to(device).train(mode == "train")
        with pytest.raises(RuntimeError, match="residual|size of tensor"):
            block(x)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_shortcut_that_broadcasts(mode, device):
    """torchvision adds one value to a whole map, if that is what the downsample returns."""
    theirs = Bottleneck(12, 3, downsample=nn.AdaptiveAvgPool2d(1))
    theirs = parity.randomize_norms(theirs, 0).to(device).train(mode == "train")
    x = torch.randn(3, 12, 5, 7, device=device)
    a, b = parity.observe(twin(theirs), x), parity.observe(theirs, x)
    for key in b:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5, msg=key)


def test_mixed_dtypes_in_a_block(device):
    """float32 BN in a 16-bit block, as mixed-precision code keeps it, is served; torchvision's block does the same."""
    theirs = made(bottleneck_down, device=device, train=False).bfloat16()
    for bn in norms_of(theirs):
        bn.float()
    x = torch.randn(3, 5, 7, 9, device=device).bfloat16()
    torch.testing.assert_close(twin(theirs)(x), theirs(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("cls, planes", [(BasicBlock, 6), (Bottleneck, 2)])
def test_a_single_channel_broadcasts_over_the_shortcut(cls, planes, mode, device):
    """torchvision's add broadcasts it, and adds its gradients up."""
    theirs = parity.randomize_norms(cls(1, planes), 0).to(device).double().train(mode == "train")
    x = torch.randn(3, 1, 7, 9, device=device).double()
    a, b = parity.observe(twin(theirs), x), parity.observe(theirs, x)
    assert a["output"].shape[1] == planes * cls.expansion
    for key in b:
        torch.testing.assert_close(a[key], b[key], rtol=1e-9, atol=1e-9, msg=key)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("between", ["train_forward", "train_step", "no_grad"])
@pytest.mark.parametrize("maker", named(FEW))
def test_running_statistics_may_change_between_forward_and_backward(maker, between, layout, device):
    """Consistency losses run eval and train mode in turn before one backward; each gets the gradient of its forward."""
    block = twin(made(maker, device=device, train=False))
    x = torch.randn(3, block.conv1.in_channels, 7, 9, device=device)
    block, x = parity.as_variant(layout, block, x)
    expected = torch.autograd.grad(block(x).square().sum(), list(block.parameters()))
    y = block(x)
    block.train()
    with torch.set_grad_enabled(between != "no_grad"):
        other = block(x + 1)
    if between == "train_step":
        torch.autograd.grad(other.sum(), list(block.parameters()))
    found = torch.autograd.grad(y.square().sum(), list(block.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_half_on_a_cpu_whose_onednn_lacks_it(monkeypatch):
    """As on a CPU without the instructions: the unfused path serves, with the same result."""
    theirs = made(bottleneck_down, train=False).half()
    block, x = parity.as_variant("channels_last", twin(theirs), torch.randn(2, 5, 7, 9).half())
    expected = theirs.float()(x.float())
    asked = []
    monkeypatch.setattr(backends.cpu, "onednn_lacks", lambda dtype: asked.append(dtype) or "no such instruction")
    monkeypatch.setattr(backends.cpu, "_pointwise", lambda *args: pytest.fail("oneDNN's fused call ran"))
    for _ in range(3):
        torch.testing.assert_close(block(x).float(), expected, rtol=1e-2, atol=1e-2)
    assert set(asked) == {torch.float16}


# --- swap_blocks on a block itself ------------------------------------------------------------------------------------


@pytest.mark.parametrize("maker", named(FEW))
def test_forced_backend_is_the_one_that_runs(maker, device):
    block = twin(made(maker, device=device, train=False))
    x = torch.randn(2, block.conv1.in_channels, 7, 9, device=device)
    expected = block(x)
    with backends.backend("reference"):
        torch.testing.assert_close(block(x), expected)


def test_swap_and_restore_of_a_bare_block(device):
    block = made(bottleneck_down, device=device)
    assert swap_blocks(block) is block and type(block) is FusedBottleneck
    assert restore_blocks(block) is block and type(block) is Bottleneck
