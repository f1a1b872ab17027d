from __future__ import annotations

import pytest
import torch
from backends import each_backend
from cases import EMBED_LAYER_NORM, TOLERANCES, EmbedLayerNormCase

from sparsenlp import native
from sparsenlp.ops import embed_layer_norm

CASE = EmbedLayerNormCase((2,), 6, 40)
COUNTED = EmbedLayerNormCase((2,), 6, 40, "counted")
RUNS_NATIVE = (torch.float32, torch.bfloat16)
GRADIENT_CASES = [
    EmbedLayerNormCase((3,), 5, 17, positions, types, bias=types != "none", dtype=dtype)
    for dtype in RUNS_NATIVE
    for positions, types in (("none", "none"), ("default", "default"), ("shared", "given"), ("counted", "shared"))
]
SCHEMA_ORDER = (
    *("ids", "word", "position", "token_type", "position_ids", "token_type_ids"),
    *("weight", "bias", "eps", "padding_idx"),
)


def is_float(t):
    return isinstance(t, torch.Tensor) and t.is_floating_point()


def poison(numel: int) -> None:
    """Leave freed memory of this size full of NaN, for the allocator to hand out next."""
    junk = [torch.full((max(numel, 1),), torch.nan) for _ in range(3)]
    del junk


@pytest.mark.parametrize(("backend", "case"), each_backend("embed_layer_norm", EMBED_LAYER_NORM), indirect=["backend"])
def test_forward(case, backend):
    arguments, expected = case.arguments(), case.expected()
    poison(expected.numel())
    y = embed_layer_norm(**arguments, backend=backend)
    assert y.dtype == case.dtype
    assert y.shape == (*case.batch, case.length, case.hidden)
    torch.testing.assert_close(y.double(), expected, **case.tolerance)


@pytest.mark.parametrize(("backend", "case"), each_backend("embed_layer_norm", GRADIENT_CASES), indirect=["backend"])
def test_gradients_match_float64(case, backend):
    def gradients(dtype, backend):
        arguments = {
            name: t.to(dtype, copy=True).requires_grad_() if is_float(t) else t for name, t in case.arguments().items()
        }
        y = embed_layer_norm(**arguments, backend=backend)
        slope = torch.linspace(-1, 1, y.numel()).to(case.dtype).to(dtype).view_as(y)
        return torch.autograd.grad((y * slope).sum(), [t for t in arguments.values() if is_float(t)])

    for got, expected in zip(gradients(case.dtype, backend), gradients(torch.float64, "reference"), strict=True):
        assert got.dtype == case.dtype
        torch.testing.assert_close(got.double(), expected, **TOLERANCES["embed_layer_norm_grad", case.dtype])


def test_positions_are_counted_without_padding(backend):
    """By hand: position 1 of padding, and from 2 on for the others."""
    ids = torch.tensor([[7, 1, 7, 7, 1], [1, 1, 7, 1, 1]])
    position_ids = torch.tensor([[2, 1, 3, 4, 1], [1, 1, 2, 1, 1]])
    arguments = COUNTED.arguments() | {"ids": ids, "token_type_ids": None}
    counted = embed_layer_norm(**arguments, backend=backend)
    given = embed_layer_norm(**arguments | {"position_ids": position_ids, "padding_idx": None}, backend=backend)
    assert torch.equal(counted, given)


def test_padding_takes_no_positions(backend):
    """A sequence may be longer than the table, if padding makes it so."""
    arguments = COUNTED.arguments() | {"ids": torch.ones(2, 20, dtype=torch.int64), "token_type_ids": None}
    arguments["ids"][:, 3] = 7
    assert embed_layer_norm(**arguments, backend=backend).isfinite().all()


def test_default_backend_is_native_where_it_can_run(needs_native):
    y, named = (embed_layer_norm(**CASE.arguments(), backend=backend) for backend in (None, "native"))
    assert torch.equal(y, named)
    double = EmbedLayerNormCase((2,), 6, 40, dtype=torch.float64)
    assert embed_layer_norm(**double.arguments()).dtype == torch.float64


