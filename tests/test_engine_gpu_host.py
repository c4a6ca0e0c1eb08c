"""The host's side of the engine on a GPU, with a recorder in the GPU's place: order of calls, memory, what happens when
something fails; and the problems that are tuned."""

import contextlib
import gc
import json
import logging
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torchvision

import fused_resnet
from fused_resnet.engine import (
    captured,
    cases,
    chain_cases,
    child,
    compiled_conv,
    compiled_stem,
    gpu,
    reference,
    runner,
    triton_conv,
    triton_stem,
)  # fmt: skip
from fused_resnet.engine.captured import Captured, Ordered, Turns, race
from fused_resnet.engine.eager import EagerExecutor
from fused_resnet.engine.graph import capture, propagate
from fused_resnet.engine.pieces import Pieces
from fused_resnet.engine.problem import Candidate, Problem
from fused_resnet.engine.steps import match
from fused_resnet.engine.tune import Result, Results, Trial

GPU0 = torch.device("cuda", 0)
CPU = torch.device("cpu")


class Recorder:
    """Stands for torch.cuda: what is asked of it, in order. Its graphs run what was captured again."""

    def __init__(self):
        self.log, self.current, self.capturing, self.device, self.times = [], "main", False, 0, []
        self.refuses = None  # an exception that ends captures
        self.running = None

    def install(self, monkeypatch):
        recorder = self

        class Stream:
            count = 0

            def __init__(self, device=None, name=None):
                Stream.count += name is None
                self.name = name or f"side{Stream.count}"

            def wait_stream(self, other):
                recorder.log.append(f"{self.name} waits for {other.name}")

            def synchronize(self):
                recorder.log.append(f"synchronize {self.name}")

        class Event:
            def __init__(self, enable_timing=False):
                self.at = 0.0

            def wait(self, stream):
                recorder.log.append(f"{stream.name} waits for the event")

            def record(self, stream=None):
                recorder.log.append(f"event on {recorder.current if stream is None else stream.name}")
                self.at = sum(recorder.times)

            def synchronize(self):
                recorder.log.append("synchronize the event")

            def elapsed_time(self, other):
                return 1e3 * (other.at - self.at)

        class CUDAGraph:
            def replay(self):
                recorder.log.append(f"replay on {recorder.current}")
                recorder.times.append(getattr(self, "seconds", 0.0))
                self.again()

        @contextlib.contextmanager
        def graph(graph, *, pool, stream, capture_error_mode):
            assert capture_error_mode == "thread_local"
            recorder.log.append(f"capture on {stream.name} into {pool}")
            before, recorder.current, recorder.capturing = recorder.current, stream.name, True
            yield
            recorder.capturing = False
            if recorder.refuses:  # as the real one: the stream stays the capture's
                raise recorder.refuses
            recorder.current = before

        @contextlib.contextmanager
        def stream(s):
            before, recorder.current = recorder.current, s.name
            try:
                yield
            finally:
                recorder.current = before

        @contextlib.contextmanager
        def device(d):
            index = d if isinstance(d, int) else d.index
            recorder.log.append(f"device {index}")
            before, recorder.device = recorder.device, index
            try:
                yield
            finally:
                recorder.device = before

        pools = iter(range(1, 100))
        for name, value in {
            "Stream": Stream,
            "Event": Event,
            "CUDAGraph": CUDAGraph,
            "graph": graph,
            "stream": stream,
            "device": device,
            "current_device": lambda: recorder.device,
            "current_stream": lambda device=None: Stream(name=recorder.current),
            "is_current_stream_capturing": lambda: recorder.capturing,
            "graph_pool_handle": lambda: f"pool {next(pools)}",
            "empty_cache": lambda: recorder.log.append("empty the cache"),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(
            torch.Tensor, "record_stream", lambda t, s: recorder.log.append(f"an input is used on {s.name}")
        )
        capture = captured._capture

        def remembering(run, turns, pool):
            """The graph writes to the memory that the capture's result has."""
            graph, result = capture(run, turns, pool)
            graph.again = lambda: [old.copy_(new) for old, new in zip(_tensors(result), _tensors(run()), strict=True)]
            return graph, result

        monkeypatch.setattr(captured, "_capture", remembering)

    def since(self):
        log, self.log = self.log, []
        return log


def _tensors(result):
    return [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]


@pytest.fixture
def recorder(monkeypatch):
    found = Recorder()
    found.install(monkeypatch)
    return found


def twice(inputs):
    return inputs[0] * 2


def test_a_capture_warms_up_on_its_stream_and_is_in_order_with_what_was_before(recorder):
    turns = Turns(GPU0)
    kept = Captured(twice, (torch.ones(2),), turns, pool=turns.pool)
    assert (
        recorder.since()
        == [
            "side1 waits for main",
            "side1 waits for the event",
            "synchronize side1",
            "capture on side1 into pool 1",
            "main waits for side1",
            "event on main",
        ]
        and kept
    )


def test_weights_that_graphs_read_stay(monkeypatch):
    """A graph knows addresses alone: nothing else would keep the folded weights from being given to somebody."""

    class Sharing:
        converts_inputs = shares_weights = gpu.Gpu.shares_weights

        def __init__(self, eager):
            self.eager = eager

        def plan(self, network, inputs, mode, objection):
            return lambda given: self.eager.run(network, given), self.eager.groups(network), None

    monkeypatch.setattr(runner, "_executor", lambda graph, eager, device: (Sharing(eager), None))
    x = torch.randn(2, 3, 32, 32)
    fast = fused_resnet.optimize_for_inference(torchvision.models.resnet18().eval(), x)
    kept = dict(fast._eager.eager.weights)
    assert len(kept) == 18  # 17 convolutions, three with a projection, and the classifier
    fast(x.contiguous(memory_format=torch.channels_last))
    assert all(fast._eager.eager.weights[key] is folded for key, folded in kept.items())


def test_all_graphs_share_a_stream_so_that_they_share_the_pool(recorder):
    turns = Turns(GPU0)
    kept = [Captured(twice, (torch.ones(n),), turns, pool=turns.pool) for n in (1, 2)]
    assert [line for line in recorder.since() if "capture" in line] == ["capture on side1 into pool 1"] * 2
    Captured(twice, (torch.ones(3),), turns)  # on trial
    assert "capture on side1 into pool 2" in recorder.since() and kept


def test_a_call_waits_copies_replays_clones_and_records(recorder):
    turns = Turns(GPU0)
    run = Captured(twice, (torch.ones(2),), turns)
    recorder.since()
    copy, clone = torch.Tensor.copy_, torch.Tensor.clone
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", lambda *a, **k: recorder.log.append("copy") or copy(*a, **k))
        patch.setattr(torch.Tensor, "clone", lambda *a, **k: recorder.log.append("clone") or clone(*a, **k))
        recorder.current = "theirs"
        y = run((torch.full((2,), 3.0),))
    assert [line for line in recorder.since()] == [
        "theirs waits for the event",
        "copy",
        "an input is used on theirs",
        "replay on theirs",
        "copy",  # what the replay does
        "clone",
        "event on theirs",
    ]
    assert y.tolist() == [6, 6]
    run((torch.zeros(2),))
    assert y.tolist() == [6, 6]


def test_what_begins_a_call_reads_the_inputs_where_the_caller_has_them(recorder):
    place, seen = torch.zeros(2), []

    def first(inputs):
        seen.append((inputs[0].data_ptr(), recorder.current, recorder.capturing))
        place.copy_(inputs[0])

    run = Captured(lambda inputs: place * 2, (torch.ones(2),), Turns(GPU0), first=first)
    assert [where for _, *where in seen] == [["side1", False]] * 2  # it warms up, and is not captured
    recorder.since()
    seen.clear()
    recorder.current = "theirs"
    x = torch.full((2,), 3.0)
    assert run((x,)).tolist() == [6, 6] and seen == [(x.data_ptr(), "theirs", False)]
    assert recorder.since() == [
        "theirs waits for the event",
        "an input is used on theirs",
        "replay on theirs",
        "event on theirs",
    ]
    assert run.static == ()  # no memory for a copy of the inputs


def test_a_call_that_fails_leaves_the_order_intact(recorder):
    run = Captured(twice, (torch.ones(2),), Turns(GPU0))
    recorder.since()
    with pytest.raises(RuntimeError):
        run((torch.ones(3),))
    assert recorder.since() == ["main waits for the event", "event on main"]


def test_results_of_any_structure_are_fresh(recorder):
    run = Captured(lambda x: {"a": x[0] * 2, "b": [x[0] + 1, 7]}, (torch.ones(2),), Turns(GPU0))
    first = run((torch.zeros(2),))
    run((torch.ones(2),))
    assert first["a"].tolist() == [0, 0] and first["b"][0].tolist() == [1, 1] and first["b"][1] == 7


def test_what_is_not_captured_has_its_turn_too(recorder):
    turns = Turns(GPU0)
    run = Ordered(twice, turns)
    assert run((torch.ones(2),)).tolist() == [2, 2]
    assert recorder.since() == ["main waits for the event", "an input is used on main", "event on main"]


def test_another_current_device_is_changed_for_the_call(recorder):
    run = Captured(twice, (torch.ones(2),), Turns(torch.device("cuda", 1)))
    recorder.since()
    assert run((torch.ones(2),)).tolist() == [2, 2]
    assert recorder.since()[0] == "device 1" and recorder.device == 0


def test_in_a_callers_graph_it_runs_in_other_memory_and_without_the_event(recorder):
    def apart(inputs):
        assert not torch.is_grad_enabled()
        return inputs[0] * 2

    run = Captured(twice, (torch.ones(2),), Turns(GPU0), apart)
    recorder.since()
    recorder.capturing = True
    assert run((torch.ones(2),)).tolist() == [2, 2]
    assert recorder.since() == []


def test_what_an_unfinished_replay_uses_is_not_given_back(recorder):
    run = Captured(twice, (torch.ones(2),), Turns(GPU0))
    recorder.since()
    del run
    gc.collect()
    assert recorder.since() == ["synchronize the event"]


@pytest.mark.parametrize("where", ["run", "end"])
def test_a_failed_capture_gives_the_stream_back_and_says_what_came_first(where, recorder, monkeypatch):
    ended = []
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *a: ended.append(a), raising=False)

    def run(inputs):
        if recorder.capturing and where == "run":
            recorder.capturing = False
            raise ValueError("cannot be captured")
        return inputs[0]

    recorder.refuses = RuntimeError("capture was invalidated") if where == "end" else None
    turns = Turns(GPU0)
    words = "cannot be captured" if where == "run" else "capture was invalidated"
    with pytest.raises((ValueError, RuntimeError), match=words):
        Captured(run, (torch.ones(1),), turns, pool=turns.pool)
    assert recorder.current == "main"
    assert ended == [(0, "pool 1")]


