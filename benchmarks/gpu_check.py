"""make gpu-check PART=smoke|test|sanitize|bench|tune OUT=folder: what a machine with a GPU, and no network, has to say.

    python3 -m benchmarks.gpu_check smoke --out results
    python3 -m benchmarks.gpu_check smoke --out results --dry-run       # the same machinery on a CPU

Each part ends within --minutes (8), does first what tells most, and goes on where it stopped when called again with the
same folder, or with --from an earlier results.jsonl. Cases run in processes of their own that are watched: one that
hangs, crashes or spoils its CUDA context costs that case only. The folder holds at most six files, shared by the parts:
results.jsonl (a line a case, flushed), environment.json, summary.txt, log.txt (the plans are in it), tune.json; and
engine/, what the engine measured, whose files can be copied to fused_resnet/engine/tables/.

Exit status: 0 nothing failed; 1 a case failed; 2 no GPU, or a wrong argument.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.caselog import SPOILT, Log, stands_for
from benchmarks.gpu_report import PARTS, write_summary

ROOT = Path(__file__).resolve().parent.parent
CASE_LIMIT_S = {"smoke": 150, "test": 150, "sanitize": 120, "bench": 200, "tune": 400}
START_LIMIT_S = 120  # importing torch, collecting tests
BUILD_LIMIT_S = 240
# Small ones, our own kernels only; memcheck on all of them before the slower racecheck.
SANITIZED = [
    f"{op}/{backend}/{variant}/{dtype}/channels_last"
    for dtype in ("float16", "float32")
    for op, variant in (
        ("conv_bn_act", "3x3"),
        ("conv_bn_act_bwd", "3x3"),
        ("bn_stats", "batch"),
        ("bn_act", "batch"),
        ("bn_act_bwd", "batch"),
        ("bn_act_bwd_input", "batch"),
        ("bn_act_pool", "pool"),
        ("bn_act_pool_bwd", "pool"),
        ("stem_conv", "stem"),
        ("stem_conv_weight_grad", "stem"),
        ("conv_bn_act_pool", "stem"),
        ("pointwise_bn_act", "expand"),
        ("conv_bn_act", "7x7-stem"),
        ("conv_bn_act", "1x1-stride2"),
    )
    for backend in ("cuda", "triton")
]
SANITIZED[0:0] = [
    f"conv/{name}/float16"
    for name in ("3x3", "3x3-residual", "1x1-segment", "1x1-segment-512", "3x3-many-tiles", "3x3-64")
]
SANITIZED[0:0] = [
    f"chain/{name}/float16"
    for name in ("next-64", "next-128-quarter", "segment-stride2", "several-tiles", "128-many-images")
]
SANITIZED[15:15] = [
    f"engine-op/{op}/float16"
    for op in (
        "conv-3x3",
        "chain-next-quarter",
        "stem-nchw",
        "stem-nchw-even",
        "conv-1x1-segment",
        "chain-segment-stride2",
        "chain-pool",
    )
]


class Part:
    """One part of the check: its log, its clock, and the processes it starts."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.part, self.out = arguments, arguments.part, arguments.out
        self.log = Log(self.out / "results.jsonl", self.part)
        self.deadline = time.time() + 60 * arguments.minutes
        self.case_limit = arguments.case_limit or CASE_LIMIT_S[self.part]
        self.device = "cpu" if arguments.dry_run else "cuda"

    def environment(self, **more: str) -> dict[str, str]:
        """Of the processes: the package from this checkout, and nothing that a terminal or a network would change."""
        path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
        fixed = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        if self.arguments.dry_run and self.part in ("smoke", "sanitize"):
            fixed["TRITON_INTERPRET"] = "1"
        return {**os.environ, **fixed, **more}

    def left(self) -> float:
        return self.deadline - time.time()

    # --- processes ----------------------------------------------------------------------------------------------------

    def start(self, command: list[str], environment: dict[str, str], output=None) -> subprocess.Popen:
        """A process in a group of its own, so that it can be ended with all it started."""
        with (self.out / "log.txt").open("a") as log:
            log.write(f"$ {' '.join(Path(c).name if os.path.isabs(c) else c for c in command)}\n")
            log.flush()
            return subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output or log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    @staticmethod
    def end(process: subprocess.Popen) -> None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()

    def watch(self, command: list[str], environment: dict[str, str]) -> None:
        """Run a process that logs its cases, again and again until it is through: a case that outlasts its limit or
        takes the process down gets its status here, and the next process goes on behind it."""
        while self.left() > 5:
            lines_before = len(self.log.lines())
            process, started = self.start(command, environment), time.time()
            why = None
            while process.poll() is None:
                time.sleep(0.2)
                running, since = self.running(lines_before, started)
                limit = self.case_limit if running else START_LIMIT_S
                # What is cut off by the end of the part gets no status: it runs when the part is resumed.
                if self.left() < 0:
                    self.end(process)
                    return
                if time.time() - since > limit:
                    why = f"ran longer than {limit} s"
                    self.end(process)
            running, since = self.running(lines_before, started)
            new = self.log.lines()[lines_before:]
            if running:
                message = why or f"the process ended with status {process.returncode}"
                status = "timeout" if why else "crashed"
                self.log.write(case=running, status=status, seconds=round(time.time() - since, 1), message=message)
            elif any(line.get("event") in ("finished", "stopped") and line["reason"] != SPOILT for line in new):
                return
            elif not any("status" in line for line in new):
                message = why or f"the process ended with status {process.returncode} before any case; see log.txt"
                self.log.write(case=f"start of {self.part}", status="failed", seconds=0, message=message)
                return

    def running(self, lines_before: int, started: float) -> tuple[str | None, float]:
        """(the case in progress, since when), or (None, since when there is none)."""
        lines = self.log.lines()[lines_before:]
        if lines and lines[-1].get("event") == "start":
            return lines[-1]["case"], self.log.path.stat().st_mtime
        return None, self.log.path.stat().st_mtime if lines else started

    def pytest(self, *options: str, **environment: str) -> None:
        """The suite, or a piece of it, under the plugin that logs every test."""
        steering = {
            "CASELOG_FILE": str(self.log.path.resolve()),
            "CASELOG_PART": self.part,
            "CASELOG_DEADLINE": str(self.deadline),
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.caselog", "-p", "no:cacheprovider"]
        command += ["--continue-on-collection-errors", *options]
        self.watch(command, self.environment(**steering, **environment))

    # --- the parts ----------------------------------------------------------------------------------------------------

    def cases(self, *options: str, share: float = 1.0) -> None:
        """gpu_cases' own of this part, in this share of the time left. What the engine measures is kept in the folder:
        engine/*.json can be copied to fused_resnet/engine/tables/."""
        command = [sys.executable, "-m", "benchmarks.gpu_cases", self.part, "--log", str(self.log.path.resolve())]
        command += ["--deadline", str(time.time() + share * self.left()), "--device", self.device, *options]
        self.watch(command, self.environment(FUSED_RESNET_CACHE=str((self.out / "engine").resolve())))

    def engine(self) -> bool:
        """The engine's cases, in half of the time; whether they are all that was asked for."""
        only = self.arguments.only or []
        if only and only[0].startswith(("engine", "conv", "chain", "train")):
            self.cases("--only", *only)
            return True
        if not only and not self.arguments.dry_run:
            self.cases(share=0.5)
        return False

    def smoke(self) -> None:
        self.cases(*(["--only", *self.arguments.only] if self.arguments.only else []))

    tune = smoke

    def test(self) -> None:
        if self.engine():
            return
        if self.arguments.only:
            return self.pytest(*self.arguments.only, FUSED_RESNET_TEST_DEVICE=self.device)
        for marks in ("gpu and not slow", "not gpu and not slow and not aot"):
            self.pytest("tests", "-m", marks, FUSED_RESNET_TEST_DEVICE=self.device)

    def sanitize(self) -> None:
        tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
        if tool is None and not self.arguments.dry_run:
            self.log.write(case="compute-sanitizer", status="failed", seconds=0, message="it is not installed")
            return
        done = self.log.done()
        for check in ("memcheck", "racecheck"):
            for case in self.sanitized_cases():
                if f"{check}/{case}" in done:
                    continue
                if self.left() < 20:
                    return
                self.sanitized(tool, check, case)

    def sanitized_cases(self) -> list[str]:
        """Those that were asked for; a name that stands for none of SANITIZED is a case of the smoke part."""
        if not self.arguments.only:
            return SANITIZED
        meant = {only: [case for case in SANITIZED if stands_for(only, case)] or [only] for only in self.arguments.only}
        return list(dict.fromkeys(itertools.chain.from_iterable(meant.values())))

    def sanitized(self, tool: str | None, check: str, case: str) -> None:
        """One case of the smoke part under one tool; without the tool, in a dry run, alone."""
        scratch = self.out / "scratch.jsonl"
        scratch.unlink(missing_ok=True)
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu_cases",
            "smoke",
            "--log",
            str(scratch.resolve()),
            "--only",
            case,
        ]
        command += ["--device", self.device]
        if tool:
            leak = ["--leak-check", "no"] if check == "memcheck" else []
            command = [tool, "--tool", check, "--error-exitcode", "66", *leak, *command]
        # Without the caching allocator every tensor ends where its memory ends: one element too far is seen.
        environment = self.environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        start = time.time()
        process = self.start(command, environment, output=subprocess.PIPE)
        try:
            output, _ = process.communicate(timeout=max(1, min(self.case_limit, self.left())))
        except subprocess.TimeoutExpired:
            self.end(process)
            if self.left() <= 1:
                scratch.unlink(missing_ok=True)
                return
            output = None
        inner = Log(scratch, "smoke").done().get(case, {"status": "crashed"})
        scratch.unlink(missing_ok=True)
        summary = [line for line in (output or "").splitlines() if "SUMMARY" in line]
        status = inner["status"]
        if output is None:
            status, inner["message"] = "timeout", f"ran longer than {self.case_limit} s"
        elif process.returncode and status != "skipped":
            status, inner["message"] = "failed", (output or "")[-3000:]
        found = {key: inner[key] for key in ("message", "error") if key in inner}
        seconds = round(time.time() - start, 1)
        self.log.write(case=f"{check}/{case}", status=status, seconds=seconds, summary=summary[-1:], **found)

    def bench(self) -> None:
        if self.engine():
            return None
        models, blocks = "benchmarks/test_bench_models.py", "benchmarks/test_bench_blocks.py"
        if self.arguments.dry_run:
            options = ["--device", "cpu", "--size", "32", "--batches", "2", "--seconds", "0", "--seeds", "1"]
            return self.pytest(blocks, *options, *(self.arguments.only or ["-k", "basic and eval"]))
        compiled, soon = ["-k", "compile"], "--no-compile"
        plan = [
            [models, "--models", "resnet50", "--dtypes", "float16", soon],
            [models, "--models", "resnet50", "--dtypes", "float16", "--batches", "128", *compiled],
            [models, "--models", "resnet18", "--dtypes", "float16", soon],
            [blocks, "--dtypes", "float16", "--batches", "32", soon],
            [models, "--models", "resnet50", "resnet18", "--dtypes", "bfloat16", "--batches", "128", soon],
            [models, "--models", "resnet18", "--dtypes", "float16", "--batches", "128", *compiled],
            [models, "--models", "resnet50", "--dtypes", "float16", "--batches", "1", "32", *compiled],
            [models, "--models", "resnet50", "resnet18", "--dtypes", "bfloat16", "--batches", "1", "32", soon],
            [blocks, "--dtypes", "bfloat16", "--batches", "32", soon],
        ]
        for options in plan:
            self.pytest(*options, "--seconds", "1")


