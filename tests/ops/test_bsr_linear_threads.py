"""bsr_linear called from where threads and memory are unusual: many callers, after a fork, odd views of memory.

A call from inside another parallel region of torch is not among them: Python code never runs in one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import BsrLinearCase

from sparsenlp.ops import bsr_linear
from sparsenlp.ops.bsr_linear import bsr_linear_add_

F32, BF16 = torch.float32, torch.bfloat16
CASES = [
    BsrLinearCase((3,), 64, 48, (8, 1), activation="gelu"),
    BsrLinearCase((100,), 128, 96, (8, 1), residual=True),
    BsrLinearCase((70,), 96, 64, (16, 2), dtype=BF16),
    BsrLinearCase((300,), 256, 512, (8, 4), int8=True),
    BsrLinearCase((5,), 36, 40, (12, 4), dtype=BF16, int8=True),
]
DTYPES = [pytest.param(F32, False, id="f32"), pytest.param(BF16, False, id="bf16"), pytest.param(F32, True, id="i8")]


@pytest.fixture
def restored_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(case, **options):
    return bsr_linear(case.x(), case.weight(), case.bias_vector(), case.activation, case.residual_tensor(), **options)


@pytest.mark.parametrize("threads", [1, 2])
def test_callers_of_different_shapes_at_once(threads, needs_native, restored_threads):
    """Each caller brings its own scratch, which grows and is reused from one shape to the next."""
    expected = [run(case) for case in CASES]

    def work(first):
        torch.set_num_threads(threads)  # a setting of the calling thread
        order = [(first + i) % len(CASES) for i in range(4 * len(CASES))]
        return all(torch.equal(run(CASES[i]), expected[i]) for i in order)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_thread_and_two_give_the_same(case, needs_native, restored_threads):
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run(case))
    assert torch.equal(*results)
    torch.testing.assert_close(results[0].double(), case.expected(), **case.tolerance)


FORK = """
import os, sys, torch
sys.path.insert(0, "tests")
from cases import BsrLinearCase
from sparsenlp.ops import bsr_linear

before, after = map(int, sys.argv[1:])
torch.set_num_threads(before)
case = BsrLinearCase((300,), 256, 512, (8, 1), activation="gelu")
x, weight, bias = case.x(), case.weight(), case.bias_vector()
expected = bsr_linear(x, weight, bias, case.activation)
child = os.fork()
if child == 0:
    torch.set_num_threads(after)
    os._exit(0 if torch.equal(bsr_linear(x, weight, bias, case.activation), expected) else 7)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 1), (1, 2)])
def test_after_fork(before, after, needs_native, pytestconfig):
    """A child computes what its parent does. Two threads before and after the fork are left out: OpenMP's pool
    does not survive it, and torch's own operators hang in such a child as well."""
    command = [sys.executable, "-c", FORK, str(before), str(after)]
    child = subprocess.run(command, cwd=pytestconfig.rootpath, timeout=120, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr


def shifted(t):
    """The same values one element past an aligned address."""
    if t is None:
        return None
    view = torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view_as(t).copy_(t)
    assert view.data_ptr() % 64 == t.element_size()
    assert view.is_contiguous()
    return view


@pytest.mark.parametrize(("dtype", "int8"), DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_misaligned_memory(tokens, dtype, int8, backend):
    case = BsrLinearCase((tokens,), 72, 48, (8, 4), activation="gelu", residual=True, dtype=dtype, int8=int8)
    weight = case.weight()
    weight = type(weight)(
        shifted(weight.crow_indices),
        shifted(weight.col_indices),
        shifted(weight.values),
        weight.shape,
        scales=shifted(weight.scales),
    )
    x, bias, residual = shifted(case.x()), shifted(case.bias_vector()), shifted(case.residual_tensor())
    y = bsr_linear(x, weight, bias, case.activation, residual, backend=backend)
    torch.testing.assert_close(y.double(), case.expected(), **case.tolerance)
    if backend == "native":
        assert torch.equal(bsr_linear_add_(residual, x, weight, bias, case.activation), y)


@pytest.mark.parametrize(("dtype", "int8"), DTYPES)
def test_views_that_are_not_contiguous(dtype, int8, backend):
    case = BsrLinearCase((6, 7), 64, 48, (8, 4), activation="relu", residual=True, dtype=dtype, int8=int8)
    x, bias, residual, weight = case.x(), case.bias_vector(), case.residual_tensor(), case.weight()
    views = (
        lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
        lambda t: torch.stack((t, t), -1)[..., 0],  # every other element
        lambda t: torch.cat((t, t), -1)[..., : t.shape[-1]],  # columns of wider rows
    )
    for view in views:
        y = bsr_linear(view(x), weight, bias, case.activation, view(residual), backend=backend)
        torch.testing.assert_close(y.double(), case.expected(), **case.tolerance)
    repeated = x[:1, :1].expand(6, 7, -1)
    y = bsr_linear(repeated, weight, backend=backend)
    assert torch.equal(y, bsr_linear(repeated.contiguous(), weight, backend=backend))


@pytest.mark.parametrize(("dtype", "int8"), DTYPES)
@pytest.mark.parametrize("tokens", [(0,), (3, 0), (0, 40)])
def test_no_tokens(tokens, dtype, int8, backend):
    case = BsrLinearCase(tokens, 64, 48, (8, 4), residual=True, dtype=dtype, int8=int8)
    y = run(case, backend=backend)
    assert y.shape == (*tokens, 64)
    assert y.dtype == dtype


@pytest.mark.parametrize(("dtype", "int8"), DTYPES)
@pytest.mark.parametrize("tokens", [1, 40])
def test_no_blocks_and_no_rows(tokens, dtype, int8, backend):
    empty = BsrLinearCase((tokens,), 64, 48, (8, 4), density=0.0, dtype=dtype, int8=int8)
    bias = empty.bias_vector()
    assert torch.equal(run(empty, backend=backend), bias.expand(tokens, -1))
    rowless = BsrLinearCase((tokens,), 0, 48, (8, 4), bias=False, dtype=dtype, int8=int8)
    assert run(rowless, backend=backend).shape == (tokens, 0)


@pytest.mark.parametrize("tokens", [0, 40])
@pytest.mark.parametrize("density", [0.0, 0.3])
def test_gradients_of_nothing(tokens, density, backend):
    case = BsrLinearCase((tokens,), 64, 48, (8, 4), density=density)
    weight, x = case.weight(), case.x().requires_grad_()
    values = weight.values.requires_grad_()
    y = bsr_linear(x, weight, backend=backend)
    dx, dvalues = torch.autograd.grad(y.sum(), (x, values))
    assert dx.shape == x.shape
    assert dvalues.shape == values.shape
    if tokens == 0 or density == 0:
        assert not dx.any()
        assert not dvalues.any()