def test_a_race_takes_turns_and_medians(recorder):
    runs = {name: (lambda s=seconds: recorder.times.append(s)) for name, seconds in (("a", 2e-3), ("b", 1e-3))}
    times = race(runs, rounds=3, calls=2)
    assert times == {"a": pytest.approx(2e-3), "b": pytest.approx(1e-3)}
    assert len(recorder.times) == 2 * 3 * 3


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def planned(recorder, monkeypatch):
    """Makes a Gpu for CPU tensors: (gpu, network, inputs). Kernels of ours are stood for by PyTorch's operators."""
    monkeypatch.setattr(cases, "triton_unavailable", lambda: None)
    monkeypatch.setattr(gpu, "triton_unavailable", lambda: None)
    monkeypatch.setattr(cases, "_fuses", lambda *a: False)
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=8).eval()
    graph, x = capture(model), torch.randn(2, 3, 32, 32)
    propagate(graph, (x,))
    device = torch.device("cpu", 0)
    found = gpu.Gpu(EagerExecutor(graph.module, torch.float32), device)

    def tune(problems, mode, device=None):
        results = Results()
        for problem in problems:
            chosen = problem.build().candidates()[-1]
            results[problem.key] = Result(problem.key, chosen, "measured", True)
        return results

    def launch(config, x, weight, bias, residual, segment, out, workspace, **options):
        out.copy_(cases.pytorch_conv(x, weight, bias, residual, segment, **options))

    def stem(config, x, weight, bias, out):
        step = match(graph).steps[0]
        out.copy_(found.eager.eager.run(step, match(graph), {"x": x}))

    monkeypatch.setattr(gpu, "tune", tune)
    monkeypatch.setattr(gpu, "expected", lambda problems, device=None: {})
    monkeypatch.setattr(triton_conv, "launch", launch)
    monkeypatch.setattr(triton_stem, "launch", stem)
    return found, match(graph), (x,)


