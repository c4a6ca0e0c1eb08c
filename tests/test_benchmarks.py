"""The benchmarks' machinery: the suites collect and run, parity fails them, and the README says what the JSON says."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_resnet import backends, measure
from fused_resnet.backends import triton

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # unlike `python -m pytest`, `pytest` does not look into the checkout
lesson = importlib.import_module("benchmarks.lesson")
record = importlib.import_module("benchmarks.record")
table = importlib.import_module("benchmarks.table")
TINY = ["--device", "cpu", "--size", "32", "--batches", "2", "--seconds", "0", "--seeds", "1"]


def pytest_benchmarks(*options, **environment):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    # Of a parallel run of tests: pytest-benchmark measures nothing in one.
    outer = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    env = {**outer, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_every_block_model_mode_and_variant_is_collected():
    answer = pytest_benchmarks("benchmarks", "--device", "cpu", "--collect-only")
    assert answer.returncode == 0, answer.stdout
    for block in ("basic", "basic-projection-stride2", "bottleneck", "bottleneck-projection-stride2"):
        assert f"test_block[fused-8-train-float32-{block}]" in answer.stdout
    for model in ("resnet18", "resnet50"):
        for variant in measure.variants_of(torch.device("cpu"), train=False, compiled=True):
            assert f"test_model[{variant}-1-eval-float32-{model}]" in answer.stdout
    assert "captured" not in answer.stdout
    on_a_gpu = pytest_benchmarks("benchmarks", "--device", "cuda", "--no-compile", "--collect-only").stdout
    assert "test_model[compile" in answer.stdout and "test_model[compile" not in on_a_gpu
    assert "[fused_captured-128-train-float16-resnet50]" in on_a_gpu
    assert "[fused_captured-128-eval-" not in on_a_gpu and "[fused-128-eval-" in on_a_gpu


def test_a_benchmark_notes_speed_parity_and_environment(tmp_path):
    path = tmp_path / "bench.json"
    chosen = ["benchmarks/test_bench_blocks.py", "-k", "basic-projection and train and (fused_channels_last or eager)"]
    answer = pytest_benchmarks(*chosen, *TINY, "--benchmark-json", str(path))
    assert answer.returncode == 0, answer.stdout
    assert "speed relative to eager" in answer.stdout
    result = json.loads(path.read_text())
    assert "node" not in result["machine_info"]
    assert result["machine_info"]["fused_resnet"]["torch"]
    by_variant = {b["extra_info"]["variant"]: b["extra_info"] for b in result["benchmarks"]}
    assert set(by_variant) == {"eager", "fused_channels_last"}
    fused = by_variant["fused_channels_last"]
    assert 0 < fused["p20_ms"] <= fused["p50_ms"] <= fused["p80_ms"]
    assert fused["timed_by"] == "clock"
    assert set(fused["parity"]["nearest"]) == {"output", "gradient", "buffer"}
    assert {"ratio", "noise", "peak_mib", "images_per_s"} <= fused.keys()


def test_a_benchmark_without_parity_fails(tmp_path):
    plugin = tmp_path / "spoil.py"
    plugin.write_text("from fused_resnet import measure\nmeasure.FACTOR['output'] = -1e9\n")
    chosen = ["benchmarks/test_bench_blocks.py", "-k", "bottleneck-deep and eval and fused_channels_last"]
    answer = pytest_benchmarks("-p", "spoil", *chosen, *TINY, PYTHONPATH=str(tmp_path))
    assert answer.returncode == 1
    assert "output: off by" in answer.stdout


# --- the table in the README ------------------------------------------------------------------------------------------


def test_the_readme_says_what_the_results_say(capsys):
    assert table.main(["--check"]) == 0, capsys.readouterr().out


def test_the_readme_says_what_the_runs_show(tmp_path, capsys):
    assert lesson.main(["--check"]) == 0, capsys.readouterr().out
    record = json.loads((lesson.RESULTS / "degradation.json").read_text())
    record["runs"][0]["train_loss_eval"][-1] += 1
    (tmp_path / "degradation.json").write_text(json.dumps(record))
    (tmp_path / "gradients.json").write_text((lesson.RESULTS / "gradients.json").read_text())
    assert lesson.main(["--check", "--results", str(tmp_path)]) == 1


@pytest.fixture
def written(tmp_path):
    """A README and a results file of made-up figures."""
    timed = {"p20_ms": 1.0, "p50_ms": 2.0, "p80_ms": 3.0, "ratio": 1.0, "peak_mib": 100.0}
    case = {
        "model": "resnet18",
        "mode": "eval",
        "batch": 8,
        "size": 224,
        "dtype": "float32",
        "device": "cpu",
        "parity": {"ok": True},
        "noise": 0.05,
        "variants": {
            "eager": timed,
            "channels_last": {**timed, "ratio": 1.25},
            "fused": {**timed, "ratio": 1.5, "peak_mib": 120.0},
        },
    }
    environment = {"cpu": "a CPU", "threads": 2, "torch": "2.14.1", "torchvision": "0.29.1", "gpus": []}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "cpu.json").write_text(json.dumps({"environment": environment, "cases": [case]}))
    markers = (table.PEERS_BEGIN, table.PEERS_END, table.BEGIN, table.END)
    (tmp_path / "README.md").write_text("above\n{}\nold\n{}\nbetween\n{}\nold\n{}\nbelow\n".format(*markers))
    return tmp_path


def test_the_table_is_rendered_between_the_markers(written):
    options = ["--readme", str(written / "README.md"), "--results", str(written / "results")]
    assert table.main([*options, "--check"]) == 1
    assert table.main(options) == 0
    assert table.main([*options, "--check"]) == 0
    text = (written / "README.md").read_text()
    assert text.startswith("above\n") and text.endswith("\nbelow\n") and "\nold\n" not in text
    assert "| resnet18 eval, batch 8, float32 | 2.0 | 1.25 | 1.50 | 100 → 120 | 5% | holds |" in text
    assert "a CPU, 2 threads; torch 2.14.1" in text


def test_the_peers_are_rendered_between_theirs(written):
    times = {"eager": [2.0, 2.2], "onnxruntime": [1.0, 1.1], "openvino": [1.2, 1.2], "fused_resnet": [0.5, 0.55]}
    systems = {
        name: {
            "p50_ms": 1e3 * t[0],
            "times_s": t,
            "built_s": 0.75,
            "ready_s": 1.25,
            "peak_mib": 100.0,
            "parity": {"ok": name != "eager"},
            "to_baseline": {"ratio": 2.0 / t[0], "low": 1.0, "high": 9.0},
        }
        for name, t in times.items()
    }
    cell = {
        "model": "resnet18",
        "batch": 8,
        "dtype": "float32",
        "size": 224,
        "device": "cpu",
        "threads": 2,
        "rounds": 2,
    }
    environment = {"cpu": "a CPU", "torch": "2.14.1", "onnxruntime": "1.32.0", "openvino": "2026.4"}
    result = {"environment": environment, "cells": {"resnet18/b8/float32": cell | {"systems": systems}}}
    (written / "results" / "peers-cpu.json").write_text(json.dumps(result))
    assert table.main(["--readme", str(written / "README.md"), "--results", str(written / "results")]) == 0
    text = (written / "README.md").read_text()
    figures = "2000.0 | 2.00 | 1.67 | 4.00 | 2.00 (2.00 to 2.00) | 0.8 | 1.2 | 100 → 100"
    assert f"| resnet18, batch 8, float32 | {figures} | holds |" in text
    assert "ONNX Runtime 1.32.0" in text and "2 rounds" in text
    assert "| resnet18 eval, batch 8, float32 | 2.0 |" in text  # the other table stands where it stood
    systems["fused_resnet"]["parity"]["ok"] = False
    (written / "results" / "peers-cpu.json").write_text(json.dumps(result))
    assert table.main(["--readme", str(written / "README.md"), "--results", str(written / "results"), "--check"]) == 1


def test_planned_networks_on_gpus_are_rendered_between_theirs(written):
    case = {"case": "engine/speed/resnet50/float16/8", "error": {"a": 2e-4, "b": 3e-4}, "torchvision": 4e-4}
    case["images_per_s"] = {"engine": 41234.5, "torch.compile": 20000.0}
    environment = {"gpus": [{"name": "a GPU"}], "torch": "2.11.0", "triton": "3.6.0", "cudnn": "9.19.0"}
    (written / "results" / "engine.json").write_text(json.dumps({"environment": environment, "engine": [case]}))
    options = ["--readme", str(written / "README.md"), "--results", str(written / "results")]
    with pytest.raises(SystemExit, match="expected the markers"):
        table.main(options)
    with open(written / "README.md", "a") as f:
        f.write(f"{table.ENGINE_BEGIN}\n{table.ENGINE_END}\n")
    assert table.main(options) == 0
    row = "| resnet50, batch 8, float16 | 41,234 | 20,000 | 3.0e-04 (4.0e-04) |"
    assert row in (written / "README.md").read_text()


def test_a_readme_without_markers_is_refused(written):
    (written / "README.md").write_text("nothing\n")
    with pytest.raises(SystemExit, match="expected the markers"):
        table.main(["--readme", str(written / "README.md"), "--results", str(written / "results")])


def test_recording_writes_what_the_table_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(record.PLANS, "cpu", ((False, (1,), ("float32",)),))
    options = [
        "--device",
        "cpu",
        "--models",
        "resnet18",
        "--size",
        "40",
        "--seconds",
        "0",
        "--seeds",
        "1",
        "--no-compile",
    ]
    assert record.main([*options, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "cpu.json").read_text())
    assert result["load_before"] >= 0 and result["environment"]["threads"] >= 1
    assert "| resnet18 eval, batch 1, float32 |" in table.render([result])

    result["cases"].append({**result["cases"][0], "mode": "train"})
    first = result["cases"][0]["variants"]["eager"]["p50_ms"] = -1.0
    (tmp_path / "named.json").write_text(json.dumps(result))
    again = [*options, "--modes", "eval", "--name", "named", "--out", str(tmp_path)]
    assert record.main(again) == 0
    merged = json.loads((tmp_path / "named.json").read_text())
    assert [case["mode"] for case in merged["cases"]] == ["eval", "train"]
    assert merged["cases"][0]["variants"]["eager"]["p50_ms"] > first
    assert merged["cases"][1] == result["cases"][1]
    result["environment"]["cpu"] = "another"
    (tmp_path / "named.json").write_text(json.dumps(result))
    with pytest.raises(SystemExit, match="another machine or version: cpu differ"):
        record.main(again)


def test_the_hosts_part_of_a_step(tmp_path):
    """And nothing of what stands in for a GPU stays."""
    host = importlib.import_module("benchmarks.host")
    before = backends.ORDER, backends.TRUSTED, backends.WRITTEN_DOWN, triton._dispatch
    assert host.main(["--rounds", "1", "--json", str(tmp_path / "host.json")]) == 0
    assert before == (backends.ORDER, backends.TRUSTED, backends.WRITTEN_DOWN, triton._dispatch)
    for found in json.loads((tmp_path / "host.json").read_text())["steps"].values():
        assert found["launches"] > 500
        assert all(0 < found[name]["backward_ms"] for name in host.WAYS)


def test_stems_are_timed_both_ways(monkeypatch, tmp_path):
    from benchmarks import record, stems

    monkeypatch.setattr(stems, "CASES", (("resnet18", 1, "eval"), ("resnet18", 2, "train")))
    assert stems.main(["--rounds", "2", "--size", "32", "--json", str(tmp_path / "stems.json")]) == 0
    found = json.loads((tmp_path / "stems.json").read_text())
    assert found.keys() == json.loads((record.RESULTS / "stems-cpu.json").read_text()).keys()
    for case in found["stems"].values():
        assert all(part["fused_ms"] > 0 and len(part["speedup_20_50_80"]) == 3 for part in case.values())
