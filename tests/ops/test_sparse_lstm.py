from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from recurrent_cases import GRAD_TOLERANCES, SPARSE_LSTM, THREADED, RecurrentCase, grad_cases, gradients

from sparsenlp import native
from sparsenlp.formats.recurrent import RecurrentTensors
from sparsenlp.ops import sparse_lstm

CASE = RecurrentCase()
PACKED = replace(CASE, lengths=(4, 2))


def poison(numel: int) -> None:
    """Leave freed memory of this size full of NaN, for the allocator to hand out next."""
    junk = [torch.full((max(numel, 1),), torch.nan) for _ in range(3)]
    del junk


@pytest.mark.parametrize("case", SPARSE_LSTM, ids=str)
def test_forward(case, backend):
    expected = case.expected()
    arguments = {**case.inputs(), "weights": case.weights()}
    poison(expected[0].numel())
    for got, want in zip(case.run(backend, **arguments), expected, strict=True):
        assert got.dtype == case.dtype
        torch.testing.assert_close(got.double(), want, **case.tolerance)


@pytest.mark.parametrize("case", grad_cases("sparse_lstm"), ids=str)
def test_gradients_match_float64(case, backend):
    expected = gradients(case, torch.float64, "reference")
    for name, got in gradients(case, case.dtype, backend).items():
        assert got.dtype == case.dtype
        torch.testing.assert_close(
            got.double(), expected[name], **GRAD_TOLERANCES[case.dtype], msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_run_the_reference(dtype):
    case = replace(CASE, dtype=dtype)
    for got, want in zip(case.run(), case.expected(), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, **case.tolerance)


@pytest.mark.parametrize("case", THREADED, ids=str)
@pytest.mark.parametrize("projection", [0, 64])
def test_results_do_not_depend_on_threads(case, projection, needs_native):
    case = replace(case, projection=projection)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = case.run("native")
        for count in (2, 3, 5):
            torch.set_num_threads(count)
            for a, b in zip(case.run("native"), one, strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_one_by_one_give_what_all_at_once_give(dtype, backend):
    case = replace(CASE, dtype=dtype)
    weights, inputs = case.weights(), case.inputs()
    y, h_n, c_n = case.run(backend)
    state, parts = inputs["state"], []
    for x in inputs["x"]:
        part, *state = case.run(backend, weights=weights, x=x[None], state=tuple(state))
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts), y, **case.tolerance)
    torch.testing.assert_close((state[0], state[1]), (h_n, c_n), **case.tolerance)


def test_a_long_sequence_is_projected_in_pieces(needs_native):
    case = replace(CASE, steps=130, batch=2, hidden=256, directions=2, density=0.05)
    for got, want in zip(case.run("native"), case.expected(), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=5e-5)


def test_nan_stays_in_its_sequence(backend):
    inputs = CASE.inputs()
    clean = CASE.run(backend)
    inputs["x"][2, 1] = torch.nan
    y, h_n, c_n = CASE.run(backend, x=inputs["x"])
    assert y[2:, 1].isnan().any()
    assert h_n[:, 1].isnan().any()
    assert c_n[:, 1].isnan().any()
    for own, before in ((y[:2, 1], clean[0][:2, 1]), (y[:, ::2], clean[0][:, ::2]), (h_n[:, ::2], clean[1][:, ::2])):
        torch.testing.assert_close(own, before)


def test_large_sums_saturate(backend):
    inputs = CASE.inputs()
    y, h_n, c_n = CASE.run(backend, x=inputs["x"] * 1e30)
    assert all(t.isfinite().all() for t in (y, h_n, c_n))
    assert y.abs().max() <= 1


@pytest.mark.parametrize(
    "case",
    [CASE, PACKED, replace(CASE, projection=16, directions=2), replace(CASE, int8=True, block=(8, 4))],
    ids=str,
)
@pytest.mark.parametrize("save", [False, True])
def test_opcheck(case, save):
    if case.int8 and save:
        pytest.skip("int8 weights have no backward pass to save for")
    torch.library.opcheck(torch.ops.sparsenlp.sparse_lstm.default, (*case.arguments(), save))


def test_opcheck_with_gradients():
    x, *others = CASE.arguments()
    torch.library.opcheck(torch.ops.sparsenlp.sparse_lstm.default, (x.requires_grad_(), *others, True))


def test_opcheck_backward():
    _, batch_sizes, crow, col, values, _, _, _, c0, _ = CASE.arguments()
    y, h_n, c_n, gates, cells = torch.ops.sparsenlp.sparse_lstm(*CASE.arguments(), True)
    arguments = (y, h_n, c_n, batch_sizes, crow, col, values, gates, cells, c0)
    torch.library.opcheck(torch.ops.sparsenlp.sparse_lstm_backward.default, arguments)


def test_compile_fullgraph():
    weights, inputs = CASE.weights(), CASE.inputs()

    def f(x):
        y, (_, c_n) = sparse_lstm(x * 2, weights, inputs["state"])
        return y + 1, c_n

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(f, fullgraph=True)(inputs["x"]), f(inputs["x"]))


def test_gradients_through_int8_are_refused():
    case = replace(CASE, int8=True, block=(8, 4))
    with pytest.raises(RuntimeError, match="expected no gradients with int8 weights"):
        case.run(x=case.inputs()["x"].requires_grad_())


