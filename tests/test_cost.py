import json
import os
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from sparsenlp import SparseLinear, SparsifyConfig, native, sparsify_
from sparsenlp.cost import CostModel, Fitted, Kind, Work, cache, calibrated, calibration
from sparsenlp.cost.explain import explain
from sparsenlp.cost.law import DenseLaw, Setup, SparseLaw, Steps, relative_fit
from sparsenlp.measure import Timing

SETUP = Setup(threads=1, input_bytes=4, weight_bytes=4, cache_bytes=1 << 20)
STEPS = Steps(few=8, narrow=16, tile=32, serial=1 << 16)
FEW = (9e-6, 0.0, 1.2e-9, 8e-11, 3e-11, 4e-9, 1e-10, 5e-12)
MANY = (8e-6, 0.0, 4e-10, 2e-10, 2e-11, 3e-11, 3e-9, 2e-10, 3e-12, 2e-11)
LAW = SparseLaw(SETUP, STEPS, FEW, MANY)
LINES = ((1e-6, 2e-10, 1e-11, 2e-11), (2e-6, 4e-10, 0.0, 1e-11), (9e-6, 3e-9, 0.0, 0.0))
DENSE = DenseLaw(SETUP, (1, 16, 128), LINES)
SPARSE_KIND, DENSE_KIND = Kind("float32", (8, 1)), Kind("float32")
SHAPES = [(256, 320), (512, 512), (384, 1280), (1280, 512), (1024, 2048), (1920, 640), (1280, 2560)]


def works(tokens, densities=(0.05, 0.2, 0.5)):
    return [Work(m, n, k, round(d * n * k)) for m in tokens for n, k in SHAPES for d in densities]


def fitted(sparse=LAW, dense=DENSE, error=0.05):
    return {SPARSE_KIND: Fitted(sparse, (error, -error)), DENSE_KIND: Fitted(dense, (error, -error))}


# laws


def test_relative_fit_recovers_coefficients():
    features = np.random.default_rng(0).random((40, 5))
    expected = np.array([1.0, 0.0, 2e-6, 3.0, 0.5])
    found, error = relative_fit(features, features @ expected)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert error < 1e-12


def test_relative_fit_is_never_negative():
    """The unconstrained optimum has a negative coefficient."""
    features = np.random.default_rng(1).random((30, 4))
    seconds = features @ np.array([1.0, -0.3, 2.0, 0.1]) + 0.5
    found, error = relative_fit(features, seconds)
    assert (found >= 0).all()
    assert error == pytest.approx(np.abs(features @ found / seconds - 1).sum())
    for nudge in 0.05 * np.vstack([np.eye(4), -np.eye(4)]):
        other = np.maximum(found + nudge, 0)
        assert error < 1.02 * np.abs(features @ other / seconds - 1).sum()


def test_relative_fit_ignores_times_that_are_far_too_long():
    features = np.random.default_rng(2).random((40, 3))
    expected = np.array([1.0, 2.0, 0.5])
    seconds = features @ expected
    seconds[::8] *= 3
    np.testing.assert_allclose(relative_fit(features, seconds)[0], expected, rtol=0.05)


def test_sparse_law_is_recovered_with_its_steps():
    law = replace(LAW, steps=Steps(few=8, narrow=16, tile=64, serial=0))
    seen = works((1, 2, 3, 5, 8, 9, 16, 17, 24, 33, 48, 64, 70, 100, 128))
    found = SparseLaw.fit(SETUP, seen, [law.predict(work) for work in seen])
    assert found.steps == law.steps
    unseen = works((4, 7, 20, 40, 300), (0.1, 0.9))
    np.testing.assert_allclose([found.predict(w) for w in unseen], [law.predict(w) for w in unseen], rtol=1e-6)