def fine(result):
    return None


@torch.no_grad()
def test_a_plan_serves_its_graph(planned, recorder):
    served, network, inputs = planned
    run, groups, note = served.plan(network, inputs, "cached", fine)
    assert isinstance(run, Captured) and note is None
    assert {g.backend for g in groups} == {"triton", "cudnn"}
    assert sum("capture" in line for line in recorder.log) == 1  # PyTorch's is on trial in mode 'full' only
    want = served.eager.run(network, inputs)
    assert torch.allclose(run(inputs), want, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("faster", ["planned", "cudnn"])
def test_the_faster_network_end_to_end_serves(faster, planned, recorder, monkeypatch):
    served, network, inputs = planned
    times = {"planned": 2e-3, "cudnn": 2e-3} | {faster: 1e-3}
    monkeypatch.setattr(gpu, "race", lambda runs: {name: times[name] for name in runs})
    run, groups, note = served.plan(network, inputs, "full", fine)
    captures = [line.split()[-1] for line in recorder.log if "capture" in line]
    # The planned one, PyTorch's on trial in memory of its own, and again where it serves.
    assert captures == ["1", "2"] + ["1"] * (faster == "cudnn")
    assert {g.backend for g in groups} >= ({"triton"} if faster == "planned" else {"pytorch"})
    assert ("PyTorch's kernels serve" in note) == (faster == "cudnn") and "end to end" in note
    assert torch.allclose(run(inputs), served.eager.run(network, inputs), atol=1e-5)


@pytest.fixture
def splitting(planned, monkeypatch):
    """The same, where convolutions of 512 channels were fastest by kernels for small batches."""
    served, network, inputs = planned
    tune, launch = gpu.tune, triton_conv.launch

    def with_splits(problems, mode, device=None):
        results = tune(problems, mode, device)
        for key, result in results.items():
            if key.startswith("conv") and "x512x" in key:
                slow, fast = Candidate("triton", "slow", result.chosen.config), Candidate("cuda", "fast")
                trials = [Trial(slow, (2e-6,) * 3), Trial(cases.CUDNN, (3e-6,) * 3), Trial(fast, (1e-6,) * 3)]
                results[key] = replace(result, chosen=fast, trials=trials)
        return results

    monkeypatch.setattr(gpu, "tune", with_splits)
    monkeypatch.setattr(compiled_conv, "splits", lambda candidate: candidate.label == "fast")
    monkeypatch.setattr(compiled_conv, "workspace", lambda *args: 0)
    monkeypatch.setattr(compiled_conv, "launch", lambda *args, **options: launch(*args, **options))
    return planned


@torch.no_grad()
@pytest.mark.parametrize("faster", ["planned", "plain", "cudnn"])
def test_kernels_for_small_batches_have_to_pay_end_to_end(faster, splitting, recorder, monkeypatch):
    served, network, inputs = splitting
    times = dict.fromkeys(("planned", "plain", "cudnn"), 2e-3) | {faster: 1e-3}
    monkeypatch.setattr(gpu, "race", lambda runs: {name: times[name] for name in runs})
    run, groups, note = served.plan(network, inputs, "full", fine)
    configs = {g.config for g in groups}
    assert ("fast" in configs) == (faster == "planned") and ("slow" in configs) == (faster == "plain")
    assert "the planned network" in note and "the network without kernels for small batches" in note
    assert torch.allclose(run(inputs), served.eager.run(network, inputs), atol=1e-5)


@torch.no_grad()
def test_where_those_for_small_batches_are_wrong_the_others_serve(splitting):
    served, network, inputs = splitting
    verdicts = iter(["result 0 differs", None])
    run, groups, note = served.plan(network, inputs, "cached", lambda result: next(verdicts))
    assert note == "the planned network is not used: result 0 differs"
    assert {g.config for g in groups} >= {"slow"} and torch.allclose(
        run(inputs), served.eager.run(network, inputs), atol=1e-5
    )


@torch.no_grad()
def test_a_planned_network_that_is_wrong_is_not_used(planned):
    served, network, inputs = planned
    verdicts = iter(["result 0 differs", None])
    run, groups, note = served.plan(network, inputs, "cached", lambda result: next(verdicts))
    assert isinstance(run, Captured) and note == "the planned network is not used: result 0 differs"
    assert {g.backend for g in groups} == {"pytorch"}
    run, groups, note = served.plan(network, inputs, "cached", lambda result: "is wrong")
    assert run is None and groups == [] and "PyTorch's kernels in a graph are not used: is wrong" in note


@torch.no_grad()
@pytest.mark.parametrize("error", [RuntimeError("no memory"), KeyError("x"), ValueError("no way")], ids=repr)
def test_whatever_fails_in_planning_there_is_a_network(error, planned, monkeypatch, caplog):
    served, network, inputs = planned

    def broken(*args, **options):
        raise error

    monkeypatch.setattr(triton_conv, "launch", broken)
    with caplog.at_level(logging.CRITICAL):
        run, groups, note = served.plan(network, inputs, "full", fine)
    assert type(error).__name__ in note and torch.equal(run(inputs), served.eager.run(network, inputs))
    assert {g.backend for g in groups} == {"pytorch"}


@torch.no_grad()
def test_a_capture_that_fails_runs_uncaptured_and_says_so(planned, recorder, monkeypatch):
    served, network, inputs = planned
    recorder.refuses = RuntimeError("operation not permitted when stream is capturing")
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *a: None, raising=False)
    run, _, note = served.plan(network, inputs, "cached", fine)
    assert type(run) is Ordered
    assert note == "runs without a CUDA graph: RuntimeError: operation not permitted when stream is capturing"
    recorder.since()
    want = served.eager.run(network, inputs)
    assert torch.allclose(run(inputs), want, atol=1e-5)
    assert recorder.since() == ["main waits for the event", "an input is used on main", "event on main"]


