"""The tuner: no wrong candidate is chosen, none takes the process with it, and what is remembered can be trusted."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import stat
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
import tuning_cases
from tuning_cases import candidate

from fused_resnet.engine import cache as caches
from fused_resnet.engine import child as children
from fused_resnet.engine import guard, timing
from fused_resnet.engine import nursery as nurseries
from fused_resnet.engine import tune as tuning
from fused_resnet.engine.cache import Cache
from fused_resnet.engine.child import Limits
from fused_resnet.engine.nursery import Nursery
from fused_resnet.engine.problem import Candidate, Problem
from fused_resnet.engine.tune import tune

CPU = torch.device("cpu")
BAD = {
    "wrong": "output 'y' is off by 1.0e-02 (2-norm; the limit is 1e-05)",
    "one_element_wrong": "an element of output 'y' is off by",
    "one_row_too_many": "wrote out of bounds of output 'y', after its end",
    "one_row_too_early": "wrote out of bounds of output 'y', before its start",
    "reads_out_of_bounds": f"output 'y' is not finite, or was not written, in {tuning_cases.COLUMNS} places",
    "one_row_missing": f"output 'y' is not finite, or was not written, in {tuning_cases.COLUMNS} places",
    "writes_its_input": "changed its input 'a'",
    "writes_beside_its_input": "wrote out of bounds of input 'a', after its end",
    "raising": "raised ValueError: bad launch",
    "does_not_compile": "raised NotImplementedError: no such instruction",
    "differing": "two runs on the same inputs differ in output 'y'",
    "wearing_out": "after it was timed: output 'y' is off by",
}
FATAL = {
    "hanging": "did not return from 'verify' within 3 s",
    "dying": "its process died by SIGSEGV",
    "poisoning": "raised RuntimeError: CUDA error: an illegal memory access",
    "exiting": "its process ended with exit status 3 (assertion failed: k < 16)",
    "dying_late": "while timed: its process died by SIGABRT",
    "sabotaging": "raised ValueError: but who did it?",
}


def problem(*names, key="product", factory="product", **args) -> Problem:
    return Problem(key, f"tuning_cases:{factory}", {**({"names": names} if names else {}), **args})


def trusted(*names, **args) -> Problem:
    return problem(*names, trusted=True, **args)


def reasons(result) -> dict[str, str | None]:
    return {t.candidate.config["name"]: t.reason for t in result.trials}


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """A short race; and no test finds what another one has measured, or a table."""
    monkeypatch.setattr(timing, "RACE_S", 0.1)
    monkeypatch.setenv(caches.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(caches, "TABLES", tmp_path / "tables")


UNTOUCHED = """
import torch
def touched(*args): raise AssertionError("CUDA was touched")
names = ["_cuda_init", "_cuda_getDeviceCount"]
before = {name: getattr(torch._C, name) for name in names if hasattr(torch._C, name)}
for name in before: setattr(torch._C, name, touched)
from fused_resnet.engine import child, nursery
for name in before: setattr(torch._C, name, before[name])
"""


@pytest.fixture(scope="module")
def nursery():
    """One for all tests: it takes seconds to start."""
    first, _, rest = nurseries.COMMAND.partition("from fused_resnet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nurseries, "COMMAND", f"{first.rstrip('; ')}\n{UNTOUCHED}\nfrom fused_resnet{rest}")
        shared = Nursery()
        shared.start()
    yield shared
    shared.close()


@pytest.fixture
def one_nursery(monkeypatch, nursery):
    monkeypatch.setattr(tuning, "Nursery", lambda: nursery)
    monkeypatch.setattr(Nursery, "close", lambda self: None)


@pytest.fixture
def no_child(monkeypatch):
    def start(self):
        raise AssertionError("a child was started")

    monkeypatch.setattr(children.Child, "_start", start)


@pytest.fixture
def untouched(monkeypatch, no_child):
    """Nothing may run."""
    monkeypatch.setattr(tuning_cases.Product, "run", lambda *args: pytest.fail("a candidate ran"))


# --- candidates that are wrong ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def child_result(nursery):
    """Every bad candidate among good ones, in a child."""
    names = ["plain", *BAD, *FATAL, "packed", "slow"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "Nursery", lambda: nursery)
        patch.setattr(Nursery, "close", lambda self: None)
        return tune([problem(*names, kind="product")], cache=False, limits=Limits(verify=3))["product"]


@pytest.mark.parametrize("name", [*BAD, *FATAL])
def test_a_bad_candidate_is_dropped_with_its_reason(child_result, name):
    assert reasons(child_result)[name].startswith({**BAD, **FATAL}[name])
    assert next(t for t in child_result.trials if t.candidate.config["name"] == name).seconds is None


def test_the_good_ones_survive_and_the_best_is_chosen(child_result):
    found = reasons(child_result)
    assert [name for name, reason in found.items() if reason is None] == ["plain", "packed", "slow"]
    assert child_result.chosen.config["name"] in ("plain", "packed")
    assert child_result.source == "measured" and child_result.verified
    p20, p50, p80 = child_result.seconds
    assert 0 < p20 <= p50 <= p80 < 0.003
    slow = child_result.trials[-1]
    assert slow.candidate.config["name"] == "slow" and slow.seconds[0] > 0.003
    text = str(child_result)
    assert text.startswith("product: test: p") and "dying: its process died by SIGSEGV" in text and "TFLOP/s" in text


@pytest.mark.parametrize("name", BAD)
def test_trusted_candidates_are_verified_in_this_process(no_child, name):
    result = tune([trusted("plain", name)], cache=False)["product"]
    assert reasons(result)["plain"] is None
    assert reasons(result)[name].startswith(BAD[name])
    assert result.chosen == candidate("plain")


def test_all_bad_is_an_error_with_every_reason(no_child):
    names = ["wrong", "raising", "one_row_too_many"]
    with pytest.raises(RuntimeError, match="product: no candidate is right") as error:
        tune([trusted(*names)])
    for name in names:
        assert f"{candidate(name)}: {BAD[name]}" in str(error.value)


def test_all_bad_takes_a_verified_fallback(no_child):
    wanted = [trusted("wrong", "raising", fallback="plain")]
    for _ in range(2):
        result = tune(wanted)["product"]
        assert result.chosen == candidate("plain") and set(reasons(result)) == {"wrong", "raising"}
    assert result.source == "cache"
    with pytest.raises(RuntimeError, match="one row too many: wrote out of bounds"):
        tune([trusted("wrong", fallback="one_row_too_many")])


def test_a_case_that_cannot_be_judged(no_child):
    with pytest.raises(RuntimeError, match="the problem has no reference: ValueError: reference: expected some of"):
        tune([problem(factory="without_reference")])


def test_a_case_that_cannot_be_built():
    with pytest.raises(OSError, match="no such file"):
        tune([problem(factory="unbuildable")])
    with pytest.raises(ValueError, match="module:function"):
        tune([Problem("x", "no_colon")])
    with pytest.raises(RuntimeError, match="product: there is no candidate"):
        tune([Problem("product", "tuning_cases:product", {"names": []})])


def test_arguments():
    with pytest.raises(ValueError, match="mode: expected one of full, cached, off, got 'fast'"):
        tune([trusted()], "fast")
    with pytest.raises(ValueError, match="two different ones have the key 'product'"):
        tune([trusted(), trusted("plain")])
    assert tune([]) == {}


# --- guard zones ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_guarded_tensors_lie_as_the_original_does(dtype, format):
    like = torch.zeros(2, 3, 7, 9, dtype=dtype).contiguous(memory_format=format)
    guarded = guard.Guarded(like, guard.AROUND_OUTPUT)
    assert guarded.tensor.shape == like.shape and guarded.tensor.stride() == like.stride()
    assert guarded.tensor.dtype is dtype and guarded.tensor.data_ptr() % 64 == like.data_ptr() % 64
    guarded.tensor.copy_(like)
    assert guarded.breach() is None
    flat = guarded.tensor.as_strided((like.numel() + 1,), (1,))
    flat[-1] = 0
    assert guarded.breach() == "after its end"


def test_errors_see_one_wrong_element():
    expected = torch.randn(1000, 50, dtype=torch.float64)
    assert guard.errors(expected.float(), expected)[1] < 1e-6
    value = expected.clone()
    value[3, 4] = 100
    norm, element, strays = guard.errors(value, expected)
    assert norm < 1 < element and strays == 0
    value[3, 4] = float("nan")
    assert guard.errors(value, expected)[2] == 1
    assert guard.errors(torch.zeros(0, 3), torch.zeros(0, 3)) == (0, 0, 0)
    assert guard.errors(torch.tensor(2.0), torch.tensor(1.0))[0] == 1


# --- timing -----------------------------------------------------------------------------------------------------------


def test_the_race_takes_turns_and_ends_early_for_the_slow():
    turns, dropped = [], []
    speed = {"plain": 1.0, "packed": 1.1, "transposed": 1.3, "slow": 2.0}

    def sample(c):
        turns.append(c.config["name"])
        return speed[c.config["name"]]

    times = timing.race([candidate(n) for n in speed], sample, lambda c: dropped.append(c.config["name"]))
    assert {n: len(times[candidate(n).id]) for n in speed} == {"plain": 21, "packed": 21, "transposed": 9, "slow": 3}
    assert dropped == ["slow", "transposed"]
    assert turns[:12] == ["plain", "packed", "transposed", "slow"] + ["packed", "transposed", "slow", "plain"] + [
        "transposed",
        "slow",
        "plain",
        "packed",
    ]


def test_the_race_ends_at_its_deadline_with_a_sample_of_each():
    times = timing.race([candidate("plain"), candidate("slow")], lambda c: 1.0, deadline=time.monotonic() - 1)
    assert {len(samples) for samples in times.values()} == {1}
    assert timing.percentiles([2.0]) == (2, 2, 2)


def test_rotated_buffers_exceed_the_cache(monkeypatch):
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 2**20)
    for size in (2**17 * 3, 2**19, 2**24):
        assert timing.sets(size, CPU) * size > 2**20
    assert timing.sets(1, CPU) == timing.MOST_SETS["cpu"]
    assert timing.sets(2**30, CPU) == 1
    seen = set()
    case = tuning_cases.Product()
    case.run = lambda c, inputs, outputs: seen.add(outputs["y"].data_ptr())
    timer = timing.Timer(case, CPU, case.inputs(CPU, 0), case.outputs(CPU))
    timer.sample(candidate("plain"))
    assert len(seen) == timing.MOST_SETS["cpu"]


def test_a_budget_leaves_the_rest_untried_and_uncached(no_child):
    wanted = [trusted(), trusted(key="second")]
    results = tune(wanted, budget_s=0)
    for result in results.values():
        assert reasons(result) == {name: None if name == "plain" else tuning.NOT_TRIED for name in tuning_cases.NAMES}
        assert result.chosen == candidate("plain") and result.verified
    assert not caches.folder().exists()


@pytest.fixture
def short_at_first(no_child, monkeypatch):
    """The first problem has no time at its first turn; what else happens is up to `then`. Says who was measured."""
    seen, then, measure = [], {}, tuning._Tuner._measure

    def measured(self, problem, case, failed, until, bar):
        seen.append(problem.key)
        until = 0.0 if seen == ["first"] else until
        if problem.key in then and len(seen) > 2:
            return then[problem.key](self, problem, case, failed, until, bar)
        return measure(self, problem, case, failed, until, bar)

    monkeypatch.setattr(tuning._Tuner, "_measure", measured)
    return seen, then, measure


def test_what_had_too_little_time_gets_what_others_left(short_at_first):
    wanted = [trusted(key="first"), trusted(key="second")]
    results = tune(wanted, budget_s=60)
    assert short_at_first[0] == ["first", "second", "first"]
    assert all(t.reason is None for r in results.values() for t in r.trials)
    assert all(r.source == "cache" for r in tune(wanted, "cached").values())


def test_a_second_turn_that_fails_leaves_what_the_first_found(short_at_first):
    seen, then, _ = short_at_first

    def fails(*args):
        raise RuntimeError("first: no candidate is right")

    then["first"] = fails
    result = tune([trusted(key="first"), trusted(key="second")], budget_s=60)["first"]
    assert seen == ["first", "second", "first"]
    assert result.source == "measured" and result.chosen == candidate("plain") and result.verified


def test_a_second_turn_that_times_fewer_candidates_does_not_count(short_at_first):
    seen, then, measure = short_at_first
    again = []

    def short_once_more(self, problem, case, failed, until, bar):
        again.append(measure(self, problem, case, failed, 0.0, bar))
        return again[0]

    then["first"] = short_once_more
    results = tune([trusted(key="first"), trusted(key="second")], budget_s=60)
    assert seen == ["first", "second", "first"] and results["first"].seconds
    assert results["first"] is not again[0][0]


@pytest.mark.parametrize("budget_s", [None, 0])
def test_without_time_to_spare_there_is_no_second_turn(short_at_first, budget_s):
    tune([trusted(key="first"), trusted(key="second")], budget_s=budget_s)
    assert short_at_first[0] == ["first", "second"]


def test_the_child_is_at_work_before_the_first_problem(one_nursery, monkeypatch):
    steps, request = [], children.Child._request

    def requested(self, step, *args, **facts):
        steps.append(step)
        return request(self, step, *args, **facts)

    monkeypatch.setattr(children.Child, "_request", requested)
    tune([problem("plain")], jobs=1)
    assert steps[:3] == ["start", "warm_up", "open"]


# --- modes and the cache ----------------------------------------------------------------------------------------------


def files(folder=None):
    return sorted((folder or caches.folder()).glob("*.json"))


def test_round_trip(no_child):
    first = tune([trusted()])["product"]
    assert first.source == "measured" and len(files()) == 1
    again = tune([trusted()])["product"]
    assert again.source == "cache" and again.verified
    assert again.chosen == first.chosen and again.trials == first.trials and again.seconds == first.seconds
    cached = tune([trusted()], "cached")["product"]
    assert cached.source == "cache" and cached.chosen == first.chosen


def test_what_is_known_needs_no_child(one_nursery, monkeypatch):
    """Measured in a child, once; then verified here."""
    first = tune([problem("packed", "plain")])["product"]
    monkeypatch.setattr(children.Child, "_start", lambda self: pytest.fail("a child was started"))
    again = tune([problem("packed", "plain")])["product"]
    assert (again.source, again.chosen) == ("cache", first.chosen)


def test_other_arguments_or_candidates_are_another_problem(no_child):
    tune([trusted()])
    assert tune([trusted("plain", "slow")])["product"].source == "measured"
    assert tune([trusted(dtype="float64", names=["plain"])], "cached")["product"].source == "default"


def test_candidates_that_came_later_are_measured(no_child, monkeypatch):
    wanted = trusted("packed", "slow")
    assert tune([wanted])["product"].chosen == candidate("packed")
    offered = [candidate("transposed"), candidate("packed")]
    monkeypatch.setattr(tuning_cases.Product, "candidates", lambda self: offered)
    cached = tune([wanted], "cached")["product"]
    assert (cached.source, cached.chosen) == ("cache", candidate("packed"))
    assert tune([wanted])["product"].source == "measured"
    offered[1] = candidate("plain")  # and the one that was chosen is gone
    offered[0] = candidate("slow")
    cached = tune([wanted], "cached")["product"]
    assert (cached.source, cached.chosen) == ("default", candidate("slow"))


def test_a_remembered_choice_that_is_wrong_now_is_made_again(no_child, monkeypatch, caplog):
    chosen = tune([trusted("packed", "slow")])["product"].chosen
    assert chosen == candidate("packed")
    monkeypatch.setattr(tuning_cases, "packed", tuning_cases.wrong)
    with caplog.at_level(logging.WARNING, "fused_resnet"):
        assert tune([trusted("packed", "slow")], "cached")["product"].chosen == candidate("slow")
        assert tune([trusted("packed", "slow")])["product"].chosen == candidate("slow")
    assert "the choice is made again" in caplog.text
    monkeypatch.undo()


def test_cached_takes_the_first_that_is_right_and_writes_nothing(no_child, monkeypatch):
    monkeypatch.setattr(timing.Timer, "sample", lambda *args: pytest.fail("timed"))
    result = tune([trusted("wrong", "slow", "plain")], "cached")["product"]
    assert result.chosen == candidate("slow") and result.source == "default" and result.seconds is None
    assert reasons(result) == {"wrong": BAD["wrong"], "slow": None}
    assert not caches.folder().exists()


def test_off_runs_and_reads_and_writes_nothing(untouched, monkeypatch):
    monkeypatch.setattr(Cache, "__init__", lambda *args: pytest.fail("the cache was opened"))
    result = tune([problem("hanging", "plain")], "off")["product"]
    assert result.chosen == candidate("hanging") and not result.verified and result.source == "default"


def test_what_failed_for_want_of_memory_is_tried_again(no_child):
    for _ in range(2):
        result = tune([trusted("plain", "hungry")])["product"]
        assert result.source == "measured" and reasons(result)["hungry"].startswith("raised OutOfMemoryError")
    with pytest.raises(RuntimeError, match="has no reference"):
        tune([problem(factory="without_reference")])
    assert not caches.folder().exists()


def test_no_cache(no_child):
    assert tune([trusted()], cache=False)["product"].source == "measured"
    assert not caches.folder().exists()


def test_a_folder_of_ones_own(no_child, tmp_path):
    tune([trusted()], cache=tmp_path / "own")
    assert files(tmp_path / "own") and not caches.folder().exists()
    assert tune([trusted()], cache=str(tmp_path / "own"))["product"].source == "cache"
    assert "1 problems in" in str(Cache(tmp_path / "own", caches.environment(CPU)))


def entry(name="plain", seconds=(1.0, 2.0, 3.0)) -> dict:
    facts = {"backend": "test", "label": name, "config": {"name": name}}
    return {
        "chosen": facts,
        "candidates": "0",
        "trials": [{"candidate": facts, "seconds": list(seconds), "reason": None}],
    }


HERE = {"device": "cpu", "cpu": "A CPU", "threads": 2, "torch": "2"}


def broken(**changes) -> str:
    """An otherwise valid file with one valid entry and one damaged."""
    return caches.dump(HERE, {"good": entry(), "bad": {**entry(), **changes}})


DAMAGED = {
    "empty": "",
    "not json": "tuning results",
    "truncated": caches.dump(HERE, {"good": entry()})[:-40],
    "not utf-8": b"\xff\xfe\x00",
    "deep": "[" * 100_000,
    "list": "[]",
    "number": "1",
    "old schema": json.dumps({"schema": 0, "environment": HERE, "entries": {}}),
    "bool schema": json.dumps({"schema": True, "environment": HERE, "entries": {}}),
    "no schema": "{}",
    "huge schema": '{"schema": ' + "9" * 5000 + "}",
    "entries a list": json.dumps({"schema": 1, "environment": HERE, "entries": []}),
    "no environment": json.dumps({"schema": 1, "environment": None, "entries": {}}),
    "entry null": json.dumps({"schema": 1, "environment": HERE, "entries": {"good": entry(), "bad": None}}),
    "chosen a string": broken(chosen="plain"),
    "trials a dict": broken(trials={}),
    "times reversed": broken(trials=entry(seconds=(3.0, 2.0, 1.0))["trials"]),
    "times negative": broken(trials=entry(seconds=(-1.0, 2.0, 3.0))["trials"]),
    "times strings": broken(trials=entry(seconds=("1", "2", "3"))["trials"]),
    "times booleans": broken(trials=entry(seconds=(True, True, True))["trials"]),
    "times infinite": broken().replace("1.0,", "1e999,"),
    "times of nothing": broken(trials=entry(seconds=(5e-324, 2.0, 3.0))["trials"]),
    "times huge": broken().replace("3.0", "9" * 400),
    "times not numbers": broken().replace("1.0", "NaN"),
    "config infinite": broken().replace('"name": "plain"', '"name": -1e999'),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_are_ignored_with_one_warning_and_rewritten(tmp_path, caplog, content):
    path = Cache(tmp_path, HERE).path
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with caplog.at_level(logging.WARNING, "fused_resnet"):
        cache = Cache(tmp_path, HERE)
        assert "bad" not in cache.entries
        cache.store({"new": entry("packed")})
    assert len(caplog.records) == 1 and "ignored" in caplog.text
    caplog.clear()
    again = Cache(tmp_path, HERE)
    assert again.entries["new"] == entry("packed") and "bad" not in again.entries
    assert not caplog.records and not list(tmp_path.glob("*.tmp"))


def test_a_folder_in_the_place_of_the_file(tmp_path, caplog):
    Cache(tmp_path, HERE).path.mkdir()
    cache = Cache(tmp_path, HERE)
    cache.store({"new": entry()})
    assert cache.find("new")[0] == entry() and len(caplog.records) == 1


def test_foreign_entries_are_ignored(tmp_path, caplog):
    Cache(tmp_path, {**HERE, "torch": "1"}).store({"p": entry()})
    assert Cache(tmp_path, HERE).entries == {}
    here = Cache(tmp_path, HERE).path
    files(tmp_path)[0].rename(here)  # carried over by hand, and measured elsewhere all the same
    cache = Cache(tmp_path, HERE)
    assert cache.entries == {}
    cache.store({"q": entry()})
    assert set(Cache(tmp_path, HERE).entries) == {"q"} and not caplog.records


@pytest.mark.parametrize("fact", ["fused_resnet", "torch", "triton", "cpu", "threads", "device"])
def test_the_environment_of_a_cpu(tmp_path, fact):
    here = caches.environment(CPU)
    assert here["threads"] == torch.get_num_threads() and here["device"] == "cpu"
    assert Cache(tmp_path, here).path != Cache(tmp_path, {**here, fact: "other"}).path


def test_a_read_only_folder_is_survived(tmp_path, caplog, monkeypatch, no_child):
    """Root may write anywhere: the refusal is planted."""
    tune([trusted()], cache=tmp_path)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(caches.tempfile, "mkstemp", refuse)
    assert tune([trusted()], cache=tmp_path)["product"].source == "cache"
    results = tune([trusted("plain", key="new"), trusted("plain", key="newer")], cache=tmp_path)
    assert {r.source for r in results.values()} == {"measured"}
    assert len(caplog.records) == 1 and "is not kept (Permission denied)" in caplog.text


def test_a_folder_that_is_a_file(tmp_path, no_child):
    (tmp_path / "file").write_text("")
    assert tune([trusted("plain")], cache=tmp_path / "file")["product"].source == "measured"
    assert stat.S_ISREG((tmp_path / "file").stat().st_mode)


def write(folder, name):
    cache = Cache(folder, HERE)
    for i in range(40):
        cache.store({f"{name} {i}": entry()})


def test_concurrent_writers_lose_nothing(tmp_path):
    context = multiprocessing.get_context("fork")  # what they do needs nothing that a fork would break
    writers = [context.Process(target=write, args=(tmp_path, name)) for name in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert set(Cache(tmp_path, HERE).entries) == {f"{name} {i}" for name in "abc" for i in range(40)}


# --- tables in the package --------------------------------------------------------------------------------------------


def table(name: str, environment: dict, wanted: Problem, chosen: str) -> None:
    caches.TABLES.mkdir(exist_ok=True)
    (caches.TABLES / name).write_text(caches.dump(environment, {wanted.id: entry(chosen)}))


def test_tables_serve_this_device_and_the_cache_comes_first(no_child):
    here, wanted = caches.environment(CPU), trusted()
    table("a.json", {**here, "cpu": "another"}, wanted, "slow")
    assert tune([wanted], "cached")["product"].source == "default"
    table("b.json", {**here, "torch": "another"}, wanted, "packed")
    result = tune([wanted], "cached")["product"]
    assert (result.source, result.chosen, result.verified) == ("table", candidate("packed"), True)
    table("a.json", here, wanted, "transposed")
    assert tune([wanted], "cached")["product"].chosen == candidate("transposed")
    assert tune([wanted])["product"].source == "measured"  # its candidates were others
    assert tune([wanted], "cached")["product"].source == "cache"


def test_a_table_of_other_versions_is_verified_in_a_child(one_nursery):
    wanted = problem("plain", "dying")
    table("a.json", {**caches.environment(CPU), "torch": "another"}, wanted, "dying")
    assert tune([wanted], "cached")["product"].chosen == candidate("plain")


def test_a_damaged_table_is_ignored(no_child, caplog):
    caches.TABLES.mkdir()
    (caches.TABLES / "a.json").write_text("{")
    assert tune([trusted("plain")], "cached")["product"].source == "default"
    assert len(caplog.records) == 1


def test_the_tables_that_are_shipped_are_sound(monkeypatch):
    monkeypatch.undo()
    for path in caches.TABLES.glob("*.json"):
        environment, entries = caches.read(path, pytest.fail)
        assert environment and entries and all(e["work"] for e in entries.values())


# --- forecasts --------------------------------------------------------------------------------------------------------


def alike(*names, size=1, kind="a product", **more) -> Problem:
    return trusted(*names, key=f"product {size}", kind=kind, size=size, **more)


def test_what_was_fastest_in_a_problem_like_it_is_tried_first(no_child):
    assert tune([alike("slow", "plain")])["product 1"].chosen == candidate("plain")
    result = tune([alike("slow", "plain", size=2)], "cached")["product 2"]
    assert (result.source, result.chosen, result.verified) == ("forecast", candidate("plain"), True)
    assert result.seconds is None and result.expected > 0 and "forecast, expected" in str(result)
    assert list(reasons(result)) == ["plain"]  # the other was not run
    assert tune([alike("slow", "plain", size=2, kind="other")], "cached")["product 2"].source == "default"


def test_a_forecast_that_is_wrong_does_not_serve(no_child, monkeypatch):
    tune([alike("slow", "plain")])
    monkeypatch.setattr(tuning_cases, "plain", tuning_cases.wrong)
    result = tune([alike("plain", "slow", size=2)], "cached")["product 2"]
    assert result.chosen == candidate("slow") and reasons(result) == {"plain": BAD["wrong"], "slow": None}


def test_full_tries_first_what_is_expected_to_be_fastest(no_child, monkeypatch):
    """Where time is short, what is left out is what was slow."""
    tune([alike("slow", "plain")])
    order = []
    verify = tuning.Bench.verify
    monkeypatch.setattr(tuning.Bench, "verify", lambda self, c: order.append(c.config["name"]) or verify(self, c))
    assert tune([alike("slow", "plain", size=2)])["product 2"].source == "measured"
    assert order[:2] == ["plain", "slow"]


def test_what_is_expected_is_what_was_measured_or_is_forecast(no_child):
    measured = tune([alike("slow", "plain")])["product 1"]
    found = tuning.expected([alike("slow", "plain"), alike("slow", "plain", size=2), trusted("plain")])
    assert found["product 1"] == measured.seconds[0]
    assert found["product 2"] == pytest.approx(measured.seconds[0], rel=0.01)
    assert found.keys() == {"product 1", "product 2"}


def test_kin_forecast_and_no_more(no_child, monkeypatch):
    """What was measured on another GPU of the same generation is neither this one's choice nor its time."""
    here, wanted = {**caches.environment(CPU), "capability": "9.0"}, alike("slow", "plain")
    facts = dict(kind="a product", sizes={"positions": 1}, traits={}, flops=8, bytes=8)
    monkeypatch.setattr(caches, "environment", lambda device: here)
    caches.TABLES.mkdir()

    def kin(**changes):
        text = caches.dump({**here, "device": "its kin", **changes}, {wanted.id: {**entry("plain"), "work": facts}})
        (caches.TABLES / "kin.json").write_text(text)
        return tune([wanted], "cached")["product 1"]

    assert kin(capability="8.0").source == "default"
    result = kin()
    assert (
        str(Cache(None, here)) == "0 problems in nowhere, 0 in the package's tables, 1 of its kin or of other versions"
    )
    assert (result.source, result.chosen, result.seconds) == ("forecast", candidate("plain"), None)


