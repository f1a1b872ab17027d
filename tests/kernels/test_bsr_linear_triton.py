"""The Triton bsr_linear, compiled and simulated, not run on hardware.

Results come from Triton's interpreter, which is chosen at import: this file run as a script computes them in
a process of its own, with every address checked. tests/gpu compiles what the launcher launches.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import BLOCKS, BsrLinearCase
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._subclasses import FakeTensorMode

from sparsenlp.reference import bsr_linear as reference

triton = pytest.importorskip("triton", reason="Triton is not installed (its wheels are for Linux)")
kernels = pytest.importorskip("sparsenlp_kernels.bsr_linear", reason="the package sparsenlp_kernels is not installed")

HALF = torch.float16
CASES = [
    *(BsrLinearCase((7,), 3 * n, 13 * k, (n, k)) for n, k in BLOCKS),
    *(BsrLinearCase((tokens,), 24, 77, (8, 1)) for tokens in (1, 64, 65, 130)),
    *(BsrLinearCase((tokens,), 96, 128, (32, 32)) for tokens in (1, 64, 65, 130)),
    BsrLinearCase((5,), 48, 240, (8, 48), density=0.5),
    BsrLinearCase((5,), 96, 144, (48, 48), density=0.5),
    BsrLinearCase((5,), 160, 96, (80, 32), density=0.5),
    BsrLinearCase((5,), 160, 24, (80, 2), density=0.5),
    BsrLinearCase((9,), 16, 300, (8, 1), density=0.5),
    *(
        BsrLinearCase((20,), 2 * n, 48, (n, k), density=0.5, activation=activation)
        for n, k in ((8, 1), (16, 16))
        for activation in ("relu", "gelu", "gelu_tanh")
    ),
    *(BsrLinearCase((20,), 2 * n, 48, (n, k), density=d) for n, k in ((8, 1), (16, 16)) for d in (0.0, 1.0)),
    *(BsrLinearCase((20,), 4 * n, 48, (n, k), empty_rows=True, bias=False) for n, k in ((8, 1), (16, 16))),
    *(BsrLinearCase(tokens, 32, 24, (4, 1)) for tokens in ((), (2, 3, 5), (0,), (3, 0))),
    *(
        BsrLinearCase((33,), rows, columns, block, activation="gelu", dtype=HALF)
        for rows, columns, block in ((24, 77, (8, 1)), (64, 24, (32, 1)), (24, 32, (3, 4)), (64, 96, (32, 32)))
    ),
    BsrLinearCase((130,), 192, 64, (192, 32), density=1.0, dtype=HALF),
    BsrLinearCase((1,), 64, 96, (16, 16), dtype=HALF),
]
BFLOAT16_CASES = [BsrLinearCase((20,), 2 * n, 48, (n, k), dtype=torch.bfloat16) for n, k in ((8, 1), (16, 16))]
LAYOUT_CASES = [BsrLinearCase((9,), 24, 32, (8, 2)), BsrLinearCase((9,), 48, 64, (16, 16))]
EXTREMES = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 5.6, -5.6, 20.0, -20.0, 1e4, -1e4, torch.inf, -torch.inf, torch.nan])


def inputs(case: BsrLinearCase) -> tuple:
    """Arguments of bsr_linear for `case`."""
    weight = case.weight()
    tensors = (weight.crow_indices, weight.col_indices, weight.values)
    return case.x(), *tensors, case.bias_vector(), case.activation


def other_layouts(case: BsrLinearCase) -> dict[str, tuple]:
    """The same arguments with other strides, by name."""
    x, crow, col, values, bias, activation = inputs(case)
    interleaved = torch.stack([values, torch.full_like(values, torch.nan)], dim=3)[..., 0]
    return {
        "canonical values": (x, crow, col, values, bias, activation),
        "interleaved values": (x, crow, col, interleaved, bias, activation),
        "transposed x": (x.t().contiguous().t(), crow, col, values, bias, activation),
        "strided bias": (x, crow, col, values, torch.stack([bias, bias], dim=1)[:, 0], activation),
    }


def check_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the interpreter refuse loads and stores outside the tensors of the launch, which might go unnoticed."""
    from triton.runtime.interpreter import InterpreterBuilder

    extents: list[tuple[int, int]] = []
    run, load, store = kernels.Launch.run, InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def checked_run(launch) -> None:
        extents[:] = [extent(argument) for argument in launch.arguments if isinstance(argument, Tensor)]
        run(launch)

    def check(pointers: np.ndarray, mask: np.ndarray) -> None:
        used = pointers[np.broadcast_to(mask, pointers.shape)]
        inside = [(start <= used) & (used < end) for start, end in extents]
        assert np.logical_or.reduce(inside).all(), "access outside the tensors"

    def checked_load(builder, pointers, mask, *rest):
        check(pointers.data, mask.data)
        return load(builder, pointers, mask, *rest)

    def checked_store(builder, pointers, value, mask, *rest):
        check(pointers.data, mask.data)
        return store(builder, pointers, value, mask, *rest)

    monkeypatch.setattr(kernels.Launch, "run", checked_run)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", checked_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", checked_store)


