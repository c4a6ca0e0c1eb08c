"""Every op as PyTorch sees it: registration, derivatives, autocast, transforms, validation, compilation, memory."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import LAYOUTS, SHAPES, Shape, bn_case, bwd_input_case, conv_case, unfused_bn, unfused_conv
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import fused_resnet
from fused_resnet import functional, ops

conv_bn_act = torch.ops.fused_resnet.conv_bn_act.default
conv_bn_act_bwd = torch.ops.fused_resnet.conv_bn_act_bwd.default
bn_act = torch.ops.fused_resnet.bn_act.default
bn_act_bwd = torch.ops.fused_resnet.bn_act_bwd.default
bn_act_bwd_input = torch.ops.fused_resnet.bn_act_bwd_input.default
bn_stats = torch.ops.fused_resnet.bn_stats.default
update_running_stats_ = torch.ops.fused_resnet.update_running_stats_.default

layouts = pytest.mark.parametrize("layout", LAYOUTS)
OPTIONS = {
    "all": dict(),
    "no-relu": dict(relu=False),
    "no-residual": dict(residual=False),
    "plain-bn": dict(bn="plain"),
    "no-bn": dict(bn=None, residual=False),
    "constants": dict(requires_grad=False),
}
BN_OPTIONS = {
    "batch": dict(),
    "frozen": dict(batch_stats=False),
    "frozen-no-relu": dict(batch_stats=False, relu=False, residual=False),
    "batch-not-affine": dict(affine=False, residual=False),
    "constants": dict(requires_grad=False),
}
MASKS = {"all": [True] * 5, "weight": [False, True, False, False, False], "bn": [False, False, True, True, False]}
BN_MASKS = {"all": [True] * 4, "bn": [False, True, True, False], "residual": [False, False, False, True]}


# --- opcheck ---


@layouts
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_opcheck_conv_bn_act(options, layout, device):
    case = conv_case(Shape(n=2), torch.float32, layout, device=device, **{"requires_grad": True, **options})
    torch.library.opcheck(conv_bn_act, case.args)


@layouts
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_opcheck_conv_bn_act_bwd(mask, layout, device):
    case = conv_case(SHAPES["3x3-stride2"], torch.float32, layout, device=device)
    torch.library.opcheck(conv_bn_act_bwd, (*case.bwd, mask))


@pytest.mark.parametrize("op", ["conv_bn_act_bwd", "bn_act_bwd"])
def test_opcheck_double_backward(op, device):
    """A `_bwd` op without an autograd formula would give wrong second derivatives, and only warn."""
    case = (
        conv_case(SHAPES["1x1"], torch.float32, device=device)
        if op[0] == "c"
        else bn_case(torch.float32, device=device)
    ).bwd
    differentiable = (0, 2, 3, 4) if op[0] == "c" else (0, 2, 5)
    args = [a.detach().requires_grad_() if i in differentiable else a for i, a in enumerate(case)]
    # torch 2.11's own double backward of a convolution does not take symbolic sizes, so the sizes are fixed.
    utils = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    call = getattr(torch.ops.fused_resnet, op).default
    torch.library.opcheck(call, (*args, [True] * (5 if op[0] == "c" else 4)), test_utils=utils)


@layouts
@pytest.mark.parametrize("options", BN_OPTIONS.values(), ids=BN_OPTIONS)
def test_opcheck_bn_act(options, layout, device):
    case = bn_case(torch.float32, layout, device=device, **{"requires_grad": True, **options})
    torch.library.opcheck(bn_act, case.args)


@layouts
@pytest.mark.parametrize("mask", BN_MASKS.values(), ids=BN_MASKS)
@pytest.mark.parametrize("batch_stats", [True, False], ids=["batch", "frozen"])
def test_opcheck_bn_act_bwd(batch_stats, mask, layout, device):
    case = bn_case(torch.float32, layout, batch_stats=batch_stats, device=device)
    torch.library.opcheck(bn_act_bwd, (*case.bwd, mask))


@layouts
@pytest.mark.parametrize("requires_grad", [False, True], ids=["constant", "grad"])
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
def test_opcheck_bn_act_bwd_input(relu, requires_grad, layout, device):
    grad, y, *rest = bwd_input_case(torch.float32, layout, relu, device)
    grad, *rest = (a.requires_grad_(requires_grad) if isinstance(a, torch.Tensor) else a for a in (grad, *rest))
    torch.library.opcheck(bn_act_bwd_input, (grad, y, *rest))


@layouts
@pytest.mark.parametrize("requires_grad", [False, True], ids=["constant", "grad"])
def test_opcheck_bn_stats(requires_grad, layout, device):
    x = bn_case(torch.float32, layout, device=device).args[0].requires_grad_(requires_grad)
    torch.library.opcheck(bn_stats, (x,))


@pytest.mark.parametrize("momentum", [0.1, None], ids=["momentum", "cumulative"])
@pytest.mark.parametrize("counted", [True, False], ids=["counted", "not-counted"])
def test_opcheck_update_running_stats_(counted, momentum, device):
    c = [torch.rand(3, device=device) + 0.5 for _ in range(4)]
    count = torch.tensor(2, device=device) if counted else None
    torch.library.opcheck(update_running_stats_, (c[0], c[1], count, c[2], c[3], 63, momentum))


@pytest.mark.parametrize("name", ops._SCHEMAS)
def test_no_argument_has_a_default(name):
    """A trailing argument equal to its default vanishes from what the autograd formula sees."""
    schema = getattr(torch.ops.fused_resnet, name).default._schema
    assert not [a.name for a in schema.arguments if a.has_default_value() or a.kwarg_only]


# --- derivatives ---


def away_from_zero(make, function, distance=1e-3, **options):
    """The first case whose pre-activations are all at a distance from zero, where ReLU has no derivative."""
    for seed in range(100):
        case = make(seed=seed, margin=0.0, **options)
        with torch.no_grad():
            args = [a.detach() if isinstance(a, torch.Tensor) else a for a in case.args]
            args[-2 if make is bn_case else -1] = False
            if function(*args).abs().min() > distance:
                return case
    raise AssertionError("no seed keeps away from zero")


TINY = {
    "3x3": Shape(n=2, c=3, k=2, size=(3, 4)),
    "1x1-stride2": Shape(n=1, c=3, k=2, kernel=(1, 1), padding=(0, 0), stride=(2, 2), size=(3, 4)),
    "grouped": Shape(n=1, c=4, k=4, groups=2, size=(2, 3)),
    "dilated": Shape(n=1, c=2, k=2, dilation=(2, 2), padding=(2, 2), size=(3, 2)),
}


def differentiable(args):
    """(function of the tensors that require grad, those tensors)."""
    at = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.requires_grad]

    def bind(op):
        def call(*tensors):
            full = list(args)
            for i, t in zip(at, tensors, strict=True):
                full[i] = t
            return op(*full)

        return call

    return bind, tuple(args[i] for i in at)


@pytest.mark.parametrize("options", [OPTIONS[k] for k in ("all", "no-relu", "plain-bn", "no-bn")], ids=lambda o: str(o))
@pytest.mark.parametrize("shape", TINY.values(), ids=TINY)
def test_gradcheck_conv_bn_act(shape, options):
    case = away_from_zero(lambda **o: conv_case(shape, requires_grad=True, **o), unfused_conv, **options)
    bind, inputs = differentiable(case.args)
    assert gradcheck(bind(conv_bn_act), inputs)
    assert gradgradcheck(bind(conv_bn_act), inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("batch_stats", [True, False], ids=["batch", "frozen"])
def test_gradcheck_batch_norm_act(batch_stats, affine, layout):
    case = away_from_zero(
        bn_case,
        unfused_bn,
        layout=layout,
        affine=affine,
        batch_stats=batch_stats,
        requires_grad=True,
        size=(2, 3, 2, 3),
    )
    x, mean, var, weight, bias, eps, residual, *_ = case.args
    bn = nn.BatchNorm2d(3, eps=eps, affine=affine, dtype=torch.float64).train(batch_stats)
    bn.running_mean, bn.running_var = mean.clone(), var.clone()

    def call(x, residual, *vectors):
        for name, v in zip(("weight", "bias"), vectors, strict=False):
            bn._parameters.pop(name, None)
            setattr(bn, name, v)
        return functional.batch_norm_act(x, bn, residual)

    inputs = (x, residual, *((weight, bias) if affine else ()))
    assert gradcheck(call, inputs)
    assert gradgradcheck(call, inputs)


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
def test_gradcheck_bn_act_bwd_input(relu):
    grad, y, *rest = bwd_input_case(relu=relu, size=(2, 3, 2, 3))
    grad, *rest = (a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in (grad, *rest))
    bind, inputs = differentiable((grad, y, *rest))
    assert gradcheck(bind(bn_act_bwd_input), inputs)
    assert gradgradcheck(bind(bn_act_bwd_input), inputs)


@pytest.mark.parametrize("wrong", ["grad", "y", "mean", "slope", "no-y"])
def test_bn_act_bwd_input_names_what_it_refuses(wrong):
    args = list(bwd_input_case())
    at = {"grad": 0, "y": 1, "no-y": 1, "mean": 3, "slope": 6}[wrong]
    args[at] = None if wrong == "no-y" else args[at][:-1]
    with pytest.raises(RuntimeError, match=f"^{wrong.removeprefix('no-')}: expected"):
        bn_act_bwd_input(*args)


@pytest.mark.parametrize("op", ["conv_bn_act", "bn_act"])
def test_gamma_zero_has_its_gradients(op):
    case = conv_case(TINY["3x3"], requires_grad=True) if op == "conv_bn_act" else bn_case(requires_grad=True)
    at = 2 if op == "conv_bn_act" else 3
    with torch.no_grad():
        case.args[at].zero_()
    unfused = unfused_conv if op == "conv_bn_act" else unfused_bn
    inputs = [a for a in case.args if isinstance(a, torch.Tensor) and a.requires_grad]
    for ours, theirs in zip(
        torch.autograd.grad(getattr(torch.ops.fused_resnet, op)(*case.args), inputs, case.grad),
        torch.autograd.grad(unfused(*case.args), inputs, case.grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def penalised(op, args, order=2):
    """A loss with a gradient penalty of the given order, as WGAN-GP has it, and its gradient by every argument."""
    inputs = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    loss = op(*args).square().mean()
    for _ in range(order - 1):
        grads = torch.autograd.grad(loss, inputs, create_graph=True)
        loss = loss + sum(g.square().sum() for g in grads)
    return torch.autograd.grad(loss, inputs)


def elementary_bn(x, mean, var, bn_weight, bn_bias, eps, residual, relu, batch_stats):
    """bn_act out of elementary functions: PyTorch's batch_norm has no third derivative."""
    if batch_stats:
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    mean, var, bn_weight, bn_bias = (v[:, None, None] for v in (mean, var, bn_weight, bn_bias))
    y = (x - mean) / (var + eps).sqrt() * bn_weight + bn_bias + residual
    return y.relu() if relu else y


