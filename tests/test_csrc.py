"""The compiled part without a GPU: its symbols, its machine code, its builds, and the fingerprint."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_resnet.backends import cuda
from tests.machine_code import (
    FACTS,
    LIBRARY,
    ROOT,
    is_convolution,
    needs_kernels,
    needs_library,
    resources,
    run,
    sass_archs,
    tool,
    whole_code,
)

# What is missing is missing for a stated reason


def test_reasons_are_stated():
    assert cuda.load() is None or len(cuda.load()) > 10
    if not FACTS.get("cuda"):
        assert len(FACTS["cuda_missing"]) > 10 and cuda.unavailable() == FACTS["cuda_missing"]
    elif not torch.cuda.is_available():
        assert cuda.unavailable() == "needs a CUDA device"
    assert cuda.declines("dropout", torch.zeros(1, 1, 1, 1)) == "has no dropout"
    assert cuda.declines("bn_stats", torch.zeros(1, 1, 1, 1)) == "needs CUDA tensors, got cpu"


def test_module_and_file_tell_the_same_facts():
    module = pytest.importorskip("fused_resnet._C")
    assert module.build_facts() == FACTS
    assert set(FACTS) >= {"version", "torch", "compiler", "nvcc", "archs", "kernels", "cuda", "cuda_missing"}


@pytest.mark.parametrize(
    "archs, capability, expected",
    [
        (["sm_80", "compute_80", "sm_90a"], (8, 0), True),
        (["sm_80", "compute_80", "sm_90a"], (8, 9), True),
        (["sm_80", "compute_80", "sm_90a"], (9, 0), True),
        (["sm_80", "compute_80", "sm_90a"], (12, 0), True),
        (["sm_80", "compute_80", "sm_90a"], (7, 5), False),
        (["sm_90a"], (9, 0), True),
        (["sm_90a"], (10, 0), False),
        (["sm_86"], (8, 0), False),
        (["sm_80"], (9, 0), False),
    ],
)
def test_covers(archs, capability, expected):
    assert cuda.covers(archs, capability) is expected


# Symbols: one library for every Python and for torch >= 2.11


@needs_library
def test_symbols():
    undefined = {s.split("@")[0] for s in re.findall(r" [Uw] (\S+)", run(tool("nm"), "-D", str(LIBRARY)))}
    assert not [s for s in undefined if re.match(r"_?Py[A-Z_]", s)]
    assert not [s for s in undefined if re.match(r"_ZN?K?(3c10|2at|5torch)", s)], "C++ symbols of torch are not stable"
    exported = set((ROOT / "tests" / "data" / "torch_2_11_symbols.txt").read_text().split("\n"))
    needed = {s for s in undefined if re.match(r"(aoti_)?torch_", s)}
    assert needed and needed <= exported, sorted(needed - exported)


@needs_library
def test_exports_no_strong_symbol():
    defined = re.findall(r" ([A-Z]) (\S+)", run(tool("nm"), "-D", "--defined-only", str(LIBRARY)))
    assert not [name for kind, name in defined if kind in "TDBR"]


@needs_library
def test_loads_twice():
    torch.ops.load_library(LIBRARY)
    cuda.load.cache_clear()
    assert cuda.load() is None


@needs_library
def test_messages_hold_no_path_of_the_build_machine():
    assert str(ROOT).encode() not in LIBRARY.read_bytes()


# Machine code


def machine_code(arch):
    """The same without the convolutions."""
    return {name: code for name, code in whole_code(arch).items() if not is_convolution(name)}


@needs_kernels
def test_every_kernel_is_there_for_every_arch():
    assert len(FACTS["kernels"]) == 11
    for arch in sass_archs():
        for kernel in FACTS["kernels"]:
            assert any(kernel in name for name in machine_code(arch)), (arch, kernel)


@needs_kernels
@pytest.mark.parametrize("arch", sass_archs())
def test_no_local_memory(arch):
    assert len(resources(arch)) == len(whole_code(arch))
    for name, (registers, stack, shared, local) in resources(arch).items():
        assert stack == local == 0, name
        if not is_convolution(name):
            blocks, most = (2, 128) if "bn_act_pool" in name else (3, 80)
            assert registers <= most, f"{name}: {blocks} blocks of 256 threads no longer fit a multiprocessor"
            assert shared <= 32 << 10, name
    for name, code in whole_code(arch).items():
        assert not re.search(r"\b(LDL|STL)\b", code), f"{name} spills"


@needs_kernels
@pytest.mark.parametrize("arch", sass_archs())
def test_vector_instances_move_16_bytes(arch):
    vectors = {name: code for name, code in machine_code(arch).items() if re.search(r"<[^,>]+, (\(int\))?[48]\b", name)}
    assert len(vectors) == len([n for n in machine_code(arch) if re.search(r"<[^,>]+, (\(int\))?1\b", n)]) > 0
    for name, code in vectors.items():
        assert "LDG.E.128" in code, name
        if re.search("bn_act(_pool)?_kernel|bwd_input_kernel", name):
            assert "STG.E.128" in code, name


@needs_kernels
@pytest.mark.parametrize("arch", sass_archs())
def test_vector_instances_read_parameters_16_bytes_at_a_time(arch):
    """One channel at a time, they would cost more than the rows where a thread has only a few."""
    kernel = r"(bn_act|bn_act_pool|bn_bwd_input)_kernel<[^,>]+, (\(int\))?[48]\b"
    vectors = {name: code for name, code in machine_code(arch).items() if re.search(kernel, name)}
    assert vectors
    for name, code in vectors.items():
        loads = re.findall(r"\bLDG\.\S+", code)
        assert loads and all(".128" in load for load in loads), (name, loads)


@needs_kernels
@pytest.mark.parametrize("arch", sass_archs())
def test_no_float_atomics(arch):
    for name, code in machine_code(arch).items():
        assert not re.search(r"\b(RED|ATOM|ATOMG|ATOMS)\b", code), name


@needs_kernels
def test_ptx_for_newer_devices():
    listed = run(tool("cuobjdump"), "--list-ptx", "--list-elf", str(LIBRARY))
    for arch in FACTS["archs"]:
        kind, _, number = arch.partition("_")
        assert f"sm_{number}.{'ptx' if kind == 'compute' else 'cubin'}" in listed


# Builds


@pytest.fixture
def checkout(tmp_path):
    """What a build needs, in a folder of its own."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("the package is installed without its sources")
    for needed in ("setuptools", "ninja", "pybind11"):
        pytest.importorskip(needed)
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "fused_resnet").mkdir()
    return tmp_path


