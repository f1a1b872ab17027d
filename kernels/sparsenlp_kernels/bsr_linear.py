"""bsr_linear, act(x Wᵀ + b + residual) for a weight in BSR, and its gradients: compiled and simulated, not run on
hardware.

bsr_linear_product.py   the product, its kernels and how they divide the work
bsr_linear_int8.py      tokens rounded to int8
bsr_linear_backward.py  the gradients

Needs compute capability 8.0 (cp.async and bfloat16 mma), or gfx90a and later of AMD.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .bsr_linear_backward import plan_dgrad, plan_wgrad
from .bsr_linear_int8 import COLUMNS, plan_quantize
from .bsr_linear_product import INT8_UNIT, Epilogue, Pattern, gathers, plan_product
from .launch import INTERPRETED, Device, Launch, check_countable, run

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def bsr_linear(
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None = None,
    scales: Tensor | None = None,
    input_scale: float = 0.0,
    y: Tensor | None = None,
) -> Tensor:
    """y = act(x Wᵀ + b + residual) for a block-sparse W; no gradient.

    x             (..., K)      float32, float16 or bfloat16, on a GPU (on CPU where Triton interprets)
    crow_indices  (N / n + 1,)  int32, contiguous
    col_indices   (nnzb,)       int32, contiguous
    values        (nnzb, n, k)  dtype of x or int8, any strides; the kernel is compiled for these strides
    bias          (N,)          dtype of x, or None
    activation    "none", "relu", "gelu" (by erf) or "gelu_tanh"
    residual      (..., N)      dtype of x, or None
    scales        (N,)          float32, with int8 values and only then
    input_scale   int8 only: the scale that rounds x to int8; 0 finds one for each token, max |x| / 127
    y             (..., N)      dtype of x, contiguous: filled and returned; it may be the residual
    returns       (..., N)      dtype of x; sums are in float32, for int8 in int32, activation is in float32

    float32 is multiplied as such, or as TF32 where torch.backends.cuda.matmul.fp32_precision is "tf32".
    The content of the indices is trusted. Raises TypeError for a dtype, ValueError for a shape, a device
    or an activation that does not fit, or a size that 32 bits cannot count.
    """
    _check(x, crow_indices, col_indices, values, bias, activation, residual, scales)
    if y is None:
        y = x.new_empty(*x.shape[:-1], (crow_indices.shape[0] - 1) * values.shape[1])
    if y.numel():
        run(plan(x, crow_indices, col_indices, values, bias, activation, y, residual, scales, input_scale), x)
    return y


def plan(
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    bias: Tensor | None,
    activation: str,
    y: Tensor,
    residual: Tensor | None = None,
    scales: Tensor | None = None,
    input_scale: float = 0.0,
    device: Device | None = None,
) -> list[Launch]:
    """The launches, in order, that fill y (..., N), not empty and contiguous, from arguments that are known to fit."""
    device = Device.of(x) if device is None else device
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    bias, residual, scales = (t.contiguous() if t is not None else None for t in (bias, residual, scales))
    launches, x_scale = [], None
    if scales is not None:
        _, n, k = values.shape
        rows, x_scale, quantize = plan_quantize(rows, input_scale, gathers(rows.shape[0], n, k, values.dtype, device))
        launches.append(quantize)
    epilogue = Epilogue(bias, residual, x_scale, scales, activation)
    pattern = Pattern(crow_indices, col_indices)
    return launches + plan_product(rows, pattern, values, epilogue, y, device)


def bsr_linear_dgrad(grad: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, columns: int) -> Tensor:
    """grad W: grad (M, N) -> (M, columns), dtype of grad; the other arguments as for bsr_linear, floating dtypes."""
    n = values.shape[1]
    _check_pattern("bsr_linear_dgrad", "grad", grad, crow_indices, col_indices, n, columns)
    _check_like("bsr_linear_dgrad", "values", values, grad)
    rows = (crow_indices.shape[0] - 1) * n
    if grad.dim() != 2 or grad.shape[1] != rows:
        raise ValueError(f"bsr_linear_dgrad: expected grad of shape (M, {rows}), got {tuple(grad.shape)}")
    dx = grad.new_empty(grad.shape[0], columns)
    if dx.numel():
        run(plan_dgrad(grad, crow_indices, col_indices, values, dx, Device.of(grad)), grad)
    return dx


def bsr_linear_wgrad(
    grad: Tensor, x: Tensor, crow_indices: Tensor, col_indices: Tensor, block: tuple[int, int]
) -> Tensor:
    """Blocks of gradᵀ x that the pattern stores: grad (M, N), x (M, K), one dtype -> (nnzb, n, k) float32."""
    n, k = block
    _check_like("bsr_linear_wgrad", "grad", grad, x)
    rows = (crow_indices.shape[0] - 1) * n
    if x.dim() != 2 or grad.shape != (x.shape[0], rows):
        raise ValueError(
            f"bsr_linear_wgrad: expected grad (M, {rows}) and x (M, K), got {tuple(grad.shape)} and {tuple(x.shape)}"
        )
    _check_pattern("bsr_linear_wgrad", "x", x, crow_indices, col_indices, n, x.shape[1])
    if not x.shape[0] or not col_indices.shape[0]:
        return x.new_zeros(col_indices.shape[0], n, k, dtype=torch.float32)
    launches, dvalues = plan_wgrad(grad, x, crow_indices, col_indices, (n, k), Device.of(x))
    run(launches, x)
    return dvalues.squeeze(0) if dvalues.shape[0] == 1 else dvalues.sum(0)


def _check(
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scales: Tensor | None,
) -> None:
    """Raise TypeError or ValueError unless the arguments of bsr_linear fit together."""
    op = "bsr_linear"
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: expected an activation among {', '.join(ACTIVATIONS)}, got {activation!r}")
    if values.dim() != 3 or 0 in values.shape[1:]:
        raise ValueError(f"{op}: expected values of shape (nnzb, n, k), got {tuple(values.shape)}")
    blocks, n, k = values.shape
    if not x.dim() or x.shape[-1] % k:
        raise ValueError(f"{op}: expected K in x to be a multiple of {k}, got shape {tuple(x.shape)}")
    _check_pattern(op, "x", x, crow_indices, col_indices, n, x.shape[-1])
    if col_indices.shape != (blocks,):
        raise ValueError(f"{op}: expected {blocks} contiguous col_indices, got shape {tuple(col_indices.shape)}")
    rows = (crow_indices.shape[0] - 1) * n
    if scales is None:
        _check_like(op, "values", values, x)
    else:
        _check_like(op, "values", values, x, torch.int8)
        _check_like(op, "scales", scales, x, torch.float32)
        if scales.shape != (rows,):
            raise ValueError(f"{op}: expected scales of shape ({rows},), got {tuple(scales.shape)}")
        if k % INT8_UNIT:
            raise ValueError(f"{op}: expected int8 blocks with k a multiple of {INT8_UNIT}, got {k}")
        if x.shape[-1] > COLUMNS:
            raise ValueError(f"{op}: expected at most {COLUMNS} columns of int8, got {x.shape[-1]}")
    if bias is not None:
        _check_like(op, "bias", bias, x)
        if bias.shape != (rows,):
            raise ValueError(f"{op}: expected bias of shape ({rows},), got {tuple(bias.shape)}")
    if residual is not None:
        _check_like(op, "residual", residual, x)
        if residual.shape != (*x.shape[:-1], rows):
            shape = (*x.shape[:-1], rows)
            raise ValueError(f"{op}: expected residual of shape {tuple(shape)}, got {tuple(residual.shape)}")


def _check_pattern(
    op: str, name: str, x: Tensor, crow_indices: Tensor, col_indices: Tensor, n: int, columns: int
) -> None:
    """Raise unless x is what kernels run on, and the indices are what they read beside it."""
    if x.dtype not in DTYPES:
        raise TypeError(f"{op}: expected {name} of dtype float32, float16 or bfloat16, got {x.dtype}")
    device = "cpu" if INTERPRETED else "cuda"
    if x.device.type != device:
        raise ValueError(f"{op}: expected {name} on {device}, got {x.device}")
    _check_like(op, "crow_indices", crow_indices, x, torch.int32)
    _check_like(op, "col_indices", col_indices, x, torch.int32)
    if crow_indices.dim() != 1 or not crow_indices.shape[0] or not crow_indices.is_contiguous():
        raise ValueError(f"{op}: expected 1-D contiguous crow_indices, got shape {tuple(crow_indices.shape)}")
    if col_indices.dim() != 1 or not col_indices.is_contiguous():
        raise ValueError(f"{op}: expected 1-D contiguous col_indices, got shape {tuple(col_indices.shape)}")
    block_rows, tokens = crow_indices.shape[0] - 1, math.prod(x.shape[:-1])
    sizes = {
        "rows": block_rows * n,
        "columns": columns,
        "tokens": tokens,
        "stored blocks": col_indices.shape[0],
        "tiles of 16 tokens and 8 rows": tokens // 16 * block_rows * ((n + 7) // 8),
    }
    check_countable(op, sizes, f"split {name} of shape {tuple(x.shape)} or the weight")


def _check_like(op: str, name: str, tensor: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> None:
    dtype = x.dtype if dtype is None else dtype
    if tensor.dtype != dtype:
        raise TypeError(f"{op}: expected {name} of dtype {dtype}, got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{op}: expected {name} on {x.device}, got {tensor.device}")