def test_sparse_law_knows_when_it_runs_on_threads():
    setup = replace(SETUP, threads=2)
    law = SparseLaw(setup, STEPS, (9e-6, 4e-6, *FEW[2:]), (8e-6, 4e-6, *MANY[2:]))
    seen = works((1, 2, 3, 5, 8, 9, 16, 17, 24, 33, 48, 64, 70, 100, 320), (0.01, 0.05, 0.2, 0.5))
    found = SparseLaw.fit(setup, seen, [law.predict(work) for work in seen])
    large = Work(512, 3072, 768, 1 << 20)
    assert found.predict(large) == pytest.approx(law.predict(large), rel=1e-6)
    assert found.predict(large) < LAW.predict(large)


def test_dense_law_is_recovered_and_goes_on_beyond_its_tokens():
    seen = works((1, 16, 128), (1.0,))
    found = DenseLaw.fit(SETUP, seen, [DENSE.predict(work) for work in seen])
    for tokens in (1, 8, 16, 100, 128, 512):
        work = Work(tokens, 768, 3072, 768 * 3072)
        assert found.predict(work) == pytest.approx(DENSE.predict(work), rel=1e-6)
    at = {tokens: found.predict(Work(tokens, 512, 512, 1 << 18)) for tokens in (16, 128, 240)}
    assert at[240] - at[128] == pytest.approx(at[128] - at[16])


@pytest.mark.parametrize("law", [LAW, DENSE], ids=["sparse", "dense"])
def test_predictions_grow_with_the_tokens(law):
    counts = (9, 16, 33, 64, 100, 128, 300, 512) if law is LAW else (1, 2, 16, 17, 100, 200, 512)
    times = [law.predict(Work(tokens, 768, 768, 200_000)) for tokens in counts]
    assert all(a <= b for a, b in pairwise(times))
    assert times[0] < times[-1]


@pytest.mark.parametrize("tokens", [1, 8, 16, 128])
def test_predictions_grow_with_the_stored_weights(tokens):
    times = [LAW.predict(Work(tokens, 2048, 2048, stored)) for stored in (0, 1000, 100_000, 1_000_000, 4_000_000)]
    assert all(a < b for a, b in pairwise(times))


def test_parts_add_up():
    for work in works((1, 40)):
        assert LAW.parts(work).keys() == {"overhead", "pack", "multiply", "output", "memory"}
        assert sum(LAW.parts(work).values()) == pytest.approx(LAW.predict(work))
    parts = LAW.parts(Work(64, 512, 512, 26_214))
    assert parts["memory"] == 0
    assert parts["multiply"] == pytest.approx(64 * 26_214 * 2e-11)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SparseLaw.fit(SETUP, [], []), "expected as many times as works, at least one, got 0 and 0"),
        (lambda: SparseLaw.fit(SETUP, works((1,)), [0.0] * 21), "expected times above 0, got 0.0"),
        (lambda: DenseLaw.fit(SETUP, works((1,)), [1.0] * 21), "expected at least two numbers of tokens, got 1"),
        (lambda: Kind("float64"), "expected a dtype among float32, bfloat16, int8"),
        (lambda: Kind("int8"), "int8 sparse only"),
        (lambda: Kind("int8", (8, 1)), "expected int8 blocks with k a multiple of 4"),
        (lambda: Kind("float32", (0, 1)), "expected a block with two sides"),
        (lambda: Kind.parse("float32 8y1"), "expected a dtype and a block shape or dense, got 'float32 8y1'"),
        (lambda: explain(nn.Linear(8, 8), (1,)), "expected a model with sparse layers"),
        (lambda: explain(nn.Linear(8, 8), ()), "expected token counts of at least 1"),
    ],
)
def test_documented_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_kind_that_was_not_calibrated():
    with pytest.raises(KeyError, match=r"expected a calibrated kind \(float32 8x1, float32 dense\), got int8 8x4"):
        CostModel(1, fitted()).predict(Kind("int8", (8, 4)), Work(1, 8, 8, 8))


# calibration


def times_of_the_laws(calls, seconds):
    """As if the machine followed LAW and DENSE: reads the sizes off the calls."""
    times = {}
    for name, call in calls.items():
        (x,) = call.args
        layer = call.func
        tokens, columns = x.shape
        if isinstance(layer, SparseLinear):
            times[name] = LAW.predict(Work(tokens, layer.out_features, columns, layer.values.numel()))
        else:
            times[name] = 1e-10 * tokens * call.keywords["weight"].numel()
    return times


