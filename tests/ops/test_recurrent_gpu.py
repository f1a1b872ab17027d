"""sparse_lstm and sparse_gru on a GPU that need not be there: what runs, what is refused, and how a layer is divided.

The kernels are simulated in tests/gpu, and run in tests/hardware where there is a GPU.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from recurrent_cases import RecurrentCase
from torch._subclasses import FakeTensorMode

from sparsenlp import native_cuda
from sparsenlp.ops import recurrent_gpu
from sparsenlp.ops.recurrent_gpu import Direction
from sparsenlp.reference.bsr_linear import bsr_linear

HALF = torch.float16
LSTM = RecurrentCase(dtype=HALF)
GRU = replace(LSTM, op="sparse_gru")


@pytest.fixture(params=[True, False], ids=["library", "no library"])
def library(request, monkeypatch) -> bool:
    monkeypatch.setattr(native_cuda, "available", request.param)
    monkeypatch.setattr(native_cuda, "why_unavailable", "" if request.param else native_cuda.NOT_BUILT)
    return request.param


@contextmanager
def on_fake_gpu(case: RecurrentCase):
    """The arguments of the op, as fake tensors on a GPU."""

    def fake(value: Any) -> Any:
        if isinstance(value, list):
            return [fake(item) for item in value]
        return torch.empty(value.shape, dtype=value.dtype, device="cuda") if torch.is_tensor(value) else value

    arguments = list(case.arguments())
    with FakeTensorMode():
        yield fake(arguments)


def choose(case: RecurrentCase, backend: str | None = None) -> str:
    with on_fake_gpu(case) as (x, _, _, _, values, _, _, *states, _):
        return recurrent_gpu.choose(case.op, x, states[0], case.hidden, values, backend)


@pytest.mark.parametrize("case", [LSTM, GRU], ids=["lstm", "gru"])
def test_few_sequences_take_the_kernel_that_stays(case, library):
    few = "cuda" if library else "triton"
    assert choose(case) == few
    assert choose(replace(case, batch=8, dtype=torch.float32)) == few
    assert choose(replace(case, batch=9)) == "triton"
    assert choose(replace(case, hidden=2048, density=0.0)) == "triton"
    assert choose(case, "triton") == "triton"


@pytest.mark.parametrize(
    ("case", "backend", "message"),
    [
        (replace(LSTM, dtype=torch.float64), None, "'triton' cannot run: expected x in float32, float16 or bfloat16"),
        (replace(GRU, int8=True, block=(8, 4)), None, "expected weights that are not int8"),
        (replace(LSTM, projection=16), None, "expected no projection"),
        (replace(LSTM, hidden=20), None, "in blocks whose height divides 20 hidden units, got 8"),
        (replace(LSTM, batch=9), "cuda", "'cuda' cannot run: (expected at most 8 sequences, got 9|the CUDA library)"),
        (replace(LSTM, hidden=67, block=(67, 1)), "cuda", "(expected blocks whose height .* got 67|the CUDA library)"),
    ],
    ids=str,
)
def test_what_no_kernel_takes_is_an_error(case, backend, message, library):
    with pytest.raises(RuntimeError, match=rf"{case.op} on x \(.*{message}.*; or pass backend='reference'"):
        choose(case, backend)


@pytest.mark.parametrize("backend", [None, "triton", "cuda"])
def test_sizes_that_32_bits_cannot_count(backend, library):
    with on_fake_gpu(LSTM) as (x, _, _, _, values, _, _, h0, *_):
        long = x.new_empty(1 << 29, 2, x.shape[-1])
        with pytest.raises(RuntimeError, match=r"expected fewer than 1073741824 tokens, got 1073741824|CUDA library"):
            recurrent_gpu.choose(LSTM.op, long, h0, LSTM.hidden, values, backend)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_gpu_backend_wants_a_gpu(backend):
    with pytest.raises(RuntimeError, match=f"{backend!r} cannot run: expected x on a CUDA device, got cpu"):
        LSTM.run(backend)


@pytest.mark.parametrize("suffix", ["", "_persistent"])
@pytest.mark.parametrize("case", [LSTM, replace(GRU, directions=2, reverse=True)], ids=["lstm", "gru"])
def test_it_is_traced(case, suffix):
    """The fakes of both ops, with what gradients need."""
    op = getattr(torch.ops.sparsenlp, case.op + suffix).default
    with on_fake_gpu(case) as arguments:
        found = op(*arguments, True)
    expected = case.expected(save=True)
    assert [t.shape for t in found] == [t.shape for t in expected]
    assert all(t.is_cuda for t in found)


def steps_in_torch(what: str, direction: Direction) -> None:
    """What the kernels do, one sequence after the other."""
    inputs, crow, col, values, bias, h0, c, y, h_n, gates, cells, table = direction
    table = table.tolist()
    for b, initial in enumerate(h0):
        h = initial
        for (start, size), (_, following) in pairwise(table):
            if b >= size:
                continue
            token = start + b
            parts = inputs[token].chunk(3 if c is None else 4)
            sums = bsr_linear(h[None], crow, col, values, bias, "none")[0].chunk(len(parts))
            first, second = ((a + b).sigmoid() for a, b in zip(parts[:2], sums[:2], strict=True))
            if c is None:
                third, fourth = (parts[2] + first * sums[2]).tanh(), sums[2]
                h = third + second * (h - third)
            else:
                third, fourth = (parts[2] + sums[2]).tanh(), (parts[3] + sums[3]).sigmoid()
                c[b] = second * c[b] + first * third
                h = (fourth * c[b].tanh()).to(h.dtype)
            y[token] = h
            if gates is not None:
                gates[token] = torch.cat([first, second, third, fourth])
            if cells is not None:
                cells[token] = c[b]
            if b >= following:
                h_n[b] = h


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        RecurrentCase(directions=2, lengths=(3, 1, 2)),
        RecurrentCase(reverse=True, bias=False),
        RecurrentCase(op="sparse_gru", directions=2, lengths=(1, 4)),
        RecurrentCase(batch=0),
    ],
    ids=str,
)
def test_layer(case, save, monkeypatch):
    """The directions, tables of steps and outputs, with steps by torch."""
    monkeypatch.setattr(recurrent_gpu, "choose", lambda *_: "triton")
    monkeypatch.setitem(recurrent_gpu.BACKENDS, "triton", steps_in_torch)
    x, batch_sizes, crow, col, values, _, biases, *states, reverse = case.arguments()
    state = states if case.lstm else [*states, None]
    y, h_n, c_n, gates, cells = recurrent_gpu.layer(
        "triton", case.op, x, batch_sizes, crow, col, values, biases, *state, reverse, save
    )
    found = [y, h_n, c_n, gates, cells] if case.lstm else [y, h_n, gates]
    for got, expected in zip(found, case.expected(save=True)[: len(found)], strict=True):
        if got.numel() or save:
            torch.testing.assert_close(got.double(), expected, **case.tolerance)