@torch.no_grad()
def test_one_problem_without_an_answer_costs_its_steps_only(planned, monkeypatch):
    served, network, inputs = planned
    tune = gpu.tune

    def fails(problems, mode, device=None):
        problems = list(problems)
        if any("512x" in p.key for p in problems):
            raise RuntimeError(f"{problems[0].key}: no candidate is right:\n  more")
        return tune(problems, mode, device)

    monkeypatch.setattr(gpu, "tune", fails)
    run, groups, note = served.plan(network, inputs, "cached", fine)
    assert {g.backend for g in groups} >= {"triton", "pytorch"} and "no candidate is right" in note
    assert any(g.why == "no kernel here is right for it" for g in groups)
    assert torch.allclose(run(inputs), served.eager.run(network, inputs), atol=1e-5)


@pytest.fixture
def bottlenecks(recorder, monkeypatch):
    """(gpu, network, inputs, asked): asked gets the keys of problems whenever some are tuned."""
    for module in (cases, chain_cases, gpu):
        monkeypatch.setattr(module, "triton_unavailable", lambda: None)
    graph, x = capture(torchvision.models.resnet50(num_classes=8).eval()), torch.randn(1, 3, 64, 64)
    propagate(graph, (x,))
    served, asked = gpu.Gpu(EagerExecutor(graph.module.half(), torch.float16), torch.device("cpu", 0)), []

    def tune(problems, mode, device=None):
        assert mode == "cached"
        problems = list(problems)
        asked.append({p.key for p in problems})
        found = ((p.key, p.build().candidates()[0]) for p in problems)
        return Results((key, Result(key, chosen, "forecast", True, expected=costs(key))) for key, chosen in found)

    monkeypatch.setattr(gpu, "tune", tune)
    monkeypatch.setattr(gpu, "expected", lambda problems, device=None: {p.key: costs(p.key) for p in problems})
    return served, match(graph), (x.half(),), asked