@layouts
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("op", ["conv_bn_act", "bn_act-batch", "bn_act-frozen"])
def test_gradient_penalty(op, order, layout, device):
    if op == "conv_bn_act":
        args, ours, theirs = (
            conv_case(Shape(n=2), layout=layout, device=device, requires_grad=True).args,
            conv_bn_act,
            unfused_conv,
        )
    else:
        batch_stats = op.endswith("batch")
        args = bn_case(layout=layout, device=device, batch_stats=batch_stats, requires_grad=True).args
        ours, theirs = bn_act, elementary_bn
    for mine, other in zip(penalised(ours, args, order), penalised(theirs, args, order), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-10)


def test_double_backward_under_autocast_keeps_float32():
    args = bn_case(torch.float32, requires_grad=True).args
    expected = penalised(unfused_bn, args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = penalised(bn_act, args)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_statistics_are_constants_to_autograd():
    case = bn_case(requires_grad=True)
    mean, var = bn_stats(case.args[0])
    assert not mean.requires_grad and not var.requires_grad


@pytest.mark.parametrize("wanted", range(5), ids=["x", "weight", "bn_weight", "bn_bias", "residual"])
def test_a_single_gradient_equals_that_of_all(wanted):
    at = (0, 1, 2, 3, 7)[wanted]
    full = conv_case(SHAPES["3x3"], requires_grad=True)
    inputs = [full.args[i] for i in (0, 1, 2, 3, 7)]
    expected = torch.autograd.grad(conv_bn_act(*full.args), inputs, full.grad)[wanted]
    args = [a.detach() if isinstance(a, torch.Tensor) else a for a in full.args]
    args[at].requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(conv_bn_act(*args), args[at], full.grad)[0], expected)


