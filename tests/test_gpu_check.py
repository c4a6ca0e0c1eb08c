"""gpu-check on a machine without a GPU: its message, and the machinery of every part in a dry run on the CPU."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_cases, gpu_check, gpu_report
from benchmarks.caselog import Log
from fused_resnet import measure

ROOT = Path(__file__).resolve().parent.parent
CASES = ["bn_stats/cpu/batch/float32/channels_last", "bn_act/cpu/batch/float16/contiguous"]
FILES = {"results.jsonl", "environment.json", "summary.txt", "log.txt", "tune.json"}
DRY = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def check(*argv, environment=None, timeout=240):
    """The command's answer; `environment` is added to this process's."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", *map(str, argv)]
    env = {**os.environ, **DRY, **(environment or {})}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)


def lines(out, part):
    found = [json.loads(text) for text in (out / "results.jsonl").read_text().splitlines()]
    return [line for line in found if line["part"] == part]


def statuses(out, part):
    return {line["case"]: line["status"] for line in lines(out, part) if "status" in line}


def test_without_a_gpu_it_says_so_in_one_sentence(tmp_path):
    answer = check("smoke", "--out", tmp_path / "out")
    assert answer.returncode == 2
    assert (
        answer.stderr
        == "gpu-check: this machine has no GPU that PyTorch sees; --dry-run tries the machinery on a CPU\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["everything", "--out", "x"], "argument PART: invalid choice: 'everything'"),
        (["smoke", "--out", ""], "argument --out: give a folder"),
        (["smoke", "--out", "x", "--from", "/nonexistent"], "argument --from: /nonexistent is not a file"),
    ],
    ids=["part", "out", "from"],
)
def test_wrong_arguments_are_named(argv, words):
    answer = check(*argv)
    assert answer.returncode == 2
    assert words in answer.stderr


def test_smoke_writes_a_line_a_case_and_goes_on_where_it_stopped(tmp_path):
    first = check("smoke", "--dry-run", "--out", tmp_path / "a", "--only", CASES[0])
    assert first.returncode == 0, first.stdout + first.stderr
    assert statuses(tmp_path / "a", "smoke") == {CASES[0]: "passed"}
    second = check(
        *("smoke", "--dry-run", "--out", tmp_path / "b", "--from", tmp_path / "a" / "results.jsonl"),
        *("--only", " ".join(CASES)),
    )
    assert second.returncode == 0
    assert second.stdout == "== smoke: 2 passed\n"
    starts = [line["case"] for line in lines(tmp_path / "b", "smoke") if line.get("event") == "start"]
    assert starts == CASES  # the first one from the file, the second one run now
    assert {path.name for path in (tmp_path / "b").iterdir()} == FILES - {"tune.json"}
    environment = json.loads((tmp_path / "b" / "environment.json").read_text())
    assert environment["environment"]["torch"] == torch.__version__


@pytest.mark.slow
def test_triton_and_the_engine_are_sanitized(tmp_path):
    cases = ["bn_act/triton/batch/float32/channels_last", "engine-op/conv-1x1-segment/float16"]
    assert cases[1] in gpu_check.SANITIZED
    answer = check("sanitize", "--dry-run", "--out", tmp_path, "--only", " ".join(cases))
    assert answer.returncode == 0, answer.stdout + answer.stderr
    tools = ("memcheck", "racecheck")
    assert statuses(tmp_path, "sanitize") == {f"{tool}/{case}": "passed" for tool in tools for case in cases}
    assert {path.name for path in tmp_path.iterdir()} <= FILES


@pytest.mark.slow
def test_tune_writes_a_table_and_times_the_search(tmp_path):
    case, network = "bn_act/n1-c64-14x14/float32", "engine/tune/resnet18/float32/1"
    answer = check("tune", "--dry-run", "--out", tmp_path, "--only", f"{case} {network}")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert {path.name for path in tmp_path.iterdir()} - {"engine"} == FILES  # engine: if there was a choice to keep
    table = json.loads((tmp_path / "tune.json").read_text())
    assert table["schema"] == 1
    timing = table["timings"][case]
    assert set(timing["us"]) == {"cpu", "reference"} and min(timing["us"].values()) > 0
    assert max(timing["error"].values()) < 1e-4
    (found,) = [line for line in lines(tmp_path, "tune") if line.get("case") == network and "status" in line]
    assert found["status"] == "passed" and 0 < found["warm_s"] < 60 and 0 < found["ready_s"] < 300