def costs(key: str) -> float:
    """Chains that end with the next reduction pay, others do not."""
    return (1e-6 if "quarter" in key else 1e-2) if key.startswith("chain") else 1e-3


@torch.no_grad()
@pytest.mark.parametrize("which", ["quarter", "chain", "nothing"])
def test_cached_verifies_what_is_on_the_way_and_nothing_else(which, bottlenecks, monkeypatch):
    """Whatever of it covers several steps: those one by one were not asked for, and are no way around."""
    served, network, inputs, asked = bottlenecks
    monkeypatch.setitem(
        globals(), "costs", lambda key: 1e-6 if which in key else 1e-2 if key.startswith("chain") else 1e-3
    )
    pieces, results = served.pieces(network, inputs, "cached", notes := [])
    way = gpu.cheapest(network, pieces, results)
    assert all(p.args is not None or p.steps[0].op == "traced" for p in way)
    keys = {p.key for p in way if p.args is not None}
    assert asked == [keys] == [results.keys()] and not notes
    chains = [p for p in way if p.key and p.key.startswith("chain")]
    assert len(chains) == {"quarter": 3, "chain": 16, "nothing": 0}[which]


@torch.no_grad()
@pytest.mark.parametrize("how", ["is slower than expected", "falls back", "has no answer"])
def test_a_piece_that_turns_out_otherwise_is_left_for_another_way(how, bottlenecks, monkeypatch, caplog):
    served, network, inputs, asked = bottlenecks
    tune = gpu.tune

    def otherwise(problems, mode, device=None):
        problems = list(problems)
        if how == "has no answer" and any(p.key.startswith("chain") for p in problems):
            raise RuntimeError("chain: no candidate is right:\n  more")
        found = tune(problems, mode, device)
        for key, result in found.items():
            if key.startswith("chain"):
                result.expected = 1.0 if how == "is slower than expected" else None
        return found

    monkeypatch.setattr(gpu, "tune", otherwise)
    with caplog.at_level(logging.ERROR):
        pieces, results = served.pieces(network, inputs, "cached", notes := [])
    way = gpu.cheapest(network, pieces, results)
    assert not any(p.key.startswith("chain") for p in way) and all(p.args is not None for p in way)
    assert {p.key for p in way} <= results.keys() == set.union(*asked)  # what came in the chains' place was verified
    assert ("no candidate is right" in " ".join(notes)) == (how == "has no answer")


