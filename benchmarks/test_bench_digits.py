"""A trained network in every way and dtype: how long 360 real images take, and whether a prediction changes."""

import pytest
import torch

from benchmarks import digits


@pytest.mark.parametrize("run", digits.RUNS)
@pytest.mark.parametrize("real_dtype", digits.DTYPES)
def test_trained_network(benchmark, request, run, real_dtype):
    device = torch.device(request.config.getoption("--device"))
    x = digits.images()[0].to(device, getattr(torch, real_dtype)).contiguous(memory_format=torch.channels_last)
    network = digits.RUNS[run](digits.build(), x)
    benchmark.group = f"{digits.MADE['model']['name']} on {len(x)} digits, {real_dtype}"

    def predict():
        with torch.inference_mode():
            return network(x).cpu()

    logits = benchmark.pedantic(predict, warmup_rounds=2, rounds=5)
    benchmark.extra_info["accuracy"] = digits.accuracy(logits)
    assert not digits.differing(logits), "\n".join(digits.differing(logits))
