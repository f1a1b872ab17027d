"""The Triton bsr_linear and its gradients in Triton's interpreter: simulated, not run on hardware.

The interpreter is chosen at import: this file run as a script computes the results in a process of its own, with
every address checked and every output NaN before.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import BLOCKS, TOLERANCES, BsrLinearCase
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._subclasses import FakeTensorMode

from sparsenlp.reference import bsr_linear as reference

triton = pytest.importorskip("triton", reason="Triton is not installed (its wheels are for Linux)")
kernels = pytest.importorskip("sparsenlp_kernels.bsr_linear", reason="the package sparsenlp_kernels is not installed")

HALF, BFLOAT16 = torch.float16, torch.bfloat16
CASES = [
    *(BsrLinearCase((7,), 3 * n, 13 * k, (n, k)) for n, k in BLOCKS),
    *(BsrLinearCase((tokens,), 24, 77, (8, 1)) for tokens in (1, 3, 64, 65, 130)),
    *(BsrLinearCase((tokens,), 96, 128, (32, 32)) for tokens in (1, 3, 64, 65, 130)),
    BsrLinearCase((5,), 48, 240, (8, 48), density=0.5),
    BsrLinearCase((5,), 96, 144, (48, 48), density=0.5),
    BsrLinearCase((5,), 160, 96, (80, 32), density=0.5),
    BsrLinearCase((2,), 160, 96, (80, 32), density=0.5),
    BsrLinearCase((5,), 160, 24, (80, 2), density=0.5),
    BsrLinearCase((9,), 16, 300, (8, 1), density=0.5),
    BsrLinearCase((9,), 256, 256, (128, 128), density=0.5),
    *(
        BsrLinearCase((20,), 2 * n, 48, (n, k), density=0.5, activation=activation, residual=True)
        for n, k in ((8, 1), (16, 16))
        for activation in ("relu", "gelu", "gelu_tanh")
    ),
    *(
        BsrLinearCase((tokens,), 2 * n, 48, (n, k), density=d)
        for tokens in (2, 20)
        for n, k in ((8, 1), (16, 16))
        for d in (0.0, 1.0)
    ),
    *(BsrLinearCase((20,), 4 * n, 48, (n, k), empty_rows=True, bias=False) for n, k in ((8, 1), (16, 16))),
    *(BsrLinearCase(tokens, 32, 24, (4, 1), residual=True) for tokens in ((), (2, 3, 5), (0,), (3, 0))),
    *(
        BsrLinearCase((tokens,), rows, columns, block, activation="gelu", dtype=dtype)
        for tokens in (4, 33)
        for dtype in (HALF, BFLOAT16)
        for rows, columns, block in ((24, 77, (8, 1)), (64, 24, (32, 1)), (24, 32, (3, 4)), (64, 96, (32, 32)))
    ),
    BsrLinearCase((130,), 192, 64, (192, 32), density=1.0, dtype=HALF),
    *(BsrLinearCase((tokens,), 64, 96, (16, 16), dtype=dtype) for tokens in (1, 20) for dtype in (HALF, BFLOAT16)),
    *(
        BsrLinearCase((tokens,), 4 * n, 12 * k, (n, k), int8=True, residual=True, activation="relu", dtype=dtype)
        for tokens in (1, 20)
        for n, k in ((8, 4), (16, 16), (32, 32), (12, 4))
        for dtype in (torch.float32, BFLOAT16)
    ),
]
SHARE_CASES = [  # each in tiles and in equal shares
    *(
        BsrLinearCase((tokens,), 6 * n, 9 * k, (n, k), uneven=True, residual=True, dtype=dtype)
        for tokens in (1, 20)
        for n, k in ((8, 1), (16, 16))
        for dtype in (torch.float32, BFLOAT16)
    ),
    BsrLinearCase((70,), 160, 96, (80, 32), uneven=True),
    *(BsrLinearCase((tokens,), 4 * 8, 9, (8, 1), density=d) for tokens in (2, 20) for d in (0.0, 1.0)),
    BsrLinearCase((2, 5), 8 * 8, 9, (8, 1), empty_rows=True, bias=False, activation="gelu"),
    *(BsrLinearCase((tokens,), 48, 36, (8, 4), int8=True, uneven=True, dtype=HALF) for tokens in (2, 20)),
]
GRADIENT_CASES = [
    *(
        BsrLinearCase((tokens,), 5 * n, 7 * k, (n, k), dtype=dtype)
        for dtype in (torch.float32, HALF, BFLOAT16)
        for tokens in (3, 40)
        for n, k in ((8, 1), (16, 16))
    ),
    *(
        BsrLinearCase((9,), 3 * n, 5 * k, (n, k), density=0.5)
        for n, k in ((3, 5), (1, 1), (32, 1), (48, 48), (80, 2), (1, 32))
    ),
    *(BsrLinearCase((9,), 4 * n, 6 * k, (n, k), density=d) for n, k in ((8, 1), (16, 16)) for d in (0.0, 1.0)),
    *(BsrLinearCase((9,), 5 * n, 7 * k, (n, k), uneven=True) for n, k in ((8, 1), (16, 16))),
    BsrLinearCase((9,), 32, 6, (8, 1), empty_rows=True),
    *(BsrLinearCase((700,), n, 2 * k, (n, k), density=1.0) for n, k in ((8, 1), (16, 16))),  # parts of the tokens
    BsrLinearCase((0,), 16, 24, (8, 1)),
    BsrLinearCase((2, 65), 128, 256, (128, 128), density=1.0, dtype=HALF),
]
LAYOUT_CASES = [
    BsrLinearCase((tokens,), rows, columns, block)
    for tokens in (2, 9)
    for rows, columns, block in ((24, 32, (8, 2)), (48, 64, (16, 16)))
]
TF32_CASE = BsrLinearCase((20,), 32, 48, (16, 16))
EXTREMES = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 5.6, -5.6, 20.0, -20.0, 1e4, -1e4, torch.inf, -torch.inf, torch.nan])
WAYS = ("tiles", "shares")
NEVER, WHEREVER_POSSIBLE = {"waves": 0}, {"waves": 1 << 20, "values": 1}  # to divide the stored blocks in equal shares


def inputs(case: BsrLinearCase) -> tuple:
    """Arguments of bsr_linear for `case`."""
    weight = case.weight()
    tensors = (weight.crow_indices, weight.col_indices, weight.values)
    return case.x(), *tensors, case.bias_vector(), case.activation, case.residual_tensor(), weight.scales


def gradient_inputs(case: BsrLinearCase) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """grad (M, N), x (M, K), crow_indices, col_indices, values"""
    weight, x = case.weight(), case.x().reshape(-1, case.columns)
    grad = torch.randn(x.shape[0], case.rows, generator=torch.Generator().manual_seed(5)).to(case.dtype)
    return grad, x, weight.crow_indices, weight.col_indices, weight.values


def other_layouts(case: BsrLinearCase) -> dict[str, tuple]:
    """The same arguments with other strides, by name."""
    x, crow, col, values, bias, *rest = inputs(case)
    interleaved = torch.stack([values, torch.full_like(values, torch.nan)], dim=3)[..., 0]
    misaligned = torch.cat([torch.zeros(1), x.flatten()])[1:].view_as(x)
    return {
        "canonical values": (x, crow, col, values, bias, *rest),
        "interleaved values": (x, crow, col, interleaved, bias, *rest),
        "transposed x": (x.t().contiguous().t(), crow, col, values, bias, *rest),
        "misaligned x": (misaligned, crow, col, values, bias, *rest),
        "strided bias": (x, crow, col, values, torch.stack([bias, bias], dim=1)[:, 0], *rest),
    }


def simulate(output: Path) -> None:
    """Run every case in Triton's interpreter and save the results."""
    from sparsenlp_kernels.launch import _table

    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    assert torch.zeros(1).new_empty(64).isnan().all()
    limits = _table("bsr_linear")["sm"]["stream"]
    results = {}
    for way, divides in (("tiles", NEVER), ("shares", WHEREVER_POSSIBLE)):
        limits |= divides
        results |= {f"{way} {case}": kernels.bsr_linear(*inputs(case)) for case in SHARE_CASES}
        y = torch.ones(20, 48, dtype=HALF)
        arguments = inputs(SHARE_CASES[-1])
        results[f"{way} in place"] = kernels.bsr_linear(*arguments[:6], y, arguments[7], 0.0, y)
    limits |= NEVER
    results |= {str(case): kernels.bsr_linear(*inputs(case)) for case in CASES}
    limits |= WHEREVER_POSSIBLE
    for case in GRADIENT_CASES:
        grad, x, *pattern, values = gradient_inputs(case)
        results[f"dgrad {case}"] = kernels.bsr_linear_dgrad(grad, *pattern, values, case.columns)
        results[f"wgrad {case}"] = kernels.bsr_linear_wgrad(grad, x, *pattern, case.block)
    for case in LAYOUT_CASES:
        results |= {f"{case} {name}": kernels.bsr_linear(*args) for name, args in other_layouts(case).items()}
    for activation in kernels.ACTIVATIONS:
        results[activation] = kernels.bsr_linear(EXTREMES[:, None], *column_of_ones(), None, activation)
    for tokens in (2, 20):
        x, *rest, _ = inputs(quantized := BsrLinearCase((tokens,), 32, 48, (8, 4), int8=True))
        scales = quantized.weight().scales
        results[f"static scale {tokens}"] = kernels.bsr_linear(x, *rest, scales, 0.01)
        x[1, 5], x[0, 3] = torch.nan, torch.inf
        results[f"static scale, not finite {tokens}"] = kernels.bsr_linear(x, *rest, scales, 0.01)
        results[f"not finite {tokens}"] = kernels.bsr_linear(x, *rest, scales)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    results["tf32"] = kernels.bsr_linear(*inputs(TF32_CASE))
    save_file({name: result.contiguous() for name, result in results.items()}, output)


