"""Builds the compiled parts with ninja: the pybind11 module `_C` (build facts, no torch header) and
`libfused_resnet_ops.so` (the ops: torch's stable ABI, no Python symbol: one file for every Python and torch >= 2.11).

Environment:
  FUSED_RESNET_CUDA        auto (default): CUDA kernels if nvcc is there and fits torch; 0: without; 1: fail without
  FUSED_RESNET_CUDA_ARCHS  default "80;90a": a number as SASS and PTX; with a letter as SASS only, as that PTX runs on
                           nothing newer. Convolutions for Hopper's tensor cores need 90a, and CUTLASS
  FUSED_RESNET_CUTLASS     the folder that has CUTLASS's include/; default: that of the package nvidia-cutlass
  CXX, NVCC, MAX_JOBS      as usual

What was built, and why what is missing is missing, is written to fused_resnet/_build_facts.json.
"""

import importlib.util
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
OPS_LIBRARY = "libfused_resnet_ops.so"
MODULE = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
FACTS = "_build_facts.json"
TORCH_TARGET = "0x020b000000000000"  # the oldest torch whose stable ABI is used: 2.11

CXX_FLAGS = "-std=c++17 -O3 -fPIC -Wall -Wextra -Wno-unused-parameter -fvisibility=hidden -fvisibility-inlines-hidden"
ISA_FLAGS = {
    "isa_base": "",
    "isa_avx2": "-mavx2 -mfma",
    "isa_avx512": "-mavx512f -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512",
}
LINK_FLAGS = "-shared -Wl,--exclude-libs,ALL -Wl,-z,relro,-z,now"
# C7510 and friends are warnings of ptxas that cost a factor: the report is kept beside the object, and a test reads it.
NVCC_FLAGS = (
    "-std=c++17 -O3 -DNDEBUG --expt-relaxed-constexpr -Xptxas -v,-warn-spills -Xfatbin -compress-all "
    "-Xcompiler -fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden,-Wall,-Wno-unknown-pragmas"
)

CUTLASS_AT_LEAST = [4, 2]
# The compiled convolutions: each for float16 and bfloat16, in one translation unit (csrc/conv/*_instance.cu). Hopper's
# take more than a minute each, nearly all of it for CUTLASS's templates, which both dtypes share. Tiles by what bounds
# ResNets: 64 channels (layer1), 128 (layer2), 256 and more; 192 rows, of which the last stages have as many as fill 132
# multiprocessors, at batches of 128 and 256; stream-K for shapes whose tiles do not fill the chip.
SM90 = (  # tile M, N, blocks a cluster along M, along N, schedule
    (128, 64, 2, 1, "pingpong"),
    (128, 128, 2, 1, "pingpong"),
    (192, 128, 1, 2, "pingpong"),
    (192, 128, 2, 1, "pingpong"),  # for 128 channels
    (256, 128, 2, 1, "cooperative"),
    (128, 256, 2, 1, "cooperative"),
    (128, 128, 1, 1, "stream_k"),
)
SPLIT = (1, 2, 4, 8)  # blocks that share the reduction of a tile: for few positions on Hopper, without CUTLASS
SM80 = (  # tile M, N, warps along M, N, stages
    (256, 128, 4, 2, 3),
    (128, 128, 2, 2, 4),
    (128, 64, 2, 2, 4),
    (64, 64, 2, 2, 4),
)
CHAINS = ((64, False), (128, False), (64, True))  # channels of the next convolution, projection segment; for sm_90a
DTYPES = ("half", "bfloat16")  # of each: csrc/conv/instance.h


def output_of(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True)


def find_cxx():
    """The C++ compiler's path, or None."""
    named = os.environ.get("CXX", "").split()
    return next((path for name in (named[:1] or ("c++", "g++", "clang++")) if (path := shutil.which(name))), None)


def cuda_arch_flags(archs):
    """["80", "90a"] -> nvcc's -gencode flags and the list of what ends up in the library."""
    flags, names = [], []
    for arch in archs:
        targets = [f"sm_{arch}"] if arch[-1].isalpha() else [f"sm_{arch}", f"compute_{arch}"]
        flags.append(f"-gencode arch=compute_{arch},code=[{','.join(targets)}]")
        names += targets
    return " ".join(flags), names