@torch.no_grad()
def test_a_step_that_nothing_is_right_for_runs_by_pytorch(bottlenecks, monkeypatch, caplog):
    served, network, inputs, _ = bottlenecks
    tune = gpu.tune

    def fails(problems, mode, device=None):
        problems = list(problems)
        if any(p.key.startswith("stem") for p in problems):
            raise RuntimeError("stem: no candidate is right:\n  more")
        return tune(problems, mode, device)

    monkeypatch.setattr(gpu, "tune", fails)
    with caplog.at_level(logging.ERROR):
        pieces, results = served.pieces(network, inputs, "cached", [])
    way = gpu.cheapest(network, pieces, results)
    assert way[0].args is None and way[0].steps[0].op == "stem"
    assert {p.key for p in way[1:]} <= results.keys()


@torch.no_grad()
def test_a_plan_tells_what_was_forecast(planned, monkeypatch):
    served, network, inputs = planned
    tune = gpu.tune

    def forecast(problems, mode, device=None):
        return Results((k, replace(r, source="forecast", expected=1e-5)) for k, r in tune(problems, mode).items())

    monkeypatch.setattr(gpu, "tune", forecast)
    _, groups, note = served.plan(network, inputs, "cached", fine)
    count = sum(g.backend != "traced" for g in groups)
    assert note == f"{count} of {count} choices by forecast: what was fastest in others like them"
    assert not any(g.seconds for g in groups)  # expected is not measured


@torch.no_grad()
def test_nothing_of_ours_is_tuned_where_nothing_can_run(planned, monkeypatch):
    served, network, inputs = planned
    monkeypatch.setattr(gpu, "chip", lambda device: (75, 40))
    asked = []
    tune = gpu.tune
    monkeypatch.setattr(gpu, "tune", lambda problems, mode, device=None: asked.append(mode) or tune(problems, mode))
    _, _, note = served.plan(network, inputs, "full", fine)
    assert "needs compute capability 8.0 or newer, got 7.5" in note and asked == ["off"]


@torch.no_grad()
def test_refresh_comes_after_earlier_calls_and_before_later_ones(planned, recorder):
    served, network, inputs = planned
    run, *_ = served.plan(network, inputs, "cached", fine)
    recorder.since()
    served.wait()
    served.eager.refresh()
    served.refresh()
    assert recorder.since() == ["main waits for the event", "main waits for the event", "event on main"]
    for m in served.eager.eager.module.modules():
        if isinstance(m, torch.nn.Conv2d):
            m.weight.mul_(1.1)
    served.eager.refresh()
    served.refresh()
    assert torch.allclose(run(inputs), served.eager.run(network, inputs), atol=1e-4)


def test_traced_parts_keep_their_memory_through_refresh():
    """A graph reads the memory it was captured with."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.Sigmoid(), torch.nn.GroupNorm(2, 4)).eval()
    graph = capture(model)
    propagate(graph, (torch.randn(1, 3, 4, 4),))
    for dtype in (torch.float32, torch.float64):
        eager = EagerExecutor(graph.module, dtype)
        with torch.no_grad():
            x = torch.randn(1, 3, 4, 4)
            eager.run(match(graph), (x,))
            (norm,) = (m for m in eager.eager.cast.values() if isinstance(m, torch.nn.GroupNorm))
            place = norm.weight.data_ptr()
            graph.module.get_parameter("2.weight").add_(1)
            assert place != graph.module.get_parameter("2.weight").data_ptr()
            eager.refresh()
            assert norm.weight.data_ptr() == place
            assert torch.equal(norm.weight, graph.module.get_parameter("2.weight").to(dtype))


def test_values_are_let_go_after_their_last_reader():
    """PyTorch's operators need no more memory at a time than the untouched model."""
    graph = capture(torchvision.models.resnet18().eval())
    propagate(graph, (torch.randn(1, 3, 64, 64),))
    network = match(graph)
    alive, most = set(), 0
    groups = [[step] for step in network.steps]
    for step, over in zip(network.steps, network.releases(groups), strict=True):
        assert alive.isdisjoint(over) or set(over) <= alive | {"x", step.output}
        alive |= {step.output}
        most = max(most, len(alive))
        alive -= set(over)
    assert most == 3 and alive == {"fc"}


def test_a_new_shape_inside_a_callers_graph_is_refused(recorder, monkeypatch):
    fast = fused_resnet.optimize_for_inference(
        torchvision.models.resnet18(num_classes=4), torch.randn(1, 3, 32, 32), tune="off"
    )
    monkeypatch.setattr(fast, "_device", torch.device("cuda", 0))
    recorder.capturing = True
    with pytest.raises(RuntimeError, match=r"\[1, 3, 40, 40\] is new; call it once before you capture"):
        monkeypatch.setattr(fast, "_checked", lambda inputs, argument: inputs)
        fast(torch.randn(1, 3, 40, 40))


