"""What bsr_linear does with tensors on a GPU, without one: choice, errors, and what torch.compile sees."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch
from cases import BsrLinearCase
from torch import Tensor
from torch._subclasses import FakeTensorMode
from traced import traced_ops

from sparsenlp import triton_kernels
from sparsenlp.ops import bsr_linear
from sparsenlp.ops.bsr_linear import call, choose_backend

CASE = BsrLinearCase((20,), 64, 48, (8, 1))


def fake(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


@pytest.mark.parametrize(
    ("dtype", "values_dtype", "blocks", "expected"),
    [
        (torch.float16, torch.float16, 8, "triton"),
        (torch.bfloat16, torch.bfloat16, 8, "triton"),
        (torch.float32, torch.float32, 8, "triton"),
        (torch.float16, torch.int8, 16, "triton"),
        (torch.float16, torch.float16, 9, "reference"),  # more than half of 16 blocks
        (torch.float64, torch.float64, 1, "reference"),
    ],
)
def test_choice_on_a_gpu(dtype, values_dtype, blocks, expected):
    with FakeTensorMode():
        x, values = fake(3, 128, dtype=dtype), fake(blocks, 32, 32, dtype=values_dtype)
        crow, col = fake(5, dtype=torch.int32), fake(blocks, dtype=torch.int32)
        assert choose_backend(x, crow, col, values) == expected
        assert choose_backend(x, crow, col, values, "reference") == "reference"


@pytest.mark.parametrize(
    ("x", "backend", "message"),
    [
        (CASE.x(), "triton", r"'triton' cannot run: .* on cuda, got torch.float32 on cpu of shape \(20, 48\)"),
        (CASE.x().double(), "native", "expected float32 or bfloat16 on cpu, got torch.float64 on cpu"),
    ],
)
def test_a_named_backend_runs_or_raises(x, backend, message, needs_native):
    with pytest.raises(RuntimeError, match=message):
        bsr_linear(x, CASE.weight().to(x.dtype), backend=backend)


def test_no_dense_product_where_triton_cannot_run(monkeypatch):
    """The op raises, rather than fall back silently."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    triton_kernels.why_device_unavailable.cache_clear()
    remedy = r"triton is not installed: pip install 'sparsenlp\[gpu\]'; or pass backend='reference'"
    with FakeTensorMode(), pytest.raises(RuntimeError, match=rf"x of shape \(3, 128\) on cuda:0: {remedy}"):
        triton_kernels.load("bsr_linear", fake(3, 128))
    triton_kernels.why_device_unavailable.cache_clear()


@pytest.mark.parametrize(
    ("capability", "reason"),
    [((7, 5), "expected compute capability 8.0 or later, got 7.5 of T4"), ((8, 0), "")],
)
def test_capability(capability, reason, monkeypatch):
    monkeypatch.setattr(triton_kernels, "why_unavailable", lambda: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "T4")
    triton_kernels.why_device_unavailable.cache_clear()
    assert triton_kernels.why_device_unavailable(0) == reason
    triton_kernels.why_device_unavailable.cache_clear()


def test_importing_sparsenlp_imports_no_triton():
    code = "import sys, sparsenlp.triton_kernels as t; t.why_unavailable(); assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_torch_compile_sees_the_kernels(a_gpu):
    with FakeTensorMode():
        x, grad, bias, values = fake(64, 128), fake(64, 128), fake(128), fake(6, 32, 32)
        pattern = fake(5, dtype=torch.int32), fake(6, dtype=torch.int32)
        forward = traced_ops(lambda x, *rest: call(x, *rest[:3], 128, rest[3], "gelu"), x, *pattern, values, bias)
        dgrad = traced_ops(lambda *a: torch.ops.sparsenlp.bsr_linear_dgrad(*a, 128), grad, *pattern, values)
        wgrad = traced_ops(lambda *a: torch.ops.sparsenlp.bsr_linear_wgrad(*a, [32, 32]), grad, x, *pattern)
    for ops in (forward, dgrad, wgrad):
        assert "triton_kernel_wrapper_functional" in ops
        assert not any(op.startswith("bsr_linear") for op in ops)


def test_cpu_keeps_the_op_whole(a_gpu):
    weight = CASE.weight()
    tensors = (weight.crow_indices, weight.col_indices, weight.values)
    ops = traced_ops(lambda x, *rest: call(x, *rest, 48, None, "gelu", backend="native"), CASE.x(), *tensors)
    assert ops == ["bsr_linear.default"]