@pytest.mark.parametrize("block", [(8, 1), (32, 32), (6, 5)])
def test_calibration_recovers_the_machine(block):
    kind = Kind("float32", block)
    found = calibration.calibrate([kind, DENSE_KIND], threads=1, timer=times_of_the_laws)
    assert found[kind].p90_error < 0.05
    assert found[DENSE_KIND].p90_error < 0.02
    assert len(found[kind].errors) > 10


@pytest.fixture
def small_designs(monkeypatch):
    """Few and small layers; two of them are held out."""
    for name, density in (("SPARSE", 0.5), ("DENSE", 1.0)):
        designs = (((64, 64), density, (1, 16)), ((128, 64), density, (1, 16)))
        monkeypatch.setattr(calibration, f"_{name}_FITTED", designs)
        monkeypatch.setattr(calibration, f"_{name}_HELD_OUT", (((96, 64), density, (1, 16)),))


@pytest.mark.parametrize("kind", [Kind("float32", (8, 1)), Kind("bfloat16", (8, 2)), Kind("int8", (8, 4))], ids=str)
def test_real_calibration(small_designs, kind):
    found = calibration.calibrate([kind, DENSE_KIND], threads=1, seconds=0.01)
    assert found.keys() == {kind, DENSE_KIND}
    assert all(entry.law.predict(Work(16, 64, 64, 2048)) > 0 and len(entry.errors) == 2 for entry in found.values())


# the cache


def gets_cpu(monkeypatch, share):
    """Let `calibrated` believe that it had a CPU for this share of the time."""
    monkeypatch.setattr(cache, "watch_cpu", lambda: lambda: share)


@pytest.fixture
def calibrations(monkeypatch):
    """Replace the calibration by the laws above; records what is asked for."""
    asked = []
    gets_cpu(monkeypatch, 1.0)

    def fake(kinds, threads, seconds):
        asked.append(sorted(map(str, kinds)))
        return {kind: fitted()[SPARSE_KIND if kind.block else DENSE_KIND] for kind in kinds}

    monkeypatch.setattr(cache, "calibrate", fake)
    return asked


def only_file(directory):
    (file,) = directory.iterdir()
    return file


def test_a_calibration_is_kept(calibrations, tmp_path):
    first = calibrated([SPARSE_KIND, DENSE_KIND], 1, tmp_path)
    assert calibrated([SPARSE_KIND, DENSE_KIND], 1, tmp_path) == first
    assert calibrations == [["float32 8x1", "float32 dense"]]
    assert first.error(SPARSE_KIND) == pytest.approx(0.05)


def test_only_what_is_missing_is_calibrated(calibrations, tmp_path):
    calibrated([DENSE_KIND], 1, tmp_path)
    calibrated([SPARSE_KIND, DENSE_KIND], 1, tmp_path)
    assert calibrated([DENSE_KIND], 1, tmp_path).fitted.keys() == {DENSE_KIND}
    assert calibrations == [["float32 dense"], ["float32 8x1"]]


def test_a_calibration_need_not_be_kept(calibrations, tmp_path):
    calibrated([DENSE_KIND], 1, tmp_path, keep=False)
    assert not list(tmp_path.iterdir())


def test_a_calibration_that_others_disturbed_is_not_kept(calibrations, monkeypatch, tmp_path):
    calibrated([DENSE_KIND], 1, tmp_path)
    gets_cpu(monkeypatch, 0.6)
    for _ in range(2):
        with pytest.warns(UserWarning, match="other processes took 40% of the time of calibration"):
            assert calibrated([SPARSE_KIND, DENSE_KIND], 1, tmp_path).fitted.keys() == {SPARSE_KIND, DENSE_KIND}
    assert calibrations == [["float32 dense"], ["float32 8x1"], ["float32 8x1"]]