# --- before the parts -------------------------------------------------------------------------------------------------


def without_gpu() -> str | None:
    """Why there is nothing to check here, or None. Asked in another process: this one never touches CUDA."""
    code = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 3)"
    try:
        status = subprocess.run(
            [sys.executable, "-c", code], stdin=subprocess.DEVNULL, timeout=START_LIMIT_S
        ).returncode
    except subprocess.TimeoutExpired:
        return f"PyTorch did not answer in {START_LIMIT_S} s whether it sees a GPU"
    if status == 3:
        return "this machine has no GPU that PyTorch sees; --dry-run tries the machinery on a CPU"
    return f"{Path(sys.executable).name} cannot import torch" if status else None


def build(part: Part) -> None:
    """The compiled ops, where they are not there yet; without them their backend is absent, with its reason."""
    if (ROOT / "fused_resnet" / "libfused_resnet_ops.so").exists():
        return
    jobs = {"MAX_JOBS": os.environ.get("MAX_JOBS", str(os.cpu_count()))}
    process = part.start([sys.executable, "setup.py", "build_ext", "--inplace"], part.environment(**jobs))
    try:
        process.wait(timeout=BUILD_LIMIT_S)
    except subprocess.TimeoutExpired:
        part.end(process)
    if process.returncode:
        message = f"the build ended with status {process.returncode}; see log.txt"
        part.log.write(case="build", status="failed", seconds=0, message=message)