def test_a_gradient_that_is_wrong_by_one_percent_is_found(monkeypatch):
    case = conv_case(TINY["3x3"], requires_grad=True, relu=False)
    bind, inputs = differentiable(case.args)
    backend = fused_resnet.backends.cpu
    right = backend.conv_bn_act_bwd

    def wrong(*args):
        dx, dweight, dbn_weight, dbn_bias, dresidual = right(*args)
        return dx, dweight, dbn_weight * 1.01, dbn_bias, dresidual

    monkeypatch.setattr(backend, "conv_bn_act_bwd", wrong)
    assert not gradcheck(bind(conv_bn_act), inputs, raise_exception=False)


# --- transforms that have no rule must say so ---


def forward_mode(call, x):
    with forward_ad.dual_level():
        return call(forward_ad.make_dual(x, torch.ones_like(x)))


def forward_mode_without_grad(call, x):
    with torch.no_grad():
        return forward_mode(call, x)


TRANSFORMS = {
    "jvp": (lambda call, x: torch.func.jvp(call, (x,), (x,)), "forward-mode"),
    "jacfwd": (lambda call, x: torch.func.jacfwd(call)(x), "forward-mode"),
    "dual": (forward_mode, "forward-mode"),
    "dual-requires-grad": (lambda call, x: forward_mode(call, x.clone().requires_grad_()), "forward-mode"),
    "dual-no-grad": (forward_mode_without_grad, "forward-mode"),
    "vmap": (lambda call, x: torch.vmap(call)(x[None]), "vmap"),
    "func-grad": (lambda call, x: torch.func.grad(lambda x: call(x).sum())(x), "torch.func"),
    "func-vjp": (lambda call, x: torch.func.vjp(call, x), "torch.func"),
}