def test_after_an_upgrade_what_was_measured_before_forecasts(no_child, monkeypatch, caplog):
    here, wanted = {**caches.environment(CPU), "capability": "9.0"}, alike("slow", "plain")
    monkeypatch.setattr(caches, "environment", lambda device: here)
    assert tune([wanted])["product 1"].source == "measured"
    (caches.folder() / "damaged.json").write_text("{")
    here["torch"] = "another"
    result = tune([wanted], "cached")["product 1"]
    assert (result.source, result.chosen, result.seconds) == ("forecast", candidate("plain"), None)
    here["capability"] = "8.0"
    assert tune([wanted], "cached")["product 1"].source == "default"
    assert not caplog.records


def test_what_was_measured_before_it_told_of_its_work(no_child):
    """It hides nothing that a table tells, and is told of at the next tuning."""
    here, wanted = {**caches.environment(CPU), "capability": "9.0"}, alike("slow", "plain")
    cache = Cache(caches.folder(), here)
    tune([wanted], cache=cache)
    (known,) = cache.alike()
    cache.store({wanted.id: {k: v for k, v in known.items() if k != "work"}})
    assert not [*cache.alike()]
    cache.akin = {wanted.id: known}
    assert [*cache.alike()] == [known]
    cache.akin = {}
    assert tune([wanted], "cached", cache=cache)["product 1"].source == "cache" and not [*cache.alike()]
    assert tune([wanted], cache=cache)["product 1"].source == "cache"
    assert [*cache.alike()] == [known] == [*Cache(caches.folder(), here).alike()]


