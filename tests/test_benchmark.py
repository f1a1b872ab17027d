import json

import pytest
import torch
from tiny_bert import LENGTH, save_tiny_bert

from sparsenlp import NMLinear, SparseLinear, SparsifyConfig, sparsify_
from sparsenlp import benchmark as b
from sparsenlp.classifiers import load_model
from sparsenlp.measure import Timing
from sparsenlp.prune import Block, finalize_, prune_

SETTINGS = (b.Setting(1, 4), b.Setting(3, 8))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return load_model(str(save_tiny_bert(tmp_path_factory.mktemp("dense"))))


@pytest.fixture
def sparse(dense):
    model = b.dense_twin(dense)
    prune_(model, Block(8, 1), 0.75)
    sparsify_(finalize_(model), SparsifyConfig(measure="off"))
    return model


def run(dense, sparse, baselines=("eager fp32", "eager bf16", "dynamic int8"), **options):
    return b.bench(dense, {"pruned": sparse}, SETTINGS, baselines, seconds=0, **options)


def test_every_row_is_timed_at_every_setting(dense, sparse):
    report = run(dense, sparse)
    names = ["eager fp32", "eager bf16", "dynamic int8", "pruned, eager fp32"]
    assert [row.name for row in report.rows] == names
    assert [row.sparse for row in report.rows] == [False, False, False, True]
    for setting in SETTINGS:
        assert len({len(row.timings[setting].samples) for row in report.rows}) == 1
        assert all(row.timings[setting].median > 0 for row in report.rows)
        best = report.best_dense(setting)
        assert best.timings[setting].median == min(row.timings[setting].median for row in report.rows[:3])
        assert set(report.speedup(best, setting).samples) == {1.0}


def test_differences_tell_precision_from_error(dense, sparse):
    rows = {row.name: row for row in run(dense, sparse).rows}
    for setting in SETTINGS:
        assert rows["eager fp32"].differences[setting] == 0
        assert 0 < rows["eager bf16"].differences[setting] < 0.05
        assert rows["pruned, eager fp32"].differences[setting] < 1e-5


def test_report_is_json(dense, sparse):
    data = json.loads(json.dumps(run(dense, sparse).as_dict()))
    assert data["settings"][1] == {"batch": 3, "tokens": 8}
    assert data["rows"][0]["seconds"]["1 x 4"]["rounds"] >= 5
    cell = data["rows"][0]["seconds"]["3 x 8"]
    assert cell["p80"] <= cell["p99"]
    assert cell["throughput"] == pytest.approx(3 / cell["median"])
    assert data["verdicts"][0].startswith("pruned, eager fp32: ")


def test_progress_counts_every_step(dense, sparse):
    told = []
    run(dense, sparse, on_progress=lambda *step: told.append(step))
    assert [done for done, _, _ in told] == list(range(11))
    assert {total for _, total, _ in told} == {10}


def test_threads_are_set_reported_and_restored(dense, sparse):
    assert run(dense, sparse, ("eager fp32",), threads=2).machine["threads"] == 2
    assert torch.get_num_threads() == 1


def test_a_baseline_that_cannot_run_says_why(dense, sparse, monkeypatch):
    def broken(model):
        raise OSError("no compiler\nsecond line")

    monkeypatch.setitem(b.BASELINES, "compiled fp32", b.Engine(broken, exact=True))
    report = run(dense, sparse, ("eager fp32", "compiled fp32"))
    rows = {row.name: row for row in report.rows}
    for name in ("compiled fp32", "pruned, compiled fp32"):
        assert rows[name].missing == dict.fromkeys(SETTINGS, "OSError: no compiler")
        assert not rows[name].timings
        assert report.speedup(rows[name], SETTINGS[0]) is None
    assert report.as_dict()["rows"][1]["seconds"]["1 x 4"] == {"missing": "OSError: no compiler"}
    assert report.best_dense(SETTINGS[0]).name == "eager fp32"


def test_a_float32_baseline_with_other_logits_is_not_timed(dense, sparse, monkeypatch):
    def wrong(model):
        return lambda **inputs: (model(**inputs).logits + 1,)

    monkeypatch.setitem(b.BASELINES, "compiled fp32", b.Engine(wrong, exact=True))
    rows = {row.name: row for row in run(dense, sparse, ("eager fp32", "compiled fp32")).rows}
    assert not rows["compiled fp32"].timings
    assert "got a difference of 1.0e+00" in rows["compiled fp32"].missing[SETTINGS[0]]