@pytest.mark.parametrize("transform, word", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("op", ["conv_bn_act", "bn_act", "bn_stats"])
def test_transform_without_a_rule_raises(op, transform, word):
    args = (conv_case(Shape()) if op == "conv_bn_act" else bn_case()).args
    if op == "bn_stats":
        args = args[:1]
    with pytest.raises(NotImplementedError, match=f"fused_resnet::{op}.*{word}"):
        transform(lambda x: getattr(torch.ops.fused_resnet, op)(x, *args[1:]), args[0])


def test_batched_gradients_are_right_or_refused():
    case = conv_case(Shape(), requires_grad=True)
    y, grads = conv_bn_act(*case.args), torch.randn(3, *case.grad.shape, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batched = torch.autograd.grad(y, case.args[0], grads, is_grads_batched=True, retain_graph=True)[0]
    for i, g in enumerate(grads):
        torch.testing.assert_close(batched[i], torch.autograd.grad(y, case.args[0], g, retain_graph=True)[0])


# --- autocast ---


def in_autocast(function, case, dtype):
    args = tuple(
        a.detach().clone(memory_format=torch.preserve_format).requires_grad_(a.requires_grad)
        if isinstance(a, torch.Tensor)
        else a
        for a in case.args
    )
    inputs = {i: a for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.requires_grad}
    with torch.autocast(args[0].device.type, dtype=dtype):
        y = function(*args)
    return y, dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), case.grad.to(y.dtype)), strict=True))


@layouts
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=["x-f32", "x-bf16"])
def test_autocast_conv_bn_act(x_dtype, layout, device):
    case = conv_case(SHAPES["3x3"], torch.float32, layout, device=device, requires_grad=True)
    if x_dtype is torch.bfloat16:
        x = case.args[0].detach().to(x_dtype).requires_grad_()
        case = case._replace(args=(x, *case.args[1:]))
    y, grads = in_autocast(conv_bn_act, case, torch.bfloat16)
    expected, expected_grads = in_autocast(unfused_conv, case, torch.bfloat16)
    assert y.dtype is torch.bfloat16
    # eps of bfloat16 is 2^-7: both sides round the operands, so two eps of the largest value
    torch.testing.assert_close(y.float(), expected.float(), rtol=0, atol=2**-6 * expected.abs().max().item())
    for i, e in expected_grads.items():
        assert grads[i].dtype is case.args[i].dtype
        torch.testing.assert_close(grads[i], e, rtol=0, atol=2**-6 * e.abs().max().item())