def test_a_calibration_with_large_errors_is_not_kept(monkeypatch, tmp_path):
    asked = []
    gets_cpu(monkeypatch, 1.0)

    def busy(kinds, threads, seconds):
        asked.append(kinds)
        return {kind: fitted(error=2.0)[kind] for kind in kinds}

    monkeypatch.setattr(cache, "calibrate", busy)
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"float32 dense are 200% off \(p90\), so they are not kept"):
            assert calibrated([DENSE_KIND], 1, tmp_path).fitted.keys() == {DENSE_KIND}
    assert len(asked) == 2


def test_default_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.default_directory() == tmp_path / "sparsenlp"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.default_directory() == tmp_path / ".cache" / "sparsenlp"


def test_the_key_tells_machines_apart(calibrations, monkeypatch, tmp_path):
    for threads in (1, 2):
        calibrated([DENSE_KIND], threads, tmp_path)
    for function, value in (("isa", "other"), ("fingerprint", "rebuilt")):
        with monkeypatch.context() as patch:
            patch.setattr(native, function, lambda value=value: value)
            calibrated([DENSE_KIND], 1, tmp_path)
    assert len(calibrations) == len(list(tmp_path.iterdir())) == 4


def damaged(data, change):
    """A copy of the JSON data with one thing wrong, and a checksum that fits."""
    data = json.loads(json.dumps(data))
    change(data)
    if "crc32" in data:
        data["crc32"] = cache._checksum(data.get("key"), data.get("kinds"))
    return json.dumps(data)