def test_a_wrong_sparse_model_is_never_timed(dense, sparse, monkeypatch):
    monkeypatch.setattr(b, "dense_twin", lambda model: dense)
    with pytest.raises(RuntimeError, match="bench: pruned, eager fp32: expected logits within"):
        run(dense, sparse)


class TinyClassifier(torch.nn.Module):
    """Compiles in seconds."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(1000, 8)
        self.linear = SparseLinear.from_dense(torch.nn.Linear(8, 8), (8, 1))

    def forward(self, input_ids, attention_mask):
        return (self.linear(self.embedding(input_ids) * attention_mask[..., None]).mean(1),)


def test_compiled_sparse_rows_are_checked_and_timed():
    torch.manual_seed(0)
    model = TinyClassifier().eval()
    report = b.bench(b.dense_twin(model), {"p": model}, SETTINGS[:1], ("eager fp32", "compiled fp32"), seconds=0)
    names = ["eager fp32", "compiled fp32", "p, eager fp32", "p, compiled fp32"]
    assert [row.name for row in report.rows] == names
    for row in report.rows:
        assert not row.missing
        assert row.differences[SETTINGS[0]] < 1e-5


def test_dense_twin_is_a_dense_copy(sparse):
    twin = b.dense_twin(sparse)
    assert any(isinstance(layer, SparseLinear) for layer in sparse.modules())
    assert not any(isinstance(layer, SparseLinear) for layer in twin.modules())
    inputs = b.random_inputs(sparse, SETTINGS[1])
    torch.testing.assert_close(twin(**inputs).logits, sparse(**inputs).logits)


def test_dense_twin_writes_out_n_of_m():
    linear = torch.nn.Linear(8, 8)
    with torch.no_grad():
        linear.weight.view(8, 2, 4)[:, :, 1:3] = 0
    (twin,) = b.dense_twin(torch.nn.Sequential(NMLinear.from_dense(linear, (2, 4))))
    assert type(twin) is torch.nn.Linear
    assert torch.equal(twin.weight, linear.weight)


def test_dense_twin_refuses_a_fused_activation():
    layer = SparseLinear.from_dense(torch.nn.Linear(8, 8), (8, 1), activation="relu")
    with pytest.raises(ValueError, match="expected 0 without an activation, got relu"):
        b.dense_twin(torch.nn.Sequential(layer))


@pytest.mark.parametrize(
    ("settings", "baselines", "message"),
    [
        ((), ("eager fp32",), "expected at least one setting, got none"),
        (SETTINGS, ("onnx",), "expected baselines among eager fp32, .*, got onnx"),
        ((b.Setting(1, LENGTH + 1),), ("eager fp32",), f"expected at most {LENGTH} tokens.*, got {LENGTH + 1}"),
    ],
)
def test_bad_input(dense, settings, baselines, message):
    with pytest.raises(ValueError, match=message):
        b.bench(dense, {}, settings, baselines)


def test_bad_setting():
    with pytest.raises(ValueError, match="expected batch and tokens of at least 1, got 0 and 4"):
        b.Setting(0, 4)


@pytest.mark.parametrize(
    ("sparse_times", "verdict"),
    [
        ([1.0, 1.0, 1.0, 1.0, 1.0], "p: faster than the best dense baseline at 1 x 4 (2.00x)"),
        ([3.0, 4.0, 4.0, 4.0, 5.0], "p: slower at 1 x 4 (0.50x)"),
        ([1.0, 1.9, 1.9, 2.5, 3.0], "p: no clear gain at 1 x 4 (1.05x)"),
    ],
)
def test_verdict_claims_only_what_most_rounds_show(sparse_times, verdict):
    setting = SETTINGS[0]
    slow = b.Row("slow", False, {setting: Timing.of([9.0] * 5)})
    fast = b.Row("fast", False, {setting: Timing.of([2.0] * 5)})
    row = b.Row("p", True, {setting: Timing.of(sparse_times)})
    report = b.LatencyReport((slow, fast, row), (setting,), {})
    assert report.verdict(row) == verdict


def test_verdict_without_a_baseline():
    row = b.Row("p", True, {SETTINGS[0]: Timing.of([1.0])})
    assert b.LatencyReport((row,), SETTINGS[:1], {}).verdict(row) == "p: not compared with a dense baseline"