@layouts
def test_autocast_casts_no_vector(layout, device):
    """In float32, statistics that bfloat16 cannot hold must be seen as they are."""
    args = list(conv_case(SHAPES["1x1"], torch.bfloat16, layout, residual=False, relu=False, device=device).args)
    args[3], args[4] = torch.full_like(args[3], 1000.25), torch.full_like(args[4], 1000.0)
    args[2], args[5] = torch.ones_like(args[2]), torch.ones_like(args[5])
    with torch.autocast(args[0].device.type, dtype=torch.bfloat16), fused_resnet.backend("reference"):
        y = conv_bn_act(*args)
    plain = unfused_conv(args[0].double(), args[1].double(), *[None] * 4, *args[6:])
    torch.testing.assert_close(
        y.double(), plain / (1 + 1e-3) ** 0.5 + 1000.25 - 1000 / (1 + 1e-3) ** 0.5, rtol=1e-2, atol=1e-2
    )


def test_autocast_leaves_float64_alone():
    case = conv_case(SHAPES["3x3"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = conv_bn_act(*case.args)
    assert y.dtype is torch.float64
    torch.testing.assert_close(y, unfused_conv(*case.args))


def test_autocast_bn_act_follows_x():
    case = bn_case(torch.float32)
    x, *middle, residual, relu, batch_stats = case.args
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = bn_act(x.bfloat16(), *middle, residual, relu, batch_stats)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), unfused_bn(*case.args), rtol=2**-6, atol=2**-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", ["conv_bn_act", "bn_act", "bn_act_conv", "pointwise_bn_act"])
def test_autocast_past_the_dispatcher(op, dtype, monkeypatch):
    """The call that goes to the function itself gives what the dispatcher's gives: values, gradients, their dtypes."""
    given = conv_case(SHAPES["1x1"], torch.float32, residual=op != "bn_act_conv", requires_grad=True)
    x, weight, gamma, beta, mean, var, eps, residual, *places, relu = given.args
    loaded = (x.mean((0, 2, 3)).detach(), x.var((0, 2, 3)).detach(), *torch.ones(2, x.shape[1]).unbind(), eps, True)
    args = {
        "conv_bn_act": given.args,
        "bn_act": bn_case(torch.bfloat16, requires_grad=True).args,
        "bn_act_conv": (x, weight, *loaded, *places, True),
        "pointwise_bn_act": (x, weight, *loaded, gamma, beta, eps, residual, places[0], relu),
    }[op]
    leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    casts = []
    monkeypatch.setitem(ops._casts, op, lambda to, args, cast=ops._casts[op]: casts.append(to) or cast(to, args))

    def results(call):
        with torch.autocast("cpu", dtype=dtype):
            found = call(*args)
            found = found if isinstance(found, tuple) else (found,)
        found[0].float().square().sum().backward()
        gradients = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        return [*found, *gradients]

    for a, b in zip(results(ops.direct(op)), results(getattr(torch.ops.fused_resnet, op)), strict=True):
        assert a.dtype is b.dtype and torch.equal(a, b)
    assert casts == [dtype]  # not by way of the kernel that was registered
    with torch.autocast("cpu", dtype=dtype, enabled=False):
        ops.direct(op)(*args)
    assert casts == [dtype]


# --- update_running_stats_ ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None], ids=lambda m: f"momentum-{m}")
@pytest.mark.parametrize("counted", [True, False], ids=["counted", "not-counted"])
def test_running_statistics_equal_batch_norms(counted, momentum, dtype):
    theirs = nn.BatchNorm2d(3, momentum=momentum, dtype=dtype)
    if not counted:
        theirs.num_batches_tracked = None
    ours = [theirs.running_mean.clone(), theirs.running_var.clone(), theirs.num_batches_tracked]
    ours[2] = None if ours[2] is None else ours[2].clone()
    for n in (5, 1, 3, 2):
        x = torch.randn(n, 3, 7, 9, dtype=dtype) * 3 + 1
        theirs(x)
        update_running_stats_(*ours, *bn_stats(x), n * 63, momentum)
        torch.testing.assert_close(ours[0], theirs.running_mean)
        torch.testing.assert_close(ours[1], theirs.running_var)
        assert ours[2] is None or torch.equal(ours[2], theirs.num_batches_tracked)


# --- memory ---


def bytes_saved(function, *args) -> int:
    """Bytes of distinct memory that autograd keeps for backward, besides the arguments themselves."""
    known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
    kept: dict[int, int] = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in known:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function(*args)
    assert y.requires_grad
    return sum(kept.values())


@layouts
def test_raw_convolution_is_not_kept(layout, device):
    args = conv_case(SHAPES["3x3"], torch.float32, layout, device=device, requires_grad=True).args
    y = unfused_conv(*args)
    # The output, for the ReLU's mask, and a copy of the two running statistics, which a training step may change.
    assert bytes_saved(conv_bn_act, *args) == (y.numel() + 2 * y.shape[1]) * 4
    assert bytes_saved(unfused_conv, *args) >= 2 * y.numel() * 4


@pytest.mark.parametrize("batch_stats", [True, False], ids=["batch", "frozen"])
def test_batch_norm_keeps_its_input_and_its_output(batch_stats, device):
    args = bn_case(torch.float32, batch_stats=batch_stats, device=device, requires_grad=True).args
    statistics = 0 if batch_stats else 2 * args[0].shape[1]
    assert bytes_saved(bn_act, *args) == (args[0].numel() + statistics) * 4
    assert bytes_saved(bn_act, *args[:-2], False, batch_stats) == statistics * 4


def test_no_map_is_kept_without_relu(device):
    args = conv_case(SHAPES["3x3"], torch.float32, device=device, requires_grad=True, relu=False).args
    assert bytes_saved(conv_bn_act, *args) == 2 * args[1].shape[0] * 4


# --- compilation ---


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "compiler, layout",
    [("aot_eager", "contiguous"), ("aot_eager", "channels_last"), ("inductor", "channels_last")],
)
def test_compiled_conv_bn_act(compiler, layout, fresh_compiler):
    case = conv_case(SHAPES["3x3"], torch.float32, layout, requires_grad=True)
    inputs = [a for a in case.args if isinstance(a, torch.Tensor) and a.requires_grad]

    def call(x, weight, bn_weight, bn_bias, mean, var, residual):
        return functional.conv_bn_act(x, weight, bn_weight, bn_bias, mean, var, 1e-3, residual, padding=1)

    tensors = [a for a in case.args if isinstance(a, torch.Tensor)]
    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    y, expected = compiled(*tensors), call(*tensors)
    torch.testing.assert_close(y, expected)
    assert y.stride() == expected.stride()
    for a, b in zip(
        torch.autograd.grad(y, inputs, case.grad), torch.autograd.grad(expected, inputs, case.grad), strict=True
    ):
        torch.testing.assert_close(a, b)
        assert a.stride() == b.stride()


