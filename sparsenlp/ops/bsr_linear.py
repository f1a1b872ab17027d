"""Linear layer with a block-sparse weight."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import native, triton_kernels
from ..formats import BlockSparse
from ..reference import bsr_linear as reference
from .devices import on_one_device, register_fake

ACTIVATIONS = tuple(reference.ACTIVATIONS)
BACKENDS = ("native", "reference")
LINEAR_BACKENDS = ("native", "triton", "reference")
NATIVE_DTYPES = (torch.float32, torch.bfloat16)
GPU_DENSE_DENSITY = 0.5
"""Share of stored values above which a GPU multiplies by the dense matrix instead. Not measured."""


def bsr_linear(
    x: Tensor,
    weight: BlockSparse,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    input_scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = act(x Wᵀ + b + residual) for a block-sparse W.

    x            (..., K)    any floating dtype
    weight       N x K       blocks of n x k, of the dtype of x, or int8 (see BlockSparse.quantize)
    bias         (N,)        dtype of x
    activation   "none", "relu", "gelu" (exact, by erf) or "gelu_tanh"
    residual     (..., N)    dtype of x
    input_scale  int8 only: the scale that rounds x to int8; None finds one for each token, max |x| / 127
    backend      "native", "triton", "reference", or None for what `choose_backend` says.
                 A named backend runs or raises RuntimeError.
    returns      (..., N)    dtype of x; sums are kept in float32, for int8 in int32

    With int8 weights an output differs from the float result by at most, with s_x and s_w the scales of
    its token and row, s_x / 2 * sum |w| + s_w / 2 * sum |x| + K s_x s_w / 4, the sums over the stored inputs
    of the row, as long as no |x| exceeds 127 input_scale.

    Under autocast x is cast to the weight's dtype, and the result has that dtype; elsewhere so is an x all of whose
    numbers fit there, such as float16 beside float32.
    The native op looks at every index before it reads x, so that none leads out of it; that columns increase within a
    row is trusted, as it was checked when the weight was built or loaded. So are all indices on a GPU.
    Differentiable in x, the values, the bias and the residual; values get gradients at stored blocks only.
    int8 weights are for inference.

    Raises TypeError if dtypes differ, ValueError if shapes or devices disagree, the activation is unknown,
    or input_scale is not positive and finite, RuntimeError if gradients through int8 are asked for.
    Source: BCSR; kernels after Elsen et al. 2020, arXiv:1911.09723.
    """
    _check_arguments(x, weight, bias, activation, input_scale)
    tensors = (weight.crow_indices, weight.col_indices, weight.values)
    return call(x, *tensors, weight.shape[1], bias, activation, residual, weight.scales, input_scale, backend)


def bsr_linear_add_(
    y: Tensor,
    x: Tensor,
    weight: BlockSparse,
    bias: Tensor | None = None,
    activation: str = "none",
    input_scale: float | None = None,
) -> Tensor:
    """y = act(y + x Wᵀ + b) in place, for a weight that is split in several; returns y.

    y is (..., N) and contiguous; the other arguments and errors are those of `bsr_linear`. Not differentiable.
    """
    _check_arguments(x, weight, bias, activation, input_scale)
    _check_x(x, weight.values, weight.shape[1])
    shape = (*x.shape[:-1], weight.shape[0])
    if y.shape != shape or y.dtype != x.dtype or not y.is_contiguous():
        raise ValueError(
            f"bsr_linear_add_: expected a contiguous y of shape {tuple(shape)} and dtype {x.dtype}, "
            f"got {tuple(y.shape)} and {y.dtype}"
        )
    tensors = (weight.crow_indices, weight.col_indices, weight.values)
    if choose_backend(x, *tensors) == "reference":
        _reference_add_(y, x, *tensors, bias, activation, weight.scales, input_scale or 0.0)
        return y
    _add_op(y, x, *tensors, bias, activation, weight.scales, input_scale or 0.0)
    return y