# --- the problems -----------------------------------------------------------------------------------------------------

CONV = cases.ConvArgs(2, 16, 5, 7, 24, (3, 3), (1, 1), (1, 1), (1, 1), True, False, None, "cpu", "float32", False)
POINTWISE = replace(CONV, kernel=(1, 1), padding=(0, 0))
STEM = cases.StemArgs(1, 19, 23, 16, False, "float32", "cpu", "float32", False)
CHAIN = chain_cases.ChainArgs(1, 16, 6, 7, 16, 32, 0, 1, True, False, None, False, False, "cpu", "float32")
PROBLEMS = {
    "conv": CONV,
    "conv-stride2": replace(CONV, stride=(2, 2)),
    "conv-padding0": replace(CONV, padding=(0, 0)),
    "conv-oblong": replace(CONV, stride=(2, 1), padding=(1, 0)),
    "conv-dilated": replace(CONV, dilation=(2, 2), padding=(2, 2)),
    "conv-no-relu": replace(CONV, relu=False),
    "conv-residual": replace(POINTWISE, residual=True),
    "conv-segment": replace(POINTWISE, segment=(8, 9, 13, 2)),
    "conv-quartered": replace(POINTWISE, segment=(8, 5, 7, 1)),
    "conv-float16": replace(CONV, dtype="float16"),
    "conv-tf32": replace(CONV, tf32=True),
    "grouped": cases.GroupedArgs(**vars(CONV), groups=4),
    "grouped-residual": cases.GroupedArgs(**vars(replace(CONV, residual=True, c=12)), groups=2),
    "stem": STEM,
    "stem-nhwc": replace(STEM, channels_last=True),
    "stem-float64": replace(STEM, input_dtype="float64"),
    "chain": CHAIN,
    "chain-no-relu": replace(CHAIN, relu=False),
    "chain-stride2-segment": replace(CHAIN, stride=2, segment=(8, 6, 7, 2)),
    "chain-quartered": replace(CHAIN, stride=2, segment=(8, 3, 4, 1)),
    "chain-residual-next-quarter": replace(CHAIN, residual=True, following=16, quarter=True),
    "chain-pool": replace(CHAIN, pool=True),
    "pool": cases.PoolArgs(2, 16, 3, 5, "cpu", "float32"),
}


@pytest.mark.parametrize("args", PROBLEMS.values(), ids=PROBLEMS)
def test_a_problem_survives_json_and_agrees_with_its_reference(args):
    problem = args.problem()
    again = Problem(**json.loads(json.dumps(problem.as_json())))
    assert again == problem and again.id == problem.id
    case = again.build()
    assert case.args == args
    inputs, outputs = case.inputs(CPU, 0), case.outputs(CPU)
    assert all(torch.equal(t, case.inputs(CPU, 0)[k]) for k, t in inputs.items())
    assert any(not torch.equal(t, case.inputs(CPU, 1)[k]) for k, t in inputs.items())
    for name, t in (*inputs.items(), *outputs.items()):
        if t.dim() == 4 and not (name == "x" and isinstance(args, cases.StemArgs)):
            assert t.is_contiguous(memory_format=torch.channels_last), name
    for t in outputs.values():
        t.fill_(float("nan"))
    case.run(cases.CUDNN, inputs, outputs)
    expected = case.reference(inputs)
    assert expected.keys() == outputs.keys()
    for name, want in expected.items():
        assert outputs[name].shape == want.shape and want.dtype is torch.float32
        error = ((outputs[name].float() - want).norm() / want.norm()).item()
        assert error <= case.tolerance[outputs[name].dtype], name


def test_different_problems_have_different_keys():
    keys = [args.problem().key for args in PROBLEMS.values()]
    assert len(set(keys)) == len(keys)


def test_the_reference_is_the_ops_twin():
    case = cases.ConvCase(PROBLEMS["conv-segment"])
    t = case.inputs(CPU, 3)
    want = reference.conv_bias_act(
        t["x"], t["weight"], t["bias"], stride=(1, 1), padding=(0, 0), segment=(t["x2"], t["weight2"], 2)
    )
    assert torch.equal(case.reference(t)["y"], want)


