"""The Triton block_sparse_attention, compiled and simulated, not run on hardware; see test_bsr_linear_triton.py.

This file run as a script computes the results in Triton's interpreter, with every address checked.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attention_cases import BlockSparseAttentionCase
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._subclasses import FakeTensorMode

triton = pytest.importorskip("triton", reason="Triton is not installed (its wheels are for Linux)")
kernels = pytest.importorskip(
    "sparsenlp_kernels.block_sparse_attention", reason="the package sparsenlp_kernels is not installed"
)
backward = pytest.importorskip("sparsenlp_kernels.block_sparse_attention_backward")

HALF = torch.float16
SMALL = BlockSparseAttentionCase(37, batch=1)
CASES = [
    *(replace(SMALL, mask=mask) for mask in ("causal", "window", "longformer", "bigbird", "random", "whole", "none")),
    replace(SMALL, mask="random", heads=4, kv_heads=2, batch=2, padding=True),
    replace(SMALL, keys=60, mask="causal", block=(32, 48), padding=True),
    *(replace(SMALL, queries=n, keys=50, mask="causal", heads=4, kv_heads=1) for n in (1, 17)),
    *(replace(SMALL, width=w, value_width=e) for w, e in ((20, 33), (1, 16), (64, 64))),
    replace(SMALL, mask="random", scale=0.5),
    replace(SMALL, queries=130, mask="causal", block=(64, 64), heads=1, dtype=HALF),
    replace(SMALL, queries=140, mask="window", block=(128, 64), heads=1, dtype=HALF),
    replace(SMALL, mask="random", padding=True, width=80, dtype=HALF),
    replace(SMALL, mask="random", padding=True, dtype=torch.bfloat16),
    replace(SMALL, batch=0),
]
LAYOUT_CASE = replace(SMALL, mask="random", batch=2)


def gradients(case: BlockSparseAttentionCase, outputs: tuple[Tensor, Tensor], arguments: tuple) -> tuple:
    """What the kernels give for the case's gradients of context and log-sum-exp."""
    (y, lse), (grad, grad_lse) = outputs, case.grad()
    delta = (grad.float() * y.float()).sum(3) - grad_lse
    return backward.block_sparse_attention_backward(grad, *arguments[:3], lse, delta, *arguments[3:])


def other_layouts(case: BlockSparseAttentionCase) -> dict[str, tuple]:
    """The same arguments with other strides, by name."""
    query, key, value, *rest = case.raw_arguments()
    length_first = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value))
    features_first = (t.transpose(2, 3).contiguous().transpose(2, 3) for t in (query, key, value))
    return {"length first": (*length_first, *rest), "features first": (*features_first, *rest)}


def simulate(output: Path) -> None:
    """Run every case in Triton's interpreter, on outputs that are NaN before, and save the results."""
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    calls = {str(case): (case, case.raw_arguments()) for case in CASES}
    calls |= {name: (LAYOUT_CASE, arguments) for name, arguments in other_layouts(LAYOUT_CASE).items()}
    results = {}
    for name, (case, arguments) in calls.items():
        outputs = kernels.block_sparse_attention(*arguments)
        tensors = (*outputs, *gradients(case, outputs, arguments))
        results |= {f"{name} {i}": t.contiguous() for i, t in enumerate(tensors)}
    save_file(results, output)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory) -> dict[str, Tensor]:
    output = tmp_path_factory.mktemp("triton") / "results.safetensors"
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parents[1] / "gpu")]),
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run([sys.executable, __file__, str(output)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return load_file(output)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case, simulated):
    y, lse = (simulated[f"{case} {i}"] for i in range(2))
    assert y.dtype == case.dtype
    for got, expected in zip((y, lse), case.expected(), strict=True):
        torch.testing.assert_close(got.double(), expected, **case.tolerance)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case, simulated):
    for i, expected in enumerate(case.expected_grads(), start=2):
        got = simulated[f"{case} {i}"]
        assert got.dtype == case.dtype
        torch.testing.assert_close(got.double(), expected, **case.grad_tolerance)


@pytest.mark.parametrize("layout", ["length first", "features first"])
def test_strides_are_free(layout, simulated):
    for i, expected in enumerate((*LAYOUT_CASE.expected(), *LAYOUT_CASE.expected_grads())):
        torch.testing.assert_close(simulated[f"{layout} {i}"].double(), expected, **LAYOUT_CASE.grad_tolerance)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": ((2, 4, 40, 16), torch.float64)}, TypeError, "expected query of dtype float32, float16 or bfloat16"),
        ({"query": ((2, 4, 40, 16), torch.float32, "cpu")}, ValueError, "expected query on cuda, got cpu"),
        ({"key": ((2, 2, 40, 16), HALF)}, TypeError, "expected key of dtype torch.float32, got torch.float16"),
        ({"key": ((2, 2, 40, 8),)}, ValueError, "expected key and value beside"),
        ({"query": ((2, 3, 40, 16),)}, ValueError, "expected query heads in multiples of 2 key heads, got 3"),
        ({"value": ((2, 2, 40, 512),)}, ValueError, "expected widths from 1 to 256, got 16 and 512"),
        ({"patterns": ((1, 16, 8), torch.bool)}, ValueError, r"expected patterns \(P, m, n\), m and n multiples of 16"),
        ({"patterns": ((1, 16, 16), torch.uint8)}, TypeError, "expected patterns of dtype torch.bool"),
        ({"crow_indices": ((5,), torch.int32)}, ValueError, "expected crow_indices of 3 block rows for 1 or 4 heads"),
        ({"col_indices": ((9,), torch.int64)}, TypeError, "expected col_indices of dtype torch.int32"),
        (
            {"query": ((1 << 26, 64, 40, 16),), "key": ((1 << 26, 2, 40, 16),), "value": ((1 << 26, 2, 40, 16),)},
            ValueError,
            r"expected fewer than \d+ tiles of 16 queries or keys, got 12884901888; split query",
        ),
        ({"key": ((2, 2, 1 << 31, 16),), "value": ((2, 2, 1 << 31, 16),)}, ValueError, r"expected fewer than \d+ keys"),
        ({"col_indices": ((1 << 30,), torch.int32)}, ValueError, r"expected fewer than \d+ stored blocks"),
        ({"patterns": ((1 << 22, 16, 16), torch.bool)}, ValueError, r"expected fewer than \d+ pairs in patterns"),
        ({"key_mask": ((2, 41), torch.bool)}, ValueError, r"expected key_mask of shape \(2, 40\)"),
        ({"key_mask": ((2, 40), torch.bool, "cpu")}, ValueError, "expected key_mask on cuda:0, got cpu"),
    ],
)
def test_errors(change, error, message):
    shapes = {
        "query": ((2, 4, 40, 16),),
        "key": ((2, 2, 40, 16),),
        "value": ((2, 2, 40, 16),),
        "crow_indices": ((4,), torch.int32),
        "col_indices": ((9,), torch.int32),
        "pattern_indices": ((9,), torch.int32),
        "patterns": ((1, 16, 16), torch.bool),
        "key_mask": ((2, 40), torch.bool),
    } | change
    with FakeTensorMode():
        arguments = {name: fake(*spec) for name, spec in shapes.items()}
    with pytest.raises(error, match=f"block_sparse_attention: {message}"):
        kernels.block_sparse_attention(**arguments, scale=1.0)


def fake(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cuda") -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


if __name__ == "__main__":
    torch.set_num_threads(1)
    from interpreted import strict_launches

    with strict_launches():
        simulate(Path(sys.argv[1]))
