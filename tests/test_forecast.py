"""What was measured of some problems, said of others: what the forecast takes for alike, and how right it is about
times that were measured on a GPU."""

import dataclasses
import importlib
import json
import statistics
from pathlib import Path

import pytest
import torch

from fused_resnet.engine import cases
from fused_resnet.engine.forecast import FAR, Forecast, distance
from fused_resnet.engine.problem import Candidate, Work

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
forecasts = importlib.import_module("benchmarks.forecast")
OPS = importlib.import_module("benchmarks.gpu_engine").OPS
CONV = Work("conv", {"positions": 1024, "channels": 64}, {"stride": "1", "residual": False}, 2**30, 2**20)


def candidate(name: str) -> Candidate:
    return Candidate(name.split()[0], name, {"name": name})


def entry(work: Work, **seconds: float) -> dict:
    trials = [
        {
            "candidate": vars_of(candidate(name.replace("_", " "))),
            "seconds": s and [s, s, s],
            "reason": None if s else "wrong",
        }
        for name, s in seconds.items()
    ]
    return {"chosen": trials[0]["candidate"], "candidates": "0", "trials": trials, "work": dataclasses.asdict(work)}


def vars_of(c: Candidate) -> dict:
    return {"backend": c.backend, "label": c.label, "config": c.config}


def like(work: Work = CONV, **changes) -> Work:
    """The same with other sizes, flops and bytes in proportion, or other traits."""
    sizes = work.sizes | {k: v for k, v in changes.items() if k in work.sizes}
    traits = work.traits | {k: v for k, v in changes.items() if k not in work.sizes}
    factor = sizes["positions"] / work.sizes["positions"]
    return dataclasses.replace(
        work, sizes=sizes, traits=traits, flops=int(work.flops * factor), bytes=int(work.bytes * factor)
    )


ALL = [candidate(name) for name in ("cudnn", "triton a", "triton b")]


def names(order: list[Candidate]) -> list[str]:
    return [c.label for c in order]


def test_the_nearest_decides():
    small = entry(like(positions=2**8), cudnn=3e-5, triton_a=1e-5, triton_b=2e-5)
    large = entry(like(positions=2**16), cudnn=3e-4, triton_a=2e-4, triton_b=1e-4)
    found = Forecast([small, large])
    assert names(found.order(like(positions=2**9), ALL)) == ["triton a", "triton b", "cudnn"]
    assert names(found.order(like(positions=2**15), ALL)) == ["triton b", "triton a", "cudnn"]


def test_without_evidence_of_its_kind_there_is_no_forecast():
    found = Forecast([entry(CONV, cudnn=1e-5), {k: v for k, v in entry(CONV, cudnn=1e-5).items() if k != "work"}])
    other = dataclasses.replace(CONV, kind="stem")
    assert found.order(other, ALL) is None and found.seconds(other, ALL[0]) is None
    assert found.order(None, ALL) is None and found.seconds(None, ALL[0]) is None
    assert Forecast([]).order(CONV, ALL) is None
    assert Forecast([entry(CONV, cudnn=None, triton_a=None)]).order(CONV, ALL) is None


def test_what_was_not_among_the_candidates_is_as_its_backend_is():
    fast = Forecast([entry(CONV, cudnn=3e-5, triton_a=1e-5)])
    assert names(fast.order(CONV, ALL)) == ["triton a", "triton b", "cudnn"]
    slow = Forecast([entry(CONV, cudnn=1e-5, triton_a=3e-5)])
    assert names(slow.order(CONV, ALL)) == ["cudnn", "triton a", "triton b"]
    new = candidate("cuda")  # of a backend that nobody has timed: after those that were fast
    assert names(fast.order(CONV, [new, *ALL])) == ["triton a", "triton b", "cudnn", "cuda"]


def test_what_failed_in_one_like_it_is_tried_last():
    found = Forecast([entry(CONV, cudnn=9e-5, triton_a=None, triton_b=1e-5)])
    assert names(found.order(CONV, ALL)) == ["triton b", "cudnn", "triton a"]
    there = Forecast([entry(CONV, cudnn=9e-5, triton_b=1e-5)])  # where nobody tried it, it is as its backend is
    assert names(there.order(CONV, ALL))[-1] == "cudnn"


def test_evidence_from_far_away_is_better_than_none():
    far = entry(like(positions=2**40), cudnn=3e-5, triton_a=1e-5, triton_b=2e-5)
    found = Forecast([far, entry(CONV, cudnn=1e-5)])
    assert names(found.order(CONV, ALL)) == ["cudnn", "triton a", "triton b"]
    assert names(found.order(CONV, ALL[1:])) == ["triton a", "triton b"]
    forever = Forecast([entry(like(positions=2**62), triton_a=1e-5), entry(like(positions=1), cudnn=1e-5)])
    assert len(forever.order(like(positions=1), ALL)) == 3