def test_rows_do_not_depend_on_threads(needs_native):
    arguments = EmbedLayerNormCase((3,), 50, 200, "counted").arguments()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = embed_layer_norm(**arguments)
        torch.set_num_threads(3)
        three = embed_layer_norm(**arguments)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, three)


def test_strided_inputs(backend):
    arguments = EmbedLayerNormCase((2,), 6, 40, "given").arguments()
    strided = {
        name: torch.stack([t, t], -1)[..., 0] if isinstance(t, torch.Tensor) else t for name, t in arguments.items()
    }
    expected = embed_layer_norm(**arguments, backend=backend)
    assert torch.equal(embed_layer_norm(**strided, backend=backend), expected)


@pytest.mark.parametrize(
    "case",
    [CASE, COUNTED, EmbedLayerNormCase((), 6, 7, "none", "none", bias=False), EmbedLayerNormCase((2,), 3, 8, "shared")],
    ids=str,
)
@pytest.mark.parametrize("dtype", RUNS_NATIVE)
def test_opcheck(case, dtype):
    arguments = case.arguments()
    inputs = [arguments[name] for name in SCHEMA_ORDER]
    inputs = [t.to(dtype).requires_grad_() if is_float(t) else t for t in inputs]
    torch.library.opcheck(torch.ops.sparsenlp.embed_layer_norm.default, tuple(inputs))


@pytest.mark.parametrize("case", [CASE, COUNTED], ids=str)
def test_compile_fullgraph(case):
    arguments = case.arguments()

    def f(word):
        return torch.relu(embed_layer_norm(**arguments | {"word": word * 2})).sum()

    word = arguments["word"].requires_grad_()
    (expected,) = torch.autograd.grad(f(word), word)
    (got,) = torch.autograd.grad(torch.compile(f, fullgraph=True)(word), word)
    torch.testing.assert_close(got, expected)


def test_compiled_program_checks_ids(needs_native):
    arguments = CASE.arguments()
    compiled = torch.compile(lambda ids: embed_layer_norm(**arguments | {"ids": ids}), fullgraph=True)
    compiled(arguments["ids"])
    with pytest.raises(IndexError, match="expected ids from 0 to 49, got 50"):
        compiled(arguments["ids"].clone().fill_(50))


def changed(t: torch.Tensor, value: int) -> torch.Tensor:
    t = t.clone()
    t[..., -1] = value
    return t


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ids", 50, "expected ids from 0 to 49, got 50"),
        ("ids", -1, "expected ids from 0 to 49, got -1"),
        ("ids", 1 << 40, "expected ids from 0 to 49, got 1099511627776"),
        ("position_ids", 10, "expected position_ids from 0 to 9, got 10"),
        ("position_ids", -2, "expected position_ids from 0 to 9, got -2"),
        ("token_type_ids", 3, "expected token_type_ids from 0 to 2, got 3"),
        ("token_type_ids", -3, "expected token_type_ids from 0 to 2, got -3"),
    ],
)
def test_ids_outside_of_their_table(name, value, message, backend):
    arguments = EmbedLayerNormCase((2,), 6, 40, "given").arguments()
    with pytest.raises(IndexError, match=f"^embed_layer_norm: {message}$"):
        embed_layer_norm(**arguments | {name: changed(arguments[name], value)}, backend=backend)


