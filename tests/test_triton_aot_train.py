"""The kernels that train without storing a normalised tensor, compiled for GPUs not here.

Runs tests/aot_train.py under each Triton, as tests/test_triton_aot.py does its own script.
"""

from __future__ import annotations

import functools
import os
import re
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

pytest.importorskip("triton")
from test_triton_aot import ROOT, SHARED_KIB, TENSOR_CORE, TRITON_36, told  # noqa: E402

pytestmark = pytest.mark.aot
# Every kind of kernel for two chips; every instance for all chips and Tritons with the slow tests.
RUNS = [pytest.param("installed", arch, True, id=f"few-{arch}") for arch in (80, 90)]
RUNS += [
    pytest.param(version, arch, False, marks=pytest.mark.slow, id=f"{version}-{arch}")
    for version in ("installed", "3.6")
    for arch in SHARED_KIB
]
DOTS = {"_bn_act_conv_fwd_kernel", "_gram_partial_kernel"}


@functools.cache
def pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count()))


@functools.cache
def future(version: str, arch: int, few: bool) -> Future:
    return pool().submit(told, version, "aot_train.py", "--arch", str(arch), *(["--few"] if few else []))


@pytest.fixture
def lines(request, version, arch, few) -> list[dict]:
    """What tests/aot_train.py says of every kernel; what other tests here want is begun as well."""
    if version == "3.6" and not (TRITON_36 / "triton").is_dir():
        pytest.skip(f"no Triton 3.6 in {TRITON_36}")
    for item in request.session.items:
        if item.module is request.module and (item.callspec.params["version"] == "installed" or TRITON_36.is_dir()):
            future(*(item.callspec.params[name] for name in ("version", "arch", "few")))
    return future(version, arch, few).result()


@pytest.mark.parametrize(("version", "arch", "few"), RUNS)
def test_every_kernel_compiles_and_fits(lines, version, arch, few):
    assert not [(i["instance"], i["kernel"]) for i in lines if i["spill_load"] or i["spill_store"]]
    assert not [(i["instance"], i["shared"]) for i in lines if i["shared"] > SHARED_KIB[arch] << 10]
    sources = [(ROOT / "fused_resnet" / "kernels" / f"{name}.py").read_text() for name in ("bn_act_conv", "gram")]
    kernels = {name for text in sources for name in re.findall(r"^def (\w+_kernel)\(", text, re.MULTILINE)}
    assert kernels | {"_bn_stats_merge_kernel"} == {i["kernel"] for i in lines}


@pytest.mark.parametrize(("version", "arch", "few"), RUNS)
def test_every_dot_runs_on_the_tensor_cores(lines, version, arch, few):
    """Of that chip, and rounded where it is TF32."""
    for line in lines:
        if line["kernel"] in DOTS:
            name = line["instance"]
            present = {kind for kind in ("hmma", "wgmma", "tcgen05") if line[kind]}
            assert present == (set() if name.endswith("_ieee") else {TENSOR_CORE[arch]}), name
            assert (line["rounded_to_tf32"] > 0) == name.endswith("_tf32"), name


@pytest.mark.parametrize(("version", "arch", "few"), RUNS)
def test_operands_stream(lines, version, arch, few):
    """Asynchronously, normalised or not; a convolution's result leaves 16 bytes at a time."""
    for line in lines:
        if line["kernel"] in DOTS and not re.search("_odd_|stem", line["instance"]):
            assert line["async_copy"] > 0, line["instance"]
            assert line["store_16_bytes"] > 0, line["instance"]