def find_cuda(torch):
    """(nvcc, toolkit folder, nvcc version), or the reason why the CUDA kernels are left out."""
    if os.environ.get("FUSED_RESNET_CUDA", "auto") == "0":
        return "FUSED_RESNET_CUDA=0 was set when the package was built"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    nvcc = shutil.which(os.environ.get("NVCC", "nvcc"))
    if nvcc is None:
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
        nvcc = shutil.which(str(Path(home, "bin", "nvcc")))
    if nvcc is None:
        return "nvcc was not found when the package was built"
    try:
        version = re.search(r"release [\d.]+, V([\d.]+)", output_of(nvcc, "--version").stdout).group(1)
        # nvcc may be a shim in another folder: only nvcc itself knows where its toolkit lies.
        dryrun = output_of(nvcc, "-v", "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull)
        top = re.search(r"^#\$ TOP=(.+)$", dryrun.stdout + dryrun.stderr, re.MULTILINE).group(1)
    except (subprocess.CalledProcessError, OSError, AttributeError) as error:
        return f"nvcc did not answer when the package was built ({type(error).__name__}: {error})"
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc {version} does not fit torch {torch.__version__}, which uses CUDA {torch.version.cuda}"
    return nvcc, Path(top).resolve(), version


def find_cutlass():
    """(folder of CUTLASS's headers, version), or the reason why there is none."""
    named = os.environ.get("FUSED_RESNET_CUTLASS")
    if named:
        include = Path(named, "include")
    else:
        spec = importlib.util.find_spec("cutlass_library")  # not imported: it would want what it does not need here
        if spec is None or not spec.submodule_search_locations:
            return "CUTLASS was not found when the package was built (pip install --no-deps nvidia-cutlass)"
        include = Path(spec.submodule_search_locations[0], "source", "include")
    version = include / "cutlass" / "version.h"
    if not version.exists():
        return f"{include} has no CUTLASS"
    found = [int(re.search(rf"CUTLASS_{part} (\d+)", version.read_text()).group(1)) for part in ("MAJOR", "MINOR")]
    if found < CUTLASS_AT_LEAST:
        return f"CUTLASS {found[0]}.{found[1]} is too old, {CUTLASS_AT_LEAST[0]}.{CUTLASS_AT_LEAST[1]} is needed"
    return include, f"{found[0]}.{found[1]}"


class Unit(NamedTuple):
    """A translation unit of compiled convolutions or chains (csrc/conv/*_instance.cu): one kernel in each dtype."""

    name: str
    source: str
    targets: str  # nvcc's -gencode
    macros: dict
    more: str = ""

    @property
    def symbols(self):
        return [f"{self.name}_{dtype}" for dtype in DTYPES]

    @property
    def flags(self):
        macros = {"UNIT": self.name, **self.macros}
        quoted = {k: f"'\"{v}\"'" if k == "NAME" else v for k, v in macros.items()}
        return " ".join([self.targets, *[f"-DFUSED_RESNET_{k}={v}" for k, v in quoted.items()], self.more])


def convolutions(archs, cutlass):
    """What to compile, and why some are left out, if any are."""
    found, missing = [], []
    targets = cuda_arch_flags(["90a"])[0]
    if "90a" not in archs:
        missing.append("no convolutions for sm_90a: FUSED_RESNET_CUDA_ARCHS does not name 90a")
    elif isinstance(cutlass, str):
        missing.append(f"no convolutions for sm_90a: {cutlass}")
    else:
        for m, n, along_m, along_n, schedule in SM90:
            shares = " 1x2" if along_n > 1 else ""
            macros = dict(TILE_M=m, TILE_N=n, CLUSTER_M=along_m, CLUSTER_N=along_n, SCHEDULE=schedule)
            macros["NAME"] = f"sm90 {m}x{n}x64 {schedule.replace('_', '-')}{shares}"
            more = f"-isystem {cutlass[0]}"
            if schedule != "stream_k":  # whose scheduler does not compile with it, in CUTLASS 4.2
                # They wait for the kernel before them by themselves, and let the next one begin.
                more += " -DCUTLASS_ENABLE_GDC_FOR_SM90"
            name = f"kSm90_{m}x{n}_{schedule}{shares.replace(' ', '_')}"
            found.append(Unit(name, "sm90_instance.cu", targets, macros, more))
    if "90a" in archs:
        for splits in SPLIT:
            macros = dict(SPLITS=splits, NAME=f"sm90 64x64x64 split {splits}")
            found.append(Unit(f"kSm90_split{splits}", "split_instance.cu", targets, macros))
        found.append(Unit("kSm90_lines", "lines_instance.cu", targets, dict(NAME="sm90 lines 64 -> 64")))
    others = [arch for arch in archs if int(re.match(r"\d+", arch).group()) >= 80 and arch != "90a"]
    if not others:
        missing.append("no convolutions for sm_80: FUSED_RESNET_CUDA_ARCHS names no such architecture")
    for m, n, warps_m, warps_n, stages in SM80 if others else ():
        macros = dict(TILE_M=m, TILE_N=n, WARPS_M=warps_m, WARPS_N=warps_n, STAGES=stages, NAME=f"sm80 {m}x{n}x32")
        found.append(Unit(f"kSm80_{m}x{n}", "sm80_instance.cu", cuda_arch_flags(others)[0], macros))
    return found, "; ".join(missing) or None


def chains(archs):
    """The chained bottlenecks, as convolutions() has them."""
    if "90a" not in archs:
        return []
    found, targets = [], cuda_arch_flags(["90a"])[0]
    for kernel, (following, segment) in itertools.product(("Chain", "ChainLines"), CHAINS):
        by = " by lines" if kernel == "ChainLines" else ""
        name = f"sm90 chain{by} 64 -> 256 -> {following}{' + projection' if segment else ''}"
        macros = dict(KERNEL=f"{kernel}Sm90", FOLLOWING=following // 64, SEGMENT=str(segment).lower(), NAME=name)
        unit = f"k{kernel}_{following}{'_segment' if segment else ''}"
        found.append(Unit(unit, "chain_instance.cu", targets, macros))
    macros = dict(NAME="sm90 chain by lines 128 -> 512 -> 128")
    return [*found, Unit("kChainStream", "chain_stream_instance.cu", targets, macros)]


def reports_of(text):
    """What ptxas said of a unit's instances, in the order of DTYPES: registers a thread by architecture, and warnings
    (spills, serialised wgmma)."""
    compiled = re.findall(r"Compiling entry function '(\S+)' for '(\w+)'.*?Used (\d+) registers", text, re.DOTALL)
    warnings = re.findall(r"^ptxas.*(?:warning|Potential Performance Loss).*$", text, re.MULTILINE)

    def is_of(dtype, mangled):
        return ("bfloat16" in mangled) == (dtype == "bfloat16")

    return [
        {
            "registers": {arch: int(count) for name, arch, count in compiled if is_of(dtype, name)},
            "warnings": [w for w in warnings if "function" not in w or is_of(dtype, w)],
        }
        for dtype in DTYPES
    ]


def isa_flags(stem):
    """Compiler flags of a source; None where isa_<instruction set>.cpp is not for this machine's architecture."""
    if not stem.startswith("isa_"):
        return ""
    if stem != "isa_base" and platform.machine().lower() not in ("x86_64", "amd64"):
        return None
    # -Wno-psabi: vectors wider than the baseline's are passed between functions of one file only.
    return f"-ffp-contract=fast -Wno-psabi {ISA_FLAGS[stem]}"


def kernel_names():
    sources = "".join(path.read_text() for path in sorted((ROOT / "csrc" / "kernels").glob("*.cuh")))
    return re.findall(r"__global__[^;{]*?\b(\w+_kernel)\(", sources)


def write_if_changed(path, text):
    """Keeps the time stamp of a file that says the same, so that ninja builds nothing."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


class NinjaFile:
    """A build.ninja in the making."""

    def __init__(self):
        self.lines = []

    def rule(self, name, command, **variables):
        self.lines += [f"rule {name}", f"  command = {command}"]
        self.lines += [f"  {key} = {value}" for key, value in {"description": f"{name} $out", **variables}.items()]

    def build(self, out, rule, sources, implicit=(), **variables):
        inputs = " ".join(str(source).replace(" ", "$ ").replace(":", "$:") for source in sources)
        extra = " | " + " ".join(str(path) for path in implicit) if implicit else ""
        self.lines.append(f"build {out}: {rule} {inputs}{extra}")
        self.lines += [f"  {key} = {value}" for key, value in variables.items()]

    def text(self):
        return "ninja_required_version = 1.5\n" + "\n".join(self.lines) + "\n"


class BuildExt(build_ext):
    """Builds with ninja in build/ninja, which outlives pip's own folders; copies the results beside the package."""

    def run(self):
        target = ROOT / "fused_resnet" if self.inplace else Path(self.build_lib, "fused_resnet").resolve()
        target.mkdir(parents=True, exist_ok=True)
        if platform.system() == "Linux":
            built = self.compile(ROOT / "build" / "ninja")
        else:
            built = self.nothing_but(f"compiled ops are built on Linux only, this is {platform.system()}")
        if not built["ops_library"] and (target / OPS_LIBRARY).exists():
            return  # a library that another machine built, carried here with its facts: all this machine has
        for file in built.pop("files"):
            # A new file, not new contents: a process that runs keeps the library it has mapped.
            (target / file.name).unlink(missing_ok=True)
            shutil.copy2(file, target / file.name)
        (target / FACTS).write_text(json.dumps(built, indent=2) + "\n")

    def get_outputs(self):
        folder = Path(self.build_lib, "fused_resnet")
        return [] if self.inplace else [str(folder / name) for name in (FACTS, MODULE, OPS_LIBRARY)]

    def get_output_mapping(self):
        return {}

    def facts(self, **more):
        import torch

        return {
            "version": self.distribution.get_version(),
            "torch": str(torch.__version__),
            "torch_cuda": torch.version.cuda,
            "python": platform.python_version(),
            "platform": sysconfig.get_platform(),
            "compiler": None,
            "nvcc": None,
            "archs": [],
            "kernels": [],
            "ops_library": False,
            "missing": None,
            "cuda": False,
            "cuda_missing": None,
            "cutlass": None,
            "conv": [],
            "chain": [],
            "conv_missing": None,
            **more,
        }

    def nothing_but(self, reason):
        if os.environ.get("FUSED_RESNET_CUDA", "auto") == "1":
            raise CompileError(f"FUSED_RESNET_CUDA=1, but {reason}")
        print(f"fused_resnet: no compiled ops: {reason}")
        return self.facts(missing=reason, cuda_missing=reason, files=[])

    def compile(self, folder):
        import pybind11
        import torch

        switch = os.environ.get("FUSED_RESNET_CUDA", "auto")
        if switch not in ("auto", "0", "1"):
            raise CompileError(f"FUSED_RESNET_CUDA must be auto, 0 or 1, got {switch!r}")
        cxx = find_cxx()
        if cxx is None:
            return self.nothing_but("no C++ compiler was found when the package was built")
        cuda = find_cuda(torch)
        if isinstance(cuda, str) and switch == "1":
            raise CompileError(f"FUSED_RESNET_CUDA=1, but {cuda}")

        torch_dir = Path(torch.__file__).parent
        # __FILE__ in a message says csrc/..., not where this machine keeps its files.
        prefix_map = f"-ffile-prefix-map={ROOT}=. -ffile-prefix-map={torch_dir}=torch"
        stable = f"-isystem {torch_dir / 'include'} -DTORCH_TARGET_VERSION={TORCH_TARGET} -DUSE_CUDA"
        facts = self.facts(compiler=output_of(cxx, "--version").stdout.splitlines()[0], ops_library=True)

        n = NinjaFile()
        depfile = {"depfile": "$out.d", "deps": "gcc"}
        n.rule("cxx", f"{cxx} -MMD -MF $out.d {CXX_FLAGS} {prefix_map} $flags -c $in -o $out", **depfile)
        n.rule("link", f"{cxx} {LINK_FLAGS} $in $flags -o $out")
        objects = [
            self.object(n, source, f"{stable} {isa_flags(source.stem)}")
            for source in sorted((ROOT / "csrc" / "cpu").rglob("*.cpp"))
            if isa_flags(source.stem) is not None
        ]
        # libtorch.so stands for libtorch_cpu and, where torch has CUDA, libtorch_cuda.
        link = f"-L{torch_dir / 'lib'} -Wl,--no-as-needed -ltorch -Wl,--as-needed"
        if isinstance(cuda, str):
            facts["cuda_missing"] = cuda
            objects.append(self.object(n, ROOT / "csrc" / "ops.cpp", stable))
        else:
            nvcc, toolkit, facts["nvcc"] = cuda
            archs = os.environ.get("FUSED_RESNET_CUDA_ARCHS", "80;90a").replace(",", ";").split(";")
            archs = [arch.strip() for arch in archs if arch.strip()]
            for arch in archs:
                if not re.fullmatch(r"\d{2,3}[af]?", arch):
                    raise CompileError(f"FUSED_RESNET_CUDA_ARCHS: expected numbers such as 80 or 90a, got {arch!r}")
            gencode, facts["archs"] = cuda_arch_flags(archs)
            cutlass = find_cutlass()
            if isinstance(cutlass, str) and switch == "1" and "90a" in archs:
                raise CompileError(f"FUSED_RESNET_CUDA=1, but {cutlass}")
            instances, facts["conv_missing"] = convolutions(archs, cutlass)
            chained = chains(archs)
            facts.update(cuda=True, kernels=kernel_names(), cutlass=None if isinstance(cutlass, str) else cutlass[1])
            host = f"-ccbin {cxx} -Xcompiler {','.join(prefix_map.split())}"
            # ptxas speaks on stderr; its report stays beside the object, and is shown when the compilation fails.
            report = "> $out.ptxas.txt 2>&1 || (cat $out.ptxas.txt; exit 1)"
            n.rule(
                "nvcc",
                f"{nvcc} {host} -MMD -MF $out.d {NVCC_FLAGS} $flags -c $in -o $out {report}",
                **depfile,
            )
            for unit in instances + chained:
                objects.append(self.object(n, ROOT / "csrc" / "conv" / unit.source, unit.flags, unit.name))
            objects += [self.object(n, s, f"{gencode} {stable} -I.") for s in sorted((ROOT / "csrc").glob("*.cu"))]
            objects.append(self.object(n, ROOT / "csrc" / "ops.cpp", f"{stable} -DFUSED_RESNET_WITH_CUDA"))
            link += f" -L{toolkit / 'lib64'} -L{toolkit / 'lib'} -lcudart_static -lrt -lpthread -ldl"
        n.build(OPS_LIBRARY, "link", objects, flags=link)

        folder.mkdir(parents=True, exist_ok=True)
        if facts["cuda"]:
            lines = [
                " ".join([f"#define FUSED_RESNET_{name}(X)", *[f"X({s})" for unit in listed for s in unit.symbols]])
                for name, listed in (("INSTANCES", instances), ("CHAINS", chained))
            ]
            write_if_changed(folder / "conv_instances.h", "\n".join(lines) + "\n")
        include = f"-isystem {pybind11.get_include()} -isystem {sysconfig.get_paths()['include']} -I."
        n.build(MODULE, "link", [self.object(n, ROOT / "csrc" / "module.cpp", include)], flags="")
        write_if_changed(folder / "build.ninja", n.text())

        self.ninja(folder, OPS_LIBRARY)
        if facts["cuda"]:
            for key, listed in (("conv", instances), ("chain", chained)):
                facts[key] = self.instances(folder, key, listed)
        literal = f'R"json({json.dumps(facts)})json"'
        write_if_changed(folder / "build_facts.h", f"#pragma once\nconst char kBuildFacts[] = {literal};\n")
        self.ninja(folder, MODULE)
        if facts["cuda_missing"]:
            print(f"fused_resnet: no CUDA kernels: {facts['cuda_missing']}")
        elif facts["conv_missing"]:
            print(f"fused_resnet: {facts['conv_missing']}")
        return {**facts, "files": [folder / OPS_LIBRARY, folder / MODULE]}

    @staticmethod
    def ninja(folder, target):
        import ninja

        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        command = [str(Path(ninja.BIN_DIR, "ninja")), "-C", str(folder), *jobs, target]
        if subprocess.run(command, stdout=sys.stderr).returncode:
            raise CompileError("ninja failed; the compiler's words stand above")

    @staticmethod
    def instances(folder, key, units):
        """What the library says of its convolutions or chains, and ptxas of their registers."""
        import torch

        try:
            torch.ops.load_library(folder / OPS_LIBRARY)
        except OSError as error:  # built for another machine than this
            print(f"fused_resnet: what was compiled is not listed: {error}")
            return []
        listed = json.loads(bytes(getattr(torch.ops.fused_resnet_cuda, f"{key}_instances")().tolist()))
        reports = [report for unit in units for report in reports_of((folder / f"{unit.name}.o.ptxas.txt").read_text())]
        return [{**instance, **report} for instance, report in zip(listed, reports, strict=True)]

    @staticmethod
    def object(n, source, flags, name=None):
        out = f"{name or source.relative_to(ROOT / 'csrc').as_posix().replace('/', '.')}.o"
        n.build(out, "nvcc" if source.suffix == ".cu" else "cxx", [source], flags=flags)
        return out


setup(ext_modules=[Extension("fused_resnet._C", sources=[])], cmdclass={"build_ext": BuildExt})
