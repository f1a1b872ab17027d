"""sparse_lstm, sparse_gru and their gradients on a GPU against the float64 reference, by Triton and by CUDA C++."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from on_gpu import assert_close, on_gpu, poison
from recurrent_cases import GRAD_TOLERANCES, RecurrentCase

from sparsenlp import native_cuda
from sparsenlp.formats.recurrent import RecurrentWeights

HALF, BFLOAT16, FLOAT32 = torch.float16, torch.bfloat16, torch.float32
OPS = ("sparse_lstm", "sparse_gru")
BACKENDS = [
    "triton",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not native_cuda.available, reason=native_cuda.why_unavailable or "available")
    ),
]
CASE = RecurrentCase(hidden=64, columns=32, dtype=HALF)
FORWARD = [
    *(replace(CASE, dtype=dtype, batch=batch, steps=9) for dtype in (HALF, BFLOAT16, FLOAT32) for batch in (1, 8)),
    *(replace(CASE, block=block) for block in ((1, 1), (16, 1), (16, 16), (32, 2), (64, 32))),
    replace(CASE, directions=2, lengths=(5, 1, 3, 5)),
    replace(CASE, lengths=(2, 7, 3), reverse=True, state=False),
    replace(CASE, hidden=1024, columns=64, steps=20, batch=4, density=0.1, dtype=BFLOAT16),
    replace(CASE, hidden=256, block=(128, 128), density=1.0),
    replace(CASE, empty_rows=True, bias=False),
    replace(CASE, density=0.0),
    replace(CASE, batch=0),
]
MANY = [replace(CASE, batch=batch, hidden=hidden, directions=2) for batch, hidden in ((9, 64), (200, 64), (40, 512))]


def run_on_gpu(case: RecurrentCase, backend: str | None) -> tuple[torch.Tensor, ...]:
    inputs: dict[str, Any] = case.inputs()
    moved = {name: on_gpu(*inputs[name]) if isinstance(inputs[name], tuple) else on_gpu(inputs[name])[0] for name in
             ("x", "state")}  # fmt: skip
    return case.run(backend, weights=weights_on_gpu(case), **moved)


def weights_on_gpu(case: RecurrentCase) -> list[RecurrentWeights]:
    names = ("input", "recurrent", "bias_input", "bias_recurrent")
    return [RecurrentWeights(*on_gpu(*(getattr(own, name) for name in names))) for own in case.weights()]


def check_forward(case: RecurrentCase, backend: str | None) -> None:
    expected = case.expected()
    poison(*expected)
    for got, wanted in zip(run_on_gpu(case, backend), expected, strict=True):
        assert got.dtype == case.dtype
        assert_close(got, wanted, case.tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", FORWARD, ids=str)
def test_forward(case, op, backend):
    check_forward(replace(case, op=op), backend)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", MANY, ids=str)
def test_many_sequences(case, op):
    check_forward(replace(case, op=op), "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_many_steps(op, backend):
    """Enough meetings of all blocks for one that comes too early to show."""
    check_forward(replace(CASE, op=op, steps=300, batch=2, hidden=512, density=0.1, dtype=FLOAT32), backend)


@pytest.mark.sanitizer
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_small(op, backend):
    check_forward(replace(CASE, op=op, directions=2, lengths=(3, 1, 2)), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_gradients(op, backend):
    case = replace(CASE, op=op, directions=2, lengths=(4, 2, 1), dtype=FLOAT32)
    found = {}
    for dtype, where in ((FLOAT32, "cuda"), (torch.float64, "cpu")):
        x, batch_sizes, crow, col, values, scales, biases, *states, reverse = case.arguments()
        leaves = [t.to(where, dtype).requires_grad_() for t in (x, *values, *biases, *states)]
        count, some = 1 + len(values), len(biases)
        pattern = [[t.to(where) for t in indices] for indices in (crow, col)]
        name = op + ("_persistent" if backend == "cuda" and where == "cuda" else "")
        kernel = getattr(torch.ops.sparsenlp, name).default
        if where == "cpu":
            from sparsenlp import reference

            kernel = getattr(getattr(reference, op), op)
        y = kernel(
            leaves[0], batch_sizes, *pattern, leaves[1:count], scales, leaves[count : count + some],
            *leaves[count + some :], reverse, True,
        )[0]  # fmt: skip
        slope = torch.linspace(-1, 1, y.numel()).to(where, dtype).view_as(y)
        found[where] = torch.autograd.grad((y * slope).sum(), leaves)
    for got, expected in zip(found["cuda"], found["cpu"], strict=True):
        assert_close(got, expected, GRAD_TOLERANCES[FLOAT32])


def test_few_sequences_are_taken_by_cuda_where_it_is_built():
    backend = "cuda" if native_cuda.available else "triton"
    for got, expected in zip(run_on_gpu(CASE, None), run_on_gpu(CASE, backend), strict=True):
        assert torch.equal(got, expected)