@pytest.mark.parametrize(
    ("part", "found"),
    [
        pytest.param(
            *("smoke", {"engine/resnet18/float32/off": "torchvision", "engine-op/stem-nchw/float16": "candidates"}),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("test", {"engine/refresh/resnet18": "torchvision", "engine/turns/resnet18": "seconds"}),
            marks=pytest.mark.slow,
        ),
        ("bench", {"engine/speed/resnet18/float32/1": "images_per_s", "engine/cached/resnet18/float32/1": "ready_s"}),
    ],
    ids=["smoke", "test", "bench"],
)
def test_the_engines_cases_run_dry(part, found, tmp_path):
    answer = check(part, "--dry-run", "--out", tmp_path, "--only", " ".join(found))
    assert answer.returncode == 0, answer.stdout + answer.stderr
    told = {line["case"]: line for line in lines(tmp_path, part) if "status" in line}
    assert told.keys() == found.keys()
    assert all(line["status"] == "passed" and found[case] in line for case, line in told.items())
    assert {path.name for path in tmp_path.iterdir()} <= FILES | {"engine"}


@pytest.mark.slow
def test_cases_are_named_by_pattern_too(tmp_path):
    asked = "bn_stats/cpu/batch bn_act/cpu/batch/float32/* bn_act_/nothing"
    answer = check("smoke", "--dry-run", "--out", tmp_path, "--only", asked)
    assert answer.returncode == 1, "one of them stands for nothing"
    told = {line["case"]: line for line in lines(tmp_path, "smoke") if "status" in line}
    missing = told.pop("bn_act_/nothing")
    assert missing["status"] == "failed" and missing["message"] == "no case of smoke has this name"
    assert len(told) > 2 and {case.split("/batch/")[0] for case in told} == {"bn_stats/cpu", "bn_act/cpu"}
    assert all(line["status"] in ("passed", "skipped") for line in told.values())


def test_what_is_asked_of_the_sanitizer():
    def asked(*only):
        return gpu_check.Part.sanitized_cases(SimpleNamespace(arguments=SimpleNamespace(only=list(only))))

    assert asked() == gpu_check.SANITIZED
    assert asked("bn_act_pool") == [c for c in gpu_check.SANITIZED if c.startswith("bn_act_pool/")] and len(
        asked("chain")
    )
    assert asked("bn_act/triton/batch/float32/contiguous") == ["bn_act/triton/batch/float32/contiguous"]
    assert asked("conv/3x3/float16", "conv") == asked("conv")


def test_every_case_of_every_part_has_a_name_of_its_own():
    for part in gpu_cases.PARTS.values():
        for device in ("cpu", "cuda"):
            names = [name for name, _ in part(torch.device(device))]
            assert len(names) == len(set(names))
    names = {name for name, _ in gpu_cases.smoke_cases(torch.device("cuda"))}
    assert set(gpu_check.SANITIZED) <= names


SUITE = """
import os, time

def test_passes(): pass
def test_fails(): assert 1 == 2
def test_hangs(): time.sleep(600)
def test_dies(): os._exit(9)
def test_spoils(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_comes_last(): pass
"""


@pytest.mark.slow
def test_a_case_that_hangs_dies_or_spoils_the_context_costs_that_case_only(tmp_path):
    suite = tmp_path / "test_suite.py"
    suite.write_text(SUITE)
    out = tmp_path / "out"
    answer = check("test", "--dry-run", "--out", out, "--case-limit", "5", "--only", f"{suite} -c {os.devnull}")
    assert answer.returncode == 1
    found = {case.split("::")[-1]: status for case, status in statuses(out, "test").items()}
    assert found == {
        "test_passes": "passed",
        "test_fails": "failed",
        "test_hangs": "timeout",
        "test_dies": "crashed",
        "test_spoils": "failed",
        "test_comes_last": "passed",
    }
    stops = [line["reason"] for line in lines(out, "test") if line.get("event") == "stopped"]
    assert stops == ["the CUDA context is spoilt"]
    assert "assert 1 == 2" in (out / "summary.txt").read_text()
    # Called again, nothing is left to do.
    again = check("test", "--dry-run", "--out", out, "--only", f"{suite} -c {os.devnull}")
    assert again.returncode == 1
    assert statuses(out, "test").keys() == {line["case"] for line in lines(out, "test") if line.get("event") == "start"}


@pytest.mark.slow
def test_a_broken_test_file_is_told(tmp_path):
    suite = tmp_path / "test_suite.py"
    suite.write_text("import nothing_of_that_name\n")
    answer = check("test", "--dry-run", "--out", tmp_path / "out", "--only", f"{suite} -c {os.devnull}")
    assert answer.returncode == 1
    assert "nothing_of_that_name" in (tmp_path / "out" / "summary.txt").read_text()


