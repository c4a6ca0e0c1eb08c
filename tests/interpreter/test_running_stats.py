"""Running statistics after one more batch, as nn.BatchNorm2d has them."""

from __future__ import annotations

import pytest
import torch

from fused_resnet.backends import triton_running

from .common import rand


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [1, 64, 700])
def test_follow(channels, dtype):
    x = rand(3, channels, 2, 3).add(0.5)
    bn = torch.nn.BatchNorm2d(channels, momentum=0.3).double()
    bn.running_mean.copy_(rand(channels, seed=1).to(dtype))
    bn.running_var.copy_(rand(channels, seed=2).abs().to(dtype))
    mean, var, tracked = bn.running_mean.to(dtype), bn.running_var.to(dtype), bn.num_batches_tracked.clone() + 4
    bn.train()(x.double())
    batch_var, batch_mean = torch.var_mean(x, (0, 2, 3), correction=0)
    triton_running._run((mean, var, tracked, batch_mean, batch_var), 18, 0.3)
    rounding = 1e-6 if dtype is torch.float32 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(mean.double(), bn.running_mean, rtol=rounding, atol=rounding)
    torch.testing.assert_close(var.double(), bn.running_var, rtol=rounding, atol=rounding)
    assert tracked == 5


def test_nothing_is_counted_where_nobody_counts():
    mean, var = torch.zeros(3), torch.ones(3)
    triton_running._run((mean, var, None, torch.ones(3), torch.ones(3)), 2, 0.5)
    assert torch.equal(mean, torch.full((3,), 0.5)) and torch.equal(var, torch.full((3,), 1.5))


def test_it_is_compared_before_it_serves(monkeypatch):
    tensors = torch.zeros(5), torch.ones(5), torch.tensor(3), torch.ones(5), torch.ones(5)
    assert triton_running._same(tensors)
    right = triton_running._run
    monkeypatch.setattr(triton_running, "_run", lambda t, n, m: (right(t, n, m), t[1].mul_(1.01)))
    assert not triton_running._same(tensors)
    monkeypatch.setattr(triton_running, "_run", lambda t, n, m: (right(t, n, m), t[2].add_(1)))
    assert not triton_running._same(tensors)
