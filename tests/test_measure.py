import json
from functools import partial

import pytest
import torch

from sparsenlp.measure import Ratio, Timing, interleave, machine, machine_line, ratio, use_threads


def test_functions_are_called_in_turn(monkeypatch):
    monkeypatch.setattr("sparsenlp.measure.SAMPLE_SECONDS", 0.0)
    calls = []
    timings = interleave({"a": partial(calls.append, "a"), "b": partial(calls.append, "b")}, seconds=0, min_rounds=4)
    assert calls[-8:] == ["a", "b"] * 4
    assert [len(t.samples) for t in timings.values()] == [4, 4]


def test_warmup_is_not_sampled():
    calls = []
    timing = interleave({"a": partial(calls.append, "a")}, seconds=0, min_rounds=1, warmup=3)["a"]
    assert len(timing.samples) == 1
    assert len(calls) > 3


def test_warm_samples_are_run_before_they_are_timed(monkeypatch):
    monkeypatch.setattr("sparsenlp.measure.SAMPLE_SECONDS", 0.0)
    calls = []
    functions = {"a": partial(calls.append, "a"), "b": partial(calls.append, "b")}
    timings = interleave(functions, seconds=0, min_rounds=3, warm=True)
    assert calls[-12:] == ["a", "a", "b", "b"] * 3
    assert [len(t.samples) for t in timings.values()] == [3, 3]


def test_rounds_go_on_until_the_budget_is_used():
    assert len(interleave({"a": lambda: sum(range(1000))}, seconds=0.02, min_rounds=1)["a"].samples) > 5


def test_summary_statistics():
    timing = Timing.of([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    assert (timing.median, timing.p20, timing.p80) == (3.5, 2.0, 5.0)
    assert timing.samples == (5.0, 1.0, 4.0, 2.0, 3.0, 6.0)
    assert timing.spread == pytest.approx(3 / 3.5)
    assert json.loads(json.dumps(timing.as_dict())) == {"median": 3.5, "p20": 2.0, "p80": 5.0, "rounds": 6}
    assert timing.as_dict(samples=True)["samples"][0] == 5.0


def test_ratio_pairs_rounds():
    slow, fast = Timing.of([2.0, 40.0, 6.0]), Timing.of([1.0, 10.0, 3.0])
    assert ratio(slow, fast) == Ratio.of([2.0, 4.0, 2.0])
    assert ratio(slow, fast).median == 2.0


def test_use_threads_restores():
    before = torch.get_num_threads()
    with use_threads(before + 1) as count:
        assert count == torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with use_threads(None) as count:
        assert count == before


def test_machine_is_json_and_one_line():
    data = machine()
    assert json.loads(json.dumps(data)) == data
    assert {"cpu", "isa", "cores", "threads", "torch", "sparsenlp", "os"} == data.keys()
    line = machine_line(data)
    assert data["cpu"] in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: interleave({}), "expected at least one function, got none"),
        (lambda: interleave({"a": int}, min_rounds=0), "expected min_rounds and warmup of at least 1, got 0 and 2"),
        (lambda: ratio(Timing.of([1.0]), Timing.of([1.0, 2.0])), "expected 1 paired samples, got 2"),
        (lambda: Timing.of([]), "Timing: expected at least one sample"),
        (lambda: use_threads(0).__enter__(), "expected at least 1 thread, got 0"),
    ],
)
def test_documented_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