def extent(tensor: Tensor) -> tuple[int, int]:
    """Addresses of a tensor's first byte and of the one after its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size() * (tensor.numel() > 0)


def simulate(output: Path) -> None:
    """Run every case in Triton's interpreter, on outputs that are NaN before, and save the results."""
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    assert torch.zeros(1).new_empty(64).isnan().all()
    with pytest.MonkeyPatch.context() as monkeypatch:
        check_bounds(monkeypatch)
        results = {str(case): kernels.bsr_linear(*inputs(case)) for case in CASES + BFLOAT16_CASES}
        for case in LAYOUT_CASES:
            results |= {f"{case} {name}": kernels.bsr_linear(*args) for name, args in other_layouts(case).items()}
        for activation in kernels.ACTIVATIONS:
            results[activation] = kernels.bsr_linear(EXTREMES[:, None], *column_of_ones(), None, activation)
    save_file(results, output)


def column_of_ones() -> tuple[Tensor, Tensor, Tensor]:
    """An 8 x 1 weight of ones in one block."""
    return torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0], dtype=torch.int32), torch.ones(1, 8, 1)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory) -> dict[str, Tensor]:
    output = tmp_path_factory.mktemp("triton") / "results.safetensors"
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run([sys.executable, __file__, str(output)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return load_file(output)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case, simulated):
    y = simulated[str(case)]
    assert y.dtype == case.dtype
    torch.testing.assert_close(y.double(), case.expected(), **case.tolerance)


@pytest.mark.xfail(strict=True, reason="Triton's interpreter multiplies the bit patterns of bfloat16 in tl.dot")
@pytest.mark.parametrize("case", BFLOAT16_CASES, ids=str)
def test_forward_bfloat16(case, simulated):
    """Once a Triton passes this, its bfloat16 belongs into CASES."""
    torch.testing.assert_close(simulated[str(case)].double(), case.expected(), **case.tolerance)


@pytest.mark.parametrize("layout", ["canonical values", "interleaved values", "transposed x", "strided bias"])
@pytest.mark.parametrize("case", LAYOUT_CASES, ids=str)
def test_strides_are_free(case, layout, simulated):
    torch.testing.assert_close(simulated[f"{case} {layout}"].double(), case.expected(), **case.tolerance)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh"])
def test_extreme_inputs(activation, simulated):
    expected = reference.bsr_linear(
        EXTREMES[:, None].double(), *column_of_ones()[:2], torch.ones(1, 8, 1).double(), None, activation
    )
    torch.testing.assert_close(simulated[activation].double(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_every_activation_of_the_op_is_there():
    assert set(kernels.ACTIVATIONS) == set(reference.ACTIVATIONS)


A_CASE = BsrLinearCase((20,), 64, 48, (8, 2))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": ((2, 47),)}, ValueError, "expected K in x to be a multiple of 2"),
        ({"x": ((),)}, ValueError, "expected K in x to be a multiple of 2"),
        ({"x": ((2, 48), torch.float64)}, TypeError, "expected x of dtype float32, float16 or bfloat16"),
        ({"x": ((2, 48), torch.float32, "cpu")}, ValueError, "expected x on cuda, got cpu"),
        ({"values": ((9, 8, 2), HALF)}, TypeError, "expected values of dtype torch.float32, got torch.float16"),
        ({"values": ((9, 8),)}, ValueError, r"expected values of shape \(nnzb, n, k\)"),
        ({"values": ((9, 8, 2), torch.float32, "cpu")}, ValueError, "expected values on cuda:0, got cpu"),
        ({"crow_indices": ((9,), torch.int64)}, TypeError, "expected crow_indices of dtype torch.int32"),
        ({"crow_indices": ((0,), torch.int32)}, ValueError, "expected 1-D contiguous crow_indices"),
        ({"col_indices": ((8,), torch.int32)}, ValueError, "expected 9 contiguous col_indices"),
        ({"bias": ((63,),)}, ValueError, r"expected bias of shape \(64,\)"),
        ({"bias": ((64,), HALF)}, TypeError, "expected bias of dtype torch.float32"),
        ({"activation": "swish"}, ValueError, "expected an activation among none, relu, gelu, gelu_tanh, got 'swish'"),
    ],
)
def test_errors(change, error, message):
    shapes = {
        "x": ((2, 48),),
        "crow_indices": ((9,), torch.int32),
        "col_indices": ((9,), torch.int32),
        "values": ((9, 8, 2),),
        "bias": ((64,),),
        "activation": "none",
    } | change
    with FakeTensorMode():
        arguments = {name: fake(*spec) if name != "activation" else spec for name, spec in shapes.items()}
    with pytest.raises(error, match=message):
        kernels.bsr_linear(**arguments)


def fake(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cuda") -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


if __name__ == "__main__":
    torch.set_num_threads(1)
    simulate(Path(sys.argv[1]))