def test_times_are_in_proportion_to_the_work():
    found = Forecast([entry(CONV, cudnn=4e-4, triton_a=2e-4)])
    assert found.seconds(CONV, ALL[1]) == pytest.approx(2e-4, rel=0.01)
    assert found.seconds(CONV, ALL[0]) == pytest.approx(4e-4, rel=0.01)
    large = dataclasses.replace(CONV, flops=2**40)
    larger = dataclasses.replace(CONV, flops=2**41)
    assert found.seconds(larger, ALL[1]) / found.seconds(large, ALL[1]) == pytest.approx(2, rel=0.01)


def test_far_away_it_says_what_but_not_how_long():
    found = Forecast([entry(CONV, cudnn=3e-5, triton_a=1e-5)])
    far = like(positions=2**20)
    assert distance(far, CONV) > FAR
    assert names(found.order(far, ALL))[0] == "triton a" and found.seconds(far, ALL[1]) is None
    at_the_end_of_the_world = like(positions=2**62)
    assert names(found.order(at_the_end_of_the_world, ALL))[0] == "triton a"


def test_distances():
    assert distance(CONV, CONV) == 0
    assert distance(CONV, like(positions=2048)) == distance(like(positions=2048), CONV) == 1
    assert distance(CONV, like(channels=128)) == 0.5
    assert distance(CONV, like(residual=True)) == 1 and distance(CONV, like(stride="2")) == 0.5
    assert distance(CONV, like(anything=1)) == 0.5


# --- what work a problem is -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPS)
def test_work_is_what_its_tensors_hold_and_its_reference_computes(name, dtype):
    """Bytes of all that goes in and out, but biases; what a stride leaves out is not read."""
    kind, facts = OPS[name]
    options = dict(device="cpu", dtype=dtype)
    if kind in (cases.ConvArgs, cases.LinearArgs, cases.GroupedArgs, cases.StemArgs):
        options["tf32"] = False
    if kind is cases.StemArgs:
        options["input_dtype"] = dtype
    case = kind(**facts, **options).problem().build()
    inputs, outputs = case.inputs(torch.device("cpu"), 0), case.outputs(torch.device("cpu"))
    moved = sum(t.nbytes for k, t in {**inputs, **outputs}.items() if not k.startswith("bias"))
    if (segment := getattr(case.args, "segment", None)) and segment[3] == 2:
        x2 = inputs["x2"]
        moved -= x2.nbytes - x2[:, :, ::2, ::2].numel() * x2.itemsize
    assert case.work.bytes == moved
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counted:
        case.reference(inputs)
    if kind is not cases.PoolArgs:
        assert case.work.flops == counted.get_total_flops()
    assert case.work.flops > 0 and all(type(v) is int and v > 0 for v in case.work.sizes.values())


def test_16_bits_are_alike_and_others_are_not():
    facts = OPS["conv-3x3"][1]
    kinds = {
        (dtype, tf32): cases.ConvArgs(**facts, device="cpu", dtype=dtype, tf32=tf32).work().kind
        for dtype, tf32 in (("float16", False), ("bfloat16", False), ("float32", False), ("float32", True))
    }
    assert kinds["float16", False] == kinds["bfloat16", False] and len(set(kinds.values())) == 3


# --- beside times that were measured ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured():
    return forecasts.tables()[1]


@pytest.mark.parametrize(("kind", "over"), [("conv", 1.12), ("chain", 1.04), ("stem", 1.08), ("avg_pool", 1.05)])
def test_choices_for_problems_left_out_are_nearly_the_fastest(measured, kind, over):
    """With all of their sizes: a twin with another shortcut knows nearly all."""
    these = [p for p in measured if p.work.kind.startswith(kind)]
    found = forecasts.judge(these, lambda p: [q for q in measured if q.work.sizes != p.work.sizes])
    assert found["forecast"] == len(these) > 3
    assert found["over_the_fastest"] < over
    if kind in ("conv", "stem"):
        assert found["pytorch_over_the_fastest"] > 2  # what would serve without


@pytest.mark.parametrize("batch", [1, 128])
def test_a_network_whose_batch_was_never_measured(measured, batch):
    others = [q for q in measured if q.batch != batch]
    found = forecasts.network(measured, batch, lambda p: p.forecast(others))
    assert found["fastest"] <= found["forecast"] < 0.6 * found["pytorch"]


@pytest.mark.parametrize("batch", [1, 128])
def test_where_all_is_known_the_fastest_way_is_taken(measured, batch):
    found = forecasts.network(measured, batch, lambda p: (p.best, p.best))
    assert found["forecast"] == found["fastest"] < 0.5 * found["pytorch"]


def test_expected_times_are_of_the_right_size(measured):
    found = [p.forecast(q for q in measured if q is not p) for p in measured]
    ratios = [expected / seconds for expected, seconds in found if expected]
    assert len(ratios) > 0.9 * len(measured)
    low, *_, high = statistics.quantiles(ratios, n=10)
    assert 0.7 < low < high < 1.5


def test_the_figures_that_are_shipped_are_those_of_the_tables():
    shipped = json.loads((RESULTS / "forecast-h100.json").read_text())
    assert forecasts.report(*forecasts.tables()) == shipped