def test_after_some_forecasts_that_fail_the_default_is_tried(no_child, monkeypatch):
    names = ["plain", "packed", "transposed", "slow", "raising"]
    bad = {name: tuning_cases.raising for name in names[1:]}
    facts = [{"backend": "test", "label": n, "config": {"name": n}} for n in names]
    trials = [{"candidate": f, "seconds": [1e-3 / i] * 3, "reason": None} for i, f in enumerate(facts, 1)]
    known = {"chosen": facts[-1], "candidates": "0", "trials": trials, "work": WORK}
    cache = Cache(None, caches.environment(CPU))
    cache.entries["another"] = known
    for name, function in bad.items():
        monkeypatch.setattr(tuning_cases, name, function)
    result = tune([alike(*names)], "cached", cache=cache)["product 1"]
    assert [*reasons(result)] == ["raising", "slow", "transposed", "plain"] and result.chosen == candidate("plain")


def test_what_was_chosen_earlier_and_fails_is_tried_once(no_child, monkeypatch):
    assert tune([alike("plain", "slow")])["product 1"].chosen == candidate("plain")
    count = []
    monkeypatch.setattr(tuning_cases, "plain", lambda *args: count.append(1) or tuning_cases.raising(*args))
    result = tune([alike("plain", "slow")], "cached")["product 1"]
    assert result.chosen == candidate("slow") and len(count) == 1
    assert reasons(result)["plain"].startswith("chosen earlier, raised")