@pytest.mark.slow
def test_the_part_ends_at_its_deadline_and_is_resumed(tmp_path):
    suite = tmp_path / "test_suite.py"
    suite.write_text("import time, pytest\n@pytest.mark.parametrize('i', range(90))\ndef test(i): time.sleep(1)\n")
    start = time.time()
    check("test", "--dry-run", "--out", tmp_path / "out", "--minutes", "0.4", "--only", f"{suite} -c {os.devnull}")
    assert time.time() - start < 90  # 24 seconds, and the processes before and after
    done = statuses(tmp_path / "out", "test")
    assert 0 < len(done) < 90
    assert set(done.values()) == {"passed"}  # what was cut off has no status, and runs next time


@pytest.mark.slow
def test_bench_logs_what_was_measured(tmp_path):
    only = "-k 'basic-projection and eval and (eager or fused_channels_last)'"
    answer = check("bench", "--dry-run", "--out", tmp_path, "--only", only)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    measured = [line["measured"] for line in lines(tmp_path, "bench") if "measured" in line]
    assert [m["variant"] for m in measured] == ["eager", "fused_channels_last"]
    assert measured[1]["parity"]["ok"]
    assert all(0 < m["p20_ms"] <= m["p50_ms"] <= m["p80_ms"] for m in measured)
    assert "fused_channels_last" in answer.stdout
    assert {path.name for path in tmp_path.iterdir()} <= FILES


@pytest.mark.parametrize("there", [True, False], ids=["library", "no-library"])
def test_the_compiled_ops_are_built_where_they_are_not_there_yet(there, tmp_path, monkeypatch):
    root = tmp_path / "checkout"
    (root / "fused_resnet").mkdir(parents=True)
    (root / "setup.py").write_text("import sys; print('building with', *sys.argv[1:]); sys.exit(3)")
    if there:
        (root / "fused_resnet" / "libfused_resnet_ops.so").write_bytes(b"")
    monkeypatch.setattr(gpu_check, "ROOT", root)
    part = gpu_check.Part(argparse.Namespace(part="smoke", out=tmp_path, minutes=1, case_limit=None, dry_run=True))
    gpu_check.build(part)
    if there:
        assert not (tmp_path / "log.txt").exists() and not part.log.lines()
    else:
        assert "building with build_ext --inplace" in (tmp_path / "log.txt").read_text()
        (line,) = part.log.lines()
        assert line["case"] == "build" and "the build ended with status 3" in line["message"]


def test_the_summary_of_everything_is_a_page(tmp_path):
    """Hundreds of cases, and what a person reads stays short."""
    bench, tune = (Log(tmp_path / "results.jsonl", part) for part in ("bench", "tune"))
    for model in range(8):
        for mode in ("eval", "train"):
            for batch in (1, 32, 128):
                for i, variant in enumerate(measure.VARIANTS):
                    m = {"p50_ms": 1.0 + i, "ratio": 1 + i / 10, "noise": 0.01, "images_per_s": 9.0, "peak_mib": 8.0}
                    case = f"test_bench_models.py::test_model[resnet{model}-float16-{mode}-{batch}-{variant}]"
                    group = f"resnet{model}, {mode}, batch {batch}, float16"
                    bench.write(case=case, status="passed", measured={**m, "variant": variant, "group": group})
    for i in range(150):
        tune.write(case=f"conv_bn_act/{i}/float16", status="passed", op="conv_bn_act", us={"cudnn": 9.0, "triton": 1.0})
    lines = gpu_report.summary(tmp_path).splitlines()
    assert len(lines) <= 80
    (row,) = (line for line in lines if "resnet3, train, batch 32, float16" in line)
    others = len(measure.VARIANTS) - 1
    assert [f"{1 + i / 10:.2f}" for i in range(1, others + 1)] == row.split()[-others - 2 : -2]
    assert any("conv_bn_act" in line and "triton 150" in line for line in lines)


@pytest.mark.slow
def test_make_passes_part_and_folder(tmp_path):
    command = ["make", "--no-print-directory", "gpu-check", f"PYTHON={sys.executable}", "PART=smoke"]
    answer = subprocess.run(
        [*command, f"OUT={tmp_path}"], cwd=ROOT, env={**os.environ, **DRY}, capture_output=True, text=True
    )
    assert answer.returncode == 2
    assert "no GPU that PyTorch sees" in answer.stderr
    arguments = ["ARGS=--dry-run --only bn_stats/cpu/batch/float32/channels_last", f"OUT={tmp_path}"]
    answer = subprocess.run([*command, *arguments], cwd=ROOT, env={**os.environ, **DRY}, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "== smoke: 1 passed" in answer.stdout