@pytest.mark.parametrize("n", [1, 7, 16, 24, 32, 128])
def test_few_images_stand_for_many_when_kernels_are_compiled(n, monkeypatch):
    """What a launch is specialised on, whether 16 divides a size, is the same."""
    seen = []
    monkeypatch.setattr(cases.ConvCase, "prepare", lambda self, candidate: seen.append(self.args.n))
    cases.ConvCase(replace(CONV, n=n)).compile(Candidate("triton", "x"))
    assert seen == [16 if n > 16 and n % 16 == 0 else n]


def test_the_library_is_left_as_it_was_whichever_way_tf32_is_set():
    cudnn = torch.backends.cudnn
    for value in ("ieee", "tf32"):
        before = cudnn.conv.fp32_precision
        cudnn.conv.fp32_precision = value  # the newer interface: reading allow_tf32 raises now
        try:
            with cases.library(exact=True):
                assert cudnn.conv.fp32_precision == "ieee" and cudnn.deterministic and cudnn.benchmark
            assert cudnn.conv.fp32_precision == value and not cudnn.benchmark
            child.set_flags(child.flags())
        finally:
            cudnn.conv.fp32_precision = before


def test_one_gpus_problems_are_its_twins_too():
    graph, x = capture(torchvision.models.resnet18().eval()), torch.randn(1, 3, 32, 32)
    propagate(graph, (x,))
    network = match(graph)
    ids = [
        {p.args.problem().id for p in Pieces(network, torch.float32, device, False, {"x": x}).all() if p.args}
        for device in (torch.device("cpu", 0), torch.device("cpu", 1))
    ]
    assert ids[0] == ids[1] and len(ids[0]) > 10


def test_without_triton_the_package_is_there():
    """PyTorch for CPUs comes without it."""
    code = "import sys; sys.modules['triton'] = None; import fused_resnet; from fused_resnet.engine import cases; "
    code += "print(cases.triton_unavailable())"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    assert "cannot import triton" in answer.stdout


# --- the stem in front of the graph -----------------------------------------------------------------------------------


def begins(model, x, monkeypatch):
    """A program whose stem is compiled, and whether it begins alone."""
    monkeypatch.setattr(gpu, "DEAR_COPY", 1)
    graph = capture(model)
    propagate(graph, (x,))
    network, eager = match(graph), EagerExecutor(graph.module, torch.float16)
    pieces = [p for p in Pieces(network, torch.float16, CPU, False, {"x": x}).all() if len(p.steps) == 1]
    stem, other = Candidate("cuda", "stem", {"rows": 1}), cases.CUDNN
    results = Results(
        {
            p.key: Result(p.key, stem if isinstance(p.args, cases.StemArgs) else other, "measured", True)
            for p in pieces
            if p.args is not None
        }
    )
    program = gpu.Program(network, pieces, results, gpu.Packed(eager.eager), eager.eager, CPU)
    return program, program.begins_alone((x,))


class Stem(torch.nn.Module):
    def __init__(self, more=lambda x, y: y):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 64, 7, 2, 3)
        self.last = torch.nn.Conv2d(64, 8, 1)
        self.more = more

    def forward(self, x):
        y = torch.nn.functional.max_pool2d(self.conv(x).relu(), 3, 2, 1)
        return self.more(x, self.last(y))


@torch.no_grad()
def test_a_compiled_stem_begins_alone_and_the_rest_follows(monkeypatch):
    model, x = Stem().eval().half(), torch.randn(2, 3, 16, 18).half()

    def launch(config, x, weight, bias, out):
        out.copy_(reference.stem_pool(x, model.conv.weight, bias))

    monkeypatch.setattr(compiled_stem, "launch", launch)
    program, alone = begins(model, x, monkeypatch)
    assert alone
    want = program.run((x,)).clone()
    program.run((torch.zeros_like(x),))
    program.begin((x,))
    assert torch.equal(program.rest(()), want) and (want - model(x)).norm() < 2e-3 * want.norm()
    monkeypatch.setattr(gpu, "DEAR_COPY", x.nbytes + 1)
    assert not program.begins_alone((x,))


@pytest.mark.parametrize(
    "more",
    [lambda x, y: (x, y), lambda x, y: y + x.mean(), lambda x, y: y * x.shape[0] + x[0, 0, 0, 0]],
    ids=["returned", "read", "indexed"],
)
def test_a_stem_whose_input_is_used_again_does_not_begin_alone(more, monkeypatch):
    assert not begins(Stem(more).eval().half(), torch.randn(2, 3, 16, 18).half(), monkeypatch)[1]


def test_a_copy_that_is_raced_is_one_of_what_the_caller_gives(recorder):
    run = Captured(twice, (torch.ones(2),), Turns(GPU0))
    run.again((torch.full((2,), 4.0),))
    assert run.static[0].tolist() == [4, 4]