def test_a_changed_number_is_found_by_the_checksum(calibrations, tmp_path):
    first = calibrated([DENSE_KIND], 1, tmp_path)
    data = json.loads(only_file(tmp_path).read_text())
    data["kinds"]["float32 dense"]["errors"][0] += 0.125
    only_file(tmp_path).write_text(json.dumps(data))
    with pytest.warns(
        UserWarning, match="not used, calibrating again: expected the laws that were written, got others"
    ):
        assert calibrated([DENSE_KIND], 1, tmp_path) == first


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("key"),
        lambda d: d["key"].update(cpu="another"),
        lambda d: d.update(kinds=[]),
        lambda d: d["kinds"].update({"float32 5": d["kinds"]["float32 dense"]}),
        lambda d: d["kinds"]["float32 dense"].pop("law"),
        lambda d: d["kinds"]["float32 dense"].update(errors=[]),
        lambda d: d["kinds"]["float32 dense"].update(errors=[float("nan")]),
        lambda d: d["kinds"]["float32 dense"]["law"].update(tokens=[16, 1, 128]),
        lambda d: d["kinds"]["float32 dense"]["law"].update(tokens=["1", "16", "128"]),
        lambda d: d["kinds"]["float32 dense"]["law"]["lines"].pop(),
        lambda d: d["kinds"]["float32 dense"]["law"]["lines"].__setitem__(0, [-1.0] * 4),
        lambda d: d["kinds"]["float32 8x1"]["law"].update(few=[float("inf")] * 8),
        lambda d: d["kinds"]["float32 8x1"]["law"].update(many=[1.0]),
        lambda d: d["kinds"]["float32 8x1"]["law"].update(surprise=1),
        lambda d: d["kinds"]["float32 8x1"]["law"]["steps"].update(tile=0),
        lambda d: d["kinds"]["float32 8x1"]["law"]["steps"].update(tile=24),
        lambda d: d["kinds"]["float32 8x1"]["law"]["setup"].update(threads=True),
    ],
)
def test_a_damaged_cache_is_replaced_with_a_warning(calibrations, tmp_path, change):
    first = calibrated([SPARSE_KIND, DENSE_KIND], 1, tmp_path)
    file = only_file(tmp_path)
    whole = file.read_text()
    file.write_text(damaged(json.loads(whole), change))
    with pytest.warns(UserWarning, match=r"cost cache: .* is not used, calibrating again: "):
        assert calibrated([SPARSE_KIND, DENSE_KIND], 1, tmp_path) == first
    assert len(calibrations) == 2
    assert json.loads(only_file(tmp_path).read_text()) == json.loads(whole)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\xff\xfe", b"[1, 2]", b"[" * 100_000])
def test_a_foreign_file_is_replaced_with_a_warning(calibrations, tmp_path, content):
    calibrated([DENSE_KIND], 1, tmp_path)
    only_file(tmp_path).write_bytes(content)
    with pytest.warns(UserWarning, match="is not used"):
        calibrated([DENSE_KIND], 1, tmp_path)
    assert len(calibrations) == 2


def test_an_unwritable_cache_is_done_without(calibrations, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot write"):
        model = calibrated([DENSE_KIND], 1, tmp_path / "file" / "below")
    assert model.predict(DENSE_KIND, Work(1, 64, 64, 4096)) > 0


def test_a_failed_write_leaves_no_partial_file(calibrations, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        calibrated([DENSE_KIND], 1, tmp_path)
    assert not list(tmp_path.iterdir())


# sparsify_ with a model


class Constant:
    """A law that says the same of every call."""

    def __init__(self, seconds):
        self.seconds = seconds

    def predict(self, work):
        return self.seconds

    def parts(self, work):
        return {"overhead": self.seconds}


def model_of(times, error=0.1):
    """{"dense" or a block: predicted seconds} -> a cost model with this error."""
    kinds = {Kind("float32", None if key == "dense" else key): seconds for key, seconds in times.items()}
    return CostModel(1, {kind: Fitted(Constant(seconds), (error, -error)) for kind, seconds in kinds.items()})


@pytest.fixture
def layers():
    """Three layers of one shape with 4x1 blocks in pairs, and two densities."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    with torch.no_grad():
        for layer, kept in zip(model, (12, 12, 8), strict=True):
            columns = torch.stack([torch.randperm(64) < kept for _ in range(8)])
            layer.weight.mul_(columns.repeat_interleave(8, 0))
            layer.weight[4:8, :] = 0
    return model


@pytest.fixture
def clock(monkeypatch):
    """Replace the clock: {name of a run: seconds}; records (runs, seconds)."""
    calls = []

    def install(times):
        def interleave(runs, seconds, warm):
            calls.append((sorted(runs), seconds))
            return {name: Timing.of([times[name]] * 3) for name in runs}

        monkeypatch.setattr("sparsenlp.choose.interleave", interleave)
        return calls

    return install


def config(times, error=0.1, **options):
    blocks = ((8, 1), (4, 1))
    return SparsifyConfig(blocks=blocks, cost_model=model_of(times, error), seconds=1.0, **options)


needs_extension = pytest.mark.skipif(not native.available, reason=native.why_unavailable)


def test_a_clear_winner_is_confirmed_once_and_shortly(layers, clock):
    calls = clock({"dense": 2.0, "8x1": 1.0})
    plan = sparsify_(layers, config({"dense": 2.0, (8, 1): 0.5, (4, 1): 1.0}))
    assert calls == [(["8x1", "dense"], 0.2)]
    assert [row.chosen for row in plan.rows] == ["8x1"] * 3
    assert plan.rows[0].speedup == pytest.approx(2.0)
    assert plan.measurements == 1


def test_a_clear_loser_is_not_timed(layers, clock):
    calls = clock({})
    plan = sparsify_(layers, config({"dense": 1.0, (8, 1): 1.5, (4, 1): 1.4}))
    assert not calls
    assert not plan.converted
    assert plan.rows[0].reason == "best sparse (4x1) only 0.71x, as predicted"


def test_only_the_two_of_a_close_call_are_timed_in_full(layers, clock):
    calls = clock({"dense": 2.0, "8x1": 1.0, "4x1": 0.9})
    plan = sparsify_(layers, config({"dense": 4.0, (8, 1): 1.0, (4, 1): 1.1}))
    assert calls[0] == (["4x1", "8x1", "dense"], 1.0)
    assert {row.chosen for row in plan.rows} == {"4x1"}


def test_a_close_call_with_dense_is_timed_in_full(layers, clock):
    calls = clock({"dense": 1.0, "8x1": 1.0})
    plan = sparsify_(layers, config({"dense": 1.0, (8, 1): 0.9, (4, 1): 2.0}))
    assert {seconds for _, seconds in calls} == {1.0}
    assert not plan.converted
    assert plan.rows[0].reason == "best sparse (8x1) only 1.00x"


def test_a_wrong_prediction_never_makes_a_layer_slower(layers, clock):
    calls = clock({"dense": 1.0, "8x1": 3.0})
    plan = sparsify_(layers, config({"dense": 9.0, (8, 1): 0.1, (4, 1): 5.0}))
    assert not plan.converted
    assert [seconds for _, seconds in calls[:2]] == [0.2, 1.0]
    assert not any(isinstance(layer, SparseLinear) for layer in layers)


def test_layers_without_a_law_are_timed(layers, clock):
    calls = clock({"dense": 2.0, "8x1": 1.0, "4x1": 3.0})
    plan = sparsify_(layers, config({"dense": 2.0, (8, 1): 0.5}))
    assert calls[0] == (["4x1", "8x1", "dense"], 1.0)
    assert len(plan.converted) == 3


def test_the_plan_shows_predictions_and_the_error(layers, clock):
    clock({"dense": 0.002, "8x1": 0.001})
    plan = sparsify_(layers, config({"dense": 0.003, (8, 1): 0.0005, (4, 1): 0.004}))
    lines = str(plan).splitlines()
    assert "dense ms @128 predicted ms @128 sparse ms @128 predicted ms @128 why" in " ".join(lines[0].split())
    assert " ".join(lines[1].split()).endswith("8x1 2.000 3.000 1.000 0.500 2.00x faster")
    assert any("float32 8x1 10%" in line for line in lines)
    data = json.loads(json.dumps(plan.as_dict()))
    assert data["measure"] == "model"
    assert data["model_errors"]["float32 8x1"] == pytest.approx(0.1)
    assert data["rows"][0]["predicted_sparse_seconds"]["8x1"]["128"] == 0.0005


@needs_extension
def test_sparsify_calibrates_what_it_asks_for(layers, clock, calibrations, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    clock({"dense": 2.0, "8x1": 1.0, "4x1": 1.0})
    sparsify_(layers, SparsifyConfig(blocks=((8, 1), (4, 1))))
    assert calibrations == [["float32 4x1", "float32 8x1", "float32 dense"]]
    assert [path.name for path in tmp_path.iterdir()] == ["sparsenlp"]


def test_nothing_is_calibrated_where_nothing_can_be_chosen(calibrations):
    model = nn.Sequential(nn.Linear(10, 10))
    model[0].weight.data[:, :5] = 0
    assert not sparsify_(model, SparsifyConfig(blocks=((8, 1),))).converted
    assert not any(calibrations)


# explain


def test_explain_groups_layers_and_checks_itself(layers, clock, monkeypatch):
    clock({"dense": 2.0, "8x1": 1.0})
    sparsify_(layers, config({"dense": 2.0, (8, 1): 0.5, (4, 1): 1.0}))
    explanation = explain(layers, (1, 16), threads=1, seconds=0.0, costs=CostModel(1, fitted()))
    assert [(layer.names, layer.work.tokens) for layer in explanation.layers] == [
        (("0", "1"), 1),
        (("0", "1"), 16),
        (("2",), 1),
        (("2",), 16),
    ]
    for layer in explanation.layers:
        assert layer.measured_sparse > 0
        assert layer.sparse_error == pytest.approx(layer.predicted_sparse / layer.measured_sparse - 1)
        assert sum(layer.parts.values()) == pytest.approx(layer.predicted_sparse)
    assert "float32 8x1 5% / 5%" in explanation.summary()[-1]
    data = json.loads(json.dumps(explanation.as_dict()))
    assert data["layers"][0]["names"] == ["0", "1"]
    assert data["calibration_error"]["float32 8x1"]["p90"] == pytest.approx(0.05)