def test_a_want_of_memory_is_not_the_candidates_fault(no_child, monkeypatch):
    assert tune([alike("plain", "slow")])["product 1"].chosen == candidate("plain")
    plain, count = tuning_cases.plain, []

    def once_without_memory(*args):
        count.append(1)
        if len(count) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(*args)

    monkeypatch.setattr(tuning_cases, "plain", once_without_memory)
    assert tune([alike("plain", "slow")], "cached")["product 1"].chosen == candidate("plain") and len(count) > 1


def test_with_little_time_the_default_is_tried_second(no_child, monkeypatch):
    tune([alike("slow", "packed", "plain")])
    order = []
    verify = tuning.Bench.verify
    monkeypatch.setattr(tuning.Bench, "verify", lambda self, c: order.append(c.config["name"]) or verify(self, c))
    tune([alike("slow", "packed", "plain", size=2)])
    assert order[1] == "slow" and set(order[:3]) == {"slow", "packed", "plain"}


def test_what_is_tried_first_compiles_first(one_nursery, tmp_path):
    """In processes beside one another, before the first is verified; what fails there is not tried."""
    wanted = [problem("does_not_compile", "plain", key=f"product {i}", folder=str(tmp_path)) for i in range(2)]
    for result in tune(wanted, "cached", jobs=2).values():
        assert reasons(result) == {"does_not_compile": BAD["does_not_compile"], "plain": None}
    noted = "".join(path.read_text() for path in tmp_path.glob("*.txt"))
    assert "prepare plain" in noted