def column_of_ones() -> tuple[Tensor, Tensor, Tensor]:
    """An 8 x 1 weight of ones in one block."""
    return torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0], dtype=torch.int32), torch.ones(1, 8, 1)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory) -> dict[str, Tensor]:
    output = tmp_path_factory.mktemp("triton") / "results.safetensors"
    threads = {"OMP_NUM_THREADS": "1"}
    paths = os.pathsep.join([*sys.path, str(Path(__file__).parents[1] / "gpu")])
    environment = os.environ | threads | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    run = subprocess.run([sys.executable, __file__, str(output)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return load_file(output)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case, simulated):
    y = simulated[str(case)]
    assert y.dtype == case.dtype
    torch.testing.assert_close(y.double(), case.expected(), **case.tolerance)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", SHARE_CASES, ids=str)
def test_forward_however_the_work_is_divided(case, way, simulated):
    y = simulated[f"{way} {case}"]
    assert y.dtype == case.dtype
    torch.testing.assert_close(y.double(), case.expected(), **case.tolerance)


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=str)
def test_gradient_in_x(case, simulated):
    grad, _, *pattern, values = gradient_inputs(case)
    expected = reference.bsr_linear_dgrad(grad.double(), *pattern, values.double(), case.columns)
    got = simulated[f"dgrad {case}"]
    assert got.dtype == case.dtype
    torch.testing.assert_close(got.double(), expected, **case.tolerance)


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=str)
def test_gradient_in_values(case, simulated):
    grad, x, *pattern, _ = gradient_inputs(case)
    expected = reference.bsr_linear_wgrad(grad.double(), x.double(), *pattern, case.block)
    got = simulated[f"wgrad {case}"]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, **TOLERANCES["bsr_linear_wgrad", torch.float32])