def build(checkout, **env):
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    env = {**os.environ, "MAX_JOBS": "2", **env}
    done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)
    facts = checkout / "fused_resnet" / "_build_facts.json"
    return done, json.loads(facts.read_text()) if facts.exists() else None


@pytest.mark.slow
def test_build_without_cuda(checkout):
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    done, facts = build(checkout, FUSED_RESNET_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert facts["ops_library"] and not facts["cuda"] and "FUSED_RESNET_CUDA=0" in facts["cuda_missing"]
    script = """
import sys, torch
torch.ops.load_library(sys.argv[1])
assert torch.ops.fused_resnet_cpu.fingerprint([torch.zeros(3)]).shape == (1, 2)
try:
    torch.ops.fused_resnet_cuda.bn_stats(torch.zeros(1, 1, 1, 1))
except NotImplementedError:
    print("fine")
"""
    library = checkout / "fused_resnet" / LIBRARY.name
    assert run(sys.executable, "-c", script, str(library)).strip() == "fine"
    again, _ = build(checkout, FUSED_RESNET_CUDA="0")
    assert "no work to do" in again.stderr


NOWHERE = {"NVCC": "/nonexistent/nvcc", "CUDA_HOME": "/nonexistent", "CUDA_PATH": "/nonexistent"}


@pytest.mark.parametrize(
    "env, reason",
    [
        pytest.param(NOWHERE, "FUSED_RESNET_CUDA=1, but nvcc was not found", id="no-nvcc"),
        pytest.param({"CXX": "/nonexistent/c++"}, "FUSED_RESNET_CUDA=1, but no C++ compiler", id="no-compiler"),
        pytest.param({"FUSED_RESNET_CUDA": "yes"}, "must be auto, 0 or 1, got 'yes'", id="bad-switch"),
        pytest.param(
            {"FUSED_RESNET_CUDA_ARCHS": "80;hopper"}, "expected numbers such as 80 or 90a, got 'hopper'", id="bad-arch"
        ),
        pytest.param({"FUSED_RESNET_CUTLASS": "/nonexistent"}, "/nonexistent/include has no CUTLASS", id="no-cutlass"),
    ],
)
def test_build_that_must_have_cuda_fails_with_the_reason(checkout, env, reason):
    if torch.version.cuda is None:
        pytest.skip("torch was built without CUDA")
    if env.keys() & {"FUSED_RESNET_CUDA_ARCHS", "FUSED_RESNET_CUTLASS"} and not FACTS.get("cuda"):
        pytest.skip(f"there is no nvcc that would do: {FACTS.get('cuda_missing')}")
    done, _ = build(checkout, **{"FUSED_RESNET_CUDA": "1", **env})
    assert done.returncode != 0 and reason in done.stderr


def test_a_source_distribution_has_all_that_a_build_needs(checkout, tmp_path_factory):
    for name in ("MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    folder = tmp_path_factory.mktemp("sdist")
    command = (sys.executable, "setup.py", "-q", "sdist", "-d", str(folder))
    subprocess.run(command, cwd=checkout, check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert sources | {"setup.py", "pyproject.toml"} <= names


def test_install_without_a_compiler(checkout):
    done, facts = build(checkout, CXX="/nonexistent/c++", FUSED_RESNET_CUDA="auto")
    assert done.returncode == 0, done.stderr
    assert not facts["ops_library"] and "no C++ compiler" in facts["missing"] and "no C++" in facts["cuda_missing"]
    assert not list((checkout / "fused_resnet").glob("*.so"))


def test_a_carried_library_survives_a_machine_without_a_compiler(checkout):
    (checkout / "fused_resnet" / LIBRARY.name).write_bytes(b"built elsewhere")
    done, facts = build(checkout, CXX="/nonexistent/c++", FUSED_RESNET_CUDA="auto")
    assert done.returncode == 0 and facts is None
    assert (checkout / "fused_resnet" / LIBRARY.name).read_bytes() == b"built elsewhere"


# Fingerprint


def fingerprint(*tensors):
    return [tuple(row) for row in torch.ops.fused_resnet_cpu.fingerprint(list(tensors)).tolist()]


# Around the 64-byte step, the 4 KiB block, and the 256 KiB a thread gets.
SIZES = [1, 3, 15, 16, 17, 1023, 1024, 1025, 2048, 5000, 65536 * 3 + 7]


@needs_library
@pytest.mark.parametrize("size", SIZES)
def test_fingerprint_sees_every_bit(size):
    t = torch.randn(size)
    before = fingerprint(t)[0]
    words = t.view(torch.int32)
    at = sorted({0, size // 2, size - 1, *torch.randint(size, (20,)).tolist()})
    for i in at:
        for bit in range(32):
            words[i] ^= 1 << bit if bit < 31 else -(1 << 31)
            after = fingerprint(t)[0]
            assert after[0] != before[0] and after[1] != before[1], "each lane of 64 bits sees it on its own"
            words[i] ^= 1 << bit if bit < 31 else -(1 << 31)
    assert fingerprint(t)[0] == before


@needs_library
def test_fingerprint_sees_position():
    t = torch.randn(8 * 1024)  # 8 blocks
    blocks = list(t.view(8, 1024))
    other = {
        "swapped neighbours": torch.cat([t[1:2], t[0:1], t[2:]]),
        "swapped pairs": torch.cat([t[2:4], t[0:2], t[4:]]),
        "swapped in two blocks": torch.cat([t[1024:1025], t[1:1024], t[0:1], t[1025:]]),
        "swapped blocks": torch.cat([blocks[1], blocks[0], *blocks[2:]]),
        "first and last block": torch.cat([blocks[-1], *blocks[1:-1], blocks[0]]),
        "reversed": t.flip(0),
        "shifted by one": t.roll(1),
        "shifted by a block": t.roll(1024),
        "negated": -t,
        "a zero more": torch.cat([t, torch.zeros(1)]),
        "one less": t[:-1].clone(),
        "permuted": t[torch.randperm(len(t))],
    }
    prints = fingerprint(t, *other.values())
    assert len(set(prints)) == len(prints)
    assert len({lane for row in prints for lane in row}) == 2 * len(prints)


@needs_library
def test_fingerprint_of_zeros_tells_lengths_and_blocks():
    zeros = [torch.zeros(n, dtype=torch.uint8) for n in (0, 1, 63, 64, 65, 4095, 4096, 4097, 8192)]
    one = torch.zeros(8, 4096, dtype=torch.uint8).fill_diagonal_(1)
    prints = fingerprint(*zeros, *one)
    assert len(set(prints)) == len(prints)


@needs_library
def test_fingerprint_sees_shape_layout_and_dtype():
    t = torch.arange(24.0)
    x = t.view(2, 3, 2, 2)
    same_bytes = [t, t.view(4, 6), t.view(6, 4), t.view(4, 6).t(), t.view(torch.int32), x, x.permute(0, 3, 1, 2)]
    prints = fingerprint(*same_bytes)
    assert len(set(prints)) == len(prints)


@needs_library
def test_fingerprint_is_of_the_content_wherever_it_lies():
    content = torch.randn(300_000)
    expected = fingerprint(content)[0]
    before = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for offset in (0, 1, 3, 16):
                shelf = torch.empty(len(content) + offset)
                shelf[offset:] = content
                # alone, and among others, which moves the borders between the threads' shares
                assert fingerprint(shelf[offset:])[0] == expected
                assert fingerprint(torch.ones(70_000), torch.empty(0), shelf[offset:], torch.ones(5))[2] == expected
    finally:
        torch.set_num_threads(before)


@needs_library
def test_fingerprint_of_today_is_the_one_of_yesterday():
    assert fingerprint(torch.arange(5000, dtype=torch.int32)) == [(3397059454027089415, 7653907196721801450)]


@needs_library
def test_fingerprint_is_the_sum_that_is_documented():
    """An independent computation, in Python's integers, of csrc/cpu/hash128.h."""
    mask64, mask32 = (1 << 64) - 1, (1 << 32) - 1

    def splitmix64(seed, index):
        z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & mask64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask64
        return z ^ (z >> 31)

    def multilinear(seed, index, value):
        low, high = splitmix64(seed, 2 * index), splitmix64(seed, 2 * index + 1)
        return low * (value & mask32) + high * (value >> 32)

    seeds = [
        (0x243F6A8885A308D3, 0xA4093822299F31D0, 0x452821E638D01377),
        (0x13198A2E03707344, 0x082EFA98EC4E6C89, 0xBE5466CF34E90C6C),
    ]
    t = torch.randint(-(2**31), 2**31 - 1, (2500,), dtype=torch.int32)
    data = t.numpy().tobytes()
    expected = []
    for block_seed, order_seed, word_seed in seeds:
        words = [len(data), 3, 1, 2500, 1]  # bytes, dtype (int32 is 3), dimensions, size, stride
        total = sum(multilinear(word_seed, i, word) for i, word in enumerate(words))
        for block, start in enumerate(range(0, len(data), 4096)):
            chunk = data[start : start + 4096]
            chunk += bytes(-len(chunk) % 64)
            nh = 0
            for i in range(len(chunk) // 8):
                m, k = int.from_bytes(chunk[8 * i : 8 * i + 8], "little"), splitmix64(block_seed, i)
                nh += ((m & mask32) + (k & mask32) & mask32) * ((m >> 32) + (k >> 32) & mask32)
            total += multilinear(order_seed, block, nh & mask64)
        total &= mask64
        expected.append(total - (1 << 64) if total >> 63 else total)
    assert fingerprint(t) == [tuple(expected)]


@needs_library
@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=9000), st.integers(0, 8999), st.integers(1, 255))
def test_fingerprint_of_any_bytes(data, at, change):
    a = torch.tensor(list(data), dtype=torch.uint8)
    b = a.clone()
    assert fingerprint(a) == fingerprint(b)
    if len(data):
        b[at % len(data)] ^= change
        assert fingerprint(a)[0][0] != fingerprint(b)[0][0] and fingerprint(a)[0][1] != fingerprint(b)[0][1]


@needs_library
@pytest.mark.parametrize(
    "t",
    [
        pytest.param(torch.zeros(4, 4)[:, :2], id="gap"),
        pytest.param(torch.zeros(1).expand(4), id="overlap"),
        pytest.param(torch.zeros(9).as_strided((3, 3), (2, 1)), id="self-overlap"),
        pytest.param(torch.zeros(4, 4)[::2], id="step"),
    ],
)
def test_fingerprint_refuses_what_is_not_dense(t):
    with pytest.raises(RuntimeError, match=r"needs dense tensors, tensors\[1\] has gaps or overlaps"):
        torch.ops.fused_resnet_cpu.fingerprint([torch.zeros(2), t])
    assert cuda.fingerprint([torch.zeros(2), t]) is None


@needs_library
def test_fingerprint_takes_parameters_and_all_dtypes():
    parameter = torch.nn.Parameter(torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last))
    with torch.enable_grad():
        before = cuda.fingerprint([parameter])
    parameter.data.mul_(1.0 + 2**-23)
    assert not torch.equal(before, cuda.fingerprint([parameter]))
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.bool, torch.complex64, torch.int8):
        assert cuda.fingerprint([torch.ones(7, dtype=dtype)]).shape == (1, 2)
    assert cuda.fingerprint([]) is None