WORK = dict(kind="a product", sizes={"positions": 1}, traits={}, flops=8, bytes=8)
BAD_WORK = {
    "none": None,
    "a list": [],
    "less": {**WORK, "sizes": None},
    "more": {**WORK, "color": 1},
    "no size": {**WORK, "sizes": {"positions": 0}},
    "a huge size": {**WORK, "sizes": {"positions": 2**70}},
    "a fraction": {**WORK, "flops": 0.5},
    "a boolean": {**WORK, "bytes": True},
    "no sizes": {**WORK, "sizes": {}},
    "a deep trait": {**WORK, "traits": {"stride": []}},
}


@pytest.mark.parametrize("work", BAD_WORK.values(), ids=BAD_WORK)
def test_damaged_work_is_ignored(tmp_path, work):
    path = Cache(tmp_path, HERE).path
    path.write_text(caches.dump(HERE, {"good": {**entry(), "work": WORK}, "bad": {**entry(), "work": work}}))
    assert set(Cache(tmp_path, HERE).entries) == {"good"}


# --- processes --------------------------------------------------------------------------------------------------------


def test_compiled_in_parallel_before_anything_is_timed(one_nursery, tmp_path):
    names = ["plain", "does_not_compile", "packed"]
    result = tune([problem(*names, folder=str(tmp_path))], cache=False, jobs=2)["product"]
    assert reasons(result) == {"plain": None, "does_not_compile": BAD["does_not_compile"], "packed": None}
    notes = [path.read_text().split("\n") for path in tmp_path.glob("*.txt")]
    compilers = [lines for lines in notes if not any(line.startswith("plain") for line in lines)]
    assert compilers and len(compilers) == len(notes) - 1  # all but the one that verifies and times
    assert sum(line.startswith("prepare") for lines in compilers for line in lines) == 2