def call(
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    columns: int,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None = None,
    scales: Tensor | None = None,
    input_scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """bsr_linear on bare tensors, for layers: it checks x, and trusts what the layer checked when it was made."""
    if x.dtype != values.dtype and scales is None:
        x, residual = as_weights("bsr_linear", x, residual, values.dtype)
    _check_x(x, values, columns)
    if residual is not None:
        check_residual("bsr_linear", residual, x, (crow_indices.shape[0] - 1) * values.shape[1])
    scale = input_scale or 0.0
    if choose_backend(x, crow_indices, col_indices, values, backend) == "reference":
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return _reference(x, crow_indices, col_indices, values, bias, activation, residual, scales, scale)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        if scales is not None and (x.requires_grad or (residual is not None and residual.requires_grad)):
            raise RuntimeError("bsr_linear: expected no gradients with int8 weights, got an x that requires them")
        return _op(x, crow_indices, col_indices, values, bias, activation, residual, scales, scale)
    with torch._C._AutoDispatchBelowAutograd():  # skips the Python of register_autograd: 5 to 10 us a call
        return _op(x, crow_indices, col_indices, values, bias, activation, residual, scales, scale)


def as_weights(op: str, x: Tensor, residual: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """x and residual in the weights' dtype: under autocast, or where that holds all numbers of x's.

    The latter is for models that keep some layers in float32 (T5's `wo`). Raises TypeError elsewhere.
    """
    wider = x.is_floating_point() and torch.promote_types(x.dtype, dtype) == dtype
    if not wider and (x.is_meta or not torch.is_autocast_enabled(x.device.type)):
        raise TypeError(f"{op}: expected x of dtype {dtype}, got {x.dtype}")
    return x.to(dtype), None if residual is None else residual.to(dtype)


def _check_arguments(
    x: Tensor, weight: BlockSparse, bias: Tensor | None, activation: str, input_scale: float | None
) -> None:
    dtype = weight.values.dtype if weight.scales is None else x.dtype
    if bias is not None:
        if bias.dtype != dtype:
            raise TypeError(f"bsr_linear: expected bias of dtype {dtype}, got {bias.dtype}")
        if bias.shape != (weight.shape[0],):
            raise ValueError(f"bsr_linear: expected bias of shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"bsr_linear: expected an activation among {', '.join(ACTIVATIONS)}, got {activation!r}")
    if input_scale is not None:
        check_input_scale(input_scale, weight.scales)


def check_input_scale(input_scale: float, scales: Tensor | None, op: str = "bsr_linear") -> None:
    """Raise ValueError unless it is a scale that int8 weights can use."""
    if scales is None or not 0 < input_scale < math.inf:
        raise ValueError(f"{op}: expected a positive, finite input_scale, with int8 weights, got {input_scale}")


def _check_x(x: Tensor, values: Tensor, columns: int) -> None:
    if not x.dim() or x.shape[-1] != columns:
        raise ValueError(f"bsr_linear: expected K = {columns} columns in x, got shape {tuple(x.shape)}")
    if x.device != values.device:
        raise ValueError(f"bsr_linear: expected x on {values.device}, got {x.device}")


def check_residual(op: str, residual: Tensor, x: Tensor, rows: int) -> None:
    """Raise ValueError unless `residual` is (..., rows) beside x (..., K), of its dtype and device."""
    shape = (*x.shape[:-1], rows)
    if residual.shape != shape or residual.dtype != x.dtype or residual.device != x.device:
        raise ValueError(
            f"{op}: expected residual of shape {tuple(shape)} and dtype {x.dtype} on {x.device}, "
            f"got {tuple(residual.shape)} and {residual.dtype} on {residual.device}"
        )


def choose_backend(
    x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, backend: str | None = None
) -> str:
    """The backend that will run, or RuntimeError if the one asked for cannot.

    On a CPU "native" for float32 and bfloat16, where the extension is built. On a GPU "triton" for float32, float16
    and bfloat16, unless a weight that is not int8 stores more than GPU_DENSE_DENSITY of its values; where Triton
    cannot run there, the op raises. Otherwise "reference", which builds the dense matrix.
    """
    on_cpu, on_gpu = x.is_cpu and x.dtype in NATIVE_DTYPES, x.is_cuda and x.dtype in triton_kernels.DTYPES
    if backend is None:
        if on_gpu:
            total = (crow_indices.shape[0] - 1) * values.shape[1] * x.shape[-1]
            dense = values.dtype != torch.int8 and values.numel() > GPU_DENSE_DENSITY * total
            return "reference" if dense else "triton"
        return "native" if native.available and on_cpu else "reference"
    if backend not in LINEAR_BACKENDS:
        raise ValueError(f"bsr_linear: expected a backend among {', '.join(LINEAR_BACKENDS)}, got {backend!r}")
    if backend == "native" and not native.available:
        raise RuntimeError(f"bsr_linear: backend 'native' cannot run: {native.why_unavailable}")
    for name, runs, needs in (
        ("native", on_cpu, "float32 or bfloat16 on cpu"),
        ("triton", on_gpu, "float32, float16 or bfloat16 on cuda"),
    ):
        if backend == name and not runs:
            raise RuntimeError(
                f"bsr_linear: backend {name!r} cannot run: expected {needs}, "
                f"got {x.dtype} on {x.device} of shape {tuple(x.shape)}"
            )
    return backend


# The torch.library ops. They exist without the extension too (then they run the reference), so that
# exported programs load everywhere.
_WEIGHT = "Tensor crow_indices, Tensor col_indices, Tensor values"
_SCHEMAS = {
    "bsr_linear": f"(Tensor x, {_WEIGHT}, Tensor? bias, str activation, Tensor? residual=None, "
    "Tensor? scales=None, float input_scale=0.0) -> Tensor",
    "bsr_linear_add_": f"(Tensor(a!) y, Tensor x, {_WEIGHT}, Tensor? bias, str activation, "
    "Tensor? scales=None, float input_scale=0.0) -> ()",
    "bsr_linear_dgrad": f"(Tensor grad, {_WEIGHT}, int columns) -> Tensor",
    "bsr_linear_wgrad": "(Tensor grad, Tensor x, Tensor crow_indices, Tensor col_indices, int[] block) -> Tensor",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"sparsenlp::{_name}", _schema)
_op = torch.ops.sparsenlp.bsr_linear.default
_add_op = torch.ops.sparsenlp.bsr_linear_add_.default
_dgrad_op = torch.ops.sparsenlp.bsr_linear_dgrad.default
_wgrad_op = torch.ops.sparsenlp.bsr_linear_wgrad.default


_reference = on_one_device("bsr_linear", reference.bsr_linear)


def _add_by_reference(
    y: Tensor,
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    bias: Tensor | None,
    activation: str,
    scales: Tensor | None = None,
    input_scale: float = 0.0,
) -> None:
    y.copy_(reference.bsr_linear(x, crow_indices, col_indices, values, bias, activation, y, scales, input_scale))


_reference_add_ = on_one_device("bsr_linear_add_", _add_by_reference)


if not native.available:
    torch.library.impl("sparsenlp::bsr_linear", "cpu", reference.bsr_linear)
    torch.library.impl("sparsenlp::bsr_linear_add_", "cpu", _reference_add_)
    torch.library.impl("sparsenlp::bsr_linear_dgrad", "cpu", reference.bsr_linear_dgrad)
    torch.library.impl("sparsenlp::bsr_linear_wgrad", "cpu", reference.bsr_linear_wgrad)


def _triton(x: Tensor, *rest: Any) -> Tensor:
    return triton_kernels.load("bsr_linear", x).bsr_linear(x, *rest)


def _triton_add_(
    y: Tensor,
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    bias: Tensor | None,
    activation: str,
    scales: Tensor | None = None,
    input_scale: float = 0.0,
) -> None:
    kernels = triton_kernels.load("bsr_linear", x)
    kernels.bsr_linear(x, crow_indices, col_indices, values, bias, activation, y, scales, input_scale, y)


def _triton_dgrad(grad: Tensor, *rest: Any) -> Tensor:
    return triton_kernels.load("bsr_linear", grad).bsr_linear_dgrad(grad, *rest)


def _triton_wgrad(grad: Tensor, *rest: Any) -> Tensor:
    return triton_kernels.load("bsr_linear", grad).bsr_linear_wgrad(grad, *rest)


torch.library.impl("sparsenlp::bsr_linear_add_", "cuda", on_one_device("bsr_linear_add_", _triton_add_))
for _name, _function in (
    ("bsr_linear", _triton),
    ("bsr_linear_dgrad", _triton_dgrad),
    ("bsr_linear_wgrad", _triton_wgrad),
):
    triton_kernels.register(_name, on_one_device(_name, _function))


@register_fake("bsr_linear")
def _fake(
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None = None,
    scales: Tensor | None = None,
    input_scale: float = 0.0,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], (crow_indices.shape[0] - 1) * values.shape[1])


@register_fake("bsr_linear_add_")
def _fake_add_(*_: Any) -> None:
    return None


@register_fake("bsr_linear_dgrad")
def _fake_dgrad(grad: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, columns: int) -> Tensor:
    return grad.new_empty(grad.shape[0], columns)


@register_fake("bsr_linear_wgrad")
def _fake_wgrad(grad: Tensor, x: Tensor, crow_indices: Tensor, col_indices: Tensor, block: list[int]) -> Tensor:
    return x.new_empty(col_indices.shape[0], *block, dtype=torch.promote_types(x.dtype, torch.float32))


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.activation, residual, ctx.scales, _ = inputs
    ctx.save_for_backward(*tensors, residual)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    x, crow, col, values, bias, residual = ctx.saved_tensors
    if ctx.scales is not None:
        raise RuntimeError("bsr_linear: expected no gradients with int8 weights")
    if ctx.activation != "none":
        before = _op(x, crow, col, values, bias, "none", residual)
        grad = ACTIVATION_BACKWARD[ctx.activation](grad, before)
    grad_x = grad_values = grad_bias = None
    grad_rows = grad.reshape(-1, grad.shape[-1]).contiguous()
    if ctx.needs_input_grad[0]:
        grad_x = _dgrad_op(grad_rows, crow, col, values, x.shape[-1]).reshape(x.shape)
    if ctx.needs_input_grad[3]:
        x_rows = x.reshape(-1, x.shape[-1]).contiguous()
        grad_values = _wgrad_op(grad_rows, x_rows, crow, col, list(values.shape[1:])).to(values.dtype)
    if ctx.needs_input_grad[4]:
        grad_bias = grad_rows.sum(0)
    return grad_x, None, None, grad_values, grad_bias, None, grad if residual is not None else None, None, None


ACTIVATION_BACKWARD = {
    "relu": lambda grad, before: grad * (before > 0),
    "gelu": lambda grad, before: torch.ops.aten.gelu_backward(grad, before, approximate="none"),
    "gelu_tanh": lambda grad, before: torch.ops.aten.gelu_backward(grad, before, approximate="tanh"),
}

torch.library.register_autograd("sparsenlp::bsr_linear", _backward, setup_context=_setup_context)
