"""float16 training: gradients that fit the format come out right even where the plain convolution's would not fit."""

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


@pytest.mark.parametrize("case", CASES)
def test_weight_gradients_stay_in_range(case):
    args = stem_bwd(**CASES[case])
    wide = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
    found = cpu.conv_bn_act_bwd(*args)
    expected = reference.conv_bn_act_bwd(*wide)
    for name, v, e in zip(("dx", "dweight", "dbn_weight", "dbn_bias", "dresidual"), found, expected, strict=True):
        assert ((v.double() - e).norm() / e.norm()).item() < 2e-3, name