def test_a_child_takes_the_settings_of_its_parent():
    threads = torch.get_num_threads()
    before = children.flags()
    torch.set_num_threads(threads + 1)
    try:
        found = children.flags()
        assert found["threads"] == threads + 1
        torch.backends.cudnn.benchmark = not before["benchmark"]
        children.set_flags(found)
        assert children.flags() == found
    finally:
        children.set_flags(before)


def hang(tell):
    child = children.Child(Nursery(), "cpu", Limits())
    child.open(problem())
    child.load(0)
    tell.send(child.pid)
    child.verify(candidate("hanging"))


def test_no_child_outlives_its_parent():
    """The parent is killed while its child hangs."""
    ours, theirs = multiprocessing.Pipe()
    parent = multiprocessing.get_context("fork").Process(target=hang, args=(theirs,))
    parent.start()
    assert ours.poll(60)
    pid = ours.recv()
    assert not gone(pid)
    parent.kill()
    parent.join()
    deadline = time.monotonic() + 10
    while not gone(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert gone(pid)


def gone(pid: int) -> bool:
    """Ended; nobody may be there to bury it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_nursery_that_cannot_start(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="the problem cannot be tried: the process that forks children is gone"):
        tune([problem("plain")])
    nursery = Nursery()
    for words in (*["is gone"] * 3, "ended 3 times"):
        with pytest.raises(EOFError, match=words):
            nursery.fork(0, 2)


def test_importing_the_package_leaves_the_gpu_alone(nursery):
    """A process that has touched CUDA has no children that can use it: this one forbade it while it imported."""
    child = children.Child(nursery, "cpu", Limits())
    child.open(problem())
    child.close()


@pytest.mark.parametrize("asked, shown", [(True, True), (False, False), (None, False)])
def test_progress_on_stderr_is_silent_unless_asked(no_child, capsys, asked, shown):
    tune([trusted("plain")], progress=asked)
    seen = capsys.readouterr()
    assert seen.out == "" and bool(seen.err.strip()) == shown


def test_problems_and_candidates_travel_as_json():
    p = problem("plain", dtype="float64")
    assert Problem(**json.loads(json.dumps(p.as_json()))).id == p.id
    assert Candidate("a", "b", {"x": 1, "y": 2}).id == Candidate("a", "other", {"y": 2, "x": 1}).id
    assert p.id != problem("plain").id


# --- a GPU ------------------------------------------------------------------------------------------------------------


class Recorder:
    """torch.cuda's streams, graphs and events, as far as the timer calls them; runs on the CPU."""

    def __init__(self):
        self.log, self.clock = [], 0.0

    def install(self, monkeypatch):
        recorder = self

        class Stream:
            def __init__(self, device=None):
                pass

            def wait_stream(self, other):
                recorder.log.append("wait")

        class Graph:
            replay = staticmethod(lambda: recorder.log.append("replay"))

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                recorder.clock += 1e-4
                self.at = recorder.clock

            def synchronize(self):
                pass

            def elapsed_time(self, other):
                return 1e3 * (other.at - self.at)

        @contextlib.contextmanager
        def graph(graph, *, stream, capture_error_mode):
            assert isinstance(stream, Stream) and capture_error_mode == "thread_local"
            recorder.log.append("capture")
            failed = False
            try:
                yield
            except Exception:
                failed = True
                raise
            finally:
                recorder.log.append("end")
                if failed:
                    raise RuntimeError("capture was invalidated")

        for name, value in {
            "Stream": Stream,
            "current_stream": Stream,
            "stream": lambda stream: contextlib.nullcontext(),
            "synchronize": lambda device=None: recorder.log.append("synchronize"),
            "CUDAGraph": Graph,
            "graph": graph,
            "Event": Event,
            "mem_get_info": lambda device: (2**30, 2**31),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(timing, "cache_bytes", lambda device: 2**14)


def test_on_a_gpu_a_captured_graph_is_timed(monkeypatch):
    recorder = Recorder()
    recorder.install(monkeypatch)
    case, gpu = tuning_cases.Product(), torch.device("cuda", 0)
    timer = timing.Timer(case, gpu, case.inputs(CPU, 0), case.outputs(CPU))
    assert len(timer.buffers) == 4
    seconds = timer.sample(candidate("plain"))
    assert case.calls["plain"] == 3 * 4 + 20  # warm-up, estimate, warm-up on the stream of the capture; captured
    assert seconds == pytest.approx(1e-4 / (20 * 10))
    assert recorder.log.count("replay") == 1 + 2 + 10  # warm-up, estimates, sample of a millisecond
    assert recorder.log.index("wait") < recorder.log.index("capture")


def test_what_cannot_be_captured_says_so_first(monkeypatch):
    Recorder().install(monkeypatch)
    case, gpu = tuning_cases.Product(), torch.device("cuda", 0)
    timer = timing.Timer(case, gpu, case.inputs(CPU, 0), case.outputs(CPU))
    fine = case.run
    case.run = lambda *args: fine(*args) if case.calls["plain"] < 12 else 1 / 0
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph: ZeroDivisionError: division by zero"):
        timer.sample(candidate("plain"))


def test_what_a_graph_reads_stays_alive(monkeypatch):
    Recorder().install(monkeypatch)
    case, packed = tuning_cases.Product(), []
    pack = case.pack

    def watch(candidate, inputs):
        inputs = pack(candidate, inputs)
        packed.append(weakref.ref(inputs["b"]))
        return inputs

    case.pack = watch
    timer = timing.Timer(case, torch.device("cuda", 0), case.inputs(CPU, 0), case.outputs(CPU))
    timer.sample(candidate("packed"))
    assert len(packed) == 4 and all(tensor() is not None for tensor in packed)
    timer.drop(candidate("packed"))
    assert all(tensor() is None for tensor in packed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(one_nursery):
    bad = {
        "wrong": BAD["wrong"],
        "one_row_too_many": BAD["one_row_too_many"],
        "device_assert": "raised AcceleratorError: CUDA error",
        "stuck": "did not return from 'verify' within 20 s",
        "waiting": "while timed: cannot be captured in a CUDA graph",
    }
    wanted = problem("plain", *bad, "packed", device="cuda")
    result = tune([wanted], limits=Limits(verify=20))["product"]
    for name, reason in bad.items():
        assert reasons(result)[name].startswith(reason)
    assert result.chosen.config["name"] in ("plain", "packed") and 0 < result.seconds[1] < 1e-3
    assert tune([wanted])["product"].source == "cache"
    assert torch.ones(3, device="cuda").sum().item() == 3  # this process's context is as good as before