@pytest.mark.parametrize(("case", "length"), [(CASE, 12), (COUNTED, 9)], ids=str)
def test_sequences_longer_than_the_table(case, length, backend):
    ids = torch.full((2, length), 7)
    most = 10 if case is CASE else 8  # of 10 rows the first two are for no position
    arguments = case.arguments() | {"ids": ids, "token_type_ids": None}
    with pytest.raises(
        ValueError, match=f"^embed_layer_norm: expected at most P = {most} positions, got S = {length}$"
    ):
        embed_layer_norm(**arguments, backend=backend)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"ids": torch.zeros(2, 6, dtype=torch.int32)},
            TypeError,
            "expected ids of dtype torch.int64, got torch.int32",
        ),
        ({"ids": torch.tensor(3)}, ValueError, r"expected ids \(..., S\), got a scalar"),
        ({"ids": torch.zeros(2, 6, dtype=torch.int64, device="meta")}, ValueError, "expected ids on cpu, got meta"),
        (
            {"word": torch.zeros(50)},
            ValueError,
            r"expected a floating word \(V, H\), got torch.float32 of shape \(50,\)",
        ),
        (
            {"word": torch.zeros(50, 40, dtype=torch.int8)},
            ValueError,
            r"expected a floating word \(V, H\), got torch.int8",
        ),
        ({"position": torch.zeros(10, 41)}, ValueError, r"expected position of shape \(10, 40\), got \(10, 41\)"),
        ({"position": torch.zeros(10, 40).bfloat16()}, TypeError, "expected position of dtype torch.float32"),
        ({"token_type": torch.zeros(40)}, ValueError, r"expected token_type of shape \(40, 40\), got \(40,\)"),
        ({"token_type": torch.zeros(0, 40)}, ValueError, "expected at least one row in token_type"),
        ({"position_ids": torch.zeros(2, 5, dtype=torch.int64)}, ValueError, "expected position_ids of shape"),
        ({"position_ids": torch.zeros(2, 6)}, TypeError, "expected position_ids of dtype torch.int64"),
        ({"token_type_ids": torch.zeros(2, 1, dtype=torch.int64)}, ValueError, "expected token_type_ids of shape"),
        ({"weight": torch.zeros(41)}, ValueError, r"expected weight of shape \(40,\)"),
        ({"bias": torch.zeros(40).double()}, TypeError, "expected bias of dtype torch.float32, got torch.float64"),
        ({"position": None, "padding_idx": 1}, ValueError, "only with a table of positions"),
        ({"token_type": None}, ValueError, "expected token_type_ids only with a table of token types"),
        ({"padding_idx": -1}, ValueError, "expected padding_idx of at least 0"),
        ({"backend": "cudnn"}, ValueError, "expected a backend among native, reference, got 'cudnn'"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=f"embed_layer_norm: .*{message}"):
        embed_layer_norm(**CASE.arguments() | change)


def test_native_backend_runs_or_raises(needs_native, monkeypatch):
    half = EmbedLayerNormCase((2,), 6, 40, dtype=torch.float16).arguments()
    with pytest.raises(RuntimeError, match=r"expected float32 or bfloat16 on cpu, got torch.float16"):
        embed_layer_norm(**half, backend="native")
    monkeypatch.setattr(native, "available", False)
    monkeypatch.setattr(native, "why_unavailable", "not built")
    with pytest.raises(RuntimeError, match="backend 'native' cannot run: not built"):
        embed_layer_norm(**CASE.arguments(), backend="native")


@pytest.mark.parametrize(
    ("name", "replacement"),
    [
        ("ids", torch.zeros(2, 6, dtype=torch.int32)),
        ("ids", torch.tensor(1)),
        ("word", torch.zeros(50, 40, dtype=torch.float64)),
        ("word", torch.zeros(50, 41)),
        ("word", torch.zeros(50)),
        ("position", torch.zeros(10, 39)),
        ("position", torch.zeros(10, 40, dtype=torch.bfloat16)),
        ("position", None),
        ("token_type", torch.zeros(3)),
        ("token_type", torch.zeros(0, 40)),
        ("token_type", None),
        ("position_ids", torch.zeros(2, 5, dtype=torch.int64)),
        ("position_ids", torch.zeros(2, 6, dtype=torch.int32)),
        ("token_type_ids", torch.zeros(2, 6)),
        ("token_type_ids", torch.zeros(6, 2, dtype=torch.int64)),
        ("weight", torch.zeros(41)),
        ("bias", torch.zeros(40, dtype=torch.bfloat16)),
        ("padding_idx", 1),
        ("padding_idx", -1),
    ],
)
def test_raw_op_refuses_inconsistent_tensors(name, replacement, needs_native):
    arguments = EmbedLayerNormCase((2,), 6, 40, "given").arguments() | {name: replacement}
    with pytest.raises(RuntimeError, match="embed_layer_norm: expected"):
        torch.ops.sparsenlp.embed_layer_norm(*(arguments[name] for name in SCHEMA_ORDER))