@pytest.mark.parametrize(
    "train, compiler",
    [(True, "aot_eager"), (False, "aot_eager"), (True, "inductor")],
    ids=["train", "eval", "train-inductor"],
)
def test_compiled_block_does_not_recompile_at_a_second_batch_size(train, compiler, fresh_compiler):
    conv, bn = nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5).train(train)
    twin = nn.BatchNorm2d(5).train(train)

    def call(x, bn):
        if train:
            return functional.batch_norm_act(conv(x), bn)
        return functional.conv_bn_act(
            x, conv.weight, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps, padding=1
        )

    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (4, 7, 5):
            x = torch.randn(n, 3, 7, 9)
            torch._dynamo.mark_dynamic(x, 0)
            y, expected = compiled(x, bn), call(x, twin)
            torch.testing.assert_close(y, expected)
            y.sum().backward()
            torch.testing.assert_close(bn.running_var, twin.running_var)
            assert bn.num_batches_tracked.item() == twin.num_batches_tracked.item()


def test_exported_function_equals_eager():
    case = conv_case(SHAPES["3x3"], torch.float32)

    class Net(nn.Module):
        def forward(self, x):
            return conv_bn_act(x, *case.args[1:7], None, *case.args[8:])

    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Net(), (case.args[0],), dynamic_shapes={"x": {0: batch}}, strict=False)
    assert any("fused_resnet.conv_bn_act" in str(node.target) for node in program.graph.nodes)
    x = torch.randn(3, 3, 7, 9)
    torch.testing.assert_close(program.module()(x), Net()(x))
