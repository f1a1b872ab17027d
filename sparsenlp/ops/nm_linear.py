"""Linear layer with an N:M sparse weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..formats import NM
from ..formats.nm import pack_indices
from ..reference import nm_linear as reference
from . import nm_linear_cuda as cuda
from .bsr_linear import ACTIVATION_BACKWARD, ACTIVATIONS, NATIVE_DTYPES, as_weights, check_residual
from .devices import on_one_device, register_fake

BACKENDS = ("native", "cuda", "reference")
NATIVE_PATTERNS = ((2, 4), (1, 4), (4, 8))


def nm_linear(
    x: Tensor,
    weight: NM,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    input_scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = act(x Wᵀ + b + residual) for a W that stores n of every m neighbouring inputs.

    x            (..., K)    any floating dtype
    weight       N x K       values of the dtype of x, or int8 with scales (NM.quantize)
    bias         (N,)        dtype of x
    activation   "none", "relu", "gelu" (exact, by erf) or "gelu_tanh"
    residual     (..., N)    dtype of x
    input_scale  int8 only: the scale that rounds x to int8; None finds one for each token, max |x| / 127
    backend      None chooses: on a GPU "cuda"; on a CPU "native" for float32 and bfloat16 x and values, with a
                 pattern of 2:4, 1:4 or 4:8, where the extension is built, else "reference".
                 "cuda" takes 2:4, x in float16 or bfloat16 and K a multiple of 16, or int8 values, x in one of
                 them or float32, and K a multiple of 32. What it does not take raises RuntimeError:
                 dense products on a GPU have to be asked for. So does a named backend that cannot run.
    returns      (..., N)    dtype of x; sums are kept in float32, for int8 in int32

    Kernels read the values as they are, and the indices packed to 2 bits (4 bits for m = 8). This function
    packs them on every call; `NMLinear` packs them once. Values are never copied, so that an optimizer
    may change them in place at any time.

    Under autocast x is cast to the weight's dtype, and the result has that dtype; elsewhere so is an x all of whose
    numbers fit there, such as float16 beside float32.
    That indices increase within a group is trusted, as it was checked when the weight was built or loaded; kernels cut
    them to the group.
    Differentiable in x, the values, the bias and the residual, on a GPU too; the gradients take dense matrix
    products. int8 weights are for inference.

    Raises TypeError if dtypes differ, ValueError if shapes or devices disagree, the activation is unknown, or
    input_scale is not positive and finite, RuntimeError if gradients through int8 are asked for.
    Source: 2:4 after Mishra et al. 2021, arXiv:2104.08378.
    """
    if bias is not None:
        dtype = weight.values.dtype if weight.scales is None else x.dtype
        if bias.dtype != dtype:
            raise TypeError(f"nm_linear: expected bias of dtype {dtype}, got {bias.dtype}")
        if bias.shape != (weight.shape[0],):
            raise ValueError(f"nm_linear: expected bias of shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"nm_linear: expected an activation among {', '.join(ACTIVATIONS)}, got {activation!r}")
    if input_scale is not None and (weight.scales is None or not 0 < input_scale < math.inf):
        raise ValueError(f"nm_linear: expected a positive, finite input_scale, with int8 weights, got {input_scale}")
    packed = pack(weight.indices, weight.pattern)
    tensors = (weight.values, weight.indices, packed, weight.pattern)
    return call(x, *tensors, weight.shape[1], bias, activation, residual, weight.scales, input_scale, backend)


def pack(indices: Tensor, pattern: tuple[int, int]) -> Tensor | None:
    """`indices` as the native and the CUDA kernels read them; None where none does."""
    return pack_indices(indices, pattern) if tuple(pattern) in NATIVE_PATTERNS else None


def call(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    packed: Tensor | None,
    pattern: tuple[int, int],
    columns: int,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None = None,
    scales: Tensor | None = None,
    input_scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """nm_linear on bare tensors, for layers: it checks x, and trusts what the layer checked when it was made."""
    if x.dtype != values.dtype and scales is None:
        x, residual = as_weights("nm_linear", x, residual, values.dtype)
    if not x.dim() or x.shape[-1] != columns:
        raise ValueError(f"nm_linear: expected K = {columns} columns in x, got shape {tuple(x.shape)}")
    if x.device != values.device:
        raise ValueError(f"nm_linear: expected x on {values.device}, got {x.device}")
    if residual is not None:
        check_residual("nm_linear", residual, x, values.shape[0])
    scale = input_scale or 0.0
    if _choose(x, values, packed, pattern, backend) == "reference":
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return _reference(x, values, indices, packed, pattern, bias, activation, residual, scales, scale)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        if scales is not None and (x.requires_grad or (residual is not None and residual.requires_grad)):
            raise RuntimeError("nm_linear: expected no gradients with int8 weights, got an x that requires them")
        return _op(x, values, indices, packed, pattern, bias, activation, residual, scales, scale)
    with torch._C._AutoDispatchBelowAutograd():  # skips the Python of register_autograd: 5 to 10 us a call
        return _op(x, values, indices, packed, pattern, bias, activation, residual, scales, scale)


def _choose(x: Tensor, values: Tensor, packed: Tensor | None, pattern: tuple[int, int], backend: str | None) -> str:
    """The backend that will run, or RuntimeError if the one asked for cannot, or none for a GPU."""
    if backend not in (None, *BACKENDS):
        raise ValueError(f"nm_linear: expected a backend among {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "cuda" or (backend is None and x.is_cuda):
        if reason := cuda.why_not(x, values, packed, pattern):
            raise RuntimeError(
                f"{cuda.describe(x, values, pattern)}: backend 'cuda' cannot run: {reason}. "
                "backend='reference' multiplies densely, as does the layer that NMLinear.to_dense() gives"
            )
        return "cuda"
    runs = x.dtype in NATIVE_DTYPES and values.dtype == x.dtype and x.is_cpu and packed is not None
    if backend is None:
        return "native" if native.available and runs else "reference"
    if backend == "native":
        if not native.available:
            raise RuntimeError(f"nm_linear: backend 'native' cannot run: {native.why_unavailable}")
        if packed is None:
            patterns = ", ".join(f"{n}:{m}" for n, m in NATIVE_PATTERNS)
            raise RuntimeError(f"nm_linear: backend 'native' cannot run: expected a pattern among {patterns}")
        if not runs:
            raise RuntimeError(
                f"nm_linear: backend 'native' cannot run: expected float32 or bfloat16 on cpu, "
                f"got {x.dtype} with {values.dtype} values on {x.device}"
            )
    return backend


# The torch.library op. It exists without the extension too (then it runs the reference), so that exported
# programs load everywhere.
torch.library.define(
    "sparsenlp::nm_linear",
    "(Tensor x, Tensor values, Tensor indices, Tensor packed, int[] pattern, Tensor? bias, str activation, "
    "Tensor? residual=None, Tensor? scales=None, float input_scale=0.0) -> Tensor",
)
_op = torch.ops.sparsenlp.nm_linear.default


def _without_packed(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    packed: Tensor | None,
    pattern: Sequence[int],
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None = None,
    scales: Tensor | None = None,
    input_scale: float = 0.0,
) -> Tensor:
    n, m = pattern
    return reference.nm_linear(x, values, indices, (n, m), bias, activation, residual, scales, input_scale)


_reference = on_one_device("nm_linear", _without_packed)


if not native.available:
    torch.library.impl("sparsenlp::nm_linear", "cpu", _reference)
torch.library.impl("sparsenlp::nm_linear", "cuda", on_one_device("nm_linear", cuda.forward))


@register_fake("nm_linear")
def _fake(x: Tensor, values: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0])


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, values, indices, packed, ctx.pattern, bias, ctx.activation, residual, ctx.scales, _ = inputs
    ctx.save_for_backward(x, values, indices, packed, bias, residual)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    x, values, indices, packed, bias, residual = ctx.saved_tensors
    if ctx.scales is not None:
        raise RuntimeError("nm_linear: expected no gradients with int8 weights")
    if ctx.activation != "none":
        before = _op(x, values, indices, packed, ctx.pattern, bias, "none", residual)
        grad = ACTIVATION_BACKWARD[ctx.activation](grad, before)
    grad_x = grad_values = grad_bias = None
    grad_rows = grad.reshape(-1, grad.shape[-1])
    if ctx.needs_input_grad[0]:
        grad_x = reference.nm_linear_dgrad(grad_rows, values, indices, ctx.pattern, x.shape[-1]).reshape(x.shape)
    if ctx.needs_input_grad[1]:
        x_rows = x.reshape(-1, x.shape[-1])
        grad_values = reference.nm_linear_wgrad(grad_rows, x_rows, indices, ctx.pattern)
    if ctx.needs_input_grad[5]:
        grad_bias = grad_rows.sum(0)
    grad_residual = grad if residual is not None else None
    return grad_x, grad_values, None, None, None, grad_bias, None, grad_residual, None, None


torch.library.register_autograd("sparsenlp::nm_linear", _backward, setup_context=_setup_context)
