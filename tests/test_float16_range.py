"""Training in 16 bits: gradients that fit the format come out right even where the plain convolution's would not fit,
and that of bn_weight more exact than PyTorch's own composition has it."""

import pytest
import torch

from fused_resnet.backends import cpu, reference

CASES = {
    # pixels of 0 to 255 in a 7x7 stem: sums of 2048 products, large before BN divides by its deviation of 180
    "overflow": dict(size=64, padding=3, pixels=255.0, grad=1.0, var=33000.0),
    # small pixels and gradients, one product a weight: subnormal before BN divides by its deviation of 0.03
    "underflow": dict(size=7, padding=0, pixels=2.0**-8, grad=2.0**-10, var=1e-3),
}


def stem_bwd(size: int, padding: int, pixels: float, grad: float, var: float) -> tuple:
    """Arguments of conv_bn_act_bwd for a 7x7 stem of stride 2, every gradient wanted."""
    x = (torch.rand(2, 3, size, size) * pixels).half()
    weight = (torch.randn(8, 3, 7, 7) * 0.1).half()
    maps = (size + 2 * padding - 7) // 2 + 1
    y = torch.ones(2, 8, maps, maps, dtype=torch.half)
    bn = (torch.ones(8), torch.zeros(8), torch.full((8,), var))
    conv = ([2, 2], [padding, padding], [1, 1], 1, True)
    return (y * grad, y, x, weight, *bn, 1e-5, *conv, [True] * 5)


def check_bn_weight_gradient(backward, dtype: torch.dtype, offset: float) -> None:
    """bn_weight's gradient against float64, beside the error of conv2d, batch_norm in eval mode and ReLU."""
    g = torch.Generator().manual_seed(0)
    x, weight = torch.rand(4, 32, 9, 9, generator=g), torch.randn(16, 32, 3, 3, generator=g) / 17
    x, weight = x.to(dtype).contiguous(memory_format=torch.channels_last), (weight + offset / 144).to(dtype)
    grad = torch.randn(4, 16, 9, 9, generator=g).to(dtype).contiguous(memory_format=torch.channels_last)
    raw = torch.nn.functional.conv2d(x.double(), weight.double(), padding=1)
    var, mean = (s.float() for s in torch.var_mean(raw, (0, 2, 3)))
    gamma, beta = torch.rand(16, generator=g) + 0.5, torch.full((16,), 9.0)  # all of it is above zero

    def eager(wide):
        leaf = gamma.to(wide).requires_grad_()
        y = torch.nn.functional.conv2d(x.to(wide), weight.to(wide), padding=1)
        vectors = (mean.to(wide), var.to(wide), leaf, beta.to(wide))
        y = torch.nn.functional.batch_norm(y, *vectors, False, 0.0, 1e-5).relu()
        y.backward(grad.to(wide))
        return leaf.grad, y.detach()

    expected, y = eager(torch.double)
    assert (y > 0).all()
    own = (eager(dtype)[0].double() - expected).norm() / expected.norm()
    conv = ([1, 1], [1, 1], [1, 1], 1, True)
    found = backward(grad, y.to(dtype), x, weight, gamma, mean, var, 1e-5, *conv, [True] * 5)[2]
    error = (found.double() - expected).norm() / expected.norm()
    assert found.dtype is torch.float32 and error < own and error < 1e-4, (error, own)


@pytest.mark.parametrize("offset", [0.0, 8.0], ids=["centred", "far-from-zero"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_gradient_of_bn_weight_is_exact(dtype, offset):
    check_bn_weight_gradient(cpu.conv_bn_act_bwd, dtype, offset)


@pytest.mark.parametrize("all_of_them", [True, False], ids=["all", "weight-alone"])
@pytest.mark.parametrize("case", CASES)
def test_weight_gradients_stay_in_range(case, all_of_them):
    args = stem_bwd(**CASES[case])
    args = args if all_of_them else (*args[:-1], [True, True, False, True, True])
    wide = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
    found = cpu.conv_bn_act_bwd(*args)
    expected = reference.conv_bn_act_bwd(*wide)
    for name, v, e in zip(("dx", "dweight", "dbn_weight", "dbn_bias", "dresidual"), found, expected, strict=True):
        assert (v is None) == (e is None) == (name == "dbn_weight" and not all_of_them)
        assert v is None or ((v.double() - e).norm() / e.norm()).item() < 2e-3, name