LAYOUTS = ["canonical values", "interleaved values", "transposed x", "misaligned x", "strided bias"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", LAYOUT_CASES, ids=str)
def test_strides_are_free(case, layout, simulated):
    torch.testing.assert_close(simulated[f"{case} {layout}"].double(), case.expected(), **case.tolerance)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh"])
def test_extreme_inputs(activation, simulated):
    expected = reference.bsr_linear(
        EXTREMES[:, None].double(), *column_of_ones()[:2], torch.ones(1, 8, 1).double(), None, activation
    )
    torch.testing.assert_close(simulated[activation].double(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("tokens", [2, 20])
def test_static_input_scale(tokens, simulated):
    case = BsrLinearCase((tokens,), 32, 48, (8, 4), int8=True)
    expected = reference.bsr_linear(*inputs(case), 0.01)
    assert float(case.x().abs().max()) > 1.27, "nothing saturates"
    torch.testing.assert_close(simulated[f"static scale {tokens}"], expected, **case.tolerance)


@pytest.mark.parametrize("tokens", [2, 20])
def test_int8_does_not_hide_tokens_that_are_not_finite(tokens, simulated):
    by_token, static = simulated[f"not finite {tokens}"], simulated[f"static scale, not finite {tokens}"]
    assert not by_token[:2].isfinite().any()
    assert static[1].isnan().all()
    assert static[0].isfinite().all(), "infinity saturates, as every x beyond 127 scales does"
    assert by_token[2:].isfinite().all()


@pytest.mark.parametrize("way", WAYS)
def test_y_may_be_the_residual(way, simulated):
    arguments = inputs(SHARE_CASES[-1])
    expected = reference.bsr_linear(*arguments[:6], torch.ones(20, 48, dtype=HALF), arguments[7])
    torch.testing.assert_close(simulated[f"{way} in place"], expected, **SHARE_CASES[-1].tolerance)


def test_tf32_is_opt_in(simulated):
    """The same product of inputs rounded to 10 bits of fraction, and not the exact one."""
    got, exact = simulated["tf32"].double(), TF32_CASE.expected()
    assert (got - exact).abs().max() > 1e-5
    torch.testing.assert_close(got, exact, rtol=2e-3, atol=2e-3)


def test_every_activation_of_the_op_is_there():
    assert set(kernels.ACTIVATIONS) == set(reference.ACTIVATIONS)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": ((2, 47),)}, ValueError, "expected K in x to be a multiple of 2"),
        ({"x": ((),)}, ValueError, "expected K in x to be a multiple of 2"),
        ({"x": ((2, 48), torch.float64)}, TypeError, "expected x of dtype float32, float16 or bfloat16"),
        ({"x": ((2, 48), torch.float32, "cpu")}, ValueError, "expected x on cuda, got cpu"),
        ({"x": ((2, 1 << 31),)}, ValueError, r"expected fewer than \d+ columns, got 2147483648; split x"),
        ({"x": ((1 << 31, 48),)}, ValueError, r"expected fewer than \d+ tokens, got 2147483648; split x"),
        ({"x": ((1 << 30, 48),)}, ValueError, r"expected fewer than \d+ tokens"),
        ({"values": ((9, 8, 2), HALF)}, TypeError, "expected values of dtype torch.float32, got torch.float16"),
        ({"values": ((9, 8),)}, ValueError, r"expected values of shape \(nnzb, n, k\)"),
        ({"values": ((9, 8, 2), torch.float32, "cpu")}, ValueError, "expected values on cuda:0, got cpu"),
        ({"crow_indices": ((9,), torch.int64)}, TypeError, "expected crow_indices of dtype torch.int32"),
        ({"crow_indices": ((0,), torch.int32)}, ValueError, "expected 1-D contiguous crow_indices"),
        ({"crow_indices": (((1 << 28) + 1,), torch.int32)}, ValueError, r"expected fewer than \d+ rows"),
        ({"col_indices": ((8,), torch.int32)}, ValueError, "expected 9 contiguous col_indices"),
        ({"bias": ((63,),)}, ValueError, r"expected bias of shape \(64,\)"),
        ({"bias": ((64,), HALF)}, TypeError, "expected bias of dtype torch.float32"),
        ({"residual": ((2, 63),)}, ValueError, r"expected residual of shape \(2, 64\)"),
        ({"residual": ((2, 64), HALF)}, TypeError, "expected residual of dtype torch.float32"),
        ({"scales": ((64,),)}, TypeError, "expected values of dtype torch.int8"),
        ({"values": ((9, 8, 2), torch.int8), "scales": ((64,),)}, ValueError, "k a multiple of 4, got 2"),
        ({"values": ((9, 8, 4), torch.int8), "scales": ((63,),)}, ValueError, r"expected scales of shape \(64,\)"),
        ({"values": ((9, 8, 4), torch.int8), "scales": ((64,), HALF)}, TypeError, "scales of dtype torch.float32"),
        (
            {"x": ((2, 1 << 18),), "values": ((9, 8, 4), torch.int8), "scales": ((64,),)},
            ValueError,
            "expected at most 133144 columns of int8, got 262144",
        ),
        ({"activation": "swish"}, ValueError, "expected an activation among none, relu, gelu, gelu_tanh, got 'swish'"),
    ],
)
def test_errors(change, error, message):
    shapes = {
        "x": ((2, 48),),
        "crow_indices": ((9,), torch.int32),
        "col_indices": ((9,), torch.int32),
        "values": ((9, 8, 2),),
        "bias": None,
        "activation": "none",
    } | change
    with FakeTensorMode():
        arguments = {name: fake(*spec) if isinstance(spec, tuple) else spec for name, spec in shapes.items()}
    with pytest.raises(error, match=message):
        kernels.bsr_linear(**arguments)


def fake(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cuda") -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("grad", "x", "message"),
    [
        (((2, 63),), ((2, 48),), "bsr_linear_wgrad: expected grad"),
        (((3, 64),), ((2, 48),), "bsr_linear_wgrad: expected grad"),
        (((2, 64),), ((2, 48), HALF), "bsr_linear_wgrad: expected grad of dtype torch.float16"),
    ],
)
def test_gradient_errors(grad, x, message):
    with FakeTensorMode():
        pattern = fake((9,), torch.int32), fake((9,), torch.int32)
        with pytest.raises((TypeError, ValueError), match=message):
            kernels.bsr_linear_wgrad(fake(*grad), fake(*x), *pattern, (8, 2))
        with pytest.raises(ValueError, match=r"bsr_linear_dgrad: expected grad of shape \(M, 64\)"):
            kernels.bsr_linear_dgrad(fake((2, 63)), *pattern, fake((9, 8, 2)), 48)


if __name__ == "__main__":
    torch.set_num_threads(1)
    from interpreted import strict_launches

    with strict_launches():
        simulate(Path(sys.argv[1]))
