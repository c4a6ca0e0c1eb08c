"""float16 training: gradients that fit the format come out right even where the plain convolution's would not fit."""

import pytest
import torch

from fused_resnet.backends import cpu, reference

MASK = [True] * 5


def stem(var: float, scale: float):
    """A 7x7 stem on pixels of 0 to 255 scaled by `scale`, its BN's running variance `var`, and a gradient of ones."""
    x = (torch.rand(2, 3, 64, 64) * 255 * scale).half()
    weight = (torch.randn(8, 3, 7, 7) * 0.1).half()
    y = torch.ones(2, 8, 32, 32, dtype=torch.half)
    bn = (torch.ones(8), torch.full((8,), 10.0), torch.full((8,), var))
    return (torch.ones_like(y), y, x, weight, *bn, 1e-5, [2, 2], [3, 3], [1, 1], 1, True, MASK)


@pytest.mark.parametrize(("var", "scale"), [(33000.0, 1.0), (1e-3, 1e-6)], ids=["overflow", "underflow"])
def test_weight_gradients_stay_in_range(var, scale):
    args = stem(var, scale)
    wide = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
    found = cpu.conv_bn_act_bwd(*args)
    expected = reference.conv_bn_act_bwd(*wide)
    for name, v, e in zip(("dx", "dweight", "dbn_weight", "dbn_bias", "dresidual"), found, expected, strict=True):
        assert ((v.double() - e).norm() / e.norm()).item() < 3e-3, name