def describe(part: Part) -> None:
    """environment.json: versions, devices, which backend serves what, build facts."""
    code = "import json; from fused_resnet import doctor; print(json.dumps(doctor.report(), indent=1))"
    process = part.start([sys.executable, "-c", code], part.environment(), output=subprocess.PIPE)
    try:
        output, _ = process.communicate(timeout=START_LIMIT_S)
    except subprocess.TimeoutExpired:
        part.end(process)
        output = ""
    # Libraries may print before the object does.
    text = output[output.find("{") :] if "{" in output else json.dumps({"failed": output[-2000:]})
    (part.out / "environment.json").write_text(text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="gpu-check", description="make gpu-check PART=smoke|test|sanitize|bench|tune OUT=folder"
    )
    parser.add_argument("part", metavar="PART", choices=PARTS, help=", ".join(PARTS))
    parser.add_argument("--out", required=True, help="folder of the results")
    parser.add_argument("--from", dest="earlier", type=Path, metavar="FILE", help="go on from this results.jsonl")
    parser.add_argument("--minutes", type=float, default=8.0, help="the part ends within this; default: 8")
    parser.add_argument("--case-limit", type=float, metavar="SECONDS", help="a case that takes longer is ended")
    cases = (
        "these cases only, by name, by its beginning up to a '/', or as chain*; test, bench: pytest's options as well"
    )
    parser.add_argument("--only", type=shlex.split, metavar="CASES", help=cases)
    parser.add_argument("--dry-run", action="store_true", help="the same machinery on a CPU, with small cases")
    arguments = parser.parse_args(argv)
    if not arguments.out:
        parser.error("argument --out: give a folder: make gpu-check PART=... OUT=folder")
    arguments.out = Path(arguments.out)
    if arguments.earlier and not arguments.earlier.is_file():
        parser.error(f"argument --from: {arguments.earlier} is not a file")
    if not arguments.dry_run and (reason := without_gpu()):
        print(f"gpu-check: {reason}", file=sys.stderr)
        return 2

    arguments.out.mkdir(parents=True, exist_ok=True)
    results = arguments.out / "results.jsonl"
    if arguments.earlier and not results.exists():
        shutil.copyfile(arguments.earlier, results)
    part = Part(arguments)
    build(part)
    describe(part)
    try:
        getattr(part, part.part)()
    finally:
        write_summary(arguments.out)
    print((arguments.out / "summary.txt").read_text(), end="")
    statuses = {line["status"] for line in part.log.done().values()}
    return int(bool(statuses - {"passed", "skipped"}))


if __name__ == "__main__":
    sys.exit(main())
