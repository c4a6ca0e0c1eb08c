"""Options, environment and the one comparison that every benchmark makes.

    pytest benchmarks                                    # both files, on the GPU if there is one
    pytest benchmarks --models resnet50 --batches 8
    pytest benchmarks --no-compile                       # without torch.compile, which takes up to a minute a case
    pytest benchmarks -k "bottleneck and train" --benchmark-json out.json

A benchmark measures one variant against the untouched module (eager, contiguous), the two taking turns, after checking
parity if the variant is ours. What counts stands in extra_info and in the list at the end: p20, p50 and p80 (on a GPU
by events), the ratio to eager, the noise, peak memory, parity. pytest-benchmark's own columns are wall-clock time.
"""

import pytest
import torch

from fused_resnet import doctor, measure, swap_blocks

MODES = ("eval", "train")


def pytest_addoption(parser):
    group = parser.getgroup("fused_resnet benchmarks")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    group.addoption("--dtypes", nargs="+", choices=("float32", "float16", "bfloat16"))
    group.addoption("--batches", nargs="+", type=int)
    group.addoption("--models", nargs="+", default=["resnet18", "resnet50"])
    group.addoption("--size", type=int, default=224, help="height and width of the images; blocks see a quarter of it")
    group.addoption("--no-compile", action="store_true", help="without torch.compile: up to a minute a case on a CPU")
    group.addoption("--seconds", type=float, default=2.0, help="time spent on the timing of each case")
    group.addoption("--seeds", type=int, default=3, help="inputs that parity is checked with")


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    device = torch.device(option("--device"))
    cuda = device.type == "cuda"
    values = {
        "dtype": option("--dtypes") or (["float16", "bfloat16"] if cuda else ["float32"]),
        "batch": option("--batches") or ([128, 1, 32] if cuda else [1, 8]),
        "name": option("--models"),
        "mode": MODES,
        "variant": measure.variants_of(device, train=True, compiled=not option("--no-compile")),
    }
    for argument in ("variant", "batch", "mode", "dtype", "name"):  # the last one varies slowest
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, values[argument])


def pytest_collection_modifyitems(config, items):
    """What is there in training alone is no case of evaluation."""
    device, absent = torch.device(config.getoption("--device")), []
    for item in items:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        train = given.get("mode") != "eval"
        if "variant" in given and given["variant"] not in measure.variants_of(device, train=train, compiled=True):
            absent.append(item)
    if absent:
        config.hook.pytest_deselected(items=absent)
        items[:] = [item for item in items if item not in absent]


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node", None)
    machine_info["fused_resnet"] = doctor.environment()


def pytest_terminal_summary(terminalreporter):
    rows = [
        (report.nodeid.split("::")[-1], dict(report.user_properties)["measured"])
        for report in terminalreporter.stats.get("passed", [])
        if "measured" in dict(report.user_properties)
    ]
    if rows:
        terminalreporter.section("p50, and speed relative to eager in the same rounds (noise of that ratio)")
    for name, m in rows:
        terminalreporter.write_line(f"{m['p50_ms']:10.3f} ms  {m['ratio']:5.2f} ({m['noise']:.0%})  {name}")


@pytest.fixture(scope="session")
def verdicts():
    """Parity by (module, mode, dtype): checked once in a run, for all its variants and batch sizes."""
    return {}


@pytest.fixture
def compare(request, benchmark, verdicts):
    """compare(key, module, shape, variant, mode, dtype): check parity, time, and note both in extra_info."""
    option = request.config.getoption
    device = torch.device(option("--device"))

    def run(key: str, module: torch.nn.Module, shape: tuple[int, ...], variant: str, mode: str, dtype: str) -> None:
        benchmark.group = f"{key}, {mode}, batch {shape[0]}, {dtype}"
        train, dtype = mode == "train", getattr(torch, dtype)
        module = module.to(device=device, dtype=dtype)
        info = {
            "variant": variant,
            "group": benchmark.group,
            "timed_by": "CUDA events" if device.type == "cuda" else "clock",
        }
        if variant.startswith("fused"):
            if (key, mode, dtype) not in verdicts:
                few = (2, *shape[1:])  # float64 is slow
                inputs = [measure.random_input(few, seed, device, dtype) for seed in range(option("--seeds"))]
                fused = swap_blocks(measure.copy.deepcopy(module))
                verdicts[key, mode, dtype] = measure.parity(module, fused, inputs, train=train)
            info["parity"] = verdicts[key, mode, dtype]
            assert info["parity"]["ok"], info["parity"]["violations"]
        x = measure.random_input(shape, 0, device, dtype)
        with measure.fastest_library():
            variants = measure.Variants(module, x, dict.fromkeys(("eager", variant)), train=train)
            timed = variants.measure(option("--seconds"))
        mine = timed["variants"][variant]
        info |= {**mine, "noise": timed["noise"], "images_per_s": 1e3 * shape[0] / mine["p50_ms"]}
        benchmark.extra_info.update(info)
        request.node.user_properties.append(("measured", info))

        def step():
            variants.steps[variant]()
            measure.synchronize(device)

        benchmark.pedantic(step, rounds=5, warmup_rounds=1)

    return run