def change(direction, **parts):
    return (replace(direction, **parts),)


OWN = CASE.weights()[0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.zeros(5, 24)}, ValueError, r"expected x of shape \(T, B, K\), got \(5, 24\)"),
        ({"x": torch.zeros(0, 3, 24)}, ValueError, r"expected at least one step, got x of shape \(0, 3, 24\)"),
        ({"x": torch.zeros(5, 3, 23)}, ValueError, "expected input weights of 128 x 23 in direction 0, got 128 x 24"),
        ({"x": torch.zeros(5, 3, 24).double()}, TypeError, "expected input weights of dtype torch.float64 or int8"),
        ({"weights": ()}, ValueError, "expected weights of 1 or 2 directions, got 0"),
        (
            {"weights": change(OWN, recurrent=OWN.input)},
            ValueError,
            "expected recurrent weights of 128 x 32 in direction 0, got 128 x 24",
        ),
        ({"weights": change(OWN, bias_input=None)}, ValueError, "expected both biases in all directions, or none"),
        (
            {"weights": change(OWN, bias_input=torch.zeros(127))},
            ValueError,
            r"bias_input of shape \(128,\), got \(127,\)",
        ),
        ({"weights": change(OWN, bias_input=OWN.bias_input.double())}, TypeError, "expected bias_input of dtype"),
        (
            {"weights": change(OWN, recurrent=OWN.recurrent.reblock((8, 4)).quantize())},
            TypeError,
            "expected weights that are all int8, or none",
        ),
        (
            {"weights": (OWN, replace(OWN, projection=OWN.recurrent))},
            ValueError,
            "expected a projection in all directions",
        ),
        (
            {"weights": (replace(OWN, projection=OWN.recurrent), OWN)},
            ValueError,
            "expected recurrent weights of 128 x 128",
        ),
        ({"state": (torch.zeros(1, 3, 31), torch.zeros(1, 3, 32))}, ValueError, r"expected h of shape \(1, 3, 32\)"),
        ({"state": (torch.zeros(1, 3, 32), torch.zeros(1, 2, 32))}, ValueError, r"expected c of shape \(1, 3, 32\)"),
        ({"state": (torch.zeros(1, 3, 32), torch.zeros(1, 3, 32).double())}, TypeError, "expected c of dtype"),
        ({"backend": "cudnn"}, ValueError, "expected a backend among native, triton, cuda, reference, got 'cudnn'"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        CASE.run(**arguments)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (torch.tensor([1, 2, 3]), "expected batch_sizes that never grow, stay above 0 and add up to 6"),
        (torch.tensor([3, 3, 0]), "stay above 0"),
        (torch.tensor([3, 2]), "add up to 6"),
        (torch.tensor([2.0, 2.0, 2.0]), r"expected batch_sizes \(T,\) of int64 on the CPU, got torch.float32"),
        (torch.tensor([], dtype=torch.int64), r"expected batch_sizes \(T,\) of int64"),
    ],
)
def test_batch_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        PACKED.run(x=torch.zeros(6, 24), batch_sizes=sizes)


@pytest.mark.parametrize(
    ("name", "replacement"),
    [
        ("x", torch.zeros(5, 24)),
        ("x", torch.zeros(0, 3, 24)),
        ("x", torch.zeros(5, 3, 24).double()),
        ("batch_sizes", torch.tensor([3, 3])),
        ("h0", torch.zeros(1, 2, 32)),
        ("h0", torch.zeros(3, 3, 32)),
        ("c0", torch.zeros(1, 3, 31)),
        ("crow_indices", [torch.zeros(17, dtype=torch.int64)] * 2),
        ("col_indices", [torch.zeros(1, dtype=torch.int32)] * 2),
        ("values", []),
        ("values", [OWN.input.values.double()] * 2),
        ("scales", [torch.ones(128)]),
        ("biases", [torch.ones(127)] * 2),
        ("biases", [torch.ones(128)]),
    ],
)
def test_raw_op_refuses_inconsistent_tensors(name, replacement, needs_native):
    x, batch_sizes, *lists, h0, c0, reverse = CASE.arguments()
    arguments = {"x": x, "batch_sizes": batch_sizes, **RecurrentTensors(*lists)._asdict(), "h0": h0, "c0": c0}
    with pytest.raises(RuntimeError, match="sparse_lstm"):
        torch.ops.sparsenlp.sparse_lstm(**(arguments | {name: replacement}), reverse=reverse)


@pytest.mark.parametrize("sizes", [[1, 2, 3], [4, 2, 0], [6, -1, 1], [3, 2]])
def test_raw_op_refuses_batch_sizes(sizes, needs_native):
    x, _, *others = replace(PACKED, lengths=(2, 2, 2)).arguments()
    with pytest.raises(RuntimeError, match="expected batch_sizes that"):
        torch.ops.sparsenlp.sparse_lstm(x, torch.tensor(sizes), *others)


def test_native_backend_runs_or_raises(monkeypatch, needs_native):
    with pytest.raises(RuntimeError, match=r"expected float32 or bfloat16 on cpu, got torch\.float16"):
        replace(CASE, dtype=torch.float16).run("native")
    monkeypatch.setattr(native, "available", False)
    monkeypatch.setattr(native, "why_unavailable", "not built")
    with pytest.raises(RuntimeError, match="backend 'native' cannot run: not built"):
        CASE.run("native")
